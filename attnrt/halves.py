"""A kernel's forward and backward as two calls, and which ran: an operator's backward comes later and elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from attnrt import recompute, registry, runtime
from attnrt.environment import Environment
from attnrt.operands import Operands, bind
from attnrt.runtime import Plan

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward

QKV = tuple[Tensor, Tensor, Tensor]


class Halves(NamedTuple):
    """One kernel's forward and backward for one request."""

    kernel: int
    """In `_kernels`."""
    forward: Forward
    backward: Backward
    specs: list[tuple[recompute.Spec, ...]]
    """Of the forward's `extra` tensors, once it has run."""
    strides: list[Any]
    """That gradients must have, once asked for."""


_kernels: list[tuple[str, str]] = []
"""(backend, kernel) by the number that a forward leaves in its state."""
AMBIGUOUS = -1
ran: dict[Any, int] = {}
"""Which kernel ran the calls of these shapes and options; AMBIGUOUS if not always the same did."""
runtime.on_refresh.append(ran.clear)
captured: dict[int, int] = {}
"""... in CUDA-graph capture, by the address of the state, which cannot be read then."""
known: dict[Any, Halves] = {}
"""By kernel, shapes, options and strides."""
_specs: dict[tuple[int, bool], tuple[recompute.Spec, ...]] = {}
"""What a kernel's forward leaves besides output and LSE, with and without dropout."""


def of(made: Plan) -> Halves:
    """The kernel's own pair, or one that recomputes."""
    request = made.decision.request
    try:
        return paired(made, lambda: made.kernel.pair(request, made.decision.environment))
    except NotImplementedError:
        return paired(made, lambda: recompute.recomputed(made.run, request))


def paired(made: Plan, pair: Callable[[], tuple[Forward, Backward]]) -> Halves:
    """What `pair` gives, under the number of the plan's kernel."""
    decision = made.decision
    assert decision.backend is not None
    name = (decision.backend, made.kernel.name)
    forward, backward = pair()
    if name not in _kernels:
        _kernels.append(name)
    return Halves(_kernels.index(name), forward, backward, [], [])


def note(held: Halves, extra: tuple[Tensor, ...], dropout: bool, facts: Any, strides: Any) -> None:
    """What a later backward of these shapes goes by."""
    held.specs.append(recompute.specs(extra))
    _specs[held.kernel, dropout] = held.specs[0]
    before = ran.get(facts, held.kernel)
    remember(ran, facts, held.kernel if before == held.kernel else AMBIGUOUS)
    remember(known, (held.kernel, facts, strides), held)


def rebuilt(kernel: int, qkv: QKV, operands: Operands, named: dict[str, Any], dropout: bool) -> Halves:
    """For tensors that come back with other strides than they left with, or after the forward was forgotten."""
    backend_name, kernel_name = _kernels[kernel]
    backend = registry.backends()[backend_name]
    chosen = next((n for n in backend.kernels if n.name == kernel_name), backend)
    named = dict(named)
    settings = runtime.settings(named.pop("backend"), named.pop("policy"))
    named.pop("pin")
    settings, named["deterministic"] = runtime.determinism(settings, named["deterministic"])
    request = runtime.allowed(bind(*qkv, operands, **named), settings)
    environment = Environment.detect(qkv[0].device)
    try:
        forward, backward = chosen.pair(request, environment)
    except NotImplementedError:
        forward, backward = recompute.recomputed(chosen.prepare(request, environment), request)
    return Halves(kernel, forward, backward, [_specs[kernel, dropout]], [])


def remember(table: dict[Any, Any], key: Any, value: Any) -> None:
    """Keep it in a table that never grows past `runtime.MAX_PLANS`."""
    if len(table) >= runtime.MAX_PLANS and key not in table:
        table.clear()
    table[key] = value
