"""Looks in Hopper's machine code for what no compiler should make: a uniform register read before anything wrote it, or
a register written while a matrix product still reads it.

ptxas 12.8 (in triton 3.6 and 3.7, for sm90) makes the first of some matrix products: the address of a shared tile
starts from whatever a register held, and the product reads other memory. Numbers are then wrong without an error, and
neither racecheck nor memcheck of compute-sanitizer says a word (seen on an H200); the code itself shows it. Of its
kind: triton-lang/triton#7196; fla-org/flash-linear-attention#1262, which names the releases of ptxas. The second is
known of ptxas before 13.3 (triton-lang/triton#11781) and of Triton's own pipeline (#9433); none of our kernels was
seen with it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
UNIFORM = re.compile(r"\bUR(\d+)\b")
FROM_REGISTERS = re.compile(r"HGMMA\S*\s+R\d+,\s*R(\d+),\s*gdesc")
"""A product that goes on beside what comes after it, and reads four registers for its first matrix."""
WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
"""Until at most so many groups of products are not done."""
READERS = {"HGMMA", "BAR", "WARPSYNC", "NANOSLEEP", "BRX", "CALL", "RET", "FCHK"}
"""Instructions whose first operand is no register that they write. (A product writes its own, in its turn.)"""


class Instruction(NamedTuple):
    text: str
    reads: frozenset[int]
    writes: frozenset[int]
    """Uniform registers, both."""
    sets: frozenset[int]
    """General registers that it writes."""
    next: tuple[int, ...]
    """Indices of what may run after it."""


def parse(sass: str) -> list[Instruction]:
    """Of one kernel, as nvdisasm prints it."""
    texts: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(texts)
        elif found := LINE.search(line):
            texts.append(found[1])
    code = []
    for at, text in enumerate(texts):
        name, _, rest = re.sub(r"^@!?\S+\s+", "", text).partition(" ")
        reads, writes = _registers(name, rest)
        code.append(Instruction(text, reads, writes, _set(name, rest), _next(text, name, at, labels)))
    return code


def undefined(code: list[Instruction]) -> list[str]:
    """Instructions that read a uniform register which some path from the kernel's entry has not written: what another
    path left there is the wrong number too."""
    before: list[frozenset[int] | None] = [None] * len(code)
    work = [(0, frozenset[int]())] if code else []
    while work:
        at, written = work.pop()
        known = before[at]
        if known is not None and known <= written:
            continue
        before[at] = known = written if known is None else known & written
        after = known | code[at].writes
        work += [(n, after) for n in code[at].next if n < len(code)]
    return [x.text for x, known in zip(code, before, strict=True) if known is not None and x.reads - known]


def overwritten(code: list[Instruction]) -> list[str]:
    """Instructions that write a register which a product, not waited for yet, reads its first matrix from."""
    found: list[str] = []
    for product in code:
        if (first := FROM_REGISTERS.search(product.text)) is None:
            continue
        matrix = set(range(int(first[1]), int(first[1]) + 4))
        # With how many groups were closed after the product's own: -1 while that is open.
        work = [(n, 0 if "gsb0" in product.text else -1) for n in product.next]
        seen: set[tuple[int, int]] = set()
        while work:
            at, closed = work.pop()
            if (at, closed) in seen or at >= len(code):
                continue
            seen.add((at, closed))
            text = code[at].text
            if (wait := WAIT.search(text)) is not None and closed >= int(wait[1], 16):
                continue
            if code[at].sets & matrix:
                found.append(text)
                continue
            if "HGMMA" in text and "gsb0" in text:
                closed = min(closed + 1, 8)
            work += [(n, closed) for n in code[at].next]
    return list(dict.fromkeys(found))


def _next(text: str, name: str, at: int, labels: dict[str, int]) -> tuple[int, ...]:
    guarded, name = text.startswith("@"), name.partition(".")[0]
    # BSSY names where ways meet again, and goes nowhere.
    named = () if name == "BSSY" else re.findall(r"\.L_x_\d+", text)
    targets = tuple(labels[t] for t in named if t in labels)
    if name in ("EXIT", "RET") and not guarded:
        return ()
    if name == "BRA" and not guarded and "UP" not in text and ".DIV" not in text:
        return targets or (at + 1,)
    return (at + 1, *targets)


def _registers(name: str, rest: str) -> tuple[frozenset[int], frozenset[int]]:
    """Uniform ones, read and written, where the text is clear: of longer operands at least their first register."""
    operands = [o.strip() for o in rest.split(",")]
    wide = ".64" in name or ".WIDE" in name
    writes: set[int] = set()
    for i, operand in enumerate(operands):
        if re.fullmatch(r"!?U?P(\d|T)", operand):  # predicates come before what is written
            continue
        if found := re.fullmatch(r"UR(\d+)", operand):
            first = int(found[1])
            if name[0] == "U" or name.partition(".")[0] in ("R2UR", "S2UR", "CS2UR", "VOTEU", "REDUX", "SYNCS"):
                writes = {first, first + 1} if wide else {first}
                del operands[i]
        break
    reads: set[int] = set()
    for operand in operands:
        for found in UNIFORM.finditer(operand):
            first = int(found[1])
            if "gdesc[" in operand:  # two descriptors; a matrix in registers has no use for the first
                in_registers = re.match(r"R\d+, *R\d+", rest)  # `R104, R32, gdesc[UR20]`, not `R56, gdesc[UR8]`
                reads |= set(range(first + (2 if in_registers else 0), first + 4))
            elif "desc[" in operand or f"UR{first}.64" in operand:
                reads |= {first, first + 1}
            else:
                reads.add(first)
    return frozenset(reads), frozenset(writes)


def _set(name: str, rest: str) -> frozenset[int]:
    """The general registers that an instruction writes."""
    if name.partition(".")[0] in READERS:
        return frozenset()
    operands = [o.strip() for o in rest.split(",")]
    if re.fullmatch(r"U?P(\d|T)", operands[0]):  # one predicate may come before it; with two that is all
        operands = operands[1:]
    found = re.fullmatch(r"R(\d+)(\.64)?", operands[0] if operands else "")
    if found is None:
        return frozenset()
    several = {".128": 4, ".64": 2, ".WIDE": 2, ".M88.4": 4, ".M88.2": 2}
    count = next((n for mark, n in several.items() if mark in name), 1)
    return frozenset(range(int(found[1]), int(found[1]) + count))
