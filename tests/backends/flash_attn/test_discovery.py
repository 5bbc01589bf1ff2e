"""What is said about a package that is absent, too old, too new, broken, or built for another GPU.

The packages are real files on `sys.path`: distributions with metadata, modules that fail as real ones do, and binaries
with the sections that nvcc writes. Only the GPU's identity is made up.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from installing import DENSE, NEW, OLD, OTHERS, VERSION, Install, elf, module

from attnrt.advisories import matching
from attnrt.backends.base import Reason, reasons
from attnrt.backends.flash_attn import FlashAttention, FlashAttention2, FlashAttention3, FlashAttention4, discovery
from attnrt.backends.flash_attn.fatbin import Target, targets
from attnrt.environment import Environment, _installed
from attnrt.matrix import rule_ids
from attnrt.request import AttentionRequest

REQUEST = AttentionRequest.from_shape(batch=1, heads_q=4, seqlen_q=128, head_dim=64, causal=True)
GENERATIONS: dict[int, FlashAttention] = {2: FlashAttention2(), 3: FlashAttention3(), 4: FlashAttention4()}


def here(number: int, arch: str = "sm90") -> Environment:
    """This machine with a made-up GPU, its flash-attn as installed."""
    package = GENERATIONS[number].package
    described = Environment.simulate(arch, packages={package: _installed(package)}, name=f"a GPU of {arch}")
    return replace(described, simulated=False)


def said(number: int, arch: str = "sm90") -> Reason:
    """The one thing that is said against the generation: by its rules, else by the package."""
    backend, there = GENERATIONS[number], here(number, arch)
    found = reasons(backend.all_rules, REQUEST, there) or backend.answer(REQUEST, there)
    assert len(found) == 1, found
    assert found[0].rule in rule_ids(), "docs/rules.md lists it"
    return found[0]


# --- The five reports --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", GENERATIONS)
def test_absent(number: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    found = said(number)
    assert found.rule == f"FA{number}_INSTALLED"
    assert found.message == f"{GENERATIONS[number].package} is not installed"
    assert found.remedy


@pytest.mark.parametrize("number", OLD)
def test_too_old(number: int, install: Install) -> None:
    install(number, OLD[number], {module(number): "raise AssertionError('imported')"})
    found = said(number)
    assert found.rule == f"FA{number}_VERSION"
    assert OLD[number] in found.message and "or later is needed" in found.message
    assert found.remedy and ("hopper folder" if number == 3 else "pip install") in found.remedy


@pytest.mark.parametrize("number", GENERATIONS)
def test_too_new(number: int, install: Install) -> None:
    install(number, NEW[number], {module(number): "raise AssertionError('imported')"})
    found = said(number)
    assert found.rule == f"FA{number}_TOO_NEW"
    assert NEW[number] in found.message and "later generation" in found.message
    assert found.remedy == f"pip install '{GENERATIONS[number].package}<{NEW[number][0]}'"


@pytest.mark.parametrize(
    ("raised", "name"),
    [
        ("ImportError('lib.so: undefined symbol: _ZN3c104cuda9SetDeviceEi')", "undefined symbol: _ZN3c104cuda9Set"),
        ("OSError('libcudart.so.12: cannot open shared object file')", "OSError: libcudart.so.12: cannot open"),
        ("AttributeError(\"module 'cutlass' has no attribute 'cute'\")", "AttributeError: module 'cutlass' has no"),
    ],
)
@pytest.mark.parametrize("number", GENERATIONS)
def test_broken(number: int, raised: str, name: str, install: Install) -> None:
    """The loader's own words, whatever it raises, and what to do about it."""
    install(number, VERSION[number], {module(number): f"raise {raised}"})
    found = said(number)
    assert found.rule == f"FA{number}_BROKEN"
    assert name in found.message and f"{VERSION[number]} is installed and does not load" in found.message
    assert found.remedy
    if number < 4 and "undefined symbol" in raised:
        import torch

        assert f"torch {torch.__version__}" in found.remedy
    if number == 4:
        assert "nvidia-cutlass-dsl" in found.message and "quack-kernels==0.6.5" in found.remedy
    with pytest.raises(RuntimeError, match="does not load"):
        GENERATIONS[number].prepare(REQUEST, here(number))


