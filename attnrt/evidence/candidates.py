"""Who may serve a call: every kernel of every backend that is really here, or all the reasons against it."""

from __future__ import annotations

from typing import NamedTuple

from attnrt import registry
from attnrt.backends.base import Backend, Kernel, Reason, reasons
from attnrt.environment import Environment
from attnrt.request import AttentionRequest
from attnrt.selector import kernel_reasons
from attnrt.settings import Settings


class Candidate(NamedTuple):
    """One kernel. `name` as policies write it ("torch.flash_cpu"), `label` as reports do ("torch[flash_cpu]")."""

    name: str
    label: str
    backend: Backend
    kernel: Kernel


class Refused(NamedTuple):
    """A kernel that cannot serve, and why."""

    candidate: Candidate
    reasons: tuple[Reason, ...]


def candidate(backend: Backend, kernel: Kernel) -> Candidate:
    if kernel is backend:
        return Candidate(backend.name, backend.name, backend, kernel)
    return Candidate(f"{backend.name}.{kernel.name}", f"{backend.name}[{kernel.name}]", backend, kernel)


def every_candidate(environment: Environment) -> list[Candidate]:
    """Kernels that are meant for this kind of device at all, backends in the registry's order."""
    return [
        candidate(backend, kernel)
        for backend in registry.backends().values()
        for kernel in backend.kernels
        if kernel.runs_on(environment)
    ]


def candidates(
    request: AttentionRequest, environment: Environment, settings: Settings
) -> tuple[list[Candidate], list[Refused]]:
    """(those that can serve, the others). Rules, advisories, memory, what the user disabled, and the library's own
    answer all count; a policy's preference does not."""
    able: list[Candidate] = []
    refused: list[Refused] = []
    for found in every_candidate(environment):
        against = refusals(found, request, environment, settings)
        if against:
            refused.append(Refused(found, against))
        else:
            able.append(found)
    return able, refused


def refusals(
    found: Candidate, request: AttentionRequest, environment: Environment, settings: Settings
) -> tuple[Reason, ...]:
    """Every reason against one kernel; the library is asked only where no rule speaks against it."""
    backend, kernel = found.backend, found.kernel
    against: list[Reason] = []
    if not backend.built and not environment.simulated:
        against.append(Reason("NOT_BUILT", f"{backend.title} has no adapter in this release"))
    if source := settings.disabled_by(backend.name):
        against.append(Reason("DISABLED", f"turned off by {source}"))
    against += reasons(backend.all_rules, request, environment)
    against += kernel_reasons(backend, kernel, request, environment, settings)[0]
    if not against and not environment.simulated:
        against += kernel.answer(request, environment)
    return tuple(against)


def named(name: str, environment: Environment) -> list[Candidate]:
    """The kernels that a name means: a kernel's, a backend's or a family's.

    Raises:
        UnknownNameError: no backend, family or kernel of that name.
    """
    registry.check_name("backend", name, kernels=True)
    members = registry.expand((name,))
    return [c for c in every_candidate(environment) if c.name == name or c.backend.name in members]
