"""What the user overrides: environment variables, context managers, arguments, and which of them wins.

Precedence: argument over context over environment over policy. Forcing, preferring and disabling are three things:
a forced backend runs or the call raises; a preferred one goes first if it is eligible; a disabled one is refused.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass
from functools import lru_cache
from threading import get_ident
from typing import TYPE_CHECKING, Any, Literal

import torch

from attnrt import registry
from attnrt.errors import ArgumentTypeError, UnknownNameError

if TYPE_CHECKING:
    from attnrt.policies.base import Policy
    from attnrt.variables import Variables

PolicySpec = Any
"""A built-in policy's name, the path of a YAML file, or a Policy."""
LEVELS = ("argument", "context", "environment")
What = Literal["force", "prefer", "disable", "policy", "unfused_limit", "deterministic"]


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
    words: str = ""
    """The same as text, by which a traced graph holds a block that was opened inside it."""
    beaten: tuple[tuple[What, str], ...] = ()
    """What outer blocks asked for and inner ones overrode, for the report."""


@lru_cache(maxsize=1024)
def _context_of(
    backend: str | None,
    lifted: bool,
    prefer: tuple[str, ...] | None,
    disable: tuple[str, ...],
    policy: PolicySpec,
    beaten: tuple[tuple[What, str], ...],
) -> Context:
    # repr tells an empty preference from none, and a policy's name from a policy.
    named = policy if policy is None or isinstance(policy, str) else f"{type(policy).__name__}#{id(policy):x}"
    said = {"backend": None if backend is None and lifted else backend or "", "prefer": prefer, "policy": named}
    off = {"backend": "", "prefer": None, "policy": None}
    words = [f"{name}={value!r}" for name, value in said.items() if value != off[name]]
    words += [f"disable={disable!r}"] if disable else []
    if backend is not None and lifted:
        words.append("lifted")
    made = Context(backend, lifted, prefer, disable, policy, " ".join(words), beaten)
    if not beaten:
        _by_words[made.words] = made
    return made


_by_words: dict[str, Context] = {}
NO_CONTEXT = _context_of(None, False, None, (), None, ())
_context: ContextVar[Context] = ContextVar("attnrt_context", default=NO_CONTEXT)
own_context = _context.get
_TLS = "attnrt_context"
"""Where PyTorch's own thread-local state has it too: autograd's engine hands that to its threads, but no ContextVar."""
_graph_task = torch._C._current_graph_task_id
_dynamo = torch.compiler.is_dynamo_compiling
traced_blocks: list[str] = []
"""The words of the blocks open in the code that dynamo is tracing, which cannot set a ContextVar. Empty otherwise."""


def current_context() -> Context:
    """The overrides in force here. In a backward pass, which on a GPU runs in a thread of autograd's own, those of the
    thread that asked for it: a checkpoint calls `attention` again there."""
    context = own_context()
    return inherited_context() if context is NO_CONTEXT and _graph_task() != -1 else context


def inherited_context() -> Context:
    """In a backward pass without overrides of its own."""
    holder = _holder()
    return NO_CONTEXT if holder is None or holder.thread == get_ident() else holder.context


class _Holder:
    """A thread's overrides, where autograd's threads find them while it waits for a backward pass."""

    __slots__ = ("context", "thread")

    def __init__(self, context: Context) -> None:
        self.context, self.thread = context, get_ident()


_held: list[tuple[_Holder, _Holder]] = []
"""Two references to each: torch 2.11 gives one up that it never took, when the thread ends."""


def _holder() -> _Holder | None:
    """This thread's, or in a thread of autograd's that of the one that asked for the backward pass."""
    return torch._C._get_obj_in_tls(_TLS) if torch._C._is_key_in_tls(_TLS) else None


def _open(context: Context) -> Token[Context]:
    token = _context.set(context)
    _hold(context)
    return token


def _close(token: Token[Context]) -> None:
    _context.reset(token)
    _hold(own_context())


def _hold(context: Context) -> None:
    holder = _holder()
    if holder is None:
        holder = _Holder(context)
        _held.append((holder, holder))
        torch._C._stash_obj_in_tls(_TLS, holder)
    elif holder.thread == get_ident():
        holder.context = context


def _words_of(backend: str | None, prefer: Any, disable: Any, policy: PolicySpec, lifted: bool) -> str:
    """Checked and registered while a graph is traced."""
    block = use_backend(None) if lifted else override(backend=backend, prefer=prefer, disable=disable, policy=policy)
    return block._changes.words


_words_of._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see tracing.constant


@contextmanager
def reentered(blocks: str) -> Iterator[None]:
    """Inside the blocks that a graph was traced in, as `BETWEEN` joins their words, within those open now.

    Raises:
        UnknownNameError: a graph from another process has blocks that this one does not know.
    """
    context = current_context()
    for words in blocks.split(BETWEEN) if blocks else ():
        if words not in _by_words:
            raise UnknownNameError("overrides", words, _by_words)
        context = _inner(context, _by_words[words])
    token = _open(context)
    try:
        yield
    finally:
        _close(token)


