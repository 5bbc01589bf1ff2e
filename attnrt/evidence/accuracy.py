"""Is an answer right? Compared with float64, and forgiven twice what plain PyTorch in the same dtype gets wrong.

A call whose scores are many is compared on pieces (see `truth`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrt.evidence.calls import TORCH_DTYPES, Tensors
from attnrt.evidence.truth import (
    SCORES,
    SHARED,
    Piece,
    Terms,
    answers,
    cotangent_of,
    first_token,
    index_of,
    keys_of,
    pieces_of,
    terms,
)
from attnrt.request import DTYPES


class Tolerance(NamedTuple):
    """Allowed beyond twice the error of plain PyTorch: of the largest value, of the norm, and of the overall factor.

    Rounding errors of single values are large but do not add up; a factor that is not 1 is no rounding error.
    """

    largest: float
    norm: float
    factor: float


TOLERANCES = {
    "fp64": Tolerance(1e-9, 1e-10, 1e-10),
    "fp32": Tolerance(2e-5, 1e-5, 1e-5),
    "fp16": Tolerance(4e-3, 2e-3, 1e-3),
    "bf16": Tolerance(1.6e-2, 8e-3, 4e-3),
}
ROUNDINGS = {"fp64": (16, 2.0**-53), "fp32": (16, 2.0**-24), "fp16": (2, 2.0**-11), "bf16": (2, 2.0**-8)}
"""How many roundings a product has that is summed up in a gradient, and what one takes at most: two to 16 bits; in 32
and 64, where the scores are no more exact than the rest, what a score of about 8 is off by besides."""
DEVIATIONS = 5.0
CANCELLED = 1e-5
"""Of the largest value that could cancel: what is left after it may be rounding and nothing else."""


class Difference(NamedTuple):
    """How far one result is from the truth. `measure` is the criterion that came nearest its limit, or broke it."""

    name: str
    error: float
    allowed: float
    measure: str

    @property
    def ratio(self) -> float:
        """Error over what is allowed: wrong from 1 on."""
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0

    @property
    def wrong(self) -> bool:
        return not self.ratio <= 1

    def __str__(self) -> str:
        return f"{self.name}: {self.measure} {self.error:.3g} where {self.allowed:.3g} is allowed"


def worst(differences: Sequence[Difference]) -> Difference:
    """The one nearest its limit, or the furthest beyond; NaN counts as infinitely far."""
    if not differences:
        return Difference("the output", 0.0, 1.0, "nothing to compare:")
    return max(differences, key=lambda d: math.inf if math.isnan(d.ratio) else d.ratio)


@dataclass
class Truth:
    """What a call must give on its pieces, and how far plain PyTorch in the call's own dtype is from it."""

    pieces: list[Piece]
    whole: bool
    """The pieces are everything."""
    cotangent: Tensor | None
    exact: Mapping[str, Tensor]
    plain: Mapping[str, Tensor]
    natural: Mapping[str, float] = field(default_factory=dict)
    """The size of what may cancel in each gradient."""
    terms: Mapping[str, Terms] = field(default_factory=dict)
    """What is summed up in those that are sums over many rows."""

    def check(self, given: Tensors, run: Callable[..., Any]) -> list[Difference]:
        """Run a kernel's call on the tensors and compare every result: output, LSE, gradients."""
        return self.compare(given, results(given, run, self.cotangent))

    def compare(self, given: Tensors, found: Mapping[str, Tensor]) -> list[Difference]:
        differences = []
        for name, got in _gathered(given, self.pieces, found).items():
            if name not in self.exact:  # the gradient of a bias too large to hold
                continue
            want, plain = self.exact[name], self.plain[name]
            dtype = _coarsest(name, given)
            rounding = _rounding(self.terms.get(name), dtype, want)
            natural = self.natural.get(name, 0.0)
            differences.append(_difference(name, got, want, plain, TOLERANCES[dtype], natural, rounding))
        if not self.whole:
            differences += _elsewhere(given, self.pieces, found)
        return differences


