"""What benchmarks/kernels.py makes of its figures: bars and the tables of docs/h200.md."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _module() -> Any:
    if (name := "attnrt_kernel_rows") not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "kernel_rows.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


kernel_rows = _module()


def rows(ms: dict[str, float], chosen: str, direction: str = "forward", **shape: Any) -> list[Any]:
    """One shape by several kernels."""
    given = {"kind": "grid", "batch": 4, "heads_q": 16, "heads_kv": 16, "seqlen_q": 4096, "seqlen_kv": 4096, "dim": 128}
    made = kernel_rows.Shape(**(given | {"causal": True} | shape))
    best = min((t for n, t in ms.items() if not n.startswith("triton")), default=None)
    return [
        kernel_rows.Row(
            made, direction, name, name == chosen, t, made.flops / t / 1e9, made.bytes / t / 1e6, best and best / t
        )
        for name, t in ms.items()
    ]


FAST = {"triton[hopper]": 1.0, "triton[portable]": 1.2, "cudnn": 0.95, "flash": 1.7}


def bars(found: list[Any]) -> dict[str, Any]:
    return {b.name: b for b in kernel_rows.bars(found, 4000.0)}


def test_bars() -> None:
    """Each passes where it should, and says what misses it."""
    good = bars(rows(FAST, "triton[hopper]") + rows(FAST, "triton[portable]", "backward"))
    assert all(b.passed is not False for b in good.values()), [str(b) for b in good.values() if b.passed is False]
    for changes, direction, bar in (
        ({"triton[hopper]": 1.1}, "forward", "triton forward / best vendor, d128 from 2k"),
        ({"triton[portable]": 1.4}, "forward", "triton[portable] forward / best vendor, d128 from 2k"),
        ({"triton[portable]": 1.3}, "backward", "triton backward / best vendor, d128 from 2k"),
        ({"flash": 0.9}, "forward", "triton forward / PyTorch's flash"),
        ({"triton[portable]": 0.9}, "forward", "the forward that is chosen / the faster one"),
    ):
        chosen = "triton[hopper]" if direction == "forward" else "triton[portable]"
        found = bars(rows(FAST | changes, chosen, direction))[bar]
        assert found.passed is False and len(found.missed) == 1 and "S 4096" in str(found), str(found)


def test_bars_of_less_work() -> None:
    plain = rows(FAST, "triton[hopper]", kind="plain", batch=1, seqlen_q=32768, seqlen_kv=32768)
    share = kernel_rows.Shape(**(asdict(plain[0].shape) | {"kind": "window", "window": 1024})).flops
    for factor, passed in ((1.4, True), (1.6, False)):
        ms = {"triton[hopper]": factor * share / plain[0].shape.flops}
        windowed = rows(ms, "triton[hopper]", kind="window", batch=1, seqlen_q=32768, seqlen_kv=32768, window=1024)
        found = bars(plain + windowed)["window forward: TFLOP/s over plain causal of the same mean length"]
        assert found.passed is passed, str(found)
    step = {"kind": "decode", "seqlen_q": 1, "seqlen_kv": 32768, "causal": False}
    moved = kernel_rows.Shape(**(asdict(plain[0].shape) | {"batch": 4} | step)).bytes
    for share, passed in ((0.85, True), (0.75, False)):
        found = bars(rows({"triton[decode]": moved / (share * 4000 * 1e6)}, "triton[decode]", **step))
        assert found["decode from 32k: bandwidth over a copy's"].passed is passed


def test_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A later run replaces the rows that it measured again, and the rest of the document stays."""
    seen = {
        "environment": {"name": "H", "packages": {"triton": "3"}},
        "driver": "5",
        "torch": "2",
        "date": "2026-01-01",
    }
    step = rows({"triton[decode]": 1.0}, "triton[decode]", kind="decode", seqlen_q=1, seqlen_kv=32768, causal=False)
    files = []
    for i, found in enumerate((rows(FAST, "triton[hopper]") + step, rows({"triton[hopper]": 0.9}, "triton[hopper]"))):
        files.append(tmp_path / f"{i}.json")
        result = {"seen_on": seen, "copy_gbs": 4000.0, "rows": [asdict(r) for r in found]}
        files[-1].write_text(json.dumps(result))
    document = tmp_path / "h.md"
    document.write_text(f"before\n{kernel_rows.BEGIN}\nstale\n{kernel_rows.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["", *map(str, files), "--write", str(document)])
    kernel_rows.main()
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    speed = rows(FAST, "")[0].shape.flops / 0.9 / 1e9
    assert f"**{speed:.0f}" in text and "| forward | 128 | MHA | causal | 4 | 4096 |" in text and "16/16" in text
    document.write_text("no marks")
    with pytest.raises(SystemExit, match="has no"):
        kernel_rows.main()
