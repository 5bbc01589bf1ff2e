"""Looks for faster tiles for our Triton kernels on the GPU that is here. Never run unasked: its result ships as data.

    PYTHONPATH=. python benchmarks/tune_triton.py --dry --arch sm90 --out candidates.json     # compiles; needs no GPU
    PYTHONPATH=. python benchmarks/tune_triton.py --classes varied tf32 --seconds 120

For each head dim, class of calls (configs/triton/tiles.yaml) and pass, every candidate is compiled first (many
processes, no GPU), and dropped if it spills or needs more shared memory than there is. The rest must give the shipped
tile's answer, and are then timed: `plain` causal and not at 4k tokens; `varied` on packed and on padded sequences of 1k
to 4k, with a softcap and with ALiBi, causal; `tf32` (the rows tf32_...) causal and not. Far behind in its first call, a
candidate is not tried in the others. Each row of the table has an equal share of the seconds that are left.

--dry stops before the timing, and checks more: every call of the class that tools/codegen.py knows. It writes what
passed, which --candidates reads: the GPU then waits for those only. They hold for the kernels and the triton they were
compiled with; with others the file is refused.

Otherwise --out is tiles.yaml as it would be with the winners (after each pass, so a run that is cut short counts), with
every timing in a JSON file beside it. To ship: copy it over configs/triton/tiles.yaml, then
`python tools/codegen.py --write docs/triton_codegen.md`, which compiles every feature with the new tiles.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, as_completed
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from compiling import codegen, processes

from attnrt.backends.triton import Portable, adapter
from attnrt.backends.triton.tiles import CLASSES, Tile, arch_class
from attnrt.environment import Environment
from attnrt.operands import NO_OPERANDS, Operands, bind

ROOT = Path(__file__).resolve().parent.parent
TILES = ROOT / "configs" / "triton" / "tiles.yaml"
DEVICE = "cuda"
WIDTH = 2048
"""Hq * D of every call."""
BATCH, LENGTH = 4, 4096
"""Sequences of a plain call, and their tokens."""
LENGTHS = tuple(range(1024, 4096, 205))
"""Tokens of the sequences of a packed call; a padded one has every second."""
TIMED = {
    "plain": ("full", "causal"),
    "varied": ("packed", "padded", "softcap", "alibi"),
    "tf32": ("tf32", "tf32 full"),
}
"""Calls by which a class is tuned; names as in tools/codegen.py."""
CHECKED = TIMED | {"plain": ("full", "causal", "window", "sinks")}
"""Calls that a dry run compiles too: all of the class."""
HOPELESS = 1.15
"""Times as long as the shipped tile in its first call, a candidate is dropped."""
HELD = (72, 184)
"""Numbers that a thread holds in accumulators: with fewer, warps idle; with more, there is no room for the rest."""
GAIN = 0.98
"""A winner takes at most this part of the shipped tile's time."""
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {  # block_m, block_n, warps, stages
    "forward": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
    "dkdv": ((32, 64, 128), (32, 64, 128), (4, 8), (1, 2)),
    "dq": ((64, 128), (32, 64, 128), (4, 8), (2, 3)),
}
WORK = {"forward": 4, "dkdv": 8, "dq": 6}
"""Flops for each element of Hq Sq Skv D: two for each matrix product."""


class Row(NamedTuple):
    """What one tile of the table is for."""

    dim: int
    kind: str
    """A class of calls."""
    name: str
    """A pass."""

    @property
    def classes(self) -> str:
        """Of the table: TF32 has rows of its own, of the plain class."""
        return "plain" if self.kind == "tf32" else self.kind


def rows_of(arch: str, row: Row) -> str:
    """Under which the table has them."""
    return f"tf32_{arch}" if row.kind == "tf32" else arch


def tried(row: Row) -> list[Tile]:
    """Candidates for one row of the table."""
    return [t for t in (Tile(*x) for x in itertools.product(*CANDIDATES[row.name])) if plausible(row, t)]


def plausible(row: Row, tile: Tile) -> bool:
    """By what its accumulators take of the registers, where fp32 operands take some too, and its loads of the shared
    memory."""
    m, n, d = tile.block_m, tile.block_n, row.dim
    held = {"forward": m * (d + n), "dkdv": 2 * n * (d + m), "dq": m * (d + 2 * n)}[row.name] / (32 * tile.warps)
    size = 4 if row.kind == "tf32" else 2
    stays, passes = (n, m) if row.name == "dkdv" else (m, n)
    shared = (stays * (1 if row.name == "forward" else 2) + 2 * passes * tile.stages) * d * size
    return HELD[0] / (size / 2) <= held <= HELD[1] and shared <= 227 << 10


