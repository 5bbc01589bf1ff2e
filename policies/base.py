"""What a policy is: an order of preference for one request in one environment, with its evidence."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from attnrt.environment import Environment
    from attnrt.request import AttentionRequest

REST = "*"
"""In an order: every registered backend that is not named elsewhere in it."""


class Ranking(NamedTuple):
    """A policy's answer. Backends that `order` neither names nor covers with "*" are not candidates."""

    order: tuple[str, ...]
    """Backend or family names, best first."""
    line: str
    """What decided, as the report shows it: "default: Hopper, decode"."""
    why: str
    """The evidence for this order."""


class InformedRanking(Ranking):
    """A ranking with more to say; still the three values of one.

    Attributes:
        policy: whose answer this is, where a policy asks another one.
        notices: what else a reader of the report should know: evidence that was left out, and why.
        wrong: (backend or backend.kernel, sentence): found to give wrong results for calls like this, so refused.
    """

    policy: str | None = None
    notices: tuple[str, ...] = ()
    wrong: tuple[tuple[str, str], ...] = ()


def informed(
    ranking: Ranking,
    *,
    policy: str | None = None,
    notices: tuple[str, ...] = (),
    wrong: tuple[tuple[str, str], ...] = (),
) -> InformedRanking:
    """A ranking with more to say, beside what it says already."""
    made = InformedRanking(*ranking)
    before = ranking if isinstance(ranking, InformedRanking) else made
    made.policy = policy or before.policy
    made.notices, made.wrong = (*before.notices, *notices), (*before.wrong, *wrong)
    return made


class Policy(ABC):
    """Subclass it, name it, and write `rank`. One object is one policy: it is hashed and compared by identity.

    Attributes:
        name: as the report shows it. description: one sentence. source: the file it came from, or "<object>".
        on_failure: when the chosen kernel fails at run time, "raise", or go on to the "next" candidate with a warning.
        deterministic: every backward must be deterministic, unless the call itself says `deterministic=False`.
        allow_padding: kernels without this head dim may copy q, k and v into a larger one, with zeros behind them; the
            report has the bytes.
        measures: it times a request's kernels on the first call's tensors, as "measure" does.
    """

    name: str
    description: str = ""
    on_failure: Literal["raise", "next"] = "raise"
    deterministic: bool = False
    allow_padding: bool = False
    source: str = "<object>"
    measures: bool = False

    @abstractmethod
    def rank(self, request: AttentionRequest, environment: Environment) -> Ranking:
        """The order for this request here. Must depend on nothing else: the answer is cached."""
