"""Which generations of flash-attn are here, whether they load, and for which GPUs they were built.

Versions come from the installed distributions: a module's own `__version__` is "0.0.0" in flash-attn 4, and flash-attn
2.8.3 carries an old copy of flash-attn 4's module. Nothing is imported before a call needs it, and whatever an import
raises becomes a `Reason` in the loader's own words.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module, metadata, util
from pathlib import Path
from threading import RLock
from types import ModuleType
from typing import Any

import torch

from attnrt.backends.base import Reason
from attnrt.backends.flash_attn.fatbin import Target, targets
from attnrt.environment import Environment, on_forget


@dataclass(frozen=True)
class Generation:
    """One of the three packages. `modules`: where its functions may be; `binary`: its compiled part, if it has one."""

    number: int
    package: str
    modules: tuple[str, ...]
    functions: tuple[str, ...]
    binary: str | None
    remedy: str

    @property
    def prefix(self) -> str:
        return f"FA{self.number}"


PROVEN = {"flash-attn-4": "4.0.0b36", "nvidia-cutlass-dsl": "4.8.1", "quack-kernels": "0.6.5"}
"""Versions of flash-attn 4 and of what it compiles with that were seen to work together."""
_TRIO = f"'flash-attn-4=={PROVEN['flash-attn-4']}' 'nvidia-cutlass-dsl[cu13]=={PROVEN['nvidia-cutlass-dsl']}' " + (
    f"'quack-kernels=={PROVEN['quack-kernels']}'"
)
CACHE_ENABLED, CACHE_DIR = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"
"""flash-attn 4's own variables; without the first it keeps nothing."""
KVCACHE = "flash_attn_with_kvcache"
GENERATIONS = {
    2: Generation(
        2,
        "flash-attn",
        ("flash_attn",),
        ("flash_attn_func", "flash_attn_varlen_func", KVCACHE),
        "flash_attn_2_cuda",
        "pip install --force-reinstall --no-deps --no-build-isolation --no-cache-dir flash-attn",
    ),
    3: Generation(
        3,
        "flash-attn-3",
        ("flash_attn_interface", "flash_attn_3.flash_attn_interface"),
        ("flash_attn_func", "flash_attn_varlen_func", KVCACHE),
        "flash_attn_3/_C",
        "build it again from the hopper folder of github.com/Dao-AILab/flash-attention",
    ),
    4: Generation(
        4,
        "flash-attn-4",
        ("flash_attn.cute",),
        ("flash_attn_func", "flash_attn_varlen_func"),
        None,
        f"pip install --force-reinstall {_TRIO}",
    ),
}


@dataclass(frozen=True)
class Library:
    """A generation that loaded: its public functions by name, and the parameters that each takes."""

    generation: Generation
    version: str
    functions: Mapping[str, Any]
    parameters: Mapping[str, frozenset[str]]

    def lacks(self, function: str, arguments: Mapping[str, Any]) -> list[str]:
        """Which of these arguments the installed function does not have; all, if there is no such function."""
        return sorted(arguments.keys() - self.parameters.get(function, frozenset()))


_lock = RLock()


def load(number: int, version: str, cache: Path | None = None) -> Library | Reason:
    """The package's functions, or why they cannot be had. Tried once for each installed version.

    Args:
        version: as installed (`Environment.version`). cache: where flash-attn 4 may keep what it compiles.
    """
    with _lock:
        return _load(number, version, cache)


@lru_cache(maxsize=16)
def _load(number: int, version: str, cache: Path | None) -> Library | Reason:
    generation = GENERATIONS[number]
    if (stale := _shadowed(generation)) is not None:
        return stale
    try:
        with _disk_cache(cache if number == 4 else None):
            module = _import(generation)
        functions = {name: getattr(module, name) for name in generation.functions if hasattr(module, name)}
        if not functions:
            raise AttributeError(f"{module.__name__} has none of {', '.join(generation.functions)}")
        parameters = {name: frozenset(inspect.signature(f).parameters) for name, f in functions.items()}
    except Exception as error:  # loaders raise nearly anything: OSError, AttributeError, RuntimeError, ...
        said = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
        return Reason(
            f"{generation.prefix}_BROKEN",
            f"{generation.package} {version} is installed and does not load: {said}{_company(generation, version)}",
            _cure(generation, version, error),
        )
    return Library(generation, version, functions, parameters)


