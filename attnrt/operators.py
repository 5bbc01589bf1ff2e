"""attnrt in a traced graph: `torch.ops.attnrt.attention_forward` and `attention_backward`.

A graph of torch.compile or torch.export holds one of them for each call, with the choice among its constants. Run, it
looks its plan up as an eager call does, and runs that kernel. They are opaque to the compiler, and carry shapes (fake
implementations), gradients and the vmap refusal with them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet

from attnrt import execution
from attnrt.errors import ArgumentError, GradientError, TransformError
from attnrt.execution import Options
from attnrt.operands import NO_OPERANDS, Operands, check_tensor
from attnrt.recompute import SLOTS
from attnrt.second_order import SAID
from attnrt.settings import reentered

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqlens_q, "
    "Tensor? seqlens_kv, Tensor? cu_seqlens_q, Tensor? cu_seqlens_kv, Tensor? page_table"
)
_OPTIONS = (
    "str layout, bool causal, SymInt? window_left, SymInt? window_right, str? alignment, float? softcap, "
    "float dropout_p, float? scale, SymInt? max_seqlen_q, SymInt? max_seqlen_kv, bool return_lse, bool? deterministic, "
    "str? backend, str? policy, str blocks, str choice, bool[] grads"
)
"""As `attention` takes them. blocks: `override`s open around the call in the graph. choice: see `tracing.choose`.
grads: which of q, k, v, bias and sinks want a gradient."""
_OUTPUTS = "(Tensor out, Tensor lse, Tensor state)"
"""lse: (B, Hq, Sq), "thd": (Hq, T), float64 for fp64; empty if nothing asks for it. state: see `recompute.pack`."""
TENSORS, OPTIONS = 3 + len(Operands._fields), 17
_GRADS = (0, 1, 2, 4, 6)
"""Where q, k, v, bias and sinks stand among the tensors."""

_library = torch.library.Library("attnrt", "DEF")
_compliant = torch.Tag.pt2_compliant_tag
_library.define(f"attention_forward({_TENSORS}, {_OPTIONS}) -> {_OUTPUTS}", tags=(_compliant,))
# What draws random numbers is drawn again, not skipped or merged, and a recomputation restores the generator for it.
_library.define(
    f"attention_forward_dropout({_TENSORS}, {_OPTIONS}) -> {_OUTPUTS}",
    tags=(_compliant, torch.Tag.nondeterministic_seeded),
)
_library.define(
    f"attention_backward(Tensor grad, {_TENSORS}, Tensor out, Tensor lse, Tensor state, {_OPTIONS}, bool[] wanted) -> "
    "(Tensor grad_q, Tensor grad_k, Tensor grad_v, Tensor grad_bias, Tensor grad_sinks)",
    tags=(_compliant,),
)
# The same without gradients and LSE, where every option is a constant: two words instead of seventeen, since a graph
# hands on each of them anew at each call.
_library.define(f"attention_inference({_TENSORS}, str call, str choice) -> Tensor", tags=(_compliant,))
# And the same of q, k and v alone: nine arguments that are None are half of what handing on takes.
_library.define("attention_plain(Tensor q, Tensor k, Tensor v, str call, str choice) -> Tensor", tags=(_compliant,))
transform = torch._C._functorch.peek_interpreter_stack
"""The innermost of torch.func's transforms that a call is under, or None."""
FORWARD = torch.ops.attnrt.attention_forward.default
FORWARD_DROPOUT = torch.ops.attnrt.attention_forward_dropout.default
BACKWARD = torch.ops.attnrt.attention_backward.default
INFERENCE = torch.ops.attnrt.attention_inference.default
PLAIN = torch.ops.attnrt.attention_plain.default


def _options(arguments: Any) -> Options:
    return Options._make((*arguments[:-1], tuple(arguments[-1])))


def _given(*tensors: Tensor | None) -> Operands:
    for tensor in tensors:
        if tensor is not None:  # not by comparing tuples: asking a tensor whether it equals None takes 75 us
            return Operands(*tensors)
    return NO_OPERANDS


