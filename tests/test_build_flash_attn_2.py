"""tools/build_flash_attn_2.py: what it cuts away is gone everywhere, so that the rest links."""

from __future__ import annotations

import runpy
import tarfile
from pathlib import Path

import pytest

TOOL = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "build_flash_attn_2.py"))
SWITCHES = """#pragma once

#define FP16_SWITCH(COND, ...)               \\
  [&] {                                      \\
    if (COND) {                              \\
      using elem_type = cutlass::half_t;     \\
      return __VA_ARGS__();                  \\
    }                                        \\
  }()

#define HEADDIM_SWITCH(HEADDIM, ...)   \\
  [&] {                                    \\
    if (HEADDIM <= 32) {                   \\
      return __VA_ARGS__();                \\
    }                                      \\
  }()
"""
SETUP = """
    nvcc_flags = [
    "-O3",
    "-std=c++17",
    ]
    compiler_c17_flag=["-O3", "-std=c++17"]
    sources=[
        "csrc/flash_attn/src/flash_fwd_hdim64_bf16_causal_sm80.cu",
        "csrc/flash_attn/src/flash_bwd_hdim64_fp16_sm80.cu",
        "csrc/flash_attn/src/flash_fwd_split_hdim96_bf16_sm80.cu",
    ]
"""


def test_flash_attn_2_is_cut_down(tmp_path: Path) -> None:
    """Sources of other head dims and dtypes go, with their lines in setup.py and their cases in the dispatch."""
    files = {
        "setup.py": SETUP,
        "csrc/flash_attn/src/static_switch.h": SWITCHES,
        "csrc/flash_attn/src/flash_fwd_hdim64_bf16_causal_sm80.cu": "",
        "csrc/flash_attn/src/flash_bwd_hdim64_fp16_sm80.cu": "",
        "csrc/cutlass/include/cutlass/cutlass.h": "",
        "csrc/cutlass/test/unit.h": "",
        "flash_attn/cute/interface.py": "",
        "flash_attn/__init__.py": "",
    }
    with tarfile.open(tmp_path / "whole.tar.gz", "w:gz") as whole:
        for name, text in files.items():
            (tmp_path / "file").write_text(text)
            whole.add(tmp_path / "file", f"flash_attn-2.8.3/{name}")
    TOOL["trim"](tmp_path / "whole.tar.gz", tmp_path / "cut.tar.xz", (64,), ("bf16",), ("uneven_k",))
    with tarfile.open(tmp_path / "cut.tar.xz") as cut:
        cut.extractall(tmp_path / "cut", filter="data")
    root = tmp_path / "cut" / "flash_attn_2"
    kept = {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()}
    gone = {"flash_bwd_hdim64_fp16_sm80.cu", "unit.h", "cute/interface.py"}
    assert kept == {name for name in files if not any(name.endswith(g) for g in gone)}
    setup = (root / "setup.py").read_text()
    assert "hdim64_bf16" in setup and "fp16" not in setup and "hdim96" not in setup
    assert setup.count("-DFLASHATTENTION_DISABLE_UNEVEN_K") == 2 and setup.count("'-std=c++20'") == 2
    switches = (root / "csrc/flash_attn/src/static_switch.h").read_text()
    assert "HEADDIM > 32 && HEADDIM <= 64" in switches and "HEADDIM <= 32)" not in switches
    assert "head_dim 64 alone" in switches and "bf16 alone" in switches and "half_t" not in switches
    assert all(line.endswith("\\") for line in switches.split("#define HEADDIM_SWITCH")[1].splitlines()[:-1])


def test_another_flash_attn_2_is_not_cut_blindly(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another version of flash-attn 2"):
        TOOL["edited"]("csrc/flash_attn/src/static_switch.h", "#pragma once\n", (64,), ("bf16",))
