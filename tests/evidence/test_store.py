"""Tuned policies in the cache directory: which are used, which are left out and why, and that no write loses any."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import content, entry, write

import attnrt
from attnrt import runtime
from attnrt.environment import Environment
from attnrt.errors import ArgumentError, PolicyError
from attnrt.evidence import store
from attnrt.evidence.calls import Call
from attnrt.policies.tuned import BYTES, render

ROOT = Path(__file__).resolve().parents[2]
CPU = Environment.detect("cpu")
BASE = Call(heads_q=4, heads_kv=2, head_dim=16, seqlen_q=64, dtype="fp32", layout="bhsd")
FASTER_MATH = entry(BASE, {"torch.math": 1.0, "torch.flash_cpu": 2.0, "reference": 3.0})


pytestmark = pytest.mark.usefixtures("cache")


def tensors() -> list[torch.Tensor]:
    return [torch.randn(1, heads, 64, 16) for heads in (4, 2, 2)]


def explain(**options: Any) -> attnrt.Decision:
    return attnrt.explain(*tensors(), **options)


# ---- what is used


def test_an_empty_cache_directory_changes_nothing(cache: Path) -> None:
    found = explain()
    assert (found.policy, found.line, found.label, found.notices) == ("default", "default: CPU", "torch[flash_cpu]", ())
    assert "notices" not in found.to_dict()
    (cache / "tuned").mkdir()
    attnrt.refresh()
    assert explain().to_dict() | {"environment": 0} == found.to_dict() | {"environment": 0}


def test_a_tuned_file_is_used_and_the_report_says_so(cache: Path) -> None:
    file = write(cache, FASTER_MATH)
    attnrt.refresh()
    found = explain()
    assert (found.policy, found.label) == ("tuned", "torch[math]")
    assert f"tuned policy from {file}, measured 2026-11-20" in " ".join(str(found).split())
    assert f"tuned policy from {file}, measured 2026-11-20" in found.to_markdown()
    attnrt.attention(*tensors())
    assert attnrt.last_decision().label == "torch[math]"  # type: ignore[union-attr]


def test_whatever_is_asked_for_outranks_it(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(cache, FASTER_MATH)
    mine = tmp_path / "mine.yaml"
    mine.write_text("name: mine\ndescription: mine\nlines:\n  - {name: all, prefer: [reference], why: because}\n")
    attnrt.refresh()
    assert explain(policy="default").label == "torch[flash_cpu]"
    assert explain(policy=str(mine)).backend == "reference"
    assert explain(backend="reference").backend == "reference"
    with attnrt.override(policy="default"):
        assert explain().policy == "default"
    with attnrt.override(prefer=("reference",)):
        assert explain().backend == "reference"
    with attnrt.override(disable=("torch.math",)):
        assert explain().label == "torch[flash_cpu]"
    monkeypatch.setenv("ATTNRT_POLICY", "default")
    assert explain().policy == "default"
    monkeypatch.setenv("ATTNRT_POLICY", "tuned")
    assert explain().policy == "tuned"


def test_by_name_and_by_path(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="attnrt tune"):
        explain(policy="tuned")
    file = tmp_path / "elsewhere.yaml"
    file.write_text(render(content(FASTER_MATH)))
    assert explain().policy == "default"
    assert explain(policy=str(file)).label == explain(policy=file).label == "torch[math]"
    attnrt.refresh()
    write(cache, FASTER_MATH)
    attnrt.refresh()
    assert explain(policy="tuned").label == "torch[math]"


def test_a_refresh_sees_a_new_file(cache: Path) -> None:
    assert explain().policy == "default"
    write(cache, FASTER_MATH)
    assert explain().policy == "default"
    attnrt.refresh()
    assert explain().policy == "tuned"


# ---- what is refused

DAMAGE: dict[str, tuple[Any, str]] = {
    "truncated": (lambda text: text[: len(text) // 2], "refused"),
    "cut at a line": (lambda text: text.removesuffix("end: true\n"), "cut short"),
    "empty": (lambda text: "", "empty"),
    "corrupt": (lambda text: text.replace("{", "{{", 3), "refused"),
    "hostile": (lambda text: text + "x: !!python/object/apply:os.system ['touch pwned']\n", "python/object"),
    "too large": (lambda text: text + "#" * BYTES, "larger than"),
    "of a later version": (lambda text: text.replace("tuned: 1", "tuned: 9"), "version 9"),
}


@pytest.mark.parametrize(("spoil", "said"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_file_is_left_out_and_the_default_serves(cache: Path, spoil: Any, said: str) -> None:
    file = write(cache, FASTER_MATH)
    file.write_text(spoil(file.read_text()))
    before = file.read_bytes()
    attnrt.refresh()
    found = explain()
    assert (found.policy, found.label) == ("default", "torch[flash_cpu]")
    (notice,) = found.notices
    assert notice.startswith("refused: ") and str(file) in notice and said in notice
    assert "notice" in str(found) and notice in found.to_json()
    assert file.read_bytes() == before and not Path("pwned").exists()
    attnrt.attention(*tensors())
    with pytest.raises(PolicyError, match="refused"):
        explain(policy="tuned")


def test_a_good_file_beside_a_damaged_one_serves(cache: Path) -> None:
    write(cache, FASTER_MATH)
    (cache / "tuned" / "bad.yaml").write_text("tuned: [")
    attnrt.refresh()
    found = explain()
    assert found.policy == "tuned" and any("bad.yaml" in n for n in found.notices)


def test_another_machines_file_is_not_used(cache: Path) -> None:
    write(cache, FASTER_MATH, device="Another Processor")
    attnrt.refresh()
    found = explain()
    assert found.policy == "default" and "Another Processor" in found.notices[0]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX")
def test_what_is_no_regular_file_is_not_waited_for(cache: Path) -> None:
    (cache / "tuned").mkdir()
    os.mkfifo(cache / "tuned" / "pipe.yaml")
    (cache / "tuned" / "device.yaml").symlink_to("/dev/zero")
    (cache / "tuned" / "folder.yaml").mkdir()
    (cache / "tuned" / "gone.yaml").symlink_to("nowhere")
    attnrt.refresh()
    assert len(explain().notices) == 4


def test_not_utf8(cache: Path) -> None:
    (cache / "tuned").mkdir()
    (cache / "tuned" / "x.yaml").write_bytes(b"tuned: \xff\xfe")
    attnrt.refresh()
    assert "UTF-8" in explain().notices[0]


# ---- writing


def test_adding_keeps_what_was_there(cache: Path) -> None:
    file = store.file_for(cache, CPU)
    store.add(file, [FASTER_MATH], CPU, 0.03)
    found = store.add(file, [entry(BASE.changed(seqlen_q=128), {"reference": 1.0})], CPU, 0.05)
    assert store.read(file) == found and found.margin == 0.05
    assert [c.seqlen_q for kind in found.kinds for c in kind.calls] == [64, 128]
    assert sorted(p.name for p in file.parent.iterdir()) in ([file.name], [file.name, f"{file.name}.lock"])


def test_a_file_that_cannot_be_read_is_put_aside(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = store.file_for(cache, CPU)
    for text in ("tuned: [", "tuned: {"):
        file.parent.mkdir(exist_ok=True)
        file.write_text(text)
        store.add(file, [FASTER_MATH], CPU, 0.03)
        assert "kept as" in capsys.readouterr().err
    kept = sorted(p.read_text() for p in file.parent.glob("*.refused"))
    assert kept == ["tuned: [", "tuned: {"] and len(store.read(file).kinds) == 1


def test_figures_of_another_machine_are_not_mixed_in(cache: Path) -> None:
    file = write(cache, FASTER_MATH, device="Another Processor")
    before = file.read_bytes()
    with pytest.raises(ArgumentError, match="Another Processor"):
        store.add(file, [FASTER_MATH], CPU, 0.03)
    assert file.read_bytes() == before


def test_a_crash_while_writing_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = store.file_for(cache, CPU)
    store.add(file, [FASTER_MATH], CPU, 0.03)
    before = file.read_bytes()
    (file.parent / f".{file.name}.123.tmp").write_text("half of")  # of a process that was killed

    def fails(*_: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="no space"):
            store.add(file, [entry(BASE.changed(seqlen_q=128), {"reference": 1.0})], CPU, 0.03)
    assert file.read_bytes() == before
    attnrt.refresh()
    assert explain().policy == "tuned"
    store.add(file, [entry(BASE.changed(seqlen_q=128), {"reference": 1.0})], CPU, 0.03)
    assert not list(file.parent.glob(".*.tmp"))


ADD = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from figures import entry
from attnrt.environment import Environment
from attnrt.evidence import store
from attnrt.evidence.calls import Call
CPU = Environment.detect("cpu")
call = Call(heads_q=4, heads_kv=2, head_dim=16, seqlen_q=64, dtype="fp32", layout="bhsd")
print("ready", flush=True)
for i in range({count}):
    length = {first} + i
    store.add(Path({file!r}), [entry(call.changed(seqlen_q=length), {{"reference": 1.0}})], CPU, 0.03)
    print(length, flush=True)
"""


