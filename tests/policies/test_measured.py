"""What a tuned policy answers: exactly, in between, too far away, within the margin, and by whose figures."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from figures import content, entry
from hypothesis import given, settings
from hypothesis import strategies as st

import attnrt
from attnrt import registry, runtime
from attnrt.environment import Environment
from attnrt.evidence.calls import Call
from attnrt.evidence.store import measured_policy
from attnrt.policies.kinds import distance, kind_of, place_of, short
from attnrt.policies.measured import MeasuredPolicy
from attnrt.policies.preference import load_policy
from attnrt.policies.tuned import KindEntry

CPU = Environment.detect("cpu")
H100 = replace(Environment.named("h100"), simulated=False, name="NVIDIA H100 80GB HBM3")
BASE = Call(heads_q=8, heads_kv=2, head_dim=64, seqlen_q=256, dtype="fp32", layout="bhsd", causal=True)
FLASH, MATH, REFERENCE = "torch.flash_cpu", "torch.math", "reference"


def policy(
    *entries: KindEntry, environment: Environment = CPU, automatic: bool = True, **changes: Any
) -> MeasuredPolicy:
    made = content(*entries, environment=environment, **changes)
    static = load_policy("default", registry.rankable())
    return measured_policy([made.table("tuned.yaml")], static, automatic)


def decide(found: MeasuredPolicy, call: Call, environment: Environment = CPU) -> attnrt.Decision:
    return runtime.choose(call.request(), environment, runtime.settings(None, found))


def at(length: int, **changes: Any) -> Call:
    return BASE.changed(seqlen_q=length, **changes)


FASTER_MATH = [entry(at(n), {MATH: 1.0, FLASH: 2.0, REFERENCE: 3.0}) for n in (256, 512)]


def test_the_fastest_at_a_measured_call() -> None:
    found = decide(policy(*FASTER_MATH), at(256))
    assert (found.backend, found.kernel, found.policy) == ("torch", "math", "tuned")
    assert found.line == "tuned: fp32, head_dim 64, causal"
    assert "measured at 256 (B 1, 8/2 heads): torch.math 1 ms, torch.flash_cpu 2 ms, reference 3 ms" in found.evidence
    assert "tuned policy from tuned.yaml, measured 2026-11-20" in found.evidence
    assert found.notices == ()


def test_between_two_measured_calls() -> None:
    entries = [entry(at(4096), {FLASH: 1.0, REFERENCE: 3.0}), entry(at(8192), {FLASH: 1.0, REFERENCE: 9.0})]
    found = decide(policy(*entries), at(6144))
    assert found.kernel == "flash_cpu" and "measured at 4k and 8k (B 1, 8/2 heads)" in found.evidence


def test_the_nearer_one_counts_for_more() -> None:
    """math is ahead at 256 as much as flash is at 1024: the crossing is half way, in doublings."""
    entries = [entry(at(256), {MATH: 1.0, FLASH: 2.0}), entry(at(1024), {MATH: 2.0, FLASH: 1.0})]
    found = policy(*entries)
    assert [decide(found, at(n)).kernel for n in (256, 300, 400, 640, 900, 1024)] == ["math"] * 3 + ["flash_cpu"] * 3


def test_what_lies_behind_a_nearer_one_does_not_count() -> None:
    """Three lengths on one side must not outvote one on the other."""
    entries = [entry(at(n), {MATH: 1.0, FLASH: 1.5}) for n in (32, 64, 128)]
    found = policy(*entries, entry(at(512), {MATH: 1.8, FLASH: 1.0}))
    assert "measured at 128 and 512 (B 1, 8/2 heads)" in decide(found, at(256)).evidence
    assert decide(found, at(256)).kernel == "flash_cpu"


@pytest.mark.parametrize("factor", [1.0, 1.02, 1.029, 1.05])
def test_the_margin(factor: float) -> None:
    """The default policy puts the fused kernel first; math must be faster by more than 3%."""
    found = decide(policy(entry(at(256), {MATH: 1.0, FLASH: factor})), at(256))
    assert found.kernel == ("math" if factor > 1.03 else "flash_cpu")
    assert ("torch.flash_cpu is kept, within the margin" in found.evidence) == (1 < factor <= 1.03)


def test_the_margin_of_the_file() -> None:
    slow = entry(at(256), {MATH: 1.0, FLASH: 1.5})
    assert decide(policy(slow, margin=0.6), at(256)).kernel == "flash_cpu"
    assert decide(policy(slow, margin=0.0), at(256)).kernel == "math"


FAR = {
    "five times as long": at(256 * 5),
    "40 times the heads": at(256, batch=320),
    "a decode": at(1, seqlen_kv=256, causal=False),
}
OTHER = {
    "dtype": at(256, dtype="bf16"),
    "head_dim": at(256, head_dim=128),
    "no mask": at(256, causal=False),
    "training": at(256, training=True),
    "packed": at(256, packed=True, layout="thd"),
    "softcap": at(256, softcap=3.0),
    "bias": at(256, bias=True),
    "lse": at(256, return_lse=True),
}


@pytest.mark.parametrize("call", [*FAR.values(), *OTHER.values()], ids=[*FAR, *OTHER])
def test_elsewhere_the_default_serves_and_the_report_says_so(call: Call) -> None:
    found = decide(policy(entry(at(256), {MATH: 1.0, FLASH: 2.0})), call)
    plain = runtime.choose(call.request(), CPU, runtime.settings(None, "default"))
    assert (found.label, found.policy, found.line, found.evidence) == (
        plain.label,
        "default",
        plain.line,
        plain.evidence,
    )
    assert any("tuned policy from tuned.yaml, measured 2026-11-20, has n" in said for said in found.notices)


def test_near_enough() -> None:
    found = policy(entry(at(256), {MATH: 1.0, FLASH: 2.0}))
    for call in (at(64), at(1000), at(256, batch=8), at(256, heads_q=32), at(256, layout="sbhd")):
        assert decide(found, call).policy == "tuned", call


def test_a_wrong_kernel_is_refused_for_all_of_its_kind() -> None:
    entries = [entry(at(256), {FLASH: 2.0, REFERENCE: 3.0}, wrong={MATH: "the output: off by 3"})]
    for call in (at(256), at(300), at(256 * 8)):
        found = decide(policy(*entries), call)
        assert found.kernel == "flash_cpu"
        with attnrt.override(disable=("torch.flash_cpu",)):
            found = decide(policy(*entries), call)
        assert found.backend == "reference"
        assert ("MEASURED_WRONG", "the output: off by 3") in [r[:2] for r in found.verdicts["torch"].reasons]
    assert decide(policy(*entries), at(256, dtype="bf16")).verdicts["torch"].eligible


def test_a_kernel_that_would_hold_many_scores_stays_behind() -> None:
    big = at(4096, batch=2, causal=False)
    found = decide(policy(entry(big, {MATH: 1.0, FLASH: 2.0})), big)
    assert found.kernel == "flash_cpu" and "torch.flash_cpu is kept, as torch.math holds all scores" in found.evidence
    small = at(512, causal=False)
    assert decide(policy(entry(small, {MATH: 1.0, FLASH: 2.0})), small).kernel == "math"


def test_what_was_not_measured_stays_where_the_default_has_it() -> None:
    class Spare(attnrt.Backend):
        name, title, prefix = "spare", "the spare", "SPARE"

    registry.register_backend(Spare())
    try:
        found = decide(policy(entry(at(256), {REFERENCE: 5.0, FLASH: 1.0})), at(256))
        assert [n for n, v in found.verdicts.items() if v.eligible] == ["torch", "spare", "reference"]
    finally:
        registry.unregister_backend("spare")


def test_kernels_that_are_gone_are_passed_over() -> None:
    found = decide(policy(entry(at(256), {"gone": 0.1, "torch.gone": 0.2, MATH: 1.0, FLASH: 2.0})), at(256))
    assert found.label == "torch[math]"


def test_families_keep_the_order_of_the_default() -> None:
    """On Hopper cudnn comes first: flash-attn 3 must be ahead of it by more than the margin."""
    call = Call(heads_q=32, heads_kv=8, seqlen_q=4096, causal=True)
    for ms, best in (
        ({"cudnn": 1.02, "flash_attn_3": 1.0}, "cudnn"),
        ({"cudnn": 1.1, "flash_attn_3": 1.0}, "flash_attn_3"),
    ):
        order = policy(entry(call, ms), environment=H100).rank(call.request(), H100).order
        assert order[0] == best


def test_what_the_host_takes_counts_unless_a_graph_replays_it() -> None:
    call = Call(heads_q=32, heads_kv=8, seqlen_q=1, seqlen_kv=4096)
    found = policy(entry(call, {"cudnn": 0.01, "triton.decode": 0.02}, host_ms={"cudnn": 0.09}), environment=H100)
    request = call.request()
    assert found.rank(request, H100).order[0] == "triton.decode"
    assert found.rank(replace(request, capturing=True), H100).order[0] == "cudnn"


# ---- whose figures


def elsewhere(**changes: Any) -> Environment:
    return replace(H100, **changes)


def versions(**changes: str | None) -> tuple[tuple[str, str | None], ...]:
    names = {name.replace("-", "_"): name for name, _ in H100.packages}
    return tuple((dict(H100.packages) | {names[n]: v for n, v in changes.items()}).items())


GPU_CALL = Call(heads_q=32, heads_kv=8, seqlen_q=4096, causal=True)
GPU_MS = {"triton.portable": 1.0, "cudnn": 2.0}
VOID = {
    "another GPU": (elsewhere(name="NVIDIA H200"), "NVIDIA H200"),
    "a slice of it": (elsewhere(sm_count=60), "60"),
    "torch": (elsewhere(packages=versions(torch="2.13.0")), "torch 2.11.0, and 2.13.0 is here"),
    "cudnn": (elsewhere(packages=versions(cudnn="9.26.0")), "cudnn 9.19.0, and 9.26.0 is here"),
    "triton": (elsewhere(packages=versions(triton="3.7.0")), "triton 3.6.0, and 3.7.0 is here"),
}
KNOWN = {
    "a patch of torch": (elsewhere(packages=versions(torch="2.11.1")), "torch 2.11.0, and 2.11.1 is here"),
    "a build of torch": (elsewhere(packages=versions(torch="2.11.0+cu130")), "2.11.0+cu130 is here"),
    "a package nothing here depends on": (elsewhere(packages=versions(flash_attn="2.9.0")), "flash-attn 2.8.3"),
    "CUDA": (elsewhere(cuda="13.1"), "CUDA 13.0, and 13.1 is here"),
}


@pytest.mark.parametrize(("environment", "said"), VOID.values(), ids=VOID)
def test_hard_mismatches_void_the_figures(environment: Environment, said: str) -> None:
    found = policy(entry(GPU_CALL, GPU_MS), environment=H100).rank(GPU_CALL.request(), environment)
    assert found.policy == "default" and found.order[0] == "cudnn"
    (notice,) = found.notices
    assert said in notice and "is not used" in notice and "attnrt tune" in notice


@pytest.mark.parametrize(("environment", "said"), KNOWN.values(), ids=KNOWN)
def test_soft_ones_are_only_told(environment: Environment, said: str) -> None:
    found = policy(entry(GPU_CALL, GPU_MS), environment=H100).rank(GPU_CALL.request(), environment)
    assert found.policy == "tuned" and found.order[0] == "triton.portable"
    assert any(said in notice for notice in found.notices)


def test_a_package_that_came_later_is_told() -> None:
    before = replace(H100, packages=versions(flash_attn_4=None))
    found = policy(entry(GPU_CALL, GPU_MS), environment=before).rank(GPU_CALL.request(), H100)
    assert found.policy == "tuned" and any("flash-attn-4 4.0.0b36 was not installed then" in n for n in found.notices)


def test_threads_and_the_processor() -> None:
    for changes, said in (({"threads": 77}, "threads: 77"), ({"device": "Another CPU"}, "Another CPU")):
        found = policy(*FASTER_MATH, **changes).rank(at(256).request(), CPU)
        assert found.policy == "default" and said in found.notices[0]


def test_attnrt_itself() -> None:
    found = policy(*FASTER_MATH, attnrt="0.0.9").rank(at(256).request(), CPU)
    assert found.policy == "default" and "attnrt 0.0.9" in found.notices[0]


def test_a_simulated_machine_is_asked_by_its_arch_and_only_when_named() -> None:
    named = Environment.named("h100")
    entries = [entry(GPU_CALL, GPU_MS)]
    found = policy(*entries, environment=H100).rank(GPU_CALL.request(), named)
    assert (found.policy, found.notices) == ("default", ())
    assert policy(*entries, environment=H100, automatic=False).rank(GPU_CALL.request(), named).policy == "tuned"
    other = Environment.named("b200")
    assert policy(*entries, environment=H100, automatic=False).rank(GPU_CALL.request(), other).policy == "default"


def test_one_table_for_each_device() -> None:
    static = load_policy("default", registry.rankable())
    tables = [
        content(*FASTER_MATH).table("cpu.yaml"),
        content(entry(GPU_CALL, GPU_MS), environment=H100).table("gpu.yaml"),
    ]
    found = measured_policy(tables, static, True)
    assert "cpu.yaml" in found.rank(at(256).request(), CPU).why
    assert "gpu.yaml" in found.rank(GPU_CALL.request(), H100).why
    assert not found.rank(at(256).request(), CPU).notices


# ---- the parts


@pytest.mark.parametrize(
    ("length", "said"), [(4096, "4k"), (1536, "1.5k"), (197, "197"), (1, "1"), (131072, "128k"), (1025, "1025")]
)
def test_short(length: int, said: str) -> None:
    assert short(length) == said


def test_masks_and_biases_are_kinds_by_their_dims() -> None:
    kinds = [
        kind_of(attnrt.AttentionRequest.from_shape(batch=2, heads_q=4, seqlen_q=8, head_dim=16, mask=shape))
        for shape in ((2, 1, 1, 8), (2, 4, 8, 8), (8, 8))
    ]
    assert [k.features for k in kinds] == [("mask[bk]",), ("mask[bhqk]",), ("mask[qk]",)]


SIZES = st.tuples(
    st.integers(1, 64),
    st.sampled_from((1, 2, 4)),
    st.sampled_from((1, 2, 8)),
    st.integers(1, 9000),
    st.integers(1, 9000),
)


@settings(deadline=None, max_examples=100)
@given(SIZES, SIZES)
def test_distance_is_one(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    def place(sizes: tuple[int, ...]) -> Any:
        batch, kv, group, q, keys = sizes
        call = Call(batch=batch, heads_q=kv * group, heads_kv=kv, seqlen_q=q, seqlen_kv=keys, head_dim=8)
        return place_of(call.request())

    one, other = place(a), place(b)
    assert distance(one, one) == 0
    assert distance(one, other) == pytest.approx(distance(other, one))
    assert distance(one, other) >= abs(math.log2(one.seqlen_q / other.seqlen_q)) - 1e-9


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(
            st.integers(16, 4096),
            st.dictionaries(st.sampled_from((FLASH, MATH, REFERENCE)), st.floats(1e-3, 1e3), min_size=1),
        ),
        min_size=1,
        max_size=6,
        unique_by=lambda p: p[0],
    ),
    st.integers(16, 4096),
)
def test_the_answer_is_a_pure_order(points: list[tuple[int, dict[str, float]]], length: int) -> None:
    found = policy(*(entry(at(n), ms) for n, ms in points))
    request = at(length).request()
    one, two = found.rank(request, CPU), found.rank(request, CPU)
    assert one == two and one.notices == two.notices
    assert len(set(one.order)) == len(one.order) and set(found.static.rank(request, CPU).order) <= set(one.order)
    exact = dict(points).get(length)
    if exact:
        best = min(exact.values())
        assert exact.get(one.order[0], best) <= best * 1.03 * (1 + 1e-3)