def test_broken_says_what_a_wheel_was_built_for(install: Install) -> None:
    version = "2.8.3+cu12torch2.8cxx11abitrue"
    install(2, version, {module(2): "raise ImportError('undefined symbol: x')"})
    assert "it was built for cu12torch2.8cxx11abitrue" in said(2).message


@pytest.mark.parametrize("number", [2, 3])
def test_built_for_another_gpu(number: int, install: Install) -> None:
    binary = {2: "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so", 3: "flash_attn_3/_C.abi3.so"}[number]
    install(number, VERSION[number], {module(number): DENSE + OTHERS, binary: elf((2, 80))})
    found = said(number)
    assert found.rule == f"FA{number}_BUILT_FOR"
    assert "was built for sm80, and a GPU of sm90 is sm90" in found.message
    assert found.remedy and "build it again" in found.remedy


@pytest.mark.parametrize("entries", [((2, 80), (2, 90)), ((2, 80), (1, 80)), ()])
def test_built_for_this_gpu_too(entries: tuple[tuple[int, int], ...], install: Install) -> None:
    """By machine code, by PTX that the driver can compile, or one cannot tell."""
    there = here(2)
    install(2, VERSION[2], {module(2): DENSE + OTHERS, "flash_attn_2_cuda.so": elf(*entries)})
    assert discovery.built_elsewhere(discovery.GENERATIONS[2], there) is None


def test_another_signature(install: Install) -> None:
    """Neither too old nor too new by its number, but without an argument that the call needs."""
    source = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False): ..." + OTHERS
    install(4, VERSION[4], {module(4): source})
    found = said(4)
    assert found.rule == "FA4_SIGNATURE"
    assert "flash_attn_func of flash-attn-4 4.0.0b36 has no argument num_splits" in found.message


def test_an_older_build_of_flash_attn_3(install: Install) -> None:
    """It returns the log-sum-exp unasked, which is no reason against it; to have no softcap is one."""
    install(3, VERSION[3], {module(3): DENSE + OTHERS})
    sizes = {"batch": 1, "heads_q": 4, "seqlen_q": 128, "head_dim": 64, "return_lse": True}
    assert GENERATIONS[3].answer(AttentionRequest.from_shape(**sizes), here(3)) == ()
    (found,) = GENERATIONS[3].answer(AttentionRequest.from_shape(**sizes, softcap=20.0), here(3))
    assert (found.rule, "no argument softcap" in found.message) == ("FA3_SIGNATURE", True)


def test_what_a_build_of_flash_attn_3_leaves_out(install: Install) -> None:
    """Head dims take the next kernel that was built, as the package does."""
    flags = {f"FLASHATTENTION_DISABLE_HDIM{d}": True for d in (96, 192, 256)} | {
        "FLASH_ATTENTION_DISABLE_HDIMDIFF192": True,
        "FLASHATTENTION_DISABLE_BACKWARD": True,
    }
    config = "CONFIG = " + repr({"build_flags": flags})
    install(3, VERSION[3], {module(3): DENSE + OTHERS, "flash_attn_config.py": config})

    def found(**more: Any) -> list[str]:
        asked = AttentionRequest.from_shape(**{"batch": 1, "heads_q": 4, "seqlen_q": 128, **more})
        reasons = GENERATIONS[3].answer(asked, here(3))
        assert {r.rule for r in reasons} <= {"FA3_LEFT_OUT"}
        return [r.message for r in reasons]

    assert found(head_dim=64) == found(head_dim=72) == found(head_dim=96) == found(head_dim=128) == []
    (said,) = found(head_dim=136)
    assert "was built without kernels for head_dim 136 or more (FLASHATTENTION_DISABLE_HDIM192)" in said
    assert "without head dims 192/128" in found(head_dim=192, head_dim_v=128)[0]
    assert "built without a backward" in found(head_dim=128, training=True)[0]


def test_a_deterministic_backward_takes_no_kernel_that_has_none(install: Install) -> None:
    """The one for head_dim 256, which others would take where theirs was not built."""
    config = "CONFIG = " + repr({"build_flags": {"FLASHATTENTION_DISABLE_HDIM192": True}})
    install(3, VERSION[3], {module(3): DENSE + OTHERS, "flash_attn_config.py": config})
    for deterministic in (False, True):
        sizes = {"batch": 1, "heads_q": 4, "seqlen_q": 128, "head_dim": 160, "training": True}
        asked = AttentionRequest.from_shape(**sizes, deterministic=deterministic)
        assert len(GENERATIONS[3].answer(asked, here(3))) == deterministic