def adding(file: Path, first: int, count: int) -> subprocess.Popen[str]:
    """A process that adds calls of these lengths, one at a time, and says each when it is written."""
    code = ADD.format(tests=str(ROOT / "tests"), file=str(file), first=first, count=count)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environ)


def known(file: Path) -> set[int]:
    return {call.seqlen_q for kind in store.read(file).kinds for call in kind.calls}


def test_two_at_once_and_a_kill_lose_nothing(cache: Path) -> None:
    """One process runs to its end; the other is killed while it writes, and what it said was written is there."""
    file = cache / "tuned" / "here.yaml"
    one, other = adding(file, 1000, 25), adding(file, 2000, 100_000)
    assert one.stdout is not None and other.stdout is not None
    said = [other.stdout.readline() for _ in range(6)]
    other.send_signal(signal.SIGKILL)
    said += other.stdout.readlines()
    one_said = one.stdout.readlines()
    assert one.wait(120) == 0 and other.wait(120) == -signal.SIGKILL
    written = {int(line) for line in (*said, *one_said) if line.strip().isdecimal()}
    assert len(written) >= 25 + 5
    assert written <= known(file)
    assert {1000 + i for i in range(25)} <= known(file)
    store.add(file, [FASTER_MATH], CPU, 0.03)  # the lock is free again
    assert 64 in known(file)


def test_readers_never_see_half_a_file(cache: Path) -> None:
    file = cache / "tuned" / "here.yaml"
    store.add(file, [FASTER_MATH], CPU, 0.03)
    writer = adding(file, 1000, 20)
    seen = set()
    limit = time.monotonic() + 120
    while writer.poll() is None and time.monotonic() < limit:
        seen.add(len(known(file)))
    assert writer.wait(1) == 0
    assert len(known(file)) == 21 and seen


def test_the_name_tells_machines_and_versions_apart(cache: Path) -> None:
    machine = content(FASTER_MATH).measured_on
    names = {
        store.file_name(m.machine())
        for m in (
            machine,
            machine.model_copy(update={"threads": 99}),
            machine.model_copy(update={"device": "Another"}),
            machine.model_copy(update={"packages": {**machine.packages, "torch": "2.99.0"}}),
        )
    }
    assert len(names) == 4
    patched = machine.model_copy(update={"python": "3.99"})
    assert store.file_name(patched.machine()) == store.file_name(machine.machine())
    assert runtime.variables().cache_dir == cache
