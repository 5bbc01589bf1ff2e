"""From tensors to a request: what a rank can check by itself, then what takes every rank's lengths."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnrt.distributed.placement import KINDS, Placement
from attnrt.distributed.request import ParallelRequest
from attnrt.distributed.wire import SEQUENCE
from attnrt.errors import ArgumentError, ArgumentTypeError, UnknownNameError
from attnrt.lengths import check_cu_seqlens_values, check_length_values
from attnrt.operands import Operands, bind
from attnrt.request import ALIGNMENTS, AttentionRequest
from attnrt.settings import current_context, environ_values

TENSORS = (
    "mask",
    "bias",
    "alibi_slopes",
    "sinks",
    "seqlens_q",
    "seqlens_kv",
    "cu_seqlens_q",
    "cu_seqlens_kv",
)
META = torch.device("meta")


class Local(NamedTuple):
    """What one rank knows of a call.

    facts: what every rank must have in common. key: everything that the plan depends on, but for other ranks' lengths.
    """

    shard: AttentionRequest
    operands: Operands
    length_q: int
    length_kv: int
    device: torch.device
    documents_q: tuple[int, ...] | None
    documents_kv: tuple[int, ...] | None
    facts: dict[str, str]
    key: tuple[Any, ...]
    meta: tuple[Tensor, ...]
    """q, k and v without their data."""


def bind_local(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Local:
    """Check a rank's shards and options.

    Raises:
        ArgumentError, ArgumentTypeError: one of them cannot be right, whatever the other ranks have.
    """
    layout, placement, alignment = options["layout"], options["placement"], options["alignment"]
    if not isinstance(placement, str) or placement not in KINDS:
        raise UnknownNameError("placement", placement, KINDS)
    if alignment is not None and alignment not in ALIGNMENTS:
        raise UnknownNameError("alignment", alignment, ALIGNMENTS)
    operands = Operands(**{name: options[name] for name in TENSORS})
    packed = layout == "thd"
    documents: list[Any] = [None, None]
    if packed:
        documents = [_offsets(name, options[name]) for name in ("cu_seqlens_q", "cu_seqlens_kv")]
    own = Operands(alibi_slopes=operands.alibi_slopes, sinks=operands.sinks)
    if packed and isinstance(q, Tensor):
        none = torch.zeros(1 if own.alibi_slopes is None else _batch(documents) + 1, dtype=torch.int32, device=q.device)
        own = own._replace(cu_seqlens_q=none, cu_seqlens_kv=none)
    else:
        own = own._replace(cu_seqlens_q=operands.cu_seqlens_q, cu_seqlens_kv=operands.cu_seqlens_kv)
    shard = bind(
        q,
        k,
        v,
        own,
        layout=layout,
        max_seqlen_q=None,
        max_seqlen_kv=None,
        return_lse=options["return_lse"],
        deterministic=bool(options["deterministic"]) if options["deterministic"] is None else options["deterministic"],
        alignment="top_left",
        **{name: options[name] for name in ("causal", "window", "softcap", "dropout_p", "scale")},
    )
    axis = SEQUENCE[layout]
    _check_planes(operands, q.shape[axis])
    for name in ("seqlens_q", "seqlens_kv"):
        if (seqlens := getattr(operands, name)) is not None:
            _check_seqlens(name, seqlens, q, layout)
    grads = tuple(
        torch.is_grad_enabled() and t is not None and t.requires_grad for t in (q, k, v, operands.bias, operands.sinks)
    )
    facts = _facts(shard, operands, options, documents, grads)
    key = (
        *(tuple(facts.items())),
        *((t.shape, t.stride(), t.device) for t in (q, k, v)),
        *(None if t is None else (t.shape, t.dtype) for t in operands),
        *(options[name] for name in ("method", "link", "backend", "policy", "deterministic")),
        torch.are_deterministic_algorithms_enabled(),
        current_context(),
        tuple(environ_values()),
    )
    return Local(
        shard,
        operands,
        q.shape[axis],
        k.shape[axis],
        q.device,
        documents[0],
        documents[1],
        facts,
        key,
        tuple(torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=META) for t in (q, k, v)),
    )


def bind_whole(
    local: Local, lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...], options: dict[str, Any], deterministic: bool
) -> ParallelRequest:
    """The call as one device would see it, and where its tokens are.

    Raises:
        ArgumentError: the shards do not make up a sequence that the arguments fit.
    """
    layout, kind, o = options["layout"], options["placement"], local.operands
    placed_q = Placement.found(kind, lengths_q, "q")
    placed_kv = Placement.found(kind, lengths_kv, "k")
    for name, total in {"seqlens_q": placed_q.length, "seqlens_kv": placed_kv.length}.items():
        if (seqlens := getattr(o, name)) is not None:
            check_length_values(name, seqlens, total)
    for name, documents, total in (
        ("cu_seqlens_q", local.documents_q, placed_q.length),
        ("cu_seqlens_kv", local.documents_kv, placed_kv.length),
    ):
        if documents is not None:
            check_cu_seqlens_values(name, torch.tensor(documents, dtype=torch.int32), total)
    totals = (placed_q.length, placed_kv.length, placed_kv.length)
    q, k, v = (_resized(t, SEQUENCE[layout], n) for t, n in zip(local.meta, totals, strict=True))
    q.requires_grad_(local.shard.needs_grad)
    whole = bind(
        q,
        k,
        v,
        _whole_operands(local, placed_q.length),
        layout=layout,
        max_seqlen_q=_longest(local.documents_q),
        max_seqlen_kv=_longest(local.documents_kv),
        return_lse=options["return_lse"],
        deterministic=deterministic,
        **{name: options[name] for name in ("causal", "window", "alignment", "softcap", "dropout_p", "scale")},
    )
    return ParallelRequest(whole, placed_q, placed_kv, local.documents_q, local.documents_kv)


def _whole_operands(local: Local, length_q: int) -> Operands:
    """On the meta device, masks and biases with the rows of every rank."""
    o = local.operands

    def meta(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device=META, requires_grad=x.requires_grad)

    def plane(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        shape = list(x.shape)
        if len(shape) > 1 and shape[-2] > 1:
            shape[-2] = length_q
        return torch.empty(shape, dtype=x.dtype, device=META, requires_grad=x.requires_grad)

    seqlens_q, cu_q = meta(o.seqlens_q), meta(o.cu_seqlens_q)
    return Operands(
        plane(o.mask),
        plane(o.bias),
        meta(o.alibi_slopes),
        meta(o.sinks),
        seqlens_q,
        seqlens_q if _equal(o.seqlens_q, o.seqlens_kv) else meta(o.seqlens_kv),
        cu_q,
        cu_q if local.documents_q == local.documents_kv else meta(o.cu_seqlens_kv),
    )


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """One tensor, or equal ones on the CPU, where looking costs nothing."""
    return a is not None and b is not None and (a is b or (a.is_cpu and b.is_cpu and torch.equal(a, b)))


def _resized(x: Tensor, axis: int, length: int) -> Tensor:
    """A meta tensor of another length with strides of the same class: contiguous, strided, or a strided last dim."""
    shape = list(x.shape)
    shape[axis] = length
    if x.is_contiguous():
        return torch.empty(shape, dtype=x.dtype, device=META)
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        return torch.empty([*shape[:-1], 2 * shape[-1]], dtype=x.dtype, device=META)[..., : shape[-1]]
    return torch.empty([*shape[:-1], 2 * shape[-1]], dtype=x.dtype, device=META)[..., ::2]


def _facts(
    shard: AttentionRequest, operands: Operands, options: dict[str, Any], documents: list[Any], grads: tuple[bool, ...]
) -> dict[str, str]:
    r, o = shard, operands
    kinds = {name: _kind(x) for name, x in (("mask", o.mask), ("bias", o.bias))}
    lengths = {
        name: str(t.tolist() if t.is_cpu else tuple(t.shape))
        for name, t in (("seqlens_q", o.seqlens_q), ("seqlens_kv", o.seqlens_kv))
        if t is not None
    }
    packed = {f"cu_seqlens_{side}": str(d) for side, d in zip(("q", "kv"), documents, strict=True) if d is not None}
    said = {name: str(options[name]) for name in ("causal", "window", "alignment", "placement", "layout", "return_lse")}
    return {
        "dtype": r.dtype,
        "batch": str(r.batch if not r.packed else len(documents[0]) - 1),
        "heads_q": str(r.heads_q),
        "heads_kv": str(r.heads_kv),
        "head_dim": f"{r.head_dim_qk} and {r.head_dim_v}",
        **said,
        "scale": str(r.scale),
        "softcap": str(r.softcap),
        "dropout_p": str(r.dropout_p),
        "deterministic": str(options["deterministic"]),
        "alibi_slopes": str(r.alibi),
        "sinks": str(r.sinks),
        "gradients for q, k, v, bias, sinks": str(grads),
        **kinds,
        **lengths,
        **packed,
    }


def _kind(x: Tensor | None) -> str:
    """A mask's or bias's form, as far as it is the same on every rank."""
    if x is None:
        return "None"
    shape = [str(n) for n in x.shape]
    if len(shape) > 1 and x.shape[-2] > 1:
        shape[-2] = "rows"
    return f"({', '.join(shape)}) {x.dtype}"


def _offsets(name: str, given: Any) -> tuple[int, ...]:
    """cu_seqlens on the host."""
    if not isinstance(given, Tensor) or given.dtype != torch.int32 or given.ndim != 1 or not given.numel():
        said = "an int32 tensor of B + 1 offsets into the whole packed batch is needed with layout='thd'"
        raise ArgumentTypeError(name, given, said)
    return tuple(given.tolist())


def _batch(documents: list[Any]) -> int:
    return len(documents[0]) - 1


def _longest(documents: tuple[int, ...] | None) -> int | None:
    if documents is None:
        return None
    return max((b - a for a, b in pairwise(documents)), default=0)


def _check_planes(operands: Operands, length_q: int) -> None:
    """A mask's or bias's rows are this rank's; its columns can be checked once the whole length is known."""
    for name, x in (("mask", operands.mask), ("bias", operands.bias)):
        if x is None:
            continue
        if not isinstance(x, Tensor):
            raise ArgumentTypeError(name, x, "a torch.Tensor is needed")
        if x.ndim > 1 and x.shape[-2] not in (1, length_q):
            said = f"its rows are this rank's queries, {length_q}, and its columns every key of the whole sequence"
            raise ArgumentError(name, x, said)


def _check_seqlens(name: str, seqlens: Any, q: Tensor, layout: str) -> None:
    if layout == "thd":
        raise ArgumentError(name, seqlens, "layout='thd' gives lengths by cu_seqlens_*, not seqlens_*")
    if not isinstance(seqlens, Tensor) or seqlens.dtype != torch.int32 or seqlens.ndim != 1:
        raise ArgumentTypeError(name, seqlens, "an int32 tensor of shape (B,) is needed")
    if seqlens.device != q.device:
        raise ArgumentError(name, seqlens, f"must be on q's device, {q.device}")
