"""What a backend is: a name, a table of rules, and a way to make a kernel call.

Rules are data. One mechanism (`reasons`) evaluates every rule of a backend and never stops at the first, for the
report, the support matrix and the tests alike. A rule that fails never depends on another backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from attnrt.environment import Environment
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from torch import Tensor

    from attnrt.operands import Operands

    Run = Callable[[Tensor, Tensor, Tensor, Operands], Any]
    Forward = Callable[[Tensor, Tensor, Tensor, Operands], tuple[Tensor, Tensor, tuple[Tensor, ...]]]
    Backward = Callable[..., list[Tensor | None]]
"""`run(q, k, v, operands)` in the request's layout returns the output, or (output, lse) if the request asks for it."""


class Reason(NamedTuple):
    """Why a backend cannot serve a call."""

    rule: str
    message: str
    remedy: str | None = None


@dataclass(frozen=True)
class Rule:
    """One limit of a backend.

    Args:
        id: stable name, such as "FA2_HEAD_DIM".
        fails: True if this (request, environment) is refused.
        message: one sentence, with fields of `r` (the request) and `e` (the environment) in braces: "{r.head_dim}".
        remedy: what the user can do, in the same form.
        source: where the limit comes from. package: its installed version is "{version}" in the message.
    """

    id: str
    fails: Callable[[AttentionRequest, Environment], bool]
    message: str
    remedy: str | None = None
    source: str | None = None
    package: str | None = None

    def reason(self, request: AttentionRequest, environment: Environment) -> Reason:
        fill = {"r": request, "e": environment, "version": environment.version(self.package) if self.package else None}
        return Reason(self.id, self.message.format(**fill), self.remedy.format(**fill) if self.remedy else None)


def needs(
    id: str,
    package: str,
    at_least: str,
    used: Callable[[AttentionRequest, Environment], bool],
    what: str,
    remedy: str | None = None,
    source: str | None = None,
) -> Rule:
    """`what` came to the package in version `at_least`. Silent where it is not installed: another rule says that."""
    return Rule(
        id,
        lambda r, e: used(r, e) and e.lacks(package, f">={at_least}"),
        f"{package} {at_least} or later is needed for {what}; {{version}} is installed",
        remedy or f"pip install '{package}>={at_least}'",
        source,
        package,
    )


def needs_nvidia(prefix: str, title: str) -> Rule:
    """For kernels that run on NVIDIA GPUs only (a ROCm device is "cuda" too, but has no compute capability)."""
    return Rule(
        f"{prefix}_DEVICE",
        lambda r, e: e.device_type != "cuda" or e.sm is None,
        f"{title} needs an NVIDIA GPU; the tensors are on {{e.name}}",
    )


def between(environment: Environment, low: int, high: int = 1000) -> bool:
    """An NVIDIA GPU with low <= compute capability < high, as in 80 <= sm < 90."""
    return environment.sm is not None and low <= environment.sm < high


class Feature(NamedTuple):
    """Something a call may ask for that not every kernel has. What a kernel does not declare, a rule refuses."""

    name: str
    used: Callable[[AttentionRequest], bool]
    phrase: str
    opt_in: bool = False
    """Not in `FEATURE_NAMES`: k and v have another meaning, so a kernel must name it to be given such a call."""


FEATURES = (
    Feature("gqa", lambda r: r.heads_q != r.heads_kv, "grouped or multi-query heads"),
    Feature("unequal_head_dims", lambda r: r.head_dim_qk != r.head_dim_v, "head_dim_v other than head_dim_qk"),
    Feature("causal", lambda r: r.right == 0, "causal masking"),
    Feature("window", lambda r: r.windowed, "a sliding window"),
    Feature("top_left", lambda r: r.alignment == "top_left", "top-left alignment where Sq and Skv differ"),
    Feature("bottom_right", lambda r: r.alignment == "bottom_right", "bottom-right alignment where Sq and Skv differ"),
    Feature("mask", lambda r: r.mask is not None, "a boolean mask"),
    Feature("bias", lambda r: r.bias is not None, "an additive bias"),
    Feature("bias_grad", lambda r: r.bias is not None and r.bias.requires_grad, "a gradient for the bias"),
    Feature("alibi", lambda r: r.alibi is not None, "ALiBi slopes"),
    Feature("softcap", lambda r: r.softcap is not None, "a softcap"),
    Feature("sinks", lambda r: r.sinks, "attention sinks"),
    Feature("dropout", lambda r: r.dropout_p > 0, "dropout"),
    Feature("padding", lambda r: r.padded, "padding by seqlens"),
    Feature("packed", lambda r: r.packed, "packed sequences (layout 'thd')"),
    Feature("paged", lambda r: r.paged, "keys and values in pages (page_table)", opt_in=True),
    Feature("empty", lambda r: r.empty, "a call without any query or key"),
    Feature("lse", lambda r: r.needs_lse, "the log-sum-exp as an output"),
    Feature("backward", lambda r: r.needs_grad, "gradients"),
    Feature("lse_backward", lambda r: r.lse_backward, "a backward from a merged output and LSE (ring)", opt_in=True),
    Feature("deterministic", lambda r: r.deterministic and r.needs_grad, "a deterministic backward"),
    Feature("strided_last_dim", lambda r: r.strides == "last_dim", "a last dim that is not contiguous"),
    Feature("unaligned", lambda r: not r.aligned, "pointers or strides that are not multiples of 16 bytes"),
    Feature("cuda_graph", lambda r: r.capturing, "CUDA-graph capture"),
)
FEATURE_NAMES = frozenset(f.name for f in FEATURES if not f.opt_in)
OPT_IN_NAMES = frozenset(f.name for f in FEATURES if f.opt_in)
"""Added as `supports = FEATURE_NAMES | {"paged"}`, by a backend and by those of its kernels that take it."""


