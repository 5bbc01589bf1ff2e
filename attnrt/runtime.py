"""From a call to a plan: bind, resolve, choose, prepare, remember. Everything here runs once per new signature."""

from __future__ import annotations

import sys
import warnings
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from attnrt import registry
from attnrt.decision import Decision
from attnrt.environment import Environment, forget
from attnrt.errors import AdvisoryWarning, AttnrtError, BackendFailed, BackendUnavailable, DemotionWarning
from attnrt.operands import Operands, bind
from attnrt.report import text
from attnrt.request import AttentionRequest
from attnrt.selector import select
from attnrt.settings import Context, Settings, check_policy, current_context, environ_values, resolve

if TYPE_CHECKING:
    from attnrt.backends.base import Run
    from attnrt.variables import Variables

MAX_PLANS = 4096
MAX_DEMOTED = 1024
BIG = 64 << 20
"""Bytes of scores from which free memory is read anew; below it the answer cannot matter."""


class Plan:
    """A decision with the call that carries it out. `watched`: something has to happen besides running it."""

    __slots__ = ("decision", "run", "verify", "watched")

    def __init__(self, decision: Decision, run: Run, watched: bool, verify: bool) -> None:
        self.decision, self.run, self.watched, self.verify = decision, run, watched, verify


plans: dict[Any, Plan] = {}
"""Plans by raw signature. Bounded: the oldest quarter goes when it is full."""


class Seen:
    """The environment variables as they were last parsed, with their raw values; `quiet`: none was set."""

    __slots__ = ("quiet", "values", "variables")

    def __init__(self) -> None:
        self.values: list[Any] = [object()]
        self.quiet = False
        self.variables: Variables | None = None


seen = Seen()
_demoted: dict[tuple[AttentionRequest, str], dict[str, str]] = {}
_announced: set[tuple[AttentionRequest, str | None]] = set()
_warned: set[str] = set()
_lock = Lock()


def variables() -> Variables:
    """The environment variables, parsed again if one of them changed.

    Raises:
        VariableError: malformed, or an `ATTNRT_` name that does not exist.
    """
    from attnrt.variables import read_variables

    values, known = environ_values(), seen.variables
    if known is None or values != seen.values:
        known = read_variables()
        with _lock:
            plans.clear()
            _settings.cache_clear()
            seen.variables, seen.values, seen.quiet = known, values, not any(v is not None for v in values)
    return known


def _forget_choices() -> None:
    with _lock:
        plans.clear()
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
    q: Any, k: Any, v: Any, operands: Operands, *, backend: Any, policy: Any, deterministic: Any, **options: Any
) -> Decision:
    """Check the call and choose for it; run nothing. `cast`: the dtype that autocast would give q, k and v."""
    chosen = settings(backend, policy)
    deterministic = wants_determinism(deterministic, chosen)
    request = bind(q, k, v, operands, deterministic=deterministic, **options)
    environment = Environment.detect(q.device)
    if request.scores * 4 > BIG:
        environment = environment.with_free_memory()
    return choose(request, environment, chosen)


def wants_determinism(argument: Any, chosen: Settings) -> Any:
    """The argument if it is given, else whether torch, the environment or the policy asks for it."""
    if argument is not None:
        return argument
    by_policy = chosen.policy is not None and chosen.policy.deterministic
    return by_policy or variables().deterministic or torch.are_deterministic_algorithms_enabled()


def choose(request: AttentionRequest, environment: Environment, chosen: Settings) -> Decision:
    demoted = None if environment.simulated else _demoted.get((request, environment.name))
    return select(request, environment, chosen, registry.backends(), demoted)


def plan(key: Any, q: Any, k: Any, v: Any, operands: Operands, options: dict[str, Any]) -> Plan:
    """Choose and prepare, and remember it under `key` (None: do not).

    Raises:
        BackendUnavailable: nothing, or not the forced backend, can serve the call. BackendFailed: it cannot start.
    """
    while True:
        decision = decide(q, k, v, operands, **options)
        if decision.backend is None:
            raise BackendUnavailable(text(decision), decision)
        backend = registry.backends()[decision.backend]
        kernel = next((n for n in backend.kernels if n.name == decision.kernel), backend)
        try:
            run = kernel.prepare(decision.request, decision.environment)
            break
        except Exception as error:
            demote(error, decision)
    values = variables()
    guarded = decision.winner is not None and decision.winner.quadratic_bytes > BIG
    made = Plan(decision, run, guarded or values.report != "off" or values.verify, values.verify)
    _warn_of_advisories(decision)
    if key is not None:
        remember(key, made)
    return made


def remember(key: Any, made: Plan) -> None:
    with _lock:
        if len(plans) >= MAX_PLANS:
            for old in list(plans)[: MAX_PLANS // 4]:
                del plans[old]
        plans[key] = made


def demote(error: Exception, decision: Decision) -> None:
    """Record that the chosen kernel failed, if the policy goes on to the next; raise if it does not.

    Raises:
        BackendFailed: the policy says `on_failure: raise`, or the backend was forced.
    """
    if isinstance(error, AttnrtError):
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
    with _lock:
        if len(_demoted) >= MAX_DEMOTED:
            _demoted.clear()
        _demoted.setdefault((decision.request, decision.environment.name), {})[decision.backend] = (
            f"{type(error).__name__}: {error}"
        )
        for key in [key for key, made in plans.items() if made.decision.request == decision.request]:
            del plans[key]
    warnings.warn(f"attnrt: {summary}; trying the next backend", DemotionWarning, stacklevel=4)


def examine(made: Plan, q: Tensor, k: Tensor, v: Tensor, operands: Operands, options: dict[str, Any]) -> Plan:
    """Before a watched plan runs: look at its room anew if it takes memory as large as the scores, announce it, verify
    it. Returns the plan to run, which is another one for this call if there is no room now."""
    winner = made.decision.winner
    assert winner is not None
    if winner.quadratic_bytes > BIG:
        chosen = settings(options["backend"], options["policy"])
        again = choose(made.decision.request, made.decision.environment.with_free_memory(), chosen)
        if again.label != made.decision.label:
            made = plan(None, q, k, v, operands, options)
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
    with _lock:
        plans.clear()
        _demoted.clear()
        _announced.clear()
        _warned.clear()
        seen.variables = None
    variables()
