"""`attnrt tune`, end to end on small calls: what it keeps, what it goes on from, and what may not win."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import Command
from figures import Fails, Planted, SlightlyWrong, WrongGradient, WrongLastHead

import attnrt
from attnrt import runtime
from attnrt.environment import Environment
from attnrt.evidence import store
from attnrt.evidence.calls import Call
from attnrt.evidence.tuning import coarse_first, default_calls, expected_seconds, tune
from attnrt.policies.kinds import place_of

CPU = Environment.detect("cpu")
BASE = Call(heads_q=4, heads_kv=2, head_dim=16, seqlen_q=32, dtype="fp32", layout="bhsd")
TINY = "--heads 4 --kv-heads 2 --head-dim 16 --dtype fp32 --layout bhsd --seconds 0.005"


pytestmark = pytest.mark.usefixtures("cache")


def run(calls: list[Call], **options: Any) -> Any:
    file = options.pop("file", store.file_for(runtime.variables().cache_dir, CPU))
    return tune(calls, file, CPU, runtime.settings(None, "default"), seconds=0.005, **options)


def test_measures_and_is_used_from_then_on(cache: Path) -> None:
    done = run([BASE, BASE.changed(training=True)])
    assert [call.training for call, _ in done.measured] == [False, True] and not done.left
    content = store.read(done.file)
    (plain,), (training,) = (kind.calls for kind in sorted(content.kinds, key=lambda k: len(k.features)))
    assert set(plain.ms) == set(training.ms) == {"torch.flash_cpu", "torch.math", "reference"}
    assert all(ms > 0 for kind in (plain, training) for ms in kind.ms.values())
    assert all(s >= 0 for s in plain.spread.values()) and content.measured_on.packages["torch"] == torch.__version__
    attnrt.refresh()
    found = attnrt.explain_shape(batch=1, heads_q=4, heads_kv=2, seqlen_q=32, head_dim=16, dtype="fp32", layout="bhsd")
    assert found.policy == "tuned"
    assert found.evidence.startswith("measured at 32 (B 1, 4/2 heads): ")


def test_goes_on_where_it_stopped() -> None:
    calls = [BASE.changed(seqlen_q=n) for n in (16, 32, 64)]
    first = run(calls[:2])
    done = run(calls)
    assert [c.seqlen_q for c, _ in done.measured] == [64] and len(done.known) == 2
    assert len(run(calls, again=True).measured) == 3
    assert len(store.read(first.file).kinds[0].calls) == 3


def test_no_budget_measures_nothing() -> None:
    done = run([BASE], budget=0.0)
    assert not done.measured and done.left == [BASE] and not done.file.exists()


def test_what_would_not_fit_the_budget_is_left() -> None:
    huge = BASE.changed(seqlen_q=65536, heads_q=32, heads_kv=32)
    assert expected_seconds(huge.request(), CPU) > 100
    done = run([huge, BASE], budget=30.0)
    assert done.left == [huge] and len(done.measured) == 1


def test_ctrl_c_keeps_what_was_measured() -> None:
    def stop(call: Call, found: Any) -> None:
        if found is None and call.seqlen_q == 64:
            raise KeyboardInterrupt

    done = run([BASE, BASE.changed(seqlen_q=64)], progress=stop)
    assert done.interrupted and len(done.measured) == 1
    assert len(store.read(done.file).kinds[0].calls) == 1
    assert len(run([BASE, BASE.changed(seqlen_q=64)]).measured) == 1


@pytest.mark.parametrize(
    ("kind", "training", "what"),
    [
        (SlightlyWrong, False, "the output"),
        (WrongLastHead, False, "the output"),
        (WrongGradient, True, "the gradient of k"),
        (WrongGradient, False, None),
        (Planted, True, None),
    ],
)
def test_a_wrong_backend_may_not_win(kind: type[Planted], training: bool, what: str | None) -> None:
    attnrt.register_backend(kind())
    done = run([BASE.changed(training=training)])
    ((_, found),) = done.measured
    (call,) = store.read(done.file).kinds[0].calls
    if what is None:
        assert not found.wrong and "planted" in call.ms
        return
    assert what in found.wrong["planted"] and what in call.wrong["planted"]
    assert "planted" not in call.ms and "planted" not in found.timings
    attnrt.refresh()
    shape: dict[str, Any] = {"batch": 1, "heads_q": 4, "heads_kv": 2, "seqlen_q": 32, "head_dim": 16}
    shape |= {"dtype": "fp32", "layout": "bhsd", "training": training}
    with attnrt.override(prefer=("planted",)):
        decision = attnrt.explain_shape(**shape)
    assert decision.backend != "planted"
    assert [r.rule for r in decision.verdicts["planted"].reasons] == ["MEASURED_WRONG"]
    assert attnrt.explain_shape(**shape, policy="default", backend="planted").backend == "planted"


def test_a_backend_that_fails_is_left_out() -> None:
    attnrt.register_backend(Fails())
    ((_, found),) = run([BASE]).measured
    assert "no such kernel image" in found.failed["planted"] and len(found.timings) == 3


def test_disabled_backends_are_not_measured() -> None:
    with attnrt.override(disable=("reference", "torch.math")):
        ((_, found),) = run([BASE]).measured
    assert list(found.timings) == ["torch.flash_cpu"]
    assert {"reference", "torch.math"} <= {r.candidate.name for r in found.refused}


def test_a_call_that_nothing_serves() -> None:
    with attnrt.override(disable=("reference", "torch")):
        done = run([BASE])
    assert not done.measured and "no kernel can serve it" in done.refused[BASE]


def test_coarse_first() -> None:
    lengths = (16, 32, 64, 128, 256)
    calls = [BASE.changed(seqlen_q=n) for n in lengths] + [BASE.changed(seqlen_q=n, causal=True) for n in (16, 32)]
    order = [(c.seqlen_q, c.causal) for c in coarse_first([*calls, *calls])]
    assert sorted(order) == sorted((c.seqlen_q, c.causal) for c in calls)
    assert order[:4] == [(16, False), (16, True), (256, False), (32, True)] and order[4] == (64, False)


def test_default_calls() -> None:
    for environment in (CPU, Environment.named("h200")):
        calls = default_calls(environment)
        places = [(c.dtype, c.head_dim, c.training, c.causal, place_of(c.request())) for c in calls]
        assert len(calls) > 50 and len(set(calls)) == len(calls) and len(places) == len(calls)
        assert {c.training for c in calls} == {True, False} and any(c.seqlen_q == 1 for c in calls)


# ---- the command


def test_the_command(command: Command, cache: Path) -> None:
    code, out, err = command(f"tune {TINY} --seqlen 16,32 --causal")
    assert (code, err) == (0, "")
    assert "2 calls measured" in out and "used from now on" in out and "torch." in out
    (file,) = (cache / "tuned").glob("*.yaml")
    assert f"wrote {file}" in out
    code, out, _ = command(f"tune {TINY} --seqlen 16,32 --causal")
    assert code == 0 and "0 calls measured" in out and "2 known already" in out
    code, out, _ = command("tune --show")
    assert code == 0 and "fp32, head_dim 16, causal" in out and "B 1, 4/2 heads, 16: " in out
    code, out, _ = command(
        "explain --heads 4 --kv-heads 2 --head-dim 16 --dtype fp32 --layout bhsd --seqlen 16 --causal"
    )
    assert code == 0 and "tuned: fp32, head_dim 16, causal" in out
    assert "policy    tuned" in command("report").out.replace("policy   tuned", "policy    tuned")
    code, out, _ = command("tune --forget")
    assert code == 0 and not file.exists() and command("tune --forget").code == 1 and command("tune --show").code == 1


def test_the_command_writes_a_file_by_name(command: Command, cache: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    code, out, _ = command(f"tune {TINY} --seqlen 16 --output {file}")
    assert code == 0 and f"ATTNRT_POLICY={file}" in out and not (cache / "tuned").exists()
    code, out, _ = command(
        f"explain --heads 4 --kv-heads 2 --head-dim 16 --dtype fp32 --layout bhsd --seqlen 16 --policy {file}"
    )
    assert "tuned: fp32, head_dim 16" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tune --preset lama", ("preset='lama'", "llama3-8b")),
        ("tune --preset vit-l16 --causal", ("--causal", "preset")),
        ("tune --phase decode", ("--phase", "--preset")),
        ("tune --seqlen 4x", ("--seqlen='4x'", "512,2k,8k")),
        ("tune --seqlen 32 --with sink", ("--with='sink'", "sinks")),
        ("tune --seqlen 32 --with softcap=a", ("--with", "number")),
        ("tune --seqlen 32 --heads 5 --kv-heads 2", ("heads_kv=2", "5")),
        ("tune --seqlen 32 --kv-seqlen 64 --causal", ("alignment=None",)),
        ("tune --budget -1", ("--budget=-1.0",)),
        ("tune --output here", ("--output='here'", ".yaml")),
        ("tune --device cuda:9x", ("device='cuda:9x'",)),
        ("bench --seqlen 32 --backend cudn", ("backend='cudn'", "cudnn")),
    ],
)
def test_bad_input(command: Command, arguments: str, words: tuple[str, ...]) -> None:
    code, out, err = command(arguments)
    assert (code, out) == (2, "") and err.startswith("attnrt: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


def test_presets_are_listed(command: Command) -> None:
    for name in ("tune", "bench"):
        code, out, _ = command(f"{name} --presets")
        assert code == 0 and "llama3-70b" in out and "decode" in out
