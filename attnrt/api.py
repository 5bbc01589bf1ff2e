"""The public calls. The path of a call whose choice is known is `attention` alone: build a key, look it up, run."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal, overload

import torch
from torch import Tensor

from attnrt import execution, runtime, tracing
from attnrt.decision import Decision
from attnrt.environment import NAMED, Environment
from attnrt.errors import ArgumentTypeError
from attnrt.execution import device_facts
from attnrt.operands import NO_OPERANDS, Operands, signature, tf32_allowed
from attnrt.repeats import Repeat, noted
from attnrt.request import AttentionRequest
from attnrt.settings import (
    NO_CONTEXT,
    PolicySpec,
    environ_items,
    inherited_context,
    own_context,
)
from attnrt.sharded import CONTEXT_PARALLEL, outside_context_parallel, sharded

_get_last, _set_last = execution.last.get, execution.last.set
_capturing: Any = vars(torch.cuda.graphs)["_cuda_isCurrentStreamCapturing"]
"""What torch.cuda.is_current_stream_capturing calls."""
_float32 = torch.float32
_context = own_context
_graph_task = torch._C._current_graph_task_id
_plans = runtime.plans
_repeats = runtime.repeats
_seen = runtime.seen
_grad_enabled = torch.is_grad_enabled
_autocast_enabled = torch.is_autocast_enabled
_any_autocast = torch._C._is_any_autocast_enabled  # half the price of asking for one device
_dynamo = torch.compiler.is_dynamo_compiling
_transform = torch._C._functorch.peek_interpreter_stack
_deterministic_enabled = torch._C._get_deterministic_algorithms
_modules = sys.modules
_of_tuple: Any = tuple.__new__
BY_NAME: Any = object()
"""In the place of a fourth positional argument. Python looks up a default after a bare * in a dictionary, and a call of
`attention`, which has 22 of them, took a fifteenth longer for it."""


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Any) -> Tensor: ...
@overload
def attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    _: Any = BY_NAME,
    layout: str = "bhsd",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_kv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    page_table: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    policy: PolicySpec = None,
) -> Any:
    """softmax(scale * q k^T) v by the best kernel that is really able to do the job on q's device.

    Args:
        q: (B, Hq, Sq, Dqk) for layout "bhsd". k: (B, Hkv, Skv, Dqk). v: (B, Hkv, Skv, Dv). One floating dtype, one
            device. Hq is a multiple of Hkv; query head i reads KV head i // (Hq / Hkv).
        layout: "bhsd" (as torch SDPA), "bshd" (as flash-attn), "sbhd" (as Megatron), or "thd": (tokens, heads, dim)
            with sequences packed one after the other and `cu_seqlens_q`, `cu_seqlens_kv`.
        causal: query at position p sees keys up to p.
        window: (left, right), inclusive: it sees p - left .. p + right. None: unbounded on that side.
        alignment: where query i stands: "top_left" at key i (PyTorch, ONNX), "bottom_right" at key i + Skv - Sq
            (flash-attn), with each sequence's own lengths. Needed where they differ and causal, window or
            alibi_slopes is used.
        mask: bool, True = attend, broadcastable to (B, Hq, Sq, Skv); for "thd" (B, Hq, longest q, longest kv).
        bias: added to the scaled scores, same broadcasting, q's dtype or float32, differentiable. Hide keys with -inf:
            where a whole row is a large finite number such as -1e9, a fused kernel's log-sum-exp has no digits left for
            the sum, and the row's gradients are wrong, as they are in PyTorch's own.
        alibi_slopes: (Hq,) or (B, Hq) float32: -slope * |p - key| is added to the scaled scores, after softcap.
        softcap: s becomes softcap * tanh(s / softcap), before bias and mask.
        sinks: (Hq,), differentiable: logits that take part in the softmax denominator only.
        dropout_p: probability in [0, 1) of dropping an attention weight. Applied whenever it is not 0.
        scale: default 1 / sqrt(Dqk).
        seqlens_q, seqlens_kv: (B,) int32: how much of a padded batch is real. The rest is never read.
        cu_seqlens_q, cu_seqlens_kv: (B + 1,) int32 offsets for "thd"; tokens after the last belong to no sequence.
        max_seqlen_q, max_seqlen_kv: longest sequence for "thd"; None reads it, which on a GPU synchronises.
        page_table: (B, pages) int32: k and v are pools of pages, (num_pages, page_size, Hkv, D) in "bshd" or
            (num_pages, Hkv, page_size, D) in "bhsd", and key j of sequence b lies in page page_table[b, j // page_size]
            at j % page_size. Needs seqlens_kv; entries past a sequence's length are never read; no gradients.
        return_lse: also return the natural log-sum-exp of the scaled, masked scores, without the sinks:
            (B, Hq, Sq) float32, "thd": (Hq, T). It carries no gradient.
        deterministic: the backward gives the same bits each time. None: torch.are_deterministic_algorithms_enabled().
        backend: force one by name: it runs, or the call raises.
        policy: a name under configs/policies, the path of a YAML file, or a Policy.

    Returns:
        The output in q's layout and dtype with head dim Dv; with `return_lse` the pair (output, lse). A query with
        nothing to attend to gives zeros, an LSE of -inf and zero gradients. Under autocast q, k and v are first cast
        to its dtype, as torch's SDPA does.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be right; the message says which, its value and what is.
        BackendUnavailable: no backend, or not the forced one, can serve the call; `.report` has every reason.
        BackendFailed: the kernel raised, and the policy does not go on to the next.
        VariableError, PolicyError: an environment variable or a policy file is wrong.

    Inside torch.compile and torch.export the call is one operator of the graph, chosen for when the graph is traced,
    or, where a size is dynamic, once for each size when it runs. torch.func.vmap raises ArgumentError.
    """
    if _ is not BY_NAME:
        raise TypeError("attention() takes 3 positional arguments, q, k and v; everything else goes by name")
    if _dynamo():
        given = (mask, bias, alibi_slopes, sinks, seqlens_q, seqlens_kv, cu_seqlens_q, cu_seqlens_kv, page_table)
        numbers = (layout, causal, window, alignment, softcap, dropout_p, scale, max_seqlen_q, max_seqlen_kv)
        return tracing.attention(q, k, v, Operands(*given), *numbers, return_lse, deterministic, backend, policy)
    if (
        mask is bias is alibi_slopes is sinks is None
        and seqlens_q is seqlens_kv is cu_seqlens_q is cu_seqlens_kv is page_table is None
    ):
        operands = NO_OPERANDS
    else:
        # As Operands(...), in half the time.
        operands = _of_tuple(
            Operands,
            (mask, bias, alibi_slopes, sinks, seqlens_q, seqlens_kv, cu_seqlens_q, cu_seqlens_kv, page_table),
        )
    if window is not None and window.__class__ is not tuple and isinstance(window, list):
        window = tuple(window)  # type: ignore[unreachable]  # a list cannot be a key
    options = (
        layout,
        causal,
        window,
        alignment,
        softcap,
        dropout_p,
        scale,
        max_seqlen_q,
        max_seqlen_kv,
        return_lse,
        deterministic,
        backend,
        policy,
    )
    # 1 equals True as a key, but is not a flag: only the right types may find what was remembered.
    typed = (
        (causal is False or causal is True)
        and (return_lse is False or return_lse is True)
        and (scale is None or scale.__class__ is float or not isinstance(scale, bool))
        and (
            (window is None and softcap is None and deterministic is None and dropout_p.__class__ is float)
            or _right_types(deterministic, window, softcap, dropout_p)
        )
    )
    repeat: Repeat | None = None
    try:
        repeat = _repeats.get(options)
        known = (
            repeat is not None
            and typed
            and (repeat.same(q, k, v) if operands is NO_OPERANDS else repeat.same_with(q, k, v, operands))
            and (
                repeat.aligned is None
                or (
                    (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15 == repeat.aligned
                    and _capturing() is repeat.capturing
                )
            )
            and _context() is repeat.context
            and _graph_task() == -1
            and _grad_enabled() is repeat.grad
            and _deterministic_enabled() is repeat.deterministic
            and next(reversed(_seen.all), None) is _seen.newest
            and (_seen.quiet or _seen.present <= environ_items)
            and (CONTEXT_PARALLEL not in _modules or outside_context_parallel())
        )
    except (AttributeError, TypeError, KeyError):
        # Not tensors, or not hashable: the checks further on say what is wrong.
        known = False
    if not known:
        return _attend(q, k, v, operands, options, typed, repeat)
    made = repeat.made  # type: ignore[union-attr]
    if _get_last() is not made.decision:
        _set_last(made.decision)
    try:
        return made.run(q, k, v, operands)
    except Exception as error:
        return _first(None, None, runtime.demote(error, made.decision), q, k, v, operands, options)


def _by_name_alone(function: Any) -> inspect.Signature:
    """As if everything after q, k and v stood behind a bare *."""
    q, k, v, _, *rest = inspect.signature(function).parameters.values()
    return inspect.Signature([q, k, v, *(p.replace(kind=p.KEYWORD_ONLY) for p in rest)])


attention.__signature__ = _by_name_alone(attention)  # type: ignore[attr-defined]

_OPTIONS = (
    "layout",
    "causal",
    "window",
    "alignment",
    "softcap",
    "dropout_p",
    "scale",
    "max_seqlen_q",
    "max_seqlen_kv",
    "return_lse",
    "deterministic",
    "backend",
    "policy",
)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: tuple[Any, ...], typed: bool, repeat: Repeat | None
) -> Any:
    """A call unlike the last one with its options: its plan is looked up by all that it depends on."""
    plain = type(q) is type(k) is type(v) is Tensor
    if (not plain or _transform() is not None) and tracing.needed(q, k, v, *operands):
        return tracing.attention(q, k, v, operands, *options)
    if (not plain or CONTEXT_PARALLEL in _modules) and sharded(q, k, v):
        return _of_dtensors(q, k, v, operands, options)
    key: Any = None
    try:
        dtype = q.dtype
        if q.is_cuda and k.is_cuda and v.is_cuda:
            if _seen.several_gpus is None:  # known for good, now that CUDA is in use
                _seen.several_gpus = torch.cuda.device_count() > 1
            # As execution.device_facts, which would be one more call; so are the other checks here that are in line.
            where: Any = (
                (q.get_device(), k.get_device(), v.get_device()) if _seen.several_gpus else "the only GPU",
                (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15,
                _capturing(),
                dtype is _float32 and tf32_allowed(),
            )
        else:
            where = (q.is_cpu and k.is_cpu and v.is_cpu) or device_facts(q, k, v)
        autocast = _any_autocast() and _autocast_on(q.device.type)
        parts, longest = None, options[_LONGEST]
        if operands is not NO_OPERANDS:
            parts = signature(operands, options[0], q, k, longest)
        # As settings.current_context.
        context = _context()
        if context is NO_CONTEXT and _graph_task() != -1:
            context = inherited_context()
        key = (
            q.shape,
            k.shape,
            v.shape,
            q.is_contiguous() or q.stride(),
            k.is_contiguous() or k.stride(),
            v.is_contiguous() or v.stride(),
            dtype,
            k.dtype,
            v.dtype,
            where,
            _grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad),
            options,
            parts,
            _deterministic_enabled(),
            context,
        )
        if not typed:
            key = None
        made = _plans.get(key) if runtime.variables_are_known() and not autocast else None
    except (AttributeError, TypeError, KeyError):
        key, made, autocast = None, None, False
    if autocast:
        return _autocast(q, k, v, operands, options)
    if made is None or made.watched:
        return _first(key, made, {}, q, k, v, operands, options)
    if plain and (new := noted(repeat, made, q, k, v, operands, longest, context)) is not None:
        runtime.repeated(options, new, key)
    _set_last(made.decision)
    try:
        return made.run(q, k, v, operands)
    except Exception as error:
        return _first(key, None, runtime.demote(error, made.decision), q, k, v, operands, options)


_LONGEST = slice(_OPTIONS.index("max_seqlen_q"), _OPTIONS.index("max_seqlen_kv") + 1)


def _first(
    key: Any,
    made: runtime.Plan | None,
    failed: runtime.Failed,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    options: tuple[Any, ...],
) -> Any:
    """A call whose plan is not known yet, or is watched. Goes on to the next candidate as long as the policy does."""
    tensors, named = (q, k, v, operands), dict(zip(_OPTIONS, options, strict=True))
    while True:
        if made is None:
            made = runtime.plan(key, *tensors, named, failed)
        _set_last(made.decision)
        try:
            if made.watched:
                made = runtime.examine(made, *tensors, named, failed)
                _set_last(made.decision)
            return made.run(*tensors)
        except Exception as error:
            failed = {**failed, **runtime.demote(error, made.decision)}
            made = None


def _of_dtensors(q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: tuple[Any, ...]) -> Any:
    from attnrt.distributed import dtensor

    return dtensor.attend(q, k, v, operands, dict(zip(_OPTIONS, options, strict=True)))


def _right_types(flag: Any, window: Any, softcap: Any, dropout_p: Any) -> bool:
    if window is not None and (type(window) is not tuple or any(n is not None and type(n) is not int for n in window)):
        return False  # 1.0 equals 1 as a key too
    return (flag is None or isinstance(flag, bool)) and not (isinstance(softcap, bool) or isinstance(dropout_p, bool))


def _autocast_on(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and _autocast_enabled(kind)


def _autocast(q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: tuple[Any, ...]) -> Any:
    """Cast q, k and v to autocast's dtype (float64 stays), as torch's SDPA does, and run with autocast off."""
    kind = q.device.type
    dtype = torch.get_autocast_dtype(kind)
    tensors: Any = (t if t.dtype is torch.float64 else t.to(dtype) for t in (q, k, v))
    with torch.autocast(kind, enabled=False):
        named: dict[str, Any] = {**dict(zip(_OPTIONS, options, strict=True)), **operands._asdict()}
        return attention(*tensors, **named)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: str = "bhsd",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_kv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    page_table: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    policy: PolicySpec = None,
) -> Decision:
    """What `attention` would run for the same arguments, and why. Runs nothing; `print` the result.

    A forced backend that cannot serve the call gives a report whose `.backend` is None, where `attention` would raise.

    Raises:
        ArgumentError, ArgumentTypeError, VariableError, PolicyError: as `attention` does.
    """
    call = dict(locals())
    cast = None
    if isinstance(q, Tensor) and _autocast_on(q.device.type):
        cast = torch.get_autocast_dtype(q.device.type)
    operands = Operands(mask, bias, alibi_slopes, sinks, seqlens_q, seqlens_kv, cu_seqlens_q, cu_seqlens_kv, page_table)
    if sharded(q, k, v):
        from attnrt.distributed import dtensor

        return dtensor.explain(q, k, v, operands, {name: call[name] for name in _OPTIONS})
    return runtime.decide(q, k, v, operands, cast=cast, every=True, **{name: call[name] for name in _OPTIONS})


def explain_shape(
    *,
    environment: Environment | str | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
    policy: PolicySpec = None,
    **shape: Any,
) -> Decision:
    """What would be chosen for a call of that shape, here or on a machine that is described. Needs no tensor, no GPU.

    Args:
        environment: None for this machine, one of `attnrt.environment.NAMED` ("h100", "a100", "b200", "rtx4090", ...),
            an arch ("sm90"), or an `Environment`.
        shape: as in `AttentionRequest.from_shape`: batch, heads_q, heads_kv, seqlen_q, seqlen_kv, head_dim, head_dim_v,
            dtype, layout, causal, window, alignment, packed, padded, page_size, training, mask, bias, bias_grad, alibi,
            softcap, sinks, dropout_p, scale, return_lse.

    Raises:
        ArgumentError, ArgumentTypeError: a size, name or combination cannot be right.
    """
    chosen = runtime.settings(backend, policy)
    chosen, deterministic = runtime.determinism(chosen, deterministic)
    request = AttentionRequest.from_shape(deterministic=deterministic, **shape)
    return runtime.choose(request, as_environment(environment), chosen, every=True)


def as_environment(environment: Environment | str | None) -> Environment:
    """A machine from what a user writes for one: None (this one), a name, an arch, or an `Environment`."""
    if isinstance(environment, Environment):
        return environment
    if environment is None:
        return Environment.detect().with_free_memory()
    if not isinstance(environment, str):
        raise ArgumentTypeError("environment", environment, f"one of {', '.join(NAMED)}, an arch, or an Environment")
    if environment not in NAMED and environment.lower().startswith("sm"):
        return Environment.simulate(environment)
    return Environment.named(environment)


def last_decision() -> Decision | None:
    """The choice that the last `attention` call in this thread or async task ran. None before the first."""
    return execution.last.get()
