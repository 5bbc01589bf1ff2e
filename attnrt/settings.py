"""What the user overrides: environment variables, context managers, arguments, and which of them wins.

Precedence: argument over context over environment over policy. Forcing, preferring and disabling are three things:
a forced backend runs or the call raises; a preferred one goes first if it is eligible; a disabled one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from attnrt import registry
from attnrt.errors import ArgumentTypeError

if TYPE_CHECKING:
    from attnrt.policies.base import Policy
    from attnrt.variables import Variables

PolicySpec = Any
"""A built-in policy's name, the path of a YAML file, or a Policy."""
LEVELS = ("argument", "context", "environment")


@dataclass(frozen=True, eq=False)
class Context:
    """What the open `use_backend` and `override` blocks say together, the inner ones first.

    Compared by identity, which makes a cheap cache key: `_context_of` makes one object per value.
    """

    backend: str | None = None
    lifted: bool = False
    """`use_backend(None)`: no force, not even the environment's."""
    prefer: tuple[str, ...] | None = None
    disable: tuple[str, ...] = ()
    policy: PolicySpec = None


@lru_cache(maxsize=1024)
def _context_of(
    backend: str | None, lifted: bool, prefer: tuple[str, ...] | None, disable: tuple[str, ...], policy: PolicySpec
) -> Context:
    return Context(backend, lifted, prefer, disable, policy)


NO_CONTEXT = _context_of(None, False, None, (), None)
_context: ContextVar[Context] = ContextVar("attnrt_context", default=NO_CONTEXT)
current_context = _context.get


class override:
    """Override the choice inside a `with` block, in this thread or async task only. Also a decorator.

    Args:
        backend: force one. prefer: names tried first, in order. disable: names refused. policy: name, path or Policy.

    Raises:
        UnknownNameError: no backend, family or kernel of that name.
    """

    def __init__(
        self,
        *,
        backend: str | None = None,
        prefer: str | Iterable[str] | None = None,
        disable: str | Iterable[str] = (),
        policy: PolicySpec = None,
    ) -> None:
        if backend is not None:
            registry.check_name("backend", backend)
        check_policy("policy", policy)
        self._changes = _context_of(
            backend,
            False,
            None if prefer is None else names("prefer", prefer),
            names("disable", disable, kernels=True),
            policy,
        )
        self._tokens: list[Token[Context]] = []

    def __enter__(self) -> None:
        self._tokens.append(_context.set(_inner(_context.get(), self._changes)))

    def __exit__(self, *exc: object) -> None:
        _context.reset(self._tokens.pop())

    def __call__(self, function: Any) -> Any:
        from functools import wraps

        changes = self._changes

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            token = _context.set(_inner(_context.get(), changes))
            try:
                return function(*args, **kwargs)
            finally:
                _context.reset(token)

        return wrapped


class use_backend(override):
    """Force one backend (or family) inside a `with` block: it runs, or the call raises. None lifts an outer force."""

    def __init__(self, backend: str | None) -> None:
        super().__init__(backend=backend)
        if backend is None:
            self._changes = _context_of(None, True, None, (), None)


@lru_cache(maxsize=1024)
def _inner(outer: Context, changes: Context) -> Context:
    forced = changes.backend is not None or changes.lifted
    freed = registry.expand((changes.backend,)) if changes.backend else ()
    # An inner force outranks an outer disable, as an argument outranks a context.
    kept = (n for n in outer.disable if not set(registry.expand((n,))) & set(freed))
    return _context_of(
        changes.backend if forced else outer.backend,
        changes.lifted or (outer.lifted and not forced),
        outer.prefer if changes.prefer is None else changes.prefer,
        tuple(dict.fromkeys((*kept, *changes.disable))),
        outer.policy if changes.policy is None else changes.policy,
    )


def check_policy(argument: str, spec: Any) -> None:
    from attnrt.policies.base import Policy

    if spec is not None and not isinstance(spec, (str, os.PathLike, Policy)):
        raise ArgumentTypeError(argument, spec, "a built-in policy's name, a path to a YAML file or a Policy is needed")


def names(argument: str, value: str | Iterable[str], kernels: bool = False) -> tuple[str, ...]:
    """Backend names from one name, a comma list, or an iterable; each must exist."""
    if isinstance(value, str):
        value = [n.strip() for n in value.split(",") if n.strip()]
    try:
        found = tuple(value)
    except TypeError:
        raise ArgumentTypeError(argument, value, "a backend name or an iterable of them is needed") from None
    for name in found:
        registry.check_name(argument, name, kernels=kernels)
    return found


@dataclass(frozen=True)
class Override:
    """One thing the user asked for: what, the value, where it was said, and whether something nearer overrode it."""

    what: Literal["force", "prefer", "disable", "policy", "unfused_limit", "deterministic"]
    value: str
    source: str
    beaten_by: str | None = None

    def __str__(self) -> str:
        text = f"{self.what} {self.value} (by {self.source})"
        return f"{text}, overridden by {self.beaten_by}" if self.beaten_by else text


