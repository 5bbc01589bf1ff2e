"""DotProductAttention means what Transformer Engine's means: formats, mask types, windows, and what is masked out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from plain_layers import attend, causal
from torch import Tensor

import attnrt
from attnrt.errors import ArgumentError, ArgumentTypeError, UnknownNameError
from attnrt.nn import DotProductAttention

HEADS, GROUPS, DIM = 6, 2, 16


def tensors(batch: int, length: int, keys: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, S, H, D), k, v (B, T, G, D) in float64."""
    torch.manual_seed(0)
    keys = length if keys is None else keys
    return (
        torch.randn(batch, length, HEADS, DIM).double(),
        torch.randn(batch, keys, GROUPS, DIM).double(),
        torch.randn(batch, keys, GROUPS, DIM).double(),
    )


def core(**options: Any) -> DotProductAttention:
    return DotProductAttention(HEADS, DIM, GROUPS, **{"qkv_format": "bshd", **options}).eval()


def each(q: Tensor, k: Tensor, v: Tensor, seen: list[Tensor]) -> Tensor:
    return torch.stack([attend(q[b], k[b], v[b], seen[b]) for b in range(len(q))])


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [None, 1, 2, 3, 6])
def test_groups(groups: int | None) -> None:
    q, _, _ = tensors(2, 9)
    k, v = torch.randn(2, 2, 9, groups or HEADS, DIM).double()
    module = DotProductAttention(HEADS, DIM, groups, qkv_format="bshd")
    close(module(q, k, v), each(q, k, v, [causal(9)] * 2))
    assert not list(module.parameters()) and not module.state_dict()


def test_formats() -> None:
    q, k, v = tensors(2, 7)
    want = each(q, k, v, [causal(7)] * 2)
    close(core()(q, k, v), want)
    close(core(qkv_format="sbhd")(*(t.transpose(0, 1) for t in (q, k, v))), want.transpose(0, 1))
    cu = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = core()(*(t.flatten(0, 1) for t in (q, k, v)), qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu)
    close(packed, want.flatten(0, 1))


@pytest.mark.parametrize("sizes", [(5, 9), (9, 5), (1, 8)])
def test_alignment(sizes: tuple[int, int]) -> None:
    """`causal` is top-left and `causal_bottom_right` is not, as in Transformer Engine."""
    length, keys = sizes
    q, k, v = tensors(1, length, keys)
    top_left = torch.arange(keys) <= torch.arange(length)[:, None]
    close(core()(q, k, v), each(q, k, v, [top_left]))
    close(core(attn_mask_type="causal_bottom_right")(q, k, v), each(q, k, v, [causal(length, keys)]))
    everything = torch.ones(length, keys, dtype=torch.bool)
    close(core(attn_mask_type="no_mask")(q, k, v), each(q, k, v, [everything]))


@pytest.mark.parametrize("mask_type", ["padding", "padding_causal", "padding_causal_bottom_right"])
@pytest.mark.parametrize("by", ["mask", "pair", "lengths", "offsets"])
def test_padding(mask_type: Any, by: str) -> None:
    lengths_q, lengths_kv = (
        torch.tensor([7, 3, 0]),
        torch.tensor([7, 3, 0]) if by == "mask" else torch.tensor([9, 4, 2]),
    )
    q, k, v = tensors(3, 7, 7 if by == "mask" else 9)
    out_q, out_kv = (torch.arange(t.shape[1]) >= n[:, None] for t, n in ((q, lengths_q), (k, lengths_kv)))
    module = core(attn_mask_type=mask_type)
    match by:
        case "mask":
            got = module(q, k, v, out_q[:, None, None])
        case "pair":
            got = module(q, k, v, (out_q[:, None, None], out_kv[:, None, None]))
        case "lengths":
            got = module(q, k, v, seqlens_q=lengths_q.int(), seqlens_kv=lengths_kv.int())
        case _:
            cu = [torch.cat([n.new_zeros(1), n.cumsum(0)]).int() for n in (lengths_q, lengths_kv)]
            got = module(q, k, v, cu_seqlens_q=cu[0], cu_seqlens_kv=cu[1])
    want = torch.zeros_like(q).flatten(-2)
    for b, (n, m) in enumerate(zip(lengths_q.tolist(), lengths_kv.tolist(), strict=True)):
        if n and m:
            seen = {
                "padding": torch.ones(n, m, dtype=torch.bool),
                "padding_causal": torch.arange(m) <= torch.arange(n)[:, None],
                "padding_causal_bottom_right": causal(n, m),
            }[mask_type]
            want[b, :n] = attend(q[b, :n], k[b, :m], v[b, :m], seen)
    close(got, want)


