"""A report in its three forms: everything the decision knows is in each, in a form that its reader can take."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import attnrt
from attnrt import registry
from attnrt.decision import Decision
from attnrt.schema import ReportModel, schema_json
from attnrt.selector import size

ROOT = Path(__file__).resolve().parent.parent
SHAPE: dict[str, Any] = {"batch": 1, "heads_q": 32, "heads_kv": 8, "seqlen_q": 4096, "head_dim": 128}


pytestmark = pytest.mark.usefixtures("fresh")


def on(machine: str = "h100", **changes: Any) -> Decision:
    return attnrt.explain_shape(environment=machine, **{**SHAPE, "causal": True, **changes})


def here(**options: Any) -> Decision:
    return attnrt.explain(*[torch.zeros(1, 2, 8, 16)] * 3, **options)


def overridden() -> Decision:
    with attnrt.override(disable=("cudnn",), prefer=("triton",)):
        return on()


SM75 = attnrt.Environment.simulate("sm75")
NO_ROOM = attnrt.Environment.simulate("sm90", memory=1 << 20)
DECISIONS: dict[str, Callable[[], Decision]] = {
    "simple": on,
    "refusals": lambda: on(softcap=30.0),
    "forced": lambda: on(backend="flash_attn"),
    "forced, refused": lambda: on(backend="cudnn", softcap=30.0),
    "overridden": overridden,
    "old GPU": lambda: attnrt.explain_shape(environment=SM75, **SHAPE),
    "everything": lambda: on(alibi=True, sinks=True, softcap=3.0, dropout_p=0.5, training=True, return_lse=True),
    "operands": lambda: on(mask=True, bias=True, bias_grad=True, training=True, window=(5, None)),
    "packed": lambda: on(packed=True, training=True, deterministic=True),
    "nothing fits": lambda: attnrt.explain_shape(environment=NO_ROOM, softcap=1.0, sinks=True, **SHAPE),
    "here": here,
    "here, unfused": lambda: here(dropout_p=0.1),
    "here, meta": lambda: attnrt.explain(*[torch.zeros(1, 2, 8, 16, device="meta")] * 3),
}


@pytest.fixture(params=DECISIONS)
def decision(request: pytest.FixtureRequest) -> Decision:
    return DECISIONS[request.param]()


def squeezed(text: str) -> str:
    """Without white space, since a table breaks its lines anywhere."""
    return re.sub(r"\s", "", text)


def rows(report: str) -> dict[str, str]:
    """Backend label -> its row of the plain table, squeezed, with the lines that continue it."""
    table = report.split("\n\n", 1)[1].splitlines()
    found: dict[str, list[str]] = {}
    for line in table[1:]:
        if not line.startswith(" "):
            found[line.split()[0]] = []
        list(found.values())[-1].append(line)
    return {name: squeezed("".join(lines)) for name, lines in found.items()}


# ---- plain text


def test_the_head_says_what_and_why(decision: Decision) -> None:
    head = str(decision).split("\n\n", 1)[0]
    assert head.startswith(f"choice    {decision.label}\nwhy ")
    for value in (decision.why, decision.request.describe(), decision.environment.name, decision.line):
        assert squeezed(value) in squeezed(head)
    assert squeezed(decision.evidence) in squeezed(head)
    for name, version in decision.environment.packages:
        assert version is None or squeezed(f"{name} {version}") in squeezed(head)
    for override in decision.overrides:
        assert squeezed(f"override {override}") in squeezed(head)


def test_every_backend_has_a_row_with_every_reason(decision: Decision) -> None:
    found = rows(str(decision))
    assert list(found) == [verdict.label for verdict in decision.verdicts.values()]
    assert set(decision.verdicts) == set(registry.backends())
    for verdict in decision.verdicts.values():
        row = found[verdict.label]
        assert verdict.eligible is not bool(verdict.reasons)
        for reason in verdict.reasons:
            remedy = f" -> {reason.remedy}" if reason.remedy else ""
            assert squeezed(f"{reason.rule}: {reason.message}{remedy}") in row
        for advisory in verdict.warnings:
            assert squeezed(f"warning {advisory.id}: {advisory.effect}") in row and advisory.source in row
        for note in verdict.notes:
            assert squeezed(note) in row
        assert (squeezed(size(verdict.bytes)) in row) or not verdict.eligible


def test_plain_is_plain(decision: Decision) -> None:
    assert "\x1b" not in str(decision)
    assert all(len(line) <= 110 and line == line.rstrip() for line in str(decision).splitlines())


def test_warnings_and_notes_show() -> None:
    row = rows(str(on(softcap=30.0)))["flash_attn_4"]
    assert "warningFA4_SHADOWED_BY_FA2:" in row and "compilesonce" in row
    math = here(dropout_p=0.1)
    assert math.label == "torch[math]" and "holdsthescorematrix" in rows(str(math))["torch[math]"]


def verdict_words(decision: Decision) -> dict[str, str]:
    """Backend -> what its row says, from the Markdown form, whose cells are exact."""
    table = [cells(line) for line in decision.to_markdown().splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in table] == [v.label for v in decision.verdicts.values()]
    words = dict(zip(decision.verdicts, (row[1] for row in table), strict=True))
    plain = rows(str(decision))
    assert all(plain[v.label].startswith(squeezed(v.label + words[n])) for n, v in decision.verdicts.items())
    return words


def test_words_of_a_simulated_machine() -> None:
    words = verdict_words(on(softcap=30.0))
    assert (words["flash_attn_3"], words["cudnn"], words["triton"]) == ("would run", "refused", "eligible")
    assert "(simulated)" in str(on())


def test_words_of_this_machine() -> None:
    words = verdict_words(here())
    assert (words["torch"], words["reference"], words["cudnn"]) == ("runs", "eligible", "refused")
    assert "simulated" not in str(here()) and "would run" not in str(here())


def test_words_when_forced() -> None:
    words = verdict_words(on(backend="triton", softcap=30.0))
    assert (words["triton"], words["flash_attn_3"], words["cudnn"]) == ("would run", "not forced", "refused")
    words = verdict_words(on(backend="cudnn", softcap=30.0))
    assert words["cudnn"] == "refused" and words["flash_attn_3"] == "not forced"
    assert "eligible" not in words.values() and "would run" not in words.values()


def test_what_happens_on_failure_shows(tmp_path: Path) -> None:
    assert "when a kernel fails, the call raises" in str(on())
    file = tmp_path / "next.yaml"
    file.write_text("name: mine\ndescription: Goes on.\nextends: default\non_failure: next\n")
    assert squeezed("when a kernel fails, the next candidate runs") in squeezed(str(on(policy=str(file))))


# ---- colour


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Print a decision to something that says it is a terminal."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "150")
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def shown(decision: Decision) -> str:
        stream = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            print(decision)
        return stream.getvalue()

    return shown


COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def test_colour_on_a_terminal_only(terminal: Any, capsys: pytest.CaptureFixture[str]) -> None:
    coloured = terminal(on(softcap=30.0))
    assert re.search(r"\x1b\[[0-9;]*32m", coloured), "the winner is green"
    plain = COLOUR.sub("", coloured)
    assert "\x1b" not in plain and "would run" in plain
    print(on(softcap=30.0))
    assert "\x1b" not in capsys.readouterr().out


def test_as_wide_as_the_terminal(terminal: Any) -> None:
    plain = COLOUR.sub("", terminal(on(softcap=30.0)))
    assert 110 < max(map(len, plain.splitlines())) <= 150


def test_no_color_is_honoured(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """https://no-color.org; bold and dim are no colours."""
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(r"\x1b\[(?:[0-9]+;)*3[0-7]m", terminal(on()))


