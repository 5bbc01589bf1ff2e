"""Right answers pass, wrong ones do not, in whole and in pieces; and the truth is the oracle's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, assume, given, settings
from oracle import Case, answer
from torch import Tensor

from attnrt import registry
from attnrt.backends.base import reasons
from attnrt.environment import Environment
from attnrt.evidence.accuracy import Truth, truth_of, worst
from attnrt.evidence.calls import Call, Tensors, tensors
from attnrt.evidence.truth import pieces_of

CPU = Environment.detect("cpu")
BASE = Call(batch=3, heads_q=6, heads_kv=2, head_dim=32, seqlen_q=96, dtype="fp32", causal=True, layout="bhsd")


def reference(given: Tensors) -> Callable[..., Any]:
    return registry.backends()["reference"].prepare(given.request, CPU)


def verdict(call: Call, spoil: Callable[[Tensor], Tensor], limit: int = 1 << 20, backward: bool = False) -> str | None:
    """What is said of the reference with its output spoiled."""
    made = tensors(call)
    truth, right = truth_of(made, limit), reference(made)

    def run(*args: Any) -> Any:
        found = right(*args)
        out, rest = (found[0], found[1:]) if isinstance(found, tuple) else (found, ())
        return (spoil(out), *rest) if rest else spoil(out)

    found = worst(truth.check(made, run))
    return str(found) if found.wrong else None


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(cases())
def test_the_truth_is_the_oracles(case: Case) -> None:
    """Every output of a random call, computed by two programs that share nothing."""
    given_ = Tensors(case.q, case.k, case.v, case.operands, case.request())
    truth = truth_of(given_, limit=1 << 30)
    cotangent = truth.cotangent
    want = answer(Case(case.q, case.k, case.v, case.layout, case.operands, cotangent, case.options))
    found = {"the output": want["out"], **{f"the gradient of {n}": want[n] for n in given_.leaves()}}
    if given_.request.needs_lse:
        found["the LSE"] = want["lse"]
    assume(not any(t.isnan().any() for t in found.values()))  # the oracle's, where a whole tensor is padding
    assert truth.whole
    for difference in truth.compare(given_, found):
        assert difference.ratio <= 1e-3, difference


def test_a_bound_that_excludes_nothing() -> None:
    """It is dropped with its alignment, so that counted from the other end it would exclude something."""
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    case = Case(q, k, v, "bhsd", options={"window": (None, 1), "alignment": "bottom_right"})
    given_ = Tensors(q, k, v, case.operands, case.request())
    for difference in truth_of(given_).compare(given_, {"the output": answer(case)["out"]}):
        assert difference.ratio <= 1e-3, difference
    sizes = {"batch": 1, "heads_q": 1, "seqlen_q": 1, "seqlen_kv": 5, "head_dim": 8, "dtype": "fp32"}
    assert not tensors(Call(**sizes, causal=True, alignment="bottom_right")).request.banded


@settings(deadline=None, max_examples=20, suppress_health_check=list(HealthCheck))
@given(cases())
def test_right_kernels_pass_in_pieces(case: Case) -> None:
    given_ = Tensors(case.q, case.k, case.v, case.operands, case.request())
    truth = truth_of(given_, limit=200)
    for name in ("reference", "torch"):
        backend = registry.backends()[name]
        if not reasons(backend.all_rules, given_.request, CPU):
            for kernel in backend.kernels:
                if kernel.runs_on(CPU) and not reasons(kernel.all_rules, given_.request, CPU):
                    found = worst(truth.check(given_, kernel.prepare(given_.request, CPU)))
                    assert not found.wrong, (kernel.name, found)


DTYPES = ("fp64", "fp32", "fp16", "bf16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("limit", [1 << 20, 3000])
def test_a_factor(dtype: str, training: bool, limit: int) -> None:
    """1% in 16 bits, where single values are off by nearly as much; 0.01% in 32."""
    call = BASE.changed(dtype=dtype, training=training)
    assert verdict(call, lambda out: out, limit) is None
    factor = 1.01 if dtype in ("bf16", "fp16") else 1.0001
    said = verdict(call, lambda out: out * factor, limit)
    assert said and (dtype == "fp64" or "factor" in said)


SPOILED: dict[str, Callable[[Tensor], Tensor]] = {
    "one element": lambda out: out.index_put(
        (torch.tensor(0), torch.tensor(1), torch.tensor(5), torch.tensor(3)), out.max() + 1
    ),
    "NaN": lambda out: out.index_fill(1, torch.tensor(5), math.nan),
    "heads swapped": lambda out: out[:, [0, 1, 2, 4, 3, 5]],
    "the last query": lambda out: torch.cat([out[:, :, :-1], out[:, :, :1]], 2),
    "zero": torch.zeros_like,
    "noise": lambda out: out + 0.05 * torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out.dtype),
}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_local_faults(spoil: Callable[[Tensor], Tensor], dtype: str) -> None:
    assert verdict(BASE.changed(dtype=dtype), spoil)


@pytest.mark.parametrize("what", ["q", "k", "v", "bias", "sinks"])
@pytest.mark.parametrize("limit", [1 << 20, 3000])
def test_gradients(what: str, limit: int) -> None:
    """2% too large in one of them."""
    call = BASE.changed(training=True, bias=True, bias_grad=True, sinks=True, dtype="bf16")
    made = tensors(call)
    truth, right = truth_of(made, limit), reference(made)

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Any) -> Any:
        named = {"q": q, "k": k, "v": v, "bias": operands.bias, "sinks": operands.sinks}
        named[what] = named[what] + (named[what] - named[what].detach()) * 0.02
        bound = operands._replace(bias=named["bias"], sinks=named["sinks"])
        return right(named["q"], named["k"], named["v"], bound)

    assert not any(d.wrong for d in truth.check(made, right))
    assert {d.name for d in truth.check(made, run) if d.wrong} == {f"the gradient of {what}"}


def test_a_gradient_where_none_belongs() -> None:
    """In a head that was not looked at."""
    made = tensors(BASE.changed(training=True, heads_q=32, heads_kv=32, seqlen_q=64))
    truth = truth_of(made, limit=3000)
    right = reference(made)
    looked = {int(h) for piece in truth.pieces for h in piece.heads}
    other = next(h for h in range(32) if h not in looked)

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Any) -> Any:
        return right(q, k, v, operands) + 1e-2 * v[:, other : other + 1].sum()

    found = [d for d in truth.check(made, run) if d.wrong]
    assert any("no gradient came from" in d.measure for d in found)


def test_pieces_stay_small_and_look_everywhere() -> None:
    made = tensors(Call(batch=8, heads_q=32, heads_kv=8, head_dim=8, seqlen_q=4096, causal=True, dtype="fp32"))
    pieces, whole = pieces_of(made)
    assert not whole and sum(len(p.rows) * len(p.heads) * 4096 for p in pieces) <= 1 << 20
    assert {0, 7} <= {p.sequence for p in pieces}
    for piece in pieces:
        assert {0, 3, 31} <= set(piece.heads.tolist())
        assert {0, 4095} <= set(piece.rows.tolist())


def test_inputs_that_are_not_finite() -> None:
    """What comes of them is not judged; NaN where the truth is finite is."""
    made = tensors(BASE.changed(training=True))
    with torch.no_grad():
        made.k[1, 1, 5] = math.nan
        made.v[0, 0, 7] = math.inf
    truth, right = truth_of(made), reference(made)
    assert not any(d.wrong for d in truth.check(made, right))
    assert any(d.wrong for d in truth.check(made, lambda *args: right(*args) * torch.tensor(math.nan)))


def test_nothing_to_compare() -> None:
    made = tensors(BASE.changed(batch=0))
    assert not any(d.wrong for d in truth_of(made).check(made, reference(made)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_rounding_of_what_cancels_is_no_fault(dtype: str) -> None:
    """With one key the gradients of q and k are nothing but rounding."""
    made = tensors(
        Call(batch=4, heads_q=8, heads_kv=2, head_dim=64, seqlen_q=7, seqlen_kv=1, dtype=dtype, training=True)
    )
    truth: Truth = truth_of(made)
    for name in ("reference", "torch"):
        for kernel in registry.backends()[name].kernels:
            if kernel.runs_on(CPU):
                assert not any(d.wrong for d in truth.check(made, kernel.prepare(made.request, CPU)))


NEARLY_CANCEL = [
    ({"seqlen_q": 33, "head_dim": 8, "dtype": "fp16", "causal": True}, 168377),
    ({"seqlen_q": 8, "head_dim": 64, "dtype": "fp16", "causal": True}, 547445),
    ({"seqlen_q": 33, "head_dim": 8, "dtype": "bf16"}, 491727),
    ({"seqlen_q": 3, "head_dim": 16, "dtype": "bf16"}, 389857),
]


@pytest.mark.parametrize(("sizes", "seed"), NEARLY_CANCEL)
def test_rounding_of_a_sum_that_nearly_cancels_is_no_fault(sizes: dict[str, Any], seed: int) -> None:
    """Of a sink's gradient little is left here beside the terms that it is the sum of (in the last, of k's)."""
    made = tensors(Call(heads_q=1, layout="bhsd", training=True, sinks=True, **sizes), seed=seed)
    truth = truth_of(made)
    for kernel in (k for name in ("reference", "torch") for k in registry.backends()[name].kernels):
        if kernel.runs_on(CPU) and not reasons(kernel.all_rules, made.request, CPU):
            for difference in truth.check(made, kernel.prepare(made.request, CPU)):
                assert not difference.wrong, (kernel.name, difference)


@pytest.mark.parametrize(("sizes", "seed"), NEARLY_CANCEL[:3])
def test_a_sum_that_nearly_cancels_may_not_be_anything(sizes: dict[str, Any], seed: int) -> None:
    """A sink's gradient that lacks the output of one row in ten."""
    made = tensors(Call(heads_q=1, layout="bhsd", training=True, sinks=True, **sizes), seed=seed)
    truth, right = truth_of(made), reference(made)
    row = made.q.shape[2] // 10

    def run(q: Tensor, k: Tensor, v: Tensor, operands: Any) -> Any:
        lacking = right(q.detach(), k.detach(), v.detach(), operands)
        return right(q, k, v, operands._replace(sinks=operands.sinks.detach())) + torch.cat(
            [t - t.detach() if i != row else torch.zeros_like(t) for i, t in enumerate(lacking.split(1, 2))], 2
        )

    assert {d.name for d in truth.check(made, run) if d.wrong} == {"the gradient of sinks"}