def test_unequal_head_dims_take_the_kernel_of_their_pair(install: Install) -> None:
    """The next larger one is as wide in both."""
    config = "CONFIG = " + repr({"build_flags": {"FLASHATTENTION_DISABLE_HDIM64": True}})
    install(3, VERSION[3], {module(3): DENSE + OTHERS, "flash_attn_config.py": config})
    for head_dim_v, said in ((64, 0), (128, 1)):
        sizes = {"batch": 1, "heads_q": 4, "seqlen_q": 128, "head_dim": 64, "head_dim_v": head_dim_v}
        assert len(GENERATIONS[3].answer(AttentionRequest.from_shape(**sizes), here(3))) == said


NAMES = (
    b"_ZN5flash12run_mha_fwd_IN7cutlass10bfloat16_tELi64ELb1EEEvRNS_16Flash_fwd_paramsEP11CUstream_st",
    b"_ZN5flash28run_mha_fwd_splitkv_dispatchIN7cutlass10bfloat16_tELi64ELb1EEEvRNS_16Flash_fwd_paramsEP11CUstream_st",
)
LACKS = b"This flash attention build does not support headdim not being a multiple of 32.\0"


@pytest.mark.parametrize(
    ("asked", "without"),
    [
        ({"head_dim": 64}, ()),
        ({"head_dim": 128}, ("the forward and the split forward for head_dim 128 in bf16",)),
        ({"head_dim": 96}, ("the forward and the split forward for head_dim 96 in bf16",)),
        ({"head_dim": 160}, ("the forward and the split forward for head_dim 192 in bf16, which head_dim 160 takes",)),
        ({"head_dim": 64, "dtype": "fp16", "padded": "kv"}, ("the split forward for head_dim 64 in fp16",)),
        ({"head_dim": 64, "training": True}, ("the backward for head_dim 64 in bf16",)),
        ({"head_dim": 40}, ("head dims that are not a multiple of 32",)),
    ],
)
def test_what_a_build_of_flash_attn_2_leaves_out(
    asked: dict[str, object], without: tuple[str, ...], install: Install
) -> None:
    """As tools/build_flash_attn_2.py makes one, or whoever cuts its sources by hand."""
    arguments = "".join(f", {n}=None" for n in ("softmax_scale", "causal", "cache_seqlens", "window_size"))
    source = "".join(f"def {n}(q, {kv}{arguments}): ...\n" for n, kv in (
        ("flash_attn_func", "k, v"), ("flash_attn_varlen_func", "k, v"),
        ("flash_attn_with_kvcache", "k_cache, v_cache"),
    ))  # fmt: skip
    binary = elf((2, 90), dynstr=b"\0" + b"\0".join(NAMES) + b"\0", rodata=LACKS)
    install(2, VERSION[2], {module(2): source, "flash_attn_2_cuda.cpython-311-x86_64-linux-gnu.so": binary})
    request = AttentionRequest.from_shape(**{"batch": 1, "heads_q": 4, "seqlen_q": 128, **asked})  # type: ignore[arg-type]
    found = GENERATIONS[2].answer(request, here(2))
    assert [reason.rule for reason in found] == ["FA2_LEFT_OUT"] * len(without)
    for reason, words in zip(sorted(found), without, strict=True):
        assert f"flash-attn 2.8.3 here was built without {words}" in reason.message
        assert reason.remedy


def test_a_build_that_says_nothing_is_taken_at_its_word(install: Install) -> None:
    install(2, VERSION[2], {module(2): DENSE + OTHERS, "flash_attn_2_cuda.so": b"\x7fELF\x02, cut short"})
    assert GENERATIONS[2].answer(REQUEST, here(2)) == ()


# --- What lies beside it -----------------------------------------------------------------------------------------


def test_an_old_copy_in_the_place_of_flash_attn_4(install: Install) -> None:
    """flash-attn 2.8.3, installed afterwards, overwrites files of flash-attn 4."""
    folder = install(4, VERSION[4], {module(4): "", "flash_attn/cute/interface.py": "# the right one"})
    (folder / "flash_attn/cute/interface.py").write_text("# an old copy, of another size")
    found = said(4)
    assert found.rule == "FA4_SHADOWED"
    assert "is not the file that flash-attn-4 installed" in found.message


