"""PyTorch's kernels against the float64 oracle, and proof that the kernel named is the one that runs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from cases import cases
from hypothesis import HealthCheck, given, settings
from oracle import Case, assert_agrees
from running import CPU, dropped, measured, peak_bytes, qkv, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnrt.backends.base import FEATURES, Kernel, reasons
from attnrt.backends.torch_sdpa import TorchSDPA
from attnrt.backends.torch_sdpa import cpu_plan as planning
from attnrt.backends.torch_sdpa.cpu import plain
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

TORCH = TorchSDPA()
KERNELS = {kernel.name: kernel for kernel in TORCH.kernels}
FLASH_CPU, MATH = KERNELS["flash_cpu"], KERNELS["math"]
RANDOM = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
FORWARD = "aten._scaled_dot_product_flash_attention_for_cpu.default"
BACKWARD = "aten._scaled_dot_product_flash_attention_for_cpu_backward.default"


class Seen(TorchDispatchMode):
    """Names of the operators that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@RANDOM
@given(case=cases(without=frozenset({"softcap", "bias_grad"})))
def test_flash_cpu_agrees_with_the_oracle(case: Case) -> None:
    with Seen() as seen:
        found = run(FLASH_CPU, case)
    assert_agrees(case, found)
    ran = {name for name in seen.names if "attention" in name}
    assert ran <= {FORWARD, BACKWARD}
    if "lse" in found and (found["lse"] > -math.inf).any():
        assert FORWARD in ran


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
def test_slopes_of_all_and_a_bias_of_each_sequence(layout: str) -> None:
    q, k, v = qkv(*{"bhsd": (2, 4, 8, 16), "bshd": (2, 8, 4, 16), "sbhd": (8, 2, 4, 16)}[layout])
    operands = Operands(bias=torch.randn(2, 1, 8, 8), alibi_slopes=torch.rand(4))
    case = Case(q, k, v, layout, operands, options={"return_lse": True})
    assert_agrees(case, run(FLASH_CPU, case))


@RANDOM
@given(case=cases(without=frozenset({"softcap", "bias_grad"}), longest=70))
def test_tiles_of_a_few_rows_agree_with_the_oracle(case: Case) -> None:
    names = ("CHUNK_BYTES", "MIN_ROWS", "BAND_ROWS", "NARROW_ROWS")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in zip(names, (256, 8, 16, 8), strict=True):
            patch.setattr(planning, name, value)
        assert_agrees(case, run(FLASH_CPU, case))


MATH_TAKES = frozenset({"softcap", "window", "alibi", "sinks", "padding", "packed", "bottom_right", "empty", "lse"})


@RANDOM
@given(case=cases(without=MATH_TAKES))
def test_math_agrees_with_the_oracle(case: Case) -> None:
    assert_agrees(case, run(MATH, case))


@pytest.mark.parametrize("alignment", ["top_left", "bottom_right"])
@pytest.mark.parametrize(("len_q", "len_kv"), [(700, 1300), (1300, 700)])
@pytest.mark.parametrize("options", [{"causal": True}, {"window": (600, 5)}, {"window": (3, None)}])
def test_long_sequences_cross_the_kernels_own_blocks(
    alignment: str, len_q: int, len_kv: int, options: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 4, len_q, 16, requires_grad=True)
    k, v = (torch.randn(1, 2, len_kv, 16, requires_grad=True) for _ in range(2))
    case = Case(q, k, v, "bhsd", Operands(), torch.randn_like(q), {"alignment": alignment, **options})
    assert_agrees(case, run(FLASH_CPU, case))


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd"])
@pytest.mark.parametrize("heads_kv", [1, 4])
@pytest.mark.parametrize("causal", [False, True])
def test_plain_calls_are_one_call_of_the_flash_kernel(layout: str, heads_kv: int, causal: bool) -> None:
    sizes = {"b": 2, "s": 16, "h": 4, "d": 8}
    q = torch.randn([sizes[x] for x in layout], requires_grad=True)
    k, v = (torch.randn([sizes[x] if x != "h" else heads_kv for x in layout], requires_grad=True) for _ in range(2))
    case = Case(q, k, v, layout, options={"causal": causal, "return_lse": False})
    assert plain(case.request())
    with Seen() as seen:
        found = run(FLASH_CPU, case)
    assert [name for name in seen.names if "attention" in name] == [FORWARD, BACKWARD]
    assert_agrees(case, found)
    as_torch = [t.permute(*(layout.index(x) for x in "bhsd")) for t in (q, k, v)]
    flash = int(torch.nn.attention.SDPBackend.FLASH_ATTENTION)
    assert torch._fused_sdp_choice(*as_torch, None, 0.0, causal, enable_gqa=heads_kv != 4) == flash


