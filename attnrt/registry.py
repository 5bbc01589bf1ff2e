"""Which backends there are: ours, those registered at run time, and those of the entry-point group "attnrt.backends".

Listing names imports no backend's package: a backend is rules until it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from importlib import metadata
from threading import Lock
from typing import TYPE_CHECKING, Any

from attnrt.errors import ArgumentError, ArgumentTypeError, UnknownNameError

if TYPE_CHECKING:
    from attnrt.backends.base import Backend

GROUP = "attnrt.backends"
_lock = Lock()
_registered: dict[str, Backend] = {}
_generation = 0
"""Grows with every registration; names are looked up anew."""
on_change: list[Callable[[], None]] = []
"""Called after every registration: remembered choices may be other ones now."""


@cache
def _bundled() -> dict[str, Backend]:
    from attnrt.backends.cudnn import CuDNN
    from attnrt.backends.flash_attn import FlashAttention2, FlashAttention3, FlashAttention4
    from attnrt.backends.reference import Reference
    from attnrt.backends.torch_sdpa import TorchSDPA
    from attnrt.backends.triton import TritonBackend

    ours: tuple[Backend, ...] = (
        CuDNN(),
        FlashAttention4(),
        FlashAttention3(),
        FlashAttention2(),
        TritonBackend(),
        TorchSDPA(),
        Reference(),
    )
    found = {backend.name: backend for backend in ours}
    for entry in _declared():
        backend = entry.load()
        backend = backend() if isinstance(backend, type) else backend
        _check_backend(backend, found)
        found[backend.name] = backend
    return found


def _declared() -> Iterable[metadata.EntryPoint]:
    """Of the entry-point group. The files are read as text first: parsing those of every package takes longer."""
    files = (d.read_text("entry_points.txt") for d in metadata.distributions())
    return metadata.entry_points(group=GROUP) if any(f and GROUP in f for f in files) else ()


def backends() -> dict[str, Backend]:
    """Every backend by name, ours first."""
    return {**_bundled(), **_registered}


def register_backend(backend: Backend) -> None:
    """Add a backend of your own. It is tried where a policy lists it (or "*"), preferred or forced by its name.

    Registering the same name again replaces the earlier one; our own names cannot be replaced.

    Raises:
        ArgumentTypeError: not an instance of `attnrt.Backend`. ArgumentError: its name is taken or malformed.
    """
    global _generation
    _check_backend(backend, _bundled())
    with _lock:
        _registered[backend.name] = backend
        _generation += 1
    _changed()


def unregister_backend(name: str) -> None:
    """Remove a backend that was added with `register_backend`.

    Raises:
        UnknownNameError: none of that name was added.
    """
    global _generation
    if name not in _registered:
        raise UnknownNameError("name", name, _registered)
    with _lock:
        del _registered[name]
        _generation += 1
    _changed()


def _changed() -> None:
    _families.cache_clear()
    for forget in on_change:
        forget()


@cache
def _families() -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for name, backend in backends().items():
        if backend.family:
            found[backend.family] = (*found.get(backend.family, ()), name)
    return found


def families() -> dict[str, tuple[str, ...]]:
    """Family name to its backends, newest first."""
    return _families()


def names() -> tuple[str, ...]:
    """Every name a user may write: backends and families."""
    return (*backends(), *families())


def kernel_names() -> tuple[str, ...]:
    """Names of single kernels of backends that have several: "torch.cudnn"."""
    return tuple(f"{b.name}.{k.name}" for b in backends().values() for k in b.kernels if k is not b)


@cache
def _expanded(listed: tuple[str, ...], _generation: int) -> tuple[str, ...]:
    return tuple(dict.fromkeys(member for name in listed for member in families().get(name, (name,))))


def rankable() -> tuple[str, ...]:
    """Every name a policy may list: backends, families, and kernels of backends that have several."""
    return (*names(), *kernel_names())


def expand(listed: tuple[str, ...]) -> tuple[str, ...]:
    """Families replaced by their members, newest first; each name once."""
    return _expanded(listed, _generation)


def check_name(argument: str, name: Any, kernels: bool = False) -> None:
    valid = _valid(kernels, _generation)
    try:
        known = name in valid
    except TypeError:
        known = False
    if not known:
        raise UnknownNameError(argument, name, valid)


@cache
def _valid(kernels: bool, _generation: int) -> dict[str, None]:
    return dict.fromkeys(names() + (kernel_names() if kernels else ()))


_OURS = ("flash_attn",)
"""Families that only bundled backends belong to."""


def _check_backend(backend: Any, taken: dict[str, Backend]) -> None:
    from attnrt.backends.base import FEATURE_NAMES, OPT_IN_NAMES, Backend

    if not isinstance(backend, Backend):
        raise ArgumentTypeError("backend", backend, "an instance of a subclass of attnrt.Backend is needed")
    name = getattr(backend, "name", None)
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise ArgumentError("backend.name", name, "letters, digits and underscores are needed")
    for attribute in ("title", "prefix"):
        if not isinstance(getattr(backend, attribute, None), str):
            raise ArgumentError(f"backend.{attribute}", getattr(backend, attribute, None), "a string is needed")
    others = {n: b for n, b in {**_registered, **taken}.items() if n != name or n in taken}
    if name in others or name in {b.family for b in others.values()}:
        raise ArgumentError("backend.name", name, f"is taken; the names in use are {', '.join(others)}")
    family = backend.family
    if family is not None and (not isinstance(family, str) or family in others or (family in _OURS and taken)):
        raise ArgumentError("backend.family", family, "is taken, or not a string; a name of its own is needed")
    features = FEATURE_NAMES | OPT_IN_NAMES
    for kernel in backend.kernels:
        if not isinstance(kernel.supports, (frozenset, set)) or (unknown := kernel.supports - features):
            wrong = kernel.supports if not isinstance(kernel.supports, (frozenset, set)) else sorted(unknown)
            raise ArgumentError("backend.supports", wrong, f"a set of names is needed, out of {sorted(features)}")
