"""`patch_sdpa`: F.scaled_dot_product_attention of unmodified code, served by attnrt with PyTorch's own meaning."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable
from contextvars import ContextVar
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnrt import execution, runtime
from attnrt.api import attention
from attnrt.errors import ArgumentError, ArgumentTypeError, BackendUnavailable, PassThroughWarning
from attnrt.sdpa import against, as_called, described, four_dims
from attnrt.settings import PolicySpec, check_policy
from attnrt.tracing import constant

NAME = "scaled_dot_product_attention"
_lock = Lock()
_patches: tuple[patch_sdpa, ...] = ()
"""Those in force, the innermost last."""
_places: list[tuple[ModuleType, str, Any]] = []
"""What the outermost replaced: module, name, and what stood there."""
_serving: ContextVar[bool] = ContextVar("attnrt_patch_serving", default=False)
_original: Any = getattr(F, NAME)
_fastpath = True


class PassedThrough(NamedTuple):
    """A kind of call that PyTorch served after all: why, what it was, and how often."""

    reason: str
    call: str
    times: int


class patch_sdpa:
    """Route F.scaled_dot_product_attention through attnrt, in the whole process, until `undo` or the end of a `with`.

    The calls keep PyTorch's meaning: 2 to 5 and more dims, broadcast batch dims and heads, top-left causal masks, bool
    and float masks, `enable_gqa`, dropout whenever `dropout_p` is not 0, autocast. nn.MultiheadAttention is served too:
    its fast path in C++, which calls no attention function, is switched off meanwhile (`need_weights=True` still does
    its own arithmetic). What attnrt cannot serve goes on to PyTorch: with a PassThroughWarning for each new reason,
    listed in `passed_through`, and printed if ATTNRT_REPORT is set. Inside torch.compile it is found out at the trace.

    Patches nest: the innermost one's options count, and PyTorch's function is back when the last is undone, in
    whatever order and thread. A module that did `from torch.nn.functional import scaled_dot_product_attention` holds
    PyTorch's own; a warning names those there are, and `modules` reaches them. A `with` of one that was undone puts it
    back in force, and of several around each other the outermost undoes it. `sdpa_kernel(...)` blocks choose among
    PyTorch's kernels, and so only for calls that are passed on.

    Args:
        backend, policy: as in `attention`. A forced backend that cannot serve a call raises; nothing is passed on.
        strict: nothing is passed on: what attnrt cannot serve raises ArgumentError or BackendUnavailable.
        modules: further modules that hold the function under its own name, or "all" for every one imported so far.

    Raises:
        ArgumentError: a module in `modules` does not hold it. UnknownNameError: no such backend.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        policy: PolicySpec = None,
        strict: bool = False,
        modules: Iterable[ModuleType] | str = (),
    ) -> None:
        runtime.settings(backend, policy)
        check_policy("policy", policy)
        self.backend, self.policy, self.strict = backend, policy, strict
        self._passed: dict[tuple[str, str], int] = {}
        self._served: dict[str, int] = {}
        self._modules, self._depth = _named(modules), 0
        _install(self, self._modules)

    @property
    def passed_through(self) -> tuple[PassedThrough, ...]:
        """What PyTorch served after all."""
        return tuple(PassedThrough(reason, call, n) for (reason, call), n in self._passed.items())

    @property
    def served(self) -> dict[str, int]:
        """How many calls each kernel of attnrt served, such as {"torch[flash_cpu]": 12}; without compiled graphs."""
        return dict(self._served)

    @property
    def active(self) -> bool:
        return self in _patches

    def undo(self) -> None:
        """Take this patch back. Once is enough; again does nothing."""
        _remove(self)

    def __enter__(self) -> patch_sdpa:
        if not self.active:
            _install(self, self._modules)
        self._depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if not self._depth:
            self.undo()

    def __repr__(self) -> str:
        lines = [f"attnrt.patch_sdpa, {'in force' if self.active else 'undone'}"]
        lines += [f"  {n} calls by {label}" for label, n in self._served.items()]
        lines += [f"  {p.times} calls passed to PyTorch: {p.reason}; {p.call}" for p in self.passed_through]
        return "\n".join(lines)

    def _pass_on(self, reason: str, call: str) -> None:
        """Count it and say so.

        Raises:
            ArgumentError: the patch is strict.
        """
        if self.strict:
            raise ArgumentError(NAME, call, f"attnrt cannot serve it, and the patch is strict: {reason}")
        with _lock:
            new = all(known != reason for known, _ in self._passed)
            self._passed[reason, call] = self._passed.get((reason, call), 0) + 1
        if new:
            warnings.warn(f"attnrt.patch_sdpa passed a call on to PyTorch: {reason}", PassThroughWarning, stacklevel=4)
        if runtime.variables().report != "off":
            print(f"attnrt: passed on to PyTorch: {reason}; the call was {call}", file=sys.stderr)