@pytest.mark.parametrize("needs_grad", [False, True])
def test_empty_calls_give_zeros(needs_grad: bool) -> None:
    for batch, len_q, len_kv in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        q = torch.randn(batch, 2, len_q, 8, requires_grad=needs_grad)
        k, v = (torch.randn(batch, 2, len_kv, 8, requires_grad=needs_grad) for _ in range(2))
        case = Case(q, k, v, "bhsd")
        assert_agrees(case, run(FLASH_CPU, case))


def test_an_expanded_gradient_is_read_right() -> None:
    case = Case(*qkv(2, 3, 20, 8), layout="bhsd", operands=Operands(sinks=torch.randn(3, requires_grad=True)))
    out, _ = FLASH_CPU.prepare(case.request(), CPU)(case.q, case.k, case.v, case.operands)
    found = torch.autograd.grad(out.sum(), [case.q, case.k, case.v])
    for got, name in zip(found, "qkv", strict=True):
        torch.testing.assert_close(got, run(FLASH_CPU, case)[name])


def test_the_backward_is_deterministic() -> None:
    q, k, v = qkv(1, 8, 600, 32)
    k, v = k[:, :1], v[:, :1]
    for options in ({"causal": True}, {"window": (50, 0)}):
        case = Case(q, k, v, "bhsd", options=options)
        first = run(FLASH_CPU, case)
        for _ in range(5):
            again = run(FLASH_CPU, case)
            assert all(torch.equal(again[name], first[name]) for name in first)


def test_math_drops_as_it_says() -> None:
    dropped(MATH, 0.3)


def test_a_window_over_many_tokens_takes_linear_memory() -> None:
    def peak(length: int) -> int:
        case = Case(*qkv(1, 2, length, 32), layout="bhsd", options={"window": (128, 0)})
        return peak_bytes(lambda: run(FLASH_CPU, case))

    assert peak(8192) < 2.5 * peak(4096)
    assert peak(8192) < 8192 * 8192 * 2 * 4 / 16


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature", ["plain", "causal", "dropout", "bias", "mask"])
def test_math_bytes_are_within_a_quarter_of_a_measurement(feature: str, dtype: torch.dtype, training: bool) -> None:
    tensors, full = qkv(1, 4, 1024, 32, dtype=dtype, grad=training), (1, 4, 1024, 1024)
    operands: dict[str, Tensor] = {
        "bias": {"bias": torch.zeros(full, dtype=dtype, requires_grad=training)},
        "mask": {"mask": torch.ones(full, dtype=torch.bool)},
    }.get(feature, {})
    options = {"causal": feature == "causal", "dropout_p": 0.1 * (feature == "dropout"), "return_lse": False}
    case = Case(
        *tensors, layout="bhsd", operands=Operands(**operands), grad=torch.ones_like(tensors[0]), options=options
    )
    # A call with dropout is chosen as for training, so that a checkpoint draws the same numbers twice.
    assert 0.75 < measured(MATH, case) < (1.5 if feature == "dropout" and not training else 1.25)


ASKED: dict[str, dict[str, Any]] = {
    "gqa": {"heads_kv": 2},
    "unequal_head_dims": {"head_dim_v": 32},
    "causal": {"causal": True},
    "window": {"window": (9, 0)},
    "top_left": {"seqlen_kv": 128, "causal": True, "alignment": "top_left"},
    "bottom_right": {"seqlen_kv": 128, "causal": True, "alignment": "bottom_right"},
    "mask": {"mask": True},
    "bias": {"bias": True},
    "bias_grad": {"bias": True, "bias_grad": True, "training": True},
    "alibi": {"alibi": True},
    "softcap": {"softcap": 20.0},
    "sinks": {"sinks": True},
    "dropout": {"dropout_p": 0.25},
    "padding": {"padded": True},
    "packed": {"packed": True},
    "empty": {"seqlen_q": 0},
    "lse": {"return_lse": True},
    "backward": {"training": True},
    "deterministic": {"training": True, "deterministic": True},
    "cuda_graph": {"capturing": True},
}


