"""Looks for faster tiles for our Triton kernels on the GPU that is here. Never run unasked: its result ships as data.

    PYTHONPATH=. python benchmarks/tune_triton.py --budget 500 [--dims 128] [--passes forward] [--out FILE]

For each head dim and pass, every candidate is compiled first (many processes, no GPU), and dropped if it spills or
needs more shared memory than there is. The rest must give the default tile's answer, and are then timed, causal and
not, at 4k tokens. Writes configs/triton/tiles.yaml as it would be with the winners to --out (after each pass, so a run
that is cut short counts), and every timing to a JSON file beside it. To ship: copy it over configs/triton/tiles.yaml,
then `python tools/codegen.py --write docs/triton_codegen.md`, which compiles every feature with the new tiles.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from attnrt.backends.triton import TritonBackend, adapter
from attnrt.backends.triton.tiles import CLASSES, Tile, arch_class
from attnrt.environment import Environment
from attnrt.operands import NO_OPERANDS, bind

ROOT = Path(__file__).resolve().parent.parent
TILES = ROOT / "configs" / "triton" / "tiles.yaml"
DEVICE = "cuda"
TOKENS, WIDTH, LENGTH = 16384, 2048, 4096
"""Tokens in all, Hq * D, tokens of a sequence."""
GAIN = 0.98
"""A winner takes at most this part of the default's time."""
SPILL = 32
"""Bytes that a thread may spill in a candidate worth timing."""
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {  # block_m, block_n, warps, stages
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "dkdv": ((32, 64, 128), (64, 128), (4, 8), (1, 2, 3)),
    "dq": ((64, 128), (32, 64, 128), (4, 8), (1, 2, 3)),
}
WORK = {"forward": 4, "dkdv": 8, "dq": 6}
"""Flops for each element of Hq Sq Skv D: two for each matrix product."""


class Timing(NamedTuple):
    """A candidate that was tried."""

    tile: Tile
    ms: dict[str, float]
    """By "causal" and "full"; empty if it was dropped."""
    dropped: str = ""


# --- Compiling ---------------------------------------------------------------------------------------------------


@contextmanager
def using(name: str, tile: Tile | None) -> Iterator[None]:
    """The adapter takes this tile for pass `name`."""
    usual = adapter.tile_for
    if tile is not None:
        adapter.tile_for = lambda asked, *rest: tile if asked == name else usual(asked, *rest)
    try:
        yield
    finally:
        adapter.tile_for = usual


def compile_candidate(arch: str, dim: int, name: str, tile: Tile) -> str:
    """Why it is not worth timing, or "". Leaves the machine code in triton's cache."""
    spec = importlib.util.spec_from_file_location("attnrt_tools_codegen", ROOT / "tools" / "codegen.py")
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = codegen = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(codegen)
    for causal in (True, False):
        try:
            with using(name, tile), codegen.recorded(int(arch[2:])) as found:
                codegen.run_call(arch, (dim, dim), layout="bhsd", causal=causal, training=name != "forward")
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for kernel, compiled in found:
            if kernel == name:
                made = codegen.read(arch, str(dim), "", kernel, compiled)
                limit = codegen.SHARED_LIMIT.get(arch, 99) << 10
                if made.shared > limit or made.stack > SPILL:
                    return f"{made.stack} B spilled, {made.shared} of {limit} B shared"
    return ""


def verdict(future: Future[str]) -> str:
    """What `compile_candidate` said. If the compiler took the process down, the candidate is compiled when timed."""
    try:
        return future.result()
    except Exception as error:
        print(f"compiling ahead: {type(error).__name__}: {error}")
        return ""


