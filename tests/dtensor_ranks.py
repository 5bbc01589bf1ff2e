"""What ranks do in tests/distributed/test_dtensor.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import attnrt
from attnrt import execution, operands, operators
from attnrt.distributed import (
    context_parallel_attention,
    explain,
    last_decision,
    local_positions,
    shard,
    unshard,
)

SIZES = {"b": 4, "h": 8, "s": 22, "d": 8}


def whole(heads_kv: int = 4, layout: str = "bhsd", length_kv: int = 22) -> list[Tensor]:
    """q, k, v and the output's gradient in float64, the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for heads, length in ((8, 22), (heads_kv, length_kv), (heads_kv, length_kv), (8, 22)):
        sizes = SIZES | {"h": heads, "s": length}
        found.append(torch.randn([sizes[c] for c in layout], generator=generator, dtype=torch.float64))
    return found


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool, layout: str, sinks: Tensor | None = None) -> Tensor:
    """The same attention, written down."""
    order = [layout.index(c) for c in "bhsd"]
    q, k, v = (t.permute(order) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)
    if sinks is not None:
        extra = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, extra], -1)
    out = scores.softmax(-1)[..., : k.shape[2]] @ v
    return out.permute([order.index(i) for i in range(4)])


def compare(mesh: DeviceMesh, placements: Any, kv: Any = None, layout: str = "bhsd", **options: Any) -> dict[str, Any]:
    """Largest errors of output and gradients against one device, and how they are placed."""
    heads_kv = options.pop("heads_kv", 4)
    tensors = whole(heads_kv, layout)
    sinks = torch.linspace(-1, 1, 8, dtype=torch.float64) if options.pop("sinks", False) else None
    leaves = [t.clone().requires_grad_() for t in tensors[:3]]
    want = exact(*leaves, options.get("causal", False), layout, sinks)
    want.backward(tensors[3])
    given = [
        distribute_tensor(t, mesh, placements if i == 0 or kv is None else kv).requires_grad_()
        for i, t in enumerate(tensors[:3])
    ]
    out = attnrt.attention(*given, layout=layout, sinks=sinks, return_lse=True, **options)
    out, lse = out
    assert isinstance(out, DTensor) and isinstance(lse, DTensor)
    out.backward(distribute_tensor(tensors[3], mesh, placements))
    errors = [float((out.full_tensor() - want).abs().max().detach())]
    for leaf, mine in zip(leaves, given, strict=True):
        assert mine.grad is not None and leaf.grad is not None
        errors.append(float((mine.grad.full_tensor() - leaf.grad).abs().max()))
    plain = attnrt.attention(*tensors[:3], layout=layout, sinks=sinks, return_lse=True, **options)[1]
    errors.append(float((lse.full_tensor() - plain).abs().max()))
    return {"errors": errors, "placements": str(out.placements), "shape": tuple(out.shape)}


def placed() -> dict[str, Any]:
    """All ways to cut a call that work, on 4 ranks."""
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    rep, batch, heads, seq = Replicate(), Shard(0), Shard(1), Shard(2)
    found = {
        "whole": compare(line, [rep], causal=True),
        "batch": compare(line, [batch], causal=True),
        "heads": compare(line, [heads], causal=True, sinks=True),
        "heads of mqa": compare(line, [heads], [rep], heads_kv=1, causal=True),
        "heads, whole kv": compare(line, [heads], [rep], heads_kv=2),
        "batch and heads": compare(square, [batch, heads], causal=True),
        "heads twice": compare(square, [heads, heads], causal=True),
        "bshd heads": compare(line, [Shard(2)], layout="bshd", causal=True),
        "sbhd batch": compare(line, [Shard(1)], layout="sbhd"),
    }
    for name in ("sequence", "sequence, bshd"):
        layout = "bshd" if "bshd" in name else "bhsd"
        found[name] = compare(line, [Shard(layout.index("s"))], layout=layout, causal=True)
        decision = last_decision()
        assert decision is not None
        found[name]["lengths"] = decision.request.q.lengths
    found["batch and sequence"] = compare(square, [batch, seq], causal=True)
    found["sequence and heads"] = compare(square, [seq, heads], causal=True, sinks=True)
    return found


