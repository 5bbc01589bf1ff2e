"""Tiles of flash-attn 4's sm90 kernels, and what follows from them: the shared memory that they ask for, and two places
where they touch what is not theirs.

4.0.0b36 checks none of it before it compiles. Seen on an H200 on 2026-11-28: 240640 bytes asked for 96/160, and 306176
in the backward for 128/256, both refused at launch; an illegal address for 64/192; a wrong dq for 16 and 40.
"""

from __future__ import annotations

from math import ceil

from attnrt.request import AttentionRequest

SHARED = 232448
"""Bytes of shared memory that one block can have on sm90."""
ALIGNED = 1024
SIZE = 2
"""Bytes of fp16 and bf16."""


def up(n: int, step: int) -> int:
    return ceil(n / step) * step


def tile_m(r: AttentionRequest) -> int:
    """Queries in a tile of the forward."""
    return 192 if r.head_dim_qk <= 96 else 128


def tile_n(r: AttentionRequest) -> int:
    """Keys in a tile of the forward."""
    local, dim = r.windowed, r.head_dim_qk
    if dim <= 64:
        return 128
    if dim <= 96:
        return 128 if r.banded else 144
    if dim <= 128:
        return 128
    if dim <= 192:
        return 96 if local else 128 if r.head_dim_v <= 128 else 112
    return 64 if local else 80


def _parts(r: AttentionRequest) -> tuple[int, int, int, int]:
    """Bytes of v, q, k and the probabilities, as they lie one after the other: k and v have two stages."""
    dim, dim_v, m, n = up(r.head_dim_qk, 16), up(r.head_dim_v, 16), tile_m(r), tile_n(r)
    p = m * n if 64 < r.head_dim_qk <= 96 else 0  # elsewhere they stay in registers
    return 2 * n * dim_v * SIZE, m * dim * SIZE, 2 * n * dim * SIZE, p * SIZE


def shared(r: AttentionRequest) -> int:
    """Bytes of shared memory of the forward. Barriers take the first 1024."""
    return ALIGNED + sum(_parts(r))


def output_overruns(r: AttentionRequest) -> bool:
    """Whether the output's tile is larger than all that lies from q's on, over which it is written at the end."""
    _, *behind = _parts(r)
    return tile_m(r) * up(r.head_dim_v, 16) * SIZE > sum(behind)


def shared_bwd(r: AttentionRequest) -> int:
    """Bytes of shared memory of the backward: q, v, k, the output's gradient, probabilities and their gradient, dq."""
    step = 64 if r.head_dim_qk > 128 else 16
    dim, dim_v = up(r.head_dim_qk, step), up(r.head_dim_v, step)
    if r.head_dim_qk <= 128:  # two stages of everything; the probabilities stay in registers
        m = 128 if r.head_dim_qk <= 64 else 64 if r.head_dim_qk <= 96 or r.banded else 80
        n, stages, scores = 128, 2, 2
    else:
        m, n, scores = 64, 96 if r.head_dim_qk <= 192 else 48, 2
        stages = 2 if r.head_dim_qk <= 192 and r.head_dim_v <= 128 else 1
    statistics = 128 + up(m, 64) * 4 * (2 + stages)
    elements = 2 * m * dim + n * dim_v + n * dim + stages * m * dim_v + scores * m * n
    return up(statistics, ALIGNED) + elements * SIZE + m * dim * 4


def dq_misread(r: AttentionRequest) -> bool:
    """Whether the backward adds up dq in rows of 16 * odd columns, which the kernel after it reads as 32 * n. With
    grouped heads dk and dv go the same way. Over 128 both round to 64."""
    return r.head_dim_qk <= 128 and up(r.head_dim_qk, 16) % 32 != 0
