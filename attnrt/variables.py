"""The environment variables, parsed strictly: a malformed value or an unknown `ATTNRT_` name is an error.

Plain Python: the first call of a process waits for this, and pydantic alone would take it 100 ms to import.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from attnrt import registry
from attnrt.errors import UnknownNameError, VariableError, nearest
from attnrt.settings import NAMES

VALUES = {
    "ATTNRT_BACKEND": "one backend or family name; it runs or the call raises",
    "ATTNRT_PREFER": "comma list of names, tried first in that order",
    "ATTNRT_DISABLE": "comma list of names, families or kernels such as torch.cudnn",
    "ATTNRT_POLICY": "default, deterministic, no_vendor, tuned, measure, or the path of a YAML file",
    "ATTNRT_REPORT": "off, once or each",
    "ATTNRT_CACHE_DIR": "a directory",
    "ATTNRT_UNFUSED_LIMIT": "bytes such as 8GiB, 0 (never unfused) or unlimited",
    "ATTNRT_VERIFY": "0 or 1",
    "NVTE_FLASH_ATTN": "an integer; 0 disables flash_attn",
    "NVTE_FUSED_ATTN": "an integer; 0 disables cudnn and torch.cudnn",
    "NVTE_UNFUSED_ATTN": "an integer; 0 disables reference and torch.math",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "an integer; 0 asks for deterministic backward passes",
}
"""What each variable takes, for messages and for the README's table."""

_NVTE = {
    "nvte_flash_attn": ("NVTE_FLASH_ATTN=0", ("flash_attn",)),
    "nvte_fused_attn": ("NVTE_FUSED_ATTN=0", ("cudnn", "torch.cudnn")),
    "nvte_unfused_attn": ("NVTE_UNFUSED_ATTN=0", ("reference", "torch.math")),
}


def _names(variable: str, kernels: bool = False) -> Callable[[str], tuple[str, ...]]:
    def parse(value: str) -> tuple[str, ...]:
        found = tuple(n.strip() for n in value.split(",") if n.strip())
        for name in found:
            registry.check_name(variable, name, kernels=kernels)
        return found

    return parse


def _backend(value: str) -> str:
    registry.check_name("ATTNRT_BACKEND", value)
    return value


def _policy(value: str) -> str:
    from attnrt.policies.preference import is_path, policy_names

    if not is_path(value) and value not in policy_names():
        raise UnknownNameError("ATTNRT_POLICY", value, policy_names())
    return value


def _report(value: str) -> str:
    if value not in ("off", "once", "each"):
        raise ValueError("there is no such mode")
    return value


_SIZE = re.compile(r"([0-9]*\.?[0-9]+)\s*(?:([kmgtpe]?)(i?)b?)", re.IGNORECASE)


def _bytes(value: str) -> int:
    """-1 for unlimited."""
    if value.strip().lower() == "unlimited":
        return -1
    found = _SIZE.fullmatch(value.strip())
    if found is None or (found[3] and not found[2]):
        raise ValueError("that is no number of bytes")
    step = 1024 if found[3] else 1000
    return int(float(found[1]) * step ** " kmgtpe".index(found[2].lower() or " "))


def _switch(value: str) -> bool:
    if value.strip() not in ("0", "1"):
        raise ValueError("0 or 1 is needed")
    return value.strip() == "1"


def _integer(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise ValueError("that is no integer") from None


def _cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("attnrt")


def _from(name: str, parse: Callable[[str], Any]) -> dict[str, Any]:
    return {"name": name, "parse": parse}


@dataclass(frozen=True, kw_only=True)
class Variables:
    """The values of every environment variable, parsed."""

    backend: str | None = field(default=None, metadata=_from("ATTNRT_BACKEND", _backend))
    prefer: tuple[str, ...] = field(default=(), metadata=_from("ATTNRT_PREFER", _names("ATTNRT_PREFER")))
    disable: tuple[str, ...] = field(
        default=(), metadata=_from("ATTNRT_DISABLE", _names("ATTNRT_DISABLE", kernels=True))
    )
    policy: str | None = field(default=None, metadata=_from("ATTNRT_POLICY", _policy))
    report: Literal["off", "once", "each"] = field(default="off", metadata=_from("ATTNRT_REPORT", _report))
    cache_dir: Path = field(default_factory=_cache_dir, metadata=_from("ATTNRT_CACHE_DIR", Path))
    unfused_limit: int | None = field(default=None, metadata=_from("ATTNRT_UNFUSED_LIMIT", _bytes))
    verify: bool = field(default=False, metadata=_from("ATTNRT_VERIFY", _switch))
    nvte_flash_attn: int = field(default=1, metadata=_from("NVTE_FLASH_ATTN", _integer))
    nvte_fused_attn: int = field(default=1, metadata=_from("NVTE_FUSED_ATTN", _integer))
    nvte_unfused_attn: int = field(default=1, metadata=_from("NVTE_UNFUSED_ATTN", _integer))
    nvte_allow_nondeterministic_algo: int = field(
        default=1, metadata=_from("NVTE_ALLOW_NONDETERMINISTIC_ALGO", _integer)
    )

    @property
    def deterministic(self) -> bool:
        """`NVTE_ALLOW_NONDETERMINISTIC_ALGO=0`."""
        return self.nvte_allow_nondeterministic_algo == 0

    def disabled(self) -> list[tuple[str, str]]:
        """(name, what disabled it)."""
        found = [(name, "ATTNRT_DISABLE") for name in self.disable]
        for attribute, (source, targets) in _NVTE.items():
            if getattr(self, attribute) == 0:
                found += [(name, source) for name in targets]
        return found


def read_variables() -> Variables:
    """Parse os.environ; an empty value is as good as none.

    Raises:
        VariableError: every malformed value and unknown `ATTNRT_` name, in one message.
    """
    ours = [name for name in NAMES if name.startswith("ATTNRT_")]
    problems = [
        f"{name} does not exist{nearest(name, ours)}; valid are {', '.join(ours)}"
        for name in sorted(os.environ)
        if name.startswith("ATTNRT_") and name not in NAMES
    ]
    given: dict[str, Any] = {}
    for known in fields(Variables):
        name = known.metadata["name"]
        if not (value := os.environ.get(name)):
            continue
        try:
            given[known.name] = known.metadata["parse"](value)
        except ValueError as error:
            said = str(error).removeprefix(f"{name}={value!r}: ")
            problems.append(f"{name}={value!r}: {said}; it takes {VALUES[name]}")
    if problems:
        raise VariableError("; ".join(problems))
    return Variables(**given)
