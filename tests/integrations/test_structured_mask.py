"""StructuredMask says exactly what the dense mask of the same rules says. Needs no transformers."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

import attnrt
from attnrt.errors import ArgumentError
from attnrt.integrations import mask_arguments
from attnrt.integrations.mask_arguments import Rules
from attnrt.integrations.mask_formula import Chunks, Formula, read
from attnrt.integrations.structured_mask import StructuredMask
from attnrt.integrations.transformers import attend

CPU = torch.device("cpu")


def dense(rules: Rules) -> Tensor:
    """(B, 1, Sq, Skv) bool by definition."""
    formula = rules.formula
    assert formula is not None
    batch = torch.arange(rules.batch)[:, None, None]
    q = (torch.arange(rules.q_length) + int(rules.q_offset))[None, :, None]
    k = (torch.arange(rules.kv_length) + rules.kv_offset)[None, None, :]
    seen = torch.ones(rules.batch, rules.q_length, rules.kv_length, dtype=torch.bool)
    at_q, at_k = q, k
    if formula.sequences is not None:
        seen &= formula.sequences[batch, q] == formula.sequences[batch, k]
    if formula.positions is not None:
        at_q, at_k = formula.positions[batch, q], formula.positions[batch, k]
    if formula.right is not None:
        seen &= at_k <= at_q + formula.right
    if formula.left is not None:
        seen &= at_k >= at_q - formula.left
    if formula.chunks is not None:
        starts = 0 if formula.chunks.starts is None else formula.chunks.starts[batch]
        seen &= (k - starts) // formula.chunks.size == (q - starts) // formula.chunks.size
    for keys in (*formula.keys, *([] if rules.padding is None else [rules.padding])):
        seen &= keys[batch, k - (rules.kv_offset if keys is rules.padding else 0)]
    return seen[:, None]


def rules(batch: int, q: int, kv: int, q_offset: Any, kv_offset: int, formula: Formula, padding: Any = None) -> Rules:
    made = Rules(batch, q, kv, q_offset, kv_offset, formula, padding, CPU, lambda: dense(made))
    return made


def check(mask: StructuredMask) -> None:
    """Through `attend`, it gives what attention with the dense mask gives."""
    torch.manual_seed(0)
    batch, _, q_length, kv_length = mask.shape
    q = torch.randn(batch, 4, q_length, 8).double()
    k, v = torch.randn(2, batch, 2, kv_length, 8).double()
    want = attnrt.attention(q, k, v, mask=dense(mask.rules), backend="reference").transpose(1, 2)
    found, weights = attend(torch.nn.Module(), q, k, v, mask)
    assert weights is None and found.is_contiguous()
    torch.testing.assert_close(found, want)


BANDS = [
    Formula(),
    Formula(right=0),
    Formula(left=4, right=0),
    Formula(left=3, right=3),
    Formula(left=2),
    Formula(right=2),
]
PLACES = {
    "no cache": (9, 9, 0, 0),
    "growing cache": (3, 12, 9, 0),
    "decode": (1, 12, 11, 0),
    "static cache, prefill": (7, 20, 0, 0),
    "static cache, chunk": (4, 20, 6, 0),
    "static cache, decode": (1, 20, 8, 0),
    "sliding cache, full": (1, 5, 30, 26),
    "sliding cache, chunk": (3, 7, 30, 26),
    "cross": (5, 11, 0, 0),
}


def paddings(batch: int, length: int) -> dict[str, Tensor | None]:
    slots = torch.arange(length)
    some = torch.tensor([0, length // 2, length // 3])[:batch, None]
    holes = torch.rand(batch, length) > 0.3
    return {
        "none": None,
        "all real": torch.ones(batch, length, dtype=torch.bool),
        "left": slots >= some,
        "right": slots < length - some,
        "left, the same": (slots >= 2).expand(batch, -1),
        "right, the same": (slots < max(1, length - 2)).expand(batch, -1),
        "holes": holes,
        "one sequence empty": (slots < 4) & (torch.arange(batch)[:, None] > 0),
        "nothing": torch.zeros(batch, length, dtype=torch.bool),
    }


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("formula", BANDS, ids=lambda f: f"{f.left},{f.right}")
def test_bands_offsets_and_padding(place: str, formula: Formula) -> None:
    torch.manual_seed(0)
    for name, padding in paddings(3, PLACES[place][1]).items():
        mask = StructuredMask(rules(3, *PLACES[place], formula, padding))
        check(mask)
        if formula.right in (None, 0) and place not in ("static cache, chunk", "cross") and formula.left is None:
            assert mask.structured, (place, name)


@pytest.mark.parametrize("place", [p for p in PLACES if "sliding cache" not in p and p != "cross"])
@pytest.mark.parametrize("formula", [f for f in BANDS if f.right == 0], ids=lambda f: f"{f.left},{f.right}")
def test_when_values_cannot_be_read(place: str, formula: Formula, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a traced graph, with the cache's length a tensor."""
    monkeypatch.setattr(mask_arguments, "blind", lambda device: True)
    q, kv, q_offset, kv_offset = PLACES[place]
    for padding in paddings(3, kv).values():
        mask = StructuredMask(rules(3, q, kv, torch.tensor([q_offset]), kv_offset, formula, padding))
        assert mask.structured and mask.arguments.seqlens_kv is not None
        check(mask)
        check(StructuredMask(rules(3, q, kv, q_offset, kv_offset, formula, padding)))