@pytest.mark.parametrize("stale", [True, False], ids=["over it", "before it, or left out"])
def test_flash_attn_2_beside_it_matters_where_it_has_overwritten_it_alone(install: Install, stale: bool) -> None:
    """Of a machine that is described it cannot be known, so there it is a warning."""
    folder = install(4, VERSION[4], {module(4): DENSE + OTHERS, "flash_attn/cute/interface.py": "# the right one"})
    install(2, VERSION[2], {"flash_attn/__init__.py": ""})
    if stale:
        (folder / "flash_attn/cute/interface.py").write_text("# an old copy, of another size")
    versions = {GENERATIONS[n].package: VERSION[n] for n in (2, 4)}
    described = Environment.simulate("sm90", packages=versions)
    this = replace(described, simulated=False)

    def warned(environment: Environment) -> list[str]:
        return [a.id for a in matching("flash_attn_4", "flash_attn_4", REQUEST, environment)]

    assert "FA4_SHADOWED_BY_FA2" in warned(described) and "FA4_SHADOWED_BY_FA2" not in warned(this)
    assert [r.rule for r in GENERATIONS[4].answer(REQUEST, this)] == ["FA4_SHADOWED"] * stale


def test_the_copy_inside_flash_attn_2_is_not_flash_attn_4(install: Install) -> None:
    install(2, VERSION[2], {module(2): DENSE + OTHERS, "flash_attn/cute/__init__.py": DENSE})
    if _installed("flash-attn-4") is None:
        assert said(4).rule == "FA4_INSTALLED"


def test_flash_attn_3_under_its_other_name(install: Install) -> None:
    install(3, VERSION[3], {"flash_attn_3/__init__.py": "", "flash_attn_3/flash_attn_interface.py": DENSE + OTHERS})
    found = discovery.load(3, VERSION[3])
    assert isinstance(found, discovery.Library)
    assert found.functions["flash_attn_func"].__module__ == "flash_attn_3.flash_attn_interface"


def test_the_folder_for_compiled_kernels_is_set_for_the_import_alone(install: Install, tmp_path: Path) -> None:
    seen = "import os\nDIR = os.environ.get('FLASH_ATTENTION_CUTE_DSL_CACHE_DIR')\n"
    install(4, VERSION[4], {module(4): seen + DENSE + OTHERS})
    kept = tmp_path / "kept"
    assert isinstance(discovery.load(4, VERSION[4], kept), discovery.Library)
    loaded = sys.modules["flash_attn.cute"]
    assert str(kept) == loaded.DIR
    assert kept.stat().st_mode & 0o077 == 0, "others could put native code there"
    assert "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR" not in os.environ


def test_a_broken_package_does_not_stop_attnrt(install: Install) -> None:
    """Neither its import, nor a report, nor a call that another backend serves."""
    folder = install(2, VERSION[2], {module(2): "raise SystemError('broken')"})
    code = (
        "import torch, attnrt\n"
        "q = torch.zeros(1, 2, 8, 16)\n"
        "print(attnrt.explain(q, q, q).backend, attnrt.attention(q, q, q).shape)\n"
    )
    path = os.pathsep.join((str(folder), str(Path(__file__).parents[3])))
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch ")


# --- Compiled files ----------------------------------------------------------------------------------------------


def test_targets_of_a_binary(tmp_path: Path) -> None:
    file = tmp_path / "x.so"
    file.write_bytes(elf((2, 80), (2, 90), (1, 120)))
    assert targets(file) == (Target(80), Target(90), Target(120, ptx=True))
    for content in (b"", b"\x7fELF", b"text", elf((2, 80))[:-70], bytes(4096)):
        file.write_bytes(content)
        assert targets(file) == ()


@pytest.mark.parametrize(
    ("target", "runs", "fails"),
    [
        (Target(80), (80, 86, 89), (75, 90, 100)),
        (Target(90), (90,), (89, 100)),
        (Target(80, ptx=True), (80, 120), (75,)),
    ],
)
def test_where_a_target_runs(target: Target, runs: tuple[int, ...], fails: tuple[int, ...]) -> None:
    assert all(target.runs_on(sm) for sm in runs)
    assert not any(target.runs_on(sm) for sm in fails)
