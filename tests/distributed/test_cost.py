"""Bytes on the wire, counted; the formulas for them; memory, measured; and the choice of a method by them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import spread
from typer.testing import CliRunner

import attnrt
from attnrt.cli import app
from attnrt.distributed import explain_shape
from attnrt.distributed.cost import cost
from attnrt.distributed.simulator import evenly, measured, predict, work_at_scale, work_of
from attnrt.errors import ArgumentError, UnknownNameError
from attnrt.request import AttentionRequest

SHAPE: dict[str, Any] = {"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 131072, "head_dim": 128}
SHAPE |= {"causal": True, "training": True, "environment": "h200"}


def test_counted_bytes_and_measured_memory(tmp_path: Path) -> None:
    outcomes = spread("traffic_ranks:everything", 3, tmp_path, length=1536)
    assert [o.error for o in outcomes] == [""] * 3
    counts = [o.value["count"] for o in outcomes]
    wrong = [
        f"rank {rank}, {key}: counted {counted}, formula {said}"
        for rank, found in enumerate(counts)
        for key, (counted, said) in found.items()
        if counted != said
    ]
    assert not wrong, "\n".join(wrong)
    assert len(counts[0]) == 13 * 2 * 3
    assert all(sum(counted) > 0 for key, (counted, _) in counts[0].items() if key[0] == "full")
    window = max(found["left window", "gather", "contiguous"][0] for found in counts)
    assert window < counts[0]["full", "gather", "contiguous"][0], "a window moves less"
    peaks = [o.value["peaks"] for o in outcomes]
    for key in peaks[0]:
        taken, said = (max(found[key][i] for found in peaks) for i in (0, 1))
        # Near 1, as seen; the room is for buffers that a transport's threads free late.
        assert 0.6 < said / taken < 1.7, (key, taken, said)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
def test_formulas(ranks: int) -> None:
    """As the module's docstring has them, for equal shards."""
    b, s, hq, hkv, d, e = 2, 1024 * ranks, 16, 4, 64, 2
    shape = {"batch": b, "heads_q": hq, "heads_kv": hkv, "seqlen_q": s, "head_dim": d, "causal": True}
    request = evenly(AttentionRequest.from_shape(**shape, training=True), ranks, "zigzag")
    kv, q, o = b * s * hkv * 2 * d * e, b * s * hq * d * e, b * s * hq * d * e
    n = ranks
    copies = max(1, n // hkv)
    gather, ring, ulysses = (cost(request, m) for m in ("gather", "ring", "ulysses"))
    assert (gather.forward, gather.backward) == (kv * (n - 1) // n, kv * (n - 1) // n * 4 // e)
    assert (ring.forward, ring.backward) == (kv * (n - 1) // n, kv * (n - 1) // n + (kv * 4 // e if n > 1 else 0))
    assert ulysses.forward == ulysses.backward == (q + copies * kv + o) * (n - 1) // n**2
    assert gather.pairs == ring.pairs == ulysses.pairs == b * hq * s * (s + 1) // 2 // n, "zigzag balances"
    inference = evenly(AttentionRequest.from_shape(**shape), ranks, "zigzag")
    assert cost(inference, "ring")[:2] == (ring.forward, 0)


@pytest.mark.parametrize("ranks", [2, 8, 64])
@pytest.mark.parametrize("method", ["gather", "ring", "ulysses"])
def test_the_simulator_s_formulas_are_those_of_the_schedules(ranks: int, method: Any) -> None:
    whole = AttentionRequest.from_shape(
        batch=1, heads_q=64, heads_kv=8, seqlen_q=256 * ranks, head_dim=128, causal=True, training=True
    )
    counted, formula = work_of(evenly(whole, ranks, "zigzag"), method), work_at_scale(whole, ranks, method)
    assert counted.steps == formula.steps
    for name in ("bytes_forward", "bytes_backward"):
        assert getattr(formula, name) == pytest.approx(getattr(counted, name), rel=1e-9), name
    for name in ("flops_forward", "flops_backward"):
        assert getattr(formula, name) == pytest.approx(getattr(counted, name), rel=1e-2), name


def test_predictions_behave() -> None:
    whole = AttentionRequest.from_shape(batch=1, heads_q=64, seqlen_q=1 << 20, head_dim=128, causal=True, training=True)
    rate = measured({1024: 1e14, 4096: 5e14})
    assert (rate(10), rate(1024), rate(2560), rate(1 << 20)) == (1e14, 1e14, 3e14, 5e14)
    from attnrt.distributed import Topology

    for method in ("gather", "ring", "ulysses"):
        times = []
        for ranks in (8, 16, 32, 64):
            fast, slow = (Topology.of(ranks, "nvlink", between, 8) for between in ("infiniband", "ethernet"))
            work = work_at_scale(whole, ranks, method)  # type: ignore[arg-type]
            found = predict(work, fast, rate, rate)
            assert found.seconds >= found.computing > 0 and 0 < found.busy <= 1
            if ranks > 8:
                assert predict(work, slow, rate, rate).seconds >= found.seconds
            times.append(found.seconds)
        assert times == sorted(times, reverse=True), "more ranks, less time"
    with pytest.raises(ArgumentError, match="must divide heads_q=64"):
        work_at_scale(whole, 48, "ulysses")


def test_auto_takes_what_the_bytes_say() -> None:
    few_keys = explain_shape(ranks=8, **{**SHAPE, "heads_kv": 1}, placement="zigzag")
    assert few_keys.method == "gather", "one KV head is soon sent to everybody"
    many = explain_shape(ranks=8, **{**SHAPE, "heads_kv": 32}, placement="zigzag")
    assert many.method == "ulysses", "tokens for heads moves a rank's share once"
    odd = explain_shape(ranks=8, **{**SHAPE, "heads_q": 20, "heads_kv": 20}, placement="zigzag", link="pcie")
    assert odd.method == "ring", "over a slow link what hides behind the computation wins"
    assert [r.rule for r in odd.verdicts["ulysses"].reasons] == ["ULYSSES_HEADS"]
    window = explain_shape(ranks=32, **{**SHAPE, "window": (4095, 0)}, per_host=8)
    assert window.method == "gather", "a window's neighbours only"
    assert "moved" in many.why and many.backends == ("cudnn",)


def test_memory_refuses_a_method() -> None:
    machine = attnrt.Environment.simulate("sm90", memory=80 << 30, free_memory=4 << 30)
    found = explain_shape(ranks=8, **{**SHAPE, "environment": machine, "heads_q": 24, "heads_kv": 24})
    assert [r.rule for r in found.verdicts["gather"].reasons] == ["GATHER_MEMORY"]
    assert "is free" in found.verdicts["gather"].reasons[0].message and found.method == "ulysses"


def test_a_backend_without_a_backward_from_lse_serves_all_but_a_ring() -> None:
    class Plain(attnrt.Backend):
        name, title, prefix = "plain_kernel", "Plain", "PLAIN"

    attnrt.register_backend(Plain())
    try:
        found = explain_shape(ranks=8, **SHAPE, backend="plain_kernel")
        inference = explain_shape(ranks=8, **{**SHAPE, "training": False}, backend="plain_kernel")
    finally:
        attnrt.unregister_backend("plain_kernel")
    reasons = found.verdicts["ring"].reasons
    assert {r.rule for r in reasons} == {"RING_NO_BACKEND"}
    assert "plain_kernel: Plain does not take a backward from a merged output and LSE" in reasons[0].message
    assert found.verdicts["gather"].eligible and found.verdicts["ulysses"].eligible
    assert inference.verdicts["ring"].eligible, "without a backward any LSE will do"


def test_reports() -> None:
    found = explain_shape(ranks=8, **SHAPE, placement="zigzag")
    text, data = str(found), json.loads(found.to_json())
    for line in ("method", "8 ranks, zigzag placement, 16384 tokens each", "8 ranks on one host, nvlink", "local call"):
        assert line in text
    assert data["method"] == found.method and data["tokens_q"] == [16384] * 8
    assert {m["method"] for m in data["methods"]} == {"gather", "ulysses", "ring"}
    assert found.to_markdown().startswith("### attnrt, context parallel:")
    refused = explain_shape(ranks=8, **{**SHAPE, "dropout_p": 0.1})
    assert refused.method is None and "CP_DROPOUT" in str(refused)
    forced = explain_shape(ranks=8, **SHAPE, method="ring")
    assert forced.method == "ring" and forced.why == "named by method="


def test_the_command_line() -> None:
    shape = ["--arch", "h200", "--heads", "32", "--kv-heads", "8", "--seqlen", "131072", "--causal", "--training"]
    result = CliRunner().invoke(app, ["explain", *shape, "--ranks", "8", "--link", "nvlink"])
    assert result.exit_code == 0, result.output
    for line in ("8 ranks on one host, nvlink", "received forward", "448 MiB", "ring", "gather", "ulysses"):
        assert line in result.output
    data = json.loads(CliRunner().invoke(app, ["explain", *shape, "--ranks", "16", "--json"]).output)
    assert data["ranks"] == 16 and "2 hosts" in data["links"] and data["placement"] == "zigzag"
    windowed = CliRunner().invoke(app, ["explain", *shape, "--ranks", "4", "--window", "1023,0", "--markdown"])
    assert "contiguous placement" in windowed.output
    none = CliRunner().invoke(app, ["explain", *shape, "--ranks", "8", "--dropout", "0.1"])
    assert none.exit_code == 1
    for wrong, kind in (
        (["--link", "rope"], UnknownNameError),
        (["--method", "spiral"], UnknownNameError),
        (["--page-size", "16"], ArgumentError),
        (["--per-host", "3"], ArgumentError),
    ):
        assert isinstance(CliRunner().invoke(app, ["explain", *shape, "--ranks", "8", *wrong]).exception, kind), wrong