@pytest.mark.parametrize("formula", BANDS, ids=lambda f: f"{f.left},{f.right}")
def test_constant_shapes(formula: Formula, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decode steps with a static cache as on a GPU: the same shapes for every length."""
    monkeypatch.setattr(mask_arguments, "_keeps_shapes", lambda rules: True)
    shapes = set()
    for past in (0, 4, 11, 18, 19):
        for offset in (past, torch.tensor([past])):
            for padding in (None, torch.arange(20) >= torch.tensor([0, 3, 2])[:, None]):
                mask = StructuredMask(rules(3, 1, 20, offset, 0, formula, padding))
                check(mask)
                if formula.right == 0 and past < 19:
                    shapes.add((mask.arguments.start, mask.arguments.stop, mask.arguments.seqlens_kv is None))
    assert len(shapes) == (formula.right == 0)


@pytest.mark.parametrize("left", [None, 2])
def test_packed_sequences(left: int | None) -> None:
    for lengths in ([[5, 3, 1]], [[4, 5], [9]], [[1] * 9, [2, 7]]):
        sequences = torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in lengths])
        positions = torch.stack([torch.cat([torch.arange(n) for n in r]) for r in lengths])
        mask = StructuredMask(rules(len(lengths), 9, 9, 0, 0, Formula(left, 0, positions, sequences)))
        assert mask.arguments.packing is not None and mask.arguments.mask is None
        assert mask.arguments.packing.longest == max(n for r in lengths for n in r)
        check(mask)


def test_what_is_not_packed_is_dense() -> None:
    """Numbers that return, and positions that skip, are not sequences laid one after the other."""
    again = torch.tensor([[0, 0, 1, 1, 0, 0]])
    mask = StructuredMask(rules(1, 6, 6, 0, 0, Formula(None, 0, None, again)))
    assert mask.arguments.packing is None and not mask.structured
    check(mask)
    skips = torch.tensor([[0, 1, 3, 0, 1, 2]])
    mask = StructuredMask(rules(1, 6, 6, 0, 0, Formula(1, 0, skips, torch.tensor([[0, 0, 0, 1, 1, 1]]))))
    assert mask.arguments.packing is None
    check(mask)


@pytest.mark.parametrize(
    ("place", "structured"),
    [
        ((12, 12, 0, 0), True),
        ((1, 12, 11, 0), True),
        ((1, 20, 9, 0), True),
        ((3, 12, 9, 0), False),
        ((3, 4, 1, 0), True),
    ],
)
def test_chunks(place: tuple[int, int, int, int], structured: bool) -> None:
    formula = Formula(right=0, chunks=Chunks(5, torch.zeros(2, dtype=torch.long)))
    mask = StructuredMask(rules(2, *place, formula))
    assert mask.structured == structured
    check(mask)
    left = torch.arange(place[1]) >= torch.tensor([0, 2])[:, None]
    check(StructuredMask(rules(2, *place, Formula(right=0, chunks=Chunks(5, torch.tensor([0, 2]))), left)))


def test_random_rules() -> None:
    draw = random.Random(0)
    torch.manual_seed(0)
    for _ in range(150):
        q, past = draw.randint(1, 9), draw.choice([0, 0, draw.randint(0, 12)])
        kv_offset = draw.choice([0, 0, min(past, draw.randint(0, 5))])
        kv = draw.choice([past + q - kv_offset, past + q - kv_offset + draw.randint(0, 6), draw.randint(1, 20)])
        formula = Formula(draw.choice([None, draw.randint(0, 9)]), draw.choice([None, 0, 0, draw.randint(0, 4)]))
        padding = draw.choice(list(paddings(2, kv).values()))
        check(StructuredMask(rules(2, q, kv, past, kv_offset, formula, padding)))


def test_cropping_keys_and_moving() -> None:
    mask = StructuredMask(rules(2, 4, 9, 0, 0, Formula(right=0), torch.arange(9) < torch.tensor([9, 3])[:, None]))
    fewer = mask[:, :, :, :6]
    assert fewer.shape == (2, 1, 4, 6)
    assert torch.equal(dense(fewer.rules), dense(mask.rules)[..., :6])
    assert mask.to(CPU) is mask and mask.to("cpu", torch.float32) is mask and mask.contiguous() is mask
    moved = mask.to("meta")
    assert moved.device.type == "meta" and mask.device.type == "cpu"


@pytest.mark.parametrize(
    "use",
    [
        lambda m: m + torch.zeros(1),
        lambda m: torch.zeros(1) + m,
        lambda m: torch.where(m, 0.0, 1.0),
        lambda m: torch.zeros(2, 1, 4, 9).masked_fill(m, 0.0),
        lambda m: m[:, None],
        lambda m: m[..., :3],
        lambda m: ~m,
        lambda m: m & True,
        lambda m: -m,
        lambda m: m <= 0,
        lambda m: m / 2,
    ],
)
def test_calculating_with_it_is_refused(use: Any) -> None:
    mask = StructuredMask(rules(2, 4, 9, 5, 0, Formula(right=0)))
    with pytest.raises(ArgumentError, match="attention_mask"):
        use(mask)


def test_formulas_of_mask_functions() -> None:
    keys = torch.ones(2, 9, dtype=torch.bool)
    numbers = torch.zeros(2, 9, dtype=torch.long)
    assert read(lambda b, h, q, k: k <= q) == Formula(right=0)
    assert read(lambda b, h, q, k: (k <= q) & (k > q - 4)) == Formula(left=3, right=0)
    assert read(lambda b, h, q, k: q - k < 4) == Formula(left=3)
    assert read(lambda b, h, q, k: q >= k) == Formula(right=0)
    assert read(lambda b, h, q, k: abs(q - k) <= 3) == Formula(left=3, right=3)
    assert read(lambda b, h, q, k: q >= 0) == Formula()
    assert read(lambda b, h, q, k: (k <= q) & keys[b, k]) == Formula(right=0, keys=(keys,))
    found = read(lambda b, h, q, k: numbers[b, q] == numbers[b, k])
    assert found is not None and found.sequences is numbers


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, q, k: h == 0,
        lambda b, h, q, k: k < q,  # a query does not see its own key: no band of attention's
        lambda b, h, q, k: (k <= q) | (k < 4),
        lambda b, h, q, k: (q + k) % 2 == 0,
        lambda b, h, q, k: k <= 2 * q,
        lambda b, h, q, k: k if k <= q else q,
        lambda b, h, q, k: True,
        lambda b, h, q, k: torch.ones(3, 3).bool()[q, k],
        lambda b, h, q, k: torch.ones(2, 9).bool()[b, q],
        lambda b, h, q, k: k <= torch.tensor(3),
        lambda b, h, q, k: 1 / 0,
    ],
)
def test_other_functions_are_unreadable(function: Any) -> None:
    assert read(function) is None
