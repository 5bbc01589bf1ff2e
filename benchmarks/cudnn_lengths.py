"""cuDNN on packed and padded batches: what a call takes on the device and on the host, with all that finds its
sequences and clears the rows of none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import attnrt

Calls = dict[str, Callable[[], Any]]


class Batch(NamedTuple):
    """kind: "packed", "packed twice" (queries and keys have a `cu_seqlens` each), or "padded"."""

    kind: str
    sequences: int
    longest: int
    heads_q: int
    heads_kv: int
    dim: int

    def __str__(self) -> str:
        return f"{self.kind} {self.sequences} x {self.longest}, {self.heads_q}/{self.heads_kv} heads, D{self.dim}"


LARGE = (
    Batch("packed", 8, 1024, 32, 8, 128),
    Batch("packed", 16, 512, 16, 16, 64),
    Batch("packed", 4, 4096, 32, 8, 128),
    Batch("packed twice", 8, 1024, 32, 8, 128),
    Batch("padded", 8, 1024, 32, 8, 128),
)
SMALL = tuple(Batch(kind, 4, 128, 4, 4, 64) for kind in ("packed", "packed twice", "padded"))


def tensors(batch: Batch, device: str = "cuda") -> tuple[list[Tensor], dict[str, Any]]:
    """q, k, v and the options of a causal call. Lengths are half to the whole of the longest."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(batch.longest // 2, batch.longest + 1, (batch.sequences,), generator=generator)
    lengths[0] = batch.longest
    size: tuple[int, ...] = (batch.sequences, batch.longest)
    numbers = lengths.to(device, torch.int32)
    options: dict[str, Any] = {"causal": True, "layout": "bshd", "seqlens_q": numbers, "seqlens_kv": numbers}
    if batch.kind != "padded":
        size = (int(lengths.sum()),)
        steps = F.pad(numbers.cumsum(0), (1, 0)).to(torch.int32)
        of_keys = steps.clone() if batch.kind == "packed twice" else steps
        options = {"causal": True, "layout": "thd", "cu_seqlens_q": steps, "cu_seqlens_kv": of_keys}
        options |= {"max_seqlen_q": batch.longest, "max_seqlen_kv": batch.longest, "alignment": "bottom_right"}
    heads = (batch.heads_q, batch.heads_kv, batch.heads_kv)
    return [
        torch.randn((*size, h, batch.dim), device=device, dtype=torch.bfloat16, requires_grad=True) for h in heads
    ], options


def lengths_times(
    in_turns: Callable[[Calls, int], dict[str, float]], issued: Callable[[Calls], dict[str, float]]
) -> dict[str, float]:
    """Microseconds. in_turns: the device's, of calls by name, so many times each. issued: the host's."""
    found = {}
    for batch in LARGE:
        found |= {f"{batch}: device, {way}": us for way, us in in_turns(calls(batch), 30).items()}
    for batch in SMALL:
        found |= {f"{batch}: host, {way}": us for way, us in issued(calls(batch)).items()}
    return found


def calls(batch: Batch) -> Calls:
    qkv, options = tensors(batch)

    def forward() -> Tensor:
        out = attnrt.attention(*qkv, backend="cudnn", **options)
        assert isinstance(out, Tensor)
        return out

    def inference() -> Tensor:
        with torch.no_grad():
            return forward()

    out = forward()
    grad = torch.randn_like(out)
    return {
        "forward": inference,
        "forward, training": forward,
        "backward": lambda: torch.autograd.grad(out, qkv, grad, retain_graph=True),
    }
