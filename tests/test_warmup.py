"""`attnrt warmup`: what is compiled ahead, what is found again, and what there is to say where nothing compiles."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import attnrt
from attnrt import registry, runtime
from attnrt.backends.reference import Reference
from attnrt.cli import app
from attnrt.environment import Environment
from attnrt.errors import ArgumentError
from attnrt.evidence.calls import Call
from attnrt.request import AttentionRequest
from attnrt.warmup import Warmed, read_calls, warm

SMALL = {"heads_q": 2, "seqlen_q": 8, "head_dim": 16, "dtype": "fp32"}


class Compiler(Reference):
    """The reference, which leaves a file for each head dim and direction, as a compiler's cache would."""

    name = "compiler"
    compiles = True
    folder: Path | None = None
    calls: list[AttentionRequest]

    def disk_cache(self) -> Path | None:
        return self.folder

    def prepare(self, request: AttentionRequest, environment: Environment) -> Any:
        run = super().prepare(request, environment)
        if request.softcap is not None:
            raise RuntimeError("ptxas: too many registers\nmore of that")
        self.calls.append(request)
        if self.folder is not None and self.folder.exists():
            (self.folder / f"{request.head_dim}-{request.needs_grad}.o").touch()
        return run


@pytest.fixture
def compiler(tmp_path: Path) -> Iterator[Compiler]:
    backend = Compiler()
    backend.folder, backend.calls = tmp_path / "kept", []
    backend.folder.mkdir()
    attnrt.register_backend(backend)
    yield backend
    registry.unregister_backend(backend.name)


def warmed(*sizes: dict[str, Any], backend: str | None = None) -> list[Warmed]:
    calls = [Call(**(SMALL | s)) for s in sizes]
    return warm(calls, Environment.detect("cpu"), runtime.settings(backend, None))


def test_on_a_cpu_there_is_nothing_to_compile() -> None:
    (found,) = warmed({})
    assert (found.status, found.seconds, found.files) == ("nothing to compile", None, 0)
    assert found.kernel == attnrt.explain_shape(batch=1, **SMALL).label


def test_new_kernels_and_those_that_are_there(compiler: Compiler) -> None:
    found = warmed({}, {"seqlen_q": 9}, {"training": True}, {"head_dim": 32}, backend="compiler")
    assert [f.status for f in found] == ["new", "cached", "new", "new"]
    assert [f.files for f in found] == [1, 0, 1, 1]
    assert all(f.kernel == "compiler" and f.seconds is not None and f.seconds > 0 for f in found)
    assert [f.backward_seconds is not None for f in found] == [False, False, True, False]
    assert [r.needs_grad for r in compiler.calls] == [False, False, True, False]


@pytest.mark.parametrize("written", [True, False])
def test_a_cache_that_is_off_or_cannot_be_written(compiler: Compiler, written: bool) -> None:
    assert compiler.folder is not None
    compiler.folder = compiler.folder / "missing" if written else None
    (found,) = warmed({}, backend="compiler")
    assert found.status == "not kept"


def test_what_fails_or_is_refused_does_not_stop_the_rest(compiler: Compiler) -> None:
    failed, fine = warmed({"softcap": 5.0}, {}, backend="compiler")
    assert (failed.status, failed.said) == ("failed", "RuntimeError: ptxas: too many registers")
    assert fine.status == "new"
    (refused,) = warmed({}, backend="cudnn")
    assert refused.status == "refused" and "needs an NVIDIA GPU" in refused.said


def test_a_simulated_machine_is_refused() -> None:
    with pytest.raises(ArgumentError, match="is simulated; kernels are compiled where they will run"):
        warm([Call(**SMALL)], Environment.simulate("sm90"), runtime.settings(None, None))


# --- Files -------------------------------------------------------------------------------------------------------


def test_files_in_yaml_and_json(tmp_path: Path) -> None:
    entries = [SMALL, SMALL | {"causal": True, "window": [7, None], "training": True}]
    for name, text in (("a.json", json.dumps(entries)), ("a.yaml", "- {heads_q: 2, seqlen_q: 8, head_dim: 16}")):
        file = tmp_path / name
        file.write_text(text)
        calls = read_calls(file)
        assert calls[0].request().head_dim_qk == 16 and len(calls) == len(json.loads(text) if name == "a.json" else "1")
    assert read_calls(tmp_path / "a.json")[1].window == (7, None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a list of calls is needed"),
        ("heads_q: 2", "a list of calls is needed"),
        ("- 7", "entry 1.*a mapping.*not 7"),
        ("- {heads_q: 2, seqlen_q: 8}\n- {heads_q: 2, seqlen: 8}", "entry 2.*seqlen"),
        ("- {heads_q: 2, seqlen_q: 8, heads: 2}", "entry 1.*heads.*valid are batch, heads_q"),
        ("- {heads_q: 3, heads_kv: 2, seqlen_q: 8}", "entry 1.*must divide heads_q=3"),
        ("- {heads_q: 2, seqlen_q: 8, environment: h100}", "entry 1.*for this machine alone"),
        ("- {heads_q: 2,", "cannot be read"),
    ],
)
def test_files_that_cannot_be_right(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "calls.yaml"
    file.write_text(text)
    with pytest.raises(ArgumentError, match=said):
        read_calls(file)
    with pytest.raises(ArgumentError, match="cannot be read"):
        read_calls(tmp_path / "missing.yaml")


# --- The command -------------------------------------------------------------------------------------------------


@pytest.fixture
def command() -> Callable[..., Any]:
    return lambda *arguments: CliRunner().invoke(app, ["warmup", "--device", "cpu", *arguments], terminal_width=200)


SIZES = ("--heads", "2", "--seqlen", "8,16", "--head-dim", "16", "--dtype", "fp32")


def test_the_command_on_a_cpu(command: Callable[..., Any]) -> None:
    done = command(*SIZES)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("nothing to compile") == 2
    assert "what serves these calls is compiled already" in done.stdout


def test_the_command_for_a_named_backend(command: Callable[..., Any], compiler: Compiler) -> None:
    done = command(*SIZES, "--backend", "compiler", "--json")
    assert done.exit_code == 0, done.output
    first, second = json.loads(done.stdout)
    assert (first["status"], second["status"]) == ("new", "cached")
    assert first["call"]["seqlen_q"] == 8 and first["kernel"] == "compiler" and first["files"] == 1
    told = command(*SIZES, "--backend", "compiler", "--training").stdout
    assert "1 of 2 new" in told and "1 files kept" in told


def test_exit_code_1_where_a_call_is_refused(command: Callable[..., Any]) -> None:
    done = command(*SIZES, "--backend", "flash_attn_4")
    assert done.exit_code == 1 and "needs an NVIDIA GPU" in done.stdout


def test_the_command_reads_a_file_or_options(command: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "calls.json"
    file.write_text(json.dumps([SMALL]))
    assert command("--file", str(file)).stdout.count("nothing to compile") == 1
    for arguments, said in (((*SIZES, "--file", str(file)), "from a file or from options"), ((), "no call is given")):
        done = command(*arguments)
        assert isinstance(done.exception, ArgumentError) and said in str(done.exception)
