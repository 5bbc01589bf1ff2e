"""What each rank does for tests/distributed: all scenarios of one group, one after the other."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from scenarios import CORE, METHODS, SCENARIOS, SEQUENCE, Scenario, cut
from torch import Tensor

from attnrt.distributed import MethodUnavailable, context_parallel_attention
from attnrt.operands import Operands


def run_all(backends: dict[str | None, bool]) -> dict[Any, Any]:
    """(scenario, method, placement, backend) -> this rank's results, or the rules that refused it.

    `backends`: by name (None: the choice's own), whether it runs all scenarios or only the core ones.
    """
    found = {}
    for backend, everything in backends.items():
        for scenario in SCENARIOS if everything else CORE:
            for method in METHODS:
                for placement in scenario.placements:
                    key = (scenario.name, method, placement, backend)
                    try:
                        found[key] = run(scenario, method, placement, backend)
                    except MethodUnavailable as error:
                        found[key] = [reason.rule for reason in error.report.verdicts[method].reasons]
    return found


def run(scenario: Scenario, method: str, placement: str, backend: str | None) -> dict[str, Tensor]:
    group = dist.group.WORLD
    assert group is not None
    rank, ranks = group.rank(), group.size()
    case = scenario.whole()
    axis = SEQUENCE[case.layout]
    placed_q = scenario.placed(placement, ranks, case.q.shape[axis])
    placed_kv = scenario.placed(placement, ranks, case.k.shape[axis])

    def own(x: Tensor, at: int, placed: Any) -> Tensor:
        part = cut(x.detach(), at, placed, rank)
        if "strided" in scenario.extras:
            part = part.repeat_interleave(2, -1)[..., ::2]
        return part.requires_grad_(x.requires_grad)

    q, k, v = own(case.q, axis, placed_q), own(case.k, axis, placed_kv), own(case.v, axis, placed_kv)
    given = dict(case.operands._asdict())
    given.pop("page_table", None)
    for name in ("mask", "bias"):
        x = given[name]
        if x is not None and x.shape[-2] > 1:
            given[name] = cut(x.detach(), x.ndim - 2, placed_q, rank).requires_grad_(x.requires_grad)
    operands = Operands(**given)
    found = context_parallel_attention(
        q,
        k,
        v,
        mesh=group,
        method=method,
        placement=placement,
        layout=case.layout,
        return_lse=True,
        backend=backend,
        **given,
        **case.options,
    )
    out, lse = found
    leaves = {"q": q, "k": k, "v": v, "bias": operands.bias, "sinks": operands.sinks}
    wanted = {n: t for n, t in leaves.items() if t is not None and t.requires_grad}
    results = {"out": out.detach(), "lse": lse}
    assert case.grad is not None and out.dtype == q.dtype
    if wanted:
        grad = cut(case.grad, axis, placed_q, rank)
        grads = torch.autograd.grad(out, list(wanted.values()), grad, allow_unused=True)
        for (name, leaf), g in zip(wanted.items(), grads, strict=True):
            results[name] = torch.zeros_like(leaf) if g is None else g
    return results
