"""The choice: a pure function of request, environment, settings and backends. No CUDA call, no global state, no I/O."""

from __future__ import annotations

from collections.abc import Mapping

from attnrt import registry
from attnrt.advisories import Advisory, matching
from attnrt.backends.base import Backend, Kernel, Reason, reasons
from attnrt.decision import Decision, Verdict, Verdicts
from attnrt.environment import GIB, Environment
from attnrt.policies.base import informed
from attnrt.request import AttentionRequest
from attnrt.settings import Settings

RULES = {
    "NOT_BUILT": "The backend's adapter is not in this release, so it cannot run; simulated machines ignore this.",
    "DISABLED": "The user turned the backend, its family or its kernel off.",
    "NOT_IN_POLICY": "The policy does not list the backend.",
    "DEMOTED": "The kernel failed for this request earlier, and the policy says `on_failure: next`.",
    "OUT_OF_MEMORY": "The kernel ran out of memory in this very call, and the policy says `on_failure: next`.",
    "UNFUSED_MEMORY": "The kernel holds the whole score matrix, which would not fit in memory.",
    "WORKSPACE_MEMORY": "The kernel is fused, but its workspace is as large as the scores here, and would not fit.",
    "MEASURED_WRONG": "`attnrt tune` compared its output with float64 for calls like this one, and it differed.",
}
"""Reasons that come from the choice itself, not from a backend's rules."""


def select(
    request: AttentionRequest,
    environment: Environment,
    settings: Settings,
    backends: Mapping[str, Backend],
    demoted: Mapping[str, Reason] | None = None,
    answers: Mapping[str, tuple[Reason, ...]] | None = None,
) -> Decision:
    """Give every backend a verdict with all its reasons, and choose the first eligible one in the order in force.

    Args:
        settings: what the user overrides, with the policy. demoted: backends that failed for this request.
        answers: what libraries said of it themselves, by backend, or "backend.kernel" where it has several.
    """
    policy = settings.policy
    assert policy is not None
    ranking = informed(policy.rank(request, environment))
    order = _order(ranking.order, settings.prefer, backends)
    verdicts = Verdicts(
        tuple(
            judge(
                backend, request, environment, settings, order, (demoted or {}).get(name), dict(ranking.wrong), answers
            )
            for name, backend in backends.items()
        )
    )
    candidates = [n for n in verdicts if not settings.force or n in settings.force]
    winner = next((n for n in candidates if verdicts[n].eligible), None)
    return Decision(
        request=request,
        environment=environment,
        backend=winner,
        why=_why(winner, verdicts, settings, ranking.line),
        evidence=ranking.why,
        verdicts=verdicts,
        policy=ranking.policy or policy.name,
        line=ranking.line,
        on_failure=policy.on_failure,
        forced=settings.force_name,
        overrides=settings.overrides,
        notices=ranking.notices,
    )


def judge(
    backend: Backend,
    request: AttentionRequest,
    environment: Environment,
    settings: Settings,
    order: Mapping[str, int],
    demoted: Reason | None,
    wrong: Mapping[str, str] | None = None,
    answers: Mapping[str, tuple[Reason, ...]] | None = None,
) -> Verdict:
    """One backend's verdict. Depends on no other backend, except that the settings may name it.

    Args:
        order: rank by backend name, and by "backend.kernel" where a policy ranks one kernel by itself.
        wrong: kernels that were found to give wrong results for calls like this, by the same names, and how.
        answers: what their libraries said, by the same names.
    """
    refused: list[Reason] = []
    if not backend.built and not environment.simulated:
        refused.append(
            Reason("NOT_BUILT", f"{backend.title} has no adapter in this release", "upgrade attnrt once it has")
        )
    if source := settings.disabled_by(backend.name):
        refused.append(Reason("DISABLED", f"turned off by {source}", "lift it, or force it with backend="))
    if demoted is not None:
        refused.append(demoted)
    refused += reasons(backend.all_rules, request, environment)
    chosen: Kernel | None = None
    passed_over: list[Reason] = []
    warnings: tuple[Advisory, ...] = ()
    candidates = [k for k in backend.kernels if k.runs_on(environment)] or list(backend.kernels)
    # A policy may rank a backend's kernels otherwise than the backend does; the sort is stable.
    candidates.sort(key=lambda k: len(order) if (place := _rank(order, backend, k)) is None else place)
    for kernel in candidates:
        against, warnings = kernel_reasons(backend, kernel, request, environment, settings)
        name = _kernel_name(backend, kernel)
        if wrong and name in wrong:
            against.append(Reason("MEASURED_WRONG", wrong[name], "fix it and run `attnrt tune --again`"))
        against += (answers or {}).get(name, ())
        if not against:
            chosen = kernel
            break
        passed_over += against
    if chosen is None:
        refused += passed_over
    shown = chosen or candidates[-1]
    label = chosen.name if chosen is not None and chosen is not backend else None
    rank = order.get(backend.name) if chosen is None else _rank(order, backend, chosen)
    if rank is None and chosen is None:
        rank = min((i for entry, i in order.items() if entry.startswith(f"{backend.name}.")), default=None)
    if rank is None and backend.name not in settings.force:
        policy = settings.policy.name if settings.policy else ""
        refused.append(
            Reason("NOT_IN_POLICY", f"policy {policy!r} does not list it", "prefer or force it, or use another policy")
        )
    eligible = not refused
    return Verdict(
        backend=backend.name,
        eligible=eligible,
        reasons=tuple(refused),
        kernel=label if eligible else None,
        fused=shown.fused,
        bytes=shown.bytes(request, environment),
        quadratic_bytes=shown.quadratic_bytes(request, environment),
        rank=rank,
        passed_over=tuple(passed_over) if eligible else (),
        notes=shown.notes(request, environment) if eligible else (),
        warnings=warnings if eligible else (),
    )


