"""What an adapter hands to its package and makes of the answer: real signatures, stand-ins behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import standin
import torch
from cases import cases
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from oracle import Case, assert_agrees, gradients
from paging import paged
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from attnrt.backends.base import reasons
from attnrt.backends.flash_attn import FlashAttention, FlashAttention2, FlashAttention3, FlashAttention4
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

GENERATIONS: dict[int, FlashAttention] = {2: FlashAttention2(), 3: FlashAttention3(), 4: FlashAttention4()}
VERSIONS = [(n, v) for n, backend in GENERATIONS.items() for v in standin.SIGNATURES[backend.package]]
NEWEST = dict(VERSIONS)
HALF = (torch.bfloat16, torch.float16)
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def machine(number: int, version: str) -> Environment:
    return Environment.simulate("sm90", packages={GENERATIONS[number].package: version.partition(" ")[0]})


def run(number: int, version: str, case: Case) -> dict[str, Tensor]:
    """Through the adapter, with a stand-in for the package, on the CPU."""
    request = case.request()
    here = replace(machine(number, version), device_type="cpu")
    prepared = GENERATIONS[number].adapter().prepare(request, here, standin.library(number, version))
    found = prepared(case.q, case.k, case.v, case.operands)
    out, lse = found if request.needs_lse else (found, None)
    results = {"out": out, **gradients(case, out, case.leaves())}
    if lse is not None:
        assert lse.dtype == torch.float32 and not lse.requires_grad
        results["lse"] = lse
    return results


def taken(number: int, version: str, case: Case) -> bool:
    try:
        request = case.request()
    except ValueError:  # an alignment is missing
        return False
    return not reasons(GENERATIONS[number].all_rules, request, machine(number, version))


def calm(case: Case) -> Case:
    """Tokens of no sequence hold numbers, as flash-attn 3 and 4 need (see their notes)."""
    with torch.no_grad():
        for x in (case.q, case.k, case.v) if case.layout == "thd" else ():
            if not x.isfinite().all():
                x.nan_to_num_(1.5, 1.5, 1.5)
    return case


# --- The same numbers whatever goes in between -------------------------------------------------------------------


@pytest.mark.parametrize("number", GENERATIONS)
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=SLOW)
@given(case=cases(frozenset({"empty", "last_dim"}), longest=24, dtypes=HALF, dims=(8, 16, 24, 32)))
def test_agrees_with_the_oracle(number: int, case: Case) -> None:
    """Layouts, strides, alignments, windows, softcap, ALiBi, sinks, packing, padding; out, LSE and gradients."""
    case = calm(case)
    assume(taken(number, NEWEST[number], case))
    assert_agrees(case, run(number, NEWEST[number], case))


def case(
    *lengths: int, layout: str = "bshd", dim: int = 24, operands: dict[str, Any] | None = None, **given: Any
) -> Case:
    """Sq and Skv, or packed sequences with stray tokens behind them."""
    torch.manual_seed(0)
    packed = layout == "thd"
    fronts = [(sum(lengths) + 3,)] * 2 if packed else [(2, n) for n in lengths]
    q = torch.randn(*fronts[0], 4, dim).bfloat16().requires_grad_("operands" not in given)
    k, v = (torch.randn(*fronts[1], 2, dim).bfloat16().requires_grad_() for _ in range(2))
    made = Operands(**(operands or {}))
    if packed:
        offsets = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
        made = made._replace(cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    options = {"return_lse": True, "alignment": "bottom_right", **given}
    return Case(q, k, v, layout, made, torch.randn_like(q), options)


NAMED: dict[str, Case] = {
    "dead rows": case(9, 4, causal=True),
    "one query": case(1, 7, causal=True),
    "top left": case(4, 9, causal=True, alignment="top_left"),
    "top left, window": case(7, 9, window=(2, 0), alignment="top_left"),
    "window to the left": case(7, 9, window=(2, 0)),
    "window on both sides": case(7, 9, window=(2, 3)),
    "window without a left end": case(7, 9, window=(None, 2)),
    "window without a right end": case(7, 9, window=(2, None)),
    "window that hides all but one": case(7, 9, window=(0, 0)),
    "packed": case(5, 0, 9, layout="thd", causal=True),
    "sinks": case(7, 7, causal=True, return_lse=False, operands={"sinks": torch.randn(4, requires_grad=True)}),
    "sinks and LSE": case(9, 4, causal=True, operands={"sinks": torch.randn(4, requires_grad=True)}),
    "sinks, packed": case(5, 3, layout="thd", operands={"sinks": torch.randn(4, requires_grad=True)}),
    "sinks of float64": case(5, 5, return_lse=False, operands={"sinks": torch.randn(4).double()}),
    "sinks, softcap, window": case(
        7, 9, window=(3, 0), softcap=2.0, operands={"sinks": torch.randn(4, requires_grad=True)}
    ),
    "sinks without a gradient": case(7, 9, causal=True, operands={"sinks": torch.randn(4)}),
    "sinks, ALiBi": case(
        9, 4, causal=True, operands={"alibi_slopes": torch.rand(2, 4), "sinks": torch.randn(4, requires_grad=True)}
    ),
    "ALiBi": case(7, 9, operands={"alibi_slopes": torch.rand(4)}),
    "ALiBi, causal": case(7, 9, causal=True, operands={"alibi_slopes": torch.rand(2, 4)}),
    "ALiBi, top left": case(4, 9, causal=True, alignment="top_left", operands={"alibi_slopes": torch.rand(4)}),
    "ALiBi, window": case(7, 9, window=(3, 0), operands={"alibi_slopes": torch.rand(4)}),
    "ALiBi, packed": case(5, 3, layout="thd", causal=True, return_lse=False, operands={"alibi_slopes": torch.rand(4)}),
    "softcap": case(7, 9, softcap=2.0, causal=True),
    "deterministic": case(7, 7, deterministic=True),
}
TAKES = {
    2: set(NAMED),
    3: {n for n in NAMED if "ALiBi" not in n},
    4: {n for n in NAMED if "ALiBi" not in n},
}


@pytest.mark.parametrize(("number", "name"), [(n, name) for n, names in TAKES.items() for name in sorted(names)])
def test_by_name(number: int, name: str) -> None:
    named = NAMED[name]
    assert taken(number, NEWEST[number], named)
    assert_agrees(named, run(number, NEWEST[number], named))


def copied(call: Callable[[], Tensor]) -> Tensor:
    """What is saved for the backward is a copy, as where activations are offloaded."""
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda t: t):
        return call()


@pytest.mark.parametrize("how", [copied, partial(checkpoint, use_reentrant=False)], ids=["copied", "checkpoint"])
@pytest.mark.parametrize("number", GENERATIONS)
@pytest.mark.parametrize("learned", [True, False])
def test_sinks_where_saved_tensors_are_handled_by_others(number: int, learned: bool, how: Any) -> None:
    asked = case(9, 4, causal=True, return_lse=False, operands={"sinks": torch.randn(4, requires_grad=learned)})
    request, here = asked.request(), replace(machine(number, NEWEST[number]), device_type="cpu")
    run_it = GENERATIONS[number].adapter().prepare(request, here, standin.library(number, NEWEST[number]))
    leaves = asked.leaves()
    plain = gradients(asked, run_it(asked.q, asked.k, asked.v, asked.operands), leaves)
    handled = gradients(asked, how(lambda: run_it(asked.q, asked.k, asked.v, asked.operands)), leaves)
    assert all(torch.equal(x, handled[name]) for name, x in plain.items())


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("page_size", [None, 256, 16])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (9, 0), "softcap": 5.0}], ids=str)
@pytest.mark.parametrize("number", GENERATIONS)
def test_caches(number: int, options: dict[str, Any], page_size: int | None, layout: str) -> None:
    """A padded KV cache, whole or in pages: a full sequence, a short one, an empty one; NaN where no key is."""
    torch.manual_seed(0)
    shapes = [(3, 4, 2, 16), *[(3, 2, 512, 16)] * 2]
    q, k, v = (
        torch.randn(s).bfloat16() if layout == "bhsd" else torch.randn(s).transpose(1, 2).bfloat16() for s in shapes
    )
    ends = torch.tensor([512, 0, 9], dtype=torch.int32)
    dense = Case(
        q, k, v, layout, Operands(seqlens_kv=ends), None, {"alignment": "bottom_right", "return_lse": True, **options}
    )
    asked = dense if page_size is None else paged(dense, page_size)
    if number == 2 and page_size == 16:
        assert not taken(number, NEWEST[number], asked)
        return
    assert taken(number, NEWEST[number], asked)
    assert_agrees(dense, run(number, NEWEST[number], asked))


def test_alibi_counts_from_each_sequences_own_end() -> None:
    """The log-sum-exp that flash-attn 2 gives under a causal mask is off by slope * position."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 3, 4, 16).bfloat16(), *torch.randn(2, 2, 9, 2, 16).bfloat16()
    operands = Operands(seqlens_kv=torch.tensor([9, 5], dtype=torch.int32), alibi_slopes=torch.rand(4))
    asked = Case(q, k, v, "bshd", operands, None, {"causal": True, "alignment": "bottom_right", "return_lse": True})
    assert taken(2, NEWEST[2], asked)
    assert_agrees(asked, run(2, NEWEST[2], asked))