BETWEEN = " > "


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
        if _dynamo():
            self._words = _words_of(backend, prefer, disable, policy, False)
            return
        if backend is not None:
            registry.check_name("backend", backend)
        check_policy("policy", policy)
        self._changes = _context_of(
            backend,
            False,
            None if prefer is None else names("prefer", prefer),
            names("disable", disable, kernels=True),
            policy,
            (),
        )
        self._tokens: list[Token[Context]] = []
        self._words = self._changes.words

    def __enter__(self) -> None:
        if _dynamo():
            traced_blocks.append(self._words)
            return
        self._tokens.append(_open(_inner(current_context(), self._changes)))

    def __exit__(self, *exc: object) -> None:
        if _dynamo():
            traced_blocks.pop()
            return
        _close(self._tokens.pop())

    def __call__(self, function: Any) -> Any:
        from functools import wraps

        changes, words = self._changes, self._words

        @wraps(function)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if _dynamo():
                traced_blocks.append(words)
                result = function(*args, **kwargs)
                traced_blocks.pop()
                return result
            token = _open(_inner(current_context(), changes))
            try:
                return function(*args, **kwargs)
            finally:
                _close(token)

        return wrapped


class use_backend(override):
    """Force one backend (or family) inside a `with` block: it runs, or the call raises. None lifts an outer force."""

    def __init__(self, backend: str | None) -> None:
        super().__init__(backend=backend)
        if backend is None:
            if _dynamo():
                self._words = _words_of(None, None, (), None, True)
                return
            self._changes = _context_of(None, True, None, (), None, ())
            self._words = self._changes.words


@lru_cache(maxsize=1024)
def _inner(outer: Context, changes: Context) -> Context:
    forced = changes.backend is not None or changes.lifted
    freed = registry.expand((changes.backend,)) if changes.backend else ()
    # An inner force outranks an outer disable, as an argument outranks a context.
    kept = [n for n in outer.disable if not set(registry.expand((n,))) & set(freed)]
    beaten: list[tuple[What, str]] = [*outer.beaten]
    if forced and outer.backend not in (None, changes.backend):
        beaten.append(("force", outer.backend))
    if changes.prefer is not None and outer.prefer not in (None, changes.prefer):
        beaten.append(("prefer", ", ".join(outer.prefer)))
    beaten += [("disable", n) for n in outer.disable if n not in kept]
    if changes.policy is not None and outer.policy not in (None, changes.policy):
        beaten.append(("policy", _policy_name(outer.policy)))
    return _context_of(
        changes.backend if forced else outer.backend,
        changes.lifted or (outer.lifted and not forced),
        outer.prefer if changes.prefer is None else changes.prefer,
        tuple(dict.fromkeys((*kept, *changes.disable))),
        outer.policy if changes.policy is None else changes.policy,
        tuple(dict.fromkeys(beaten)),  # once, however deep the blocks stand: contexts are keys of a cache
    )


def _policy_name(spec: PolicySpec) -> str:
    return str(getattr(spec, "name", spec))


def check_policy(argument: str, spec: Any) -> None:
    if spec is None:
        return
    from attnrt.policies.base import Policy

    if not isinstance(spec, (str, os.PathLike, Policy)):
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

    what: What
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
    forces: list[tuple[int, str, str]] = []
    beaten = [Override(what, value, "an outer context manager", "an inner one") for what, value in context.beaten]
    if argument_backend is not None:
        registry.check_name("backend", argument_backend)
        forces.append((0, argument_backend, "the argument backend="))
    if context.backend is not None:
        forces.append((1, context.backend, "a context manager"))
    if variables.backend is not None and not (context.lifted and argument_backend is None):
        forces.append((2, variables.backend, "ATTNRT_BACKEND"))
    elif variables.backend is not None:
        beaten.append(Override("force", variables.backend, "ATTNRT_BACKEND", "use_backend(None)"))
    level, force_name, force_source = forces[0] if forces else (len(LEVELS), None, "")
    overrides = [Override("force", n, s, None if i == 0 else force_source) for i, (_, n, s) in enumerate(forces)]
    overrides += beaten

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
        overrides.append(Override("policy", _policy_name(spec), source, None if i == 0 else policies[0][1]))
    spec, policy_source = policies[0] if policies else (None, "")
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
        policy=_policy(spec, variables),
        policy_source=policy_source,
        unfused_limit=variables.unfused_limit,
        overrides=tuple(overrides),
    )


def _policy(spec: PolicySpec, variables: Variables) -> Policy:
    """The policy that was asked for; if none was, the tuned one of this machine, or the default."""
    from attnrt.policies.preference import MEASURED, load_policy

    measured = isinstance(spec, str) and spec in MEASURED
    if not measured and (spec is not None or (not os.path.isdir(variables.cache_dir / "tuned") and not _in_a_job())):
        return load_policy("default" if spec is None else spec, registry.rankable())
    from attnrt.evidence.store import tuned_policy

    static = load_policy("default", registry.rankable())
    if spec == "measure":
        from attnrt.evidence.on_call import measuring_policy

        return measuring_policy(variables.cache_dir, static)
    return tuned_policy(variables.cache_dir, static, automatic=spec is None)


def _in_a_job() -> bool:
    """Other ranks may have a tuned policy where this one has none."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


_environ: dict[Any, Any] = getattr(os.environ, "_data", {})
"""What os.environ wraps: a look-up here costs 30 ns, one in os.environ 1 us. A call compares it with what was
last parsed, so a change takes effect at once."""


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
environ_keys, environ_items, environ_in_order = _environ.keys(), _environ.items(), _environ.values()
ENCODED = _encoded(NAMES)


def newest_variable() -> tuple[Any, object]:
    """The names or the values of all variables, in order, and the last of them as an object. While that is the same
    object, none was added: os.environ keeps them in order, and encodes both anew whenever one is set. Python has but
    one object of each text of one letter, so a name like "_" is no such object, and its value is taken."""
    for view in (environ_keys, environ_in_order):
        newest = next(reversed(view), "")
        if len(newest) > 1:
            return view, newest
    return environ_keys, object()


def environ_values() -> list[Any]:
    """The variables' raw values now, in the order of NAMES."""
    return [*map(environ_get, ENCODED)]