def _kernel_name(backend: Backend, kernel: Kernel) -> str:
    """As policies write it: "torch.flash_cpu", or the backend's name if it has no other kernel."""
    return backend.name if kernel is backend else f"{backend.name}.{kernel.name}"


def _rank(order: Mapping[str, int], backend: Backend, kernel: Kernel) -> int | None:
    """A kernel's place by its own name or its backend's, whichever comes first; None if neither is listed."""
    return min((order[n] for n in (_kernel_name(backend, kernel), backend.name) if n in order), default=None)


def kernel_reasons(
    backend: Backend, kernel: Kernel, request: AttentionRequest, environment: Environment, settings: Settings
) -> tuple[list[Reason], tuple[Advisory, ...]]:
    """(reasons against one kernel beyond its backend's own rules, known defects that only warn)."""
    against: list[Reason] = []
    if kernel is not backend:
        if source := settings.disabled_by(f"{backend.name}.{kernel.name}"):
            against.append(
                Reason("DISABLED", f"{kernel.title} is turned off by {source}", "lift it, or force another backend")
            )
        against += reasons(kernel.all_rules, request, environment)
    if reason := _memory_reason(kernel, request, environment, settings):
        against.append(reason)
    found = matching(backend.name, kernel.name, request, environment)
    against += [Reason(a.id, a.effect, a.remedy) for a in found if a.action == "refuse"]
    return against, tuple(a for a in found if a.action == "warn")


def _memory_reason(
    kernel: Kernel, request: AttentionRequest, environment: Environment, settings: Settings
) -> Reason | None:
    limit = environment.free_memory if settings.unfused_limit is None else settings.unfused_limit
    needed = kernel.quadratic_bytes(request, environment)
    if limit is None or limit < 0 or needed <= limit:
        return None
    allowed = (
        f"{size(limit)} is free" if settings.unfused_limit is None else f"ATTNRT_UNFUSED_LIMIT allows {size(limit)}"
    )
    holds = "asks for a workspace as large as the scores" if kernel.fused else "is unfused and holds the score matrix"
    return Reason(
        "WORKSPACE_MEMORY" if kernel.fused else "UNFUSED_MEMORY",
        f"{kernel.title} {holds}: {size(needed)} ({needed} bytes), and {allowed}",
        "use a fused backend, shorten the call, or set ATTNRT_UNFUSED_LIMIT if the memory is really there",
    )


def _order(listed: tuple[str, ...], preferred: tuple[str, ...], backends: Mapping[str, Backend]) -> dict[str, int]:
    """Concrete backend name -> rank: the preferred ones, then the policy's, families newest first, "*" the rest."""
    families: dict[str, list[str]] = {}
    for name, backend in backends.items():
        families.setdefault(backend.family or name, []).append(name)
    named = {member for entry in listed for member in families.get(entry, [entry])}
    ranked: list[str] = []
    for entry in listed:
        ranked += [n for n in backends if n not in named] if entry == "*" else families.get(entry, [entry])
    # A preferred family comes first as a whole; which of its members is best stays the policy's word.
    place = {name: i for i, name in enumerate(ranked)}
    order = [
        n for entry in preferred for n in sorted(families.get(entry, [entry]), key=lambda n: place.get(n, len(place)))
    ]
    order += ranked
    return {name: i for i, name in enumerate(dict.fromkeys(order)) if name.partition(".")[0] in backends}


def _why(winner: str | None, verdicts: Verdicts, settings: Settings, line: str) -> str:
    if winner is None:
        if settings.force_name:
            return f"{settings.force_name} is forced by {settings.force_source} and cannot serve this call"
        return "no backend can serve this call"
    if settings.force_name:
        return f"forced by {settings.force_source}"
    if winner in registry.expand(settings.prefer):
        return f"preferred by {settings.prefer_source}"
    ahead = [n for n in verdicts if verdicts[n].rank is not None and not verdicts[n].eligible]
    rank = verdicts[winner].rank or 0
    better = [n for n in ahead if (verdicts[n].rank or 0) < rank]
    first = f"first eligible after {', '.join(better)}" if better else "first"
    return f"{first} in {line}"


def size(count: int) -> str:
    """Bytes for a person: '1.5 GiB'."""
    if count >= GIB:
        return f"{count / GIB:.4g} GiB"
    for unit, factor in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count} B"