def truth_of(given: Tensors, limit: int = SCORES) -> Truth:
    """Compute what these tensors must give, on pieces of at most `limit` scores (or a few rows, where those are more).

    Dropout is not known to it: ask with dropout_p = 0.
    """
    pieces, whole = pieces_of(given, limit)
    cotangent = cotangent_of(given, pieces, whole) if given.leaves() else None
    exact = answers(given, pieces, cotangent, torch.float64)
    plain = answers(given, pieces, cotangent, TORCH_DTYPES[given.request.dtype])
    summed = terms(given, pieces, cotangent) if cotangent is not None else {}
    return Truth(pieces, whole, cotangent, exact, plain, _natural(given, cotangent), summed)


def results(given: Tensors, run: Callable[..., Any], cotangent: Tensor | None) -> dict[str, Tensor]:
    """What a kernel gives, from detached inputs: nothing accumulates in the caller's `.grad`."""
    operands = given.operands
    named = {"q": given.q, "k": given.k, "v": given.v, "bias": operands.bias, "sinks": operands.sinks}
    backward = cotangent is not None
    copies: dict[str, Any] = {
        n: None if t is None else t.detach().requires_grad_(backward and t.requires_grad) for n, t in named.items()
    }
    with torch.set_grad_enabled(backward):
        bound = operands._replace(bias=copies["bias"], sinks=copies["sinks"])
        result = run(*(copies[n] for n in "qkv"), bound)
        out, lse = result if isinstance(result, tuple) else (result, None)
        found = {"the output": out.detach()}
        if lse is not None:
            found["the LSE"] = lse.detach()
        wanted = {n: t for n, t in copies.items() if t is not None and t.requires_grad}
        if wanted:
            grads = torch.autograd.grad(out, list(wanted.values()), cotangent, allow_unused=True)
            for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
                found[f"the gradient of {name}"] = torch.zeros_like(leaf) if grad is None else grad
    return found


# ---- the comparison


