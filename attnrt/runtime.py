"""From a call to a plan: bind, resolve, choose, prepare, remember. Everything here runs once per new signature."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
import torch.utils.checkpoint as _checkpoint
from torch import Tensor

from attnrt import registry
from attnrt.backends.base import Reason
from attnrt.decision import Decision, Verdict
from attnrt.environment import Environment, forget
from attnrt.errors import AdvisoryWarning, AttnrtError, BackendFailed, BackendUnavailable, DemotionWarning
from attnrt.garbage import put_off_once
from attnrt.operands import Operands, bind
from attnrt.pins import Pin, pinned
from attnrt.repeats import Repeat
from attnrt.report import text
from attnrt.request import AttentionRequest
from attnrt.selector import select
from attnrt.settings import (
    ENCODED,
    Context,
    Settings,
    check_policy,
    current_context,
    environ_items,
    environ_keys,
    environ_values,
    newest_variable,
    resolve,
)

if TYPE_CHECKING:
    from attnrt.backends.base import Kernel, Run
    from attnrt.variables import Variables

_OURS = frozenset(ENCODED)
Failed = Mapping[str, Reason]
"""Backends that cannot serve a call, because they failed in it or before."""
MAX_PLANS = 4096
MAX_DEMOTED = 1024
MAX_REPEATS = 1024
BY_ARGUMENT = "the argument deterministic="
BIG = 64 << 20
"""Bytes of scores from which free memory is read anew; below it the answer cannot matter."""


class Plan:
    """A decision with the call that carries it out. `watched`: something has to happen besides running it.

    `halves`: the same call as a forward and a backward, once an operator has asked for them. `layout`: the request's.
    """

    __slots__ = ("decision", "halves", "kernel", "layout", "run", "verify", "watched")

    def __init__(self, decision: Decision, kernel: Kernel, run: Run, watched: bool, verify: bool) -> None:
        self.decision, self.kernel, self.run, self.watched, self.verify = decision, kernel, run, watched, verify
        self.layout = decision.request.layout
        self.halves: Any = None


plans: dict[Any, Plan] = {}
"""Plans by raw signature. Bounded: the oldest quarter goes when it is full."""
repeats: dict[Any, Repeat] = {}
"""The last call with each set of options. Bounded: all go when it is full."""


class Seen:
    """The environment variables as they were last parsed: `absent` the names of those that were not set, `present` the
    others with their raw values, `quiet` whether there was none, `all` and `newest` what `settings.newest_variable`
    gave. And whether there are several GPUs; None before the first call on one."""

    __slots__ = ("absent", "all", "newest", "present", "quiet", "several_gpus", "variables")

    def __init__(self) -> None:
        self.absent, self.present, self.quiet = _OURS, {object(): None}.items(), False
        self.variables: Variables | None = None
        self.all: Any = environ_keys
        self.newest: object = None
        self.several_gpus: bool | None = None


seen = Seen()
on_refresh: list[Callable[[], None]] = []
"""Called by `refresh`, for what is remembered elsewhere."""
_NOT_THE_KERNELS = (
    _checkpoint.CheckpointError,
    getattr(_checkpoint, "_StopRecomputationError", _checkpoint.CheckpointError),
)
"""Raised through a kernel by torch.utils.checkpoint's hooks on the tensors it saves: an early stop, not a failure."""
_demoted: dict[tuple[AttentionRequest, str], dict[str, Reason]] = {}
_announced: set[tuple[AttentionRequest, str | None]] = set()
_warned: set[str] = set()
_lock = Lock()


def variables() -> Variables:
    """The environment variables, parsed again if one of them changed.

    Raises:
        VariableError: malformed, or an `ATTNRT_` name that does not exist.
    """
    from attnrt.variables import read_variables

    known = seen.variables
    if known is None or not variables_are_known():
        values = environ_values()
        known = read_variables()
        given = {name: value for name, value in zip(ENCODED, values, strict=True) if value is not None}
        with _lock:
            _forget_plans()
            _settings.cache_clear()
            seen.variables, seen.quiet = known, False
            seen.present, seen.absent = given.items(), _OURS - given.keys()
            seen.quiet = not given
    return known


def variables_are_known() -> bool:
    """They are as they were last parsed. A call like the last one asks for less: whether `seen.newest` is still the
    newest, and those that are present as they were."""
    every, newest = newest_variable()  # before the others are looked at: another thread may set one
    if environ_keys.isdisjoint(seen.absent) and (seen.quiet or seen.present <= environ_items):
        seen.all, seen.newest = every, newest
        return True
    return False


def _forget_plans() -> None:
    """`repeats` last: see `repeated`."""
    plans.clear()
    repeats.clear()


def _forget_choices() -> None:
    with _lock:
        _forget_plans()
        seen.variables = None  # names in them may be unknown now


registry.on_change.append(_forget_choices)