# --- The arguments that real packages have -----------------------------------------------------------------------


@st.composite
def requests(draw: st.DrawFn) -> AttentionRequest:
    flag = st.booleans()
    packed, training = draw(flag), draw(flag)
    paging = {} if packed or training else draw(st.sampled_from([{}, {"padded": "kv"}, {"page_size": 256}]))
    lengths = (256, 256) if draw(flag) else (draw(st.sampled_from([1, 8, 300])), 512)
    return AttentionRequest.from_shape(
        batch=2,
        heads_q=4,
        heads_kv=draw(st.sampled_from([1, 4])),
        seqlen_q=lengths[0],
        seqlen_kv=lengths[1],
        head_dim=64,
        causal=draw(flag),
        window=draw(st.sampled_from([None, None, (16, 0), (None, 16), (64, None)])),
        alignment="bottom_right",
        packed=packed,
        training=training,
        alibi=draw(flag),
        softcap=draw(st.sampled_from([None, 30.0])),
        sinks=draw(flag),
        dropout_p=draw(st.sampled_from([0.0, 0.1])),
        return_lse=draw(flag),
        deterministic=draw(flag),
        **paging,
    )


@pytest.mark.parametrize(("number", "version"), VERSIONS)
@settings(max_examples=40, deadline=None, suppress_health_check=SLOW)
@given(r=requests())
def test_every_argument_is_one_that_the_version_has(number: int, version: str, r: AttentionRequest) -> None:
    """So a version gate that is missing from the rules shows."""
    backend, there = GENERATIONS[number], machine(number, version)
    assume(not reasons(backend.all_rules, r, there))
    how = backend.adapter().call(r, there)
    known = standin.parameters(backend.package, version)[how.function]
    assert how.arguments.keys() - known.keys() <= backend.dispensable
    assert {n for n, default in known.items() if not default} <= how.arguments.keys()