# --- Timing ------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def call_of(name: str, dim: int, causal: bool) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One pass with the tiles that the adapter takes now; a backward pass comes with its preprocessing."""
    torch.manual_seed(0)
    shape, training = (TOKENS // LENGTH, WIDTH // dim, LENGTH, dim), name != "forward"
    q, k, v = (torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=training) for _ in range(3))
    request = bind(
        q, k, v, NO_OPERANDS, layout="bhsd", causal=causal, window=None, alignment=None, softcap=None, dropout_p=0.0,
        scale=None, max_seqlen_q=None, max_seqlen_kv=None, deterministic=False, return_lse=False,
    )  # fmt: skip
    run = TritonBackend().prepare(request, Environment.detect(DEVICE))
    if not training:
        return lambda: (run(q, k, v, NO_OPERANDS),)
    inputs = (q,) if name == "dq" else (k, v)
    out = run(q, k, v, NO_OPERANDS)
    return partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def time_candidate(name: str, dim: int, tile: Tile | None, truth: dict[str, Any]) -> Timing:
    """With the default tile if `tile` is None; that one fills `truth`."""
    shown = tile or Tile(0, 0, 0, 0)
    times = {}
    for mask in ("causal", "full"):
        try:
            with using(name, tile):
                call = call_of(name, dim, mask == "causal")
                answer = call()
                want = truth.setdefault(mask, answer)
                gaps = [
                    float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(answer, want, strict=True)
                ]
                if not all(gap < 5e-3 for gap in gaps):  # NaN included
                    return Timing(shown, {}, f"WRONG: {gaps} from the default's answer ({mask})")
                times[mask] = median_ms(call)
        except Exception as error:  # such as triton's OutOfResources
            return Timing(shown, {}, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Timing(shown, times)


def cost(timing: Timing, default: Timing) -> float:
    """Geometric mean of its times over the default's."""
    if not timing.ms:
        return math.inf
    return math.prod(timing.ms[m] / default.ms[m] for m in timing.ms) ** (1 / len(timing.ms))


def tflops(name: str, mask: str, ms: float) -> float:
    return WORK[name] * TOKENS * LENGTH * WIDTH / (2 if mask == "causal" else 1) / ms / 1e9


# --- The data file -----------------------------------------------------------------------------------------------


def with_tile(text: str, name: str, arch: str, dim: int, tile: Tile, remark: str) -> str:
    """tiles.yaml with another `plain` tile in one row. Heavier calls that took the old one keep it, and so do arches
    that shared the row."""
    start = re.search(rf"^{name}:.*\n", text, re.MULTILINE)
    assert start, f"no pass {name}"
    stop = re.compile(r"^\S", re.MULTILINE).search(text, start.end())
    end = stop.start() if stop else len(text)
    block = text[start.end() : end]
    block = re.sub(r"^  (sm\d+): \*(\w+)\n", lambda m: _copied(text, m[1], m[2]), block, flags=re.MULTILINE)
    row = re.compile(rf"(^  {arch}:[^\n]*\n(?:    [^\n]*\n)*?    {dim}: )(\{{[^}}\n]*\}})[^\n]*\n", re.MULTILINE)
    found = row.search(block)
    assert found, f"no row {name}, {arch}, {dim}"
    old: dict[str, list[int]] = yaml.safe_load(found[2])
    new = {"plain": list(tile), "varied": old["plain"]} | {c: t for c, t in old.items() if c != "plain"}
    inside = ", ".join(f"{c}: {new[c]}" for c in CLASSES if c in new)
    return text[: start.end()] + row.sub(rf"\g<1>{{{inside}}}  # {remark}\n", block) + text[end:]


def _copied(text: str, arch: str, anchor: str) -> str:
    """The rows that an alias stands for."""
    found = re.search(rf"&{anchor}\n((?:    [^\n]*\n)*)", text)
    assert found, f"no anchor {anchor}"
    return f"  {arch}:\n{found[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, default=500, help="seconds; no pass is begun after them")
    parser.add_argument("--dims", type=int, nargs="+", default=(128, 64, 256))
    parser.add_argument("--passes", nargs="+", default=tuple(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--out", type=Path, default=Path("gpu-results/tiles.yaml"))
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that compile")
    options = parser.parse_args()
    started = time.monotonic()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    here = Environment.detect(DEVICE)
    seen = f"{here.name}, triton {here.version('triton')}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    print(seen, flush=True)
    text = TILES.read_text()
    known = yaml.safe_load(text)
    row = arch_class(here.sm)
    log: list[dict[str, Any]] = []
    every = list(itertools.product(options.dims, options.passes))
    tiles = {name: [Tile(*t) for t in itertools.product(*CANDIDATES[name])] for name in options.passes}
    pool = ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn"))
    said = {(d, n, t): pool.submit(compile_candidate, here.arch, d, n, t) for d, n in every for t in tiles[n]}
    for dim, name in every:
        if time.monotonic() - started > options.budget:
            print(f"out of time before {name}, head_dim {dim}")
            break
        default = Tile(*known[name][row][dim]["plain"])
        truth: dict[str, Any] = {}
        first = time_candidate(name, dim, None, truth)._replace(tile=default)
        timings = [first]
        for tile in tiles[name]:
            late = time.monotonic() - started > options.budget
            dropped = "out of time" if late else verdict(said[dim, name, tile])
            if tile != default:
                timings.append(Timing(tile, {}, dropped) if dropped else time_candidate(name, dim, tile, truth))
        log += [{"dim": dim, "pass": name, **t._asdict()} for t in timings]
        options.out.with_suffix(".json").write_text(json.dumps({"seen_on": seen, "timings": log}, indent=1))
        wrong = [t for t in timings if t.dropped.startswith("WRONG")]
        print("".join(f"{name} d{dim} {list(t.tile)} {t.dropped}\n" for t in wrong), end="")
        if not first.ms:
            print(f"{name} d{dim}: the default tile {list(default)} fails: {first.dropped}")
            continue
        ranked = sorted((t for t in timings if t.ms), key=lambda t: cost(t, first))
        for timing in ranked[:4] + ([first] if first not in ranked[:4] else []):
            speeds = "  ".join(f"{mask} {tflops(name, mask, ms):4.0f}" for mask, ms in timing.ms.items())
            mark = " (default)" if timing is first else ""
            print(
                f"{name:8} d{dim:<3} {list(timing.tile)!s:20} TFLOP/s {speeds}  time x{cost(timing, first):.3f}{mark}"
            )
        best = ranked[0]
        if cost(best, first) <= GAIN:
            speeds = ", ".join(f"{tflops(name, m, ms):.0f} {m}" for m, ms in best.ms.items())
            was = ", ".join(f"{tflops(name, m, ms):.0f}" for m, ms in first.ms.items())
            text = with_tile(text, name, row, dim, best.tile, f"plain: {speeds} TFLOP/s (was {was}), {seen}")
        options.out.write_text(text)
        print(f"{time.monotonic() - started:.0f} s: {len(ranked)} of {len(timings)} timed", flush=True)
    pool.shutdown(cancel_futures=True)


if __name__ == "__main__":
    main()
