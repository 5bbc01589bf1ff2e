"""The codegen guard: with the tiles that ship, no kernel spills, outgrows its GPU's shared memory, or misses the matrix
units. Compiled for GPUs that need not be here; the whole table is docs/triton_codegen.md."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from attnrt.backends.triton import TritonBackend

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


@pytest.mark.parametrize("dims", [(60, 20), (252, 12)])
def test_narrow_values_by_elements(dims: tuple[int, int]) -> None:
    """Of rows that are no multiple of 16 bytes. With tiles as narrow as these values, ptxas 12.8 made a forward that
    takes the address of its values from a register that nothing has written: output off by 0.9 on an H200."""
    with codegen().recorded(90) as found:
        codegen().run_call("sm90", dims, layout="bhsd")
    made = [codegen().read("sm90", "", "", name, kernel) for name, kernel in found]
    assert {"forward", "dkdv", "dq"} <= {k.name for k in made}
    assert all("tma" not in k.instructions for k in made if k.name == "forward")
    assert not [str(k) for k in made if k.unwritten or k.early]


@pytest.mark.parametrize("dims", [(60, 20), (124, 4)])
@pytest.mark.parametrize("queries", [22, 4])
def test_narrow_values_of_a_decode(dims: tuple[int, int], queries: int) -> None:
    """The same in decodes of over 32 rows, by a register that the loop before it has written, if that ran: off by 0.4
    on an H200. Smaller ones have other matrix instructions."""
    (decode,) = (k for k in TritonBackend().kernels if k.name == "decode")
    with codegen().recorded(90) as found:
        options = {"seqlen_q": queries, "seqlen_kv": 300, "training": False, "operands": ("seqlens_kv",)}
        codegen().run_call("sm90", dims, layout="sbhd", kernel=decode, **options)
    (made,) = (codegen().read("sm90", "", "", name, kernel) for name, kernel in found)
    assert ("wgmma" if queries == 22 else "mma") in made.instructions
    assert not (made.unwritten or made.early)


def found_by(check: str, text: str) -> list[str]:
    """By a check of tools/sass.py in machine code."""
    sass = codegen().sass
    found: list[str] = getattr(sass, check)(sass.parse(text))
    return found


ADDRESS = """
    /*0000*/                   ULDC.64 UR38, c[0x0][0x208] ;
    /*0010*/               @P0 LDG.E.U16 R4, desc[UR38][R2.64] ;
    /*0020*/              @!P1 BRA `(.L_x_0) ;
    /*0030*/                   UIADD3 UR22, UP0, UR22, 0x40, URZ ;
    /*0040*/                   UIADD3.X UR23, UR23, -0x7fffffe0, URZ, UP0, !UPT ;
.L_x_1:
    /*0050*/                   HGMMA.64x32x16.F32.BF16 R104, R32, gdesc[UR20].tnspB, R104 ;
    /*0060*/              @!P1 BRA `(.L_x_1) ;
.L_x_0:
    /*0070*/                   EXIT ;
