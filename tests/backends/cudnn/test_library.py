"""Our rules beside the real libcudnn's own verdicts, for GPUs that are not here (`make test-cudnn`).

Every request is put to the support check; of those that our rules accept, a sample of all kinds has its plans built in
full: 48 requests, a second for each plan.
"""

from __future__ import annotations

import importlib.util
import random
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from attnrt.backends.base import reasons
from attnrt.backends.cudnn import CuDNN
from attnrt.backends.cudnn.memory import workspace
from attnrt.environment import Environment
from attnrt.errors import ArgumentError
from attnrt.request import AttentionRequest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("cudnn") is None, reason="needs attnrt[cudnn-deviceless]: make test-cudnn"
)
BACKEND = CuDNN()
GPUS = ("a100", "h200", "b200")
PARTS, OF_EACH = 4, 150
"""Parts run side by side; requests of each, for every GPU."""
BUILT = 4
"""Requests of each part and GPU whose plans are built."""
STRICTER = {
    "CUDNN_SCALE": "the library multiplies by any scale, and hides before it does",
    "CUDNN_BIAS_ROWS": "the support check lets a bias of one row pass; on an H200 its gradients were wrong",
    "CUDNN_PAGED_QUERIES": "the support check knows nothing of NaN in unused slots",
    "CUDNN_BIAS_SHAPE": "the support check lets a bias of one column pass in places; nobody has tried the numbers",
    "CUDNN_BIAS_LENGTHS": "Transformer Engine refuses it, and nobody has tried the numbers",
    "CUDNN_BOTTOM_RIGHT_BIAS": "the frontend documents it as excluded, and its check looks at causal masks alone",
    "CUDNN_BOTTOM_RIGHT_DROPOUT": "the frontend documents it as excluded, and its check looks at causal masks alone",
    "CUDNN_HEAD_DIM_DECODE": "Transformer Engine refuses it, and nobody has tried the numbers",
    "CUDNN_SINKS_LSE": "the library's LSE is of another definition",
    "CUDNN_SINKS_LENGTHS_GRAD_VERSION": "the support check lets it pass; on an H200 the sinks' gradient was garbage",
    "CUDNN_SINKS_DETERMINISTIC": "the library takes the flag and sums the sinks' gradient in any order",
    "CUDNN_DETERMINISTIC_SM120": "Transformer Engine does not trust it",
}
"""Rules that refuse what the library takes, and why."""
LOOSER: tuple[tuple[str, Callable[[AttentionRequest], bool]], ...] = (
    (
        "dropout for one query with head dims over 128",
        lambda r: r.seqlen_q == 1 and r.dropout_p > 0 and r.head_dim > 128,
    ),
)
"""What the library refuses and no rule foresees, as too rare for one: the report has the library's words then."""


def drawn(rng: random.Random) -> AttentionRequest:
    """A request that a user might make; odd ones more often than they do."""
    while True:
        heads_kv = rng.choice((1, 2, 4, 8))
        dim = rng.choice((32, 64, 64, 72, 96, 128, 128, 160, 192, 256))
        seqlen = rng.choice((1, 17, 64, 128, 1000, 1024, 2048))
        o: dict[str, Any] = {
            "batch": rng.choice((1, 2, 3, 8)),
            "heads_q": heads_kv * rng.choice((1, 1, 4, 8)),
            "heads_kv": heads_kv,
            "seqlen_q": seqlen,
            "seqlen_kv": rng.choice((seqlen, seqlen, 64, 640, 1000, 2048)),
            "head_dim": dim,
            "head_dim_v": rng.choice((dim, dim, dim, 128, 64)),
            "dtype": rng.choice(("bf16", "fp16")),
            "layout": rng.choice(("bhsd", "bshd", "sbhd")),
            "alignment": rng.choice(("top_left", "bottom_right")),
            "training": rng.random() < 0.5,
            "return_lse": rng.random() < 0.3,
        }
        kind = rng.choice(("causal", "causal", "full", "left", "band"))
        if kind == "causal":
            o["causal"] = True
        elif kind != "full":
            o["window"] = {"left": (127, 0), "band": (64, 64)}[kind]
        lengths = rng.choice(("none", "none", "padded", "packed", "paged"))
        if lengths == "packed":
            o |= {"packed": True, "layout": "thd"}
        elif lengths != "none":
            o["padded"] = True
        if lengths == "paged":
            o |= {"page_size": rng.choice((16, 64)), "training": False, "layout": rng.choice(("bhsd", "bshd"))}
            o |= {"seqlen_kv": 640, "seqlen_q": rng.choice((1, 1, 4))}
        extra = rng.choice(("none", "none", "none", "bias", "dropout", "sinks", "deterministic", "scale"))
        if extra == "bias":
            full = (o["batch"], o["heads_q"], o["seqlen_q"], o["seqlen_kv"])
            o["bias"] = tuple(n if rng.random() < 0.7 else 1 for n in full)
            o["bias_grad"] = o["training"] and rng.random() < 0.5
        elif extra != "none":
            o |= {"dropout": {"dropout_p": 0.1}, "sinks": {"sinks": True}, "scale": {"scale": 0.0}}.get(
                extra, {"deterministic": True}
            )
        try:
            return AttentionRequest.from_shape(**o)
        except ArgumentError:
            continue


