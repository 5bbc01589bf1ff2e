"""The file of a tuned policy: written for people, read without trust."""

from __future__ import annotations

import re

import pytest
import yaml
from figures import content, entry
from hypothesis import given, settings
from hypothesis import strategies as st

from attnrt.errors import PolicyError
from attnrt.evidence.calls import Call
from attnrt.policies import tuned
from attnrt.policies.tuned import BYTES, KindEntry, merged, parse, render

BASE = Call(heads_q=8, heads_kv=2, head_dim=64, seqlen_q=256, dtype="fp32", layout="bhsd")
CONTENT = content(
    entry(BASE, {"torch.math": 2.0, "torch.flash_cpu": 1.0}, wrong={"planted": "the output: off by 3"}),
    entry(BASE.changed(seqlen_q=512, mask=True), {"reference": 3.25}),
    entry(BASE.changed(window=(15, 0), training=True), {"reference": 1e-3}),
)
TEXT = render(CONTENT)


def test_written_and_read_again() -> None:
    assert parse("f", TEXT) == CONTENT
    assert render(parse("f", TEXT)) == TEXT


def test_people_can_read_it() -> None:
    assert TEXT.startswith("# Measured by `attnrt tune`")
    assert "\n      - {batch: 1, heads_q: 8, heads_kv: 2, seqlen_q: 256, seqlen_kv: 256, layout: bhsd, " in TEXT
    assert "ms: {torch.flash_cpu: 1.0, torch.math: 2.0}, spread: {torch.flash_cpu: 0.01, torch.math: 0.01}" in TEXT
    assert "wrong: {planted: 'the output: off by 3'}" in TEXT
    assert "features: [backward, causal, window]" in TEXT and "window: 16" in TEXT and "'mask[hqk]'" in TEXT
    for fact in ("device: ", "threads: ", "torch: ", "driver: ", "python: "):
        assert fact in TEXT


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.sampled_from(("a", "b.c", "torch.math")), st.floats(1e-6, 1e8), min_size=1))
def test_four_digits_stay(ms: dict[str, float]) -> None:
    (kind,) = parse("f", render(content(entry(BASE, ms)))).kinds
    assert kind.calls[0].ms == {name: pytest.approx(value, rel=1e-3) for name, value in ms.items()}


def test_cut_short_anywhere_it_is_refused() -> None:
    for cut in {*range(0, len(TEXT) - 1, 7), *(m.start() for m in re.finditer("\n", TEXT[:-1]))}:
        with pytest.raises(PolicyError):
            parse("f", TEXT[:cut])
    with pytest.raises(PolicyError, match="cut short"):
        parse("f", TEXT.removesuffix("end: true\n"))


BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"
HOSTILE = {
    "empty": ("", "empty"),
    "not a mapping": ("- tuned: 1\n", "no tuned policy"),
    "another file": ("name: mine\n", "the key 'tuned' is missing"),
    "another version": (TEXT.replace("tuned: 1", "tuned: 2"), "version 2"),
    "a version that is no number": (TEXT.replace("tuned: 1", "tuned: true"), "version True"),
    "binary": ("\x00\x01\x02", "not YAML"),
    "a tag that makes an object": (TEXT + "x: !!python/object/apply:os.system ['true']\n", "python/object"),
    "aliases": (BOMB + TEXT, "aliases"),
    "depth": (TEXT + "x: " + "[" * 5000 + "]" * 5000 + "\n", "nested|recursion|read"),
    "size": (TEXT + "#" * BYTES, "larger than"),
    "many nodes": (TEXT + "x: [" + "1," * 260_000 + "]\n", "holds more"),
    "a key twice": (TEXT.replace("margin:", "tuned: 1\nmargin:"), "twice"),
    "an unknown key": (TEXT.replace("margin:", "run: rm\nmargin:"), "run"),
    "a key that is no text": (TEXT + "3: 4\n", "not plain text"),
    "a time that is no number": (TEXT.replace("reference: 3.25", "reference: .nan"), "ms.reference"),
    "infinite": (TEXT.replace("reference: 3.25", "reference: .inf"), "ms.reference"),
    "negative": (TEXT.replace("reference: 3.25", "reference: -1.0"), "ms.reference"),
    "text for a time": (TEXT.replace("reference: 3.25", "reference: fast"), "ms.reference"),
    "a name with a path in it": (TEXT.replace("{reference: 3.25}", "{../../x: 3.25}"), "ms"),
    "a terminal's escape": (TEXT.replace("device: ", 'device: "\\e[2J" #'), "device"),
    "a huge text": (TEXT.replace("device: ", "device: " + "x" * 500), "device"),
    "a size beyond reason": (TEXT.replace("seqlen_q: 512", "seqlen_q: 99999999999999999999"), "seqlen_q"),
    "a margin beyond reason": (TEXT.replace("margin: 0.03", "margin: 7"), "margin"),
}


@pytest.mark.parametrize(("text", "said"), HOSTILE.values(), ids=HOSTILE)
def test_what_is_refused(text: str, said: str) -> None:
    with pytest.raises(PolicyError, match=said) as caught:
        parse("the file", text)
    assert str(caught.value).startswith("the file:") and len(str(caught.value)) < 500
    assert all(c.isprintable() for c in str(caught.value))


def test_too_many_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned, "CALLS", 3)
    assert parse("f", TEXT) == CONTENT
    monkeypatch.setattr(tuned, "CALLS", 2)
    with pytest.raises(PolicyError, match="has 3 calls, and 2 are allowed"):
        parse("f", TEXT)


def test_the_slow_parser_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(yaml, "CSafeLoader", raising=False)
    assert parse("f", TEXT) == CONTENT


def test_merged_keeps_the_newer_of_the_same_call() -> None:
    old, new = entry(BASE, {"a": 1.0}, date="2026-01-01T00:00:00"), entry(BASE, {"a": 2.0}, date="2026-02-01T00:00:00")
    other = entry(BASE.changed(seqlen_q=512), {"a": 3.0})

    def times(kinds: list[KindEntry]) -> list[float]:
        return [call.ms["a"] for kind in kinds for call in kind.calls]

    assert times(merged([old], [new, other])) == times(merged([new], [other, old])) == [2.0, 3.0]
