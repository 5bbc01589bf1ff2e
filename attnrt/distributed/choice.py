"""Which method a call runs by: every method gets a verdict with all its reasons, and the quickest eligible one wins.

A pure function of the request, the machine, the links and the settings, like `attnrt.selector.select` under it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from attnrt.backends.base import Reason
from attnrt.decision import Decision
from attnrt.distributed.cost import Cost, cost
from attnrt.distributed.links import Topology
from attnrt.distributed.request import METHODS, Method, ParallelRequest
from attnrt.distributed.simulator import assumed, predict, work_of
from attnrt.environment import Environment
from attnrt.selector import size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from attnrt.request import AttentionRequest

    ChooseLocally = Callable[[AttentionRequest], Decision]

CLOSE = 1.05
"""Methods whose predictions are this close are alike, and the one that moves the fewest bytes wins."""


class MethodRule(NamedTuple):
    """One limit of a method."""

    id: str
    fails: Callable[[ParallelRequest], bool]
    message: str
    remedy: str | None = None


def _added(r: AttentionRequest, rows: bool = False) -> bool:
    """A mask or bias, with `rows` only one that differs by query."""
    return any(o is not None and (not rows or o.shape[2] > 1) for o in (r.mask, r.bias))


EVERY_METHOD = (
    MethodRule("CP_PAGED", lambda p: p.whole.paged, "a paged KV cache is not cut across ranks"),
    MethodRule(
        "CP_DROPOUT",
        lambda p: p.whole.dropout_p > 0,
        "dropout is not applied across ranks: each would draw its own numbers, and no result could be repeated",
        "dropout_p=0.0",
    ),
    MethodRule(
        "CP_PACKED_MASK",
        lambda p: p.whole.packed and _added(p.whole),
        "a mask or bias of packed sequences is laid out by document, not by token, so that it cannot be cut",
    ),
)
RULES: Mapping[Method, tuple[MethodRule, ...]] = {
    "gather": (
        *EVERY_METHOD,
        MethodRule(
            "GATHER_ALIBI",
            lambda p: p.whole.alibi is not None and (p.whole.right != 0 or p.whole.padded or p.whole.packed),
            "gather takes ALiBi with a causal mask only: a chunk's distances count from its last key",
            "method='ulysses'",
        ),
        MethodRule(
            "GATHER_PADDED_END",
            lambda p: p.whole.padded and p.whole.alignment == "bottom_right",
            "bottom-right alignment of a padded batch puts each sequence's queries elsewhere; a chunk has one place",
            "method='ulysses', or pack the batch (layout='thd')",
        ),
    ),
    "ulysses": (
        *EVERY_METHOD,
        MethodRule(
            "ULYSSES_HEADS",
            lambda p: p.whole.heads_q % p.ranks != 0,
            "ulysses gives each rank as many query heads, and {p.ranks} ranks do not divide {p.whole.heads_q}",
            "a group whose size divides the query heads, or method='gather' or 'ring'",
        ),
        MethodRule(
            "ULYSSES_MASK",
            lambda p: _added(p.whole, rows=True),
            "ulysses needs every query's row of a mask or bias, and each rank has those of its own queries only",
            "method='gather'",
        ),
    ),
    "ring": (
        *EVERY_METHOD,
        MethodRule(
            "RING_MASK",
            lambda p: _added(p.whole),
            "a ring does not take a mask or bias",
            "method='gather'",
        ),
        MethodRule(
            "RING_ALIBI",
            lambda p: p.whole.alibi is not None,
            "a ring does not take ALiBi: a block's distances count from its own corner",
            "method='ulysses', or method='gather' with a causal mask",
        ),
        MethodRule(
            "RING_PADDED_END",
            lambda p: p.whole.padded and p.whole.alignment == "bottom_right",
            "bottom-right alignment of a padded batch puts each sequence's queries elsewhere; a block has one place",
            "method='ulysses', or pack the batch (layout='thd')",
        ),
    ),
}


@dataclass(frozen=True)
class MethodVerdict:
    """What one method can do with a call.

    Attributes:
        reasons: every rule that refuses it. cost: bytes moved and held; None if it is refused for its form.
        seconds: predicted, from assumed speeds: a means to compare methods. local: the choice for each kind of kernel
            call that it makes, by a name for it.
    """

    method: Method
    reasons: tuple[Reason, ...]
    cost: Cost | None = None
    seconds: float | None = None
    local: Mapping[str, Decision] | None = None

    @property
    def eligible(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class ParallelDecision:
    """The choice for one call over several ranks. `print` it, or use `to_json()`.

    Attributes:
        method: the winner, None if nothing (or not the forced method) can serve. why: one sentence.
        verdicts: every method's, by name. topology: the links that predictions go by.
    """

    request: ParallelRequest
    environment: Environment
    topology: Topology
    method: Method | None
    why: str
    verdicts: Mapping[str, MethodVerdict]

    @property
    def local(self) -> Mapping[str, Decision]:
        """The winner's kernel calls, and what was chosen for each kind of them."""
        return {} if self.method is None else self.verdicts[self.method].local or {}

    @property
    def backends(self) -> tuple[str, ...]:
        """What runs locally: "torch[flash_cpu]"."""
        return tuple(dict.fromkeys(decision.label for decision in self.local.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        from attnrt.distributed.report import to_dict

        return to_dict(self)

    def to_json(self, indent: int | None = 2) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def to_markdown(self) -> str:
        """For a bug report."""
        from attnrt.distributed.report import markdown

        return markdown(self)

    def __rich__(self) -> RenderableType:
        from attnrt.distributed.report import renderable

        return renderable(self)

    def __str__(self) -> str:
        import sys

        from attnrt.report import render

        return render(self.__rich__(), sys.stdout)


def decide(
    request: ParallelRequest,
    environment: Environment,
    topology: Topology,
    method: str,
    choose_locally: ChooseLocally,
    rank: int | None = None,
    every: bool = True,
) -> ParallelDecision:
    """Judge the methods and choose.

    Args:
        method: "auto", or the one to force. choose_locally: makes the choice for a local kernel call.
        rank: whose calls are looked at besides those of the first and the last rank.
        every: judge the other methods too when one is forced, for a report.
    """
    judged = [m for m in METHODS if every or method in ("auto", m)]
    verdicts: dict[str, MethodVerdict] = {
        m: judge(request, environment, topology, m, choose_locally, rank) for m in judged
    }
    eligible = [m for m in judged if verdicts[m].eligible]
    if method != "auto":
        chosen: Method | None = next((m for m in eligible if m == method), None)
        why = "named by method=" if chosen else f"{method} was named by method= and cannot serve this call"
        return ParallelDecision(request, environment, topology, chosen, why, verdicts)
    if not eligible:
        return ParallelDecision(request, environment, topology, None, "no method can serve this call", verdicts)
    seconds = {m: verdicts[m].seconds or 0.0 for m in eligible}
    costs = {m: verdicts[m].cost for m in eligible}
    moved = {m: one.moved if one else 0 for m, one in costs.items()}
    quickest = min(seconds, key=lambda m: seconds[m])
    best = min((m for m in eligible if seconds[m] <= seconds[quickest] * CLOSE), key=lambda m: moved[m])
    if len(eligible) == 1:
        why = "the only method that can serve this call"
    else:
        said = ", ".join(f"{m} {seconds[m] * 1e3:.3g} ms and {size(moved[m])} moved" for m in eligible)
        first = "the quickest by prediction"
        if best != quickest:
            first = f"moves the least of those within {CLOSE - 1:.0%} of the quickest, by prediction"
        why = f"{first}: {said}"
    return ParallelDecision(request, environment, topology, best, why, verdicts)


def judge(
    request: ParallelRequest,
    environment: Environment,
    topology: Topology,
    method: Method,
    choose_locally: ChooseLocally,
    rank: int | None = None,
) -> MethodVerdict:
    """One method's verdict; it depends on no other method."""
    refused = [_reason(rule, request) for rule in RULES[method] if rule.fails(request)]
    if refused:
        return MethodVerdict(method, tuple(refused))
    ends = dict.fromkeys((0, request.ranks - 1, *(() if rank is None else (rank,))))
    local = {name: choose_locally(r) for r, name in request.local_requests(method, tuple(ends)).items()}
    for name, decision in local.items():
        if decision.backend is None:
            refused.append(_no_backend(method, name, decision))
    found = cost(request, method, max((d.winner.bytes for d in local.values() if d.winner), default=0))
    free = environment.free_memory
    if free is not None and found.memory > free:
        said = f"{method} would hold {size(found.memory)} on a rank beyond its shards, and {size(free)} is free"
        refused.append(Reason(f"{method.upper()}_MEMORY", said, "more ranks, or another method"))
    rate = assumed(environment.sm)
    seconds = predict(work_of(request, method), topology, rate, rate).seconds
    return MethodVerdict(method, tuple(refused), found, seconds, local)


def _reason(rule: MethodRule, request: ParallelRequest) -> Reason:
    return Reason(rule.id, rule.message.format(p=request), rule.remedy)


def _no_backend(method: Method, name: str, decision: Decision) -> Reason:
    """Why no kernel serves a block, backend by backend in a line each."""
    said = []
    for verdict in decision.verdicts.values():
        if decision.forced and verdict.backend not in (decision.forced, *_members(decision.forced)):
            continue
        said += [f"{verdict.label}: {reason.message}" for reason in verdict.reasons[:1]]
    return Reason(
        f"{method.upper()}_NO_BACKEND",
        f"no backend serves its blocks ({name}, {decision.request.describe()}): {'; '.join(said)}",
    )


def _members(family: str) -> tuple[str, ...]:
    from attnrt import registry

    return registry.families().get(family, ())
