"""`attention` while a graph is traced, by torch.compile, torch.export or torch.func: one operator, and its choice.

The choice is made here, once, when every size is a number, and goes into the graph as a constant: "torch[flash_cpu]".
Where a size is a symbol (dynamic shapes) no kernel is best for all its values, and guards on what the rules depend on
would trace again at every threshold; so the operator chooses at run time, once for each size, as an eager call does.
Overrides that a run finds in force count as they do in eager: other ones than at the trace choose again.

dynamo reads this module's code, so it is written in what dynamo can follow. Functions marked constant are run as they
are, once, while it traces.
"""

from __future__ import annotations

import sys
from os import fspath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes

from attnrt import execution, operators, runtime
from attnrt.errors import ArgumentError
from attnrt.execution import AT_RUN_TIME, BAR, DYNAMIC, policies
from attnrt.operands import Operands
from attnrt.pins import TRACED, overrides_in_words
from attnrt.settings import BETWEEN, reentered, traced_blocks
from attnrt.sharded import DTENSOR

if TYPE_CHECKING:
    from collections.abc import Callable

_AUTOCAST = tuple(n for n in ("cpu", "cuda", "xpu", "mps", "hpu", "mtia") if torch.amp.is_autocast_available(n))
_is_batched = torch._C._functorch.is_batchedtensor


