"""`attnrt doctor`: is this machine set up right, is every kernel right, and what would make it faster?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib import resources
from typing import Any

import yaml

from attnrt import registry, runtime
from attnrt.backends.base import Reason
from attnrt.environment import PACKAGES, Environment
from attnrt.errors import DeviceLost
from attnrt.evidence.accuracy import truth_of, worst
from attnrt.evidence.calls import Call, device_of, tensors
from attnrt.evidence.candidates import Candidate, every_candidate, refusals
from attnrt.evidence.checks import Check, every_check
from attnrt.evidence.measuring import lost
from attnrt.evidence.timing import said
from attnrt.evidence.trials import Trials, try_calls
from attnrt.report import machine
from attnrt.request import AttentionRequest
from attnrt.selector import select

COMPILE_SECONDS = 120.0
"""What first calls may take before any is compared."""
INSTALL = {
    "nvidia-cudnn-frontend": ("1.28.0", "pip install 'attnrt[cudnn]'"),
    "triton": ("3.6.0", "pip install 'attnrt[triton]'"),
    "flash-attn": ("2.8.3", "pip install 'attnrt[flash]' --no-build-isolation"),
    "flash-attn-3": ("3.0.0", "build the hopper folder of github.com/Dao-AILab/flash-attention"),
    "flash-attn-4": ("4.0.0b36", "pip install 'flash-attn-4==4.0.0b36'"),
}
"""What could be added: a version that the rules know, and how."""


@dataclass
class Verdict:
    """What one kernel gave on the cases it takes."""

    kernel: str
    right: int = 0
    nearest: float = 0.0
    """The largest error over what is allowed, of those that were right."""
    wrong: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    refused: tuple[Reason, ...] = ()
    """Why it takes none of them."""

    @property
    def status(self) -> str:
        return "WRONG" if self.wrong else "failed" if self.failed else "right" if self.right else "not here"

    def said(self) -> str:
        """What happened, for one line of a table."""
        faults = [f"{case}: {said}" for case, said in (self.wrong | self.failed).items()]
        if faults:
            return "; ".join(faults)
        if self.right:
            return f"{self.right} calls against float64, at most {self.nearest:.0%} of what is allowed"
        return "; ".join(dict.fromkeys(f"{r.message}{f' -> {r.remedy}' if r.remedy else ''}" for r in self.refused))


@dataclass
class Advice:
    """Something to install, what would then be chosen, and how much faster that is said to be."""

    package: str
    how: str
    kernel: str
    calls: list[str]
    estimate: str


@dataclass
class Examination:
    """Everything that was found."""

    environment: Environment
    checks: list[Check]
    verdicts: list[Verdict]
    advice: list[Advice]
    lost: str | None = None
    """Why the GPU could not be used any more, where that ended it."""

    @property
    def healthy(self) -> bool:
        faults = [v for v in self.verdicts if v.wrong or v.failed]
        return not faults and self.lost is None and all(c.status != "failed" for c in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "healthy": self.healthy,
            "lost": self.lost,
            "environment": self.environment.to_dict(),
            "checks": [c._asdict() for c in self.checks],
            "kernels": [
                {
                    "kernel": v.kernel,
                    "status": v.status,
                    "right": v.right,
                    "nearest": v.nearest,
                    "wrong": v.wrong,
                    "failed": v.failed,
                    "refused": [r._asdict() for r in v.refused],
                }
                for v in self.verdicts
            ],
            "advice": [vars(a) for a in self.advice],
        }

    def to_markdown(self) -> str:
        """For a bug report."""

        def cell(text: str | None) -> str:
            return (text or "").replace("|", "\\|").replace("\n", " ")

        lines = ["### attnrt doctor", "", f"- **machine**: {cell(machine(self.environment))}"]
        lines += ["", "| checked | | found | remedy |", "|---|---|---|---|"]
        lines += [f"| {c.subject} | {c.status} | {cell(c.said)} | {cell(c.remedy)} |" for c in self.checks]
        if self.lost is not None:
            lines += ["", f"**Ended early**: {cell(self.lost)}"]
        lines += ["", "| kernel | verdict | |", "|---|---|---|"]
        lines += [f"| {v.kernel} | {v.status} | {cell(v.said())} |" for v in self.verdicts]
        if self.advice:
            lines += ["", "| to go faster | chosen then | for | estimated |", "|---|---|---|---|"]
            lines += [
                f"| {cell(a.how)} | {a.kernel} | {', '.join(a.calls)} | {cell(a.estimate)} |" for a in self.advice
            ]
        return "\n".join(lines)


def examine(
    environment: Environment,
    common: Mapping[str, Mapping[str, Any]],
    run: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Examination:
    """Look at everything; `run`: also run the kernels. common: shapes by name that advice is given for."""
    tell = progress or (lambda text: None)
    tell("versions, packages and files")
    checks = every_check(environment)
    verdicts: list[Verdict] = []
    ended = None
    if run:
        trials = try_calls(
            cases(environment).values(),
            environment,
            runtime.settings(None, "default"),
            seconds=COMPILE_SECONDS,
            progress=lambda done, total: tell(f"compiling: {done} of {total} first calls"),
        )
        try:
            for found in every_candidate(environment):
                tell(found.label)
                verdicts.append(examine_kernel(found, environment, trials))
        except DeviceLost as error:
            ended = str(error)
    return Examination(environment, checks, verdicts, advise(environment, common), ended)


def cases(environment: Environment) -> dict[str, Call]:
    """Small calls of every kind, by name: odd sizes, grouped heads, both directions."""
    sizes: dict[str, Any] = {"batch": 2, "heads_q": 4, "heads_kv": 2, "head_dim": 64, "seqlen_q": 200}
    if environment.device_type == "cuda":
        sizes |= {"head_dim": 128, "seqlen_q": 513, "dtype": "bf16"}
    else:
        sizes |= {"dtype": "fp32"}
    base = Call(**sizes, layout="bhsd")
    long = sizes["seqlen_q"] * 2
    found = {
        "causal, training": base.changed(causal=True, training=True),
        "no mask, training": base.changed(training=True),
        "decode": base.changed(seqlen_q=1, seqlen_kv=long),
        "bottom-right causal": base.changed(seqlen_kv=long, causal=True, alignment="bottom_right", training=True),
        "window": base.changed(causal=True, window=(64, 0), training=True, return_lse=True),
        "padded": base.changed(padded=True, causal=True, layout="bshd", training=True),
        "packed": base.changed(packed=True, causal=True, layout="thd", training=True),
        "paged": base.changed(seqlen_q=1, seqlen_kv=256, page_size=16, layout="bshd"),
        "mask": base.changed(mask=True, training=True),
        "bias": base.changed(bias=True, bias_grad=True, training=True),
        "softcap, sinks": base.changed(softcap=20.0, sinks=True, causal=True, training=True),
        "ALiBi": base.changed(alibi=True, causal=True, training=True),
        "head_dim 192/128": base.changed(head_dim=192, head_dim_v=128, causal=True, training=True),
        "fp16": base.changed(dtype="fp16", causal=True, training=True),
    }
    if environment.device_type == "cpu":
        found["bf16"] = base.changed(dtype="bf16", causal=True, training=True)
    return found


def examine_kernel(found: Candidate, environment: Environment, trials: Trials) -> Verdict:
    """Run one kernel on every case that it takes, and compare with float64.

    Raises:
        DeviceLost: it left the GPU unusable.
    """
    verdict = Verdict(found.name)
    settings = runtime.settings(None, "default")
    against: dict[Reason, int] = {}
    taken = 0
    for name, call in cases(environment).items():
        request = call.request()
        if reasons := refusals(found, request, environment, settings):
            for reason in reasons:
                against[reason] = against.get(reason, 0) + 1
            continue
        taken += 1
        if against_it := trials.against(call).get(found.name):
            verdict.failed[name] = against_it
            continue
        try:
            given, truth = _case(call, environment)
            difference = worst(truth.check(given, found.kernel.prepare(given.request, environment)))
        except Exception as error:
            verdict.failed[name] = said(error)
            if lost(device_of(environment)):
                raise DeviceLost(f"{found.label} left {environment.name} unusable: {said(error)}") from error
            continue
        if difference.wrong:
            verdict.wrong[name] = str(difference)
        else:
            verdict.right += 1
            verdict.nearest = max(verdict.nearest, difference.ratio)
    if not taken:  # what speaks against all of them is why it is not here
        most = max(against.values(), default=0)
        verdict.refused = tuple(reason for reason, count in against.items() if count == most)
    return verdict


@cache
def _case(call: Call, environment: Environment) -> tuple[Any, Any]:
    """Tensors and truth, computed once for all kernels."""
    given = tensors(call, device_of(environment))
    return given, truth_of(given)


def advise(environment: Environment, common: Mapping[str, Mapping[str, Any]]) -> list[Advice]:
    """Which packages that are not installed the default policy would prefer here, and the published difference."""
    if environment.device_type != "cuda" or environment.sm is None:
        return []
    settings = runtime.settings(None, "default")
    requests = {
        name: AttentionRequest.from_shape(**{"head_dim": 128, "dtype": "bf16", **shape})
        for name, shape in common.items()
    }
    # What could be had is judged by its rules alone: a simulated machine that is otherwise this one.
    here = replace(environment, simulated=True)

    def chosen(where: Environment, request: AttentionRequest) -> str | None:
        winner = select(request, where, settings, registry.backends()).winner
        return None if winner is None else f"{winner.backend}.{winner.kernel}" if winner.kernel else winner.backend

    found = []
    for package, (version, how) in INSTALL.items():
        if environment.version(package) is not None:
            continue
        versions = tuple((n, version if n == package else environment.version(n)) for n in PACKAGES)
        there = replace(here, packages=versions)
        gained: dict[str, list[tuple[str, str | None]]] = {}
        for name, request in requests.items():
            before, after = chosen(here, request), chosen(there, request)
            if after is not None and after != before:
                gained.setdefault(after, []).append((name, before))
        for kernel, calls in gained.items():
            estimates = dict.fromkeys(estimate(environment.arch, kernel, before) for _, before in calls)
            found.append(Advice(package, how, kernel, [name for name, _ in calls], "; ".join(estimates)))
    return found


def estimate(arch: str, kernel: str, before: str | None) -> str:
    """'1.7x as fast as torch.flash (H100, ...: source)', or that nothing is published."""
    if before is None:
        return "nothing serves them now"
    for setting in speeds():
        forward = setting["forward"]
        if setting["arch"] == arch and kernel in forward and before in forward:
            ratio = forward[kernel] / forward[before]
            return f"{ratio:.2f}x as fast as {before} forward ({setting['name']}; {setting['source']})"
    return f"no published comparison with {before}: `attnrt bench` once it is there"


@cache
def speeds() -> tuple[dict[str, Any], ...]:
    """The settings of configs/speeds.yaml."""
    text = (resources.files("attnrt.configs") / "speeds.yaml").read_text("utf-8")
    return tuple(yaml.safe_load(text)["settings"])