class Timing(NamedTuple):
    """A candidate that was tried."""

    tile: Tile
    ms: dict[str, float]
    """By call; empty if it was dropped."""
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


def compile_candidate(arch: str, row: Row, tile: Tile, calls: tuple[str, ...]) -> str:
    """Why it is not worth timing, or "". Leaves the machine code in triton's cache."""
    tools = codegen()
    for call in calls:
        try:
            with using(row.name, tile), tools.recorded(int(arch[2:])) as found:
                training = row.name != "forward"
                tools.run_call(
                    arch,
                    (row.dim, row.dim),
                    kernel=Portable(),
                    training=training,
                    deterministic=True,
                    **tools.FEATURES[call],
                )
        except Exception as error:
            return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        for kernel, compiled in found:
            if kernel == row.name and (wrong := tools.read(arch, str(row.dim), call, kernel, compiled).wrong):
                return f"{call}: {', '.join(wrong)}"
    return ""


def warm(seconds: float) -> None:
    codegen()
    time.sleep(seconds)


def verdict(future: Future[str]) -> str:
    """What `compile_candidate` said. If the compiler took the process down, the candidate is compiled when timed."""
    try:
        return future.result()
    except Exception as error:
        print(f"compiling ahead: {type(error).__name__}: {error}")
        return ""


def stamp() -> str:
    """Of the kernels and of the compiler."""
    import triton

    sources = (ROOT / "backends" / "triton" / f"{name}.py" for name in ("scores", "forward", "backward"))
    return f"triton {triton.__version__}, {hashlib.sha256(b''.join(s.read_bytes() for s in sources)).hexdigest()[:12]}"


def key(row: Row) -> str:
    return f"{row.name} {row.dim} {row.kind}"


# --- Timing ------------------------------------------------------------------------------------------------------


def median_ms(call: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=10, rep=40, return_mode="median"))


def lengths_of(call: str) -> tuple[int, ...]:
    """Tokens of each sequence of a call."""
    return {"packed": LENGTHS, "padded": LENGTHS[1::2]}.get(call, (LENGTH,) * BATCH)


def call_of(row: Row, call: str) -> Callable[[], tuple[torch.Tensor, ...]]:
    """One pass with the tiles that the adapter takes now; a backward pass comes with its preprocessing."""
    torch.manual_seed(0)
    lengths = torch.tensor(lengths_of(call), dtype=torch.int32)
    heads, training = WIDTH // row.dim, row.name != "forward"
    layout, front, operands = "bshd", (len(lengths), LENGTH, heads), NO_OPERANDS
    if call == "packed":
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(DEVICE, torch.int32)
        layout, front = "thd", (int(lengths.sum()), heads)  # type: ignore[assignment]
        operands = Operands(cu_seqlens_q=offsets, cu_seqlens_kv=offsets)
    elif call == "padded":
        operands = Operands(seqlens_q=(n := lengths.to(DEVICE)), seqlens_kv=n)
    elif call == "alibi":
        operands = Operands(alibi_slopes=torch.rand(heads, device=DEVICE))
    dtype = torch.float32 if row.kind == "tf32" else torch.bfloat16
    q, k, v = (torch.randn(*front, row.dim, device=DEVICE, dtype=dtype, requires_grad=training) for _ in range(3))
    request = bind(
        q, k, v, operands, layout=layout, causal=not call.endswith("full"), window=None, alignment=None,
        softcap=30.0 if call == "softcap" else None, dropout_p=0.0, scale=None, max_seqlen_q=None, max_seqlen_kv=None,
        deterministic=True, return_lse=False,  # the walks that the tiles are of: see rules.fused_backward
    )  # fmt: skip
    request = replace(request, tf32=row.kind == "tf32")
    run = Portable().prepare(request, Environment.detect(DEVICE))
    if not training:
        return lambda: (run(q, k, v, operands),)
    inputs = (q,) if row.name == "dq" else (k, v)
    out = run(q, k, v, operands)
    return partial(torch.autograd.grad, out, inputs, torch.randn_like(out), retain_graph=True)