def requests(part: int) -> list[AttentionRequest]:
    rng = random.Random(part)
    return [drawn(rng) for _ in range(OF_EACH)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("part", range(PARTS))
def test_rules_and_library_agree(gpu: str, part: int) -> None:
    from attnrt.backends.cudnn.deviceless import ask

    here, wrong, both = Environment.named(gpu), [], Counter[bool]()
    for r in requests(part):
        ours, theirs = reasons(BACKEND.all_rules, r, here), ask(r, gpu)
        both[theirs.eligible] += 1
        if theirs.eligible and any(reason.rule not in STRICTER for reason in ours):
            wrong.append(f"only we refuse {r.describe()}: {', '.join(reason.rule for reason in ours)}")
        if not theirs.eligible and not ours:
            said = theirs.refusals[0].message
            if not any(foreseen(r) for _, foreseen in LOOSER):
                wrong.append(f"only the library refuses {r.describe()}: {said}")
    assert not wrong, "\n".join(wrong)
    assert min(both[True], both[False]) >= OF_EACH // 20, both


def traits(r: AttentionRequest) -> set[tuple[str, ...]]:
    """What a request is like, one by one and two by two."""
    kind = "paged" if r.paged else "packed" if r.packed else "padded" if r.padded else "plain"
    band = "left" if r.left is not None else "causal" if r.causal else "full"
    dims = "unequal" if r.head_dim_qk != r.head_dim_v else str(-(-r.head_dim_qk // 64))
    features = ("deterministic", r.deterministic), ("dropout", r.dropout_p > 0), ("sinks", r.sinks), ("bias", r.bias)
    single = [
        kind, band, f"dims {dims}", f"training {r.needs_grad}", f"gqa {r.heads_q > r.heads_kv}", r.layout, r.dtype,
        f"{r.alignment if r.banded else None}", f"one query {r.seqlen_q == 1}", *(n for n, there in features if there),
    ]  # fmt: skip
    return {(x,) for x in single} | {tuple(sorted((x, y))) for x in single for y in single if x < y}


@cache
def sample(gpu: str) -> tuple[AttentionRequest, ...]:
    """Of what our rules accept, the requests that between them are like the most: each the one that adds most."""
    here, seen = Environment.named(gpu), set[tuple[str, ...]]()
    left = [r for part in range(PARTS) for r in requests(part) if not reasons(BACKEND.all_rules, r, here)]
    likeness, found = {r: traits(r) for r in left}, []
    for _ in range(PARTS * BUILT):
        best = max(left, key=lambda r: len(likeness[r] - seen))
        left.remove(best)
        seen |= likeness[best]
        found.append(best)
    return tuple(found)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("part", range(PARTS))
def test_what_the_rules_accept_gets_a_plan(gpu: str, part: int) -> None:
    from attnrt.backends.cudnn.deviceless import ask

    here = Environment.named(gpu)
    for r in sample(gpu)[part::PARTS]:
        said = ask(r, gpu, build=True)
        assert said.eligible, (r.describe(), said.refusals)
        assert len(said.workspace) == (2 if r.needs_grad else 1)
        if r.needs_grad:
            estimate = workspace(r, here)
            assert said.workspace[1] <= 1.02 * estimate + (1 << 20), (r.describe(), said.workspace, estimate)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": (100, 0)}], ids=["full", "causal", "window"])
@pytest.mark.parametrize("seqlen_q", [2, 200])
def test_several_queries_against_pages_run_an_engine_that_reads_rows(
    seqlen_q: int, mask: dict[str, Any], dim: int, layout: str
) -> None:
    """What is built, and so kept on disk, and not only what is said to come first."""
    from attnrt.backends.cudnn.deviceless import ask, described_graph, gpu_named, library
    from attnrt.backends.cudnn.drawing import BY_ROWS, finish
    from attnrt.backends.cudnn.graphs import specs

    options: dict[str, Any] = mask | ({"alignment": "bottom_right"} if mask else {})
    sizes = {"batch": 2, "heads_q": 8, "heads_kv": 2, "seqlen_q": seqlen_q, "seqlen_kv": 640, "head_dim": dim}
    r = AttentionRequest.from_shape(**sizes, page_size=64, dtype="bf16", layout=layout, **options)
    assert not reasons(BACKEND.all_rules, r, Environment.named("h200"))
    graph = described_graph(specs(r, 90)[0], gpu_named("h200"))
    assert ask(r, "h200").plans[0].partition("_")[0] in [f"eng{n}" for n in BY_ROWS]
    finish(library(), graph)
    assert any(f'"engineId":{n},'.encode() in bytes(graph.serialize()) for n in BY_ROWS)


@pytest.mark.parametrize("gpu", ["h200", "b200"])
@pytest.mark.parametrize("heads_kv", [4, 32])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_workspace_of_a_large_packed_batch(gpu: str, heads_kv: int, deterministic: bool) -> None:
    """Whose tokens the plan is told, so that dk and dv of each query head add up in float32."""
    from attnrt.backends.cudnn.deviceless import ask

    sizes = {"batch": 17, "heads_q": 32, "heads_kv": heads_kv, "seqlen_q": 2048, "seqlen_kv": 2048, "head_dim": 128}
    options: dict[str, Any] = {"packed": True, "causal": True, "training": True, "deterministic": deterministic}
    r = AttentionRequest.from_shape(**sizes, **options)
    asked, estimate = ask(r, gpu, build=True).workspace[1], workspace(r, Environment.named(gpu))
    assert 0.98 * estimate <= asked <= 1.02 * estimate


def test_the_sample_has_every_kind() -> None:
    for gpu in GPUS:
        single = {t[0] for r in sample(gpu) for t in traits(r) if len(t) == 1}
        assert single >= {"plain", "padded", "packed", "paged", "causal", "left", "full", "dropout", "sinks", "bias"}


def test_no_difference_is_listed_that_is_none() -> None:
    """A rule that the library bears out by now is no longer stricter."""
    assert set(STRICTER) <= {rule.id for rule in BACKEND.all_rules}
