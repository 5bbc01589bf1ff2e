"""Reading our YAML strictly: every mistake is a `PolicyError` with its line and, where there is one, a guess."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from attnrt.advisories import SUBJECTS, Advisory
from attnrt.environment import PACKAGES
from attnrt.errors import ArgumentError, PolicyError, nearest, shown
from attnrt.policies.base import REST
from attnrt.policies.conditions import Condition, compile_when
from attnrt.policies.plain import plain_data
from attnrt.policies.preference import Line, PreferencePolicy

Text = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
Path = tuple[str | int, ...]
"""Where a value is in the file: ("lines", 0, "when", "arch")."""


class Entry(BaseModel):
    """No unknown keys, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class LineEntry(Entry):
    name: Text
    when: dict[str, Any] = {}
    prefer: list[Text] = Field(min_length=1)
    why: Text


class PolicyEntry(Entry):
    name: Text
    description: Text
    extends: Text | None = None
    on_failure: Literal["raise", "next"] = "raise"
    deterministic: bool = False
    allow_padding: bool = False
    lines: list[LineEntry] | None = Field(default=None, min_length=1)


class AdvisoryEntry(Entry):
    id: Annotated[str, StringConstraints(pattern=r"^[A-Z][A-Z0-9]*(_[A-Z0-9]+)*$")]
    backends: list[Text] = Field(min_length=1)
    packages: dict[str, Text] = {}
    when: dict[str, Any] = {}
    effect: Text
    remedy: Text
    source: Annotated[str, StringConstraints(pattern=r"^https://\S+$")]
    action: Literal["refuse", "warn"]
    described: bool = False


class AdvisoryFile(Entry):
    advisories: list[AdvisoryEntry]


Model = TypeVar("Model", bound=Entry)


def read_policy(
    file: str,
    text: str,
    known: Iterable[str],
    load_builtin: Callable[[str, Iterable[str]], PreferencePolicy],
    builtin: tuple[str, ...],
) -> PreferencePolicy:
    """The policy that a file's text describes.

    Args:
        known: names that `prefer:` may list. load_builtin, builtin: what `extends:` may name, and how to get it.

    Raises:
        PolicyError: anything is wrong with it.
    """
    document = Document(file, text)
    entry = document.validated(PolicyEntry)
    known = tuple(known)
    base = None
    if entry.extends is not None:
        if entry.extends not in builtin:
            guess = f"{nearest(entry.extends, builtin)}; valid are {', '.join(builtin)}"
            raise document.error(("extends",), f"unknown policy {entry.extends!r}{guess}")
        base = load_builtin(entry.extends, known)
    if entry.lines is not None:
        lines = tuple(_lines(document, entry.lines, known))
    elif base is not None:
        lines = base.lines
    else:
        raise document.error((), "'lines' is missing, and no `extends` to take them from")
    # What the file leaves out it inherits, so that extending a deterministic policy stays deterministic.
    given = entry.model_fields_set
    return PreferencePolicy(
        name=entry.name,
        description=entry.description,
        lines=lines,
        on_failure=entry.on_failure if base is None or "on_failure" in given else base.on_failure,
        deterministic=entry.deterministic if base is None or "deterministic" in given else base.deterministic,
        allow_padding=entry.allow_padding if base is None or "allow_padding" in given else base.allow_padding,
        source=file,
    )


def read_advisories(file: str, text: str) -> tuple[Advisory, ...]:
    """The advisories that a file's text lists.

    Raises:
        PolicyError: anything is wrong with it.
    """
    document = Document(file, text)
    found: dict[str, Advisory] = {}
    for i, entry in enumerate(document.validated(AdvisoryFile).advisories):
        at: Path = ("advisories", i)
        if entry.id in found:
            raise document.error((*at, "id"), f"{entry.id} is listed twice")
        _check_names(document, (*at, "backends"), "backend", entry.backends, SUBJECTS)
        for package, versions in entry.packages.items():
            _check_names(document, (*at, "packages", package), "package", [package], PACKAGES)
            try:
                SpecifierSet(versions)
            except InvalidSpecifier:
                message = f"{package}: {versions!r} is no version range such as '>=9.19,<9.26'"
                raise document.error((*at, "packages", package), message) from None
        if not entry.packages and not entry.when:
            raise document.error(at, f"{entry.id} holds everywhere; `packages` or `when` is needed")
        found[entry.id] = Advisory(
            id=entry.id,
            backends=tuple(entry.backends),
            packages=tuple(entry.packages.items()),
            when=entry.when,
            effect=entry.effect,
            remedy=entry.remedy,
            source=entry.source,
            action=entry.action,
            described=entry.described,
            holds=_compiled(document, (*at, "when"), entry.when),
        )
    return tuple(found.values())


