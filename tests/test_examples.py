"""The example that `make demo` runs."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from attnrt.settings import NAMES

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "decoder_layer.py"


def test_decoder_layer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].endswith(": agrees")
    for kind in ("MHA", "GQA", "MQA"):
        for call in ("prefill, causal", "decode, one token", "padded batch, causal"):
            assert f"{kind} {call}: ran " in printed
    assert printed.count("\nchoice ") == 9, "each call shows its report"
