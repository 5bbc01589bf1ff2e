"""Puts this folder on the path, so that tests can import the modules they share (oracle, cases).

The cache directory is an empty one, so that what `attnrt tune` found on this machine changes no test.
"""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from command_line import Command, Printed

os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="attnrt-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable of attnrt's set before; no variable, backend, plan or demotion left behind."""
    import attnrt
    from attnrt import registry
    from attnrt.settings import NAMES

    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    before = set(registry.backends())
    attnrt.refresh()
    yield
    monkeypatch.undo()
    for name in set(registry.backends()) - before:
        attnrt.unregister_backend(name)
    attnrt.refresh()


@pytest.fixture
def cache(fresh: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`fresh`, and a cache directory of the test's own."""
    import attnrt

    monkeypatch.setenv("ATTNRT_CACHE_DIR", str(tmp_path))
    attnrt.refresh()
    return tmp_path


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """The console script, in this process."""
    from attnrt import cli

    def call(arguments: str) -> Printed:
        monkeypatch.setattr(sys, "argv", ["attnrt", *arguments.split()])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Printed(int(stop.value.code or 0), *capsys.readouterr())

    return call