def test_a_mask_marks_what_is_masked_out() -> None:
    q, k, v = tensors(2, 6)
    out = torch.rand(2, 1, 6, 6) < 0.4
    close(core(attn_mask_type="arbitrary")(q, k, v, out), each(q, k, v, [~out[0, 0], ~out[1, 0]]))


def test_windows() -> None:
    q, k, v = tensors(1, 12)
    close(core(window_size=(3, 0))(q, k, v), each(q, k, v, [causal(12, left=3)]))
    close(core(window_size=(3, -1))(q, k, v), each(q, k, v, [causal(12, left=3)]))
    close(core(window_size=(-1, -1))(q, k, v), each(q, k, v, [causal(12)]))
    distance = torch.arange(12) - torch.arange(12)[:, None]
    both = (distance >= -2) & (distance <= 4)
    close(core(attn_mask_type="no_mask")(q, k, v, window_size=(2, 4)), each(q, k, v, [both]))


def test_scale_and_softcap() -> None:
    q, k, v = tensors(1, 8)
    got = core(softmax_scale=0.3, softcap=2.0)(q, k, v)
    close(got, attnrt.attention(q, k, v, layout="bshd", causal=True, scale=0.3, softcap=2.0).flatten(-2))
    close(core(softmax_scale=0.3)(q, k, v), attend(q[0], k[0], v[0], causal(8), 0.3)[None])


def test_softmax_types() -> None:
    q, k, v = tensors(1, 8)
    weights = attnrt.attention(q, k, v, layout="bshd", causal=True, return_lse=True)
    shrunk = weights[0] * torch.sigmoid(weights[1].double()).transpose(1, 2)[..., None]  # exp(lse) / (exp(lse) + 1)
    off_by_one = core(softmax_type="off-by-one")
    assert not off_by_one.state_dict() and not list(off_by_one.parameters())
    torch.testing.assert_close(off_by_one(q, k, v), shrunk.flatten(-2), rtol=1e-6, atol=1e-6)
    learnable = core(softmax_type="learnable")
    assert list(learnable.state_dict()) == ["softmax_offset"]
    learnable(q, k, v).sum().backward()
    assert learnable.softmax_offset.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_dropout_in_training_only() -> None:
    q, k, v = tensors(1, 16)
    module = core(attention_dropout=0.5)
    torch.testing.assert_close(module(q, k, v), core()(q, k, v))
    module.train()
    dropped = module(q, k, v)
    assert attnrt.last_decision().request.dropout_p == 0.5  # type: ignore[union-attr]
    assert not torch.allclose(dropped, core()(q, k, v))


def test_gradients() -> None:
    q, k, v = (t.requires_grad_() for t in tensors(2, 9))
    grad = torch.randn(2, 9, HEADS * DIM).double()
    got = torch.autograd.grad(core()(q, k, v), (q, k, v), grad)
    want = torch.autograd.grad(each(q, k, v, [causal(9)] * 2), (q, k, v), grad)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_bias_and_alibi_are_passed_on() -> None:
    q, k, v = tensors(1, 8)
    bias, slopes = torch.randn(1, HEADS, 8, 8).double(), torch.rand(HEADS)
    got = core()(q, k, v, core_attention_bias=bias, alibi_slopes=slopes)
    want = attnrt.attention(q, k, v, layout="bshd", causal=True, bias=bias, alibi_slopes=slopes)
    close(got, want.flatten(-2))


