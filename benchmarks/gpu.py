"""`make gpu`: everything that needs an NVIDIA GPU, in one command: the tests, then the timings, into one result file.

    python benchmarks/gpu.py [--minutes 20] [--only tests,regret,...] [--quick] [--out gpu-results]

Uses the python that runs it: take the one that has the machine's CUDA build of torch. `--minutes` shares a time out
among the steps, in order of worth: each has its part of what is left, and is stopped at its end, with what it wrote by
then kept. Writes results.json and summary.md (device, driver, versions, commit, date; of each step the command, exit
code, seconds and last lines), and beside them each step's output and files. Exit code: 0 all went well, 1 a step
failed, 3 none failed and some were stopped or not come to.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (
    "torch",
    "filelock",
    "hypothesis",
    "matplotlib",
    "platformdirs",
    "psutil",
    "pydantic",
    "pydantic_settings",
    "pytest",
    "rich",
    "triton",
    "typer",
    "yaml",
)
LEAST = 20.0
"""Seconds: with less than that a step is not started."""
GRACE = 20.0
"""Seconds a step has to end after it was asked to, before it is killed."""
TAIL = 60
"""Lines of a step's output that the result file has."""
OVER = "s are over"
"""How a line ends by which tests/gpu tells of tests that it did not begin."""
WORKERS = 8
"""Test processes: the tests wait for compilers. Each holds a CUDA context."""


@dataclass(frozen=True)
class Step:
    """One command. {out}: the results' folder, {seconds}: what the step may take.

    Attributes:
        weight: its part of the time, beside the others'. limit: seconds in any case. quick: what --quick adds.
        needs: modules without which there is nothing to run.
    """

    name: str
    command: tuple[str, ...]
    weight: float
    limit: float
    quick: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


STEPS = (
    Step("tests", ("-m", "pytest", "tests/gpu", "-ra", "-q", "-p", "no:cacheprovider"), 6, 3600),
    Step("doctor", ("-m", "attnrt", "doctor", "--markdown"), 2, 600),
    Step(
        "regret",
        ("benchmarks/regret.py", "--device", "cuda", "--seconds", "{seconds}", "--out", "{out}/regret"),
        4,
        900,
        ("--quick",),
    ),
    Step(
        "kernels", ("benchmarks/kernels.py", "--seconds", "{seconds}", "--out", "{out}/kernels"), 4, 3600, ("--quick",)
    ),
    Step("cudnn", ("benchmarks/cudnn_sdpa.py", "--json", "{out}/cudnn.json"), 2, 1200, ("--quick",), ("cudnn",)),
    Step("flash", ("benchmarks/flash_attention.py", "--out", "{out}/flash_attn"), 2, 1200, ("--rounds", "20")),
    Step("tune", ("-m", "attnrt", "tune", "--budget", "{seconds}", "--output", "{out}/tuned.yaml"), 1, 240),
    Step(
        "bench",
        ("-m", "attnrt", "bench", "--budget", "{seconds}", "--out", "{out}/bench.json", "--plots", "{out}/plots"),
        1,
        300,
    ),
    Step("dispatch", ("benchmarks/dispatch.py", "--json", "{out}/dispatch.json"), 0.5, 300),
    Step("model", ("benchmarks/model.py", "--json", "{out}/model.json"), 1, 600, ("--no-compile",), ("transformers",)),
)
"""In order of worth, which is the order they run in."""

Status = Literal["passed", "failed", "stopped", "not come to", "not here"]


@dataclass
class Result:
    """What came of a step. `stopped`: it was at its limit."""

    name: str
    status: Status
    command: list[str]
    code: int | None = None
    seconds: float = 0.0
    limit: float | None = None
    said: str = ""
    """Why it did not run, or the line of its output that sums it up."""
    tail: str = ""


def versions() -> dict[str, Any]:
    """What a figure was seen on: device, driver, torch, packages."""
    import torch

    from attnrt.environment import Environment

    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True).stdout.split("\n")[0].strip()
    return {"environment": Environment.detect("cuda").to_dict(), "driver": driver, "torch": torch.__version__}


