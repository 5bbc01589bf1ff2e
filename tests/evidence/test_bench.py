"""`attnrt bench`, end to end on small calls: rows, files, pictures, and going on after a stop."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from figures import Fails, SlightlyWrong

import attnrt
from attnrt import runtime
from attnrt.environment import Environment
from attnrt.errors import ArgumentError
from attnrt.evidence.bench import Run, bench, default_calls
from attnrt.evidence.calls import Call, flops, traffic
from attnrt.evidence.ceiling import Ceiling
from attnrt.evidence.machine import machine_entry
from attnrt.evidence.results import Results, Row, duration, load_results, new_results, rate, title

CPU = Environment.detect("cpu")
BASE = Call(heads_q=4, heads_kv=2, head_dim=16, seqlen_q=32, dtype="fp32", layout="bhsd")
CEILING = Ceiling(tflops={"fp32": 0.1, "bf16": 1.0}, gbs=10.0)
TINY = "--heads 4 --kv-heads 2 --head-dim 16 --dtype fp32 --layout bhsd --seconds 0.005"


@pytest.fixture(autouse=True)
def ceiling(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not measured: that takes a second, and nothing here depends on it."""
    monkeypatch.setattr("attnrt.evidence.bench.measure_ceiling", lambda device, dtypes: CEILING)


def run(*calls: Call, **options: Any) -> Run:
    return bench(calls, CPU, runtime.settings(None, "default"), seconds=0.005, **options)


def test_rows() -> None:
    found = run(BASE.changed(training=True, causal=True))
    rows = {(r.kernel, r.direction): r for r in found.results.rows}
    kernels = ("torch.flash_cpu", "torch.math", "reference")
    assert set(rows) == {(k, d) for k in kernels for d in ("forward", "backward")}
    request = found.results.rows[0].call.request()
    for (_, direction), row in rows.items():
        assert row.ms and row.low_ms and row.high_ms and row.low_ms <= row.ms <= row.high_ms and row.samples >= 1
        assert row.tflops == pytest.approx(flops(request, direction) / row.ms / 1e9)
        assert row.gbs == pytest.approx(traffic(request, direction) / row.ms / 1e6)
        least = max(flops(request, direction) / 0.1e12, traffic(request, direction) / 10e9) * 1e3
        assert row.share == pytest.approx(least / row.ms) and row.bound in ("compute", "memory")
        assert row.peak_mib and row.host_us is None
    assert rows["reference", "forward"].peak_mib > rows["torch.flash_cpu", "forward"].peak_mib  # type: ignore[operator]


def test_wrong_and_failing_kernels_are_named_and_not_timed() -> None:
    attnrt.register_backend(SlightlyWrong())
    (row,) = [r for r in run(BASE).results.rows if r.kernel == "planted"]
    assert row.ms is None and "wrong: the output" in (row.note or "")
    (row,) = [r for r in run(BASE, check=False).results.rows if r.kernel == "planted"]
    assert row.ms is not None and row.note is None
    attnrt.register_backend(Fails())
    (row,) = [r for r in run(BASE).results.rows if r.kernel == "planted"]
    assert row.ms is None and "no such kernel image" in (row.note or "")