@lru_cache(maxsize=256)
def _settings(backend: Any, policy: Any, context: Context, values: Variables) -> Settings:
    return resolve(backend, policy, context, values)


def settings(backend: Any, policy: Any) -> Settings:
    """The overrides in force here and now."""
    if backend is not None:
        registry.check_name("backend", backend)
    check_policy("policy", policy)
    return _settings(backend, policy, current_context(), variables())


def decide(
    q: Any,
    k: Any,
    v: Any,
    operands: Operands,
    *,
    backend: Any,
    policy: Any,
    deterministic: Any,
    pin: Pin | None = None,
    failed: Failed | None = None,
    every: bool = False,
    **options: Any,
) -> Decision:
    """Check the call and choose for it; run nothing.

    Args:
        pin: what a graph holds as its choice. failed: backends that ran out of memory in this call.
        every: ask every eligible kernel's library for its own word, not the winner's alone. options: what `bind` takes.
    """
    chosen, deterministic = determinism(settings(backend, policy), deterministic)
    request = bind(q, k, v, operands, deterministic=deterministic, **options)
    environment = Environment.detect(q.device)
    if request.scores * 4 > BIG:
        environment = environment.with_free_memory()
    return choose(request, environment, chosen, pin, failed, every)


def determinism(chosen: Settings, argument: Any) -> tuple[Settings, Any]:
    """The overrides, and whether the backward is to be deterministic: the argument if it is given, which then outranks
    the environment's word, else whether torch, the environment or the policy asks for it."""
    if argument is None:
        by_policy = chosen.policy is not None and chosen.policy.deterministic
        return chosen, by_policy or variables().deterministic or torch.are_deterministic_algorithms_enabled()
    if any(o.what == "deterministic" for o in chosen.overrides):
        said = [replace(o, beaten_by=BY_ARGUMENT) if o.what == "deterministic" else o for o in chosen.overrides]
        chosen = replace(chosen, overrides=tuple(said))
    return chosen, argument


def allowed(request: AttentionRequest, chosen: Settings) -> AttentionRequest:
    """The request with what the policy allows a kernel to do for it."""
    may_pad = chosen.policy is not None and chosen.policy.allow_padding
    return request if request.may_pad == may_pad else replace(request, may_pad=may_pad)


def choose(
    request: AttentionRequest,
    environment: Environment,
    chosen: Settings,
    pin: Pin | None = None,
    failed: Failed | None = None,
    every: bool = False,
) -> Decision:
    """The choice, once the winner's library (on a machine that is here; with `every`, each eligible one's) agrees."""
    backends = registry.backends()
    request = allowed(request, chosen)
    if environment.simulated:
        return pinned(select(request, environment, chosen, backends), pin, chosen)
    refused = {**_demoted.get((request, environment.name), {}), **(failed or {})}
    answers: dict[str, tuple[Reason, ...]] = {}
    while True:
        decision = pinned(select(request, environment, chosen, backends, refused, answers), pin, chosen)
        verdicts = decision.verdicts.values() if every else (decision.winner,)
        asked = [v for v in verdicts if v is not None and v.eligible and _name(v) not in answers]
        for verdict in asked:
            answers[_name(verdict)] = kernel_of(verdict).answer(request, environment)
        if not any(answers[_name(v)] for v in asked):
            return decision


def _name(verdict: Verdict) -> str:
    return f"{verdict.backend}.{verdict.kernel}" if verdict.kernel else verdict.backend


def kernel_of(verdict: Verdict) -> Kernel:
    """The kernel that an eligible verdict means."""
    backend = registry.backends()[verdict.backend]
    return next((k for k in backend.kernels if k.name == verdict.kernel), backend)


def plan(
    key: Any,
    q: Any,
    k: Any,
    v: Any,
    operands: Operands,
    options: dict[str, Any],
    failed: Failed | None = None,
) -> Plan:
    """Choose and prepare, and remember it under `key` (None: do not; nor where something `failed` in this call only).

    Raises:
        BackendUnavailable: nothing, or not the forced backend, can serve the call. BackendFailed: it cannot start.
    """
    while True:
        with put_off_once():
            decision = decide(q, k, v, operands, failed=failed, **options)
        chosen = settings(options["backend"], options["policy"])
        if chosen.policy is not None and chosen.policy.measures:
            from attnrt.evidence.on_call import measure_once

            if measure_once(decision.request, decision.environment, chosen, q, k, v, operands):
                decision = decide(q, k, v, operands, failed=failed, **options)
        if decision.backend is None:
            raise BackendUnavailable(text(decision), decision)
        assert decision.winner is not None
        kernel = kernel_of(decision.winner)
        try:
            run = kernel.prepare(decision.request, decision.environment)
            break
        except Exception as error:
            failed = {**(failed or {}), **demote(error, decision)}
    values = variables()
    guarded = decision.winner is not None and decision.winner.quadratic_bytes > BIG
    made = Plan(decision, kernel, run, guarded or values.report != "off" or values.verify, values.verify)
    _warn_of_advisories(decision)
    if key is not None and not failed:
        remember(key, made)
    return made


