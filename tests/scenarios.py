"""Context-parallel calls: what the whole call is, how it is cut, and which methods refuse it, by which rule."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from oracle import Case
from torch import Tensor

from attnrt.distributed import Placement
from attnrt.operands import Operands

SEQUENCE = {"bhsd": 2, "bshd": 1, "sbhd": 0, "thd": 0}
METHODS = ("gather", "ulysses", "ring")


@dataclass(frozen=True)
class Scenario:
    """A whole call of (B, S, H, D) sizes and options; `cut` has lengths by rank if they are not the even ones."""

    name: str
    batch: int = 1
    heads_q: int = 12
    heads_kv: int = 12
    length_q: int = 48
    length_kv: int | None = None
    dim: int = 8
    dim_v: int = 8
    layout: str = "bhsd"
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    """Of: sinks, alibi, mask, bias, bias_row, padded, documents, strided, q_only, kv_only, no_grad."""
    uneven: bool = False
    refused: dict[str, str] = field(default_factory=dict)
    """Method to the rule that refuses it."""
    placements: tuple[str, ...] = ("contiguous", "zigzag")

    def whole(self) -> Case:
        """The call on one device, with its gradient."""
        generator = torch.Generator().manual_seed(len(self.name) + self.length_q)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        length_kv = self.length_q if self.length_kv is None else self.length_kv
        packed = self.layout == "thd"

        def shape(heads: int, length: int, dim: int) -> tuple[int, ...]:
            sizes = {"b": self.batch, "h": heads, "s": length}
            return (length, heads, dim) if packed else (*(sizes[c] for c in self.layout[:3]), dim)

        def tensor(heads: int, length: int, dim: int) -> Tensor:
            if "strided" in self.extras:
                return normal(*shape(heads, length, dim)[:-1], 2 * dim)[..., ::2]
            return normal(*shape(heads, length, dim))

        q = tensor(self.heads_q, self.length_q, self.dim)
        k, v = (tensor(self.heads_kv, length_kv, d) for d in (self.dim, self.dim_v))
        operands: dict[str, Tensor] = {}
        if "sinks" in self.extras:
            operands["sinks"] = normal(self.heads_q).float().requires_grad_()
        if "alibi" in self.extras:
            operands["alibi_slopes"] = normal(self.heads_q).float().abs() / 4
        if "mask" in self.extras:
            mask = torch.rand(self.batch, 1, self.length_q, length_kv, generator=generator) > 0.4
            mask[:, :, 3] = False
            operands["mask"] = mask
        if "bias" in self.extras:
            operands["bias"] = normal(1, self.heads_q, self.length_q, length_kv)
        if "bias_row" in self.extras:
            operands["bias"] = normal(self.batch, self.heads_q, 1, length_kv)
        if "bias_grad" in self.extras:
            operands["bias"].requires_grad_()
        if "padded" in self.extras:
            lengths = torch.tensor([self.length_q - 7, 5], dtype=torch.int32)
            operands |= {"seqlens_q": lengths, "seqlens_kv": lengths}
        if packed:
            cuts = torch.tensor([0, 5, 5, 29, 40, self.length_q], dtype=torch.int32)
            operands |= {"cu_seqlens_q": cuts, "cu_seqlens_kv": cuts}
        for name, t in {"q": q, "k": k, "v": v}.items():
            wanted = {"q_only": name == "q", "kv_only": name != "q", "no_grad": False}
            t.requires_grad_(all(wanted.get(extra, True) for extra in self.extras))
        if "no_grad" in self.extras:
            for t in operands.values():
                t.requires_grad_(False)
        grad = normal(*q.shape[:-1], self.dim_v)
        return Case(q, k, v, self.layout, Operands(**operands), grad, dict(self.options))

    def placed(self, placement: str, ranks: int, length: int) -> Placement:
        if not self.uneven or placement == "zigzag":
            return Placement.even(placement, length, ranks)
        first = [length - 3 * (ranks - 1), *[3] * (ranks - 1)]
        return Placement.contiguous(first)


def cut(x: Tensor, axis: int, placement: Placement, rank: int) -> Tensor:
    """A rank's tokens."""
    return torch.cat([x.narrow(axis, s.start, s.length) for s in placement.spans[rank]], axis)


def joined(parts: list[Tensor], axis: int, placement: Placement) -> Tensor:
    """The whole from every rank's tokens."""
    ordered = [parts[r].narrow(axis, p.at, p.span.length) for r, p in placement.in_order]
    return torch.cat(ordered, axis)


