"""The examples: what `make demo` runs, training beside eager attention, decoding with a KV cache."""

from __future__ import annotations

import re
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import attnrt
from attnrt.settings import NAMES

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = """
num_query_groups: 2
num_attention_heads: 4
hidden_size: 64
num_layers: 2
ffn_hidden_size: 96
vocab_size: 64
"""


@pytest.fixture(autouse=True)
def defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def run(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What `python examples/NAME ARGUMENTS` prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_decoder_layer(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    printed = run("decoder_layer.py", monkeypatch, capsys)
    assert printed.splitlines()[-1].endswith(": agrees")
    for kind in ("MHA", "GQA", "MQA"):
        for call in ("prefill, causal", "decode, one token", "padded batch, causal"):
            assert f"{kind} {call}: ran " in printed
    assert printed.count("\nchoice ") == 9, "each call shows its report"


@pytest.mark.parametrize("groups", ["null", "2", "1"])
def test_training(
    groups: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plot = ["--plot", str(tmp_path / "loss.png")] if groups == "2" and find_spec("matplotlib") else []
    printed = run("train_gqa.py", monkeypatch, capsys, "--steps", "4", "--groups", groups, *plot)
    assert f"in {'8' if groups == 'null' else groups} groups" in printed
    losses = {
        name: (float(a), float(b)) for name, a, b in re.findall(r"^(\w+).*loss ([\d.]+) to ([\d.]+)", printed, re.M)
    }
    assert losses.keys() == {"attnrt", "eager"}
    assert all(end < start for start, end in losses.values()), "it learns"
    apart = float(re.search(r"between the curves: (\S+)", printed)[1])  # type: ignore[index]
    assert apart < 1e-4
    assert re.search(r"attnrt \(torch\[flash_cpu\]\)", printed)
    if plot:
        assert (tmp_path / "loss.png").stat().st_size > 10_000


def test_training_with_groups_that_do_not_divide(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(attnrt.AttnrtError, match=r"\[1, 2, 4, 8\]"):
        run("train_gqa.py", monkeypatch, capsys, "--steps", "1", "--groups", "3")


@pytest.mark.parametrize("paged", [[], ["--paged"]])
def test_decoding(
    paged: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny.yaml").write_text(TINY)
    printed = run(
        "decode.py", monkeypatch, capsys, "--config", str(tmp_path / "tiny.yaml"), "--tokens", "5", *paged
    ).splitlines()
    assert [line.split(":")[0] for line in printed] == [f"4 heads, {n} groups" for n in (4, 2, 1)]
    for line in printed:
        assert "tokens/s" in line and re.search(r"prefill \w+.*decode \w+", line)
        assert line.endswith("; as without a cache")