def _lines(document: Document, entries: list[LineEntry], known: tuple[str, ...]) -> Iterator[Line]:
    for i, entry in enumerate(entries):
        at: Path = ("lines", i)
        if "when" in entry.model_fields_set and not entry.when:
            raise document.error((*at, "when"), "`when` is empty; leave it out")
        if entry.when and i == len(entries) - 1:
            raise document.error((*at, "when"), "the last line must hold always, so it has no `when`")
        if not entry.when and i < len(entries) - 1:
            raise document.error(at, f"{entry.name!r} has no `when`, so no line after it is ever reached")
        _check_names(document, (*at, "prefer"), "backend", entry.prefer, (*known, REST))
        yield Line(
            name=entry.name,
            order=tuple(entry.prefer),
            why=" ".join(entry.why.split()),
            when=entry.when,
            holds=_compiled(document, (*at, "when"), entry.when) if entry.when else None,
        )


def _compiled(document: Document, at: Path, when: Mapping[str, Any]) -> Condition:
    try:
        return compile_when(when)
    except ArgumentError as error:
        raise document.error((*at, error.argument), str(error)) from None


def _check_names(document: Document, at: Path, what: str, names: list[str], valid: Iterable[str]) -> None:
    valid = tuple(valid)
    for i, name in enumerate(names):
        if name not in valid:
            guess = f"{nearest(name, valid)}; valid are {', '.join(valid)}"
            raise document.error((*at, i), f"unknown {what} {name!r}{guess}")
        if name in names[:i]:
            raise document.error((*at, i), f"{name!r} is listed twice")


class Document:
    """A YAML file's plain data, with the line of every key and item."""

    def __init__(self, file: str, text: str) -> None:
        self.file = file
        self._lines: dict[Path, int] = {}
        self.data = plain_data(file, text, lambda root: self._index((), root, set()))

    def _index(self, at: Path, node: yaml.Node, seen: set[int]) -> None:
        self._lines.setdefault(at, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return
        if id(node) in seen:
            raise self.error(at, "aliases are not read; write it out")
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self._index((*at, i), item, seen)
            return
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:str":
                raise PolicyError(self.file, line, f"the key {shown(key.value)} is not plain text; quote it")
            if (*at, key.value) in self._lines:
                first = self._lines[(*at, key.value)]
                raise PolicyError(self.file, line, f"key {key.value!r} is given twice, first on line {first}")
            self._lines[(*at, key.value)] = line
            self._index((*at, key.value), value, seen)

    def line(self, at: Path) -> int | None:
        """The line of `at`, or of the nearest thing around it that has one."""
        while at and at not in self._lines:
            at = at[:-1]
        return self._lines.get(at)

    def error(self, at: Path, message: str) -> PolicyError:
        return PolicyError(self.file, self.line(at), message)

    def validated(self, model: type[Model]) -> Model:
        """The data as `model`. Of several mistakes one is raised, with the number of the others: the first in the file,
        and a misspelt key before the right one that is therefore missing.
        """
        try:
            return model.model_validate(self.data)
        except ValidationError as invalid:
            errors: list[dict[str, Any]] = [{**error} for error in invalid.errors(include_url=False)]
        first = min(errors, key=lambda error: (error["type"] == "missing", self.line(error["loc"]) or 0))
        others = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        raise self.error(first["loc"], _sentence(model, first) + others)


_WANTED = {
    "string_type": "text is needed",
    "bool_type": "true or false is needed",
    "list_type": "a list is needed",
    "dict_type": "a mapping is needed",
    "model_type": "a mapping is needed",
    "string_too_short": "it must not be empty",
    "too_short": "it must not be empty",
}


def _sentence(model: type[Entry], error: dict[str, Any]) -> str:
    """A pydantic error in our words."""
    at, kind = error["loc"], error["type"]
    key = next((part for part in reversed(at) if isinstance(part, str)), "the file")
    if kind == "missing":
        return f"{key!r} is missing"
    if kind == "extra_forbidden":
        valid = _model_at(model, at[:-1]).model_fields
        return f"unknown key {key!r}{nearest(key, valid)}; valid are {', '.join(valid)}"
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{key}: {shown(error['input'])}{nearest(error['input'], choices)}; valid are {', '.join(choices)}"
    if kind == "string_pattern_mismatch":
        return f"{key}: {shown(error['input'])} does not match {error['ctx']['pattern']}"
    wanted = _WANTED.get(kind, error["msg"])
    return f"{key}: {wanted}" if "too_short" in kind else f"{key}: {wanted}, not {shown(error['input'])}"


def _model_at(model: type[Entry], at: Path) -> type[Entry]:
    """The model that checks the mapping at `at`."""
    for part in at:
        if isinstance(part, str):
            pending = [model.model_fields[part].annotation]
            while pending:
                found = pending.pop()
                if isinstance(found, type) and issubclass(found, Entry):
                    model = found
                pending.extend(get_args(found))
    return model
