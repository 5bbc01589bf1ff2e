"""Megatron's checkpoint layout: fused rows group by group, shards of tensor parallelism, and older versions' rows.

linear_qkv holds, for each of the `groups`, (heads / groups) query heads, one key head and one value head, each of
head_dim rows; linear_kv of cross-attention one key and one value head a group. (Megatron-LM d98e8a64, attention.py.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attnrt.errors import ArgumentError, UnknownNameError
from attnrt.nn.attention import CrossAttention, SelfAttention
from attnrt.nn.config import divisors
from attnrt.request import check_size

FUSED = ("linear_qkv", "linear_kv")
_OLD_NAMES = {"query_key_value": "linear_qkv", "key_value": "linear_kv", "query": "linear_q", "dense": "linear_proj"}
"""Names before Megatron-Core."""


def fuse_qkv(q: Tensor, k: Tensor, v: Tensor, groups: int) -> Tensor:
    """Weights (or biases) of q, k and v, rows in order of heads, as one fused weight (or bias).

    Args:
        q: (heads * D, hidden) or (heads * D,). k, v: (groups * D, ...).
    """
    _check_rows("k", k, groups)
    dim = k.shape[0] // groups
    if k.shape != v.shape or q.shape[0] % k.shape[0] or q.shape[1:] != k.shape[1:]:
        raise ArgumentError(
            "q",
            q,
            f"q, k and v of {groups} groups do not go together: {list(q.shape)}, {list(k.shape)}, {list(v.shape)}",
        )
    rest = q.shape[1:]
    parts = [t.reshape(groups, -1, dim, *rest) for t in (q, k, v)]
    return torch.cat(parts, 1).reshape(-1, *rest)


def split_qkv(fused: Tensor, heads: int, groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """The reverse of `fuse_qkv`: (heads + 2 * groups) * D rows to q, k and v."""
    check_size("heads", heads, at_least=1)
    check_size("groups", groups, at_least=1)
    if heads % groups:
        raise ArgumentError("groups", groups, f"must divide heads={heads}, so be one of {divisors(heads)}")
    _check_rows("fused", fused, heads + 2 * groups)
    per_group, dim, rest = heads // groups, fused.shape[0] // (heads + 2 * groups), fused.shape[1:]
    mixed = fused.reshape(groups, per_group + 2, dim, *rest)
    q, k, v = mixed.split((per_group, 1, 1), 1)
    return q.reshape(heads * dim, *rest), k.reshape(groups * dim, *rest), v.reshape(groups * dim, *rest)


def fuse_kv(k: Tensor, v: Tensor, groups: int) -> Tensor:
    """linear_kv of cross-attention from k and v."""
    _check_rows("k", k, groups)
    if k.shape != v.shape:
        raise ArgumentError("v", v, f"must have k's shape {list(k.shape)}")
    rest = k.shape[1:]
    return torch.cat([t.reshape(groups, 1, -1, *rest) for t in (k, v)], 1).reshape(-1, *rest)


def split_kv(fused: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The reverse of `fuse_kv`."""
    _check_rows("fused", fused, 2 * groups)
    rest = fused.shape[1:]
    k, v = fused.reshape(groups, 2, -1, *rest).unbind(1)
    return k.reshape(-1, *rest), v.reshape(-1, *rest)