def _forward(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    operands, options = _given(*arguments[: TENSORS - 3]), _options(arguments[TENSORS - 3 :])
    if not options.blocks:
        return execution.forward(q, k, v, operands, options)
    with reentered(options.blocks):
        return execution.forward(q, k, v, operands, options)


def _inference(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    *tensors, call, choice = arguments
    return execution.inference(q, k, v, _given(*tensors), call, choice)


def _plain(q: Tensor, k: Tensor, v: Tensor, call: str, choice: str) -> Tensor:
    return execution.inference(q, k, v, NO_OPERANDS, call, choice)


def _backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    q, k, v, *given = arguments[:TENSORS]
    saved, wanted = arguments[TENSORS : TENSORS + 3], arguments[-1]
    return execution.backward(grad, (q, k, v), _given(*given), saved, _options(arguments[TENSORS + 3 : -1]), wanted)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(arguments[TENSORS - 3 :])
    layout, training = options.layout, any(options.grads)
    out = _output(q, k, v, layout)
    order = {"bhsd": (0, 1, 2), "bshd": (0, 2, 1), "sbhd": (1, 2, 0), "thd": (1, 0)}[layout]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty([q.shape[i] for i in order] if training or options.return_lse else (0,), dtype=wide)
    return out, lse, q.new_empty((SLOTS if training else 0,), dtype=torch.int64)


def _inference_fake(q: Tensor, k: Tensor, v: Tensor, *arguments: Any) -> Tensor:
    return _output(q, k, v, execution.settled(*arguments[-2:]).layout)


def _output(q: Tensor, k: Tensor, v: Tensor, layout: str) -> Tensor:
    """As the operators leave it: the heads of one token side by side."""
    for name, tensor in {"q": q, "k": k, "v": v}.items():
        check_tensor(name, tensor, layout)
    shape = (*q.shape[:-1], v.shape[-1])
    if layout == "bhsd":
        batch, heads, length, dim = shape
        return q.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return q.new_empty(shape)


def _backward_fake(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    leaves = [arguments[i] for i in _GRADS]
    return tuple(
        torch.empty_like(t) if wants else grad.new_empty((0,)) for t, wants in zip(leaves, arguments[-1], strict=True)
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:TENSORS], *output)
    ctx.options = inputs[TENSORS:]
    ctx.mark_non_differentiable(output[1], output[2])


def _differentiate(ctx: Any, grad: Tensor, _lse: Tensor, _state: Tensor) -> tuple[Tensor | None, ...]:
    wanted = [ctx.needs_input_grad[i] for i in _GRADS]
    if not any(ctx.options[-1]):
        _nothing_kept(ctx, grad)
    backward: Any = BACKWARD if transform() is None else TransformedBackward.apply
    grads = backward(grad, *ctx.saved_tensors, *ctx.options, wanted)
    found: list[Tensor | None] = [None] * (TENSORS + OPTIONS)
    for i, wants, gradient in zip(_GRADS, wanted, grads, strict=True):
        found[i] = gradient if wants else None
    return tuple(found)


def _nothing_kept(ctx: Any, grad: Tensor) -> None:
    raise GradientError("attention ran as if nothing wanted a gradient, and kept nothing for a backward")


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise GradientError(SAID)


def _no_forward_mode(ctx: Any, *tangents: Any) -> None:
    raise GradientError("attention has no forward-mode derivative: no kernel computes it; use torch.func.vjp")


def _refuse_vmap(info: Any, in_dims: Any, *arguments: Any) -> None:
    q = next(a for a in arguments if isinstance(a, Tensor))
    raise vmap_refused(q)


class Transformed(torch.autograd.Function):
    """The operator under torch.func.grad and its like, which do not differentiate operators of torch.library."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return FORWARD(*arguments)  # type: ignore[no-any-return]

    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)
    jvp = staticmethod(_no_forward_mode)
    vmap = staticmethod(_refuse_vmap)


class TransformedBackward(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return BACKWARD(*arguments)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    backward = staticmethod(_no_second_derivative)
    vmap = staticmethod(_refuse_vmap)


def vmap_refused(q: Tensor) -> ArgumentError:
    return ArgumentError(
        "q", q, "attention is inside torch.func.vmap, which no kernel takes: make the mapped dim part of the batch"
    )


# ---- autograd

_BELOW = torch._C._after_autograd_keyset
_KERNELS = DispatchKeySet(DispatchKey.CPU) | DispatchKeySet(DispatchKey.CUDA)
_KERNELS = _KERNELS | DispatchKeySet(DispatchKey.AutogradCPU) | DispatchKeySet(DispatchKey.AutogradCUDA)
_BETWEEN = ~_KERNELS.raw_repr() & (1 << 64) - 1
"""What may stand between autograd and the implementation: fake tensors, DTensors, modes, functionalization."""


def _differentiable(operator: Any, run: Any, save: Any, differentiate: Any) -> Any:
    """What `torch.library.register_autograd` makes, but with nothing recorded, as in a compiled graph or under
    no_grad, it calls the implementation: dispatching once more costs half of what a small attention does.

    Args:
        run: the implementation. save, differentiate: as register_autograd's setup_context and backward.
    """

    class Recorded(torch.autograd.Function):
        @staticmethod
        def forward(*arguments: Any) -> Any:
            *arguments, keys = arguments  # type: ignore[assignment]
            with torch._C._AutoDispatchBelowAutograd():
                return operator.redispatch(keys & _BELOW, *arguments)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            save(ctx, inputs[:-1], output)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return *differentiate(ctx, *grads), None

        vmap = staticmethod(_refuse_vmap)

    def kernel(keys: Any, *arguments: Any) -> Any:
        if torch.is_grad_enabled():
            for argument in arguments:
                if isinstance(argument, Tensor) and argument.requires_grad:
                    if transform() is not None:
                        raise TransformError("torch.func's gradients of attention cannot be traced; fullgraph=False")
                    return Recorded.apply(*arguments, keys)  # type: ignore[no-untyped-call]
        if not keys.raw_repr() & _BETWEEN:
            return run(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keys & _BELOW, *arguments)

    return kernel


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


for _operator, _run, _fake, _keep, _grads in (
    (FORWARD, _forward, _forward_fake, _save, _differentiate),
    (FORWARD_DROPOUT, _forward, _forward_fake, _save, _differentiate),
    (BACKWARD, _backward, _backward_fake, _keep_nothing, _no_second_derivative),
    (INFERENCE, _inference, _inference_fake, _keep_nothing, _nothing_kept),
    (PLAIN, _plain, _inference_fake, _keep_nothing, _nothing_kept),
):
    _library.impl(_operator, _run, "CompositeExplicitAutograd")
    _library.impl(_operator, _differentiable(_operator, _run, _keep, _grads), "Autograd", with_keyset=True)
    torch.library.register_fake(_operator, _fake, lib=_library)
    torch.library.register_vmap(_operator, _refuse_vmap, lib=_library)
