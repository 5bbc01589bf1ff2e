"""Which GPUs a compiled extension has code for, read from the file: no GPU, no CUDA tool, no import.

nvcc puts device code into the ELF section `.nv_fatbin`: containers one after the other, each a header (magic,
version, header size, size of what follows) and entries, each with a header of its own that says what it is (PTX or
machine code), how long, and for which architecture. The layout is not in NVIDIA's manuals; it is as
https://github.com/n-eiling/cuda-fatbin-decompression describes it. What does not look like it is not read.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")  # magic, version, header size, bytes that follow
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, version, header size, bytes, compressed, -, minor, major, arch
_PTX, _ELF = 1, 2
_LABELS = b".nv_fatbin", b"__nv_relfatbin"


class Target(NamedTuple):
    """Machine code for one architecture, or PTX that later ones can compile."""

    sm: int
    ptx: bool = False

    def runs_on(self, sm: int) -> bool:
        """Machine code runs within its major version, from its minor on; PTX on everything later."""
        return sm >= self.sm and (self.ptx or sm // 10 == self.sm // 10)

    def __str__(self) -> str:
        return f"sm{self.sm}" + (" (PTX)" if self.ptx else "")


def targets(path: Path) -> tuple[Target, ...]:
    """Every target in the file, in order; empty if it has none or is no 64-bit ELF file.

    Raises:
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        try:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:  # an empty file
            return ()
        with data:
            try:
                found = {t for start, end in sections(data, *_LABELS) for t in _entries(data, start, end)}
            except (struct.error, IndexError):  # cut short, or another format
                return ()
    return tuple(sorted(found))


def sections(data: mmap.mmap, *labels: bytes) -> Iterator[tuple[int, int]]:
    """Where the sections of these names begin and end, in a 64-bit ELF file; none in any other.

    Raises:
        struct.error, IndexError: it is cut short.
    """
    if data[:5] != b"\x7fELF\x02":
        return
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", data, 0x3A)
    (names,) = struct.unpack_from("<Q", data, table + names_index * size + 0x18)
    for i in range(count):
        name, kind = struct.unpack_from("<II", data, table + i * size)
        start, length = struct.unpack_from("<QQ", data, table + i * size + 0x18)
        label = data[names + name : data.find(b"\0", names + name)]
        if label in labels and kind != 8:
            yield start, start + length


def _entries(data: mmap.mmap, start: int, end: int) -> Iterator[Target]:
    at = start
    while at + _CONTAINER.size <= end:
        magic, _, header, length = _CONTAINER.unpack_from(data, at)
        if magic != MAGIC:
            at += 8  # containers are aligned, with zeros between
            continue
        entry, stop = at + header, at + header + length
        while entry + _ENTRY.size <= stop:
            kind, _, entry_header, size, _, _, _, _, arch = _ENTRY.unpack_from(data, entry)
            if kind not in (_PTX, _ELF) or not entry_header:
                break
            yield Target(arch, kind == _PTX)
            entry += entry_header + size
        at = stop
