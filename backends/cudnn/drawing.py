"""A graph drawn from its spec, as far as cuDNN's support check, and its plan built.

Imports no cuDNN: the frontend's module is an argument, so that a graph can be drawn for a GPU that is not here
(attnrt.backends.cudnn.deviceless).
"""

from __future__ import annotations

import re
from typing import Any

from attnrt.backends.cudnn.graphs import GraphSpec, Plane, Uid, dense
from attnrt.backends.cudnn.layouts import Strides

BY_ROWS = ("1", "8")
"""Engines that read several queries' pages row by row, and none past a sequence's end. The others load whole tiles, and
a NaN in a slot that nobody uses reached the output (cuDNN 9.19, H200; tools/cudnn_facts.py --only nan_in_pages)."""


class Unsupported(RuntimeError):
    """cuDNN does not take a graph. The message is its own."""


def draw(cudnn: Any, spec: GraphSpec, every_engine: bool = False, **where: Any) -> Any:
    """The graph, checked by the library and ready for its plan to be built. Its fallback engines are asked for
    only where its heuristic has none: asking takes as long as all the rest.

    Never with a kernel cache: plans that share one build in 10 ms where others take 50 to 500, and gave wrong numbers
    for every length but the first (cuDNN 9.19, frontend 1.28, H200; tools/cudnn_facts.py --only
    kernel_cache_across_lengths).

    Args:
        every_engine: also those that are known to be wrong for the graph.
        where: what `cudnn.pygraph` needs to know the GPU: a handle, or sm_version and device_property.

    Raises:
        Unsupported: the library refuses the graph.
    """
    refused = (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError)
    try:
        return _planned(cudnn, spec, cudnn.heur_mode.A, every_engine, where)
    except refused as error:
        first = error
    try:
        return _planned(cudnn, spec, cudnn.heur_mode.FALLBACK, every_engine, where)
    except refused:
        raise Unsupported(words(first)) from first


def _planned(cudnn: Any, spec: GraphSpec, mode: Any, every_engine: bool, where: dict[str, Any]) -> Any:
    types = cudnn.data_type
    graph = cudnn.pygraph(
        name="attnrt",
        io_data_type=_dtype(cudnn, spec.dtype),
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        **where,
    )
    (_backward if spec.backward else _forward)(cudnn, graph, spec)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([mode])
    if _several_paged(spec) and not every_engine:
        _bar_others(graph, spec)
    graph.check_support()
    return graph


def plans(graph: Any, spec: GraphSpec) -> list[str]:
    """The names of those plans that the library proposes that may run, the one that will first: eng2_k24=7, say."""
    names = [graph.get_plan_name_at_index(i) for i in range(graph.get_execution_plan_count())]
    return [name for name in names if not _several_paged(spec) or _engine(name) in BY_ROWS]


def _several_paged(spec: GraphSpec) -> bool:
    return spec.pages is not None and spec.shape.seqlen_q > 1


def _engine(plan: str) -> str:
    found = re.match(r"eng(\d+)", plan)
    return found[1] if found else ""


def _bar_others(graph: Any, spec: GraphSpec) -> None:
    allowed = plans(graph, spec)
    names = [graph.get_plan_name_at_index(i) for i in range(graph.get_execution_plan_count())]
    if not allowed:
        raise RuntimeError(f"of its engines ({', '.join(names)}) none is known to read pages row by row")
    graph.deselect_engines([name for name in names if name not in allowed])


def finish(cudnn: Any, graph: Any) -> None:
    """Build the plan of a supported graph: the kernel is compiled.

    Raises:
        Unsupported: the library cannot.
    """
    try:
        graph.build_plans()
    except (cudnn.cudnnGraphNotSupportedError, RuntimeError, ValueError) as error:
        raise Unsupported(words(error)) from error


def words(error: Exception) -> str:
    """What the library said, in one line; it may append the whole graph as JSON."""
    text = " ".join(str(error).split())
    text = text.partition("the backend declined: ")[2] or text
    for mark in ("{", "____"):
        text = text.partition(mark)[0]
    text = text.strip(" :(").removesuffix(" for") or type(error).__name__
    return text if len(text) <= 400 else text[:397] + "..."


