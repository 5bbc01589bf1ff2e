"""Tri Dao's flash-attn, three generations: each is a package of its own with limits of its own."""

from __future__ import annotations

from math import ceil

from attnrt.backends.base import FEATURE_NAMES, Backend, linear_bytes
from attnrt.backends.flash_attn import fa2_rules, fa3_rules, fa4_rules
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

_NEVER = frozenset({"mask", "bias", "bias_grad", "empty"})


class FlashAttention2(Backend):
    """The widest reach in GPUs, and the only generation with ALiBi and dropout."""

    name = "flash_attn_2"
    title = "flash-attn 2"
    prefix = "FA2"
    family = "flash_attn"
    built = False
    # What is refused with a remedy has a rule of its own.
    supports = FEATURE_NAMES - _NEVER - {"sinks"}
    rules = fa2_rules.RULES

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        r = request
        total = linear_bytes(r)
        if not r.needs_grad:
            return total
        if r.heads_q != r.heads_kv:  # dk and dv of every query head, summed afterwards
            total += r.tokens_kv * r.heads_q * 2 * r.head_dim * r.itemsize
        return total + (_dq_copies(r, environment) - 1) * r.tokens_q * r.heads_q * _rounded(r.head_dim) * 4

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        if request.padded_kv:
            return ("padded keys run by flash_attn_with_kvcache",)
        copies = _dq_copies(request, environment)
        return (f"a deterministic backward keeps {copies} float32 copies of dq",) if copies > 1 else ()


class FlashAttention3(Backend):
    """The fastest published kernels for sm90."""

    name = "flash_attn_3"
    title = "flash-attn 3"
    prefix = "FA3"
    family = "flash_attn"
    built = False
    supports = FEATURE_NAMES - _NEVER - {"alibi", "sinks", "dropout"}
    rules = fa3_rules.RULES

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        return linear_bytes(request) + _grouped_accumulators(request)


class FlashAttention4(Backend):
    """Written in CuTe DSL for sm100 and sm90, compiled at the first call of each kind."""

    name = "flash_attn_4"
    title = "flash-attn 4"
    prefix = "FA4"
    family = "flash_attn"
    built = False
    supports = FEATURE_NAMES - _NEVER - {"alibi", "dropout"}
    rules = fa4_rules.RULES

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        return linear_bytes(request) + _grouped_accumulators(request)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        return ("compiles once per shape class, in 2 to 4 s for each of forward and backward",)


def _rounded(head_dim: int) -> int:
    """The head dim that flash-attn 2's accumulators have."""
    step = 32 if head_dim <= 128 else 64
    return ceil(head_dim / step) * step


def _dq_copies(r: AttentionRequest, e: Environment) -> int:
    """How many float32 dq flash-attn 2 keeps: one, or when deterministic one for each wave of its grid."""
    if not (r.needs_grad and r.deterministic) or r.empty:
        return 1
    return ceil((e.sm_count or 132) / (r.batch * r.heads_q))


def _grouped_accumulators(r: AttentionRequest) -> int:
    """float32 dk and dv, into which the query heads of a group add."""
    if not r.needs_grad or r.heads_q == r.heads_kv:
        return 0
    return r.tokens_kv * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * 4