CAUSAL = {"causal": True}
NO_MASK = {"ring": "RING_MASK", "ulysses": "ULYSSES_MASK"}
SCENARIOS = (
    Scenario("full", batch=2),
    Scenario("causal", options=CAUSAL),
    Scenario("causal gqa bshd", batch=2, heads_kv=4, layout="bshd", options=CAUSAL),
    Scenario("causal mqa sbhd", batch=2, heads_kv=1, layout="sbhd", options=CAUSAL),
    Scenario("heads equal length", heads_q=12, length_q=12, options=CAUSAL),
    Scenario("uneven full gqa", batch=2, heads_kv=6, length_q=47, uneven=True),
    Scenario("uneven causal", length_q=41, uneven=True, options=CAUSAL),
    Scenario("fewer tokens than chunks", length_q=3, options=CAUSAL),
    Scenario("left window", options={"window": (9, 0)}),
    Scenario("narrow window", options={"causal": True, "window": (2, None)}, heads_kv=4),
    Scenario("two-sided window", batch=2, options={"window": (7, 4)}, layout="bshd"),
    Scenario("right window", options={"window": (None, 3)}),
    Scenario("uneven window", length_q=50, uneven=True, options={"window": (11, 2)}),
    Scenario("more keys, bottom right", batch=2, length_kv=61, options={"causal": True, "alignment": "bottom_right"}),
    Scenario("more keys, top left", length_kv=61, options={"causal": True, "alignment": "top_left"}),
    Scenario("more queries, bottom right", length_kv=31, options={"causal": True, "alignment": "bottom_right"}),
    Scenario("more queries, top left", length_kv=31, options={"window": (6, 6), "alignment": "top_left"}),
    Scenario("cross full", length_kv=20, heads_kv=2),
    Scenario("softcap", options={"causal": True, "softcap": 2.0, "scale": 0.5}, heads_kv=4),
    Scenario("sinks", batch=2, extras=("sinks",), options=CAUSAL, layout="bshd"),
    Scenario(
        "sinks, dead rows", extras=("sinks",), length_kv=31, options={"causal": True, "alignment": "bottom_right"}
    ),
    Scenario("alibi", extras=("alibi",), options=CAUSAL, refused={"ring": "RING_ALIBI"}),
    Scenario(
        "alibi, both sides", extras=("alibi",), refused={"ring": "RING_ALIBI", "gather": "GATHER_ALIBI"}, heads_kv=4
    ),
    Scenario("mask", batch=2, extras=("mask",), refused=NO_MASK),
    Scenario("bias", extras=("bias",), refused=NO_MASK, options=CAUSAL, heads_kv=4),
    Scenario("bias of keys", batch=2, extras=("bias_row",), refused={"ring": "RING_MASK"}),
    Scenario("bias with gradient", extras=("bias", "bias_grad"), refused=NO_MASK),
    Scenario("padded", batch=2, extras=("padded",)),
    Scenario("padded causal", batch=2, extras=("padded",), options=CAUSAL, layout="sbhd", heads_kv=4),
    Scenario("padded window", batch=2, extras=("padded",), options={"window": (6, 1)}),
    Scenario("packed", layout="thd"),
    Scenario("packed causal gqa", layout="thd", heads_kv=4, options=CAUSAL),
    Scenario("packed window", layout="thd", options={"window": (8, 2)}),
    Scenario("packed left window", layout="thd", options={"window": (4, 0)}, uneven=True),
    Scenario("unequal dims", dim_v=16, options=CAUSAL),
    Scenario("strided", extras=("strided",), options=CAUSAL),
    Scenario("gradient of q only", extras=("q_only",), options=CAUSAL),
    Scenario("gradient of k and v only", extras=("kv_only",), options=CAUSAL),
    Scenario("inference", extras=("no_grad",), options=CAUSAL, heads_kv=4),
    Scenario("float64", dtype=torch.float64, options=CAUSAL, heads_kv=4),
    Scenario("bf16", batch=2, dtype=torch.bfloat16, options=CAUSAL, heads_kv=4, length_q=96),
    Scenario("fp16 full", dtype=torch.float16),
    Scenario("dropout", options={"dropout_p": 0.1}, refused=dict.fromkeys(METHODS, "CP_DROPOUT")),
)


_CORE = (
    "full",
    "causal gqa bshd",
    "causal mqa sbhd",
    "heads equal length",
    "uneven full gqa",
    "uneven causal",
    "left window",
    "two-sided window",
    "more keys, bottom right",
    "more queries, top left",
    "sinks",
    "padded causal",
    "packed causal gqa",
    "bf16",
    "gradient of q only",
)
CORE = tuple(scenario for scenario in SCENARIOS if scenario.name in _CORE)
"""What every group size and every backend runs."""