def scaled_dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """What stands in for PyTorch's function while a patch is in force."""
    arguments = (query, key, value, attn_mask, dropout_p, is_causal)
    if not _patches or (not torch.compiler.is_compiling() and _serving.get()):
        # Taken back while this call was on its way; or a backend that builds on PyTorch's function.
        return _original(*arguments, scale=scale, enable_gqa=enable_gqa)
    patch = _patches[-1]
    reason = against(*arguments, scale, enable_gqa)
    if reason is None:
        try:
            return _serve(patch, *arguments, scale, enable_gqa)
        except BackendUnavailable as error:
            if error.report.forced or patch.strict:
                raise
            reason = "no backend of attnrt takes it"
    if torch.compiler.is_compiling():
        _note(reason)
    else:
        patch._pass_on(reason, described(*arguments, scale, enable_gqa))
    return _original(*arguments, scale=scale, enable_gqa=enable_gqa)


def _serve(
    patch: patch_sdpa, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout_p: float, causal: bool, scale: Any, gqa: bool
) -> Tensor:
    *qkv, added = four_dims(q, k, v, mask, gqa)
    options: dict[str, Any] = {"causal": causal, "alignment": "top_left", "dropout_p": float(dropout_p), "scale": scale}
    options |= {"backend": patch.backend, "policy": patch.policy, **added}
    if torch.compiler.is_compiling():
        return as_called(attention(*qkv, **options), q, k, v)
    token = _serving.set(True)
    try:
        out = attention(*qkv, **options)
    finally:
        _serving.reset(token)
    decision = execution.last.get()
    assert decision is not None
    with _lock:
        patch._served[decision.label] = patch._served.get(decision.label, 0) + 1
    return as_called(out, q, k, v)


@constant
def _note(reason: str) -> str:
    """Of a call in a graph that is being traced: once, since its runs are not seen."""
    if _patches:
        _patches[-1]._pass_on(reason, "in a compiled graph, counted once")
    return ""


# ---- putting it in place


def _install(patch: patch_sdpa, modules: list[ModuleType] | None) -> None:
    global _patches, _original, _fastpath
    with _lock:
        original = _original if _patches else getattr(F, NAME)
        elsewhere = _holders(original)
        for module in modules or ():
            held = {m.__name__ for m, _ in elsewhere} | {m.__name__ for m, _, _ in _places}
            if module.__name__ not in held:
                raise ArgumentError("modules", module.__name__, f"it does not hold PyTorch's {NAME}")
        if not _patches:
            _original, _fastpath = original, torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
            _replace(F, NAME)
        for module, name in elsewhere:
            if modules is None or any(m is module for m in modules):
                _replace(module, name)
        _patches = (*_patches, patch)
    left = sorted({m.__name__ for m, _ in elsewhere} - {m.__name__ for m, _, _ in _places})
    if left:
        said = f"{', '.join(left)} hold PyTorch's {NAME} by a name of their own, which patch_sdpa does not reach; "
        warnings.warn(f"attnrt: {said}modules= names those to patch too", PassThroughWarning, stacklevel=4)


def _replace(module: ModuleType, name: str) -> None:
    _places.append((module, name, getattr(module, name)))
    setattr(module, name, scaled_dot_product_attention)


def _remove(patch: patch_sdpa) -> None:
    global _patches
    with _lock:
        if not any(p is patch for p in _patches):
            return
        _patches = tuple(p for p in _patches if p is not patch)
        if _patches:
            return
        torch.backends.mha.set_fastpath_enabled(_fastpath)
        while _places:
            module, name, before = _places.pop()
            if getattr(module, name, None) is scaled_dot_product_attention:
                setattr(module, name, before)
            else:
                said = f"{module.__name__}.{name} was replaced by somebody else meanwhile, and is left as it is"
                warnings.warn(f"attnrt.patch_sdpa: {said}", PassThroughWarning, stacklevel=4)


def _holders(original: Any) -> list[tuple[ModuleType, str]]:
    """Modules outside torch that hold PyTorch's function, and under which name."""
    found: list[tuple[ModuleType, str]] = []
    for module in [m for m in sys.modules.values() if isinstance(m, ModuleType)]:
        if not module.__name__.startswith(("torch.", "attnrt.")):
            found += [(module, name) for name, value in list(vars(module).items()) if value is original]
    return found


def _named(modules: Any) -> list[ModuleType] | None:
    """None stands for all of them."""
    if modules == "all":
        return None
    if isinstance(modules, (str, ModuleType)) or not all(isinstance(m, ModuleType) for m in modules):
        raise ArgumentTypeError("modules", modules, 'a list of imported modules is needed, or "all"')
    return list(modules)
