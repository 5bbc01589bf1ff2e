"""The environment variables, parsed strictly: a malformed value or an unknown `ATTNRT_` name is an error.

A process's first call waits for this, and pydantic takes 100 ms to import: it reads only what could be malformed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from attnrt import registry
from attnrt.errors import VariableError, nearest
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


def _cache_dir() -> Path:
    from platformdirs import user_cache_path

    return user_cache_path("attnrt")


@dataclass(frozen=True, kw_only=True)
class Variables:
    """The values of every environment variable, parsed. The fields are named as the variables are."""

    backend: str | None = None
    prefer: tuple[str, ...] = ()
    disable: tuple[str, ...] = ()
    policy: str | None = None
    report: Literal["off", "once", "each"] = "off"
    cache_dir: Path = field(default_factory=_cache_dir)
    unfused_limit: int | None = None
    """Bytes; -1 for unlimited."""
    verify: bool = False
    nvte_flash_attn: int = 1
    nvte_fused_attn: int = 1
    nvte_unfused_attn: int = 1
    nvte_allow_nondeterministic_algo: int = 1

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
    """Read os.environ; an empty value is as good as none.

    Raises:
        VariableError: every malformed value and unknown `ATTNRT_` name, in one message.
    """
    ours = [name for name in NAMES if name.startswith("ATTNRT_")]
    problems = [
        f"{name} does not exist{nearest(name, ours)}; valid are {', '.join(ours)}"
        for name in sorted(os.environ)
        if name.startswith("ATTNRT_") and name not in NAMES
    ]
    given = {_field(name): plain_value(name, text) for name in VALUES if (text := os.environ.get(name))}
    if None in given.values():
        from attnrt.given import parse

        given, malformed = parse()
        problems += [f"{name}={os.environ.get(name)!r}: {said}; it takes {VALUES[name]}" for name, said in malformed]
    if problems:
        raise VariableError("; ".join(problems))
    return Variables(**given)


def _field(name: str) -> str:
    return name.removeprefix("ATTNRT_").lower()


_WORDS: dict[str, dict[str, Any]] = {
    "ATTNRT_REPORT": {word: word for word in ("off", "once", "each")},
    "ATTNRT_UNFUSED_LIMIT": {"0": 0, "unlimited": -1},
    "ATTNRT_VERIFY": {"0": False, "1": True},
}


def plain_value(name: str, text: str) -> Any:
    """What a variable's text means, as `given.parse` has it, where that is plain to see; else None, right or wrong."""
    match name:
        case "ATTNRT_CACHE_DIR":
            plain = text.isascii() and not text.startswith("~")
            return Path(text) if plain and os.path.isdir(text) else None
        case "ATTNRT_BACKEND":
            return text if text in registry.names() else None
        case "ATTNRT_PREFER" | "ATTNRT_DISABLE":
            valid = registry.names() if name == "ATTNRT_PREFER" else (*registry.names(), *registry.kernel_names())
            listed = tuple(text.split(","))
            return listed if set(listed) <= set(valid) else None
        case "ATTNRT_POLICY":
            from attnrt.policies.preference import policy_names

            return text if text in policy_names() else None
    return _WORDS.get(name, {"0": 0, "1": 1}).get(text)
