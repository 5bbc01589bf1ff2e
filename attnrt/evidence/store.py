"""The tuned policies in the cache directory: found, read without trust, written by several processes at once.

One file for each device and set of versions. A write takes the lock, reads what is there, adds to it and replaces the
file whole, so that readers need no lock and a process that dies leaves the old file.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from attnrt import registry
from attnrt.environment import Environment
from attnrt.errors import ArgumentError, PolicyError
from attnrt.evidence.machine import file_name, here, machine_entry
from attnrt.evidence.ranks import job_store, said_by_rank_0
from attnrt.policies.base import Policy
from attnrt.policies.measured import Known, MeasuredPolicy, Table
from attnrt.policies.preference import on_forget
from attnrt.policies.tuned import BYTES, KindEntry, TunedFile, merged, parse, render

FOLDER = "tuned"
FILES = 64
"""Files looked at, at most."""
LOCK_SECONDS = 60.0
WAIT_SECONDS = (5.0, 30.0)
"""How long a rank waits for rank 0: without files of its own, and with some."""

_loaded: dict[tuple[str, Policy, bool], Policy] = {}


def forget() -> None:
    """Read the files again at the next call."""
    _loaded.clear()


registry.on_change.append(forget)
on_forget.append(forget)


def tuned_policy(cache_dir: Path, static: Policy, automatic: bool) -> Policy:
    """The figures in the cache directory over `static`, or `static` itself where there are none.

    A file that is damaged, too large or of another format is left out, and every report says so. In a job of several
    ranks the files of rank 0 serve all.

    Raises:
        PolicyError: not `automatic`, and there is no file that can be used.
    """
    key = (str(cache_dir), static, automatic)
    if key not in _loaded:
        texts, refused = _of_all_ranks(cache_dir)
        tables = []
        for file, text in texts.items():
            try:
                tables.append(parse(file, text).table(file))
            except PolicyError as error:
                refused.append(f"refused: {error}")
        if not tables and not automatic:
            said = "; ".join(("holds no tuned policy that can be used; run `attnrt tune`", *refused))
            raise PolicyError(str(cache_dir / FOLDER), None, said)
        _loaded[key] = static if not tables and not refused else measured_policy(tables, static, automatic, refused)
    return _loaded[key]


def measured_policy(
    tables: Iterable[Table], static: Policy, automatic: bool, refused: Iterable[str] = ()
) -> MeasuredPolicy:
    """Tables, newest first, over a static policy, with what this process knows of kernels and of the machine."""
    newest_first = sorted(tables, key=lambda t: t.date, reverse=True)
    return MeasuredPolicy(
        static=static,
        tables=tuple(newest_first),
        kernels=known_kernels(),
        here=here() if newest_first else {},
        automatic=automatic,
        refused=tuple(refused),
        name="tuned" if newest_first else static.name,
    )


def known_kernels() -> dict[str, Known]:
    """Every kernel, by the name that policies know it by, in the registry's order."""
    return {
        (b.name if kernel is b else f"{b.name}.{kernel.name}"): Known(b.name, b.family, kernel.fused)
        for b in registry.backends().values()
        for kernel in b.kernels
    }


def _of_all_ranks(cache_dir: Path) -> tuple[dict[str, str], list[str]]:
    """(text by file, what was refused), rank 0's if there are several."""
    if job_store() is None:
        return _texts(cache_dir)
    mine = _texts(cache_dir)
    said, fault = said_by_rank_0("tuned", lambda: json.dumps(mine), WAIT_SECONDS[bool(mine[0])])
    if fault is not None:
        return {}, [f"no tuned policy is used: {fault}"]
    texts, refused = json.loads(said)
    return texts, refused


def _texts(cache_dir: Path) -> tuple[dict[str, str], list[str]]:
    texts: dict[str, str] = {}
    refused: list[str] = []
    try:
        names = sorted(n for n in os.listdir(cache_dir / FOLDER) if n.endswith(".yaml") and not n.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return texts, refused
    except OSError as error:
        return texts, [f"refused: {cache_dir / FOLDER}: cannot be read: {error.strerror}"]
    for name in names[:FILES]:
        file = cache_dir / FOLDER / name
        try:
            texts[str(file)] = read_text(file)
        except PolicyError as error:
            refused.append(f"refused: {error}")
    if len(names) > FILES:
        refused.append(f"refused: {cache_dir / FOLDER} holds {len(names)} files; the first {FILES} are read")
    return texts, refused


def read_text(file: Path) -> str:
    """A plain file's text, no more than a tuned policy may have. Waits for nothing and opens no device.

    Raises:
        PolicyError: it cannot be read, is no regular file, or is too large.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        with os.fdopen(descriptor, "rb") as opened:
            status = os.fstat(opened.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise PolicyError(str(file), None, "is no regular file")
            content = opened.read(BYTES + 1)
        if len(content) > BYTES:
            raise PolicyError(str(file), None, f"is larger than the {BYTES} bytes that a tuned policy may have")
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise PolicyError(str(file), None, "is not UTF-8 text") from None
    except OSError as error:
        raise PolicyError(str(file), None, f"cannot be read: {error.strerror}") from None


def read(file: Path) -> TunedFile:
    """
    Raises:
        PolicyError: it cannot be read, or is no tuned policy.
    """
    return parse(str(file), read_text(file))


def file_for(cache_dir: Path, environment: Environment) -> Path:
    """Where the figures of this device and these versions are kept."""
    return cache_dir / FOLDER / file_name(machine_entry(environment).machine())


def add(file: Path, entries: Iterable[KindEntry], environment: Environment, margin: float) -> TunedFile:
    """Add figures to a file, which may not exist yet. What was there stays, unless it is of the same call and older.

    A file that cannot be read is put aside as '<name>.refused', not overwritten.

    Raises:
        ArgumentError: it holds figures of another machine. OSError: it cannot be written.
    """
    from filelock import FileLock

    file.parent.mkdir(parents=True, exist_ok=True)
    machine = machine_entry(environment)
    with FileLock(f"{file}.lock", timeout=LOCK_SECONDS):
        older: list[KindEntry] = []
        if file.exists():
            try:
                before = read(file)
            except PolicyError as error:
                aside = _free_name(file)
                os.replace(file, aside)
                print(f"attnrt: {error}; it is kept as {aside}", file=sys.stderr)
            else:
                void, _ = before.measured_on.machine().differs(machine.machine(), _kernels(before))
                if void:
                    said = f"holds figures of another machine or version ({'; '.join(void)}); name another file"
                    raise ArgumentError("file", str(file), said)
                older = before.kinds
        content = TunedFile(
            tuned=1,
            description=f"Fastest kernels measured on {machine.device}",
            extends="default",
            margin=margin,
            measured_on=machine,
            kinds=merged(older, entries),
        )
        replace(file, render(content))
    return content


def replace(file: Path, text: str) -> None:
    """Write a file so that whoever reads it sees the old one or the new one, also after a crash."""
    for stale in file.parent.glob(f".{file.name}.*.tmp"):  # of a process that died holding the lock
        stale.unlink(missing_ok=True)
    temporary = file.parent / f".{file.name}.{os.getpid()}.tmp"
    try:
        with open(temporary, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def _kernels(content: TunedFile) -> set[str]:
    return {name for kind in content.kinds for call in kind.calls for name in call.ms}


def _free_name(file: Path) -> Path:
    aside = file.with_name(f"{file.name}.refused")
    return aside if not aside.exists() else file.with_name(f"{file.name}.{time.time_ns()}.refused")
