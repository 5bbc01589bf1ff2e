"""Which tile a pass uses: data, from configs/triton/tiles.yaml. Nothing is tuned while a call waits."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any, NamedTuple

import yaml

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
    table = _table()[name][_rows(request, environment)]
    dims = block_dim(request.head_dim_qk), block_dim(request.head_dim_v)
    rows = table.get(sum(dims) // 2) or table[max(64, *dims)]
    lighter = CLASSES[: CLASSES.index(costs(request)) + 1]
    return Tile(*next(rows[c] for c in reversed(lighter) if c in rows))


def _rows(request: AttentionRequest, environment: Environment) -> str:
    """Exact products run outside the matrix units, on all GPUs alike."""
    arch = arch_class(environment.sm)
    if request.itemsize == 2:
        return arch
    return f"tf32_{arch}" if request.tf32 else "float32"


@cache
def _table() -> dict[str, Any]:
    table: dict[str, Any] = yaml.safe_load(files("attnrt.configs").joinpath("triton/tiles.yaml").read_text())
    return table