@dataclass(frozen=True)
class Settings:
    """The overrides in force for one call, resolved. Frozen, so that a choice is a function of it."""

    force: tuple[str, ...] = ()
    """Concrete backends that may serve; empty: not forced."""
    force_name: str | None = None
    force_source: str = ""
    prefer: tuple[str, ...] = ()
    prefer_source: str = ""
    disabled: tuple[tuple[str, str], ...] = ()
    """(backend or backend.kernel, what disabled it)."""
    policy: Policy | None = None
    policy_source: str = ""
    unfused_limit: int | None = None
    """Bytes an unfused kernel may take; None: what is free; -1: no limit."""
    overrides: tuple[Override, ...] = ()

    def disabled_by(self, name: str) -> str | None:
        for disabled, source in self.disabled:
            if disabled == name:
                return source
        return None


def resolve(argument_backend: Any, argument_policy: PolicySpec, context: Context, variables: Variables) -> Settings:
    """Settle who wins among argument, context and environment.

    Raises:
        UnknownNameError: a name that does not exist. PolicyError: a policy file that is wrong.
    """
    from attnrt.policies.preference import load_policy

    forces: list[tuple[int, str, str]] = []
    if argument_backend is not None:
        registry.check_name("backend", argument_backend)
        forces.append((0, argument_backend, "the argument backend="))
    if context.backend is not None:
        forces.append((1, context.backend, "a context manager"))
    if variables.backend is not None and not (context.lifted and argument_backend is None):
        forces.append((2, variables.backend, "ATTNRT_BACKEND"))
    level, force_name, force_source = forces[0] if forces else (len(LEVELS), None, "")
    overrides = [Override("force", n, s, None if i == 0 else force_source) for i, (_, n, s) in enumerate(forces)]

    disables = [(1, name, "a context manager") for name in context.disable] + [
        (2, n, s) for n, s in variables.disabled()
    ]
    force = registry.expand((force_name,)) if force_name else ()
    switched_off = {name: (lvl, src) for lvl, n, src in reversed(disables) for name in registry.expand((n,))}
    # A force lifts the disables that rank below it, unless some member of its family is still on.
    lift = bool(force) and all(name in switched_off for name in force)
    for lvl, name, source in disables:
        covered = set(registry.expand((name,))) & set(force)
        overrides.append(Override("disable", name, source, force_source if lift and covered and lvl > level else None))
    for name in force:
        if lift and switched_off[name][0] > level:
            del switched_off[name]

    prefer, prefer_source = (
        (context.prefer, "a context manager") if context.prefer is not None else (variables.prefer, "ATTNRT_PREFER")
    )
    if context.prefer is not None:
        overrides.append(Override("prefer", ", ".join(context.prefer), "a context manager"))
    if variables.prefer:
        overrides.append(
            Override(
                "prefer",
                ", ".join(variables.prefer),
                "ATTNRT_PREFER",
                prefer_source if context.prefer is not None else None,
            )
        )

    policies = [
        (spec, source)
        for spec, source in (
            (argument_policy, "the argument policy="),
            (context.policy, "a context manager"),
            (variables.policy, "ATTNRT_POLICY"),
        )
        if spec is not None
    ]
    for i, (spec, source) in enumerate(policies):
        overrides.append(
            Override("policy", str(getattr(spec, "name", spec)), source, None if i == 0 else policies[0][1])
        )
    spec, policy_source = policies[0] if policies else ("default", "")
    if variables.deterministic:
        overrides.append(Override("deterministic", "True", "NVTE_ALLOW_NONDETERMINISTIC_ALGO=0"))
    if variables.unfused_limit is not None:
        value = "unlimited" if variables.unfused_limit < 0 else f"{variables.unfused_limit} bytes"
        overrides.append(Override("unfused_limit", value, "ATTNRT_UNFUSED_LIMIT"))
    return Settings(
        force=force,
        force_name=force_name,
        force_source=force_source,
        prefer=prefer,
        prefer_source=prefer_source if prefer else "",
        disabled=tuple((name, source) for name, (_, source) in switched_off.items()),
        policy=load_policy(spec, registry.rankable()),
        policy_source=policy_source,
        unfused_limit=variables.unfused_limit,
        overrides=tuple(overrides),
    )


_environ: dict[Any, Any] = getattr(os.environ, "_data", {})
"""What os.environ wraps: a look-up here costs 30 ns, one in os.environ 1 us, and a call makes twelve."""


def _encoded(names: tuple[str, ...]) -> tuple[Any, ...]:
    encode = getattr(os.environ, "encodekey", None)
    return tuple(encode(n) if encode else n for n in names)


NAMES = (
    "ATTNRT_BACKEND",
    "ATTNRT_PREFER",
    "ATTNRT_DISABLE",
    "ATTNRT_POLICY",
    "ATTNRT_REPORT",
    "ATTNRT_CACHE_DIR",
    "ATTNRT_UNFUSED_LIMIT",
    "ATTNRT_VERIFY",
    "NVTE_FLASH_ATTN",
    "NVTE_FUSED_ATTN",
    "NVTE_UNFUSED_ATTN",
    "NVTE_ALLOW_NONDETERMINISTIC_ALGO",
)
"""Every environment variable that is read."""
environ_get = _environ.get
environ_keys = _environ.keys()
ENCODED = _encoded(NAMES)


def environ_values() -> list[Any]:
    """The variables' raw values now; compared with the last ones at each call, so a change takes effect at once."""
    return [*map(environ_get, ENCODED)]
