"""What the operators do when a graph runs: find the plan of this call, or of the forward that a backward belongs to."""

from __future__ import annotations

import sys
from ast import literal_eval
from collections.abc import Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from attnrt import halves, recompute, runtime
from attnrt.decision import Decision
from attnrt.errors import GradientError
from attnrt.halves import AMBIGUOUS, QKV, Halves
from attnrt.operands import NO_OPERANDS, Operands, signature, tf32_allowed
from attnrt.pins import LATE, Pin
from attnrt.repeats import noted
from attnrt.runtime import Plan
from attnrt.settings import (
    NO_CONTEXT,
    current_context,
    environ_items,
    inherited_context,
    own_context,
)
from attnrt.sharded import CONTEXT_PARALLEL, refuse_inside_context_parallel

if TYPE_CHECKING:
    from attnrt.policies.base import Policy

last: ContextVar[Decision | None] = ContextVar("attnrt_last_decision", default=None)
"""What the last call in this thread or task ran."""

AT_RUN_TIME, DYNAMIC = "at run time", "at run time: a size is dynamic"
"""Choices that a graph leaves to its runs. Otherwise a label, with the overrides it was made under after a bar; "" is
no graph at all."""
BAR = " | "
policies: dict[str, Policy] = {}
"""Policies that were handed to a traced call as objects, by the name they have in its graph."""
_modules = sys.modules
_seen = runtime.seen
_repeats = runtime.repeats
_graph_task = torch._C._current_graph_task_id
_deterministic_enabled = torch._C._get_deterministic_algorithms


class Options(NamedTuple):
    """The operators' arguments beside tensors, in their order: `attention`'s, then those of `operators._OPTIONS`."""

    layout: str
    causal: bool
    window_left: int | None
    window_right: int | None
    alignment: str | None
    softcap: float | None
    dropout_p: float
    scale: float | None
    max_seqlen_q: int | None
    max_seqlen_kv: int | None
    return_lse: bool
    deterministic: bool | None
    backend: str | None
    policy: str | None
    blocks: str
    choice: str
    grads: tuple[bool, ...]


_settled: dict[tuple[str, str], Options] = {}


def in_words(*options: Any) -> str:
    """The options up to `policy` as one constant of a graph, which another process reads too."""
    return repr(options)


def settled(call: str, choice: str) -> Options:
    """What `in_words` said, for inference."""
    found = _settled.get((call, choice))
    if found is None:
        found = Options._make((*literal_eval(call), "", choice, (False,) * 5))
        halves.remember(_settled, (call, choice), found)
    return found


_capturing: Any = vars(torch.cuda.graphs)["_cuda_isCurrentStreamCapturing"]
"""What torch.cuda.is_current_stream_capturing calls."""
_float32 = torch.float32