@pytest.mark.parametrize("version", standin.SIGNATURES["flash-attn-3"])
def test_builds_of_flash_attn_3_that_return_more(version: str) -> None:
    """They return (out, lse) whether asked or not, and cannot be asked."""
    library = standin.library(3, version)
    known = library.parameters["flash_attn_func"] - {"return_attn_probs"}
    library = replace(library, parameters=library.parameters | {"flash_attn_func": known})
    asked = NAMED["dead rows"]
    plain = library.functions["flash_attn_func"]
    always = replace(library, functions=library.functions | {"flash_attn_func": lambda **g: _both(plain, g)})
    here = replace(machine(3, version), device_type="cpu")
    for request in (asked.request(), replace(asked.request(), needs_lse=False)):
        found = GENERATIONS[3].adapter().prepare(request, here, always)(asked.q, asked.k, asked.v, asked.operands)
        assert isinstance(found, tuple) == request.needs_lse


def test_first_calls_that_compiled_are_in_the_note(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward apart; here any time counts as one with a compilation."""
    from attnrt.backends.flash_attn import fa4

    monkeypatch.setattr(fa4, "COMPILED", -1.0)
    monkeypatch.setattr(fa4, "first_calls", {})
    asked, there = NAMED["top left"], replace(machine(4, NEWEST[4]), simulated=False)
    run(4, NEWEST[4], asked)
    took = fa4.first_calls[asked.request()]
    assert took.keys() == {"call", "backward"} and all(0 <= seconds < 60 for seconds in took.values())
    said = GENERATIONS[4].notes(asked.request(), there)[0]
    assert "the first call in this process took" in said and "the first backward in this process took" in said
    assert "in this process" not in GENERATIONS[4].notes(asked.request(), machine(4, NEWEST[4]))[0]


def _both(function: Any, given: dict[str, Any]) -> Any:
    given.pop("return_attn_probs", None)
    out = function(**given)
    return (out, torch.zeros(out.shape[0], out.shape[2], out.shape[1])) if isinstance(out, Tensor) else out


def test_the_real_flash_attn_4_has_what_is_written_down() -> None:
    """Where it is installed: its functions, as Python sees them."""
    import inspect
    from importlib import metadata

    try:
        version = metadata.version("flash-attn-4")
    except metadata.PackageNotFoundError:
        pytest.skip("needs flash-attn-4")
    from attnrt.backends.flash_attn.discovery import Library, load

    library = load(4, version)
    assert isinstance(library, Library), library
    if version not in standin.SIGNATURES["flash-attn-4"]:
        pytest.skip(f"signatures.json has {', '.join(standin.SIGNATURES['flash-attn-4'])}, not {version}")
    for name, known in standin.parameters("flash-attn-4", version).items():
        real = inspect.signature(library.functions[name]).parameters
        assert {n: p.default is not p.empty for n, p in real.items()} == known
