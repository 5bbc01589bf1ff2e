"""The environment variables, parsed strictly: a malformed value or an unknown `ATTNRT_` name is an error."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from platformdirs import user_cache_path
from pydantic import ByteSize, Field, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

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


class Variables(BaseSettings):
    """The values of every environment variable, parsed."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True, case_sensitive=True, extra="ignore", frozen=True, populate_by_name=True
    )

    backend: str | None = Field(default=None, validation_alias="ATTNRT_BACKEND")
    prefer: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validation_alias="ATTNRT_PREFER")
    disable: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validation_alias="ATTNRT_DISABLE")
    policy: str | None = Field(default=None, validation_alias="ATTNRT_POLICY")
    report: Literal["off", "once", "each"] = Field(default="off", validation_alias="ATTNRT_REPORT")
    cache_dir: Path = Field(default_factory=lambda: user_cache_path("attnrt"), validation_alias="ATTNRT_CACHE_DIR")
    unfused_limit: int | None = Field(default=None, validation_alias="ATTNRT_UNFUSED_LIMIT")
    verify: bool = Field(default=False, validation_alias="ATTNRT_VERIFY")
    nvte_flash_attn: int = Field(default=1, validation_alias="NVTE_FLASH_ATTN")
    nvte_fused_attn: int = Field(default=1, validation_alias="NVTE_FUSED_ATTN")
    nvte_unfused_attn: int = Field(default=1, validation_alias="NVTE_UNFUSED_ATTN")
    nvte_allow_nondeterministic_algo: int = Field(default=1, validation_alias="NVTE_ALLOW_NONDETERMINISTIC_ALGO")

    @field_validator("prefer", "disable", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(n.strip() for n in value.split(",") if n.strip()) if isinstance(value, str) else value

    @field_validator("backend")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None:
            registry.check_name("ATTNRT_BACKEND", value)
        return value

    @field_validator("prefer", "disable")
    @classmethod
    def _all_known(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        for name in value:
            registry.check_name(f"ATTNRT_{info.field_name.upper()}", name, kernels=info.field_name == "disable")
        return value

    @field_validator("policy")
    @classmethod
    def _policy(cls, value: str | None) -> str | None:
        from attnrt.policies.preference import is_path, policy_names

        if value is not None and not is_path(value) and value not in policy_names():
            raise UnknownNameError("ATTNRT_POLICY", value, policy_names())
        return value

    @field_validator("unfused_limit", mode="before")
    @classmethod
    def _bytes(cls, value: Any) -> Any:
        if isinstance(value, str):
            return (
                -1
                if value.strip().lower() == "unlimited"
                else int(TypeAdapter(ByteSize).validate_python(value.strip()))
            )
        return value

    @field_validator("verify", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip() not in ("0", "1"):
            raise ValueError("0 or 1 is needed")
        return value

    @property
    def deterministic(self) -> bool:
        """`NVTE_ALLOW_NONDETERMINISTIC_ALGO=0`."""
        return self.nvte_allow_nondeterministic_algo == 0

    def disabled(self) -> list[tuple[str, str]]:
        """(name, what disabled it)."""
        found = [(name, "ATTNRT_DISABLE") for name in self.disable]
        for field, (source, targets) in _NVTE.items():
            if getattr(self, field) == 0:
                found += [(name, source) for name in targets]
        return found


def read_variables() -> Variables:
    """Parse os.environ.

    Raises:
        VariableError: every malformed value and unknown `ATTNRT_` name, in one message.
    """
    ours = [name for name in NAMES if name.startswith("ATTNRT_")]
    problems = [
        f"{name} does not exist{nearest(name, ours)}; valid are {', '.join(ours)}"
        for name in sorted(os.environ)
        if name.startswith("ATTNRT_") and name not in NAMES
    ]
    try:
        variables = Variables()
    except ValidationError as error:
        for entry in error.errors():
            name = str(entry["loc"][0])
            message = entry["msg"].removeprefix("Value error, ").removeprefix(f"{name}={os.environ.get(name)!r}: ")
            problems.append(f"{name}={os.environ.get(name)!r}: {message}; it takes {VALUES[name]}")
        raise VariableError("; ".join(problems)) from None
    if problems:
        raise VariableError("; ".join(problems))
    return variables
