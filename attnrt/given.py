"""The environment variables that are set, read by pydantic-settings: what `variables.plain_value` leaves to it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ByteSize, Field, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from attnrt import registry
from attnrt.errors import UnknownNameError


class Given(BaseSettings):
    """One field a variable, named as in `Variables`. Read by its alias alone: a variable named `report` is not ours."""

    model_config = SettingsConfigDict(env_ignore_empty=True, case_sensitive=True, extra="ignore", frozen=True)

    backend: str | None = Field(default=None, validation_alias="ATTNRT_BACKEND")
    prefer: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validation_alias="ATTNRT_PREFER")
    disable: Annotated[tuple[str, ...], NoDecode] = Field(default=(), validation_alias="ATTNRT_DISABLE")
    policy: str | None = Field(default=None, validation_alias="ATTNRT_POLICY")
    report: Literal["off", "once", "each"] = Field(default="off", validation_alias="ATTNRT_REPORT")
    cache_dir: Path | None = Field(default=None, validation_alias="ATTNRT_CACHE_DIR")
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
            if re.fullmatch(r"\s*\d*\.\d*\s*", value):
                raise ValueError("a part of a byte: is a unit missing")
            return (
                -1
                if value.strip().lower() == "unlimited"
                else int(TypeAdapter(ByteSize).validate_python(value.strip()))
            )
        return value

    @field_validator("cache_dir")
    @classmethod
    def _folder(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        try:
            value = value.expanduser()
            there = next((p for p in (value, *value.parents) if p.exists()), value)
        except (OSError, RuntimeError) as error:  # a name that is too long; "~nobody"
            raise ValueError(str(error).removesuffix(".")) from error
        if there.exists() and not there.is_dir():
            raise ValueError(f"{there} is not a folder")
        return value

    @field_validator("verify", mode="before")
    @classmethod
    def _switch(cls, value: Any) -> Any:
        if isinstance(value, str) and value.strip() not in ("0", "1"):
            raise ValueError("0 or 1 is needed")
        return value


def parse() -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """What os.environ gives, by field, and what is malformed in it, by variable."""
    try:
        found = Given()
    except ValidationError as error:
        malformed = []
        for entry in error.errors():
            name = str(entry["loc"][0])
            said = entry["msg"].removeprefix("Value error, ").removeprefix(f"{name}={os.environ.get(name)!r}: ")
            malformed.append((name, said))
        return {}, malformed
    return {name: getattr(found, name) for name in found.model_fields_set}, []
