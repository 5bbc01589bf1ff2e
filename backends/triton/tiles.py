"""Which tile a pass uses, and where the Hopper forward runs: data, from configs/triton. Nothing is tuned while a call
waits."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

from attnrt.configs import parse
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

PASSES = ("forward", "dkdv", "dq", "dbias")
CLASSES = ("plain", "varied", "dense", "dropout", "all")
"""Of calls, from the lightest to the heaviest: the table says what they mean."""


class Tile(NamedTuple):
    """Query rows and keys of a tile, warps of a program, and blocks in flight in its loop."""

    block_m: int
    block_n: int
    warps: int
    stages: int


def block_dim(dim: int) -> int:
    """The head dim as the kernels hold it: the next power of two, the rest masked."""
    return max(16, 1 << (dim - 1).bit_length())


def values_block(request: AttentionRequest) -> int:
    """The head dim of values as the kernels hold it: as wide as the keys', or at least 64.

    A tile of 16 or 32 values that is loaded element by element lies where the keys lay, and ptxas 12.8 (triton 3.6 and
    3.7, for sm90) then takes its address from a register that nothing has written, or another path alone: wrong
    numbers, no error. tools/codegen.py looks for that in every kernel.
    """
    return max(block_dim(request.head_dim_v), min(64, block_dim(request.head_dim_qk)))


def arch_class(sm: int | None) -> str:
    """The row of the table for a compute capability: alike in matrix instructions and shared memory."""
    match sm:
        case None:  # the interpreter
            return "sm80"
        case 80 | 87:
            return "sm80"
        case _ if sm < 90 or sm >= 120:
            return "sm86"
    return "sm90" if sm < 100 else "sm100"


def costs(request: AttentionRequest) -> str:
    """The class of `CLASSES` that the call belongs to, by what it needs registers for."""
    r = request
    dense = r.bias is not None or r.mask is not None
    if r.dropout_p:
        return "all" if dense else "dropout"
    if dense:
        return "dense"
    varied = r.softcap is not None or r.alibi is not None or r.padded or r.packed
    return "varied" if varied else "plain"


def tile_for(name: str, request: AttentionRequest, environment: Environment) -> Tile:
    """The tile of pass `name` (one of `PASSES`)."""
    table = _read("tiles")[name][_rows(request, environment)]
    dims = block_dim(request.head_dim_qk), values_block(request)
    rows = table.get(sum(dims) // 2) or table[max(64, *dims)]
    lighter = CLASSES[: CLASSES.index(costs(request)) + 1]
    return Tile(*next(rows[c] for c in reversed(lighter) if c in rows))


def _rows(request: AttentionRequest, environment: Environment) -> str:
    """Exact products run outside the matrix units, on all GPUs alike."""
    arch = arch_class(environment.sm)
    if request.itemsize == 2:
        return arch
    return f"tf32_{arch}" if request.tf32 else "float32"


class HopperTile(NamedTuple):
    """Keys of a block, slots of the rings of K and V, and tiles of queries that have a place in shared memory."""

    block_n: int
    stages: int
    queries: int


@cache
def hopper_tiles() -> dict[int, HopperTile]:
    """Of the Hopper forward, by head dim."""
    return {dim: HopperTile(*row["tile"]) for dim, row in _read("hopper").items()}


def hopper_has(question: str, request: AttentionRequest) -> bool:
    """`question`: "queries" (the Hopper forward is the faster one for this call), "persistent" or "folded"; of
    configs/triton/hopper.yaml, which says what they mean. False for a head dim that it does not have."""
    r = request
    kind = (
        "own" if r.padded or r.packed else "window" if r.left is not None else "full" if r.right is None else "causal"
    )
    bounds = _read("hopper").get(r.head_dim_qk, {}).get(question, {}).get(kind)
    return bool(bounds) and bounds[0] <= r.seqlen_q <= bounds[1]


L2_BYTES = 32 << 20
"""Of keys and values that may be in use at once: well inside the 40 to 50 MiB of A100, H100 and H200."""


def section(request: AttentionRequest, group: int) -> int:
    """How many (batch, head) pairs run side by side, so that the keys they share stay in L2; `group` of them have one
    KV head. More than a group only where the tiles differ in length: then the longest of many go first."""
    r = request
    if r.right is None or r.left is not None:
        return group
    head = max(1, r.seqlen_kv * (r.head_dim_qk + r.head_dim_v) * r.itemsize)
    return group * (1 << max(0, (L2_BYTES // head).bit_length() - 1))


@cache
def _read(name: str) -> dict[Any, Any]:
    table: dict[Any, Any] = parse(files("attnrt.configs").joinpath(f"triton/{name}.yaml").read_text("utf-8"))
    return table
