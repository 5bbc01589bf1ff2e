"""A Gluon kernel compiled for sm90, without a GPU: its resources and its code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

SHARED_LIMIT = 227 << 10
REGISTERS = 168
"""Of a thread at the start: 65,536 / (12 warps * 32). The consumers then take from the producer."""


class Compiled(NamedTuple):
    registers: int
    stack: int
    shared: int
    ptx: str
    sass: str


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], lengths: bool, aligned: Collection[str]
) -> Compiled:
    """The kernel with these types and constants by argument; the other arguments are i32.

    lengths: with sequences of their own length. aligned: pointers that 16 bytes divide.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    from attnrt.backends.triton import hopper

    names, of_lengths = kernel.arg_names, ("LENGTHS_Q", "LENGTHS_KV")
    if lengths:
        types = types | dict.fromkeys(of_lengths, "*i32")
    else:
        constants = constants | dict.fromkeys(of_lengths)
    source = GluonASTSource(
        kernel,
        {n: types.get(n, "constexpr" if n in constants else "i32") for n in names},
        {(names.index(n),): value for n, value in constants.items()},
        {(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": hopper.WARPS})
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()

        def read(tool: str, *options: str) -> str:
            command = [tools / tool, *options, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+)", read("cuobjdump", "-res-usage"))
        assert usage is not None
        return Compiled(int(usage[1]), int(usage[2]), made.metadata.shared, made.asm["ptx"], read("nvdisasm", "-c"))