def _gathered(given: Tensors, pieces: Sequence[Piece], found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same parts of a kernel's results as `_answers` gives, in its order."""
    r = given.request
    parts: dict[str, list[Tensor]] = {n: [] for n in found}
    for piece in pieces:
        at = index_of(r.layout, piece, first_token(given, piece.sequence, "q"))
        for name, x in found.items():
            leaf = name.rpartition(" ")[2]
            if name in ("the output", "the gradient of q"):
                part = x[at] if r.layout == "bhsd" else x[at].transpose(0, 1)
            elif name == "the LSE":
                rows = piece.rows + (first_token(given, piece.sequence, "q") if r.packed else 0)
                part = x[piece.heads[:, None], rows] if r.packed else x[piece.sequence, piece.heads[:, None], rows]
            elif leaf in ("k", "v"):
                part = keys_of(given, piece, leaf, x)
            else:
                continue
            parts[name].append(part)
    flat = {n: torch.cat([p.double().flatten() for p in ps]) for n, ps in parts.items() if ps}
    return flat | {n: x.double().flatten() for n, x in found.items() if n.rpartition(" ")[2] in SHARED}


def _elsewhere(given: Tensors, pieces: Sequence[Piece], found: Mapping[str, Tensor]) -> list[Difference]:
    """Where no gradient came from, none may go: k's and v's outside the heads and sequences that were looked at."""
    differences = []
    for name in ("the gradient of k", "the gradient of v"):
        if name not in found:
            continue
        total = _square(found[name])
        inside = sum(_square(keys_of(given, p, name[-1], found[name])) for p in pieces)
        stray = max(0.0, total - inside) if math.isfinite(total) else math.nan
        differences.append(Difference(name, stray, 1e-6 * total, "its square where no gradient came from"))
    return differences


def _coarsest(name: str, given: Tensors) -> str:
    """The dtype that a result is rounded to on its way: the call's, or the one it is returned in."""
    leaf = given.leaves().get(name.rpartition(" ")[2])
    returned = "fp32" if name == "the LSE" else given.request.dtype if leaf is None else DTYPES[leaf.dtype]
    return max(given.request.dtype, returned, key=lambda dtype: TOLERANCES[dtype].norm)


def _square(x: Tensor) -> float:
    """The sum of squares, in float64 without a copy in float64."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2


class Rounding(NamedTuple):
    """What a result may be off by, by the rounding of what is summed up in it: that does not shrink where the sum
    nearly cancels.

    With n roundings of at most u of each term t, an element is never off by more than n u sum |t|. The roundings are
    independent, and spread evenly over [-u, u]: variance u^2 / 3. So the error of an element has a standard deviation
    of u sqrt(n / 3 sum t^2), of which five are exceeded once in a million times; its norm over the elements and its
    product with the truth follow from these.
    """

    largest: float
    norm: float
    along: float
    """Of the product with the truth."""


def _rounding(terms: Terms | None, dtype: str, want: Tensor) -> Rounding:
    """Zero where that is not looked at."""
    if terms is None or not want.numel():
        return Rounding(0.0, 0.0, 0.0)
    known = torch.isfinite(want)
    want, absolute, root = (t.masked_fill(~known, 0.0) for t in (want, *terms))
    count, unit = ROUNDINGS[dtype]
    never, deviation = count * unit * absolute, unit * math.sqrt(count / 3) * root
    return Rounding(
        float(torch.minimum(never, DEVIATIONS * deviation).max()),
        min(float(never.norm()), float(deviation.norm()) + DEVIATIONS * float(deviation.max())),
        min(float(never @ want.abs()), DEVIATIONS * float((deviation * want).norm())),
    )


def _difference(
    name: str, got: Tensor, want: Tensor, plain: Tensor, tolerance: Tolerance, natural: float, rounding: Rounding
) -> Difference:
    low = torch.isneginf(want)
    if not torch.equal(torch.isneginf(got), low):
        return Difference(name, math.inf, 0.0, "-inf in other places:")
    unknown = ~torch.isfinite(want)  # -inf, or inputs that are not finite: what comes of those is nobody's fault
    got, want, plain = (t.masked_fill(unknown, 0.0) for t in (got, want, plain))
    if not want.numel():
        return Difference(name, 0.0, 1.0, "nothing to compare")
    error, fault = got - want, (plain - want).nan_to_num()
    cancelled = CANCELLED * natural
    biggest, norm = float(want.abs().max()), float(want.norm())
    found = [
        Difference(
            name,
            float(error.abs().max()),
            2 * float(fault.abs().max()) + tolerance.largest * biggest + cancelled + rounding.largest,
            "off by",
        ),
        Difference(
            name,
            float(error.norm()),
            2 * float(fault.norm()) + tolerance.norm * norm + cancelled * math.sqrt(want.numel()) + rounding.norm,
            "off in norm by",
        ),
    ]
    if norm > 10 * cancelled * math.sqrt(want.numel()):
        square = norm * norm
        found.append(
            Difference(
                name,
                abs(float(error @ want)) / square,
                2 * abs(float(fault @ want)) / square + tolerance.factor + rounding.along / square,
                "off by a factor that differs from 1 by",
            )
        )
    return worst(found)


def _natural(given: Tensors, cotangent: Tensor | None) -> dict[str, float]:
    """How large the terms are whose difference a gradient is: |dO| |V| times what multiplies it."""
    if cotangent is None or not given.q.numel() or not given.v.numel():
        return {}
    r = given.request

    def size(x: Tensor) -> float:
        return float(x.detach().nan_to_num(posinf=0.0, neginf=0.0).abs().max())

    rows = size(cotangent) * size(given.v) * r.head_dim_v**0.5
    found = {
        "bias": rows,
        "sinks": rows,
        "q": rows * size(given.k) * abs(r.scale),
        "k": rows * size(given.q) * abs(r.scale),
    }
    return {f"the gradient of {n}": x for n, x in found.items()}
