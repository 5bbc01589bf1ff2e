"""What is here: the device, its compute capability, and the version of every package a backend may need.

Probed lazily and without importing any backend package; or written by hand with `Environment.simulate`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import metadata
from typing import Any, Self

import torch
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from attnrt.errors import ArgumentError, ArgumentTypeError, UnknownNameError

GIB = 1 << 30
PACKAGES = ("torch", "triton", "cudnn", "nvidia-cudnn-frontend", "flash-attn", "flash-attn-3", "flash-attn-4")
"""What `packages=` may name: distributions, and "cudnn", the run-time version of libcudnn."""

_DEFAULT_PACKAGES: Mapping[str, str | None] = {
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cudnn": "9.19.0",
    "nvidia-cudnn-frontend": "1.28.0",
    "flash-attn": "2.8.3",
    "flash-attn-3": "3.0.0",
    "flash-attn-4": "4.0.0b36",
}


@dataclass(frozen=True)
class Environment:
    """A machine as far as the choice of a kernel can depend on it. Immutable and hashable.

    `capability` is CUDA's (major, minor), None without an NVIDIA GPU; memory is in bytes, None where unknown.
    """

    name: str
    device_type: str = "cpu"
    device_index: int | None = None
    capability: tuple[int, int] | None = None
    sm_count: int | None = None
    threads: int | None = None
    """CPU threads that torch computes with; None on a GPU."""
    total_memory: int | None = None
    free_memory: int | None = None
    cuda: str | None = None
    packages: tuple[tuple[str, str | None], ...] = ()
    simulated: bool = False

    @property
    def sm(self) -> int | None:
        """Compute capability as one number: 90 for sm90, 103 for sm103. None without an NVIDIA GPU."""
        return None if self.capability is None else self.capability[0] * 10 + self.capability[1]

    @property
    def arch(self) -> str:
        """'sm90' and the like, or the device type."""
        return self.device_type if self.sm is None else f"sm{self.sm}"

    def version(self, package: str) -> str | None:
        """The installed version of a package named in `PACKAGES`, None if it is not installed."""
        for name, version in self.packages:
            if name == package:
                return version
        return None

    def has(self, package: str, specifier: str = "") -> bool:
        """Whether the package is installed in that version range, such as '>=9.13.1,<10'."""
        version = self.version(package)
        return version is not None and in_range(version, specifier)

    def lacks(self, package: str, specifier: str) -> bool:
        """Installed, but outside the range. (A package that is not installed is another rule's reason.)"""
        version = self.version(package)
        return version is not None and not in_range(version, specifier)

    def with_free_memory(self) -> Self:
        """The same machine with its free memory read again. A simulated one stays as written."""
        return self if self.simulated else replace(self, free_memory=_free_memory(self.device_type, self.device_index))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "device_type": self.device_type,
            "device_index": self.device_index,
            "arch": self.arch,
            "capability": self.capability,
            "sm_count": self.sm_count,
            "threads": self.threads,
            "total_memory": self.total_memory,
            "free_memory": self.free_memory,
            "cuda": self.cuda,
            "packages": dict(self.packages),
            "simulated": self.simulated,
        }

    @staticmethod
    def detect(device: torch.device | str | None = None) -> Environment:
        """This machine, as seen from `device` (default: the current CUDA device if there is one, else the CPU).

        Probed once per device and kept until `attnrt.refresh()`.
        """
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError):
            raise ArgumentError("device", device, "a device such as 'cpu' or 'cuda:0' is needed") from None
        index: int | None = device.index
        if device.type == "cuda":
            count = torch.cuda.device_count()
            if not count or (index is not None and index >= count):
                here = f"there are {count} here" if count else f"torch {torch.__version__} sees none here"
                raise ArgumentError("device", str(device), f"a CUDA device that exists is needed; {here}")
            index = torch.cuda.current_device() if index is None else index
        return _detect(device.type, index)

    @classmethod
    def simulate(
        cls,
        arch: str = "sm90",
        *,
        packages: Mapping[str, str | None] | None = None,
        name: str | None = None,
        sm_count: int | None = None,
        memory: int | None = None,
        free_memory: int | None = None,
        cuda: str = "13.0",
    ) -> Self:
        """A machine written by hand, to ask what would be chosen on it.

        Args:
            arch: "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", ... or "cpu".
            packages: versions by name (see `PACKAGES`), None for "not installed". Those left out keep a full set of
                versions known to work together, as far as the arch can use them.
            memory, free_memory: bytes; free memory defaults to 90% of the whole.

        Raises:
            ArgumentError: an arch, package or version that cannot be.
        """
        if not isinstance(arch, str) or not (match := re.fullmatch(r"cpu|sm_?(\d{2,3})a?", arch.lower())):
            raise ArgumentError(
                "arch", arch, "'cpu' or a compute capability such as 'sm80', 'sm90' or 'sm100' is needed"
            )
        number = int(match[1]) if match[1] else None
        installed = dict(_DEFAULT_PACKAGES)
        if number is None:
            installed = {p: "2.11.0" if p == "torch" else None for p in PACKAGES}
        elif number // 10 != 9:
            installed["flash-attn-3"] = None
        if packages is not None and not isinstance(packages, Mapping):
            raise ArgumentTypeError("packages", packages, "a mapping from package name to version is needed")
        for package, version in (packages or {}).items():
            if package not in PACKAGES:
                raise UnknownNameError("packages", package, PACKAGES)
            installed[package] = _checked_version(package, version)
        for argument, value in {"sm_count": sm_count, "memory": memory, "free_memory": free_memory}.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise ArgumentTypeError(argument, value, "an integer is needed (memory in bytes)")
            if value is not None and value < 0:
                raise ArgumentError(argument, value, "at least 0 is needed")
        total = 32 * GIB if memory is None else memory
        return cls(
            name=name or f"simulated {arch.lower()}",
            device_type="cpu" if number is None else "cuda",
            device_index=None if number is None else 0,
            capability=None if number is None else divmod(number, 10),
            sm_count=sm_count,
            total_memory=total,
            free_memory=int(total * 0.9) if free_memory is None else free_memory,
            cuda=None if number is None else cuda,
            packages=tuple(installed.items()),
            simulated=True,
        )

    @classmethod
    def named(cls, name: str) -> Self:
        """One of the machines in `NAMED`, with everything installed that its GPU can use.

        Raises:
            UnknownNameError: not one of them.
        """
        if not isinstance(name, str) or name not in NAMED:
            raise UnknownNameError("environment", name, NAMED)
        arch, title, sm_count, memory = NAMED[name]
        return cls.simulate(arch, name=f"{title} (simulated)", sm_count=sm_count, memory=memory)


