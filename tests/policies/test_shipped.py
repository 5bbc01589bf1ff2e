"""What ships is read without checks, and to the same result as with them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from hashlib import sha256
from importlib import resources
from typing import Any

import pytest

from attnrt.advisories import Advisory, load_advisories
from attnrt.configs import parse, parse_anew
from attnrt.configs.parsed import PARSED
from attnrt.policies import shipped
from attnrt.policies.loading import read_advisories, read_policy
from attnrt.policies.preference import Line, PreferencePolicy, _builtin_files, _load_builtin, builtin_policies
from attnrt.registry import rankable


def said(x: Any) -> Any:
    """An object of ours as plain data, conditions aside."""
    if isinstance(x, (PreferencePolicy, Line, Advisory)):
        return {f.name: said(getattr(x, f.name)) for f in fields(x) if f.name != "holds"}
    return [said(item) for item in x] if isinstance(x, tuple) else x


@pytest.mark.parametrize("name", builtin_policies())
def test_a_policy_is_the_one_that_checks_make_of_it(name: str) -> None:
    file = _builtin_files()[name]
    text, known = file.read_text("utf-8"), rankable()
    quick = shipped.policy(str(file), text, known, _load_builtin)
    checked = read_policy(str(file), text, known, _load_builtin, builtin_policies())
    assert quick is not None and said(quick) == said(checked)
    assert [line.holds is None for line in quick.lines] == [line.holds is None for line in checked.lines]


def test_advisories_are_those_that_checks_make_of_them() -> None:
    text = (resources.files("attnrt.configs") / "advisories.yaml").read_text("utf-8")
    assert said(load_advisories()) == said(read_advisories("advisories.yaml", text)) != []


@pytest.mark.parametrize(
    "text",
    ["", "lines: [", "name: x", "name: x\ndescription: y\nspeed: 1\nlines: [{name: a, prefer: [torch], why: b}]",
     "name: x\ndescription: y\nlines: [{name: a, prefer: [tritn], why: b}]",
     "name: x\ndescription: y\nlines: [{name: a, prefer: [torch], why: b, when: {arch: fast}}]"],
)  # fmt: skip
def test_what_is_odd_is_left_to_the_checks(text: str) -> None:
    assert shipped.policy("x.yaml", text, ("torch",), _load_builtin) is None


def test_odd_advisories_too() -> None:
    assert shipped.advisories("advisories: [{id: X, backends: [torch], speed: 1}]") is None


def test_a_first_call_imports_neither_pydantic_nor_a_yaml_parser() -> None:
    """Each takes longer than everything else that such a call does."""
    code = "import sys, torch, attnrt; x = torch.ones(1, 1, 2, 8); attnrt.attention(x, x, x)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print({{'pydantic', 'yaml'}} & set(sys.modules))"],
        capture_output=True,
        text=True,
    )
    assert done.stdout == "set()\n", done.stderr


CONFIGS = resources.files("attnrt.configs")


POLICIES = ("policies/default", "policies/deterministic", "policies/no_vendor")


@pytest.mark.parametrize("file", ["advisories", *POLICIES, "triton/hopper", "triton/tiles"])
def test_what_was_parsed_before_is_what_the_file_says(file: str) -> None:
    """`make docs` parses the files anew."""
    text = CONFIGS.joinpath(f"{file}.yaml").read_text("utf-8")
    assert sha256(text.encode()).hexdigest() in PARSED
    assert parse(text) == parse_anew(text)


def test_a_file_that_was_changed_is_parsed() -> None:
    text = CONFIGS.joinpath("triton/tiles.yaml").read_text("utf-8")
    assert parse(text + "\nanother: 1\n") == parse(text) | {"another": 1}
    with pytest.raises(ValueError, match="expected"):
        parse("lines: [")
