"""Merging partial results by their log-sum-exp."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attnrt.distributed.merge import merge_

ROUNDING = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
"""Half a unit in the last place, relative."""


def parts(count: int, dtype: torch.dtype) -> tuple[list[tuple[Tensor, Tensor]], Tensor, Tensor]:
    """(out, LSE) of `count` sets of keys, as a kernel of that dtype gives them, and the truth in float64."""
    torch.manual_seed(count)
    q, k, v = (torch.randn(2, 3, n, 32, dtype=torch.float64) for n in (64, 32 * count, 32 * count))
    scores = q @ k.mT / math.sqrt(32)
    found = []
    for span in torch.arange(32 * count).chunk(count):
        some = scores[..., span]
        found.append(((some.softmax(-1) @ v[:, :, span]).to(dtype), torch.logsumexp(some, -1).float()))
    return found, scores.softmax(-1) @ v, torch.logsumexp(scores, -1)


def merged(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(found[0][0], dtype=torch.float32)
    lse = torch.full(out.shape[:-1], -math.inf)
    for part in found:
        merge_(out, lse, *part)
    return out, lse


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("count", [2, 8, 32])
def test_parts_of_16_bits_merge_to_within_one_rounding(dtype: torch.dtype, count: int) -> None:
    """However many: the merge is a weighted mean in float32, so the parts' own roundings do not add up."""
    found, truth, lse = parts(count, dtype)
    out, total = merged(found)
    rounding = ROUNDING[dtype] * max(float(part.abs().max()) for part, _ in found)
    assert (out - truth).abs().max() <= rounding
    usual = (truth.to(dtype).double() - truth).square().mean().sqrt()
    assert (out.double() - truth).square().mean().sqrt() <= 2 * usual
    assert torch.allclose(total.double(), lse, atol=1e-5)


def test_parts_of_32_bits_lose_nothing() -> None:
    found, truth, lse = parts(32, torch.float32)
    out, total = merged(found)
    assert (out - truth).abs().max() < 2e-6 and (total - lse).abs().max() < 2e-6


@pytest.mark.parametrize("first", [-math.inf, 0.5, 200.0, -200.0])
@pytest.mark.parametrize("second", [-math.inf, 0.5, 200.0, -200.0])
def test_rows_without_keys_stay_zero_and_nothing_is_nan(first: float, second: float) -> None:
    out, lse = torch.full((1, 4), 0.0 if first == -math.inf else 2.0), torch.tensor([first])
    part, part_lse = torch.full((1, 4), 0.0 if second == -math.inf else 4.0), torch.tensor([second])
    want = torch.logaddexp(lse.double(), part_lse.double())
    merge_(out, lse, part, part_lse)
    assert lse.item() == pytest.approx(want.item())
    weights = [0.0 if x == -math.inf else math.exp(x - want.item()) for x in (first, second)]
    assert out.tolist() == [pytest.approx([2 * weights[0] + 4 * weights[1]] * 4)]


def test_order_does_not_matter_beyond_rounding() -> None:
    found, _, _ = parts(8, torch.float32)
    one, other = merged(found), merged(found[::-1])
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