def test_json_and_markdown_never_have_colour(terminal: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert "\x1b" not in on().to_json() + on().to_markdown()


# ---- Markdown


def cells(line: str) -> list[str]:
    """Cells of a row of a Markdown table, where a backslash takes a pipe's meaning away."""
    assert line.startswith("|") and line.endswith("|") and not line.endswith("\\|")
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_markdown_is_one_well_formed_table(decision: Decision) -> None:
    head, table = decision.to_markdown().split("\n\n| ")
    lines = f"| {table}".splitlines()
    assert [len(cells(line)) for line in lines] == [4] * (len(decision.verdicts) + 2)
    assert set(cells(lines[1])) == {"---"}
    title, blank, *facts = head.splitlines()
    assert title == f"### attnrt: {decision.label}" and blank == ""
    assert all(re.match(r"- \*\*[a-z]+\*\*: ", line) for line in facts)
    assert f"- **why**: {decision.why}" in facts
    assert len([line for line in facts if line.startswith("- **override**")]) == len(decision.overrides)
    for line, verdict in zip(lines[2:], decision.verdicts.values(), strict=True):
        last = cells(line)[3].split("<br>")
        passed_over = verdict.passed_over if verdict.backend == decision.backend else ()
        expected = len(verdict.reasons + passed_over + verdict.warnings + verdict.notes)
        assert len([entry for entry in last if entry]) == expected
        for reason in verdict.reasons:
            assert any(entry.startswith(f"{reason.rule}: ") for entry in last)
            assert not reason.remedy or reason.remedy.replace("|", "\\|") in cells(line)[3]


class Awkward(attnrt.Backend):
    """Has everything in its texts that could break a table."""

    name, title, prefix = "awkward", "a | b", "AWKWARD"
    rules = (attnrt.Rule("AWKWARD_PIPE", lambda r, e: True, "a|b\n[bold]c[/bold] | d", "x || y"),)


def test_pipes_line_breaks_and_brackets() -> None:
    attnrt.register_backend(Awkward())
    decision = here()
    (line,) = (line for line in decision.to_markdown().splitlines() if line.startswith("| awkward"))
    assert cells(line) == ["awkward", "refused", "", "AWKWARD_PIPE: a\\|b [bold]c[/bold] \\| d -> x \\|\\| y"]
    assert squeezed("AWKWARD_PIPE: a|b [bold]c[/bold] | d -> x || y") in rows(str(decision))["awkward"]
    assert ReportModel.model_validate_json(decision.to_json())


def test_an_override_with_a_pipe_keeps_the_table(tmp_path: Path) -> None:
    file = tmp_path / "a|b.yaml"
    file.write_text("name: a|b\ndescription: x\nlines:\n  - {name: c|d, prefer: [triton], why: e|f}\n")
    decision = on(policy=str(file))
    table = [line for line in decision.to_markdown().splitlines() if line.startswith("|")]
    assert {len(cells(line)) for line in table} == {4}


# ---- JSON


def valid(value: Any, schema: dict[str, Any], root: dict[str, Any], at: str = "") -> list[str]:
    """What of a value breaks a JSON schema: as much of the language as ours uses, and a KeyError beyond that."""
    if "$ref" in schema:
        return valid(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, at)
    if "anyOf" in schema:
        tried = [valid(value, option, root, at) for option in schema["anyOf"]]
        return [] if [] in tried else [f"{at}: {value!r} is none of {schema['anyOf']}"]
    if "const" in schema or "enum" in schema:
        allowed = schema["enum"] if "enum" in schema else [schema["const"]]
        return [] if value in allowed else [f"{at}: {value!r} is not in {allowed}"]
    kind = schema["type"]
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool, "null": type(None)}
    if not isinstance(value, types[kind]) or (kind == "integer" and isinstance(value, bool)):
        return [f"{at}: {value!r} is not {kind}"]
    if kind == "array":
        return [problem for i, item in enumerate(value) for problem in valid(item, schema["items"], root, f"{at}[{i}]")]
    if kind != "object":
        return []
    properties = schema.get("properties", {})
    problems = [f"{at}.{name} is missing" for name in schema.get("required", ()) if name not in value]
    if schema.get("additionalProperties") is False:
        problems += [f"{at}.{name} is unknown" for name in value if name not in properties]
    for name in properties.keys() & value.keys():
        problems += valid(value[name], properties[name], root, f"{at}.{name}")
    return problems