def constant(function: Callable[..., str]) -> Callable[..., str]:
    """As torch.compiler.assume_constant_result does, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


in_words = constant(execution.in_words)


@constant
def sharding_rules() -> str:
    """Tell DTensor, if it is here, how the operators may be cut across ranks."""
    if DTENSOR in sys.modules:
        from attnrt.distributed import operator_rules  # noqa: F401
    return ""


def needed(*tensors: Any) -> bool:
    """Whether these tensors must go through an operator outside dynamo too: fake ones, and under a transform.

    Raises:
        ArgumentError: one of them is batched by torch.func.vmap.
    """
    given = [t for t in tensors if isinstance(t, Tensor)]
    if operators.transform() is not None:
        for t in given:
            if _is_batched(t):
                raise operators.vmap_refused(t)
        return True
    return any(isinstance(t, (FakeTensor, FunctionalTensor)) for t in given)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    layout: str,
    causal: bool,
    window: Any,
    alignment: str | None,
    softcap: float | None,
    dropout_p: float,
    scale: float | None,
    max_seqlen_q: int | None,
    max_seqlen_kv: int | None,
    return_lse: bool,
    deterministic: bool | None,
    backend: str | None,
    policy: Any,
) -> Any:
    """The same call as `attnrt.attention`, as one operator in a graph."""
    sharding_rules()
    slopes = operands.alibi_slopes
    recording = torch.is_grad_enabled()
    if recording and slopes is not None and slopes.requires_grad:
        raise ArgumentError("alibi_slopes", slopes, "has no gradient here; detach it, or pass learnable slopes as bias")
    kind = q.device.type
    autocast = kind in _AUTOCAST and torch.is_autocast_enabled(kind)
    if autocast:
        dtype = torch.get_autocast_dtype(kind)
        q, k, v = (t if t.dtype == torch.float64 else t.to(dtype) for t in (q, k, v))
    leaves = (q, k, v, operands.bias, operands.sinks)
    grads = [recording and t is not None and t.requires_grad for t in leaves]
    left, right = (None, None) if window is None else window
    name = None if policy is None else policy if isinstance(policy, str) else named(policy)
    numbers = (left, right, softcap, dropout_p, scale, max_seqlen_q, max_seqlen_kv)
    blocks = BETWEEN.join(traced_blocks)
    if not torch.compiler.is_compiling():
        choice = ""
    elif not _static((q, k, v, *operands), numbers):
        choice = DYNAMIC
    elif layout == "thd" and (max_seqlen_q is None or max_seqlen_kv is None):
        choice = AT_RUN_TIME  # the longest sequence is a value
    else:
        facts = tuple(None if t is None else _facts(t) for t in (q, k, v, *operands))
        same = operands.cu_seqlens_q is operands.cu_seqlens_kv, operands.seqlens_q is operands.seqlens_kv
        scalars = (layout, causal, (left, right), alignment, softcap, dropout_p, scale, max_seqlen_q, max_seqlen_kv)
        choice = choose(facts, same, tuple(grads), scalars, return_lse, deterministic, backend, name, blocks)
    options: tuple[Any, ...] = (layout, causal, left, right, alignment, softcap, dropout_p, scale)
    options = (*options, max_seqlen_q, max_seqlen_kv, return_lse, deterministic, backend, name)
    # Inside no graph, or one that leaves something to its runs, every option is an argument.
    lean = choice not in ("", DYNAMIC, AT_RUN_TIME) and not (blocks or dropout_p or return_lse or any(grads))
    operator: Any = operators.FORWARD_DROPOUT if dropout_p else operators.FORWARD
    arguments: tuple[Any, ...] = (q, k, v, *operands, *options, blocks, choice, grads)
    if lean:
        plain = all([t is None for t in operands])  # noqa: C419  dynamo follows lists
        operator = operators.PLAIN if plain else operators.INFERENCE
        arguments = (q, k, v, *(() if plain else operands), in_words(*options), choice)
    elif not torch.compiler.is_compiling() and operators.transform() is not None:
        operator = operators.Transformed.apply
    if autocast:
        with torch.autocast(kind, enabled=False):
            result = operator(*arguments)
    else:
        result = operator(*arguments)
    if lean:
        return result
    out, lse, _ = result
    return (out, lse.detach().float()) if return_lse else out


def _facts(t: Tensor) -> tuple[Any, ...]:
    return tuple(t.shape), t.stride(), t.dtype, t.device, t.requires_grad


def _static(tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> bool:
    """No size, stride or option is a symbol. Asking adds no guard."""
    from torch.fx.experimental.symbolic_shapes import has_static_value

    for tensor in tensors:
        if tensor is not None:
            for size in tensor.shape:
                if not has_static_value(size):
                    return False
            for stride in tensor.stride():
                if not has_static_value(stride):
                    return False
    for number in numbers:  # noqa: SIM110  dynamo does not follow a generator here
        if number is not None and not has_static_value(number):
            return False
    return True


@constant
def choose(
    facts: tuple[Any, ...],
    same: tuple[bool, bool],
    grads: tuple[bool, ...],
    options: tuple[Any, ...],
    return_lse: bool,
    deterministic: bool | None,
    backend: str | None,
    policy: str | None,
    blocks: str,
) -> str:
    """The label of what would run, and the overrides in force after a bar if there are any. What is wrong with a call
    is left for the run to say, where the error arrives as it is."""
    names = ("layout", "causal", "window", "alignment", "softcap", "dropout_p", "scale", "max_seqlen_q")
    named = dict(zip((*names, "max_seqlen_kv"), options, strict=True))
    if named["window"] == (None, None):
        named["window"] = None
    # Outside every mode: torch.export without dynamo would find these tensors in its graph.
    with _disable_current_modes(), FakeTensorMode():
        q, k, v, *given = (_fake(fact) for fact in facts)
    operands = Operands(*given)
    if same[0]:
        operands = operands._replace(cu_seqlens_kv=operands.cu_seqlens_q)
    if same[1]:
        operands = operands._replace(seqlens_kv=operands.seqlens_q)
    spec = policies.get(policy or "", policy)
    named |= {"return_lse": return_lse, "deterministic": deterministic, "backend": backend, "policy": spec}
    with reentered(blocks):
        try:
            decision = runtime.decide(q, k, v, operands, grads=grads, compiled=True, pin=TRACED, **named)
            overrides = overrides_in_words(runtime.settings(backend, spec))
        except Exception:  # the run meets it again, and raises it as it is
            return AT_RUN_TIME
    if decision.backend is None:
        return AT_RUN_TIME
    runtime.announce(decision)
    return decision.label + (BAR + overrides if overrides else "")


def _fake(fact: tuple[Any, ...] | None) -> Tensor | None:
    if fact is None:
        return None
    shape, stride, dtype, device, _ = fact
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


@constant
def named(policy: Any) -> str:
    """A policy as a string: its path, or a name that stands for the object in this process."""
    from attnrt.policies.base import Policy

    if not isinstance(policy, Policy):
        return str(fspath(policy))
    name = next((n for n, p in policies.items() if p is policy), f"{policy.name}#{len(policies)}")
    policies[name] = policy
    return name