def test_going_on(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    calls = [BASE.changed(seqlen_q=n) for n in (16, 32, 64)]

    def stop(call: Call, done: bool) -> None:
        if not done and call.seqlen_q == 32:
            raise KeyboardInterrupt

    first = run(*calls, file=file, progress=stop)
    assert first.interrupted and first.left == calls[1:] and first.results.calls() == calls[:1]
    kept = file.read_text()
    second = run(*calls, file=file)
    assert not second.interrupted and second.results.calls() == calls
    assert second.results.rows[: len(first.results.rows)] == first.results.rows
    assert Results.model_validate_json(kept).rows == first.results.rows
    assert run(*calls, file=file).results.rows == second.results.rows
    assert run(*calls, file=file, fresh=True).results.rows != second.results.rows


def test_files_of_others_are_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    machine = machine_entry(CPU)
    new_results(machine.model_copy(update={"device": "Another Processor"})).save(file)
    with pytest.raises(ArgumentError, match="Another Processor"):
        load_results(file, machine)
    for text in ("", "{", "[]", '{"schema": 2}'):
        file.write_text(text)
        with pytest.raises(ArgumentError, match="no results file"):
            load_results(file, machine)
        assert file.read_text() == text


def test_json_and_csv_say_the_same() -> None:
    found = run(BASE, BASE.changed(seqlen_q=64)).results
    assert Results.model_validate_json(found.to_json()) == found
    assert json.loads(found.to_json())["schema"] == 1
    lines = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(lines) == len(found.rows)
    for line, row in zip(lines, found.rows, strict=True):
        assert (line["kernel"], int(line["seqlen_q"]), int(line["seqlen_kv"])) == (
            row.kernel,
            row.call.seqlen_q,
            row.call.seqlen_q,
        )
        assert float(line["ms"]) == pytest.approx(row.ms, rel=1e-5)


def test_the_command(command: Command, tmp_path: Path) -> None:
    table = tmp_path / "rows.csv"
    code, out, err = command(f"bench {TINY} --seqlen 16,32 --causal --csv {table} --backend torch")
    assert (code, err) == (0, "")
    assert "fp32 B1 H4/2 S16 D16 causal" in out and "GB/s" in out and "ceiling" in out
    assert "torch.math" in out and "reference" not in out
    assert len(table.read_text().splitlines()) == 5
    code, out, _ = command(f"bench {TINY} --seqlen 16 --json")
    assert code == 0 and len(json.loads(out)["rows"]) == 3
    code, out, _ = command(f"bench {TINY} --seqlen 16 --budget 0")
    assert code == 1 and "not measured: 1 calls (budget)" in out


def test_the_default_is_something() -> None:
    for environment in (CPU, Environment.named("h200")):
        calls = default_calls(environment)
        assert {c.training for c in calls} == {True, False} and any(c.seqlen_q == 1 for c in calls)
        assert all(title(c) for c in calls)


def made_up(results: Results) -> Results:
    """Two kernels on a GPU: prefill and decode, at four lengths."""
    rows = []
    for direction in ("forward", "backward"):
        for n in (1024, 2048, 4096, 8192):
            call = Call(heads_q=32, heads_kv=8, seqlen_q=n, causal=True, training=True)
            for i, kernel in enumerate(("cudnn", "triton.hopper")):
                ms = n * n / 1e7 * (1 + 0.2 * i * (n > 2048) - 0.1 * i)
                row = Row(
                    call=call, kernel=kernel, direction=direction, ms=ms, low_ms=ms * 0.97, high_ms=ms * 1.04, samples=9
                )
                request = call.request()
                rate = {"tflops": flops(request, direction) / ms / 1e9, "gbs": traffic(request, direction) / ms / 1e6}
                rows.append(
                    row.model_copy(update={**rate, "host_us": 30.0, "peak_mib": 64.0, "share": 0.5, "bound": "compute"})
                )
    for n in (4096, 16384):
        call = Call(heads_q=32, heads_kv=8, seqlen_q=1, seqlen_kv=n, batch=4)
        row = Row(
            call=call, kernel="cudnn", direction="forward", ms=n / 1e5, low_ms=n / 1.1e5, high_ms=n / 1e5, samples=9
        )
        rows.append(row.model_copy(update={"tflops": 4.0, "gbs": 3000.0, "bound": "memory", "share": 0.7}))
    ceiling = Ceiling(tflops={"bf16": 700.0}, gbs=4000.0)
    return results.with_rows(rows).model_copy(update={"ceiling": ceiling})


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    from attnrt.evidence.plots import write_plots

    files = write_plots(made_up(new_results(machine_entry(CPU))), tmp_path / "plots")
    assert [f.name for f in files] == ["throughput.png", "roofline.png", "winners.png"]
    for file in files:
        picture = imread(file)
        assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.02


def test_nothing_to_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from attnrt.evidence.plots import PlotUnavailable, write_plots

    with pytest.raises(PlotUnavailable, match="nothing to plot"):
        write_plots(new_results(machine_entry(CPU)), tmp_path)


def test_matplotlib_is_imported_for_plots_only() -> None:
    code = (
        "import sys; sys.argv = ['attnrt', *sys.argv[1:]]\nfrom attnrt.cli import main\n"
        "try: main()\nfinally: assert 'matplotlib' not in sys.modules, 'imported'"
    )
    arguments = f"bench {TINY} --seqlen 16 --no-check --backend reference --budget 0".split()
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True)
    assert done.returncode == 1 and "imported" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("ms", "said"), [(0.0123, "12.3 us"), (0.9999, "0.9999 ms"), (12.3456, "12.35 ms"), (4567.0, "4.567 s")]
)
def test_durations(ms: float, said: str) -> None:
    assert duration(ms) == said


def test_rates() -> None:
    row = Row(call=BASE, kernel="x", direction="forward", ms=1.0, tflops=512.25, gbs=1234.5, bound="compute")
    assert rate(row) == "512.2 TFLOP/s"
    assert rate(row.model_copy(update={"bound": "memory"})) == "1234 GB/s"
    assert rate(row.model_copy(update={"tflops": 0.05})) == "50 GFLOP/s"