def merge_tensor_parallel(shards: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The attention weights of every tensor-parallel rank, in order of rank, as those of one.

    Projections in are cut by rows (whole groups, or with fewer groups than ranks parts of one: their rows follow one
    another all the same), the projection out by columns; norms and the output's bias are copies.
    """
    if not shards:
        raise ArgumentError("shards", [], "at least one is needed")
    names = set(shards[0])
    for rank, shard in enumerate(shards):
        if set(shard) != names:
            raise ArgumentError("shards", sorted(names ^ set(shard)), f"rank {rank} has other names than rank 0")
    return {name: _merged(name, [shard[name] for shard in shards]) for name in shards[0]}


def split_tensor_parallel(state: Mapping[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    """One rank's weights each, for `size` tensor-parallel ranks."""
    check_size("size", size, at_least=1)
    found: list[dict[str, Tensor]] = [{} for _ in range(size)]
    for name, tensor in state.items():
        axis = _axis(name)
        if axis is not None and tensor.shape[axis] % size:
            raise ArgumentError("size", size, f"must divide {tensor.shape[axis]}, dim {axis} of {name}")
        parts = [tensor] * size if axis is None else tensor.chunk(size, axis)
        for rank, part in enumerate(parts):
            found[rank][name] = part.clone()
    return found


def megatron_state(module: SelfAttention | CrossAttention, prefix: str = "") -> dict[str, Tensor]:
    """The module's weights under Megatron-Core's names and in its layout, fused whether the module is or not."""
    config = module.config
    state = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    if not config.fused_qkv:
        for kind in ("weight", "bias"):
            if f"linear_k.{kind}" not in state:
                continue
            k, v = state.pop(f"linear_k.{kind}"), state.pop(f"linear_v.{kind}")
            if isinstance(module, SelfAttention):
                q = state.pop(f"linear_q.{kind}")
                state[f"linear_qkv.{kind}"] = fuse_qkv(q, k, v, config.groups)
            else:
                state[f"linear_kv.{kind}"] = fuse_kv(k, v, config.groups)
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


def load_megatron(
    module: SelfAttention | CrossAttention,
    state: Mapping[str, Tensor],
    prefix: str = "",
    *,
    version: float = 3.0,
    strict: bool = True,
) -> tuple[str, ...]:
    """Load one layer's attention from a Megatron checkpoint, into fused or separate projections.

    Args:
        state: the checkpoint's tensors. prefix: of this layer's attention, "decoder.layers.0.self_attention.".
        version: the checkpoint's "checkpoint_version". Below 2 the rows of query_key_value are in another order.
        strict: names under the prefix that the module has no place for are an error, else they are given back.
            `_extra_state` of Transformer Engine, which holds no weights, is passed over either way.

    Raises:
        ArgumentError: a weight is missing, left over or of another shape.
    """
    config = module.config
    found = {}
    for name, tensor in state.items():
        if name.startswith(prefix) and not name.endswith("_extra_state"):
            head, _, kind = name.removeprefix(prefix).rpartition(".")
            found[f"{_OLD_NAMES.get(head, head)}.{kind}" if head else kind] = tensor
    own = module.state_dict()
    if version < 2:
        if config.groups != config.num_attention_heads:
            raise ArgumentError("version", version, "checkpoints before version 2 have no groups of query heads")
        found = {n: _reordered(t, config.num_attention_heads, version) if _fused(n) else t for n, t in found.items()}
    if not config.fused_qkv:
        for name in [n for n in found if _fused(n)]:
            tensor, kind = found.pop(name), name.rpartition(".")[2]
            if isinstance(module, SelfAttention):
                parts = split_qkv(tensor, config.num_attention_heads, config.groups)
                found |= {f"linear_{x}.{kind}": t for x, t in zip("qkv", parts, strict=True)}
            else:
                found |= {f"linear_{x}.{kind}": t for x, t in zip("kv", split_kv(tensor, config.groups), strict=True)}
    if "core_attention.softmax_offset" in found:  # (1, heads, 1, 1) in Transformer Engine
        found["core_attention.softmax_offset"] = found["core_attention.softmax_offset"].flatten()
    if missing := sorted(set(own) - set(found)):
        raise ArgumentError("state", missing, f"missing under prefix {prefix!r}")
    left_over = sorted(set(found) - set(own))
    if left_over and strict:
        raise ArgumentError("state", left_over, "the module has no place for it; strict=False leaves it to the caller")
    for name, tensor in own.items():
        if found[name].shape != tensor.shape:
            raise ArgumentError(name, found[name], f"must have shape {list(tensor.shape)}")
    module.load_state_dict({name: found[name] for name in own})
    return tuple(left_over)


def _fused(name: str) -> bool:
    """Rows of several projections; not, say, `linear_qkv.layer_norm_weight`, the norm that Transformer Engine fuses."""
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[2] in FUSED and kind in ("weight", "bias")


def _reordered(tensor: Tensor, heads: int, version: float) -> Tensor:
    """Rows of before version 2 as (heads, parts, D). Version 0 has (parts, heads, D), version 1 (heads, D, parts)."""
    if version not in (0, 0.0, 1, 1.0):
        raise UnknownNameError("version", version, ("0", "1.0", "2.0", "3.0"))
    rest = tensor.shape[1:]
    parts = 3
    _check_rows("state", tensor, parts * heads)
    if version == 0:
        return tensor.reshape(parts, heads, -1, *rest).transpose(0, 1).reshape(tensor.shape)
    return tensor.reshape(heads, -1, parts, *rest).transpose(1, 2).reshape(tensor.shape)


def _axis(name: str) -> int | None:
    """The dim along which tensor parallelism cuts a weight, None: every rank has all of it."""
    module, _, kind = name.rpartition(".")
    module = module.rpartition(".")[2]
    module = _OLD_NAMES.get(module, module)
    if module == "linear_proj":
        return 1 if kind == "weight" else None
    rows = module in (*FUSED, "linear_q", "linear_k", "linear_v") and kind in ("weight", "bias")
    return 0 if rows or kind == "softmax_offset" else None


def _merged(name: str, parts: list[Tensor]) -> Tensor:
    axis = _axis(name)
    if axis is not None:
        return torch.cat(parts, axis)
    if any(not torch.equal(parts[0], part) for part in parts[1:]):
        raise ArgumentError("shards", name, "must be the same on every rank")
    return parts[0]


def _check_rows(name: str, tensor: Tensor, parts: int) -> None:
    check_size("groups", parts, at_least=1)
    if not tensor.ndim or tensor.shape[0] % parts:
        raise ArgumentError(name, tensor, f"its rows must be a multiple of {parts}")


__all__ = [
    "fuse_kv",
    "fuse_qkv",
    "load_megatron",
    "megatron_state",
    "merge_tensor_parallel",
    "split_kv",
    "split_qkv",
    "split_tensor_parallel",
]
