"""The cuDNN backend on a GPU, besides numbers: plans in memory and on disk, captures, threads, what the report says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cudnn_calls import BACKEND, NEEDS, cache, call, environment, kept_at, padded, plans
from devices import packed
from oracle import Case, assert_agrees
from running import run
from torch import Tensor

import attnrt
from attnrt.operands import Operands

pytestmark = NEEDS
CAPTURED: dict[str, Any] = {
    "plain": lambda: call(512),
    "packed, causal": lambda: packed(1, 700, 0, 129, 1300, 128, causal=True),
    "cache": lambda: cache(1, 640, (640, 77, 0, 1), heads=(8, 2)),
}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from kept_at(tmp_path_factory.mktemp("plans"))


def forced(case: Case, **options: Any) -> Tensor:
    given = {n: t for n, t in zip(Operands._fields, case.operands, strict=True) if t is not None}
    rest = {n: x for n, x in case.options.items() if n != "return_lse"}
    out = attnrt.attention(case.q, case.k, case.v, layout=case.layout, backend="cudnn", **given, **rest, **options)
    assert isinstance(out, Tensor)
    return out


@pytest.mark.parametrize("name", CAPTURED)
def test_smoke_capture(name: str) -> None:
    """Captured after one call; a replay reads the new q. Another stream gives the same."""
    case = CAPTURED[name]()
    q = case.q.detach().clone()
    aside_case = replace(case, q=q, k=case.k.detach(), v=case.v.detach())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = forced(aside_case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forced(aside_case)
    graph.replay()
    assert torch.equal(captured, aside)
    q.copy_(q.flip(0))
    graph.replay()
    again = forced(aside_case)
    assert torch.equal(captured, again) and not torch.equal(captured, aside)


def test_capture_of_a_training_step() -> None:
    case = call(640, heads=(4, 2), causal=True)
    leaves = list(case.leaves().values())

    def step() -> list[Tensor]:
        out = forced(case)
        return [out, *torch.autograd.grad(out, leaves, case.grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
        want = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        case.q.copy_(case.q.flip(1))
    graph.replay()
    with torch.no_grad():
        case.q.copy_(case.q.flip(1))
    graph.replay()
    for got, x in zip(captured[:1], want[:1], strict=True):
        assert torch.equal(got, x)
    for got, x in zip(captured[1:], want[1:], strict=True):  # sums in the order of timing
        torch.testing.assert_close(got, x, rtol=2e-2, atol=2e-2)


def test_smoke_a_capture_without_a_plan_says_so() -> None:
    forced(call(64, training=False))  # cuDNN is up
    case = call(1234, heads=(3, 3), training=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        report = attnrt.explain(case.q, case.k, case.v, layout="bshd", backend="cudnn")
    (reason,) = report.verdicts["cudnn"].reasons
    assert reason.rule == "CUDNN_CAPTURE" and "run the call once" in (reason.remedy or "")
    assert torch.isfinite(forced(case)).all()


def test_many_threads() -> None:
    """Eight threads, each with a stream and shapes of its own and one in common, forward and backward."""
    shapes = [call(200 + 8 * i, heads=(4, 2), causal=True) for i in range(4)]
    common = call(333, heads=(4, 4))
    want = [run(BACKEND, c, environment()) for c in (*shapes, common)]
    plans().clear()
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for i in range(12):
                    index = (number + i) % 5
                    found = run(BACKEND, [*shapes, common][index], environment())
                    torch.cuda.current_stream().synchronize()
                    assert torch.equal(found["out"], want[index]["out"])
                    for n in ("q", "k", "v"):
                        torch.testing.assert_close(found[n], want[index][n], rtol=2e-2, atol=2e-2)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    assert plans().counters.built + plans().counters.loaded == 10


@pytest.mark.parametrize("kind", ["packed", "bshd", "bhsd", "sbhd"])
def test_two_hundred_lengths(kind: str) -> None:
    """A training sweep builds at most ten plans, forward and backward together."""
    generator = torch.Generator().manual_seed(0)
    longest = [max(1, int(4096 * (i + 1) / 200)) for i in range(200)]
    plans().clear()
    for i, n in enumerate(longest):
        numbers = [n, *(int(x) for x in torch.randint(0, n + 1, (5,), generator=generator))]
        if kind == "packed":
            case = packed(*numbers, heads=(2, 1), causal=True)
        else:
            case = padded(n, tuple(numbers), layout=kind, heads=(2, 1), causal=True)
        found = run(BACKEND, case, environment())
        if i % 20 == 0:
            with torch.device("cuda"):
                assert_agrees(case, found)
    made = plans().counters.built + plans().counters.loaded
    print(f"{kind}: {plans().counters}")
    assert made <= 10, plans().counters


def test_smoke_plans_come_from_disk_and_damage_costs_a_rebuild(own_cache: Path) -> None:
    case = call(777, heads=(2, 2), causal=True)
    plans().flush()  # of the tests before
    plans().clear()
    for file in own_cache.glob("cudnn/plans/*.plan"):
        file.unlink()
    first = run(BACKEND, case, environment())
    plans().flush()
    files = sorted(own_cache.glob("cudnn/plans/*.plan"))
    assert plans().counters.built == 2 and len(files) == 2
    plans().clear()
    second = run(BACKEND, case, environment())
    assert plans().counters.built == 0 and plans().counters.loaded == 2
    assert torch.equal(first["out"], second["out"])
    for file in files:
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(bytes(data))
    plans().clear()
    third = run(BACKEND, case, environment())
    assert plans().counters.built == 2 and torch.equal(first["out"], third["out"])


def test_smoke_the_report_has_the_librarys_words() -> None:
    """A request that the rules let pass and the library refuses (softcap is refused by rule, so the rule goes)."""
    from attnrt.backends.cudnn import answers, drawing, graphs

    gpu = answers.device(0)
    wrong = replace(graphs.forward_spec(call(64).request(), gpu.sm), dim_qk=100, dim_v=100)
    with pytest.raises(drawing.Unsupported) as caught:
        gpu.draw(wrong)
    assert str(caught.value) and "{" not in str(caught.value)
    report = attnrt.explain(*(call(64, training=False).q,) * 3, layout="bshd")
    assert report.verdicts["cudnn"].eligible, report
    assert any("plans built" in note for note in report.verdicts["cudnn"].notes)
