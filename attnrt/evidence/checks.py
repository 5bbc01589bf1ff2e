"""What `attnrt doctor` looks at without running a kernel: versions, packages that do not import, settings, files."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Literal, NamedTuple

import torch

from attnrt import __version__, runtime
from attnrt.advisories import load_advisories
from attnrt.environment import Environment
from attnrt.errors import AttnrtError
from attnrt.evidence.machine import driver_version
from attnrt.policies.conditions import compile_when
from attnrt.policies.measured import MeasuredPolicy
from attnrt.request import AttentionRequest

Status = Literal["ok", "note", "warning", "failed"]
IMPORTS = {
    "triton": ("triton",),
    "nvidia-cudnn-frontend": ("cudnn",),
    "flash-attn": ("flash_attn",),
    "flash-attn-3": ("flash_attn_interface", "flash_attn_3"),
    "flash-attn-4": ("flash_attn.cute",),
}
"""Modules of each package, the first of which that exists is imported."""
IMPORT_SECONDS = 120.0
DRIVERS = {11: 450, 12: 525, 13: 580}
"""The least driver for each major version of CUDA: NVIDIA's CUDA compatibility table."""


class Check(NamedTuple):
    """One thing that was looked at."""

    subject: str
    status: Status
    said: str
    remedy: str | None = None


def every_check(environment: Environment) -> list[Check]:
    found: list[Check] = []
    for part in (versions(environment), device(environment), libraries(environment), packages(environment)):
        found += part
    return [*found, *settings(), *tuned(environment), *advisories(environment)]


def versions(environment: Environment) -> Iterator[Check]:
    yield Check("attnrt", "ok", f"{__version__}, Python {platform.python_version()}, {platform.platform()}")
    yield Check("torch", "ok", f"{torch.__version__}, built for {_built_for()}")


def _built_for() -> str:
    if torch.version.hip is not None:
        return f"ROCm {torch.version.hip}"
    return f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU"


def device(environment: Environment) -> Iterator[Check]:
    """The GPU, its driver, and whether torch was built for it; or the processor and its threads."""
    driver = driver_version()
    if environment.device_type == "cpu":
        if driver is not None:
            remedy = (
                "install a CUDA build of torch"
                if torch.version.cuda is None
                else "see `nvidia-smi` and CUDA_VISIBLE_DEVICES"
            )
            yield Check("device", "warning", f"there is an NVIDIA driver {driver}, but torch sees no GPU", remedy)
        threads, cores = torch.get_num_threads(), _cores()
        said = f"CPU, {threads} of {cores} cores compute"
        if threads < cores:
            remedy = f"OMP_NUM_THREADS={cores}, if nothing else needs them: up to {cores / threads:.2g}x as fast"
            yield Check("device", "note", said, remedy)
        else:
            yield Check("device", "ok", said)
        return
    memory = f", {environment.total_memory / 2**30:.0f} GiB" if environment.total_memory else ""
    yield Check("device", "ok", f"{environment.name} {environment.arch}{memory}")
    archs = torch.cuda.get_arch_list()
    if environment.sm is not None and archs and not _covered(environment.sm, archs):
        yield Check(
            "device",
            "failed",
            f"torch has no kernels for {environment.arch}: {', '.join(archs)}",
            "install a newer torch",
        )
    major = int((environment.cuda or "0").split(".")[0])
    least = DRIVERS.get(major)
    if driver is None:
        yield Check("driver", "note", "its version could not be read")
    elif least is not None and int(driver.split(".")[0]) < least:
        said = (
            f"{driver} is older than CUDA {environment.cuda} needs ({least}); it runs in compatibility mode, if at all"
        )
        yield Check("driver", "warning", said, f"install driver {least} or later")
    else:
        yield Check("driver", "ok", f"{driver}, CUDA {environment.cuda}")


