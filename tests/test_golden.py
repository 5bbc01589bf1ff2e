"""The reviewed decisions of golden/decisions.csv: a machine and a call, and the backend that is right there.

Columns: `packages` changes the machine's ("flash-attn-3=" is not installed); an empty heads_kv, seqlen_kv, head_dim_v
or dtype is its query twin or bf16; `options` and `overrides` are words ("window=1023:0", "backend=triton",
"ATTNRT_PREFER=torch"; lists by ";"). `backend` has its kernel in brackets, or is "none". `rules` must refuse.
"""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import attnrt
from attnrt.environment import NAMED, Environment

TABLE = Path(__file__).parent / "golden" / "decisions.csv"
with TABLE.open(newline="") as file:
    ROWS = {f"line{number}": row for number, row in enumerate(csv.DictReader(file), start=2)}


pytestmark = pytest.mark.usefixtures("fresh")


def machine(name: str, packages: str) -> Environment:
    changes = dict(entry.split("=") for entry in packages.split(";") if entry)
    found = Environment.named(name) if name in NAMED else Environment.simulate(name)
    return Environment.simulate(
        found.arch,
        packages=dict(found.packages) | {package: version or None for package, version in changes.items()},
        name=found.name,
        sm_count=found.sm_count,
        memory=found.total_memory,
    )


def call(row: dict[str, str]) -> dict[str, Any]:
    sizes = ("batch", "heads_q", "heads_kv", "seqlen_q", "seqlen_kv", "head_dim", "head_dim_v")
    shape: dict[str, Any] = {name: int(row[name]) for name in sizes if row[name]}
    shape["dtype"] = row["dtype"] or "bf16"
    for word in row["options"].split():
        name, _, value = word.partition("=")
        match name:
            case "window":
                left, right = value.split(":")
                shape["window"] = (int(left) if left else None, int(right) if right else None)
            case "bias":
                shape["bias"] = tuple(map(int, value.split("x"))) if value else True
            case "bias_grad":
                shape = {"bias": True, **shape, "bias_grad": True}
            case "softcap":
                shape["softcap"] = float(value)
            case "dropout":
                shape["dropout_p"] = float(value)
            case "alignment":
                shape["alignment"] = value
            case _:
                shape[name] = True
    return shape


@pytest.mark.parametrize("line", ROWS)
def test_decision(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = ROWS[line]
    overrides = dict(word.split("=", 1) for word in row["overrides"].split())
    for name in [name for name in overrides if name.isupper()]:
        monkeypatch.setenv(name, overrides.pop(name))
    inside = {name: overrides.pop(name).split(";") for name in ("prefer", "disable") if name in overrides}
    with attnrt.override(**inside):
        decision = attnrt.explain_shape(
            environment=machine(row["environment"], row["packages"]), **call(row), **overrides
        )
    shown = f"\n{line}: {row}\n{decision}"
    assert row["backend"] in (decision.label, decision.backend or "none"), shown
    for backend, rule in (entry.split(":") for entry in row["rules"].split()):
        assert rule in {reason.rule for reason in decision.verdicts[backend].reasons}, f"{backend} lacks {rule}{shown}"


def test_table_is_whole() -> None:
    """Every named machine, no row twice, and nothing in the columns that the reader above would skip."""
    rows = list(ROWS.values())
    assert len(rows) >= 160
    assert set(NAMED) <= {row["environment"] for row in rows}
    repeated = [row for row, count in Counter(tuple(list(row.values())[:12]) for row in rows).items() if count > 1]
    assert not repeated
    assert all(None not in row and row["note"] for row in rows)
