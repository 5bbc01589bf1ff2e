"""The JSON of a report, as a versioned schema: `attnrt matrix --write docs` writes docs/report.schema.json."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class ReasonModel(_Strict):
    """Why a backend was refused."""

    rule: str = Field(description="Stable id; docs/rules.md lists them.")
    message: str
    remedy: str | None


class WarningModel(_Strict):
    """A known defect that may touch the call."""

    id: str
    effect: str
    remedy: str | None
    source: str


class VerdictModel(_Strict):
    """What one backend can do with the call."""

    backend: str
    kernel: str | None = Field(description="Which of the backend's kernels, where it has several.")
    eligible: bool
    fused: bool = Field(description="False: the kernel holds the whole score matrix.")
    bytes: int = Field(description="Estimated peak extra memory of the call.")
    quadratic_bytes: int = Field(description="How much of it grows with Sq * Skv.")
    rank: int | None = Field(description="Place in the order of preference, 0 first; null: not in the policy.")
    reasons: list[ReasonModel]
    passed_over: list[ReasonModel] = Field(description="Why the backend's better kernels do not serve.")
    notes: list[str]
    warnings: list[WarningModel]


class OverrideModel(_Strict):
    """One thing the user asked for."""

    what: Literal["force", "prefer", "disable", "policy", "unfused_limit", "deterministic"]
    value: str
    source: str
    beaten_by: str | None


class ReportModel(_Strict):
    """A decision, version 1 of the schema. Keys are only added within a version."""

    schema_version: Literal[1] = Field(alias="schema")
    backend: str | None = Field(description="The winner; null: nothing, or not the forced backend, can serve.")
    kernel: str | None
    why: str
    policy: str
    line: str = Field(description="The line of the policy that ranked the backends.")
    evidence: str = Field(description="What that line rests on.")
    on_failure: Literal["raise", "next"]
    forced: str | None
    request: dict[str, Any]
    environment: dict[str, Any]
    overrides: list[OverrideModel]
    verdicts: list[VerdictModel] = Field(description="In order of rank.")
    notices: list[str] = Field(
        default=[], description="What the policy left out of account, and why; absent if nothing."
    )

    @model_serializer(mode="wrap")
    def _as_written(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """`notices` is left out where there is none, as a report leaves it out."""
        found: dict[str, Any] = fields(self)
        return found if self.notices else {name: value for name, value in found.items() if name != "notices"}


def schema_json() -> str:
    return json.dumps(ReportModel.model_json_schema(by_alias=True), indent=2) + "\n"
