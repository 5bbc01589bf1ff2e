"""The table of tiles, and what tuning writes into it."""

from __future__ import annotations

import importlib.util
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnrt.backends.triton.tiles import CLASSES, PASSES, Tile, block_dim, tile_for
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "configs" / "triton" / "tiles.yaml").read_text()
ARCHS = ("sm80", "sm86", "sm90", "sm100")


def request(**options: Any) -> AttentionRequest:
    given: dict[str, Any] = {"batch": 1, "heads_q": 2, "seqlen_q": 64, "head_dim": 64}
    return AttentionRequest.from_shape(**(given | options))


@pytest.mark.parametrize("name", [*PASSES, "decode"])
@pytest.mark.parametrize("arch", ["sm75", *ARCHS, "sm87", "sm89", "sm103", "sm120"])
def test_every_call_has_a_tile(arch: str, name: str) -> None:
    for dtype, dim in product(("fp16", "fp32"), (16, 40, 64, 128, 192, 256)):
        for options in ({}, {"softcap": 1.0}, {"mask": True}, {"dropout_p": 0.1}, {"bias": True, "dropout_p": 0.1}):
            tile = tile_for(name, request(dtype=dtype, head_dim=dim, **options), Environment.simulate(arch))
            assert all(n == block_dim(n) for n in (tile.block_m, tile.block_n)), tile
            assert tile.warps in (4, 8) and tile.stages in range(1, 5), tile


def test_classes_fall_back_to_lighter_ones() -> None:
    here = Environment.simulate("sm90")
    rows = yaml.safe_load(TEXT)["dkdv"]["sm90"][128]
    calls = {"plain": {"causal": True}, "varied": {"softcap": 1.0}, "dense": {"mask": True}}
    calls |= {"dropout": {"dropout_p": 0.1}, "all": {"mask": True, "dropout_p": 0.1}}
    for kind, options in calls.items():
        if kind in rows:
            assert tile_for("dkdv", request(head_dim=128, **options), here) == Tile(*rows[kind])
    assert tile_for("dkdv", request(head_dim=128, dtype="fp32"), here) == Tile(
        *yaml.safe_load(TEXT)["dkdv"]["float32"][128]["plain"]
    )


@pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kind", ["plain", "varied", "tf32"])
def test_tuning_changes_one_tile(kind: str, arch: str) -> None:
    """Of one pass, arch, dim and class; every other call keeps the tile that it had, and comments stay."""
    tune, new = tuning(), Tile(16, 16, 1, 5)
    for name, dim in product(PASSES, (64, 128, 256)):
        row = tune.Row(dim, kind, name)
        text = tune.with_tile(TEXT, arch, row, new)
        for n, a, d, c in product(PASSES, ARCHS, (64, 128, 256), CLASSES):
            for here in (tune.Row(d, c, n), tune.Row(d, "tf32", n)):
                before = new if (here, a) == (row, arch) else tune.tile_of(TEXT, a, here)
                assert tune.tile_of(text, a, here) == before, (here, a)
        assert [x for x in text.splitlines() if x[:1] == "#"] == [x for x in TEXT.splitlines() if x[:1] == "#"]
        assert yaml.safe_load(text)["decode"] == yaml.safe_load(TEXT)["decode"]


def tuning() -> Any:
    """benchmarks/tune_triton.py as a module."""
    if (folder := str(ROOT / "benchmarks")) not in sys.path:
        sys.path.append(folder)  # it imports from there
    if (name := "attnrt_tune_triton") not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / "tune_triton.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]
