"""benchmarks/gpu.py: what becomes of steps that fail, hang, or find no time; on steps that need no GPU."""

from __future__ import annotations

import contextlib
import json
import runpy
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "gpu.py"
FACTS = {"date": "2026-11-20T12:00:00+00:00", "commit": "abc", "machine": {"driver": "580", "torch": "2.11"}}


@pytest.fixture(scope="module")
def gpu() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="gpu")


def step(gpu: dict[str, Any], name: str, code: str, limit: float = 60, **more: Any) -> Any:
    return gpu["Step"](name, ("-c", code), 1, limit, **more)


def test_every_step_is_recorded_and_none_hides(gpu: dict[str, Any], tmp_path: Path) -> None:
    steps = [
        step(gpu, "bad", "print('1 passed, 2 failed'); raise SystemExit(5)"),
        step(gpu, "good", "open(r'{out}/figures.json', 'w').write('[]'); print('done in {seconds} s')"),
        step(gpu, "absent", "", needs=("no_module_of_that_name",)),
        step(gpu, "dies", "import os; os.abort()"),
    ]
    results = gpu["run"](steps, tmp_path, FACTS)
    assert [(r.name, r.status, r.code) for r in results] == [
        ("bad", "failed", 5),
        ("good", "passed", 0),
        ("absent", "not here", None),
        ("dies", "failed", -6),
    ]
    assert gpu["exit_code"](results) == 1 and gpu["exit_code"](results[1:3]) == 0
    kept = json.loads((tmp_path / "results.json").read_text())
    assert kept["commit"] == "abc" and [s["status"] for s in kept["steps"]] == [r.status for r in results]
    assert kept["steps"][0]["said"] == "1 passed, 2 failed" and kept["steps"][1]["tail"].startswith("done in ")
    assert (tmp_path / "figures.json").read_text() == "[]" and "done in" in (tmp_path / "good.txt").read_text()
    assert "| bad | failed | 5 |" in (tmp_path / "summary.md").read_text()


def test_one_at_its_limit_is_asked_to_end_and_keeps_what_it_had(
    gpu: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gpu["run_step"].__globals__, "LEAST", 0.0)
    monkeypatch.setitem(gpu["wait"].__globals__, "GRACE", 5.0)
    polite = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('3 passed so far')"
    # Deaf, and with a child of its own that must not outlive it.
    deaf = (
        "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)']).pid, flush=True); time.sleep(99)"
    )
    # On a busy machine Python has taken 3 s to come as far as these scripts.
    results = gpu["run"]([step(gpu, "polite", polite, 10.0), step(gpu, "deaf", deaf, 5.0)], tmp_path, FACTS)
    assert [r.status for r in results] == ["stopped"] * 2 and results[0].said == "3 passed so far"
    assert all(r.seconds < 30 for r in results) and gpu["exit_code"](results) == 3
    child = Path(f"/proc/{results[1].tail.strip()}/stat")
    for _ in range(100):  # it was sent its signal
        with contextlib.suppress(OSError):
            if child.read_text().rpartition(")")[2].split()[0] != "Z":
                time.sleep(0.1)
                continue
        return
    raise AssertionError("the child of a step that was killed lives on")


def test_tests_that_were_not_begun_are_no_success(gpu: dict[str, Any], tmp_path: Path) -> None:
    """As tests/gpu/conftest.py skips them."""
    said = "print('SKIPPED [9] conftest.py:38: 240 s are over'); print('3 passed, 9 skipped')"
    (found,) = gpu["run"]([step(gpu, "tests", said)], tmp_path, FACTS)
    assert found.status == "stopped" and found.said == "3 passed, 9 skipped"


def test_the_time_is_shared_in_order_of_worth(gpu: dict[str, Any], tmp_path: Path) -> None:
    """What a step leaves is the others'."""
    steps = [step(gpu, name, "pass", limit) for name, limit in (("a", 1e9), ("b", 30.0), ("c", 1e9))]
    a, b, c = gpu["run"](steps, tmp_path, FACTS, seconds=300)
    assert 90 <= a.limit <= 100 and b.limit == 30.0 and 250 <= c.limit <= 300
    (none,) = gpu["run"](steps[:1], tmp_path, FACTS, seconds=10)
    assert none.status == "not come to" and gpu["exit_code"]([none]) == 3


def test_steps_are_chosen_by_name(gpu: dict[str, Any]) -> None:
    assert [s.name for s in gpu["chosen"]("regret,tests")] == ["tests", "regret"]
    assert [s.name for s in gpu["chosen"](None)] == [s.name for s in gpu["STEPS"]]
    with pytest.raises(SystemExit, match="no step nothing; there are tests, "):
        gpu["chosen"]("tests,nothing")


def test_what_a_step_runs_is_there(gpu: dict[str, Any]) -> None:
    for one in gpu["STEPS"]:
        script = one.command[0]
        assert script == "-m" or (SCRIPT.parent.parent / script).is_file()
