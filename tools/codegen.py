"""What the compiler makes of our Triton kernels, for GPUs that are not here: registers, spills, shared memory, and
which matrix instructions it found. Needs triton, not a GPU.

    python tools/codegen.py --write docs/triton_codegen.md                         # everything
    python tools/codegen.py --arch sm90 --dims 128 192/128 --features causal bias  # some of it, on the terminal

The adapter runs on CPU tensors against a driver that stands in for the GPU's. So every kernel is compiled as a real
launch would compile it (the divisibility of its pointers and strides, the shipped tiles), and none is launched. The
machine code is then read with the tools that triton brings along. One process for each arch and head dim, since a
compiler that fails may take its process down.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

sys.path.append(str(Path(__file__).resolve().parent))  # tests load this file by its path
import sass

SHARED_LIMIT = {"sm80": 163, "sm86": 99, "sm89": 99, "sm90": 227, "sm100": 227, "sm103": 227, "sm120": 99}
"""KiB of shared memory that one program may have (CUDA programming guide). The compiler does not check it."""
INSTRUCTIONS = {
    "wgmma": r"wgmma\.mma_async",
    "tcgen05": r"tcgen05\.mma",
    "mma": r"\bmma\.sync",
    "tma": r"cp\.async\.bulk\.tensor",
    "cp.async": r"cp\.async\.c[ag]",
}
AROUND = {"hopper.backward": 40}
"""Bytes that a kernel may spill: a few words around its loop, and none in it, as its test sees to."""
EXPECTED = {"sm80": ("mma",), "sm86": ("mma",), "sm89": ("mma",), "sm90": ("wgmma",), "sm100": ("tcgen05",)}
"""The matrix instructions that the arch was built for. Some kernel of every call must use them."""
FEATURES: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (256, 0)},
    "softcap": {"causal": True, "softcap": 30.0},
    "alibi": {"causal": True, "operands": ("alibi_slopes",)},
    "sinks": {"causal": True, "operands": ("sinks",)},
    "mask": {"operands": ("mask",)},
    "bias": {"operands": ("bias",)},
    "dropout": {"causal": True, "dropout_p": 0.1},
    "padded": {"causal": True, "operands": ("seqlens",)},
    "packed": {"causal": True, "layout": "thd", "operands": ("cu_seqlens",)},
    "all": {
        "causal": True,
        "window": (256, 0),
        "softcap": 30.0,
        "dropout_p": 0.1,
        "operands": ("alibi_slopes", "sinks", "mask", "bias", "seqlens"),
    },
    "fp32": {"causal": True, "dtype": "float32"},
    "tf32": {"causal": True, "dtype": "float32", "tf32": True},
    "tf32 full": {"dtype": "float32", "tf32": True},
    "tf32 bias": {"operands": ("bias",), "dtype": "float32", "tf32": True},
    "decode": {"seqlen_q": 1, "seqlen_kv": 32768, "heads": (32, 4), "training": False},
    "padded decode": {
        "seqlen_q": 1,
        "seqlen_kv": 32768,
        "heads": (32, 4),
        "training": False,
        "operands": ("seqlens_kv",),
    },
}
ARCHS, DIMS = ("sm80", "sm86", "sm90", "sm100"), ("64", "128", "192/128", "256")
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Compiled:
    """One kernel of one call, as it would run."""

    arch: str
    dims: str
    feature: str
    name: str
    warps: int = 0
    registers: int = 0
    """Of a thread; at most 255."""
    stack: int = 0
    """Bytes spilled to memory by each thread."""
    shared: int = 0
    """Bytes of a program."""
    instructions: dict[str, int] = field(default_factory=dict, hash=False)
    unwritten: str = ""
    """The first instruction that reads a uniform register which nothing has written (tools/sass.py)."""
    early: str = ""
    """The first instruction that writes what a product still reads (there too)."""
    error: str = ""
    """Why there is none of the above."""

    @property
    def wrong(self) -> list[str]:
        """What keeps it from being fast, or from running."""
        found = [self.error] if self.error else []
        if self.stack > AROUND.get(self.name, 0):
            found.append(f"spills {self.stack} B")
        if self.shared > SHARED_LIMIT[self.arch] << 10:
            found.append(f"needs {self.shared} B of shared memory of {SHARED_LIMIT[self.arch] << 10}")
        if self.unwritten:
            found.append(f"reads what nothing has written: {self.unwritten}")
        if self.early:
            found.append(f"writes what a product still reads: {self.early}")
        return found

    def __str__(self) -> str:
        counts = " ".join(f"{n}={count}" for n, count in self.instructions.items())
        line = f"{self.arch:5} {self.dims:7} {self.feature:13} {self.name:10} w{self.warps} {self.registers:3} regs "
        line += f"{self.stack:5} B stack {self.shared:6} B shared  {counts}"
        return line + "".join(f"  <-- {w}" for w in self.wrong)


# --- A driver without a GPU --------------------------------------------------------------------------------------


class _Utils:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20, "multiprocessor_count": 132, "max_num_regs": 65536, "warpSize": 32}

    def unload_module(self, *_: Any) -> None: ...

    def fill_tma_descriptor(self, *_: Any, **__: Any) -> int:
        return 1

    fill_tma_descriptor_tiled = fill_tma_descriptor


class _Launcher:
    """Takes the place of what triton ends a launch in, whichever way it got there."""

    launched: ClassVar[list[Any]] = []

    def __init__(self, *_: Any) -> None:
        self.kernel: Any = None

    def __call__(self, *_: Any) -> None:
        self.launched.append(self.kernel)


class StandIn:
    """A driver for a GPU of compute capability `sm` that compiles and does not run.

    The GPU's index is its capability: triton remembers an index's target, so two archs must not share one.
    """

    def __init__(self, sm: int) -> None:
        self.sm, self.utils, self.launcher_cls = sm, _Utils(), _Launcher

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.sm, 32)

    def get_current_device(self) -> int:
        return self.sm

    def get_current_stream(self, _: Any = None) -> int:
        return 0

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_device_capability(self, _: int = 0) -> tuple[int, int]:
        return divmod(self.sm, 10)

    def map_python_to_cpp_type(self, _: str) -> str:
        return "int"


@contextmanager
def recorded(sm: int) -> Iterator[list[tuple[str, Any]]]:
    """While it is open, launches go to the stand-in. Afterwards the list has each: (kernel's name, compiled kernel)."""
    import triton
    from triton.compiler import CompiledKernel

    driver, loaded = triton.runtime.driver, CompiledKernel._init_handles
    before, counted = driver._active, _count_multiprocessors(lambda _: 132)

    def load(kernel: Any) -> None:
        loaded(kernel)
        if isinstance(kernel._run, _Launcher):
            kernel._run.kernel = kernel

    found: list[tuple[str, Any]] = []
    _Launcher.launched.clear()
    CompiledKernel._init_handles = load
    driver.set_active(StandIn(sm))
    try:
        yield found
    finally:
        CompiledKernel._init_handles = loaded
        driver._active = before
        _count_multiprocessors(counted)
        found += [(name_of(k), k) for k in _Launcher.launched]


def _count_multiprocessors(count: Any) -> Any:
    """The Hopper kernel asks torch for their number. Returns what did so far."""
    try:
        from attnrt.backends.triton import hopper
    except ImportError:
        return None
    before = getattr(hopper, "_multiprocessors", None)
    if count is not None:
        hopper._multiprocessors = count
    return before


def name_of(kernel: Any) -> str:
    """Of the function, and where there are two of one name, of its file."""
    function = kernel.src.fn.fn
    file = function.__module__.rpartition(".")[2]
    return f"hopper.{function.__name__}" if file.startswith("hopper") else str(function.__name__)


# --- Calls -------------------------------------------------------------------------------------------------------


def run_call(
    arch: str,
    dims: tuple[int, int],
    *,
    dtype: str = "bfloat16",
    batch: int = 2,
    heads: tuple[int, int] = (4, 2),
    seqlen_q: int = 1024,
    seqlen_kv: int | None = None,
    layout: str = "bshd",
    operands: tuple[str, ...] = (),
    training: bool = True,
    tf32: bool = False,
    kernel: Any = None,
    **options: Any,
) -> Any:
    """Prepare and run one call on CPU tensors for that arch, and its backward if training; inside `recorded`. By
    `kernel` if given, else by the first that takes it."""
    import torch

    from attnrt.backends.triton import TritonBackend
    from attnrt.environment import Environment
    from attnrt.operands import Operands, bind

    dtype = getattr(torch, dtype)
    seqlen_kv = seqlen_kv or seqlen_q
    front = {
        "bshd": lambda h, n: (batch, n, h),
        "bhsd": lambda h, n: (batch, h, n),
        "sbhd": lambda h, n: (n, batch, h),
        "thd": lambda h, n: (batch * n, h),
    }[layout]
    q, k, v = (
        torch.zeros(*front(h, n), dim, dtype=dtype, requires_grad=training)
        for h, n, dim in (
            (heads[0], seqlen_q, dims[0]),
            (heads[1], seqlen_kv, dims[0]),
            (heads[1], seqlen_kv, dims[1]),
        )
    )

    def each(n: int) -> Any:
        return torch.full((batch,), n, dtype=torch.int32)

    def offsets(n: int) -> Any:
        return torch.arange(batch + 1, dtype=torch.int32) * n

    there = {
        "alibi_slopes": lambda: torch.zeros(heads[0]),
        "sinks": lambda: torch.zeros(heads[0], requires_grad=training),
        "mask": lambda: torch.ones(batch, 1, seqlen_q, seqlen_kv, dtype=torch.bool),
        "bias": lambda: torch.zeros(1, heads[0], seqlen_q, seqlen_kv, dtype=dtype, requires_grad=training),
        "seqlens_q": lambda: each(seqlen_q),
        "seqlens_kv": lambda: each(seqlen_kv),
        "cu_seqlens_q": lambda: offsets(seqlen_q),
        "cu_seqlens_kv": lambda: offsets(seqlen_kv),
    }
    given = Operands(**{n: make() for n, make in there.items() if n in operands or n.rpartition("_")[0] in operands})
    plain = {"causal": False, "window": None, "alignment": None, "softcap": None, "dropout_p": 0.0, "scale": None}
    plain |= {"max_seqlen_q": None, "max_seqlen_kv": None, "deterministic": False, "return_lse": training}
    request = replace(bind(q, k, v, given, layout=layout, **(plain | options)), tf32=tf32)
    kernel = kernel or TritonBackend()
    found = kernel.prepare(request, Environment.simulate(arch, sm_count=132))(q, k, v, given)
    if training:
        found[0].sum().backward()
    return found


def compile_call(arch: str, dims: str, feature: str) -> list[Compiled]:
    """Every kernel of one call, in the order of launch; each once."""
    qk, _, v = dims.partition("/")
    with recorded(int(arch[2:])) as found:
        run_call(arch, (int(qk), int(v or qk)), **FEATURES[feature])
        if FEATURES[feature].get("training", True):  # by the other backward, where there are two
            run_call(arch, (int(qk), int(v or qk)), **FEATURES[feature], deterministic=True)
    kernels = {id(kernel): (name, kernel) for name, kernel in found}
    return [read(arch, dims, feature, name, kernel) for name, kernel in kernels.values()]


def read(arch: str, dims: str, feature: str, name: str, kernel: Any) -> Compiled:
    """Registers and spills from the machine code, instructions from the PTX."""
    usage = tool("cuobjdump", "-res-usage", binary=kernel.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    counts = {n: len(re.findall(pattern, kernel.asm["ptx"])) for n, pattern in INSTRUCTIONS.items()}
    counts = {n: count for n, count in counts.items() if count}
    unwritten = early = ""
    if "wgmma" in counts:  # tools/sass.py knows Hopper's instructions
        code = sass.parse(tool("nvdisasm", "-ndf", "-c", binary=kernel.asm["cubin"]))
        unwritten, early = (next(iter(check(code)), "") for check in (sass.undefined, sass.overwritten))
    usage, meta = (int(found[1]), int(found[2])), kernel.metadata
    return Compiled(arch, dims, feature, name, meta.num_warps, *usage, meta.shared, counts, unwritten, early)


def tool(name: str, *options: str, binary: bytes) -> str:
    """Output of one of the CUDA tools in the triton wheel."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([path, *options, file.name], capture_output=True, text=True, check=True).stdout


# --- Many of them ------------------------------------------------------------------------------------------------


def compile_all(archs: tuple[str, ...], dims: tuple[str, ...], features: tuple[str, ...], jobs: int) -> list[Compiled]:
    """Every combination, `jobs` processes at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda pair: list(_apart(*pair, features)), [(a, d) for a in archs for d in dims])
        return [kernel for part in parts for kernel in part]


def _apart(arch: str, dims: str, features: tuple[str, ...]) -> Iterator[Compiled]:
    """In processes of their own: the next one goes on after the feature that took the last one down."""
    environment = {n: v for n, v in os.environ.items() if n != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    left = list(features)
    while left:
        command = [sys.executable, __file__, "--worker", "--arch", arch, "--dims", dims, "--features", *left]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        for line in done.stdout.splitlines():
            if line.startswith('{"feature"'):
                part = json.loads(line)
                left.remove(part["feature"])
                yield from (Compiled(**kernel) for kernel in part["kernels"])
        if left and done.returncode == 0:
            raise RuntimeError(f"no result for {left}: {done.stderr[-2000:]}")
        if left:
            why = (done.stderr.strip().splitlines() or ["no message"])[-1][:200]
            yield Compiled(arch, dims, left.pop(0), "?", error=f"the compiler died: {why}")


def forget_positions() -> None:
    """Triton keeps machine code on disk under a hash of the source, and of the line it starts on: without the line, an
    edit recompiles the kernels that it changed and no others."""
    from triton.runtime.jit import JITFunction

    from attnrt.backends.triton import backward, decode, forward, hopper_backward, hopper_kernel, scores

    for module in (scores, forward, backward, decode, hopper_kernel, hopper_backward):
        for found in vars(module).values():
            if isinstance(found, JITFunction):
                found.starting_line_number = 1


def work(arch: str, dims: str, features: tuple[str, ...]) -> None:
    """One JSON line for each feature."""
    forget_positions()
    for feature in features:
        try:
            kernels = compile_call(arch, dims, feature)
        except Exception as error:  # the compiler's own errors are of many types
            text = " ".join(str(error).split())[-200:]
            kernels = [Compiled(arch, dims, feature, "?", error=f"{type(error).__name__}: {text}")]
        print(json.dumps({"feature": feature, "kernels": [asdict(k) for k in kernels]}), flush=True)


def without_matrix_units(kernels: list[Compiled]) -> list[str]:
    """Calls none of whose kernels uses the arch's matrix instructions."""
    used: dict[tuple[str, str, str], bool] = {}
    for kernel in kernels:
        at = (kernel.arch, kernel.dims, kernel.feature)
        expected = EXPECTED.get(kernel.arch, ())
        if "tf32" in kernel.feature:  # its tiles are small: those of less than 64 rows are for the older instruction
            expected += ("mma",)
        hit = any(i in kernel.instructions for i in expected)
        exempt = bool(kernel.error) or "decode" in kernel.feature or kernel.feature == "fp32"  # exact: outside of them
        used[at] = used.get(at, False) or hit or exempt
    return [f"{' '.join(at)}: no {' or '.join(EXPECTED[at[0]])}" for at, hit in used.items() if not hit]


def document(kernels: list[Compiled]) -> str:
    """docs/triton_codegen.md."""
    import triton

    head = f"""# What the compiler makes of the Triton kernels

Generated by `python tools/codegen.py --write docs/triton_codegen.md` with triton {triton.__version__} (tests run a
part of it). No GPU is involved: every kernel of one training call, bf16 where it does not say otherwise ("decode": one
query, 32k keys, inference), is compiled as a launch would compile it, with the tiles of `configs/triton/tiles.yaml`,
and its machine code is read.

regs: registers of a thread (at most 255). spilled: bytes that a thread keeps in memory for want of registers; anything
but 0 is slow, except for the few words that the assembler keeps around the loop of `hopper.backward`. shared: KiB of
shared memory of a program, and what the arch has. The rest counts instructions: `mma`, `wgmma` (sm90), `tcgen05`
(sm100): matrix products; `tma`, `cp.async`: asynchronous loads. Code of `wgmma` is also read for registers that
nothing has written and for those written too early (tools/sass.py), which would stand beside it.
"""
    parts = [head]
    for arch in dict.fromkeys(k.arch for k in kernels):
        mine = [k for k in kernels if k.arch == arch]
        bad = [k for k in mine if k.wrong]
        parts.append(f"## {arch}\n\n{len(mine)} kernels; {len(bad)} with something wrong.\n")
        parts.append("| head dim | call | kernel | warps | regs | spilled | shared | instructions | |")
        parts.append("|---|---|---|---|---|---|---|---|---|")
        for k in mine:
            counts = ", ".join(f"{count} {n}" for n, count in k.instructions.items())
            shared = f"{k.shared / 1024:.0f} of {SHARED_LIMIT[arch]}"
            cells = (k.dims, k.feature, k.name, k.warps, k.registers, k.stack, shared, counts, "; ".join(k.wrong))
            parts.append("| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |")
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHS, choices=SHARED_LIMIT)
    parser.add_argument("--dims", nargs="+", default=DIMS, help="of queries and keys, or qk/v")
    parser.add_argument("--features", nargs="+", default=tuple(FEATURES), choices=FEATURES)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--write", type=Path, help="write the table to this Markdown file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.arch[0], options.dims[0], tuple(options.features))
        return 0
    kernels = compile_all(tuple(options.arch), tuple(options.dims), tuple(options.features), options.jobs)
    if options.write:
        options.write.write_text(document(kernels))
    wrong = [k for k in kernels if k.wrong]
    for kernel in wrong if options.write else kernels:
        print(kernel)
    missing = without_matrix_units(kernels)
    print("\n".join([*missing, f"{len(kernels)} kernels, {len(wrong)} with something wrong"]))
    return 1 if wrong or missing else 0


if __name__ == "__main__":
    sys.exit(main())
