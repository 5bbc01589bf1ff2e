"""Environment variables are read without pydantic where their text is plain, and to the same result as with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attnrt.errors import VariableError
from attnrt.given import parse
from attnrt.registry import kernel_names, names
from attnrt.variables import VALUES, Variables, plain_value, read_variables

WORDS = sorted({*names(), *kernel_names(), "default", "tuned", "my.yaml", "a/b", "off", "once", "each", "unlimited",
                "0", "1", "-1", "2", "00", "8GiB", "true", " ", ",", "é", "~"})  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(WORDS),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(",".join),
    st.lists(st.sampled_from(WORDS), min_size=2, max_size=3).map("".join),
    st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=6),
)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(list(VALUES)), TEXTS)
def test_what_is_plain_means_what_pydantic_makes_of_it(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    for variable in VALUES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, text)
    checked, malformed = parse()
    if (plain := plain_value(name, text)) is not None:
        field = name.removeprefix("ATTNRT_").lower()
        assert checked == {field: plain} and type(checked[field]) is type(plain) and not malformed
    if malformed:
        with pytest.raises(VariableError, match=name):
            read_variables()
    else:
        assert read_variables() == Variables(**checked)


PLAIN: dict[str, list[tuple[str, Any]]] = {
    "ATTNRT_BACKEND": [("torch", "torch"), ("flash_attn", "flash_attn")],
    "ATTNRT_PREFER": [("triton", ("triton",)), ("torch,cudnn", ("torch", "cudnn"))],
    "ATTNRT_DISABLE": [("torch.cudnn,triton", ("torch.cudnn", "triton"))],
    "ATTNRT_POLICY": [("no_vendor", "no_vendor"), ("tuned", "tuned")],
    "ATTNRT_REPORT": [("once", "once")],
    "ATTNRT_CACHE_DIR": [("/", Path("/")), ("..", Path(".."))],
    "ATTNRT_UNFUSED_LIMIT": [("0", 0), ("unlimited", -1)],
    "ATTNRT_VERIFY": [("0", False), ("1", True)],
} | {name: [("0", 0), ("1", 1)] for name in VALUES if name.startswith("NVTE_")}


@pytest.mark.parametrize(("text", "said"), [("~nobody here", "home directory"), ("x" * 300, "too long")])
def test_folders_that_cannot_be(text: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_CACHE_DIR", text)
    with pytest.raises(VariableError, match=f"ATTNRT_CACHE_DIR.*{said}"):
        read_variables()


def test_every_variable_has_plain_texts() -> None:
    assert PLAIN.keys() == VALUES.keys()
    for name, pairs in PLAIN.items():
        assert [(text, plain_value(name, text)) for text, _ in pairs] == pairs


def test_one_that_is_not_plain_sends_all_to_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNRT_UNFUSED_LIMIT", "1KiB")
    monkeypatch.setenv("ATTNRT_VERIFY", "1")
    monkeypatch.setenv("ATTNRT_DISABLE", "cudnn, triton")
    found = read_variables()
    assert (found.unfused_limit, found.verify, found.disable) == (1024, True, ("cudnn", "triton"))


def test_a_variable_with_the_name_of_a_field_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a `report` of the user's own, beside a variable that pydantic has to read."""
    for name in ("report", "backend", "cache_dir", "verify"):
        monkeypatch.setenv(name, "theirs")
    monkeypatch.setenv("ATTNRT_UNFUSED_LIMIT", "1KiB")
    assert read_variables() == Variables(unfused_limit=1024)


def test_a_first_call_with_plain_variables_imports_no_pydantic(tmp_path: Path) -> None:
    code = "import sys, torch, attnrt; x = torch.ones(1, 1, 2, 8); attnrt.attention(x, x, x)"
    environ = {"ATTNRT_CACHE_DIR": str(tmp_path), "ATTNRT_PREFER": "torch,cudnn", "NVTE_FLASH_ATTN": "0"}
    command = [sys.executable, "-c", f"{code}; print('pydantic' in sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environ)
    assert done.stdout == "False\n", done.stderr
