"""Policies as data: lines of preference, each with its condition and its evidence; the first that holds decides."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from attnrt.errors import ArgumentTypeError, PolicyError, UnknownNameError
from attnrt.policies.base import REST, Policy, Ranking

if TYPE_CHECKING:
    from attnrt.environment import Environment
    from attnrt.policies.conditions import Condition
    from attnrt.request import AttentionRequest


@dataclass(frozen=True, eq=False)
class Line:
    """One line of a policy. `when` is what the file says, `holds` what it compiles to: None holds always."""

    name: str
    order: tuple[str, ...]
    why: str
    when: Mapping[str, Any] = field(default_factory=dict)
    holds: Condition | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class PreferencePolicy(Policy):
    """Lines in order. The last one has no condition, so there is always an answer."""

    name: str
    description: str
    lines: tuple[Line, ...]
    on_failure: Literal["raise", "next"] = "raise"
    deterministic: bool = False
    allow_padding: bool = False
    source: str = "<object>"

    def __post_init__(self) -> None:
        if not self.lines or self.lines[-1].holds is not None:
            raise PolicyError(self.source, None, "the last line must hold always, so it has no `when`")

    def rank(self, request: AttentionRequest, environment: Environment) -> Ranking:
        for line in self.lines:
            if line.holds is None or line.holds(request, environment):
                return Ranking(line.order, f"{self.name}: {line.name}", line.why)
        raise AssertionError("the last line holds always")

    @cached_property
    def names(self) -> frozenset[str]:
        """Every backend or family that a line names."""
        return frozenset(name for line in self.lines for name in line.order) - {REST}


MEASURED = ("tuned", "measure")
"""Policies by name that are no file here: the figures of `attnrt tune`, and measuring at first sight."""

_loaded: dict[tuple[str, int, int], Policy] = {}
_builtin_loaded: dict[str, PreferencePolicy] = {}


def load_policy(spec: str | os.PathLike[str] | Policy, known: Iterable[str]) -> Policy:
    """The policy that `spec` means. A file is read again only once it changed on disk.

    Args:
        spec: a built-in name, the path of a YAML file (it ends in .yaml or .yml, or has a separator), or a Policy.
        known: the backend and family names that a line may prefer.

    Raises:
        UnknownNameError: no built-in policy of that name. PolicyError: the file is wrong, and where.
        ArgumentTypeError: `spec` is none of the three.
    """
    if isinstance(spec, Policy):
        return spec
    if not isinstance(spec, (str, os.PathLike)):
        raise ArgumentTypeError("policy", spec, "a built-in policy's name, a path to a YAML file or a Policy is needed")
    if isinstance(spec, str) and not is_path(spec):
        return _load_builtin(spec, known)
    return _load_path(os.path.abspath(os.path.expanduser(spec)), known)


def builtin_policies() -> tuple[str, ...]:
    """Names of the policies that ship with attnrt."""
    return tuple(_builtin_files())


def policy_names() -> tuple[str, ...]:
    """Every name that `policy=` takes."""
    return (*builtin_policies(), *MEASURED)


on_forget: list[Callable[[], None]] = []
"""Called when policies are to be read again."""


def forget_policies() -> None:
    """Drop what was loaded, so that the next call reads the files again."""
    for forget in on_forget:
        forget()
    _loaded.clear()
    _builtin_loaded.clear()
    _builtin_files.cache_clear()


def is_path(spec: str) -> bool:
    """Whether a policy's name means a file: it ends in .yaml or .yml, or has a separator."""
    return spec.endswith((".yaml", ".yml")) or "/" in spec or os.sep in spec


@cache
def _builtin_files() -> dict[str, Traversable]:
    folder = resources.files("attnrt.configs") / "policies"
    files = (file for file in folder.iterdir() if file.name.endswith(".yaml"))
    return {file.name.removesuffix(".yaml"): file for file in sorted(files, key=lambda file: file.name)}


def _load_builtin(name: str, known: Iterable[str]) -> PreferencePolicy:
    files = _builtin_files()
    if name not in files:
        raise UnknownNameError("policy", name, policy_names())
    if (policy := _builtin_loaded.get(name)) is None or policy.names.difference(known):
        from attnrt.policies import shipped

        file, text = str(files[name]), files[name].read_text("utf-8")
        policy = shipped.policy(file, text, known, _load_builtin) or _read(file, text, known)
        _builtin_loaded[name] = policy
    return policy


def _load_path(path: str, known: Iterable[str]) -> Policy:
    try:
        stat = os.stat(path)
        key = (path, stat.st_mtime_ns, stat.st_size)
        # A backend may have been unregistered since: then the file is wrong now, and reading it again says where.
        policy = _loaded.get(key)
        if policy is None or (isinstance(policy, PreferencePolicy) and policy.names.difference(known)):
            text = Path(path).read_text("utf-8")
            policy = _loaded[key] = _read_tuned(path, text, known) if is_tuned(text) else _read(path, text, known)
    except PolicyError:
        raise
    except (OSError, ValueError) as error:
        raise PolicyError(path, None, f"cannot be read: {error}") from error
    return policy


def is_tuned(text: str) -> bool:
    """Whether a file's text is what `attnrt tune` wrote: it has the key `tuned`."""
    return text.startswith("tuned:") or "\ntuned:" in text


def _read_tuned(file: str, text: str, known: Iterable[str]) -> Policy:
    from attnrt.evidence.store import measured_policy
    from attnrt.policies.tuned import parse

    content = parse(file, text)
    static = _load_builtin(content.extends, known)
    return measured_policy([content.table(file)], static, automatic=False)


def _read(file: str, text: str, known: Iterable[str]) -> PreferencePolicy:
    # YAML and pydantic take their time to import, and a call with a Policy object needs neither.
    from attnrt.policies.loading import read_policy

    return read_policy(file, text, known, _load_builtin, builtin_policies())
