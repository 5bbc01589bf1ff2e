"""Times the Hopper forward's switches on the GPU that is here, for configs/triton/hopper.yaml. Never run unasked.

    PYTHONPATH=. python benchmarks/tune_hopper.py [--seconds 150] [--head-dim 128 64 256] [--lengths 2048 512 ...]

For each head dim, mask and length (16k tokens in all, Hq * D = 2048): the portable kernel, then the Hopper one with
its tiles (keys of a block, slots, tiles of queries), one tile a program, persistent or folded, sections for 16 to 64
MiB of L2, and with or without the consumers' turns, each switch by itself from the shipped setting. PyTorch's cuDNN
runs beside them. Everything is in gpu-results/hopper.json; printed are the shipped setting, the best, and what won.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from compiling import compile_call, processes
from kernel_rows import Shape
from kernels import TOKENS, WIDTH, asked, calls, described, environment, median_ms, ours, special_shapes, tensors

from attnrt.backends.triton import hopper, tiles
from attnrt.backends.triton.tiles import HopperTile, hopper_tiles

TILES = {
    64: ((128, 2, 2), (128, 3, 2), (64, 4, 2), (64, 6, 2)),
    128: ((128, 2, 1), (64, 3, 2), (64, 4, 2)),
    256: ((32, 3, 1), (32, 4, 1)),
}
"""To try besides the shipped one."""


class Setting(NamedTuple):
    """None: as shipped."""

    tile: HopperTile | None = None
    persistent: bool | None = None
    folded: bool | None = None
    l2: int | None = None
    """MiB; 0: one group after the other."""
    turns: bool = True

    def __str__(self) -> str:
        shown = {n: v for n, v in self._asdict().items() if v is not self._field_defaults[n]}
        return " ".join(f"{n}={list(v) if n == 'tile' else v}" for n, v in shown.items()) or "shipped"


def settings(shape: Shape) -> list[Setting]:
    found = [Setting(), *(Setting(tile=HopperTile(*t)) for t in TILES[shape.dim]), Setting(turns=False)]
    if not shape.lengths:
        found += [Setting(persistent=False), Setting(persistent=True, folded=False)]
    if shape.causal and not shape.lengths and shape.window is None:
        found += [Setting(persistent=True, folded=True), *(Setting(l2=n) for n in (0, 16, 64))]
        found += [Setting(persistent=True, folded=True, l2=n) for n in (16, 64)]
    return found


@contextmanager
def using(setting: Setting) -> Iterator[None]:
    """The adapter launches with this setting."""
    changed = partial(hopper.launch, persistent=setting.persistent, folded=setting.folded, ping_pong=setting.turns)
    with mock.patch.object(hopper, "launch", changed):
        if setting.tile is None:
            tile: Any = mock.patch.object(hopper, "hopper_tiles", hopper_tiles)
        else:
            tile = mock.patch.object(hopper, "hopper_tiles", lambda: dict.fromkeys(hopper_tiles(), setting.tile))
        limit = tiles.L2_BYTES if setting.l2 is None else setting.l2 << 20
        with tile, mock.patch.object(tiles, "L2_BYTES", limit):
            yield


def shapes(options: argparse.Namespace) -> Iterator[Shape]:
    for dim in options.head_dim:
        for length in options.lengths:
            for causal in (True, False):
                heads = WIDTH // dim
                yield Shape("grid", max(1, TOKENS // length), heads, heads, length, length, dim, causal)
    yield from (s for s in special_shapes(False) if s.kind != "plain" and s.dim in options.head_dim)


def compile_setting(arch: str, setting: Setting, options: dict[str, Any]) -> str:
    """In a process of its own; says what went wrong."""
    with using(setting):
        return compile_call(arch, "hopper", options)


def compile_settings(found: list[Shape]) -> None:
    """What differs by more than numbers, once each."""
    wanted = {}
    for shape in found:
        for setting in settings(shape):
            code = Setting(tile=setting.tile, turns=setting.turns)
            for name, call in described(shape, "forward"):
                if name == "hopper":
                    wanted[repr((code, call))] = (environment().arch, code, call)
    with processes() as pool:
        for future in [pool.submit(compile_setting, *call) for call in wanted.values()]:
            with suppress(Exception):  # it says so when it is timed
                future.result()
    print(f"{len(wanted)} kernels compiled", flush=True)


def time_shape(shape: Shape) -> dict[str, float]:
    """ms by setting; NaN for what fails or answers otherwise."""
    qkv, operands, layout = tensors(shape, False)
    request = asked(shape, qkv, operands, layout)
    found: dict[str, float] = {}
    truth: Any = None
    for name, prepare in calls(shape, qkv, operands, layout).items():
        if name in ("triton[portable]", "cudnn"):
            with suppress(Exception):
                call = prepare()
                truth = call() if truth is None else truth
                found[name] = median_ms(call)
    for setting in settings(shape):
        try:
            with using(setting):
                run = ours()["triton[hopper]"].prepare(request, environment())
                call = partial(run, *qkv, operands)
                gap = float((call().float() - truth.float()).norm() / truth.float().norm())  # type: ignore[union-attr]
                found[str(setting)] = median_ms(call) if gap < 2e-2 else math.nan
        except Exception as error:
            found[str(setting)] = math.nan
            print(f"    {setting}: {type(error).__name__}: {str(error)[:120]}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=150, help="start no shape after this long")
    parser.add_argument("--head-dim", type=int, nargs="+", default=(128, 64, 256))
    parser.add_argument("--lengths", type=int, nargs="+", default=(2048, 4096, 512, 1024, 8192, 16384))
    parser.add_argument("--out", type=Path, default=Path("gpu-results/hopper.json"))
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=UserWarning)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    log: list[dict[str, Any]] = []
    found = [*shapes(options)]
    compile_settings(found)
    for shape in found:
        if time.monotonic() - started > options.seconds:
            print("out of time")
            break
        ms = time_shape(shape)
        log.append({"shape": asdict(shape), "ms": ms})
        options.out.write_text(json.dumps(log, indent=1))
        mine = sorted((t, n) for n, t in ms.items() if n not in ("triton[portable]", "cudnn") and t == t)
        speed = {n: shape.flops / t / 1e9 for n, t in ms.items()}
        parts = [f"{n} {speed[n]:.0f}" for n in ("cudnn", "triton[portable]", "shipped") if n in speed]
        best = [f"{n} {speed[n]:.0f}" for _, n in mine[:4]]
        print(f"{shape!s:42} {'  '.join(parts)}   best: {';  '.join(best)}", flush=True)
    print(f"{time.monotonic() - started:.0f} s; all of it in {options.out}")


if __name__ == "__main__":
    main()