def _dtype(cudnn: Any, name: str) -> Any:
    types = cudnn.data_type
    return {"fp16": types.HALF, "bf16": types.BFLOAT16, "fp32": types.FLOAT}[name]


class _Tensors:
    """Makes a graph's tensors."""

    def __init__(self, cudnn: Any, graph: Any, spec: GraphSpec) -> None:
        self.cudnn, self.graph, self.spec = cudnn, graph, spec
        self.types = cudnn.data_type
        self._offsets: dict[Uid, Any] = {}

    def tensor(self, uid: Uid, dims: Any, strides: Any, dtype: Any) -> Any:
        return self.graph.tensor(
            name=uid.name.lower(), dim=list(dims), stride=list(strides), data_type=dtype, uid=int(uid)
        )

    def dims(self, uid: Uid) -> tuple[int, int, int, int]:
        spec, shape = self.spec, self.spec.shape
        queries = uid in (Uid.Q, Uid.O, Uid.DO, Uid.DQ)
        dim = spec.dim_v if uid in (Uid.V, Uid.O, Uid.DO, Uid.DV) else spec.dim_qk
        if spec.pages is not None and not queries:
            return spec.pages.total, spec.heads_kv, spec.pages.size, dim
        if queries:
            return shape.batch, spec.heads_q, shape.seqlen_q, dim
        return shape.batch, spec.heads_kv, shape.seqlen_kv, dim

    def offsets(self, at: Uid) -> Any:
        dtype = self.types.INT64 if self.spec.wide_offsets else self.types.INT32
        return self.tensor(at, (self.spec.shape.batch + 1, 1, 1, 1), (1, 1, 1, 1), dtype)

    def operand(self, uid: Uid, strides: Strides, at: Uid) -> Any:
        x = self.tensor(uid, self.dims(uid), (*strides, 1), _dtype(self.cudnn, self.spec.dtype))
        if self.spec.shape.ragged:
            x.set_ragged_offset(self.offsets(at))
        return x

    def result(self, x: Any, uid: Uid, strides: Strides, at: Uid) -> None:
        x.set_uid(int(uid)).set_output(True).set_dim(list(self.dims(uid))).set_stride([*strides, 1])
        x.set_data_type(_dtype(self.cudnn, self.spec.dtype))
        if self.spec.shape.ragged:
            x.set_ragged_offset(self.offsets(at))

    def stats_layout(self) -> tuple[list[int], list[int]]:
        shape, heads = self.spec.shape, self.spec.heads_q
        dims = [shape.batch, heads, shape.seqlen_q, 1]
        if shape.packed_lse:
            return dims, [heads * shape.seqlen_q, 1, heads, 1]
        return dims, [heads * shape.seqlen_q, shape.seqlen_q, 1, 1]

    def plane(self, uid: Uid, plane: Plane) -> Any:
        return self.tensor(uid, plane.dims, plane.strides, _dtype(self.cudnn, plane.dtype))

    def options(self) -> dict[str, Any]:
        """What forward and backward are told alike."""
        spec, shape, types = self.spec, self.spec.shape, self.types
        found: dict[str, Any] = {"attn_scale": spec.scale}
        if spec.left is not None or spec.right is not None:
            alignment = self.cudnn.diagonal_alignment
            found["diagonal_alignment"] = alignment.BOTTOM_RIGHT if spec.bottom_right else alignment.TOP_LEFT
        if spec.left is not None:
            found["diagonal_band_left_bound"] = spec.left + 1  # the first key that is hidden
        if spec.right is not None:
            found["diagonal_band_right_bound"] = spec.right
        if spec.bias is not None:
            found["bias"] = self.plane(Uid.BIAS, spec.bias)
        if spec.dropout_p:
            seed, offset = (self.tensor(u, (1, 1, 1, 1), (1, 1, 1, 1), types.INT64) for u in (Uid.SEED, Uid.OFFSET))
            found["dropout"] = (spec.dropout_p, seed, offset)
        if shape.lengths:
            found["use_padding_mask"] = True
            for name, uid in (("seq_len_q", Uid.LENGTH_Q), ("seq_len_kv", Uid.LENGTH_KV)):
                found[name] = self.tensor(uid, (shape.batch, 1, 1, 1), (1, 1, 1, 1), types.INT32)
        if spec.sinks:
            found["sink_token"] = self.tensor(Uid.SINKS, (1, spec.heads_q, 1, 1), (spec.heads_q, 1, 1, 1), types.FLOAT)
        return found