def asked(**options: Any) -> AttentionRequest:
    return AttentionRequest.from_shape(**({"batch": 2, "heads_q": 4, "seqlen_q": 64, "head_dim": 64} | options))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("feature", ASKED)
def test_a_feature_outside_supports_is_refused_for_that_reason(name: str, feature: str) -> None:
    kernel: Kernel = KERNELS[name]
    environment = Environment.simulate("cpu" if name == "flash_cpu" else "sm90")
    request = asked(**ASKED[feature])
    assert next(f for f in FEATURES if f.name == feature).used(request)
    found = {reason.rule for reason in reasons(kernel.all_rules, request, environment)}
    assert (f"{kernel.prefix}_{feature.upper()}" in found) == (feature not in kernel.supports)


@pytest.mark.parametrize(
    ("arch", "packages", "options", "winner"),
    [
        ("cpu", {}, {}, "flash_cpu"),
        ("cpu", {}, {"dropout_p": 0.1}, "math"),
        ("sm90", {}, {}, "cudnn"),
        ("sm90", {"cudnn": "9.15.0"}, {}, "flash"),
        ("sm80", {}, {}, "flash"),
        ("sm120", {}, {}, "flash"),
        ("sm90", {}, {"head_dim": 256}, "flash"),
        ("sm90", {}, {"packed": True}, "flash"),
        ("sm90", {}, {"mask": True}, "efficient"),
        ("sm90", {}, {"dtype": "fp32"}, "efficient"),
        ("sm75", {}, {"dtype": "fp16"}, "efficient"),
        ("sm75", {}, {}, "math"),
        ("sm89", {}, {"head_dim": 256, "training": True}, "efficient"),
    ],
)
def test_kernels_stand_in_pytorchs_own_order(
    arch: str, packages: dict[str, str], options: dict[str, Any], winner: str
) -> None:
    environment = Environment.simulate(arch, packages=packages)
    assert TORCH.first(asked(**options), environment).name == winner


def test_notes_tell_of_copies_and_tiles() -> None:
    environment = Environment.simulate("cpu")
    (note,) = FLASH_CPU.notes(asked(head_dim_v=32), environment)
    assert note == "pads head_dim_v 32 to 64: a linear copy"
    (note,) = FLASH_CPU.notes(asked(seqlen_q=3072, window=(9, 0)), environment)
    assert note == "runs 12 tiles of up to 256 queries"


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sbhd", "thd"])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_flash_operators_take_our_arguments(layout: str, sinks: bool) -> None:
    """Shapes and argument order by PyTorch's meta tensors: no GPU is needed, and nothing is computed."""
    packed, sizes = layout == "thd", {"b": 2, "s": 16, "h": 4, "d": 64, "t": 32}
    options: dict[str, Any] = {"window": (4, 0), "dropout_p": 0.1, "sinks": sinks, "return_lse": True, "training": True}
    request = asked(seqlen_q=16, layout=layout, packed=packed, **options)
    environment = Environment.simulate("sm90")
    assert not reasons(KERNELS["flash"].all_rules, request, environment)
    shape = [sizes[x] for x in layout]
    q, k, v = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    cu = torch.empty(3, dtype=torch.int32, device="meta") if packed else None
    sink = torch.empty(4, device="meta", requires_grad=True) if sinks else None
    operands = Operands(cu_seqlens_q=cu, cu_seqlens_kv=cu, sinks=sink)
    out, lse = KERNELS["flash"].prepare(request, environment)(q, k, v, operands)
    assert out.shape == q.shape and lse.shape == ((4, 32) if packed else (2, 4, 16)) and not lse.requires_grad
    wanted = [q, k, v] if sink is None else [q, k, v, sink]
    assert [g.shape for g in torch.autograd.grad(out.sum(), wanted)] == [t.shape for t in wanted]


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_a_scale_of_zero_or_less_keeps_its_causal_mask(scale: float) -> None:
    """The kernel's own causal mask is lost under such a scale, so it must not be used."""
    case = Case(*qkv(1, 2, 40, 8), layout="bhsd", options={"causal": True, "scale": scale, "return_lse": False})
    assert not plain(case.request())
    assert_agrees(case, run(FLASH_CPU, case))
    flash = {r.rule for r in reasons(KERNELS["flash"].all_rules, case.request(), Environment.simulate("sm90"))}
    assert "TORCH_FLASH_SCALE" in flash