def _cores() -> int:
    import psutil

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _covered(sm: int, archs: list[str]) -> bool:
    """A kernel of the same major version and no newer minor one runs, and any PTX of an older one is compiled."""
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)[af]?", arch)
        if match is None:
            continue
        number = int(match[2])
        if number <= sm and (match[1] == "compute" or number // 10 == sm // 10):
            return True
    return False


def libraries(environment: Environment) -> Iterator[Check]:
    """libcudnn as it is loaded, against the wheel that should have brought it."""
    if environment.device_type != "cuda":
        return
    loaded = environment.version("cudnn")
    if loaded is None:
        yield Check("cudnn", "warning", "torch has loaded no libcudnn", "install a build of torch that brings it")
        return
    wheels = {
        name: v for name in ("nvidia-cudnn-cu11", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13") if (v := _version(name))
    }
    others = {name: v for name, v in wheels.items() if not v.startswith(loaded)}
    if others and len(others) == len(wheels):
        said = f"{loaded} is loaded, but installed is {', '.join(f'{n} {v}' for n, v in others.items())}"
        yield Check("cudnn", "warning", said, "look for another libcudnn in LD_LIBRARY_PATH")
    elif len(wheels) > 1:
        yield Check("cudnn", "warning", f"{loaded} is loaded; several are installed: {', '.join(wheels)}", "remove one")
    else:
        yield Check("cudnn", "ok", f"{loaded} is loaded")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def packages(environment: Environment) -> list[Check]:
    """Each installed package imported in a process of its own: a broken one may do anything."""
    installed = [name for name in IMPORTS if environment.version(name) is not None]
    with ThreadPoolExecutor(max_workers=2) as pool:
        said = list(pool.map(_import, installed))
    found = []
    for name, fault in zip(installed, said, strict=True):
        version = environment.version(name)
        if fault is None:
            found.append(Check(name, "ok", f"{version} imports"))
        else:
            found.append(
                Check(name, "failed", f"{version} is installed, and does not import: {fault}", f"reinstall {name}")
            )
    missing = [name for name in IMPORTS if name not in installed]
    if missing and environment.device_type == "cuda":
        found.append(Check("packages", "note", f"not installed: {', '.join(missing)}"))
    return found


def _import(package: str) -> str | None:
    """The last line of what an import says, or None if it works."""
    code = (
        "import importlib, importlib.util, sys\n"
        "def there(name):\n"
        "    try: return importlib.util.find_spec(name) is not None\n"
        "    except ModuleNotFoundError: return False\n"
        "names = sys.argv[1:]\n"
        "importlib.import_module(next((n for n in names if there(n)), names[0]))\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", code, *IMPORTS[package]],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            cwd=tempfile.gettempdir(),
        )
    except subprocess.TimeoutExpired:
        return f"it was not done after {IMPORT_SECONDS:.0f} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"the process died of signal {-done.returncode}"
    lines = done.stderr.strip().splitlines()
    return lines[-1][:300] if lines else f"exit code {done.returncode}"


def settings() -> Iterator[Check]:
    """Environment variables, and whether the cache directory can be written."""
    try:
        variables = runtime.variables()
        overrides = runtime.settings(None, None).overrides
    except AttnrtError as error:
        yield Check("variables", "failed", str(error), "unset or correct it")
        return
    if overrides:
        yield Check("overrides", "note", "; ".join(map(str, overrides)))
    folder = variables.cache_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder):
            pass
        yield Check("cache", "ok", str(folder))
    except OSError as error:
        said = f"{folder} cannot be written: {error.strerror}"
        yield Check("cache", "warning", said, "set ATTNRT_CACHE_DIR; tuned policies and reproducers are kept there")


def tuned(environment: Environment) -> Iterator[Check]:
    """The tuned policy of this machine: used, void or damaged."""
    from attnrt.evidence.store import tuned_policy
    from attnrt.policies.preference import load_policy
    from attnrt.registry import rankable

    try:
        policy = tuned_policy(runtime.variables().cache_dir, load_policy("default", rankable()), automatic=True)
    except AttnrtError:
        return  # the variables are wrong, which another check says
    if not isinstance(policy, MeasuredPolicy):
        yield Check("tuned policy", "note", "none: the default policy serves", "run `attnrt tune`")
        return
    for said in policy.refused:
        yield Check("tuned policy", "warning", said, "delete the file, or run `attnrt tune`")
    table, notices = policy.table_for(environment)
    if table is not None:
        count = sum(map(len, table.points.values()))
        yield Check("tuned policy", "ok", f"{table.file}: {count} calls, {table.date[:10]}")
    for said in notices:
        yield Check("tuned policy", "note" if table is not None else "warning", said)


def advisories(environment: Environment) -> Iterator[Check]:
    """Known defects of the versions that are here, on this GPU; each touches some calls only."""
    anything = AttentionRequest.from_shape(batch=1, heads_q=1, seqlen_q=1, head_dim=64)
    for advisory in load_advisories():
        here = {name: value for name, value in advisory.when.items() if name in ("arch", "device")}
        if not advisory.packages and not here:
            continue
        if here and not compile_when(here)(anything, environment):
            continue
        if not all(environment.has(package, versions) for package, versions in advisory.packages):
            continue
        rest = ", ".join(f"{name} {value}" for name, value in advisory.when.items() if name not in here)
        effect = f"{advisory.effect} ({f'calls with {rest}; ' if rest else ''}{advisory.source})"
        kept = "such calls go elsewhere" if advisory.action == "refuse" else advisory.remedy
        yield Check(advisory.id, "note" if advisory.action == "refuse" else "warning", effect, kept)
