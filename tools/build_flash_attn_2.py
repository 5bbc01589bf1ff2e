"""Build flash-attn 2 for one GPU architecture and a few head dims: minutes on many cores, where the whole is an hour.

    pip download flash-attn==2.8.3.post2 --no-deps --no-binary :all: --no-build-isolation
    python tools/build_flash_attn_2.py trim flash_attn-2.8.3.post2.tar.gz flash_attn_2.tar.xz --head-dims 64 128
    python tools/build_flash_attn_2.py build flash_attn_2.tar.xz wheels --arch 90 --jobs 12

`trim` needs nothing but Python and works anywhere; `build` needs nvcc, a C++ compiler, ninja, setuptools, wheel, psutil
and the torch that the wheel shall run with, and no GPU. Calls of what was cut away end in an error that says so, and
attnrt reads from the built file what it has (FA2_LEFT_OUT). The old copy of flash-attn 4 in `flash_attn/cute` is left
out, so that both generations can be unpacked into one folder, as they must be to be imported together.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Sizes that flash-attn 2 has kernels for; others take the next, and buffers in its multiple of 32."""
DTYPES = {"fp16": "half_t", "bf16": "bfloat16_t"}
SOURCE = re.compile(r"flash_(?:fwd|fwd_split|bwd)_hdim(\d+)_(fp16|bf16)_(?:causal_)?sm80\.cu")
FEATURES = ("backward", "dropout", "alibi", "softcap", "uneven_k", "local")
"""What its sources can be compiled without: each halves the kernels, or nearly. uneven_k: head dims between its sizes;
local: windows."""
KEPT = ("setup.py", "README.md", "LICENSE", "AUTHORS", "flash_attn", "csrc/flash_attn", "csrc/cutlass/include")
DROPPED = ("flash_attn/cute", "flash_attn/flash_attn_triton_amd")


def wanted(path: str, head_dims: Collection[int], dtypes: Collection[str]) -> bool:
    """Whether a file of the source distribution, named from its root, is built or needed to build."""
    if (source := SOURCE.fullmatch(PurePosixPath(path).name)) is not None:
        return int(source[1]) in head_dims and source[2] in dtypes
    return _under(path, KEPT) and not _under(path, DROPPED)


def _under(path: str, folders: tuple[str, ...]) -> bool:
    return any(path == f or path.startswith(f + "/") for f in folders)


def head_dim_switch(head_dims: Collection[int]) -> str:
    """The macro that picks a kernel, for those that are built. A smaller head dim could run by a larger kernel, but its
    buffers have the smaller's size, so it is refused."""
    branches = [
        f"    if (HEADDIM > {([0, *HEAD_DIMS])[HEAD_DIMS.index(d)]} && HEADDIM <= {d}) {{\n"
        f"      constexpr static int kHeadDim = {d};\n"
        "      return __VA_ARGS__();\n"
        "    }\n"
        for d in sorted(head_dims)
    ]
    said = f"this build of flash-attn 2 has kernels for head_dim {' and '.join(map(str, sorted(head_dims)))} alone"
    return _macro("HEADDIM_SWITCH(HEADDIM, ...)", *branches, f'    TORCH_CHECK(false, "{said}");\n')


def dtype_switch(dtype: str) -> str:
    """The macro that picks a dtype, where there is one."""
    wrong = "!(COND)" if dtype == "fp16" else "(COND)"
    return _macro(
        "FP16_SWITCH(COND, ...)",
        f'    TORCH_CHECK(!{wrong}, "this build of flash-attn 2 has kernels for {dtype} alone");\n',
        f"    using elem_type = cutlass::{DTYPES[dtype]};\n",
        "    return __VA_ARGS__();\n",
    )


def _macro(head: str, *lines: str) -> str:
    body = "".join(("  [&] {\n", *lines, "  }()"))
    return f"#define {head} \\\n" + body.replace("\n", " \\\n") + "\n"


