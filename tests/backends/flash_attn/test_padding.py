"""Head dims that a generation has no kernel for, padded where the policy allows it: choice, report and numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import standin
import torch
from oracle import Case, assert_agrees, gradients

import attnrt
from attnrt.backends.base import reasons
from attnrt.backends.flash_attn import FlashAttention, FlashAttention2, FlashAttention3, FlashAttention4, padding
from attnrt.environment import Environment
from attnrt.operands import Operands
from attnrt.request import AttentionRequest

GENERATIONS: dict[int, FlashAttention] = {2: FlashAttention2(), 3: FlashAttention3(), 4: FlashAttention4()}
NEWEST = {n: [*standin.SIGNATURES[g.package]][-1] for n, g in GENERATIONS.items()}
ALLOWS = "name: padded\ndescription: a test\nextends: default\nallow_padding: true\n"


def machine(number: int, arch: str = "sm90") -> Environment:
    return Environment.simulate(arch, packages={GENERATIONS[number].package: NEWEST[number].partition(" ")[0]})


def request(dims: tuple[int, int], **options: Any) -> AttentionRequest:
    sizes = {"batch": 2, "heads_q": 8, "heads_kv": 2, "seqlen_q": 1024}
    made = AttentionRequest.from_shape(**(sizes | options), head_dim=dims[0], head_dim_v=dims[1])
    return replace(made, may_pad=True)


@pytest.mark.parametrize(
    ("number", "arch", "dims", "options", "wide"),
    [
        (2, "sm80", (128, 128), {}, (128, 128)),  # it has a kernel: nothing is padded
        (2, "sm80", (100, 100), {}, (104, 104)),
        (2, "sm80", (192, 128), {}, (192, 192)),
        (2, "sm80", (20, 36), {}, (40, 40)),
        (2, "sm80", (264, 264), {}, (264, 264)),  # larger than all: refused as ever
        (2, "sm80", (192, 128), {"padded": "kv"}, (192, 128)),  # a cache is not copied for each step
        (3, "sm90", (192, 96), {}, (192, 128)),
        (3, "sm90", (60, 500), {}, (64, 504)),
        (3, "sm90", (96, 64), {}, (96, 96)),
        (4, "sm90", (192, 128), {"training": True}, (192, 192)),  # GQA: its backward needs equal ones
        (4, "sm90", (192, 128), {"training": True, "heads_kv": 8}, (192, 128)),
        (4, "sm90", (64, 256), {}, (128, 256)),
        (4, "sm100", (160, 100), {}, (192, 128)),
    ],
)
def test_the_smallest_head_dims_with_a_kernel(
    number: int, arch: str, dims: tuple[int, int], options: dict[str, Any], wide: tuple[int, int]
) -> None:
    backend, there, asked = GENERATIONS[number], machine(number, arch), request(dims, **options)
    found = backend.as_run(asked, there)
    assert (found.head_dim_qk, found.head_dim_v) == wide
    assert (found.scale, found.seqlen_q) == (asked.scale, asked.seqlen_q)
    refused = reasons(backend.all_rules, asked, there)
    assert bool(refused) == (wide == dims and dims != (128, 128) and "heads_kv" not in options)
    plain = replace(asked, may_pad=False)
    assert backend.as_run(plain, there) is plain
    if not refused and wide != dims:
        assert any("HEAD_DIM" in reason.rule for reason in reasons(backend.all_rules, plain, there))


@pytest.mark.parametrize("number", GENERATIONS)
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "sbhd", "thd"])
@pytest.mark.parametrize("dims", [(12, 12), (20, 36), (40, 20)])
def test_the_numbers_are_those_of_the_real_head_dims(number: int, layout: str, dims: tuple[int, int]) -> None:
    torch.manual_seed(0)
    front = {"bshd": (2, 9), "bhsd": (2,), "sbhd": (9, 2), "thd": (9,)}[layout]
    back = (9,) if layout == "bhsd" else ()
    q, k, v = (
        torch.randn(*front, h, *back, d).bfloat16().requires_grad_()
        for h, d in ((4, dims[0]), (2, dims[0]), (2, dims[1]))
    )
    offsets = torch.tensor([0, 4, 9], dtype=torch.int32)
    packing = {"cu_seqlens_q": offsets, "cu_seqlens_kv": offsets} if layout == "thd" else {}
    operands = Operands(sinks=torch.randn(4, requires_grad=True), **packing)
    grad = torch.randn(*front, 4, *back, dims[1]).bfloat16()
    case = Case(q, k, v, layout, operands, grad, {"causal": True, "return_lse": True})
    backend, there = GENERATIONS[number], machine(number)
    asked = replace(case.request(), may_pad=True)
    wide = backend.as_run(asked, there)
    assert wide is not asked and not reasons(backend.all_rules, asked, there)
    library = standin.library(number, NEWEST[number])
    run = padding.unpadded(backend.adapter().prepare(wide, replace(there, device_type="cpu"), library), asked, wide)
    out, lse = run(q, k, v, operands)
    assert out.is_contiguous() or layout == "bhsd"
    assert_agrees(case, {"out": out, "lse": lse, **gradients(case, out, case.leaves())})


def test_the_report_says_what_it_copies(tmp_path: Path) -> None:
    """Only where the policy allows it; with the bytes."""
    (tmp_path / "padded.yaml").write_text(ALLOWS)
    shape = {"batch": 1, "heads_q": 8, "seqlen_q": 4096, "head_dim": 192, "head_dim_v": 128, "causal": True}
    there = machine(2, "sm80")
    strict = attnrt.explain_shape(**shape, environment=there).verdicts["flash_attn_2"]
    (reason,) = strict.reasons
    assert reason.rule == "FA2_UNEQUAL_HEAD_DIMS" and reason.remedy and "allow_padding: true" in reason.remedy
    decision = attnrt.explain_shape(**shape, environment=there, policy=str(tmp_path / "padded.yaml"))
    assert decision.backend == "flash_attn_2" and decision.request.may_pad
    verdict = decision.verdicts["flash_attn_2"]
    copied = 4096 * 8 * (192 + 128) * 2  # v with 192 columns, the output with 128
    said = f"pads head_dim_v 128 to 192 with zeros, as the policy allows: {copied} bytes of copies"
    assert said in verdict.notes and said in decision.to_markdown().replace("\\_", "_")
    equal = attnrt.explain_shape(**(shape | {"head_dim_v": 192}), environment=there).verdicts["flash_attn_2"]
    assert verdict.bytes == equal.bytes + copied
    assert '"may_pad": true' in decision.to_json()