def device_facts(q: Tensor, k: Tensor, v: Tensor) -> tuple[Any, ...]:
    """Devices, pointer alignment, capture and TF32; all but the first matter to GPU kernels only."""
    aligned = (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15
    if q.is_cuda and k.is_cuda and v.is_cuda:  # numbers: devices take thrice as long to compare
        tf32 = q.dtype is _float32 and tf32_allowed()
        return q.get_device(), k.get_device(), v.get_device(), aligned, _capturing(), tf32
    return q.device, k.device, v.device, aligned, False, False


def forward(q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """Output, LSE and state, laid out as the fake implementation says."""
    trains = True in options.grads
    result = _attend(q, k, v, operands, options, trains)
    if trains:
        out, lse, state = result
    else:
        out, lse = result if options.return_lse else (result, q.new_empty((0,), dtype=torch.float32))
        state = q.new_empty((0,), dtype=torch.int64)
    lse = lse.double() if q.dtype is torch.float64 else lse
    return _token_major(out, options.layout), lse.contiguous(), state


def inference(q: Tensor, k: Tensor, v: Tensor, operands: Operands, call: str, choice: str) -> Tensor:
    """The output alone, for options that ask for no more: `call` is what `in_words` said.

    `_attend`, written out: amid a model's other work each line is out of the processor's caches, and costs ten times
    what it does in a loop.
    """
    if CONTEXT_PARALLEL in _modules:
        refuse_inside_context_parallel()
    repeat = _repeats.get((call, choice))
    if (  # as in attnrt.api, where the gradients' mode counts too
        repeat is not None
        and (repeat.same(q, k, v) if operands is NO_OPERANDS else repeat.same_with(q, k, v, operands))
        and (
            repeat.aligned is None
            or (
                (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == repeat.aligned and _capturing() is repeat.capturing
            )
        )
        and own_context() is repeat.context
        and _graph_task() == -1
        and _deterministic_enabled() is repeat.deterministic
        and next(reversed(_seen.all), None) is _seen.newest
        and (_seen.quiet or _seen.present <= environ_items)
    ):
        made = repeat.made
        if last.get() is not made.decision:
            last.set(made.decision)
        try:
            out = made.run(q, k, v, operands)
        except Exception as error:
            failed = runtime.demote(error, made.decision)
            out = _first(None, None, failed, q, k, v, operands, settled(call, choice), False)
        return _token_major(out, made.layout)
    parts = None
    if operands is not NO_OPERANDS:
        options = settled(call, choice)
        parts = signature(operands, options.layout, q, k, (options.max_seqlen_q, options.max_seqlen_kv))
    context = own_context()
    if context is NO_CONTEXT and _graph_task() != -1:
        context = inherited_context()
    key = (
        call,
        choice,
        q.shape,
        k.shape,
        v.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        parts,
        q.is_cpu or device_facts(q, k, v),
        _deterministic_enabled(),
        context,
    )
    found = runtime.plans.get(key) if runtime.variables_are_known() else None
    if found is None or found.watched:
        options = settled(call, choice)
        out = _first(key, found, {}, q, k, v, operands, options, False)
        return _token_major(out, options.layout)
    made = found
    options = settled(call, choice)
    longest = options.max_seqlen_q, options.max_seqlen_kv
    if (new := noted(repeat, made, q, k, v, operands, longest, context)) is not None:
        runtime.repeated((call, choice), new, key)
    last.set(made.decision)
    try:
        out = made.run(q, k, v, operands)
    except Exception as error:
        out = _first(key, None, runtime.demote(error, made.decision), q, k, v, operands, settled(call, choice), False)
    return _token_major(out, made.layout)


def _attend(q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: Options, trains: bool) -> Any:
    """What the plan of this call gives. Every line here costs each call of a compiled model."""
    if CONTEXT_PARALLEL in _modules:
        refuse_inside_context_parallel()
    parts = None
    if operands is not NO_OPERANDS:
        parts = signature(operands, options.layout, q, k, (options.max_seqlen_q, options.max_seqlen_kv))
    key = (
        options,
        q.shape,
        k.shape,
        v.shape,
        q.stride(),
        k.stride(),
        v.stride(),
        q.dtype,
        k.dtype,
        v.dtype,
        parts,
        q.is_cpu or device_facts(q, k, v),
        _deterministic_enabled(),
        current_context(),
    )
    made = runtime.plans.get(key) if runtime.variables_are_known() else None
    if made is None or made.watched:
        return _first(key, made, {}, q, k, v, operands, options, trains)
    last.set(made.decision)
    try:
        return _trained(made, (q, k, v), operands, options) if trains else made.run(q, k, v, operands)
    except Exception as error:
        failed = runtime.demote(error, made.decision)
        return _first(key, None, failed, q, k, v, operands, options, trains)


def _first(
    key: Any,
    made: Plan | None,
    failed: runtime.Failed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    options: Options,
    trains: bool,
) -> Any:
    """A call whose plan is not known yet, or is watched. Goes on to the next candidate as long as the policy does."""
    named, qkv = named_options(options), (q, k, v)
    while True:
        if made is None:
            with recompute.autograd(record=False):  # a policy may measure
                made = runtime.plan(key, q, k, v, operands, named, failed)
        last.set(made.decision)
        try:
            if made.watched:
                made = _examined(made, qkv, operands, named, failed)
                last.set(made.decision)
            return _trained(made, qkv, operands, options) if trains else made.run(q, k, v, operands)
        except Exception as error:
            failed = {**failed, **runtime.demote(error, made.decision)}
            made = None


def backward(
    grad: Tensor,
    qkv: QKV,
    operands: Operands,
    saved: Sequence[Tensor],
    options: Options,
    wanted: Sequence[bool],
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, bias and sinks, strided as torch.empty_like makes them; empty where not wanted."""
    q, k, v = qkv
    out, lse, state = saved
    facts, strides = _facts(qkv, operands, options), _strides(qkv, operands)
    kernel = halves.ran.get(facts, AMBIGUOUS)
    if kernel == AMBIGUOUS and state.is_cuda and torch.cuda.is_current_stream_capturing():
        kernel = halves.captured.get(state.data_ptr(), AMBIGUOUS)
        if kernel == AMBIGUOUS:
            raise GradientError("which kernel ran this forward is not known in capture; call attnrt.refresh() before")
    elif kernel == AMBIGUOUS:
        kernel = int(state[0])  # on a GPU this waits for the forward
    held = halves.known.get((kernel, facts, strides))
    if held is None:
        held = halves.rebuilt(kernel, qkv, operands, named_options(options), options.dropout_p > 0)
        halves.remember(halves.known, (kernel, facts, strides), held)
    if not held.strides:
        leaves = (q, k, v, operands.bias, operands.sinks)
        held.strides.append([None if t is None else torch.empty_like(t, device="meta").stride() for t in leaves])
    if grad.stride(-1) != 1 and grad.shape[-1] != 1:  # such as the expanded ones that sum() sends
        grad = grad.contiguous()
    extra = recompute.unpack(state, held.specs[0]) if held.specs[0] else ()
    with recompute.autograd(record=False):  # a backward may have a small graph of its own
        found = held.backward(grad, q, k, v, out, lse, extra, operands, wanted)
    return tuple(
        [
            _strided(g, stride) if wants and g is not None else grad.new_empty((0,))
            for g, stride, wants in zip(found, held.strides[0], wanted, strict=True)
        ]
    )


def _trained(made: Plan, qkv: QKV, operands: Operands, options: Options) -> tuple[Tensor, Tensor, Tensor]:
    """With what a backward needs, which is noted for it the first time."""
    request = made.decision.request
    if made.halves is None:
        made.halves = halves.of(made)
    while True:
        held: Halves = made.halves
        out, lse, extra = held.forward(*qkv, operands)
        state = recompute.pack(held.kernel, extra, qkv[0].device)
        if state is not None:
            break
        made.halves = halves.paired(made, lambda: recompute.recomputed(made.run, request))
    if not held.specs:
        halves.note(held, extra, request.dropout_p > 0, _facts(qkv, operands, options), _strides(qkv, operands))
    if request.capturing:
        halves.remember(halves.captured, state.data_ptr(), held.kernel)
    return out, lse, state


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


def _facts(qkv: QKV, operands: Operands, options: Options) -> tuple[Any, ...]:
    """Shapes, dtypes and options: the same in a forward and in its backward, unless TF32 was switched between them."""
    q, k, v = qkv
    given = None
    if operands is not NO_OPERANDS:
        given = tuple([None if t is None else (t.shape, t.dtype) for t in operands])
    tf32 = q.is_cuda and q.dtype is torch.float32 and tf32_allowed()
    return q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype, given, options, tf32


def _strides(qkv: QKV, operands: Operands) -> tuple[Any, ...]:
    """Of everything that may get a gradient."""
    q, k, v = qkv
    if operands is NO_OPERANDS:
        return q.stride(), k.stride(), v.stride()
    added = [None if t is None else t.stride() for t in (operands.bias, operands.sinks)]
    return q.stride(), k.stride(), v.stride(), *added


def named_options(options: Options) -> dict[str, Any]:
    """As `runtime.plan` takes them."""
    o, choice = options, options.choice
    label, _, overrides = choice.partition(BAR)
    return {
        "layout": o.layout,
        "causal": o.causal,
        "window": None if o.window_left is None and o.window_right is None else (o.window_left, o.window_right),
        "alignment": o.alignment,
        "softcap": o.softcap,
        "dropout_p": o.dropout_p,
        "scale": o.scale,
        "max_seqlen_q": o.max_seqlen_q,
        "max_seqlen_kv": o.max_seqlen_kv,
        "return_lse": o.return_lse,
        "deterministic": o.deterministic,
        "backend": o.backend,
        "policy": policies.get(o.policy or "", o.policy),
        "grads": o.grads,
        "compiled": choice != "",
        "dynamic": choice == DYNAMIC,
        "pin": LATE if choice in (AT_RUN_TIME, DYNAMIC) else Pin(label, overrides) if choice else None,
    }


def _token_major(out: Tensor, layout: str) -> Tensor:
    """The heads of one token side by side, as most kernels leave them; the others cost a copy."""
    if layout != "bhsd":
        return out.contiguous()
    _, heads, length, dim = out.shape
    if out.stride() == (length * heads * dim, dim, heads * dim, 1):
        return out
    tokens = out.transpose(1, 2)
    return out if tokens.is_contiguous() else tokens.contiguous().transpose(1, 2)


def _strided(x: Tensor, stride: Any) -> Tensor:
    return x if x.stride() == stride else torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