NAMED: Mapping[str, tuple[str, str, int | None, int]] = {
    "a100": ("sm80", "NVIDIA A100 80GB", 108, 80 * GIB),
    "l40s": ("sm89", "NVIDIA L40S", 142, 48 * GIB),
    "rtx4090": ("sm89", "NVIDIA GeForce RTX 4090", 128, 24 * GIB),
    "h100": ("sm90", "NVIDIA H100 SXM", 132, 80 * GIB),
    "h200": ("sm90", "NVIDIA H200", 132, 141 * GIB),
    "b200": ("sm100", "NVIDIA B200", 148, 180 * GIB),
    "rtx5090": ("sm120", "NVIDIA GeForce RTX 5090", 170, 32 * GIB),
    "cpu": ("cpu", "CPU", None, 32 * GIB),
}
"""arch, name, SMs, memory in bytes: from the vendors' data sheets."""


@lru_cache(maxsize=4096)
def in_range(version: str, specifier: str) -> bool:
    """Whether `version` lies in a range such as '>=2.6,<2.8.4'. Local parts ('+cu130') do not count."""
    try:
        return SpecifierSet(specifier).contains(Version(version).public, prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return False


def _checked_version(package: str, version: Any) -> str | None:
    if version is None:
        return None
    try:
        return str(Version(version))
    except (InvalidVersion, TypeError):
        raise ArgumentError(
            f"packages[{package!r}]", version, "a version such as '2.8.3' is needed, or None for 'not installed'"
        ) from None


@cache
def _detect(device_type: str, index: int | None) -> Environment:
    packages = tuple((p, _installed(p)) for p in PACKAGES)
    if device_type == "cuda" and torch.version.hip is None:
        properties = torch.cuda.get_device_properties(index)
        return Environment(
            name=properties.name,
            device_type="cuda",
            device_index=index,
            capability=(properties.major, properties.minor),
            sm_count=properties.multi_processor_count,
            total_memory=properties.total_memory,
            free_memory=_free_memory("cuda", index),
            cuda=torch.version.cuda,
            packages=packages,
        )
    import psutil

    return Environment(
        name="CPU" if device_type == "cpu" else device_type,
        threads=torch.get_num_threads(),
        device_type=device_type,
        device_index=index,
        total_memory=psutil.virtual_memory().total if device_type == "cpu" else None,
        free_memory=_free_memory(device_type, index),
        packages=packages,
    )


def _installed(package: str) -> str | None:
    if package == "torch":
        return torch.__version__
    if package == "cudnn":
        return _cudnn_version()
    for distribution in (package, "pytorch-triton") if package == "triton" else (package,):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def _cudnn_version() -> str | None:
    """libcudnn's version as torch has loaded it: 91900 is 9.19.0 (before version 9: 8907 is 8.9.7)."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    number = torch.backends.cudnn.version()
    if not number:
        return None
    major = 10000 if number >= 90000 else 1000
    return f"{number // major}.{number % major // 100}.{number % 100}"


def _free_memory(device_type: str, index: int | None) -> int | None:
    """Bytes a new allocation could get, torch's own cached but unused blocks included."""
    if device_type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    if device_type == "cuda":
        free, _ = torch.cuda.mem_get_info(index)
        # Asked once: torch.cuda.memory_reserved and memory_allocated write out and sort all that is known, each.
        stats = torch.cuda.memory_stats_as_nested_dict(index)
        reserved, allocated = (stats.get(n, {}).get("all", {}) for n in ("reserved_bytes", "allocated_bytes"))
        return int(free + reserved.get("current", 0) - allocated.get("current", 0))
    return None


on_forget: list[Callable[[], None]] = []
"""Called when the machine and its packages are to be looked at again."""


def forget() -> None:
    """Drop what was probed, so that the next call looks again."""
    _detect.cache_clear()
    for also in on_forget:
        also()