def remember(key: Any, made: Plan) -> None:
    with _lock:
        if len(plans) >= MAX_PLANS:
            for old in list(plans)[: MAX_PLANS // 4]:
                del plans[old]
        plans[key] = made


def repeated(options: Any, repeat: Repeat, key: Any) -> None:
    """Note it, unless its plan has just been forgotten."""
    if len(repeats) >= MAX_REPEATS:
        repeats.clear()
    repeats[options] = repeat
    if plans.get(key) is not repeat.made:
        repeats.pop(options, None)


def demote(error: Exception, decision: Decision) -> Failed:
    """Record that the chosen kernel failed, if the policy goes on to the next; raise if it does not.

    Returns:
        What failed in this call only: memory that ran out may be there at the next call, so that is not remembered.

    Raises:
        BackendFailed: the policy says `on_failure: raise`, or the backend was forced.
    """
    if isinstance(error, (AttnrtError, *_NOT_THE_KERNELS)):
        raise error
    summary = f"{decision.label} failed: {type(error).__name__}: {error}"
    if decision.forced or decision.on_failure != "next":
        if isinstance(error, torch.OutOfMemoryError):
            error.add_note(f"attnrt ran {decision.label}: {decision.why}")
            raise error
        remedy = (
            "it was forced" if decision.forced else "the policy says on_failure: raise; `next` would try the next one"
        )
        raise BackendFailed(f"{summary} ({remedy}); the call was {decision.request.describe()}", decision) from error
    assert decision.backend is not None
    said = f"{type(error).__name__}: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        warnings.warn(f"attnrt: {summary}; trying the next backend in this call", DemotionWarning, stacklevel=4)
        reason = Reason("OUT_OF_MEMORY", f"it ran out of memory in this call: {said}", "free some; the next call tries")
        return {decision.backend: reason}
    with _lock:
        if len(_demoted) >= MAX_DEMOTED:
            _demoted.clear()
        _demoted.setdefault((decision.request, decision.environment.name), {})[decision.backend] = Reason(
            "DEMOTED", f"it failed for this request: {said}", "attnrt.refresh() forgets demotions"
        )
        for key in [key for key, made in plans.items() if made.decision.request == decision.request]:
            del plans[key]
        repeats.clear()
    warnings.warn(f"attnrt: {summary}; trying the next backend", DemotionWarning, stacklevel=4)
    return {}


def examine(
    made: Plan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    operands: Operands,
    options: dict[str, Any],
    failed: Failed | None = None,
) -> Plan:
    """Before a watched plan runs: look at its room anew if it takes memory as large as the scores, announce it, verify
    it. Returns the plan to run, which is another one for this call if there is no room now."""
    winner = made.decision.winner
    assert winner is not None
    if winner.quadratic_bytes > BIG:
        chosen = settings(options["backend"], options["policy"])
        environment = made.decision.environment.with_free_memory()
        again = choose(made.decision.request, environment, chosen, options.get("pin"), failed)
        if again.label != made.decision.label:
            made = plan(None, q, k, v, operands, options, failed)
    announce(made.decision)
    if made.verify:
        from attnrt.verify import check

        check(made.decision, made.run, q, k, v, operands)
        made.verify = False
    return made


def announce(decision: Decision) -> None:
    """What ATTNRT_REPORT asks for: the report of each new decision, and with "each" a line for every other call."""
    mode = variables().report
    mark = (decision.request, decision.backend)
    if mode == "off":
        return
    if mark not in _announced:
        if len(_announced) >= MAX_PLANS:
            _announced.clear()
        _announced.add(mark)
        print(text(decision, sys.stderr), file=sys.stderr)
    elif mode == "each":
        print(f"attnrt: {decision.label} for {decision.request.describe()}: {decision.why}", file=sys.stderr)


def _warn_of_advisories(decision: Decision) -> None:
    for advisory in decision.winner.warnings if decision.winner else ():
        if advisory.id not in _warned:
            _warned.add(advisory.id)
            warnings.warn(
                f"attnrt: {decision.label}: {advisory.effect} ({advisory.source})", AdvisoryWarning, stacklevel=5
            )


def refresh() -> None:
    """Read the environment variables, policies and installed packages again, and forget every choice and demotion.

    Raises:
        VariableError: malformed, or an `ATTNRT_` name that does not exist.
    """
    from attnrt.policies.preference import forget_policies

    forget()
    forget_policies()
    for also in on_refresh:
        also()
    with _lock:
        _forget_plans()
        _demoted.clear()
        _announced.clear()
        _warned.clear()
        seen.variables = None
    variables()
