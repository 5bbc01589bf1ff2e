"""What a call on a GPU is remembered by: a known plan is found again, and what is wrong is still refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
from attnrt.errors import ArgumentError, ArgumentTypeError, AttnrtError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def packed(*offsets: int) -> tuple[Tensor, dict[str, Any]]:
    """Tokens of sequences that begin at the offsets, and the call's other arguments."""
    cu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    x = torch.randn(64, 2, 64, device="cuda", dtype=torch.float16)
    lengths = {"max_seqlen_q": 32, "max_seqlen_kv": 32}
    return x, {"layout": "thd", "causal": True, "cu_seqlens_q": cu, "cu_seqlens_kv": cu, **lengths}


def decided(x: Tensor, **options: Any) -> attnrt.Decision:
    attnrt.attention(x, x, x, **options)
    found = attnrt.last_decision()
    assert found is not None
    return found


def test_other_offsets_are_the_same_plan() -> None:
    x, options = packed(0, 20, 40)
    first = decided(x, **options)
    y, others = packed(0, 32, 64)
    assert decided(y, **others) is first
    shorter = decided(x, **options | {"max_seqlen_q": 24, "max_seqlen_kv": 24})
    assert shorter is not first and shorter.request.seqlen_q == 24


def test_offsets_of_two_tensors_are_another() -> None:
    x, options = packed(0, 20, 40)
    options["alignment"] = "bottom_right"  # lengths of two tensors may differ
    first = decided(x, **options)
    apart = decided(x, **options | {"cu_seqlens_kv": options["cu_seqlens_kv"].clone()})
    assert first.request.same_lengths and not apart.request.same_lengths
    assert decided(x, **options) is first


def test_the_longest_sequence_is_read_where_it_is_not_given() -> None:
    x, options = packed(0, 20, 50)
    decided(x, **options)
    unsaid = options | {"max_seqlen_q": None, "max_seqlen_kv": None}
    assert decided(x, **unsaid).request.seqlen_q == 30
    y, _ = packed(0, 20, 50)
    unsaid |= dict.fromkeys(("cu_seqlens_q", "cu_seqlens_kv"), torch.tensor([0, 10, 50], device="cuda").int())
    assert decided(y, **unsaid).request.seqlen_q == 40


@pytest.mark.parametrize(
    "change, error",
    [
        ({"cu_seqlens_q": torch.tensor([0, 20, 40])}, ArgumentTypeError),
        ({"cu_seqlens_q": torch.tensor([0, 20, 40], dtype=torch.int32)}, ArgumentError),
        ({"max_seqlen_q": -1}, ArgumentError),
        ({"max_seqlen_q": True}, AttnrtError),
        ({"max_seqlen_q": 31}, ArgumentError),
        ({"cu_seqlens_kv": None}, ArgumentError),
        ({"causal": 1}, ArgumentTypeError),
        ({"scale": True}, ArgumentTypeError),
    ],
)
def test_what_is_wrong_finds_nothing_that_was_remembered(change: dict[str, Any], error: type[Exception]) -> None:
    x, options = packed(0, 20, 40)
    for _ in range(2):
        decided(x, **options)
        with pytest.raises(error):
            attnrt.attention(x, x, x, **options | change)


def test_tensors_on_two_devices_find_nothing() -> None:
    x = torch.randn(1, 2, 16, 64, device="cuda", dtype=torch.float16)
    attnrt.attention(x, x, x)
    for qkv in ((x, x.cpu(), x), (x, x, x.cpu()), (x.cpu(), x, x)):
        with pytest.raises(ArgumentError, match="device"):
            attnrt.attention(*qkv)


def test_padding_needs_no_values() -> None:
    x = torch.randn(2, 2, 16, 64, device="cuda", dtype=torch.float16)
    lengths = torch.tensor([3, 16], dtype=torch.int32, device="cuda")
    first = decided(x, seqlens_kv=lengths)
    assert decided(x, seqlens_kv=lengths.flip(0)) is first
    with pytest.raises(ArgumentTypeError, match="int32"):
        attnrt.attention(x, x, x, seqlens_kv=lengths.long())
    assert decided(x, seqlens_kv=lengths, seqlens_q=lengths).request.same_lengths
