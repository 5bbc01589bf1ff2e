"""benchmarks/regret.py: what it counts, and that it runs to its end."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnrt import registry
from attnrt.environment import Environment
from attnrt.evidence.calls import Call, tensors

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "regret.py"
CPU = Environment.detect("cpu")
BASE = Call(batch=2, heads_q=4, heads_kv=2, head_dim=16, seqlen_q=24, dtype="fp32", layout="bhsd")


@pytest.fixture(scope="module")
def regret() -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        return runpy.run_path(str(SCRIPT), run_name="regret")
    finally:
        sys.path.remove(str(SCRIPT.parent))


@pytest.mark.parametrize("grids", ["cpu_grids", "cuda_grids"])
def test_nothing_is_judged_that_was_learned(regret: dict[str, Any], grids: str) -> None:
    found = list(regret[grids](False))
    learned = {c.request() for grid in found for c in grid.learned}
    judged = {c.request() for grid in found for c in grid.judged}
    assert learned and judged and not learned & judged
    assert len({grid.name for grid in found}) > 8


@pytest.mark.parametrize(
    "changes", [{}, {"causal": True}, {"layout": "bshd"}, {"mask": True}, {"bias": True, "training": True}]
)
def test_pytorchs_own_choice_computes_the_same(regret: dict[str, Any], changes: dict[str, Any]) -> None:
    made = tensors(BASE.changed(**changes))
    run = regret["sdpa"](made.request)
    want = registry.backends()["reference"].prepare(made.request, CPU)
    torch.testing.assert_close(
        run(made.q, made.k, made.v, made.operands), want(made.q, made.k, made.v, made.operands), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "changes", [{"window": (3, 0)}, {"softcap": 2.0}, {"sinks": True}, {"padded": True}, {"layout": "sbhd"}]
)
def test_what_it_cannot_say(regret: dict[str, Any], changes: dict[str, Any]) -> None:
    assert regret["sdpa"](BASE.changed(**changes).request()) is None


def test_geometric_mean_and_worst(regret: dict[str, Any]) -> None:
    rows = [regret["Row"]("g", f"call {i}", "line", {}, regret={"default": x}) for i, x in enumerate((1.0, 4.0, 2.0))]
    found = regret["summaries"](rows)
    assert set(found) == {"all", "class g", "line line"}
    one = found["all"]["default"]
    assert (one.mean, one.worst, one.at, one.calls) == (pytest.approx(2.0), 4.0, "call 1", 3)
    assert "tuned" not in found["all"]


def test_it_runs(
    regret: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = regret["main"].__globals__
    grid = regret["Grid"]("tiny", (BASE, BASE.changed(seqlen_q=48)), (BASE.changed(seqlen_q=32),))
    monkeypatch.setitem(names, "cpu_grids", lambda quick: [grid])
    monkeypatch.setattr(
        sys, "argv", ["regret.py", "--device", "cpu", "--sample-seconds", "0.005", "--out", str(tmp_path)]
    )
    regret["main"]()
    result = json.loads((tmp_path / "regret.json").read_text())
    (row,) = result["rows"]
    assert set(row["regret"]) == {"default", "tuned", "F.scaled_dot_product_attention"}
    assert min(row["ms"][k] for k in row["ms"] if k in ("torch.flash_cpu", "torch.math", "reference")) > 0
    assert row["regret"]["tuned"] >= 1 and result["summary"]["all"]["tuned"]["calls"] == 1
    assert "tuned" in capsys.readouterr().out and (tmp_path / "tuned.yaml").read_text().endswith("end: true\n")
