"""Bad calls, machines, variables, backends and command lines: each is a typed error with argument, value and remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import attnrt
from attnrt import cli
from attnrt.errors import (
    ArgumentError,
    ArgumentTypeError,
    AttnrtError,
    BackendFailed,
    BackendUnavailable,
    PolicyError,
    UnknownNameError,
    VariableError,
)

BUILTIN = {
    ArgumentError: ValueError,
    ArgumentTypeError: TypeError,
    BackendUnavailable: RuntimeError,
    PolicyError: ValueError,
    UnknownNameError: ValueError,
    VariableError: ValueError,
}
SHAPE: dict[str, Any] = {"batch": 1, "heads_q": 4, "seqlen_q": 8, "head_dim": 16}


class Case(NamedTuple):
    id: str
    call: Callable[[], Any]
    error: type[AttnrtError]
    says: tuple[str, ...]
    variables: dict[str, str] = {}


def ints(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def qkv(*shape: int) -> dict[str, Tensor]:
    return {name: torch.zeros(shape or (2, 4, 8, 16)) for name in "qkv"}


def call(**changes: Any) -> Callable[[], Any]:
    """2 sequences x 4 heads x 8 tokens x 16, changed."""
    return lambda: attnrt.attention(**{**qkv(), **changes})


def packed(**changes: Any) -> Callable[[], Any]:
    """8 tokens x 4 heads x 16, in sequences of 3 and 5, changed."""
    cu = ints(0, 3, 8)
    same = {"layout": "thd", "cu_seqlens_q": cu, "cu_seqlens_kv": cu}
    return lambda: attnrt.attention(**{**qkv(8, 4, 16), **same, **changes})


def paged(**changes: Any) -> Callable[[], Any]:
    """2 sequences of up to 2 pages of 8 keys, out of 3 pages, changed."""
    pools = {"k": torch.zeros(3, 4, 8, 16), "v": torch.zeros(3, 4, 8, 16)}
    tables = {"page_table": ints(0, 2, 1, 9).view(2, 2), "seqlens_kv": ints(16, 3)}
    return lambda: attnrt.attention(**{**qkv(), **pools, **tables, **changes})


def shape(**changes: Any) -> Callable[[], Any]:
    return lambda: attnrt.explain_shape(**{**SHAPE, **changes})


def simulate(*args: Any, **changes: Any) -> Callable[[], Any]:
    return lambda: attnrt.Environment.simulate(*args, **changes)


def command(line: str) -> Callable[[], Any]:
    return lambda: cli.app(line.split(), standalone_mode=False)


def cached(**changes: Any) -> Callable[[], Any]:
    """The same call after one that compares equal to it: 1 == True == 1.0, but only one of them is right."""
    right = {"causal": True, "deterministic": True, "softcap": 1.0, "window": (1, 0), "scale": 1.0, "dropout_p": 0.0}

    def run() -> Any:
        attnrt.attention(**qkv(), **right)
        return attnrt.attention(**qkv(), **{**right, **changes})

    return run


class Mine(attnrt.Backend):
    name, title, prefix = "mine", "Mine", "MINE"


def register(**attributes: Any) -> Callable[[], Any]:
    return lambda: attnrt.register_backend(type("Changed", (Mine,), attributes)())


def enter(block: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> None:
        with block():
            raise AssertionError("entered")

    return run


meta, f64 = torch.zeros(2, 4, 8, 16, device="meta"), torch.zeros(2, 4, 8, 16, dtype=torch.float64)

TENSORS = [
    Case("list", call(q=[[1.0]]), ArgumentTypeError, ("q=[[1.0]]", "torch.Tensor")),
    Case("numpy", call(k=np.zeros((2, 4, 8, 16))), ArgumentTypeError, ("k=<ndarray", "torch.Tensor")),
    Case("none", call(v=None), ArgumentTypeError, ("v=None", "torch.Tensor")),
    Case("ndim 3", call(q=torch.zeros(4, 8, 16)), ArgumentError, ("q.shape=(4, 8, 16)", "4 dims", "layout='thd'")),
    Case("ndim 5", call(v=torch.zeros(1, 2, 4, 8, 16)), ArgumentError, ("v.shape", "(B, H, S, D)")),
    Case("ndim 4, thd", packed(q=torch.zeros(1, 8, 4, 16)), ArgumentError, ("q.shape", "(T, H, D)")),
    Case("ndim 1, padded", call(q=torch.zeros(3), seqlens_q=ints(1)), ArgumentError, ("q.shape=(3,)", "4 dims")),
    Case("ndim 0, thd", packed(q=torch.tensor(1.0)), ArgumentError, ("q.shape=()", "3 dims")),
    Case(
        "int dtype",
        call(q=torch.zeros(2, 4, 8, 16).int()),
        ArgumentTypeError,
        ("q.dtype=torch.int32", "torch.bfloat16"),
    ),
    Case("mixed dtypes", call(k=f64), ArgumentTypeError, ("dtype", "torch.float64", "cast them")),
    Case("mixed devices", call(k=meta), ArgumentError, ("device", "meta", "share one device")),
    Case("mixed devices, q", call(q=meta), ArgumentError, ("device", "meta", "share one device")),
    Case(
        "sparse",
        call(q=torch.zeros(2, 4, 8, 16).to_sparse()),
        ArgumentTypeError,
        ("q.layout=torch.sparse_coo", "dense"),
    ),
    Case("batch", call(k=torch.zeros(1, 4, 8, 16)), ArgumentError, ("batch=(2, 1, 2)", "check layout=")),
    Case("kv heads", call(v=torch.zeros(2, 2, 8, 16)), ArgumentError, ("heads_kv=(4, 2)", "same number of heads")),
    Case("kv lengths", call(v=torch.zeros(2, 4, 9, 16)), ArgumentError, ("seqlen_kv=(8, 9)", "check layout=")),
    Case("head dims", call(q=torch.zeros(2, 4, 8, 32)), ArgumentError, ("head_dim=(32, 16)", "same head dim")),
    Case("groups", call(q=torch.zeros(2, 6, 8, 16)), ArgumentError, ("heads_kv=4", "heads_q=6", "[1, 2, 3, 6]")),
    Case("no heads", call(**qkv(2, 0, 8, 16)), ArgumentError, ("heads_q=0", "at least 1")),
    Case("no head dim", call(**qkv(2, 4, 8, 0)), ArgumentError, ("head_dim=0", "at least 1")),
]
OPTIONS = [
    Case("layout typo", call(layout="bshd "), UnknownNameError, ("layout='bshd '", "did you mean bshd?")),
    Case("layout list", call(layout=["bhsd"]), UnknownNameError, ("layout=['bhsd']", "valid are bhsd, bshd")),
    Case("layout array", call(layout=np.zeros(2)), UnknownNameError, ("layout=<ndarray (2,)", "valid are bhsd, bshd")),
    Case("alignment array", call(alignment=np.zeros(2)), UnknownNameError, ("alignment=<ndarray (2,)", "top_left")),
    Case("causal int", call(causal=1), ArgumentTypeError, ("causal=1", "True or False")),
    Case("causal int, cached", cached(causal=1), ArgumentTypeError, ("causal=1", "True or False")),
    Case("causal text", call(causal="yes"), ArgumentTypeError, ("causal='yes'", "True or False")),
    Case("deterministic int", call(deterministic=0), ArgumentTypeError, ("deterministic=0", "True or False")),
    Case("deterministic int, cached", cached(deterministic=1), ArgumentTypeError, ("deterministic=1", "True or False")),
    Case("return_lse int", call(return_lse=1), ArgumentTypeError, ("return_lse=1", "True or False")),
    Case("window -1", call(window=(-1, 0)), ArgumentError, ("window=(-1, 0)", "None here, not -1")),
    Case("window of 3", call(window=(1, 2, 3)), ArgumentTypeError, ("window=(1, 2, 3)", "pair (left, right)")),
    Case("window int", call(window=128), ArgumentTypeError, ("window=128", "pair (left, right)")),
    Case("window float", call(window=(1.5, 0)), ArgumentTypeError, ("window=(1.5, 0)", "integer")),
    Case("window float, cached", cached(window=(1.0, False)), ArgumentTypeError, ("window=(1.0, False)", "integer")),
    Case("window float", cached(window=(1.0, 0)), ArgumentTypeError, ("window=(1.0, 0)", "integer")),
    Case("window set", call(window={40, 3}), ArgumentTypeError, ("window={", "pair (left, right)")),
    Case("window range", call(window=range(2)), ArgumentTypeError, ("window=range(0, 2)", "pair (left, right)")),
    Case("window dict", call(window={1: 2, 0: 3}), ArgumentTypeError, ("window={1: 2, 0: 3}", "pair (left, right)")),
    Case("window bool, cached", cached(window=(True, False)), ArgumentTypeError, ("window=(True, False)", "integer")),
    Case(
        "alignment typo", call(alignment="topleft"), UnknownNameError, ("alignment='topleft'", "did you mean top_left?")
    ),
    Case(
        "alignment missing",
        call(q=torch.zeros(2, 4, 5, 16), causal=True),
        ArgumentError,
        ("alignment=None", "causal with Sq=5 and Skv=8", "'top_left' puts", "'bottom_right' at", "say which"),
    ),
    Case(
        "alignment missing, window and alibi",
        call(q=torch.zeros(2, 4, 5, 16), window=(2, 0), alibi_slopes=torch.ones(4)),
        ArgumentError,
        ("alignment=None", "window and alibi_slopes", "say which"),
    ),
    Case(
        "alignment missing, padded",
        call(seqlens_kv=ints(3, 8), causal=True),
        ArgumentError,
        ("alignment=None", "lengths that vary", "same tensor"),
    ),
    Case("softcap 0", call(softcap=0), ArgumentError, ("softcap=0", "None turns it off")),
    Case("softcap negative", call(softcap=-3.0), ArgumentError, ("softcap=-3.0", "over 0")),
    Case("softcap NaN", call(softcap=float("nan")), ArgumentError, ("softcap=nan", "finite")),
    Case("softcap bool", call(softcap=True), ArgumentTypeError, ("softcap=True", "number")),
    Case("softcap bool, cached", cached(softcap=True), ArgumentTypeError, ("softcap=True", "number")),
    Case("dropout 1", call(dropout_p=1.0), ArgumentError, ("dropout_p=1.0", "[0, 1)")),
    Case("dropout negative", call(dropout_p=-0.1), ArgumentError, ("dropout_p=-0.1", "[0, 1)")),
    Case("dropout None", call(dropout_p=None), ArgumentTypeError, ("dropout_p=None", "number")),
    Case("dropout bool, cached", cached(dropout_p=False), ArgumentTypeError, ("dropout_p=False", "number")),
    Case("scale tensor", call(scale=torch.tensor(0.5)), ArgumentTypeError, ("scale=<Tensor", "Python number")),
    Case("scale inf", call(scale=float("inf")), ArgumentError, ("scale=inf", "finite")),
    Case("scale text", call(scale="x"), ArgumentTypeError, ("scale='x'", "number")),
    Case("scale bool, cached", cached(scale=True), ArgumentTypeError, ("scale=True", "number")),
    Case("scale beyond floats", call(scale=10**400), ArgumentError, ("scale=1000", "finite")),
    Case(
        "backend typo",
        call(backend="tritn"),
        UnknownNameError,
        ("backend='tritn'", "did you mean triton?", "flash_attn"),
    ),
    Case("backend kernel", call(backend="torch.math"), UnknownNameError, ("backend='torch.math'", "torch")),
    Case("policy typo", call(policy="defualt"), UnknownNameError, ("policy='defualt'", "did you mean default?")),
    Case("policy int", call(policy=3), ArgumentTypeError, ("policy=3", "a Policy is needed")),
    Case("policy list", call(policy=["default"]), ArgumentTypeError, ("policy=['default']", "a Policy is needed")),
    Case("policy file", call(policy="nowhere/mine.yaml"), PolicyError, ("nowhere/mine.yaml", "cannot be read")),
    Case("policy with NUL", call(policy="a\0/b.yaml"), PolicyError, ("b.yaml", "cannot be read")),
]
OPERANDS = [
    Case(
        "mask float", call(mask=torch.zeros(8, 8)), ArgumentTypeError, ("mask=<Tensor (8, 8) float32", "bool", "bias=")
    ),
    Case("mask list", call(mask=[[True]]), ArgumentTypeError, ("mask=[[True]]", "torch.Tensor")),
    Case("mask shape", call(mask=torch.ones(3, 8).bool()), ArgumentError, ("mask=(3, 8)", "(2, 4, 8, 8)")),
    Case(
        "mask 5-D", call(mask=torch.ones(1, 1, 1, 8, 8).bool()), ArgumentError, ("mask=(1, 1, 1, 8, 8)", "(2, 4, 8, 8)")
    ),
    Case(
        "mask device",
        call(mask=torch.ones(8, 8, device="meta").bool()),
        ArgumentError,
        ("mask=", "meta", "q's device, cpu"),
    ),
    Case("mask sparse", call(mask=torch.ones(8, 8).bool().to_sparse()), ArgumentTypeError, ("mask", "dense")),
    Case("bias bool", call(bias=torch.ones(8, 8).bool()), ArgumentTypeError, ("bias=<Tensor (8, 8) bool", "mask=")),
    Case("bias fp64", call(bias=torch.ones(8, 8).double()), ArgumentTypeError, ("bias=", "float64", "float32")),
    Case("bias shape", call(bias=torch.ones(3, 1, 8, 8)), ArgumentError, ("bias=(3, 1, 8, 8)", "(2, 4, 8, 8)")),
    Case(
        "alibi shape",
        call(alibi_slopes=torch.ones(3)),
        ArgumentError,
        ("alibi_slopes=<Tensor (3,)", "(4,) or (B, Hq) = (2, 4)"),
    ),
    Case(
        "alibi dtype",
        call(alibi_slopes=torch.ones(4).half()),
        ArgumentTypeError,
        ("alibi_slopes=", "float16", "float32"),
    ),
    Case("alibi list", call(alibi_slopes=[1.0]), ArgumentTypeError, ("alibi_slopes=[1.0]", "float32 tensor")),
    Case(
        "alibi grad",
        call(alibi_slopes=torch.ones(4, requires_grad=True)),
        ArgumentError,
        ("alibi_slopes", "detach", "bias="),
    ),
    Case("sinks shape", call(sinks=torch.ones(2, 4)), ArgumentError, ("sinks=<Tensor (2, 4)", "(Hq,) = (4,)")),
    Case("bias list", call(bias=[[0.0]]), ArgumentTypeError, ("bias=[[0.0]]", "torch.Tensor")),
    Case("sinks bool", call(sinks=True), ArgumentTypeError, ("sinks=True", "floating-point tensor")),
    Case("sinks int", call(sinks=ints(1, 1, 1, 1)), ArgumentTypeError, ("sinks=", "int32", "floating-point")),
]
LENGTHS = [
    Case(
        "seqlens int64",
        call(seqlens_q=ints(3, 8, dtype=torch.int64)),
        ArgumentTypeError,
        ("seqlens_q", "int64", ".to(torch.int32)"),
    ),
    Case(
        "seqlens complex",
        call(seqlens_q=torch.tensor([1j, 2j])),
        ArgumentTypeError,
        ("seqlens_q", "complex64", "int32"),
    ),
    Case("seqlens list", call(seqlens_kv=[3, 8]), ArgumentTypeError, ("seqlens_kv=[3, 8]", "int32 tensor")),
    Case("seqlens shape", call(seqlens_q=ints(3)), ArgumentError, ("seqlens_q", "(1,)", "(B,) = (2,)")),
    Case("seqlens too long", call(seqlens_kv=ints(3, 9)), ArgumentError, ("seqlens_kv=[3, 9]", "0..8")),
    Case("seqlens negative", call(seqlens_q=ints(-1, 8)), ArgumentError, ("seqlens_q=[-1, 8]", "0..8")),
    Case(
        "seqlens with thd", packed(seqlens_q=ints(3, 5)), ArgumentError, ("seqlens_q", "layout='thd'", "cu_seqlens_*")
    ),
    Case(
        "cu_seqlens missing",
        packed(cu_seqlens_kv=None),
        ArgumentError,
        ("cu_seqlens_kv=None", "the same tensor for self-attention"),
    ),
    Case(
        "cu_seqlens both missing",
        packed(cu_seqlens_q=None, cu_seqlens_kv=None),
        ArgumentError,
        ("cu_seqlens_q=None", "needs"),
    ),
    Case(
        "cu_seqlens start", packed(cu_seqlens_q=ints(1, 3, 8)), ArgumentError, ("cu_seqlens_q=[1, 3, 8]", "start at 0")
    ),
    Case(
        "cu_seqlens falling",
        packed(cu_seqlens_q=ints(0, 5, 3)),
        ArgumentError,
        ("cu_seqlens_q=[0, 5, 3]", "never fall"),
    ),
    Case(
        "cu_seqlens too long",
        packed(cu_seqlens_kv=ints(0, 3, 9)),
        ArgumentError,
        ("cu_seqlens_kv=[0, 3, 9]", "no more than 8 tokens"),
    ),
    Case(
        "cu_seqlens int64",
        packed(cu_seqlens_q=ints(0, 3, 8, dtype=torch.int64)),
        ArgumentTypeError,
        ("cu_seqlens_q", "int64", "int32"),
    ),
    Case("cu_seqlens counts", packed(cu_seqlens_kv=ints(0, 8)), ArgumentError, ("cu_seqlens_kv", "(B+1,) = (3,)")),
    Case("cu_seqlens empty", packed(cu_seqlens_q=ints()), ArgumentError, ("cu_seqlens_q", "B + 1 offsets")),
    Case("cu_seqlens 2-D", packed(cu_seqlens_q=ints(0, 3, 8)[None]), ArgumentError, ("cu_seqlens_q",)),
    Case(
        "cu_seqlens sparse",
        packed(cu_seqlens_q=ints(0, 3, 8).to_sparse()),
        ArgumentTypeError,
        ("cu_seqlens_q", "dense"),
    ),
    Case(
        "cu_seqlens list", packed(cu_seqlens_q=[0, 3, 8]), ArgumentTypeError, ("cu_seqlens_q=[0, 3, 8]", "int32 tensor")
    ),
    Case(
        "cu_seqlens with bshd",
        call(layout="bshd", cu_seqlens_q=ints(0, 8)),
        ArgumentError,
        ("cu_seqlens_q", "only layout='thd'", "seqlens_*"),
    ),
    Case("max_seqlen too small", packed(max_seqlen_q=4), ArgumentError, ("max_seqlen_q=4", "5 tokens", "or None")),
    Case("max_seqlen text", packed(max_seqlen_q="5"), ArgumentTypeError, ("max_seqlen_q='5'", "integer")),
    Case("max_seqlen tensor", packed(max_seqlen_kv=torch.tensor(5)), ArgumentTypeError, ("max_seqlen_kv=", "integer")),
    Case(
        "max_seqlen with bhsd", call(max_seqlen_q=8), ArgumentError, ("max_seqlen_q=8", "only layout='thd'", "'bhsd'")
    ),
]
learned = torch.zeros(3, 4, 8, 16, requires_grad=True)
PAGES = [
    Case("list", paged(page_table=[[0, 2], [1, 9]]), ArgumentTypeError, ("page_table=[[0, 2]", "int32", "(B, pages")),
    Case("int64", paged(page_table=ints(0, 2, 1, 9).view(2, 2).long()), ArgumentTypeError, ("page_table", "int32")),
    Case("one dim", paged(page_table=ints(0, 2)), ArgumentError, ("page_table=<Tensor (2,)", "B = 2")),
    Case("batch", paged(page_table=ints(0, 2, 1).view(3, 1)), ArgumentError, ("page_table=<Tensor (3, 1)", "B = 2")),
    Case(
        "device", paged(page_table=ints(0, 2, 1, 9).view(2, 2).to("meta")), ArgumentError, ("page_table", "q's device")
    ),
    Case("sparse", paged(page_table=ints(0, 2).view(2, 1).to_sparse()), ArgumentTypeError, ("page_table", "dense")),
    Case("no lengths", paged(seqlens_kv=None), ArgumentError, ("seqlens_kv=None", "page_table needs it")),
    Case("sbhd", paged(layout="sbhd"), ArgumentError, ("page_table", "'sbhd'", "(num_pages, page_size, Hkv, D)")),
    Case("thd", packed(page_table=ints(0).view(1, 1)), ArgumentError, ("page_table", "'thd'", "no pages")),
    Case("pools differ", paged(v=torch.zeros(2, 4, 8, 16)), ArgumentError, ("num_pages=(3, 2)", "equally many")),
    Case("sizes differ", paged(v=torch.zeros(3, 4, 9, 16)), ArgumentError, ("seqlen_kv=(8, 9)", "same length")),
    Case(
        "no key a page",
        paged(k=torch.zeros(3, 4, 0, 16), v=torch.zeros(3, 4, 0, 16)),
        ArgumentError,
        ("page_size=0", "at least one key"),
    ),
    Case(
        "out of the pool", paged(page_table=ints(0, 3, 1, 9).view(2, 2)), ArgumentError, ("page 1 of", "is 3", "0..2")
    ),
    Case("negative", paged(page_table=ints(0, 2, -1, 9).view(2, 2)), ArgumentError, ("page 0 of sequence 1 is -1",)),
    Case("too long", paged(seqlens_kv=ints(17, 3)), ArgumentError, ("seqlens_kv=[17, 3]", "0..16")),
    Case("key gradient", paged(k=learned), ArgumentError, ("k=<Tensor", "no backward", "no_grad")),
    Case("value gradient", paged(v=learned), ArgumentError, ("v=<Tensor", "no backward")),
    Case("query gradient", paged(q=learned[:2]), ArgumentError, ("q=<Tensor", "no backward")),
    Case("mask shape", paged(mask=torch.ones(8, 8).bool()), ArgumentError, ("mask=(8, 8)", "(2, 4, 8, 16)")),
]
SHAPES = [
    Case("no heads", shape(heads_q=0), ArgumentError, ("heads_q=0", "at least 1")),
    Case("negative length", shape(seqlen_q=-1), ArgumentError, ("seqlen_q=-1", "at least 0")),
    Case("bool batch", shape(batch=True), ArgumentTypeError, ("batch=True", "integer")),
    Case("float head dim", shape(head_dim=64.0), ArgumentTypeError, ("head_dim=64.0", "integer")),
    Case("groups", shape(heads_kv=3), ArgumentError, ("heads_kv=3", "heads_q=4", "[1, 2, 4]")),
    Case("dtype", shape(dtype="int8"), UnknownNameError, ("dtype='int8'", "bf16")),
    Case("flag", shape(training=1), ArgumentTypeError, ("training=1", "True or False")),
    Case(
        "packed and padded", shape(packed=True, padded=True), ArgumentError, ("padded=True", "one of packed and padded")
    ),
    Case("page size", shape(page_size=0), ArgumentError, ("page_size=0", "at least 1")),
    Case("page size bool", shape(page_size=True), ArgumentTypeError, ("page_size=True", "integer")),
    Case("part of a page", shape(seqlen_kv=20, page_size=16), ArgumentError, ("seqlen_kv=20", "page_size=16", ": 32")),
    Case("pages in training", shape(page_size=8, training=True), ArgumentError, ("training=True", "no backward")),
    Case("packed pages", shape(page_size=8, packed=True), ArgumentError, ("page_size=8", "'thd'")),
    Case("thd not packed", shape(layout="thd"), ArgumentError, ("layout='thd'", "packed")),
    Case("empty layout", shape(layout=""), UnknownNameError, ("layout=''", "bhsd")),
    Case("bias_grad alone", shape(bias_grad=True), ArgumentError, ("bias_grad=True", "bias=True or its shape")),
    Case("mask shape", shape(mask=(3, 3)), ArgumentError, ("mask=(3, 3)", "(1, 4, 8, 8)")),
    Case("mask text", shape(mask="causal"), ArgumentTypeError, ("mask='causal'", "(1, 4, 8, 8)")),
    Case("mask of floats", shape(mask=(8.5, 8.9)), ArgumentTypeError, ("mask=(8.5, 8.9)", "(1, 4, 8, 8)")),
    Case("alignment missing", shape(seqlen_kv=9, causal=True), ArgumentError, ("alignment=None", "say which")),
    Case(
        "environment typo", shape(environment="h1000"), UnknownNameError, ("environment='h1000'", "did you mean h100?")
    ),
    Case("environment int", shape(environment=90), ArgumentTypeError, ("environment=90", "an Environment")),
    Case("arch typo", shape(environment="smx"), ArgumentError, ("arch='smx'", "'sm90'")),
    Case("backend", shape(backend="cuDNN"), UnknownNameError, ("backend='cuDNN'", "cudnn")),
    Case("policy", shape(policy="fast"), UnknownNameError, ("policy='fast'", "no_vendor")),
]
ENVIRONMENTS = [
    Case("arch", simulate("hopper"), ArgumentError, ("arch='hopper'", "'sm90'")),
    Case("arch int", simulate(90), ArgumentError, ("arch=90", "'sm90'")),
    Case(
        "package",
        simulate(packages={"flash_attn": "2"}),
        UnknownNameError,
        ("'flash_attn'", "did you mean flash-attn?"),
    ),
    Case("version", simulate(packages={"cudnn": "9.x"}), ArgumentError, ("packages['cudnn']='9.x'", "'2.8.3'", "None")),
    Case("version float", simulate(packages={"cudnn": 9.19}), ArgumentError, ("packages['cudnn']=9.19", "'2.8.3'")),
    Case("packages list", simulate(packages=["cudnn"]), ArgumentTypeError, ("packages=['cudnn']", "mapping")),
    Case("memory text", simulate(memory="80GiB"), ArgumentTypeError, ("memory='80GiB'", "integer")),
    Case("memory negative", simulate(memory=-1), ArgumentError, ("memory=-1", "at least 0")),
    Case("named list", lambda: attnrt.Environment.named(["h100"]), UnknownNameError, ("environment=['h100']", "h200")),
]
OVERRIDES = [
    Case("use_backend", lambda: attnrt.use_backend("nope"), UnknownNameError, ("backend='nope'", "cudnn")),
    Case(
        "use_backend kernel",
        lambda: attnrt.use_backend("torch.math"),
        UnknownNameError,
        ("backend='torch.math'", "torch"),
    ),
    Case("disable", lambda: attnrt.override(disable="nope"), UnknownNameError, ("disable='nope'", "torch.math")),
    Case(
        "disable in a list",
        lambda: attnrt.override(disable=("cudnn", "flash")),
        UnknownNameError,
        ("disable='flash'", "flash_attn"),
    ),
    Case("disable int", lambda: attnrt.override(disable=3), ArgumentTypeError, ("disable=3", "iterable")),
    Case(
        "prefer",
        lambda: attnrt.override(prefer="cudnn, tritn"),
        UnknownNameError,
        ("prefer='tritn'", "did you mean triton?"),
    ),
    Case(
        "prefer kernel",
        lambda: attnrt.override(prefer="torch.math"),
        UnknownNameError,
        ("prefer='torch.math'", "torch"),
    ),
    Case(
        "policy list",
        enter(lambda: attnrt.override(policy=["default"])),
        ArgumentTypeError,
        ("policy=['default']", "a Policy"),
    ),
]
BACKENDS = [
    Case(
        "no backend",
        lambda: attnrt.register_backend(object()),
        ArgumentTypeError,
        ("backend=<object", "attnrt.Backend"),
    ),
    Case("a class", lambda: attnrt.register_backend(Mine), ArgumentTypeError, ("backend=<class", "instance")),
    Case("our name", register(name="torch"), ArgumentError, ("backend.name='torch'", "taken", "triton")),
    Case("family name", register(name="flash_attn"), ArgumentError, ("backend.name='flash_attn'", "taken")),
    Case("malformed name", register(name="my.backend"), ArgumentError, ("backend.name='my.backend'", "letters")),
    Case("no name", register(name=None), ArgumentError, ("backend.name=None", "letters")),
    Case("no title", register(title=None), ArgumentError, ("backend.title=None", "string")),
    Case("our name as family", register(family="cudnn"), ArgumentError, ("backend.family='cudnn'", "taken")),
    Case(
        "unknown feature",
        register(supports=frozenset({"cuasal"})),
        ArgumentError,
        ("backend.supports", "cuasal", "causal"),
    ),
    Case("not registered", lambda: attnrt.unregister_backend("torch"), UnknownNameError, ("name='torch'",)),
    Case(
        "unavailable: every reason of every backend",
        call(softcap=3.0, backend="torch"),
        BackendUnavailable,
        (
            *("torch is forced by the argument backend=", "CUDNN_DEVICE", "CUDNN_SOFTCAP", "CUDNN_DTYPE", "FA2_DEVICE"),
            *("FA3_DEVICE", "FA4_DTYPE", "TRITON_DEVICE", "TORCH_FLASH_CPU_SOFTCAP", "TORCH_MATH_SOFTCAP", "softcap=3"),
            *("pip install", "not forced"),
        ),
    ),
    Case(
        "unavailable: disabled",
        call(backend=None),
        BackendUnavailable,
        ("DISABLED", "lift it"),
        {"ATTNRT_DISABLE": "torch,reference"},
    ),
]
VARIABLES = [
    Case(
        "typo in a name",
        attnrt.refresh,
        VariableError,
        ("ATTNRT_BAKEND", "did you mean ATTNRT_BACKEND?"),
        {"ATTNRT_BAKEND": "torch"},
    ),
    Case("unknown name", attnrt.refresh, VariableError, ("ATTNRT_SPEED", "ATTNRT_PREFER"), {"ATTNRT_SPEED": "1"}),
    Case(
        "two at once",
        call(),
        VariableError,
        ("ATTNRT_VERIFY='x'", "ATTNRT_REPORT='y'"),
        {"ATTNRT_VERIFY": "x", "ATTNRT_REPORT": "y"},
    ),
    Case(
        "backend",
        call(),
        VariableError,
        ("ATTNRT_BACKEND='tritn'", "did you mean triton?"),
        {"ATTNRT_BACKEND": "tritn"},
    ),
    Case("backend list", call(), VariableError, ("ATTNRT_BACKEND='a,b'", "one backend"), {"ATTNRT_BACKEND": "a,b"}),
    Case("backend kernel", call(), VariableError, ("ATTNRT_BACKEND='torch.math'",), {"ATTNRT_BACKEND": "torch.math"}),
    Case("prefer", call(), VariableError, ("ATTNRT_PREFER='fa3'", "flash_attn_3"), {"ATTNRT_PREFER": "torch,fa3"}),
    Case(
        "disable", call(), VariableError, ("torch.cudn", "did you mean torch.cudnn?"), {"ATTNRT_DISABLE": "torch.cudn"}
    ),
    Case("policy", call(), VariableError, ("ATTNRT_POLICY='fast'", "no_vendor"), {"ATTNRT_POLICY": "fast"}),
    Case("policy file", call(), PolicyError, ("nowhere.yaml", "cannot be read"), {"ATTNRT_POLICY": "nowhere.yaml"}),
    Case("report", call(), VariableError, ("ATTNRT_REPORT='always'", "off, once or each"), {"ATTNRT_REPORT": "always"}),
    Case(
        "limit",
        call(),
        VariableError,
        ("ATTNRT_UNFUSED_LIMIT='8 apples'", "8GiB"),
        {"ATTNRT_UNFUSED_LIMIT": "8 apples"},
    ),
    Case(
        "limit, a part of a byte",
        call(),
        VariableError,
        ("ATTNRT_UNFUSED_LIMIT='1.5'", "unit"),
        {"ATTNRT_UNFUSED_LIMIT": "1.5"},
    ),
    Case(
        "cache, no folder",
        call(),
        VariableError,
        (f"ATTNRT_CACHE_DIR='{__file__}/x'", f"{__file__} is not a folder"),
        {"ATTNRT_CACHE_DIR": f"{__file__}/x"},
    ),
    Case(
        "limit negative", call(), VariableError, ("ATTNRT_UNFUSED_LIMIT='-5'", "8GiB"), {"ATTNRT_UNFUSED_LIMIT": "-5"}
    ),
    Case("verify", call(), VariableError, ("ATTNRT_VERIFY='true'", "0 or 1"), {"ATTNRT_VERIFY": "true"}),
    Case("nvte", call(), VariableError, ("NVTE_FLASH_ATTN='true'", "an integer"), {"NVTE_FLASH_ATTN": "true"}),
    Case("nvte float", shape(), VariableError, ("NVTE_FUSED_ATTN='0.5'", "an integer"), {"NVTE_FUSED_ATTN": "0.5"}),
]
COMMANDS = [
    Case("arch", command("explain --arch h1000"), UnknownNameError, ("'h1000'", "did you mean h100?")),
    Case(
        "package without arch",
        command("explain --package cudnn=9.1"),
        ArgumentError,
        ("--package", "cudnn=9.1", "--arch"),
    ),
    Case(
        "package", command("report --arch h100 --package flashattn=2"), UnknownNameError, ("'flashattn'", "flash-attn")
    ),
    Case(
        "package version",
        command("explain --arch h100 --package cudnn=nine"),
        ArgumentError,
        ("cudnn", "'nine'", "2.8.3"),
    ),
    Case(
        "package without =", command("explain --arch h100 --package cudnn"), ArgumentError, ("--package", "cudnn", "=")
    ),
    Case("window", command("explain --causal --window 1023"), ArgumentError, ("--window='1023'", "LEFT,RIGHT")),
    Case("window -1", command("explain --window=-1,0"), ArgumentError, ("--window='-1,0'", "unbounded")),
    Case("window superscript", command("explain --window ²,0"), ArgumentError, ("--window='²,0'", "LEFT,RIGHT")),
    Case("heads", command("explain --heads 32 --kv-heads 5"), ArgumentError, ("heads_kv=5", "heads_q=32", "4, 8")),
    Case("dtype", command("explain --dtype int8"), UnknownNameError, ("dtype='int8'", "bf16")),
    Case("alignment", command("explain --causal --kv-seqlen 8192"), ArgumentError, ("alignment=None", "say which")),
    Case("dropout", command("explain --dropout 1.5"), ArgumentError, ("dropout_p=1.5", "[0, 1)")),
    Case("softcap", command("explain --softcap 0"), ArgumentError, ("softcap=0.0", "over 0")),
    Case("batch", command("explain --batch -1"), ArgumentError, ("batch=-1", "at least 0")),
    Case("backend", command("explain --backend fa3"), UnknownNameError, ("backend='fa3'", "flash_attn_3")),
    Case("policy", command("explain --policy nowhere.yaml"), PolicyError, ("nowhere.yaml", "cannot be read")),
    Case("matrix folder", command("matrix --write no/such/folder"), ArgumentError, ("--write", "no/such/folder")),
]
TABLES = {
    "tensors": TENSORS,
    "options": OPTIONS,
    "operands": OPERANDS,
    "lengths": LENGTHS,
    "pages": PAGES,
    "shapes": SHAPES,
    "environments": ENVIRONMENTS,
    "overrides": OVERRIDES,
    "backends": BACKENDS,
    "variables": VARIABLES,
    "commands": COMMANDS,
}
CASES = [pytest.param(case, id=f"{table}: {case.id}") for table, cases in TABLES.items() for case in cases]


pytestmark = pytest.mark.usefixtures("fresh")


@pytest.mark.parametrize("case", CASES)
def test_bad_input(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in case.variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AttnrtError) as caught:
        case.call()
    error = caught.value
    assert type(error) is case.error and isinstance(error, BUILTIN[case.error])
    assert not [text for text in case.says if text not in str(error)], str(error)


def test_a_checked_call_is_checked_again() -> None:
    """A plan that is remembered does not let the next call off: lengths are values, and no part of its shape."""
    packed()()
    with pytest.raises(ArgumentError, match=r"cu_seqlens_q=\[0, 9, 8\]"):
        packed(cu_seqlens_q=ints(0, 9, 8))()
    call(seqlens_q=ints(3, 8))()
    with pytest.raises(ArgumentError, match=r"seqlens_q=\[3, 88\]"):
        call(seqlens_q=ints(3, 88))()


def test_variables_are_read_as_they_are_spelt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("attnrt_backend", "reference")
    attnrt.refresh()
    assert attnrt.explain(**qkv()).backend == "torch"


@pytest.mark.parametrize(
    ("line", "code", "output"),
    [
        ("explain --arch h1000", 2, "attnrt: environment='h1000'"),
        ("explain --arch h100 --backend cudnn --softcap 30", 1, "CUDNN_SOFTCAP"),
        ("explain --batch many", 2, "valid integer"),
        ("explian", 2, "explian"),
    ],
)
def test_exit_codes(
    line: str, code: int, output: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["attnrt", *line.split()])
    with pytest.raises(SystemExit) as exit:
        cli.main()
    printed = capsys.readouterr()
    assert exit.value.code == code
    assert output in printed.out + printed.err and "Traceback" not in printed.err


GARBAGE: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        8,
        2.5,
        float("nan"),
        "x",
        "",
        b"x",
        object(),
        (),
        (1,),
        (1, 2),
        (None, 0),
        [],
        {},
        set(),
    ),
    *(
        torch.zeros(()),
        torch.zeros(2, 4, 8, 16),
        torch.zeros(2, 4, 8, 16).half(),
        torch.zeros(4),
        torch.zeros(8, 4, 16),
    ),
    *(torch.ones(8, 8).bool(), ints(0, 3, 8), ints(3, 8), ints(), ints(0)[0], torch.zeros(2, 4, 8, 16).to_sparse()),
    *(
        torch.zeros(2, dtype=torch.complex64),
        np.zeros((2, 4, 8, 16)),
        [0, 3, 8],
        torch.float32,
        "thd",
        "bshd",
        lambda: None,
    ),
]
NAMES_OF_ARGUMENTS = [n for n in attnrt.attention.__annotations__ if n not in ("_", "return")]


@given(
    packed_call=st.booleans(),
    changes=st.dictionaries(st.sampled_from(NAMES_OF_ARGUMENTS), st.sampled_from(GARBAGE), min_size=1, max_size=3),
)
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_garbage(packed_call: bool, changes: dict[str, Any]) -> None:
    try:
        result = (packed if packed_call else call)(**changes)()
    except AttnrtError as error:
        # What passed the checks must also run.
        assert not isinstance(error, BackendFailed), error
        assert len(str(error)) > 20
    else:
        assert isinstance(result, (Tensor, tuple))