def test_a_backend_can_be_named() -> None:
    q, k, v = tensors(1, 8)
    core(backend="reference")(q, k, v)
    assert attnrt.last_decision().backend == "reference"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"num_query_groups": 4}, "num_query_groups"),
        ({"num_query_groups": 0}, "num_query_groups"),
        ({"qkv_format": "bhsd"}, "qkv_format"),
        ({"attn_mask_type": "causal_top_left"}, "attn_mask_type"),
        ({"window_size": (-2, 0)}, "window_size"),
        ({"window_size": 4}, "window_size"),
        ({"attention_dropout": 1.0}, "dropout_p"),
        ({"softmax_type": "sink"}, "softmax_type"),
    ],
)
def test_bad_options(options: dict[str, Any], name: str) -> None:
    with pytest.raises((ArgumentError, UnknownNameError), match=name) as caught:
        DotProductAttention(**{"num_attention_heads": 6, "kv_channels": 16, **options})
    if name == "num_query_groups":
        assert "[1, 2, 3, 6]" in str(caught.value)


def test_the_zeros_of_off_by_one_after_meta() -> None:
    with torch.device("meta"):
        module = DotProductAttention(4, 8, softmax_type="off-by-one")
    module.to_empty(device="cpu")
    assert torch.equal(module.softmax_offset, torch.zeros(4))


def test_heads_are_the_modules() -> None:
    """Other ones would be served by `attention`, with another scale or other groups than were asked for."""
    module = DotProductAttention(8, 8, num_query_groups=2, qkv_format="bshd", attn_mask_type="no_mask")
    right = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 2, 8), torch.randn(1, 4, 2, 16)
    assert module(*right).shape == (1, 4, 8 * 16)
    wrong = {
        "query_layer": (torch.randn(1, 4, 4, 8), *right[1:]),
        "key_layer": (right[0], torch.randn(1, 4, 4, 8), torch.randn(1, 4, 4, 8)),
        "query_layer.*8, 8": (torch.randn(1, 4, 8, 16), torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2, 16)),
    }
    for said, tensors in wrong.items():
        with pytest.raises(ArgumentError, match=said):
            module(*tensors)


def test_a_mask_of_one_side() -> None:
    q, k, v = tensors(2, 4)
    pad = torch.tensor([[False, False, True, True], [False, True, True, True]])[:, None, None]
    module, lengths = core(attn_mask_type="padding"), torch.tensor([2, 1], dtype=torch.int32)
    torch.testing.assert_close(module(q, k, v, (None, pad)), module(q, k, v, seqlens_kv=lengths))
    torch.testing.assert_close(module(q, k, v, (pad, None)), module(q, k, v, seqlens_q=lengths))
    for nothing in ((None, None), (pad,)):
        with pytest.raises(ArgumentError, match="pair"):
            module(q, k, v, nothing)


def test_bad_masks() -> None:
    q, k, v = tensors(2, 4)
    pad = torch.tensor([[False, False, True, True]] * 2)[:, None, None]
    with pytest.raises(ArgumentError, match="takes none"):
        core()(q, k, v, pad)
    with pytest.raises(ArgumentError, match="needs one"):
        core(attn_mask_type="arbitrary")(q, k, v)
    with pytest.raises(ArgumentError, match="needs it"):
        core(attn_mask_type="padding_causal")(q, k, v)
    with pytest.raises(ArgumentError, match="on the right"):
        core(attn_mask_type="padding")(q, k, v, pad.flip(-1))
    with pytest.raises(ArgumentError, match=r"\(B, 1, 1, S\)"):
        core(attn_mask_type="padding")(q, k, v, pad[:, 0])
    with pytest.raises(ArgumentTypeError, match="True = masked out"):
        core(attn_mask_type="padding")(q, k, v, pad.float())
    with pytest.raises(ArgumentError, match="given already"):
        core(attn_mask_type="padding")(q, k, v, pad, seqlens_q=torch.tensor([2, 2], dtype=torch.int32))