def commit() -> str | None:
    """The commit that is checked out, with "+changes" where files differ; None outside a repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    found = git("rev-parse", "HEAD")
    return None if found is None else found + ("+changes" if git("status", "--porcelain", "-uno") else "")


def run(
    steps: Sequence[Step], out: Path, facts: dict[str, Any], seconds: float | None = None, quick: bool = False
) -> list[Result]:
    """Run the steps in order, and write the results after each.

    Args:
        seconds: for all of them; None is no limit but each step's own. facts: what the result file says besides.
    """
    started = time.monotonic()
    results: list[Result] = []
    for i, step in enumerate(steps):
        limit = step.limit
        if seconds is not None:
            share = step.weight / sum(later.weight for later in steps[i:])
            limit = min(limit, share * (seconds - (time.monotonic() - started)))
        print(f"--- {step.name}: {limit:.0f} s at most", flush=True)
        results.append(run_step(step, out, limit, quick))
        print(f"{results[-1].tail}\n--- {step.name}: {results[-1].status} {results[-1].said}", flush=True)
        write(out, results, facts | {"seconds": round(time.monotonic() - started, 1), "quick": quick})
    return results


def run_step(step: Step, out: Path, limit: float, quick: bool) -> Result:
    # What bounds its own time ends by itself, with its summary.
    filled = {"out": str(out), "seconds": f"{max(0.0, 0.9 * limit - 10):.0f}"}
    command = [sys.executable, *(part.format(**filled) for part in (*step.command, *(step.quick if quick else ())))]
    if missing := [m for m in step.needs if importlib.util.find_spec(m) is None]:
        return Result(step.name, "not here", command, said=f"{', '.join(missing)} is not installed")
    if limit < LEAST:
        return Result(step.name, "not come to", command, limit=round(limit, 1), said="no time is left for it")
    if step.name == "tests" and importlib.util.find_spec("xdist") is not None:
        command += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 2) // 2))), "--dist", "worksteal"]
    log = out / f"{step.name}.txt"
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
    environment["GPU_TEST_SECONDS"] = filled["seconds"]
    started = time.monotonic()
    with log.open("w") as output:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        code = wait(process, limit)
    seconds = round(time.monotonic() - started, 1)
    lines = log.read_text(errors="replace").splitlines()
    unfinished = code is None or (code == 0 and any(line.endswith(OVER) for line in lines))
    status: Status = "stopped" if unfinished else "passed" if code == 0 else "failed"
    tail = "\n".join(lines[-TAIL:])
    return Result(step.name, status, command, process.returncode, seconds, round(limit, 1), summed_up(lines), tail)


def wait(process: subprocess.Popen[bytes], limit: float) -> int | None:
    """The exit code; None where it had to be stopped: asked first, as by Ctrl-C, and then killed with its children."""
    code = None
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return code


def summed_up(lines: list[str]) -> str:
    """pytest's last line, or the last that says anything."""
    counts = [line for line in lines if re.search(r"\d+ (passed|failed|error|skipped)", line)]
    return next(iter(counts[-1:] or [line for line in lines if line.strip()][-1:]), "").strip(" =")[:200]


def write(out: Path, results: list[Result], facts: dict[str, Any]) -> None:
    content = {"schema": 1, **facts, "steps": [asdict(result) for result in results]}
    (out / "results.json").write_text(json.dumps(content, indent=1))
    (out / "summary.md").write_text(summary(results, facts))


def summary(results: Iterable[Result], facts: dict[str, Any]) -> str:
    here = facts.get("machine", {})
    environment = here.get("environment", {})
    packages = ", ".join(f"{n} {v}" for n, v in environment.get("packages", {}).items() if v)
    lines = [
        f"# On {environment.get('name', 'this machine')}, {facts.get('date', '')[:16]}",
        "",
        f"driver {here.get('driver')}, torch {here.get('torch')}; {packages}; commit {facts.get('commit')}",
        "",
        "| step | | exit code | seconds | of | |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        said = r.said.replace("|", "\\|")
        code, limit = ("" if x is None else x for x in (r.code, r.limit))
        lines.append(f"| {r.name} | {r.status} | {code} | {r.seconds:.0f} | {limit} | {said} |")
    return "\n".join(lines) + "\n"


def chosen(only: str | None) -> list[Step]:
    if only is None:
        return list(STEPS)
    names = [name.strip() for name in only.split(",")]
    known = {step.name: step for step in STEPS}
    if wrong := [name for name in names if name not in known]:
        sys.exit(f"--only {only}: no step {', '.join(wrong)}; there are {', '.join(known)}")
    return [step for step in STEPS if step.name in names]


def exit_code(results: Iterable[Result]) -> int:
    found = {result.status for result in results}
    return 1 if "failed" in found else 3 if found & {"stopped", "not come to"} else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "gpu-results")
    parser.add_argument("--minutes", type=float, help="in all; default: as long as it takes")
    parser.add_argument("--only", help=f"steps, with commas between: {','.join(step.name for step in STEPS)}")
    parser.add_argument("--quick", action="store_true", help="a dozen shapes instead of all")
    parser.add_argument("--commit", help="what is being run, where that is no repository")
    options = parser.parse_args()
    steps = chosen(options.only)
    if missing := [m for m in NEEDED if importlib.util.find_spec(m) is None]:
        sys.exit(
            f"{sys.executable} lacks {', '.join(missing)}: pip install -e '.[dev,bench,triton]', or carry the wheels"
        )
    import torch

    if not torch.cuda.is_available():
        sys.exit(
            f"{sys.executable} (torch {torch.__version__}) sees no NVIDIA GPU; GPU_PYTHON=... names another python"
        )
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": options.commit or commit(),
        "python": sys.version.split()[0],
        "machine": versions(),
    }
    seconds = None if options.minutes is None else 60 * options.minutes
    results = run(steps, out, facts, seconds, options.quick)
    print((out / "summary.md").read_text(), f"results in {out}", sep="\n")
    sys.exit(exit_code(results))


if __name__ == "__main__":
    main()
