"""The codegen guard: with the tiles that ship, no kernel spills, outgrows its GPU's shared memory, or misses the matrix
units. Compiled for GPUs that need not be here; the whole table is docs/triton_codegen.md."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def codegen() -> Any:
    """tools/codegen.py as a module."""
    if (name := "attnrt_tools_codegen") not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / "codegen.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


FULL = os.environ.get("TRITON_TESTS") == "full"
SAMPLE = (
    *(("sm80", "64", ("fp32",)), ("sm80", "128", ("causal", "decode")), ("sm80", "256", ("packed",))),
    *(("sm86", "64", ("dropout", "tf32 bias")), ("sm86", "192/128", ("causal",))),
    *(("sm90", "64", ("tf32",)), ("sm90", "128", ("full", "packed", "decode")), ("sm90", "256", ("causal",))),
    *(("sm100", "64", ("bias",)), ("sm100", "128", ("causal",)), ("sm100", "256", ("decode",))),
)
"""Every arch and head dim, and every class of tiles (configs/triton/tiles.yaml) but the heaviest. The whole table takes
far longer; docs/triton_codegen.md has it."""
CHECKED = [(a, d, codegen().FEATURES) for a in codegen().ARCHS for d in codegen().DIMS] if FULL else SAMPLE


@pytest.mark.parametrize(("arch", "dim", "features"), CHECKED, ids=lambda x: x if isinstance(x, str) else "")
def test_shipped_tiles(arch: str, dim: str, features: tuple[str, ...]) -> None:
    kernels = codegen().compile_all((arch,), (dim,), tuple(features), jobs=1)
    assert {k.feature for k in kernels} == set(features)
    wrong = [str(k) for k in kernels if k.wrong] + codegen().without_matrix_units(kernels)
    assert not wrong, "\n".join(wrong)
    if arch == "sm90":
        fetched = [
            k for k in kernels if k.name not in ("preprocess", "hopper.finish_dq") and k.feature in ("full", "causal")
        ]
        assert all("tma" in k.instructions for k in fetched), "\n".join(map(str, fetched))


@pytest.mark.parametrize(("arch", "instruction"), [("sm80", "mma"), ("sm90", "wgmma")])
def test_tf32_where_the_switch_allows_it(arch: str, instruction: str) -> None:
    """And in no kernel of a call that asks for exact products."""
    for tf32 in (True, False):
        with codegen().recorded(int(arch[2:])) as found:
            codegen().run_call(arch, (64, 64), dtype="float32", tf32=tf32, training=False)
        ((_, kernel),) = found
        products = [x for x in kernel.asm["ptx"].splitlines() if re.search(codegen().INSTRUCTIONS[instruction], x)]
        assert bool(products) == tf32 and all("tf32" in x for x in products)


def test_what_is_wrong_is_said() -> None:
    """The guard itself: spills, shared memory, a missing instruction, a compiler that died."""
    made = codegen().Compiled
    good = made("sm90", "128", "full", "forward", 8, 200, 0, 227 << 10, {"wgmma": 4})
    assert not good.wrong and not codegen().without_matrix_units([good])
    assert made("sm90", "128", "full", "forward", 8, 255, 16, 1024, {"wgmma": 4}).wrong == ["spills 16 B"]
    assert "shared memory" in made("sm86", "128", "full", "forward", 8, 99, 0, 100 << 10, {"mma": 4}).wrong[0]
    assert codegen().without_matrix_units([made("sm100", "64", "full", "forward", 8, 99, 0, 1024, {"mma": 4})])
    assert made("sm90", "128", "full", "?", error="the compiler died").wrong == ["the compiler died"]
