"""What the operators do when a graph runs: find the plan of this call, or of the forward that a backward belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnrt import recompute, registry, runtime
from attnrt.decision import Decision
from attnrt.environment import Environment
from attnrt.errors import GradientError
from attnrt.operands import NO_OPERANDS, Operands, bind, signature, tf32_allowed
from attnrt.pins import LATE, Pin
from attnrt.runtime import Plan
from attnrt.settings import current_context
from attnrt.sharded import refuse_inside_context_parallel

if TYPE_CHECKING:
    from attnrt.backends.base import Backward, Forward
    from attnrt.policies.base import Policy

last: ContextVar[Decision | None] = ContextVar("attnrt_last_decision", default=None)
"""What the last call in this thread or task ran."""

AT_RUN_TIME, DYNAMIC = "at run time", "at run time: a size is dynamic"
"""Choices that a graph leaves to its runs. Otherwise a label, with the overrides it was made under after a bar; "" is
no graph at all."""
BAR = " | "
policies: dict[str, Policy] = {}
"""Policies that were handed to a traced call as objects, by the name they have in its graph."""


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
_ran: dict[Any, int] = {}
"""Which kernel ran the calls of these shapes and options; AMBIGUOUS if not always the same did."""
runtime.on_refresh.append(_ran.clear)
_captured: dict[int, int] = {}
"""... in CUDA-graph capture, by the address of the state, which cannot be read then."""
_halves: dict[Any, Halves] = {}
_specs: dict[tuple[int, bool], tuple[recompute.Spec, ...]] = {}
"""What a kernel's forward leaves besides output and LSE, with and without dropout."""
AMBIGUOUS = -1


_capturing = torch.cuda.is_current_stream_capturing
_float32 = torch.float32


def device_facts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Devices, pointer alignment, capture and TF32; all but the first matter to GPU kernels only."""
    aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
    if q.is_cuda and k.is_cuda and v.is_cuda:  # numbers: devices take thrice as long to compare
        tf32 = q.dtype is _float32 and tf32_allowed()
        return q.get_device(), k.get_device(), v.get_device(), aligned, _capturing(), tf32
    return q.device, k.device, v.device, aligned, False, False


def forward(qkv: QKV, given: tuple[Tensor | None, ...], options: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and state, laid out as the fake implementation says."""
    refuse_inside_context_parallel()
    q, k, v = qkv
    grads = tuple(options[-1])
    operands, parts = NO_OPERANDS, None
    if any(t is not None for t in given):
        operands = Operands(*given)
        parts = signature(operands, options[0], q, k, (options[8], options[9]))
    strides = q.stride(), k.stride(), v.stride()
    shapes = q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype
    where = q.is_cpu or device_facts(q, k, v)
    deterministic = torch.are_deterministic_algorithms_enabled()
    key = ("operator", shapes, strides, options[:-1], grads, parts, where, deterministic, current_context())
    made = runtime.plans.get(key) if runtime.variables_are_known() else None
    failed: runtime.Failed = {}
    while True:
        if made is None:
            with recompute.autograd(record=False):  # a policy may measure
                made = runtime.plan(key, q, k, v, operands, _named(options), failed)
        last.set(made.decision)
        try:
            if made.watched:
                made = _examined(made, qkv, operands, _named(options), failed)
                last.set(made.decision)
            out, lse, state = _trained(made, qkv, operands, options) if any(grads) else _run(made, qkv, operands)
            break
        except Exception as error:
            failed = {**failed, **runtime.demote(error, made.decision)}
            made = None
    lse = lse.double() if q.dtype is torch.float64 else lse
    return _token_major(out, options[0]), lse.contiguous(), state


