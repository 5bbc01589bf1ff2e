"""ATTNRT_VERIFY=1: wrong kernels are caught also in large calls, and leave a script that shows it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import Planted, SlightlyWrong, WrongGradient, WrongLastHead
from torch import Tensor

import attnrt
from attnrt.errors import AdvisoryWarning, VerificationFailed
from attnrt.evidence.calls import Call, tensors
from attnrt.settings import NAMES

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def verifying(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_VERIFY", "1")
    attnrt.refresh()


def call(made: Call, **options: Any) -> Any:
    """attention() on the tensors of a call."""
    g = tensors(made)
    r = g.request
    given = {"layout": r.layout, "causal": r.causal, "window": r.window, "alignment": r.alignment, "softcap": r.softcap}
    if r.packed:
        given |= {"max_seqlen_q": r.seqlen_q, "max_seqlen_kv": r.seqlen_kv}
    return attnrt.attention(g.q, g.k, g.v, **g.operands._asdict(), **given, **options)


SMALL = Call(batch=2, heads_q=4, heads_kv=2, head_dim=16, seqlen_q=40, dtype="fp32", layout="bhsd", causal=True)
LARGE = SMALL.changed(seqlen_q=1100)
CALLS = {
    "small": SMALL,
    "large": LARGE,
    "large bf16": LARGE.changed(dtype="bf16", layout="bshd"),
    "packed": LARGE.changed(packed=True, layout="thd", batch=3),
    "padded": LARGE.changed(padded=True, layout="sbhd"),
    "decode": SMALL.changed(seqlen_q=1, seqlen_kv=900, causal=False, batch=300),
    "paged": SMALL.changed(seqlen_q=1, seqlen_kv=896, page_size=16, causal=False, layout="bshd"),
    "window, sinks": LARGE.changed(window=(100, 0), sinks=True),
}


@pytest.mark.parametrize("made", CALLS.values(), ids=CALLS)
def test_right_kernels_pass_and_wrong_heads_do_not(made: Call) -> None:
    call(made)
    if not made.page_size:  # the planted ones do not say that they take pages
        attnrt.register_backend(WrongLastHead())
        with pytest.raises(VerificationFailed, match="planted differs from the reference in the output"):
            call(made, backend="planted")


@pytest.mark.parametrize("made", [SMALL, LARGE], ids=["small", "large"])
def test_gradients(made: Call) -> None:
    attnrt.register_backend(WrongGradient())
    assert call(made, backend="planted").shape == (2, 4, made.seqlen_q, 16)
    with pytest.raises(VerificationFailed, match="the gradient of k"):
        call(made.changed(training=True), backend="planted")
    attnrt.register_backend(Planted())
    call(made.changed(training=True), backend="planted").sum().backward()


def test_the_message_says_that_a_part_was_compared() -> None:
    attnrt.register_backend(SlightlyWrong())
    with pytest.raises(VerificationFailed, match=r"compared on 2 of 2 sequences, in part") as caught:
        call(LARGE, backend="planted")
    assert "choice    planted" in str(caught.value) and caught.value.report.backend == "planted"
    with pytest.raises(VerificationFailed) as small:
        call(SMALL, backend="planted")
    assert "in part" not in str(small.value)


def test_memory_stays_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scores of this call are 8 GiB in float64; the pieces are not."""
    from attnrt.evidence import truth

    most = 0
    attend = truth._attend

    def watched(*args: Any) -> tuple[Tensor, Tensor]:
        nonlocal most
        out, lse = attend(*args)
        most = max(most, lse.numel() * args[0].request.seqlen_kv)
        return out, lse

    monkeypatch.setattr(truth, "_attend", watched)
    huge = SMALL.changed(batch=1, heads_q=8, heads_kv=8, seqlen_q=4096, seqlen_kv=32768, causal=False, head_dim=8)
    call(huge)
    assert 0 < most <= truth.SCORES


def test_dropout_is_said_not_to_be_checked() -> None:
    q = torch.randn(1, 2, 16, 8)
    with pytest.warns(AdvisoryWarning, match="dropout"):
        attnrt.attention(q, q, q, dropout_p=0.5)


# ---- the script

MODULE = """
import attnrt
from attnrt import registry

class Wrong(attnrt.Backend):
    name, title, prefix = "wrong", "the wrong one", "WRONG"
    def prepare(self, request, environment):
        right = registry.backends()["reference"].prepare(request, environment)
        return lambda *tensors: right(*tensors) * 1.001
"""


def test_the_script_shows_it_again(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wrong_backend.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    import wrong_backend  # type: ignore[import-not-found]

    attnrt.register_backend(wrong_backend.Wrong())
    with pytest.raises(VerificationFailed) as caught:
        call(SMALL.changed(padded=True, window=(9, 0)), backend="wrong")
    script = caught.value.script
    assert script is not None and script.parent == cache / "reproducers" and str(script) in str(caught.value)
    environ = {n: v for n, v in os.environ.items() if n not in NAMES}
    environ |= {"PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path))), "ATTNRT_CACHE_DIR": str(tmp_path / "other")}
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1 and "wrong differs from the reference in the output" in done.stderr, done.stderr
    text = script.read_text()
    assert "off by a factor" in text and torch.__version__ in text and SMALL.dtype in text
    (tmp_path / "wrong_backend.py").write_text(MODULE.replace(" * 1.001", ""))
    done = subprocess.run([sys.executable, str(script)], env=environ, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "the defect is gone" in done.stdout, done.stderr


def test_the_script_forces_the_kernel_that_was_wrong() -> None:
    from attnrt.evidence.reproducer import script_text

    made = tensors(SMALL)
    with attnrt.override(disable=("torch.flash_cpu",)):
        decision = attnrt.explain(made.q, made.k, made.v, causal=True)
    text = script_text(decision, made, "the output: off by 3")
    assert "backend='torch'" in text and "'torch.flash_cpu'" in text and "'torch.math'" not in text
    compile(text, "script", "exec")


def test_a_full_disk_is_no_error_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_CACHE_DIR", "/proc/nowhere")
    attnrt.register_backend(SlightlyWrong())
    with pytest.raises(VerificationFailed, match="no script could be written") as caught:
        call(SMALL, backend="planted")
    assert caught.value.script is None


def test_large_tensors_are_left_out_of_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnrt.evidence.reproducer.BYTES", 100)
    attnrt.register_backend(SlightlyWrong())
    with pytest.raises(VerificationFailed, match="too large to keep") as caught:
        call(SMALL.changed(padded=True), backend="planted")
    assert caught.value.script is not None
    saved = torch.load(caught.value.script.with_suffix(".pt"))
    assert set(saved) == {"seqlens_q", "seqlens_kv"}