def _import(generation: Generation) -> ModuleType:
    names = generation.modules
    for name in names[:-1]:
        if util.find_spec(name) is not None:
            return import_module(name)
    return import_module(names[-1])


def _shadowed(generation: Generation) -> Reason | None:
    """flash-attn 4 lies in a folder of flash-attn's, whose 2.8.3 brings files of the same names: told by their size."""
    if generation.number != 4:
        return None
    try:
        files = metadata.files(generation.package) or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if str(file) == "flash_attn/cute/interface.py" and file.size is not None:
            where = Path(str(file.locate()))
            if where.exists() and where.stat().st_size != file.size:
                return Reason(
                    "FA4_SHADOWED",
                    f"{where} is not the file that flash-attn-4 installed: flash-attn 2.8.3 carries an old copy of it",
                    generation.remedy + " (after flash-attn, which overwrites it)",
                )
    return None


def _company(generation: Generation, version: str) -> str:
    """What it was built for or compiles with, where that is known to matter."""
    if generation.number == 4:
        there = {p: _version(p) for p in list(PROVEN)[1:]}
        return "; with " + ", ".join(f"{p} {v or 'not installed'}" for p, v in there.items())
    built = version.partition("+")[2]  # as in 2.8.3+cu12torch2.8cxx11abiTRUE, the project's own wheels
    return f"; it was built for {built}" if built else ""


def _cure(generation: Generation, version: str, error: Exception) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if generation.number == 4:
        reason = f"; only {_TRIO.replace(chr(39), '')} were seen to work together"
        return generation.remedy + ("" if missing else reason)
    text = str(error)
    if "undefined symbol" in text or "version `" in text or generation.number == 3:
        return f"{generation.remedy}, with the torch {torch.__version__} that it shall run with"
    return generation.remedy


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@contextmanager
def _disk_cache(folder: Path | None) -> Iterator[None]:
    """flash-attn 4 reads these at import. What the user has set stays; what is set here goes again."""
    names = (CACHE_ENABLED, CACHE_DIR)
    if folder is None or any(name in os.environ for name in names) or "flash_attn.cute.cache_utils" in sys.modules:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # its entries are native code
    except OSError:  # a read-only home: it compiles again in each process
        yield
        return
    os.environ.update(zip(names, ("1", str(folder)), strict=True))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)


def compiled_for(generation: Generation) -> tuple[Target, ...]:
    """What the package's compiled part holds machine code or PTX for; empty where that cannot be read."""
    path = binary(generation)
    try:
        return () if path is None else _targets(path, path.stat().st_mtime_ns)
    except OSError:
        return ()


@lru_cache(maxsize=16)
def _targets(path: Path, _changed: int) -> tuple[Target, ...]:
    return targets(path)


def binary(generation: Generation) -> Path | None:
    """The extension module's file, found without importing anything."""
    if generation.binary is None:
        return None
    folder, _, stem = generation.binary.rpartition("/")
    for root in sys.path:
        found = sorted(Path(root or ".", folder).glob(f"{stem}.*so"))
        if found:
            return found[0]
    return None


def built_elsewhere(generation: Generation, environment: Environment) -> Reason | None:
    """A reason if nothing in the compiled part runs on this GPU."""
    built, sm = compiled_for(generation), environment.sm
    if sm is None or not built or any(t.runs_on(sm) for t in built):
        return None
    names = ", ".join(sorted({str(t) for t in built}))
    listed = {2: "FLASH_ATTN_CUDA_ARCHS", 3: "the sm90 kernels on"}[generation.number]
    how = f"with {listed}={sm}" if generation.number == 2 else f"with {listed}"
    return Reason(
        f"{generation.prefix}_BUILT_FOR",
        f"{generation.package} {_version(generation.package) or ''} here was built for {names}, and {environment.name} "
        f"is {environment.arch}",
        f"build it again {how}: {generation.remedy}",
    )


def forget() -> None:
    """Drop what was found, so that the next call looks again."""
    with _lock:
        _load.cache_clear()
        _targets.cache_clear()


on_forget.append(forget)