def compiled() -> dict[str, Any]:
    """The operators that torch.compile puts into a graph, on 2 ranks: errors of output and gradients."""
    mesh = init_device_mesh("cpu", (2,))
    found: dict[str, Any] = {}
    for name, placements in {"heads": [Shard(1)], "batch": [Shard(0)], "whole": [Replicate()]}.items():
        torch.compiler.reset()
        call = torch.compile(
            lambda q, k, v, sinks: attnrt.attention(q, k, v, sinks=sinks, causal=True),
            backend="aot_eager",
            fullgraph=True,
        )
        tensors = [t.float() for t in whole()]
        sinks = torch.linspace(-1, 1, 8)
        leaves = [t.clone().requires_grad_() for t in (*tensors[:3], sinks)]
        want = exact(*leaves[:3], True, "bhsd", leaves[3])
        want.backward(tensors[3])
        given = [distribute_tensor(t, mesh, placements).requires_grad_() for t in tensors[:3]]
        given.append(distribute_tensor(sinks, mesh, [Replicate()]).requires_grad_())
        out = call(*given)
        assert out.placements == tuple(placements)
        out.backward(distribute_tensor(tensors[3], mesh, placements))
        errors = [float((out.full_tensor() - want).abs().max().detach())]
        for leaf, mine in zip(leaves, given, strict=True):
            assert mine.grad is not None and leaf.grad is not None
            errors.append(float((mine.grad.full_tensor() - leaf.grad).abs().max()))
        found[name] = errors
    q, k, v, _ = (distribute_tensor(t.float(), mesh, [Shard(2)]) for t in whole())
    torch.compiler.reset()
    call = torch.compile(lambda q, k, v: attnrt.attention(q, k, v), backend="aot_eager")
    found["sequence"] = ended(lambda: call(q, k, v))
    return found


def inferred() -> dict[str, Any]:
    """The same where nothing wants a gradient, on 2 ranks: which operators, how the outputs lie, and their errors."""
    mesh = init_device_mesh("cpu", (2,))
    mask = torch.rand(4, 8, 22, 22, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[..., 0] = True
    tensors = [t.float() for t in whole()[:3]]
    ways: dict[str, dict[str, Any]] = {"plain": {}, "mask": {"mask": mask}, "LSE": {"return_lse": True}}
    found: dict[str, Any] = {}
    for kind, placements in {"heads": [Shard(1)], "batch": [Shard(0)], "whole": [Replicate()]}.items():
        for way, options in ways.items():
            seen: list[str] = []

            def look(module: torch.fx.GraphModule, example: Any, seen: list[str] = seen) -> Any:
                seen += [str(n.target) for n in module.graph.nodes if str(n.target).startswith("attnrt.")]
                return torch._dynamo.lookup_backend("aot_eager")(module, example)

            def call(q: Tensor, k: Tensor, v: Tensor, given: Any, options: Any = options) -> Any:
                return attnrt.attention(q, k, v, causal=True, **options | given)

            torch.compiler.reset()
            compiled = torch.compile(call, backend=look, fullgraph=True)
            given = [distribute_tensor(t, mesh, placements) for t in tensors]
            cut = {"mask": distribute_tensor(mask, mesh, placements)} if way == "mask" else {}
            with torch.no_grad():
                got, want = compiled(*given, cut), call(*tensors, {})
            outputs = zip(got, want, strict=True) if way == "LSE" else [(got, want)]
            errors = [float((x.full_tensor() - y).abs().max()) for x, y in outputs]
            out = got[0] if way == "LSE" else got
            found[f"{way}, {kind}"] = (seen, out.placements == tuple(placements), errors)
        options = ("bhsd", True, None, None, None, None, 0.0, None, None, None, False, None, None, None, "")
        arguments = (*operands.NO_OPERANDS, *options, execution.AT_RUN_TIME, [False] * 5)
        out, lse, _ = operators.FORWARD(*(distribute_tensor(t, mesh, placements) for t in tensors), *arguments)
        error = float((out.full_tensor() - attnrt.attention(*tensors, causal=True)).abs().max())
        whole_lse = lse.placements == (Replicate(),) and lse.shape == (0,)  # there is none
        found[f"bare, {kind}"] = ([str(operators.FORWARD)], out.placements == tuple(placements) and whole_lse, [error])
    return found


def ended(call: Callable[[], Any]) -> tuple[str, str]:
    try:
        call()
    except Exception as error:
        return type(error).__name__, str(error)
    return "", ""


def refused() -> dict[str, Any]:
    """What is not answered, on 2 ranks; and torch's own context_parallel."""
    import torch.nn.functional as F
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh("cpu", (2,))
    q, k, v, _ = (t.float() for t in whole())
    rep, batch, heads, seq, dim = [Replicate()], [Shard(0)], [Shard(1)], [Shard(2)], [Shard(3)]

    def cut(x: Tensor, placements: Any) -> DTensor:
        return distribute_tensor(x, mesh, placements)

    def call(pq: Any, pk: Any, pv: Any, **options: Any) -> Callable[[], Any]:
        return lambda: attnrt.attention(cut(q, pq), cut(k, pk), cut(v, pv), **options)

    partial = DTensor.from_local(q, mesh, [Partial()])
    found: dict[str, Any] = {
        "mixed": ended(lambda: attnrt.attention(cut(q, batch), k, v)),
        "queries cut, keys whole": ended(call(seq, rep, rep)),
        "keys cut, queries whole": ended(call(rep, seq, seq)),
        "head dim": ended(call(dim, dim, dim)),
        "partial": ended(lambda: attnrt.attention(partial, cut(k, rep), cut(v, rep))),
        "odd heads": ended(lambda: attnrt.attention(*(cut(t[:, :3], heads) for t in (q, q, q)))),
        "mask of a cut sequence": ended(call(seq, seq, seq, mask=torch.ones(22, 22, dtype=torch.bool))),
        "explained": ended(lambda: attnrt.explain(cut(q, seq), cut(k, seq), cut(v, seq))),
    }
    found["explained heads"] = attnrt.explain(cut(q, heads), cut(k, heads), cut(v, heads)).request.heads_q
    size = 8
    buffers = [torch.randn(1, 4, size, 8) for _ in range(3)]
    original = F.scaled_dot_product_attention
    with context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2]):
        assert buffers[0].shape[2] == size // 2
        found["inside torch's context_parallel"] = ended(lambda: attnrt.attention(*buffers))
        compiled = torch.compile(lambda q, k, v: attnrt.attention(q, k, v), backend="eager")
        found["compiled inside it"] = ended(lambda: compiled(*buffers))
    assert F.scaled_dot_product_attention is original
    found["after it"] = ended(lambda: attnrt.attention(*buffers))
    dist.barrier()
    return found


