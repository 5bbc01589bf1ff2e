"""policy="measure": at the first sight of a request its kernels are timed on the call's own tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnrt import registry
from attnrt.environment import Environment
from attnrt.evidence.calls import Tensors
from attnrt.evidence.machine import here
from attnrt.evidence.measuring import measure
from attnrt.evidence.ranks import said_by_rank_0
from attnrt.evidence.store import known_kernels, tuned_policy
from attnrt.evidence.timing import clock_for
from attnrt.evidence.tuning import MARGIN
from attnrt.operands import Operands
from attnrt.policies.base import InformedRanking, Policy, Ranking, informed
from attnrt.policies.measured import MeasuredPolicy, figure
from attnrt.policies.preference import on_forget
from attnrt.request import AttentionRequest
from attnrt.settings import Settings

SECONDS = {"cpu": 0.1, "cuda": 0.02}
"""What timing may take, in each direction, at the first sight of a request."""
WAIT_SECONDS = 60.0
"""How long a rank waits for rank 0 to have measured the same request."""
REQUESTS = 4096


@dataclass(frozen=True)
class Seen:
    """What was found for one request: seconds by kernel, and the kernels that were wrong; or why nothing was."""

    seconds: dict[str, float] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    why_not: str | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuringPolicy(MeasuredPolicy):
    """Figures of this very process first, then those of the cache directory, then the static policy."""

    seen: dict[tuple[AttentionRequest, str], Seen] = field(default_factory=dict)
    measures = True

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"times each new request on its own tensors; until then {super().description}"

    def rank(self, request: AttentionRequest, environment: Environment) -> InformedRanking:
        fallback = super().rank(request, environment)
        found = self.seen.get((request, environment.name))
        if found is None:
            if environment.simulated:
                return fallback
            return informed(fallback, notices=("not measured yet: attention() will, once",))
        seconds = {name: value for name, value in found.seconds.items() if name in self.kernels}
        if found.why_not is not None or not seconds:
            said = found.why_not or "no kernel could be timed"
            return informed(fallback, notices=(f"not measured: {said}",), wrong=tuple(found.wrong.items()))
        least = min(seconds.values())
        static = self.static.rank(request, environment).order
        order = self.prefer({n: x / least for n, x in seconds.items()}, static, MARGIN, request)
        figures = ", ".join(f"{n} {figure(seconds[n])}" for n in sorted(seconds, key=seconds.__getitem__))
        ranking = Ranking(
            order=tuple(dict.fromkeys((*order, *static))),
            line="measure: this call",
            why=f"measured on this call's own tensors: {figures}",
        )
        return informed(ranking, policy=self.name, notices=self.refused, wrong=tuple(found.wrong.items()))


_policies: dict[tuple[str, Policy], MeasuringPolicy] = {}
on_forget.append(_policies.clear)
registry.on_change.append(_policies.clear)


def measuring_policy(cache_dir: Path, static: Policy) -> MeasuringPolicy:
    """The policy "measure" over whatever the cache directory has: one until the next refresh, as it remembers."""
    key = (str(cache_dir), static)
    if key not in _policies:
        base = tuned_policy(cache_dir, static, automatic=True)
        known = base if isinstance(base, MeasuredPolicy) else None
        _policies[key] = MeasuringPolicy(
            static=static,
            tables=known.tables if known else (),
            kernels=known_kernels(),
            here=here(),
            refused=known.refused if known else (),
            name="measure",
        )
    return _policies[key]


def measure_once(
    request: AttentionRequest,
    environment: Environment,
    settings: Settings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
) -> bool:
    """Measure a request that the policy has not seen, and remember it. False: it was known. Random states are left as
    they were.

    In a job of several ranks rank 0 measures, and the others take its figures.
    """
    policy = settings.policy
    assert isinstance(policy, MeasuringPolicy)
    key = (request, environment.name)
    if key in policy.seen or settings.force:
        return False
    if len(policy.seen) >= REQUESTS:
        policy.seen.clear()
    if (why_not := _cannot(request, q)) is not None:
        policy.seen[key] = Seen(why_not=why_not)
        return True
    said, _ = said_by_rank_0(
        f"measure/{request!r}",
        lambda: json.dumps(_measured(request, environment, settings, q, k, v, operands)),
        WAIT_SECONDS,
    )
    policy.seen[key] = Seen(**json.loads(said))
    return True


def _cannot(request: AttentionRequest, q: Tensor) -> str | None:
    if request.capturing:
        return "a CUDA graph is being captured"
    if request.compiled or torch.compiler.is_compiling() or type(q) not in (Tensor, torch.nn.Parameter):
        return f"the tensors hold no values to run on ({type(q).__name__})"
    if q.device.type not in SECONDS:
        return f"timing is for 'cpu' and 'cuda', not {q.device.type!r}"
    if request.empty:
        return "there is nothing to compute"
    return None


def _measured(
    request: AttentionRequest,
    environment: Environment,
    settings: Settings,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
) -> dict[str, Any]:
    def alone(t: Tensor | None) -> Any:
        return None if t is None else t.detach().requires_grad_(request.needs_grad and t.requires_grad)

    bound = operands._replace(bias=alone(operands.bias), sinks=alone(operands.sinks))
    given = Tensors(alone(q), alone(k), alone(v), bound, request)
    devices = [q.device] if q.is_cuda else []
    try:
        with torch.random.fork_rng(devices), torch.enable_grad():
            found = measure(given, environment, settings, seconds=SECONDS[q.device.type], clock=_clock(q.device))
    except Exception as error:  # memory that runs out, for one: the call itself must not fail of it
        return {"why_not": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"}
    return {"seconds": found.seconds(), "wrong": found.wrong}


_clocks: dict[torch.device, Any] = {}


def _clock(device: torch.device) -> Any:
    """One for each device: the buffer that flushes its L2 is kept."""
    if device not in _clocks:
        _clocks[device] = clock_for(device)
    return _clocks[device]
