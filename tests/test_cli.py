"""The command line: what it prints, in which form, and with which exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import Command
from typer.testing import CliRunner

import attnrt
from attnrt import cli, registry
from attnrt.environment import NAMED
from attnrt.matrix import ARCHS, PROBES
from attnrt.schema import ReportModel
from attnrt.settings import NAMES

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def attnrt_command(fresh: None, command: Command) -> Command:
    """The console script, in this process, without any variable of ours."""
    return command


# ---- explain


def test_explain_is_the_report_of_explain_shape(attnrt_command: Command) -> None:
    code, out, err = attnrt_command("explain --arch h100 --heads 32 --kv-heads 8 --seqlen 8192 --causal --training")
    shape: dict[str, Any] = {"heads_q": 32, "heads_kv": 8, "seqlen_q": 8192, "head_dim": 128}
    decision = attnrt.explain_shape(batch=1, causal=True, training=True, environment="h100", **shape)
    assert (code, err) == (0, "")
    assert out == f"{decision}\n"


OPTIONS: dict[str, dict[str, Any]] = {
    "--batch 3 --heads 8 --kv-heads 2 --seqlen 64 --kv-seqlen 128": {
        "batch": 3,
        "heads_q": 8,
        "heads_kv": 2,
        "seqlen_q": 64,
        "seqlen_kv": 128,
    },
    "--head-dim 192 --head-dim-v 128": {"head_dim_qk": 192, "head_dim_v": 128},
    "--dtype fp16 --layout sbhd": {"dtype": "fp16", "layout": "sbhd"},
    "--window 1023,": {"window": [1023, None], "left": 1023, "right": None},
    "--window ,7": {"window": [None, 7], "left": None, "right": 7},
    "--causal --window 1023,0": {"causal": True, "left": 1023, "right": 0},
    "--causal --kv-seqlen 8192 --alignment bottom_right": {"alignment": "bottom_right"},
    "--training": {"needs_grad": True},
    "--packed": {"layout": "thd"},
    "--padded": {"padded_q": True, "padded_kv": True},
    "--padded-kv": {"padded_q": False, "padded_kv": True},
    "--softcap 30 --sinks --return-lse": {"softcap": 30.0, "sinks": True, "needs_lse": True},
    "--dropout 0.25 --training --deterministic": {"dropout_p": 0.25, "deterministic": True},
    "--alibi --causal": {"alibi": "heads"},
}


@pytest.mark.parametrize(("options", "expected"), OPTIONS.items(), ids=OPTIONS)
def test_every_option_reaches_the_request(attnrt_command: Command, options: str, expected: dict[str, Any]) -> None:
    _, out, _ = attnrt_command(f"explain --arch sm90 --json {options}")
    request = json.loads(out)["request"]
    assert {name: request[name] for name in expected} == expected


def test_masks_and_biases_reach_the_request(attnrt_command: Command) -> None:
    def asked(options: str) -> dict[str, Any]:
        return json.loads(attnrt_command(f"explain --arch sm90 --json {options}").out)["request"]

    plain = asked("")
    assert plain["mask"] is None and plain["bias"] is None
    assert asked("--mask")["mask"] is not None
    assert asked("--bias --training")["bias"]["requires_grad"] is False
    assert asked("--bias-grad --training")["bias"]["requires_grad"] is True


def test_explain_json(attnrt_command: Command) -> None:
    code, out, _ = attnrt_command("explain --arch h100 --softcap 30 --json")
    report = ReportModel.model_validate_json(out)
    assert code == 0 and report.backend == "flash_attn_3"
    assert json.loads(out)["schema"] == 1
    assert {v.backend for v in report.verdicts} == set(registry.backends())


def test_explain_markdown(attnrt_command: Command) -> None:
    code, out, _ = attnrt_command("explain --arch h100 --markdown")
    shape: dict[str, Any] = {"batch": 1, "heads_q": 32, "seqlen_q": 4096, "head_dim": 128}
    assert code == 0
    assert out == attnrt.explain_shape(environment="h100", **shape).to_markdown() + "\n"


def test_explain_here(attnrt_command: Command) -> None:
    code, out, _ = attnrt_command("explain --dtype fp32 --json")
    assert code == 0 and json.loads(out)["environment"]["simulated"] is False


@pytest.mark.parametrize("name", [*NAMED, "sm80", "sm90", "sm_90", "sm90a", "sm103", "SM120"])
def test_arch(attnrt_command: Command, name: str) -> None:
    code, out, _ = attnrt_command(f"explain --arch {name} --json")
    environment = json.loads(out)["environment"]
    wanted = NAMED[name][0] if name in NAMED else name.lower().replace("_", "").rstrip("a")
    assert code == 0 and environment["arch"] == wanted and environment["simulated"]
    if name in NAMED:
        assert environment["name"].startswith(NAMED[name][1])


def test_package(attnrt_command: Command) -> None:
    def packages(options: str) -> dict[str, str | None]:
        return json.loads(attnrt_command(f"explain --arch h100 --json {options}").out)["environment"]["packages"]

    assert packages("--package cudnn=9.10.1 --package flash-attn-3=") == packages("") | {
        "cudnn": "9.10.1",
        "flash-attn-3": None,
    }
    _, out, _ = attnrt_command("explain --arch h100 --package flash-attn-3= --backend flash_attn_3 --markdown")
    assert "FA3_INSTALLED" in out


def test_backend_and_policy(attnrt_command: Command, tmp_path: Path) -> None:
    assert json.loads(attnrt_command("explain --arch h100 --backend triton --json").out)["forced"] == "triton"
    assert json.loads(attnrt_command("explain --arch h100 --policy no_vendor --json").out)["policy"] == "no_vendor"
    file = tmp_path / "mine.yaml"
    file.write_text("name: mine\ndescription: mine\nlines:\n  - {name: all, prefer: [triton], why: because}\n")
    found = json.loads(attnrt_command(f"explain --arch h100 --policy {file} --json").out)
    assert (found["backend"], found["evidence"]) == ("triton", "because")


# ---- exit codes


def test_1_when_nothing_serves(attnrt_command: Command) -> None:
    code, out, err = attnrt_command("explain --arch h100 --backend cudnn --softcap 30")
    assert (code, err) == (1, "")
    assert out.startswith("choice    none\n") and "CUDNN_SOFTCAP" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("explain --arch h1000", ("environment='h1000'", "h100", "b200")),
        ("explain --arch sm9", ("arch='sm9'", "sm90")),
        ("explain --window 3", ("--window='3'", "LEFT,RIGHT")),
        ("explain --package torch=2.11.0", ("--package", "--arch")),
        ("explain --arch h100 --package torch", ("--package='torch'", "name=version")),
        ("explain --arch h100 --package tritn=3.6.0", ("tritn", "triton")),
        ("explain --arch h100 --package cudnn=nine", ("cudnn", "nine")),
        ("explain --backend cudn", ("backend='cudn'", "cudnn")),
        ("explain --policy defalt", ("defalt", "default")),
        ("explain --dtype int8", ("dtype='int8'", "bf16")),
        ("explain --heads 32 --kv-heads 5", ("32", "5")),
        ("explain --causal --kv-seqlen 8192", ("alignment=None", "top_left", "bottom_right")),
        ("report --arch h1000", ("environment='h1000'",)),
        ("matrix --write no-such-folder", ("--write='no-such-folder'", "existing folder")),
        ("explain --method ring", ("--method='ring'", "--ranks")),
        ("explain --placement zigzag", ("--placement='zigzag'", "--ranks")),
        ("explain --link pcie", ("--link='pcie'", "--ranks")),
        ("explain --per-host 4", ("--per-host=4", "--ranks")),
        ("explain --json --markdown", ("--markdown", "--json")),
        ("doctor --no-run --json --markdown", ("--markdown", "--json")),
        ("bench --causal", ("--causal", "--seqlen")),
        ("bench --with nonsense", ("--with", "--seqlen")),
        ("bench --seqlen 64 --budget -1", ("--budget=-1", "0 on")),
        ("bench --seqlen 64 --seconds -1", ("--seconds=-1", "0 on")),
        ("tune --dtype fp16", ("--dtype='fp16'", "--seqlen")),
        ("warmup --file w.yaml --training", ("--training", "--seqlen")),
        ("doctor --device cuda:7", ("device='cuda:7'", "that exists")),
        ("bench --device cuda:7", ("device='cuda:7'", "that exists")),
    ],
)
def test_2_and_one_line_for_bad_input(attnrt_command: Command, arguments: str, words: tuple[str, ...]) -> None:
    code, out, err = attnrt_command(arguments)
    assert (code, out) == (2, "")
    assert err.startswith("attnrt: ") and err.count("\n") == 1
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ("explain --no-such-option", "--no-such-option"),
        ("explain --batch many", "--batch"),
        ("explian", "explian"),
        ("explain extra", "extra"),
    ],
)
def test_2_for_what_is_no_option(attnrt_command: Command, arguments: str, word: str) -> None:
    code, out, err = attnrt_command(arguments)
    assert (code, out) == (2, "") and word in err


def test_2_for_a_bad_variable(attnrt_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_BACKEND", "cudn")
    code, out, err = attnrt_command("report")
    assert (code, out) == (2, "") and "ATTNRT_BACKEND='cudn'" in err


# ---- report


def test_report(attnrt_command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_PREFER", "triton")
    code, out, err = attnrt_command("report --arch h100")
    assert (code, err) == (0, "")
    assert re.search(rf"^attnrt +{re.escape(attnrt.__version__)}$", out, re.MULTILINE)
    assert "NVIDIA H100 SXM (simulated) sm90" in out and "flash-attn-3 3.0.0" in out
    assert "prefer triton (by ATTNRT_PREFER)" in out
    assert all(f"\n{name} " in out for name in cli.COMMON)
    assert "preferred by ATTNRT_PREFER" in out


def test_report_json(attnrt_command: Command) -> None:
    code, out, _ = attnrt_command("report --arch h100 --package flash-attn-3= --json")
    found = json.loads(out)
    assert code == 0
    assert list(found) == [
        *("schema", "attnrt", "environment", "policy", "cache_dir", "backends", "overrides", "choices")
    ]
    assert (found["schema"], found["attnrt"]) == (1, attnrt.__version__)
    assert found["environment"]["packages"]["flash-attn-3"] is None
    assert found["policy"]["name"] == "default"
    assert set(found["backends"]) == set(registry.backends())
    for name, backend in registry.backends().items():
        assert found["backends"][name] == {"built": backend.built, "family": backend.family}
    assert list(found["choices"]) == list(cli.COMMON)
    for choice in found["choices"].values():
        assert set(choice) == {"backend", "kernel", "why", "line", "evidence"}
        assert choice["backend"] in registry.backends() and choice["why"] and choice["evidence"]


def test_report_here(attnrt_command: Command) -> None:
    code, out, _ = attnrt_command("report")
    assert code == 0 and f"torch {attnrt.Environment.detect().version('torch')}" in out
    assert re.search(r"^can run +(.*, )?torch\b", out, re.MULTILINE)


# ---- matrix


def test_matrix_json(attnrt_command: Command) -> None:
    code, out, _ = attnrt_command("matrix --json")
    found = json.loads(out)
    assert code == 0 and list(found) == ["schema", "matrix"] and found["schema"] == 1
    assert list(found["matrix"]) == list(registry.backends())
    for rows in found["matrix"].values():
        assert list(rows) == list(PROBES)
        for cells in rows.values():
            assert list(cells) == list(ARCHS)
            assert all(cell.split(" (")[0] in ("yes", "forward", "no") for cell in cells.values())
    assert found["matrix"]["reference"]["sinks"]["sm90"] == "yes"
    assert found["matrix"]["cudnn"]["softcap"]["sm90"] == "no"


def test_matrix_and_the_committed_docs(attnrt_command: Command, tmp_path: Path) -> None:
    code, out, _ = attnrt_command(f"matrix --write {tmp_path}")
    assert code == 0
    written = {file.name: file.read_text() for file in tmp_path.iterdir()}
    assert set(written) == {"matrix.md", "rules.md", "context_parallel.md", "report.schema.json"}
    assert [line.split()[0] for line in out.splitlines()] == ["wrote"] * 4
    for name, text in written.items():
        assert text == (ROOT / "docs" / name).read_text(), f"docs/{name} is not what the program gives: run make docs"
    assert attnrt_command("matrix").out == written["matrix.md"]


# ---- the rest


def test_version_and_help(attnrt_command: Command) -> None:
    assert attnrt_command("--version") == (0, f"{attnrt.__version__}\n", "")
    code, out, _ = attnrt_command("--help")
    assert code == 0 and all(name in out for name in ("report", "explain", "matrix", "--install-completion"))


def test_shell_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    script = CliRunner().invoke(cli.app, ["--show-completion", "bash"], prog_name="attnrt")
    assert script.exit_code == 0 and "_ATTNRT_COMPLETE=complete_bash" in script.output
    typed = {"_ATTNRT_COMPLETE": "complete_bash", "COMP_CWORD": "3"}
    arch = CliRunner().invoke(cli.app, [], prog_name="attnrt", env={**typed, "COMP_WORDS": "attnrt explain --arch rtx"})
    assert arch.output.split() == [name for name in NAMED if name.startswith("rtx")]
    backend = CliRunner().invoke(
        cli.app, [], prog_name="attnrt", env={**typed, "COMP_WORDS": "attnrt explain --backend flash"}
    )
    assert backend.output.split() == [name for name in registry.names() if name.startswith("flash")]


@pytest.mark.parametrize(("arguments", "code"), [("explain --arch a100 --json", 0), ("explain --arch nothing", 2)])
def test_as_a_process(arguments: str, code: int, tmp_path: Path) -> None:
    environ = {n: v for n, v in os.environ.items() if n not in NAMES}
    done = subprocess.run(
        [sys.executable, "-m", "attnrt.cli", *arguments.split()],
        cwd=tmp_path,
        env={**environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code
    if code:
        assert done.stdout == "" and done.stderr.startswith("attnrt: environment='nothing'")
    else:
        assert done.stderr == "" and json.loads(done.stdout)["environment"]["arch"] == "sm80"