def backward(
    grad: Tensor,
    qkv: QKV,
    operands: Operands,
    saved: Sequence[Tensor],
    options: Sequence[Any],
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, bias and sinks, strided as torch.empty_like makes them; empty where not wanted."""
    q, k, v = qkv
    out, lse, state = saved
    facts, strides = _facts(qkv, operands, options), _strides(qkv, operands)
    kernel = _ran.get(facts, AMBIGUOUS)
    if kernel == AMBIGUOUS and state.is_cuda and torch.cuda.is_current_stream_capturing():
        kernel = _captured.get(state.data_ptr(), AMBIGUOUS)
        if kernel == AMBIGUOUS:
            raise GradientError("which kernel ran this forward is not known in capture; call attnrt.refresh() before")
    elif kernel == AMBIGUOUS:
        kernel = int(state[0])  # on a GPU this waits for the forward
    halves = _halves.get((kernel, facts, strides))
    if halves is None:
        halves = _rebuilt(kernel, qkv, operands, options)
        halves.specs.append(_specs[kernel, bool(options[6])])
        _remember(_halves, (kernel, facts, strides), halves)
    if not halves.strides:
        leaves = (q, k, v, operands.bias, operands.sinks)
        halves.strides.append([None if t is None else torch.empty_like(t, device="meta").stride() for t in leaves])
    if grad.stride(-1) != 1 and grad.shape[-1] != 1:  # such as the expanded ones that sum() sends
        grad = grad.contiguous()
    extra = recompute.unpack(state, halves.specs[0])
    with recompute.autograd(record=False):  # a backward may have a small graph of its own
        found = halves.backward(grad, q, k, v, out, lse, extra, operands, wanted)
    return tuple(
        _strided(g, stride) if wants and g is not None else grad.new_empty((0,))
        for g, stride, wants in zip(found, halves.strides[0], wanted, strict=True)
    )


def _run(made: Plan, qkv: QKV, operands: Operands) -> tuple[Tensor, Tensor, Tensor]:
    """Without gradients."""
    q, request = qkv[0], made.decision.request
    result = made.run(*qkv, operands)
    out, lse = result if request.needs_lse else (result, q.new_empty((0,), dtype=torch.float32))
    return out, lse, q.new_empty((0,), dtype=torch.int64)


def _trained(made: Plan, qkv: QKV, operands: Operands, options: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """With what a backward needs, which is noted for it the first time."""
    request = made.decision.request
    if made.halves is None:
        made.halves = _of(made)
    while True:
        halves: Halves = made.halves
        out, lse, extra = halves.forward(*qkv, operands)
        state = recompute.pack(halves.kernel, extra, qkv[0].device)
        if state is not None:
            break
        made.halves = _paired(made, lambda: recompute.recomputed(made.run, request))
    if not halves.specs:
        halves.specs.append(recompute.specs(extra))
        _specs[halves.kernel, request.dropout_p > 0] = halves.specs[0]
        _note(halves, _facts(qkv, operands, options), _strides(qkv, operands))
    if request.capturing:
        _remember(_captured, state.data_ptr(), halves.kernel)
    return out, lse, state


def _of(made: Plan) -> Halves:
    """The kernel's own pair, or one that recomputes."""
    request = made.decision.request
    try:
        return _paired(made, lambda: made.kernel.pair(request, made.decision.environment))
    except NotImplementedError:
        return _paired(made, lambda: recompute.recomputed(made.run, request))


def _paired(made: Plan, pair: Callable[[], tuple[Forward, Backward]]) -> Halves:
    decision = made.decision
    assert decision.backend is not None
    name = (decision.backend, made.kernel.name)
    forward, backward = pair()
    if name not in _kernels:
        _kernels.append(name)
    return Halves(_kernels.index(name), forward, backward, [], [])


def _note(halves: Halves, facts: Any, strides: Any) -> None:
    """What a later backward of these shapes goes by."""
    before = _ran.get(facts, halves.kernel)
    _remember(_ran, facts, halves.kernel if before == halves.kernel else AMBIGUOUS)
    _remember(_halves, (halves.kernel, facts, strides), halves)


def _rebuilt(kernel: int, qkv: QKV, operands: Operands, options: Sequence[Any]) -> Halves:
    """For tensors that come back with other strides than they left with, or after the forward was forgotten."""
    backend_name, kernel_name = _kernels[kernel]
    backend = registry.backends()[backend_name]
    chosen = next((n for n in backend.kernels if n.name == kernel_name), backend)
    named = _named(options)
    backend_argument, policy = named.pop("backend"), named.pop("policy")
    named.pop("pin")
    settings = runtime.settings(backend_argument, policy)
    named["deterministic"] = runtime.wants_determinism(named["deterministic"], settings)
    request = runtime.allowed(bind(*qkv, operands, **named), settings)
    environment = Environment.detect(qkv[0].device)
    try:
        forward, backward = chosen.pair(request, environment)
    except NotImplementedError:
        forward, backward = recompute.recomputed(chosen.prepare(request, environment), request)
    return Halves(kernel, forward, backward, [], [])


def _examined(made: Plan, qkv: QKV, operands: Operands, named: dict[str, Any], failed: runtime.Failed) -> Plan:
    """`runtime.examine`, with tensors that want the gradients the graph wants."""
    grads = named["grads"]
    q, k, v = (t.detach().requires_grad_(g) for t, g in zip(qkv, grads, strict=False))
    bias, sinks = operands.bias, operands.sinks
    operands = operands._replace(
        bias=bias if bias is None else bias.detach().requires_grad_(grads[3]),
        sinks=sinks if sinks is None else sinks.detach().requires_grad_(grads[4]),
    )
    with recompute.autograd():
        return runtime.examine(made, q, k, v, operands, named, failed)


def _facts(qkv: QKV, operands: Operands, options: Sequence[Any]) -> tuple[Any, ...]:
    """Shapes, dtypes and options: the same in a forward and in its backward, unless TF32 was switched between them."""
    shapes = tuple((t.shape, t.dtype) for t in qkv)
    q = qkv[0]
    tf32 = q.is_cuda and q.dtype is torch.float32 and tf32_allowed()
    given = tuple(None if t is None else (t.shape, t.dtype) for t in operands)
    return (*shapes, given, *options[:-1], tuple(options[-1]), tf32)


def _strides(qkv: QKV, operands: Operands) -> tuple[Any, ...]:
    """Of everything that may get a gradient."""
    return tuple(None if t is None else t.stride() for t in (*qkv, operands.bias, operands.sinks))


def _named(options: Sequence[Any]) -> dict[str, Any]:
    """The operators' options as `runtime.plan` takes them."""
    layout, causal, left, right, alignment, softcap, dropout_p, scale, longest_q, longest_kv = options[:10]
    return_lse, deterministic, backend, policy, _, choice, grads = options[10:]
    label, _, overrides = choice.partition(BAR)
    return {
        "layout": layout,
        "causal": causal,
        "window": None if left is None and right is None else (left, right),
        "alignment": alignment,
        "softcap": softcap,
        "dropout_p": dropout_p,
        "scale": scale,
        "max_seqlen_q": longest_q,
        "max_seqlen_kv": longest_kv,
        "return_lse": return_lse,
        "deterministic": deterministic,
        "backend": backend,
        "policy": policies.get(policy or "", policy),
        "grads": tuple(grads),
        "compiled": choice != "",
        "dynamic": choice == DYNAMIC,
        "pin": LATE if choice in (AT_RUN_TIME, DYNAMIC) else Pin(label, overrides) if choice else None,
    }


def _token_major(out: Tensor, layout: str) -> Tensor:
    """The heads of one token side by side, as most kernels leave them; the others cost a copy."""
    return out.transpose(1, 2).contiguous().transpose(1, 2) if layout == "bhsd" else out.contiguous()


def _strided(x: Tensor, stride: Any) -> Tensor:
    return x if x.stride() == stride else torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


def _remember(table: dict[Any, Any], key: Any, value: Any) -> None:
    if len(table) >= runtime.MAX_PLANS and key not in table:
        table.clear()
    table[key] = value
