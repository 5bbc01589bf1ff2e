"""README.md: its code runs, its report is what the program prints, what it names exists."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import attnrt
from attnrt import registry
from attnrt.policies.preference import load_policy
from attnrt.settings import NAMES

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


pytestmark = pytest.mark.usefixtures("fresh")


def test_python_blocks(capsys: pytest.CaptureFixture[str]) -> None:
    """In their order, with small q, k and v: grouped heads, as the comment says they may be."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 16, 8), torch.randn(2, 2, 16, 8), torch.randn(2, 2, 16, 8)
    names: dict[str, Any] = {"q": q, "k": k, "v": v}
    found = blocks("python")
    assert len(found) == 4
    for number, block in enumerate(found):
        exec(compile(block, f"README.md, python block {number + 1}", "exec"), names)
    assert names["attended"].shape == names["hidden"].shape
    want = attnrt.attention(q, k, v, causal=True, backend="reference")
    torch.testing.assert_close(names["out"], want)
    assert "choice    torch[flash_cpu]" in capsys.readouterr().out
    assert names["machine"].version("cudnn") == "9.10.1"
    for layout, order in {"bhsd": (0, 1, 2, 3), "bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3)}.items():
        there = [t.permute(order).contiguous() for t in (q, k, v)]
        out = attnrt.attention(*there, causal=True, layout=layout, backend="expanded")
        torch.testing.assert_close(out, want.permute(order))


def test_the_backend_of_the_readme_refuses_what_it_does_not_name() -> None:
    """The id and the sentence that the README quotes."""
    exec(blocks("python")[-1], {})
    refused = attnrt.explain(*[torch.zeros(1, 1, 4, 8)] * 3, softcap=1.0).verdicts["expanded"].reasons
    quoted = re.search(r"`(EXPANDED_SOFTCAP: [^`]*)`", README)
    assert quoted is not None
    assert f"{refused[0].rule}: {refused[0].message}" == " ".join(quoted[1].split())


def test_yaml_blocks(tmp_path: Path) -> None:
    (block,) = blocks("yaml")
    file = tmp_path / "mine.yaml"
    file.write_text(block)
    policy = load_policy(file, registry.rankable())
    assert (policy.name, policy.on_failure) == ("mine", "next")
    shape: dict[str, Any] = {"batch": 1, "heads_q": 32, "heads_kv": 8, "head_dim": 128, "causal": True}
    long = attnrt.explain_shape(seqlen_q=16384, environment="h100", policy=str(file), **shape)
    assert (long.backend, long.line) == ("flash_attn_3", "mine: long prefill on Hopper")
    assert attnrt.explain_shape(seqlen_q=16384, environment="b200", policy=str(file), **shape).backend == "cudnn"
    assert attnrt.explain_shape(seqlen_q=4096, environment="h100", policy=str(file), **shape).backend == "cudnn"


def test_the_report_is_what_the_command_prints() -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "readme.py"))
    assert len(tool["REPORT"].findall(README)) >= 1
    assert tool["with_reports"](README) == README, "run make docs"


def test_every_variable_is_described() -> None:
    assert [name for name in NAMES if name not in README] == []
    known = {*NAMES, "ATTNRT_"}
    assert set(re.findall(r"\b(?:ATTNRT|NVTE)_[A-Z_]*", README)) <= known


def test_the_costs_are_filled_in() -> None:
    block = re.search(r"<!-- dispatch -->\n```\n(.*?)```\n<!-- end -->", README, re.DOTALL)
    assert block is not None, "run make bench"
    rows = dict(re.findall(r"^(.+?)\s{2,}([0-9.]+) us", block[1], re.MULTILINE))
    assert {"F.scaled_dot_product_attention", "attnrt.attention", "attnrt's own share"} <= set(rows)
    assert all(float(value) > 0 for value in rows.values())
    own = float(rows["attnrt.attention"]) - float(rows["torch backend's run alone"])
    assert float(rows["attnrt's own share"]) == pytest.approx(own, abs=0.02), "all of one run"


def test_links_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {a or b for a, b in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", README, re.MULTILINE)}
    assert named and named <= targets
