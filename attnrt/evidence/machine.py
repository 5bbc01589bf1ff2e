"""What figures were measured on: device, driver, versions; without importing any backend's package."""

from __future__ import annotations

import hashlib
import platform
import re
from functools import cache
from pathlib import Path

from attnrt import __version__
from attnrt.environment import Environment
from attnrt.policies.measured import Machine
from attnrt.policies.tuned import MachineEntry


@cache
def cpu_model() -> str:
    """'Intel(R) Xeon(R) ...', or whatever the platform says."""
    try:
        found = re.search(r"^(?:model name|Model)\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return _clean(found[1] if found else platform.processor() or platform.machine())


@cache
def driver_version() -> str | None:
    """The NVIDIA kernel driver's, from /proc: no process is started. None where there is none."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def here() -> dict[str, tuple[str, str | None]]:
    """What an `Environment` does not carry, by device type: (device, driver)."""
    return {"cpu": (cpu_model(), None), "cuda": ("", driver_version())}


def machine_entry(environment: Environment) -> MachineEntry:
    """This machine, as a file of figures tells it."""
    cpu = environment.device_type == "cpu"
    return MachineEntry(
        device=cpu_model() if cpu else _clean(environment.name),
        arch=environment.arch,
        sm_count=environment.sm_count,
        threads=environment.threads,
        attnrt=__version__,
        driver=None if cpu else driver_version(),
        cuda=environment.cuda,
        python=platform.python_version(),
        packages=dict(environment.packages),
    )


def file_name(machine: Machine) -> str:
    """One for each device and set of versions that voids figures: 'nvidia-h200-sm90-1a2b3c4d.yaml'."""
    versions = [(name, (version or "").partition("+")[0].split(".")[:2]) for name, version in machine.packages]
    facts = (machine.device, machine.arch, machine.sm_count, machine.threads, machine.attnrt.split(".")[:2], versions)
    slug = re.sub(r"[^a-z0-9]+", "-", machine.device.lower()).strip("-")[:40].rstrip("-")
    return f"{slug or 'device'}-{machine.arch}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}.yaml"


def _clean(text: str) -> str:
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", text).split())[:200]