def edited(
    path: str, text: str, head_dims: Collection[int], dtypes: Collection[str], without: Collection[str] = ()
) -> str:
    """A file as the smaller package needs it.

    Raises:
        ValueError: it is not as it was in 2.8.3.post2, so it cannot be edited.
    """
    if path.endswith("static_switch.h"):
        text = _replace(text, r"#define HEADDIM_SWITCH.*?\n  \}\(\)\n?", head_dim_switch(head_dims))
        if len(dtypes) == 1:
            text = _replace(text, r"#define FP16_SWITCH.*?\n  \}\(\)\n?", dtype_switch(next(iter(dtypes))))
        return _replace(text, r"#pragma once\n", "#pragma once\n\n#include <c10/util/Exception.h>\n")
    if path == "setup.py":
        # From torch 2.13 its headers are C++20.
        newer = "('-std=c++20' if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 13) else '-std=c++17')"
        text = _replace(text, r'"-std=c\+\+17"', newer, count=0)
        for feature in without:  # the host's code looks at these flags too
            flag = f'"-DFLASHATTENTION_DISABLE_{feature.upper()}",'
            text = _replace(text, r"    nvcc_flags = \[", f"    nvcc_flags = [{flag}")
            text = _replace(text, r"    compiler_c17_flag=\[", f"    compiler_c17_flag=[{flag}")
        lines = text.splitlines(keepends=True)
        return "".join(x for x in lines if (s := SOURCE.search(x)) is None or wanted(s[0], head_dims, dtypes))
    return text


def _replace(text: str, pattern: str, new: str, count: int = 1) -> str:
    made, found = re.subn(pattern, lambda _: new, text, count=count, flags=re.S)
    if not found:
        raise ValueError(f"no {pattern} in the sources: another version of flash-attn 2 than this script knows")
    return made


def trim(
    sdist: Path, archive: Path, head_dims: Collection[int], dtypes: Collection[str], without: Collection[str] = ()
) -> None:
    """Write the smaller source tree, as a .tar.xz."""
    with tarfile.open(sdist) as whole, tarfile.open(archive, "w:xz", preset=9) as made:
        for member in sorted(whole.getmembers(), key=lambda m: m.name):
            path = member.name.partition("/")[2]
            if not member.isfile() or not wanted(path, head_dims, dtypes):
                continue
            file = whole.extractfile(member)
            assert file is not None
            data = file.read()
            text = data.decode(errors="replace")
            if (new := edited(path, text, head_dims, dtypes, without)) != text:
                data = new.encode()
            kept = tarfile.TarInfo(f"flash_attn_2/{path}")
            kept.size, kept.mode = len(data), 0o644
            made.addfile(kept, io.BytesIO(data))
    print(f"{archive}: {archive.stat().st_size / 1e6:.1f} MB")


def build(archive: Path, out: Path, arch: str, jobs: int, folder: Path) -> None:
    """Compile a trimmed tree into a wheel in `out`. A second run in the same `folder` compiles what is missing."""
    import torch

    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    environment = os.environ | {
        "FLASH_ATTENTION_FORCE_BUILD": "TRUE",  # else it asks the network for a wheel
        "FLASH_ATTN_CUDA_ARCHS": arch,
        "FLASH_ATTN_LOCAL_VERSION": f"cu{(torch.version.cuda or '').replace('.', '')}torch{_minor(torch.__version__)}",
        "MAX_JOBS": str(jobs),
        "NVCC_THREADS": "1",
        "LDFLAGS": "-Wl,--strip-all",
    }
    command = [sys.executable, "setup.py", "bdist_wheel", "--dist-dir", str(out.resolve())]
    subprocess.run(command, cwd=folder / "flash_attn_2", env=environment, check=True)
    for wheel in out.glob("flash_attn-2*.whl"):
        print(f"{wheel}: {wheel.stat().st_size / 1e6:.1f} MB")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    cut = commands.add_parser("trim", help="make the smaller source tree")
    cut.add_argument("sdist", type=Path)
    cut.add_argument("archive", type=Path, help="to write, .tar.xz")
    cut.add_argument("--head-dims", type=int, nargs="+", choices=HEAD_DIMS, default=(64, 128))
    cut.add_argument("--dtypes", nargs="+", choices=DTYPES, default=tuple(DTYPES))
    cut.add_argument("--without", nargs="+", choices=FEATURES, default=())
    make = commands.add_parser("build", help="compile it")
    make.add_argument("archive", type=Path)
    make.add_argument("out", type=Path, help="folder for the wheel")
    make.add_argument("--arch", default="90", help="as flash-attn's setup.py knows them: 80, 90, 100 or 120")
    make.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) - 4), help="each takes up to 5 GB")
    make.add_argument("--folder", type=Path, help="where to build; kept, if it is given")
    options = parser.parse_args()
    if options.command == "trim":
        trim(options.sdist, options.archive, options.head_dims, options.dtypes, options.without)
        return
    with tempfile.TemporaryDirectory() as temporary:
        build(options.archive, options.out, options.arch, options.jobs, options.folder or Path(temporary))


if __name__ == "__main__":
    main()