def test_json_follows_the_model_and_the_committed_schema(decision: Decision) -> None:
    committed = json.loads((ROOT / "docs" / "report.schema.json").read_text())
    assert committed == json.loads(schema_json()), "run make docs"
    assert valid(json.loads(decision.to_json()), committed, committed) == []
    model = ReportModel.model_validate_json(decision.to_json())
    assert model.model_dump(by_alias=True) == json.loads(decision.to_json())
    assert json.loads(decision.to_json()) == json.loads(decision.to_json(indent=None))
    assert "\n" not in decision.to_json(indent=None)


def test_the_schema_check_sees_mistakes() -> None:
    schema = json.loads(schema_json())
    good = json.loads(on().to_json())
    for wrong in ({"backend": 3}, {"schema": 2}, {"verdicts": [{}]}, {"extra": 1}, {"on_failure": "stop"}):
        assert valid({**good, **wrong}, schema, schema)
    assert valid({name: value for name, value in good.items() if name != "why"}, schema, schema)


def test_json_says_everything(decision: Decision) -> None:
    found = json.loads(decision.to_json())
    assert (found["backend"], found["kernel"], found["forced"]) == (decision.backend, decision.kernel, decision.forced)
    assert (found["why"], found["line"], found["policy"]) == (decision.why, decision.line, decision.policy)
    assert [v["backend"] for v in found["verdicts"]] == list(decision.verdicts)
    ranks = [v["rank"] for v in found["verdicts"] if v["rank"] is not None]
    assert ranks == sorted(ranks)
    for verdict in found["verdicts"]:
        ours = decision.verdicts[verdict["backend"]]
        assert [r["rule"] for r in verdict["reasons"]] == [r.rule for r in ours.reasons]
        assert [(w["id"], w["source"]) for w in verdict["warnings"]] == [(a.id, a.source) for a in ours.warnings]
        assert verdict["notes"] == list(ours.notes)
        assert (verdict["bytes"], verdict["eligible"]) == (ours.bytes, ours.eligible)


def test_json_is_stable() -> None:
    for name, make in DECISIONS.items():
        if not name.startswith("here"):
            assert make().to_json() == make().to_json()
    first = on().to_json()
    attnrt.refresh()
    assert on().to_json() == first
    assert list(json.loads(first)) == [
        *("schema", "backend", "kernel", "why", "policy", "line", "evidence", "on_failure", "forced"),
        *("request", "environment", "overrides", "verdicts"),
    ]


def test_an_error_carries_the_whole_report() -> None:
    with pytest.raises(attnrt.BackendUnavailable) as error:
        attnrt.attention(*[torch.zeros(1, 2, 8, 16)] * 3, backend="cudnn")
    assert str(error.value) == str(error.value.report)
    assert "CUDNN_DEVICE" in str(error.value) and error.value.report.backend is None