def _uses(feature: Feature) -> Callable[[AttentionRequest, Environment], bool]:
    return lambda request, environment: feature.used(request)


def feature_rules(prefix: str, title: str, supports: frozenset[str]) -> tuple[Rule, ...]:
    """One rule for each feature that is not in `supports`."""
    if unknown := supports - FEATURE_NAMES - OPT_IN_NAMES:
        raise ValueError(
            f"{prefix}: unknown features {sorted(unknown)}; valid are {sorted(FEATURE_NAMES | OPT_IN_NAMES)}"
        )
    return tuple(
        Rule(f"{prefix}_{f.name.upper()}", _uses(f), f"{title} does not take {f.phrase}")
        for f in FEATURES
        if f.name not in supports
    )


def reasons(rules: Sequence[Rule], request: AttentionRequest, environment: Environment) -> tuple[Reason, ...]:
    """Every rule that this request breaks in this environment."""
    return tuple(rule.reason(request, environment) for rule in rules if rule.fails(request, environment))


class Kernel:
    """One of several kernels that a backend picks among, in its own order of preference."""

    name: str
    title: str
    prefix: str
    supports: ClassVar[frozenset[str]] = FEATURE_NAMES
    rules: ClassVar[tuple[Rule, ...]] = ()
    fused: ClassVar[bool] = True
    """False if it holds the whole score matrix in memory."""
    compiles: ClassVar[bool] = False
    """The first call of each kind compiles or builds something, which `attnrt warmup` can do ahead."""

    def runs_on(self, environment: Environment) -> bool:
        """Whether it is meant for this kind of device at all; if not, a backend's other kernels are looked at alone."""
        return True

    @cached_property
    def all_rules(self) -> tuple[Rule, ...]:
        return (*feature_rules(self.prefix, self.title, self.supports), *self.rules)

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """Peak extra memory of one call beyond its inputs, in bytes: output, LSE, gradients, workspace."""
        return linear_bytes(request)

    def quadratic_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """How much of `bytes` grows with Sq * Skv: what a long call would run out of memory by."""
        return 0 if self.fused else self.bytes(request, environment)

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        """What the kernel does to serve the request that a user may want to know, such as a copy."""
        return ()

    def disk_cache(self) -> Path | None:
        """The folder in which it keeps what it compiles, there or not yet; None if it keeps nothing."""
        return None

    def answers(self) -> Mapping[str, str]:
        """What `answer` may say: ids of reasons, and a sentence for each."""
        return {}

    def answer(self, request: AttentionRequest, environment: Environment) -> tuple[Reason, ...]:
        """What the library itself has against a request that the rules accept; () if nothing.

        Asked on the machine that is here only, before `prepare`, and again for every choice: keep what it says.
        """
        return ()

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        """The call for every tensor set that matches the request. Import the package here, not before."""
        raise RuntimeError(f"{self.name} has no adapter in this release")

    def pair(self, request: AttentionRequest, environment: Environment) -> tuple[Forward, Backward]:
        """The call as two plain functions, called with gradients off, for whoever stands between them and autograd.

        `forward(q, k, v, operands) -> (out, lse, extra)`: the LSE is as `return_lse` gives it (float64 for fp64), and
        `extra` are further tensors that the backward needs, such as a seed.
        `backward(grad, q, k, v, out, lse, extra, operands, wanted) -> [dq, dk, dv, dbias, dsinks]`: `wanted` has five
        flags, and what is not wanted may be None. A kernel with the feature "lse_backward" takes `out` and `lse` that
        were merged over more keys than k and v hold, and gives these keys' share of the gradients.

        Raises:
            NotImplementedError: there is no such pair for this request. Compiled graphs then run `prepare`'s call
            forward again in the backward.
        """
        raise NotImplementedError(f"{self.title} has no backward of its own")


class Backend(Kernel):
    """A backend with one kernel: subclass, name it, declare what it takes, and write `prepare`.

    Attributes:
        name: what users write. title: how sentences start ("flash-attn 2"). prefix: of its rule ids ("FA2").
        family: the family name that stands for several backends, or None.
        supports: features from `FEATURES` it takes; every other one is refused by a rule made for it.
        rules: further limits. built: the adapter exists in this release.
    """

    family: ClassVar[str | None] = None
    built: ClassVar[bool] = True

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """In order of preference; by default the backend itself is its only kernel."""
        return (self,)


def linear_bytes(request: AttentionRequest) -> int:
    """Output and LSE, plus dq, dk, dv, the output gradient's row sums and a float32 dq for the backward."""
    r = request
    out = r.tokens_q * r.heads_q * (r.head_dim_v * r.itemsize + 4)
    if not r.needs_grad:
        return out
    dq = r.tokens_q * r.heads_q * (r.head_dim_qk * (r.itemsize + 4) + 4)
    dkv = r.tokens_kv * r.heads_kv * (r.head_dim_qk + r.head_dim_v) * r.itemsize
    return out + dq + dkv