"""


def test_a_register_that_nothing_has_written() -> None:
    """The code of that forward, cut to its bones; and the same with the register set on the way there, on one way of
    two, or where the loop comes back."""
    undefined = partial(found_by, "undefined")
    assert [x.split()[0] for x in undefined(ADDRESS)] == ["UIADD3", "UIADD3.X"]
    pair = "/*0008*/ UMOV UR22, UR10 ;\n/*0009*/ UMOV UR23, URZ ;\n"
    for place in ("    /*0020*/", "    /*0030*/"):
        rest = undefined(ADDRESS.replace(place, pair + place))
        assert [x.split()[0] for x in rest] == ["UMOV"]  # UR10, of which we did not speak
    one_way = ADDRESS.replace("    /*0030*/", f"/*0028*/ @P2 BRA `(.L_x_2) ;\n{pair}.L_x_2:\n    /*0030*/")
    assert [x.split()[0] for x in undefined(one_way)] == ["UMOV", "UIADD3", "UIADD3.X"]
    after = ADDRESS.replace("    /*0060*/", "/*0058*/ ULDC.64 UR10, c[0x0][0x210] ;\n    /*0060*/")
    moved = after.replace(".L_x_1:\n", ".L_x_1:\n" + pair)
    # UR10 comes with the second round.
    assert [x.split()[0] for x in undefined(moved)] == ["UIADD3", "UIADD3.X", "UMOV"]
    shared = ADDRESS.replace("R104, R32, gdesc", "R104, gdesc")  # both matrices by descriptor: UR20 and UR21 as well
    assert [x.split()[0] for x in undefined(shared)] == ["UIADD3", "UIADD3.X", "HGMMA.64x32x16.F32.BF16"]
    met = ADDRESS.replace("    /*0020*/", f"/*0008*/ BSSY B0, `(.L_x_3) ;\n{pair}.L_x_3:\n    /*0020*/")
    assert [x.split()[0] for x in undefined(met)] == ["UMOV"]  # where ways meet again is no way
    skipped = ADDRESS.replace("    /*0030*/", "    /*0028*/ BRA `(.L_x_0) ;\n    /*0030*/")
    assert undefined(skipped) == []  # never comes there


PRODUCTS = """
    /*0000*/                   MOV R24, R60 ;
    /*0010*/                   HGMMA.64x16x16.F32.BF16 R88, R24, gdesc[UR20].tnspB, R88 ;
    /*0020*/                   HGMMA.64x16x16.F32.BF16 R88, R28, gdesc[UR24].tnspB, R88, gsb0 ;
    /*0030*/                   FADD R60, R60, R61 ;
    /*0040*/                   HGMMA.64x16x16.F32.BF16 R96, gdesc[UR28], R96, gsb0 ;
.L_x_0:
    /*0050*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
    /*0060*/                   LDS.128 R28, [R61] ;
    /*0070*/                   EXIT ;
"""


def test_a_matrix_that_is_written_while_it_is_read() -> None:
    overwritten = partial(found_by, "overwritten")
    assert overwritten(PRODUCTS) == []
    for late in (
        "MOV R27, R60",
        "@P1 IMAD.WIDE R30, R2, R3, R4",
        "LDS.64 R26, [R61]",
        "ISETP.GE.AND P0, PT, R24, R2, PT",
    ):
        found = overwritten(PRODUCTS.replace("FADD R60, R60, R61", late))
        assert found == ([late] if "ISETP" not in late else []), late
    # Two groups are open where it waits: with one left, the first is done; with two, none.
    assert overwritten(PRODUCTS.replace("gsb0, 0x0", "gsb0, 0x1")) == []
    assert overwritten(PRODUCTS.replace("gsb0, 0x0", "gsb0, 0x2")) == ["LDS.128 R28, [R61]"]
    past = PRODUCTS.replace("    /*0030*/", "/*0028*/ @P0 BRA `(.L_x_1) ;\n    /*0030*/")
    past = past.replace("    /*0060*/", ".L_x_1:\n    /*0060*/")
    assert overwritten(past) == ["LDS.128 R28, [R61]"]  # one way goes past the wait


def test_what_is_wrong_is_said() -> None:
    """The guard itself: spills, shared memory, a missing instruction, a compiler that died."""
    made = codegen().Compiled
    good = made("sm90", "128", "full", "forward", 8, 200, 0, 227 << 10, {"wgmma": 4})
    assert not good.wrong and not codegen().without_matrix_units([good])
    assert made("sm90", "128", "full", "forward", 8, 255, 16, 1024, {"wgmma": 4}).wrong == ["spills 16 B"]
    assert "shared memory" in made("sm86", "128", "full", "forward", 8, 99, 0, 100 << 10, {"mma": 4}).wrong[0]
    assert codegen().without_matrix_units([made("sm100", "64", "full", "forward", 8, 99, 0, 1024, {"mma": 4})])
    assert "reads what nothing" in made("sm90", "128", "full", "forward", unwritten="UIADD3").wrong[0]
    assert "product still reads" in made("sm90", "128", "full", "forward", early="MOV R24, R2").wrong[0]
    assert made("sm90", "128", "full", "?", error="the compiler died").wrong == ["the compiler died"]