def time_candidate(row: Row, tile: Tile | None, truth: dict[str, Any], shipped: dict[str, float]) -> Timing:
    """With the shipped tile if `tile` is None; that one fills `truth`, and its times are `shipped` for the others."""
    shown = tile or Tile(0, 0, 0, 0)
    times: dict[str, float] = {}
    for name in TIMED[row.kind]:
        try:
            with using(row.name, tile):
                call = call_of(row, name)
                answer = call()
                want = truth.setdefault(name, answer)
                gaps = [
                    float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(answer, want, strict=True)
                ]
                if not all(gap < 5e-3 for gap in gaps):  # NaN included
                    return Timing(shown, {}, f"WRONG: {gaps} from the shipped tile's answer ({name})")
                times[name] = median_ms(call)
        except Exception as error:  # such as triton's OutOfResources
            return Timing(shown, {}, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
        if len(times) == 1 and name in shipped and times[name] > HOPELESS * shipped[name]:
            return Timing(shown, {}, f"slow: {times[name] / shipped[name]:.2f} of the shipped tile's time ({name})")
    return Timing(shown, times)


def cost(timing: Timing, shipped: Timing) -> float:
    """Geometric mean of its times over those of the shipped tile."""
    if not timing.ms:
        return math.inf
    return math.prod(timing.ms[m] / shipped.ms[m] for m in timing.ms) ** (1 / len(timing.ms))


def tflops(name: str, call: str, ms: float) -> float:
    scores = sum(n * n for n in lengths_of(call)) / (1 if call.endswith("full") else 2)
    return WORK[name] * scores * WIDTH / ms / 1e9


# --- The data file -----------------------------------------------------------------------------------------------


@cache
def table(text: str) -> Any:
    return yaml.safe_load(text)


def tile_of(text: str, arch: str, row: Row) -> Tile:
    """What the table gives: heavier classes fall back to lighter ones."""
    rows = table(text)[row.name][rows_of(arch, row)][row.dim]
    lighter = CLASSES[: CLASSES.index(row.classes) + 1]
    return Tile(*next(rows[c] for c in reversed(lighter) if c in rows))


def with_tile(text: str, arch: str, row: Row, tile: Tile) -> str:
    """tiles.yaml with another tile in one row. Heavier classes that took the old one keep it, and so do arches that
    shared the row."""
    arch, kind = rows_of(arch, row), row.classes
    start = re.search(rf"^{row.name}:.*\n", text, re.MULTILINE)
    assert start, f"no pass {row.name}"
    stop = re.compile(r"^\S", re.MULTILINE).search(text, start.end())
    end = stop.start() if stop else len(text)
    block = text[start.end() : end]
    block = re.sub(r"^  (\w+): \*(\w+)\n", lambda m: _copied(text, m[1], m[2]), block, flags=re.MULTILINE)
    line = re.compile(rf"(^  {arch}:[^\n]*\n(?:    [^\n]*\n)*?    {row.dim}: )(\{{[^}}\n]*\}})", re.MULTILINE)
    found = line.search(block)
    assert found, f"no row {row.name}, {arch}, {row.dim}"
    new: dict[str, list[int]] = yaml.safe_load(found[2])
    heavier = CLASSES[CLASSES.index(kind) + 1 :]
    if heavier and heavier[0] not in new:
        new[heavier[0]] = next(new[c] for c in reversed(CLASSES[: CLASSES.index(kind) + 1]) if c in new)
    new[kind] = list(tile)
    inside = ", ".join(f"{c}: {new[c]}" for c in CLASSES if c in new)
    return text[: start.end()] + line.sub(rf"\g<1>{{{inside}}}", block) + text[end:]


def _copied(text: str, arch: str, anchor: str) -> str:
    """The rows that an alias stands for."""
    found = re.search(rf"&{anchor}\n((?:    [^\n]*\n)*)", text)
    assert found, f"no anchor {anchor}"
    return f"  {arch}:\n{found[1]}"


# --- Both ways to run it -----------------------------------------------------------------------------------------


def dry(arch: str, rows: list[Row], jobs: int, out: Path) -> None:
    """Compile every candidate for an arch that need not be here; write those that pass."""
    passed: dict[str, list[Tile]] = {}
    with processes(jobs) as pool:
        said = {(r, t): pool.submit(compile_candidate, arch, r, t, CHECKED[r.kind]) for r in rows for t in tried(r)}
        for row in rows:
            passed[key(row)] = [t for t in tried(row) if not verdict(said[row, t])]
            print(f"{key(row)}: {len(passed[key(row)])} of {len(tried(row))}: {[list(t) for t in passed[key(row)]]}")
            out.write_text(json.dumps({"arch": arch, "stamp": stamp(), "candidates": passed}, indent=None))
            sys.stdout.flush()


def candidates(file: Path | None, arch: str, rows: list[Row]) -> dict[Row, list[Tile]]:
    """Those of a dry run, or all."""
    every = {row: tried(row) for row in rows}
    if file is None:
        return every
    known = json.loads(file.read_text())
    if (known["arch"], known["stamp"]) != (arch, stamp()):
        sys.exit(f"{file} is for {known['arch']} and {known['stamp']}; here are {arch} and {stamp()}: run --dry again")
    return {row: [Tile(*t) for t in known["candidates"].get(key(row), every[row])] for row in rows}


def tune(rows: list[Row], options: argparse.Namespace) -> None:
    started = time.monotonic()
    here = Environment.detect(DEVICE)
    seen = f"{here.name}, triton {here.version('triton')}, torch {torch.__version__}, {datetime.now(UTC):%Y-%m-%d}"
    print(seen, flush=True)
    text = TILES.read_text()
    arch = arch_class(here.sm)
    log: list[dict[str, Any]] = []
    proposals: list[str] = []
    tiles = candidates(options.candidates, here.arch, rows)
    pool = processes(options.jobs)
    list(pool.map(warm, [0.2] * options.jobs))  # every process has imported what it needs
    said = {(r, t): pool.submit(compile_candidate, here.arch, r, t, TIMED[r.kind]) for r in rows for t in tiles[r]}
    for number, row in enumerate(rows):
        now = time.monotonic()
        stop = now + (started + options.seconds - now) / (len(rows) - number)
        timings = [*time_row(row, tile_of(text, arch, row), tiles[row], said, stop)]
        log += [row._asdict() | t._asdict() for t in timings]
        options.out.with_suffix(".json").write_text(json.dumps({"seen_on": seen, "timings": log}, indent=1))
        first, *_ = timings
        wrong = [t for t in timings if t.dropped.startswith("WRONG")]
        print("".join(f"{key(row)} {list(t.tile)} {t.dropped}\n" for t in wrong), end="")
        if not first.ms:
            print(f"{key(row)}: the shipped tile {list(first.tile)} fails: {first.dropped}")
            continue
        ranked = sorted((t for t in timings if t.ms), key=lambda t: cost(t, first))
        for timing in ranked[:4] + ([first] if first not in ranked[:4] else []):
            print(line(row, timing, first))
        if cost(ranked[0], first) <= GAIN:
            text = with_tile(text, arch, row, ranked[0].tile)
            proposals.append(f"{row.name}: {rows_of(arch, row)}: " + line(row, ranked[0], first))
        options.out.write_text(text)
        late = sum(t.dropped == "out of time" for t in timings)
        print(f"{time.monotonic() - started:.0f} s: {len(ranked)} of {len(timings)} timed, {late} late", flush=True)
    pool.shutdown(cancel_futures=True)
    print(f"\nRows of tiles.yaml that {options.out} has otherwise:\n" + ("\n".join(proposals) or "none"))


def time_row(
    row: Row, shipped: Tile, tiles: list[Tile], said: dict[tuple[Row, Tile], Future[str]], stop: float
) -> Iterator[Timing]:
    """The shipped tile, then every other that compiled, as they come, until `stop`."""
    truth: dict[str, Any] = {}
    first = time_candidate(row, None, truth, {})
    yield first._replace(tile=shipped)
    waiting = {said[row, t]: t for t in tiles if t != shipped}
    try:
        for future in as_completed(waiting, timeout=max(0.0, stop - time.monotonic())):
            tile = waiting[future]
            if time.monotonic() > stop:
                break
            del waiting[future]
            dropped = verdict(future)
            yield Timing(tile, {}, dropped) if dropped else time_candidate(row, tile, truth, first.ms)
    except TimeoutError:
        pass
    for future, tile in waiting.items():
        future.cancel()
        yield Timing(tile, {}, "out of time")


def line(row: Row, timing: Timing, first: Timing) -> str:
    """A tile, its speed by call, and its time over the shipped one's."""
    speeds = "  ".join(f"{call} {tflops(row.name, call, ms):4.0f}" for call, ms in timing.ms.items())
    mark = " (shipped)" if timing is first else ""
    return f"{key(row):20} {list(timing.tile)!s:20} TFLOP/s {speeds}  time x{cost(timing, first):.3f}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=180, help="in all; no candidate is timed after them")
    parser.add_argument("--dims", type=int, nargs="+", default=(128, 64, 256))
    parser.add_argument("--classes", nargs="+", default=("varied", "tf32"), choices=TIMED)
    parser.add_argument("--passes", nargs="+", default=tuple(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--out", type=Path, help="gpu-results/tiles.yaml, or gpu-results/candidates.json of a dry run")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="processes that compile")
    parser.add_argument("--candidates", type=Path, help="what a dry run wrote: try these only")
    parser.add_argument("--dry", action="store_true", help="list the candidates that compile well; no GPU needed")
    parser.add_argument("--arch", default="sm90", help="of a dry run")
    options = parser.parse_args()
    options.out = options.out or ROOT / "gpu-results" / ("candidates.json" if options.dry else "tiles.yaml")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    rows = [Row(*r) for r in itertools.product(options.dims, options.classes, options.passes)]
    if options.dry:
        dry(options.arch, rows, options.jobs, options.out)
    else:
        tune(rows, options)


if __name__ == "__main__":
    main()
