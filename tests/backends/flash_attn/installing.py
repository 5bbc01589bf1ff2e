"""Packages that are real files: distributions with metadata, modules that fail as real ones do, binaries with the
sections that nvcc writes."""

from __future__ import annotations

import importlib
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attnrt.backends.flash_attn import discovery
from attnrt.environment import forget

VERSION = {2: "2.8.3", 3: "3.0.0b1", 4: "4.0.0b36"}
OLD = {2: "2.0.9", 3: "2.9.0", 4: "4.0.0b11"}
NEW = {2: "3.0.0", 3: "4.0.0", 4: "5.0.0"}
DENSE = """
def flash_attn_func(q, k, v, softmax_scale=None, causal=False, window_size=None, num_splits=1, deterministic=False): ...
"""
OTHERS = """
def flash_attn_varlen_func(q, k, v): ...
def flash_attn_with_kvcache(q, k_cache, v_cache): ...
"""

Install = Callable[..., Path]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a generation on `sys.path`: install(2, "2.8.3", {"flash_attn/__init__.py": source})."""
    monkeypatch.syspath_prepend(str(tmp_path))
    real = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("flash_attn")}
    discovery.forget()

    def put(number: int, version: str, files: dict[str, str | bytes]) -> Path:
        package = discovery.GENERATIONS[number].package
        info = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        record = []
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            record.append(f"{name},,{path.stat().st_size}")
        (info / "RECORD").write_text("\n".join(record))
        importlib.invalidate_caches()
        return tmp_path

    yield put
    for name in list(sys.modules):
        if name.startswith("flash_attn"):
            del sys.modules[name]
    sys.modules.update(real)
    discovery.forget()
    forget()


def module(number: int) -> str:
    return {2: "flash_attn/__init__.py", 3: "flash_attn_interface.py", 4: "flash_attn/cute/__init__.py"}[number]


def elf(*entries: tuple[int, int], **others: bytes) -> bytes:
    """A 64-bit ELF file whose `.nv_fatbin` has one container, with (kind, arch) entries of 24 bytes each.

    others: further sections, as `dynstr=b"..."`.
    """
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 24, 0, 0, 0, 0, arch).ljust(64, b"\0") + bytes(24)
        for kind, arch in entries
    )
    fatbin = struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body
    held = {b".nv_fatbin": fatbin, **{b"." + name.encode(): content for name, content in others.items()}}
    names = b"\0" + b"\0".join((*held, b".shstrtab")) + b"\0"
    held[b".shstrtab"] = names
    content, table = b"", bytes(64)
    for name, inside in held.items():
        kind = 3 if name == b".shstrtab" else 1
        table += struct.pack(
            "<IIQQQQIIQQ", names.index(name + b"\0"), kind, 0, 0, 64 + len(content), len(inside), 0, 0, 8, 0
        )
        content += inside.ljust(-(-len(inside) // 8) * 8, b"\0")
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack(
        "<HHIQQQIHHHHHH", 3, 62, 1, 0, 0, 64 + len(content), 0, 64, 0, 0, 64, len(held) + 1, len(held)
    )
    return header + content + table