def _forward(cudnn: Any, graph: Any, spec: GraphSpec) -> None:
    t = _Tensors(cudnn, graph, spec)
    q = t.operand(Uid.Q, spec.q, Uid.AT_Q)
    k = t.operand(Uid.K, spec.k, Uid.AT_K)
    v = t.operand(Uid.V, spec.v, Uid.AT_V)
    options = t.options()
    if (pages := spec.pages) is not None:
        table = (spec.shape.batch, 1, pages.per_sequence, 1)
        for name, uid in (("k", Uid.PAGES_K), ("v", Uid.PAGES_V)):
            apart = (pages.table_stride, pages.table_stride, 1, 1)
            options[f"paged_attention_{name}_table"] = t.tensor(uid, table, apart, t.types.INT32)
        options["paged_attention_max_seq_len_kv"] = spec.shape.seqlen_kv
    o, stats = graph.sdpa(name="sdpa", q=q, k=k, v=v, generate_stats=spec.stats, **options)
    t.result(o, Uid.O, spec.o, Uid.AT_O)
    if spec.stats:
        dims, strides = t.stats_layout()
        stats.set_uid(int(Uid.STATS)).set_output(True).set_dim(dims).set_stride(strides)
        stats.set_data_type(t.types.FLOAT)
        if spec.shape.packed_lse:
            stats.set_ragged_offset(t.offsets(Uid.AT_STATS))


def _backward(cudnn: Any, graph: Any, spec: GraphSpec) -> None:
    assert spec.do is not None and spec.dq is not None and spec.dk is not None and spec.dv is not None
    t, shape = _Tensors(cudnn, graph, spec), spec.shape
    q = t.operand(Uid.Q, spec.q, Uid.AT_Q)
    k = t.operand(Uid.K, spec.k, Uid.AT_K)
    v = t.operand(Uid.V, spec.v, Uid.AT_V)
    o = t.operand(Uid.O, spec.o, Uid.AT_O)
    do = t.operand(Uid.DO, spec.do, Uid.AT_DO)
    dims, strides = t.stats_layout()
    stats = t.tensor(Uid.STATS, dims, strides, t.types.FLOAT)
    if shape.packed_lse:
        stats.set_ragged_offset(t.offsets(Uid.AT_STATS))
    options = t.options()
    if spec.bias_grad and spec.bias is not None:
        options["dBias"] = t.plane(Uid.DBIAS, spec.bias._replace(strides=dense(spec.bias.dims)))
    if spec.sinks_grad:
        options["dSink_token"] = t.tensor(Uid.DSINKS, (1, spec.heads_q, 1, 1), (spec.heads_q, 1, 1, 1), t.types.FLOAT)
    if shape.most_tokens_q is not None:
        options["max_total_seq_len_q"] = shape.most_tokens_q
        options["max_total_seq_len_kv"] = shape.most_tokens_kv
    dq, dk, dv = graph.sdpa_backward(
        name="sdpa_backward", q=q, k=k, v=v, o=o, dO=do, stats=stats,
        use_deterministic_algorithm=spec.deterministic, **options,
    )  # fmt: skip
    t.result(dq, Uid.DQ, spec.dq, Uid.AT_DQ)
    t.result(dk, Uid.DK, spec.dk, Uid.AT_DK)
    t.result(dv, Uid.DV, spec.dv, Uid.AT_DV)
