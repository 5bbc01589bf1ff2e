"""Keys and values in pages: what arrives, who may serve it, and what comes out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import Case, assert_agrees
from paging import NOWHERE, paged
from torch import Tensor

import attnrt
from attnrt import registry
from attnrt.backends.base import FEATURE_NAMES
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest


def padded(layout: str, dtype: torch.dtype = torch.float32, **options: Any) -> Case:
    """3 sequences of 0 to 24 keys, 3 queries, 4 query heads over 2, Dqk 16, Dv 8."""
    torch.manual_seed(0)
    shapes = (3, 4, 3, 16), (3, 2, 24, 16), (3, 2, 24, 8)
    q, k, v = (torch.randn(s) if layout == "bhsd" else torch.randn(s).transpose(1, 2) for s in shapes)
    lengths = torch.tensor([24, 0, 9], dtype=torch.int32)
    operands = Operands(seqlens_kv=lengths, **options.pop("operands", {}))
    return Case(q.to(dtype), k.to(dtype), v.to(dtype), layout, operands, options={"return_lse": True, **options})


def call(case: Case, **options: Any) -> dict[str, Tensor]:
    operands = {name: t for name, t in case.operands._asdict().items() if t is not None}
    result = attnrt.attention(case.q, case.k, case.v, layout=case.layout, **operands, **case.options, **options)
    out, lse = result if isinstance(result, tuple) else (result, None)
    return {"out": out} if lse is None else {"out": out, "lse": lse}


@pytest.mark.parametrize("page_size", [1, 4, 8, 24])
@pytest.mark.parametrize("layout", ["bhsd", "bshd"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "alignment": "bottom_right", "window": (5, 0)},
        {"operands": {"mask": torch.arange(24)[None] % 3 != 0, "sinks": torch.randn(4)}, "softcap": 5.0},
        {"operands": {"alibi_slopes": torch.rand(3, 4), "bias": torch.randn(3, 1, 3, 24)}, "alignment": "top_left"},
    ],
    ids=["plain", "causal window", "mask and sinks", "alibi and bias"],
)
def test_agrees_with_the_oracle(layout: str, page_size: int, options: dict[str, Any]) -> None:
    case = padded(layout, **options)
    assert_agrees(case, call(paged(case, page_size)))
    assert attnrt.last_decision().request.page_size == page_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    case = padded("bshd", dtype)
    assert_agrees(case, call(paged(case, 8)))


def test_nothing_to_read() -> None:
    """Every sequence is empty: an entry that points nowhere is not followed, and the pool may have no page at all."""
    case = padded("bshd")
    case.operands.seqlens_kv.zero_()
    for spare in (0, 2):
        empty = paged(case, 8, spare)
        assert empty.k.shape[0] == spare and empty.operands.page_table.eq(NOWHERE).all()
        assert_agrees(case, call(empty))
    none = empty.operands.page_table[:, :0]
    out = attnrt.attention(empty.q, empty.k, empty.v, layout="bshd", page_table=none, seqlens_kv=case.operands[5])
    assert out.shape == (3, 3, 4, 8) and not out.any()


def test_a_growing_cache_is_the_same_plan() -> None:
    """Lengths and pages are values: they may change from call to call, and are checked at each."""
    case = paged(padded("bshd"), 8)
    call(case)
    plan = attnrt.last_decision()
    case.operands.seqlens_kv[2] = 3
    case.operands.page_table[2, 0] = 1
    call(case)
    assert attnrt.last_decision() is plan
    case.operands.page_table[2, 0] = 99
    with pytest.raises(attnrt.ArgumentError, match=r"page 0 of sequence 2 is 99, and k and v have pages 0..\d"):
        call(case)
    case.operands.page_table[2, 0] = 1
    case.operands.seqlens_kv[2] = 25
    with pytest.raises(attnrt.ArgumentError, match=r"seqlens_kv=.*0\.\.24"):
        call(case)


def test_the_table_is_part_of_the_signature() -> None:
    """The same pools are a longer cache under a wider table, and no cache at all without one."""
    case = paged(padded("bshd"), 8)
    call(case)
    first = attnrt.last_decision().request
    table = case.operands.page_table
    wider = case.operands._replace(page_table=torch.cat([table, table], 1))
    call(Case(case.q, case.k, case.v, "bshd", wider, options=case.options))
    assert (first.seqlen_kv, attnrt.last_decision().request.seqlen_kv) == (24, 48)
    q = torch.randn(case.k.shape[0], 3, 4, 16)
    attnrt.attention(q, case.k, case.v, layout="bshd")
    assert not attnrt.last_decision().request.paged


def test_explained_from_a_shape_and_from_tensors_alike() -> None:
    case = paged(padded("bshd"), 8)
    operands = {name: t for name, t in case.operands._asdict().items() if t is not None}
    report = attnrt.explain(case.q.contiguous(), case.k, case.v, layout="bshd", **operands)
    sizes = {"batch": 3, "heads_q": 4, "heads_kv": 2, "seqlen_q": 3, "seqlen_kv": 24, "head_dim": 16, "head_dim_v": 8}
    by_shape = attnrt.explain_shape(**sizes, dtype="fp32", page_size=8)
    assert report.request == by_shape.request
    assert report.backend == by_shape.backend == "reference"
    assert "pages=8" in str(report) and report.to_dict()["request"]["page_size"] == 8
    assert {"paged", "padding"} == {f for f in ("paged", "padding", "packed") if _used(f, report.request)}


def _used(name: str, request: AttentionRequest) -> bool:
    from attnrt.backends.base import FEATURES

    return next(f for f in FEATURES if f.name == name).used(request)


def test_a_kernel_takes_pages_only_if_it_says_so() -> None:
    """`FEATURE_NAMES` leaves "paged" out, so a kernel written before it, here or in a plug-in, refuses by a rule."""
    assert "paged" not in FEATURE_NAMES
    request = AttentionRequest.from_shape(batch=1, heads_q=4, seqlen_q=1, seqlen_kv=64, head_dim=64, page_size=16)
    environment = Environment.named("h100")
    for backend in registry.backends().values():
        for kernel in {backend, *backend.kernels}:
            says = "paged" in kernel.supports
            refused = any(rule.id == f"{kernel.prefix}_PAGED" for rule in kernel.all_rules)
            assert says != refused and (says or any(rule.fails(request, environment) for rule in kernel.all_rules))


def test_memory_is_linear_in_the_pages() -> None:
    sizes = {"batch": 8, "heads_q": 8, "seqlen_q": 1, "seqlen_kv": 1024, "head_dim": 64, "dtype": "fp32"}
    request = AttentionRequest.from_shape(**sizes, page_size=16)
    gathered = 2 * request.tokens_kv * 8 * 64 * 4
    verdict = attnrt.explain_shape(**sizes, page_size=16).verdicts["reference"]
    assert gathered < verdict.bytes < 3 * gathered