def pair() -> dict[str, Any]:
    """What 2 ranks do."""
    return {"refused": refused(), "compiled": compiled(), "inferred": inferred()}


def helpers() -> dict[str, bool]:
    """Cutting and joining, a group of one, autocast, checkpointing, and a report, on 2 ranks: what holds."""
    from torch.utils.checkpoint import checkpoint

    mesh = init_device_mesh("cpu", (2,))
    rank = dist.get_rank()
    x = torch.arange(2 * 11 * 3).view(2, 11, 3)
    found = {}
    for kind in ("contiguous", "zigzag"):
        part = shard(x, mesh, 1, kind)
        where = local_positions(11, mesh, kind)
        found[f"{kind}: positions"] = torch.equal(part, x[:, where])
        found[f"{kind}: joined"] = torch.equal(unshard(part, mesh, 1, kind), x)
    uneven = x[:, :7] if rank == 0 else x[:, 7:]
    found["uneven joined"] = torch.equal(unshard(uneven, mesh, 1), x)
    q, k, v = (t.float() for t in whole()[:3])
    alone = [dist.new_group([r]) for r in range(2)][rank]
    own = context_parallel_attention(q, k, v, mesh=alone, causal=True)
    found["one rank"] = torch.equal(own, attnrt.attention(q, k, v, causal=True))
    parts = [shard(t, mesh, 2).requires_grad_() for t in (q, k, v)]
    for method in ("gather", "ulysses", "ring"):

        def call(*tensors: Tensor, method: str = method) -> Tensor:
            return context_parallel_attention(*tensors, mesh=mesh, method=method, causal=True)

        plain = torch.autograd.grad(call(*parts).square().sum(), parts)
        again = checkpoint(call, *parts, use_reentrant=False)
        same = zip(plain, torch.autograd.grad(again.square().sum(), parts), strict=True)
        found[f"{method}: checkpoint"] = all(torch.equal(a, b) for a, b in same)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found[f"{method}: autocast"] = call(*parts).dtype == torch.bfloat16
        report = explain(*parts, mesh=mesh, method=method, causal=True)
        found[f"{method}: report"] = report.method == method and report.backends == ("torch[flash_cpu]",)
    return found
