"""Bad files: each mistake is refused with its line and a suggestion."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from attnrt.errors import AttnrtError, PolicyError
from attnrt.policies.loading import read_advisories
from attnrt.policies.preference import load_policy

KNOWN = ("cudnn", "flash_attn", "flash_attn_2", "triton", "torch", "reference")
GOOD = """\
name: mine
description: For a test.
lines:
  - name: decode
    when:
      arch: ">=sm90"
      seqlen_q: "<=16"
    prefer: [triton, cudnn]
    why: Measured.
  - name: the rest
    prefer:
      - torch
      - "*"
    why: Measured too.
"""


def refused(tmp_path: Path, text: str) -> PolicyError:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(PolicyError) as caught:
        load_policy(file, KNOWN)
    assert caught.value.file == str(file)
    assert str(caught.value).startswith(f"{file}:{caught.value.line}: " if caught.value.line else f"{file}: ")
    return caught.value


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("    prefer: [triton", "    prefre: [triton", 8, "unknown key 'prefre' (did you mean prefer?)"),
        ("description:", "descripton:", 2, "unknown key 'descripton' (did you mean description?)"),
        ("[triton, cudnn]", "[triton, cuddn]", 8, "unknown backend 'cuddn' (did you mean cudnn?)"),
        ("      - torch\n", "      - troch\n", 12, "unknown backend 'troch' (did you mean torch?); valid are cudnn"),
        ("[triton, cudnn]", "[triton, triton]", 8, "'triton' is listed twice"),
        ("[triton, cudnn]", "[]", 8, "prefer: it must not be empty"),
        ("[triton, cudnn]", "triton", 8, "prefer: a list is needed, not 'triton'"),
        ("[triton, cudnn]", "[triton, 3]", 8, "prefer: text is needed, not 3"),
        ('"<=16"', '"=< 16"', 7, "seqlen_q='=< 16': unknown operator '=<' (did you mean <=?)"),
        ("      seqlen_q", "      seq_len_q", 7, "unknown field 'seq_len_q' (did you mean seqlen_q?)"),
        ('">=sm90"', '">=90"', 6, "did you mean sm90?"),
        ("    why: Measured.\n", "", 4, "'why' is missing"),
        ("    why: Measured.", "    why: ''", 9, "why: it must not be empty"),
        ("    why: Measured.", "    why:", 9, "why: text is needed, not None"),
        ("    why: Measured.", "    why: 2026-01-01", 9, "why: text is needed"),
        ("name: mine", "name: yes", 1, "name: text is needed, not True"),
        (
            "name: mine",
            "name: mine\non_failure: nxt",
            2,
            "on_failure: 'nxt' (did you mean next?); valid are raise, next",
        ),
        ("name: mine", "name: mine\ndeterministic: 1", 2, "deterministic: true or false is needed, not 1"),
        ("name: mine", "name: mine\nextends: defalt", 2, "unknown policy 'defalt' (did you mean default?)"),
        ("name: mine", "name: mine\nname: yours", 2, "key 'name' is given twice, first on line 1"),
        ("  - name: the rest", "  - name: the rest\n    when: {causal: true}", 11, "the last line must hold always"),
        ("      seqlen_q", "      arch", 7, "key 'arch' is given twice, first on line 6"),
        ("name: mine", "name: [mine", 2, "not YAML that we read"),
        ("name: mine", "name: !!python/name:os.system", 1, "not YAML that we read: could not determine"),
        ("name: mine", "1: mine", 1, "the key '1' is not plain text; quote it"),
        ("[triton, cudnn]", "&a [triton, *a]", 8, "aliases are not read"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert old in GOOD
    error = refused(tmp_path, GOOD.replace(old, new, 1))
    assert message in str(error)
    assert error.line == line


def test_the_good_one_is_good(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(GOOD)
    assert load_policy(file, KNOWN).name == "mine"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("", 1, "the file is empty"),
        ("- a\n- b\n", 1, "the file: a mapping is needed"),
        ("name: a\ndescription: b\n", 1, "'lines' is missing"),
        ("name: a\ndescription: b\nlines: []\n", 3, "lines: it must not be empty"),
        ("name: a\ndescription: b\nlines:\n  - torch\n", 4, "a mapping is needed, not 'torch'"),
        ("name: a\n\tdescription: b\n", 2, "not YAML that we read"),
        ("name: a\n---\nname: b\n", 2, "not YAML that we read"),
        ("name: \x00\n", None, "not YAML that we read"),
        ("[" * 5000, None, "not YAML that we read"),
    ],
)
def test_other_shapes(tmp_path: Path, text: str, line: int | None, message: str) -> None:
    error = refused(tmp_path, text)
    assert error.line == line
    assert message in str(error)


def test_an_empty_when_and_an_unreachable_line(tmp_path: Path) -> None:
    line = "  - name: {name}\n{when}    prefer: [torch]\n    why: Measured.\n"
    head = "name: a\ndescription: b\nlines:\n"
    rest = line.format(name="rest", when="")
    error = refused(tmp_path, head + line.format(name="one", when="    when: {}\n") + rest)
    assert (error.line, "leave it out" in str(error)) == (5, True)
    error = refused(tmp_path, head + line.format(name="one", when="") + rest)
    assert (error.line, "no line after it is ever reached" in str(error)) == (4, True)


def test_the_first_of_several_mistakes_is_named(tmp_path: Path) -> None:
    error = refused(tmp_path, GOOD.replace("why: Measured.", "wy: Measured.").replace("name: mine", "name: 3"))
    assert error.line == 1
    assert str(error).endswith("name: text is needed, not 3 (and 2 more)")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path / "missing.yaml", KNOWN)
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(tmp_path, KNOWN)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PolicyError, match="cannot be read"):
        load_policy(binary, KNOWN)


ADVISORY = textwrap.dedent("""\
    advisories:
      - id: A_DEFECT
        backends: [cudnn, torch.cudnn]
        packages: {cudnn: "<9.25"}
        when: {packed: true}
        effect: Wrong.
        remedy: Update.
        source: https://github.com/a/b/issues/1
        action: warn
    """)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("A_DEFECT", "a_defect", 2, "id: 'a_defect' does not match"),
        ("torch.cudnn", "torch.cuddn", 3, "unknown backend 'torch.cuddn' (did you mean torch.cudnn?)"),
        ("{cudnn:", "{cuddn:", 4, "unknown package 'cuddn' (did you mean cudnn?)"),
        ('"<9.25"', '"=<9.25"', 4, "'=<9.25' is no version range such as '>=9.19,<9.26'"),
        ("{packed: true}", "{pakced: true}", 5, "unknown field 'pakced' (did you mean packed?)"),
        ("https://github.com/a/b/issues/1", "github 1", 8, "source: 'github 1' does not match"),
        ("action: warn", "action: warning", 9, "action: 'warning' (did you mean warn?); valid are refuse, warn"),
        ("    remedy: Update.\n", "", 2, "'remedy' is missing"),
        ("    effect:", "    efect:", 6, "unknown key 'efect' (did you mean effect?)"),
        ('    packages: {cudnn: "<9.25"}\n    when: {packed: true}\n', "", 2, "A_DEFECT holds everywhere"),
    ],
)
def test_bad_advisories(old: str, new: str, line: int, message: str) -> None:
    assert old in ADVISORY
    with pytest.raises(PolicyError) as caught:
        read_advisories("advisories.yaml", ADVISORY.replace(old, new, 1))
    assert message in str(caught.value)
    assert caught.value.line == line


def test_an_id_twice() -> None:
    with pytest.raises(AttnrtError, match=r"advisories.yaml:10: A_DEFECT is listed twice"):
        read_advisories("advisories.yaml", ADVISORY + ADVISORY.partition("\n")[2])
