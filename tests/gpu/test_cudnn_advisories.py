"""Each advisory on the cuDNN backend: reproduced, or shown fixed or avoided, in the version that is installed.

`-rA` shows what was seen. Numbers that are wrong without an advisory that says so fail.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cudnn_calls import BACKEND, NEEDS, biased, call, environment, kept_at, padded
from devices import packed
from oracle import Case, assert_agrees, gradients
from torch import Tensor

from attnrt.advisories import load_advisories, matching
from attnrt.backends.base import reasons
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

pytestmark = NEEDS
HERE, RIGHT = Path(__file__).resolve(), "the numbers are right"


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield from kept_at(tmp_path_factory.mktemp("plans"))


def low(case: Case, lse: float = -120.0) -> Case:
    """Scores of about `lse`: keys against the queries."""
    with torch.no_grad():
        dim = case.q.shape[-1]
        case.q.mul_(0.1).add_(1)
        case.k.mul_(0.1).sub_(-lse / math.sqrt(dim))
    return case


def low_bias() -> Case:
    case = biased(192, (1, 4, 192, 192), grad=False)
    assert case.operands.bias is not None
    with torch.no_grad():
        case.operands.bias.sub_(100)
    return case


def packed_sinks(training: bool = True) -> Case:
    case = packed(100, 30, 60, dim=80, causal=True, return_lse=False, training=training)
    sinks = torch.randn(4, device="cuda", requires_grad=training)
    case.operands = case.operands._replace(sinks=sinks)
    return case


def unequal(dim: int, dim_v: int) -> Case:
    return call(512, dim=dim, dim_v=dim_v, causal=True)


CASES: list[tuple[str, Callable[[], Case]]] = [
    ("CUDNN_BWD_NAN_BIAS_SKV_64", low_bias),
    ("CUDNN_BWD_NAN_LOW_LSE_SKV_64", lambda: low(call(192))),
    ("CUDNN_BWD_NAN_SINGLE_QUERY", lambda: low(call(1, 128))),
    ("CUDNN_FEW_KV_HEADS_SM100", lambda: call(512, heads=(8, 2), causal=True, training=False)),
    ("CUDNN_FEW_KV_HEADS_UNCONFIRMED", lambda: call(512, heads=(8, 2), causal=True)),
    ("CUDNN_EMPTY_SEQUENCE", lambda: packed(100, 0, 60, 5, keys=(50, 30, 0, 9))),
    ("CUDNN_EMPTY_SEQUENCE", lambda: padded(100, (100, 0, 60, 5), (50, 30, 0, 9), seqlen_kv=50)),
    ("CUDNN_BWD_UNEQUAL_HEAD_DIMS", lambda: unequal(256, 128)),
    ("CUDNN_BWD_UNEQUAL_HEAD_DIMS", lambda: unequal(160, 128)),
    ("CUDNN_BWD_UNEQUAL_HEAD_DIMS_192", lambda: unequal(192, 160)),
    ("CUDNN_BWD_PACKED_SINKS", packed_sinks),
    ("CUDNN_PACKED_SINKS_EARLY", lambda: packed_sinks(training=False)),
    ("CUDNN_PACKED_LSE_SINGLE_QUERY", lambda: packed(1, 1, 1, keys=(50, 700, 3), heads=(8, 2))),
    ("CUDNN_BWD_PACKED_WORKSPACE", lambda: packed(400, 300, 250, heads=(4, 1), causal=True)),
    ("CUDNN_BWD_PACKED_SM120", lambda: packed(400, 300, 250, heads=(4, 1), causal=True)),
    ("CUDNN_9_10_0_AND_1", lambda: call(256, causal=True)),
    ("CUDNN_9_14_0_WINDOW", lambda: call(1536, window=(128, 64))),
    ("CUDNN_CUDA_GRAPH_LONG_KV", lambda: call(1536, training=False)),
    ("CUDNN_BWD_CUDA_GRAPH_SKV", lambda: call(1000)),
    ("CUDNN_BWD_SKV", lambda: call(1000)),
    ("CUDNN_FRONTEND_BWD_RESHAPE", lambda: call(256, causal=True)),
    ("CUDNN_BWD_CRASH_SINGLE_QUERY_AND_HEAD", lambda: call(1, 128, heads=(1, 1), batch=1)),
    ("CUDNN_HANG_SM103", lambda: call(256, 8192, causal=True, alignment="bottom_right", batch=1, training=False)),
    ("CUDNN_BIAS_GRAD_LONG", lambda: biased(256, (1, 1, 256, 33280), seqlen_kv=33280, heads=(1, 1), batch=1)),
]
CAPTURED = ("CUDNN_CUDA_GRAPH_LONG_KV", "CUDNN_BWD_CUDA_GRAPH_SKV")
FATAL = ("CUDNN_BWD_CRASH_SINGLE_QUERY_AND_HEAD", "CUDNN_HANG_SM103", "CUDNN_BWD_PACKED_SINKS")
"""Where these apply, a process of their own may not live to tell."""
NOT_OURS = {"CUDNN_BWD_NAN_MASK_SKV_64": "a mask is refused by a rule", "CUDNN_DROPOUT_HEURISTICS": "torch.cudnn's"}


def test_every_advisory_has_a_case() -> None:
    about = {a.id for a in load_advisories() if any(b.endswith("cudnn") for b in a.backends)}
    assert {id for id, _ in CASES} | set(NOT_OURS) == about


def found_by(case: Case, request: AttentionRequest, here: Environment) -> dict[str, Tensor]:
    """What the library makes of it, whatever our rules say."""
    made = BACKEND.prepare(request, here)(case.q, case.k, case.v, case.operands)
    out, lse = made if request.needs_lse else (made, None)
    return {"out": out, **gradients(case, out, case.leaves())} | ({} if lse is None else {"lse": lse})


def captured(case: Case, request: AttentionRequest, here: Environment) -> dict[str, Tensor]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found_by(case, request, here)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = found_by(case, request, here)
    graph.replay()
    return found


def attempt(id: str, case: Case, here: Environment) -> str:
    """What came of it, in words."""
    try:
        found = (captured if id in CAPTURED else found_by)(case, case.request(), here)
        torch.cuda.synchronize()
        with torch.device("cuda"):
            assert_agrees(case, found)
    except (AssertionError, RuntimeError) as error:
        return f"wrong: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return RIGHT


def alone(id: str) -> str:
    """The same in a process of its own."""
    paths = (str(HERE.parents[2]), str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", ""))
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    try:
        done = subprocess.run([sys.executable, str(HERE), id], env=env, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "wrong: nothing after 60 s"
    return done.stdout.splitlines()[-1] if done.returncode == 0 else f"wrong: exit status {done.returncode}"


@pytest.mark.parametrize(("id", "make"), CASES, ids=[f"{id}-{i}" for i, (id, _) in enumerate(CASES)])
def test_advisory(id: str, make: Callable[[], Case]) -> None:
    case, here = make(), environment()
    request = replace(case.request(), capturing=id in CAPTURED)
    applies = {a.id for a in matching("cudnn", "cudnn", request, here)}
    refused = [r.rule for r in reasons(BACKEND.all_rules, request, here)]
    said = alone(id) if id in FATAL and id in applies else attempt(id, case, here)
    where = f"{'applies to' if id in applies else 'not for'} cuDNN {here.version('cudnn')}, {here.arch}"
    print(f"{id} ({where}{'; refused by ' if refused else ''}{', '.join(refused)}): {said}")
    assert "CUDA error" not in said or id in FATAL, said
    assert said == RIGHT or applies or refused, f"no advisory covers {request.describe()}: {said}"


if __name__ == "__main__":
    print(attempt(sys.argv[1], dict(CASES)[sys.argv[1]](), environment()))
