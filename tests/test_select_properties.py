"""What must hold for every choice, over random calls on random machines. Seeded, so a failure comes back."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from attnrt import matrix, registry
from attnrt.advisories import load_advisories
from attnrt.backends.base import FEATURES, Kernel, reasons
from attnrt.decision import Decision
from attnrt.environment import GIB, NAMED, Environment
from attnrt.policies.preference import builtin_policies, load_policy
from attnrt.request import AttentionRequest
from attnrt.schema import ReportModel
from attnrt.selector import select
from attnrt.settings import Settings

Choose = Callable[[Any], Any]
"""One of several: random.choice, or hypothesis, which can shrink."""

ARCHS = ("cpu", "sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm110", "sm120", "sm121")
VERSIONS: dict[str, tuple[str | None, ...]] = {
    "torch": ("2.9.0", "2.11.0", "2.13.0", "2.15.0"),
    "triton": (None, "3.2.0", "3.5.1", "3.6.0", "3.7.1", "3.8.0"),
    "cudnn": (
        *(None, "8.9.7", "9.0.0", "9.1.0", "9.2.0", "9.3.0", "9.5.0", "9.5.1", "9.6.0", "9.7.0", "9.9.0", "9.10.0"),
        *("9.10.2", "9.11.0", "9.13.1", "9.14.0", "9.15.0", "9.15.1", "9.18.0", "9.18.1", "9.19.0", "9.20.0", "9.21.0"),
        *("9.22.0", "9.23.0", "9.25.0", "9.26.0", "9.28.1"),
    ),
    "nvidia-cudnn-frontend": (None, "1.18.0", "1.20.0", "1.23.0", "1.24.1", "1.26.0", "1.28.0", "1.32.0"),
    "flash-attn": (
        None,
        "2.0.4",
        "2.1.1",
        "2.3.0",
        "2.4.1",
        "2.5.5",
        "2.6.1",
        "2.6.3",
        "2.7.3",
        "2.8.3",
        "2.8.3.post2",
    ),
    "flash-attn-3": (None, "3.0.0b1", "3.0.0"),
    "flash-attn-4": (None, "4.0.0b11", "4.0.0b36", "4.0.0"),
}
KERNELS: list[tuple[str, Kernel]] = [(name, k) for name, b in registry.backends().items() for k in b.kernels]


def a_request(choose: Choose) -> AttentionRequest:
    """Each feature is used in about one call in five, so that most calls can be served by something."""

    def maybe(value: Any = True, off: Any = False) -> Any:
        return choose((off, off, off, off, value))

    seqlen_q = choose((0, 1, 2, 16, 17, 64, 512, 1000, 1024, 4096, 4160, 8192, 32768))
    seqlen_kv = choose((seqlen_q, seqlen_q, seqlen_q, 0, 1, 64, 1024, 4096, 4160, 32768))
    heads_kv = choose((1, 2, 4, 8, 16))
    batch = choose((1, 2, 4, 8))
    heads_q = heads_kv * choose((1, 1, 1, 2, 4))
    head_dim = choose((8, 32, 36, 64, 64, 80, 96, 128, 128, 128, 192, 224, 256, 512))
    packed = maybe()
    bound = choose((0, 1, 128, 1023, None))
    bias = maybe(choose((True, (seqlen_q, seqlen_kv), (1, heads_q, 1, 1))))
    request = AttentionRequest.from_shape(
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        seqlen_q=seqlen_q,
        seqlen_kv=seqlen_kv,
        head_dim=head_dim,
        head_dim_v=maybe(choose((32, 128, 160, 512)), head_dim),
        dtype=choose(("bf16", "bf16", "fp16", "fp32", "fp64", "fp8_e4m3")),
        causal=choose((False, True)),
        window=maybe((choose((0, 127, 1023, None)), bound), None),
        alignment=choose(("top_left", "bottom_right")),
        packed=packed,
        padded=not packed and maybe(),
        training=choose((False, True)),
        mask=maybe(choose((True, (seqlen_q, seqlen_kv)))),
        bias=bias,
        bias_grad=bias is not False and choose((False, True)),
        alibi=maybe(),
        softcap=maybe(30.0, None),
        sinks=maybe(),
        dropout_p=maybe(choose((0.1, 0.125)), 0.0),
        return_lse=maybe(),
        deterministic=maybe(),
        capturing=maybe(),
    )
    odd = {
        "strides": choose(("contiguous", "contiguous", "strided", "last_dim")),
        "aligned": choose((True, True, False)),
    }
    return replace(request, **odd)


def an_environment(choose: Choose) -> Environment:
    """A named machine, or any mix of versions on any arch."""
    memory = choose((1, 24, 80, 180)) * GIB
    if choose((True, False)):
        return replace(Environment.named(choose(tuple(NAMED))), free_memory=memory)
    packages = {name: choose(versions) for name, versions in VERSIONS.items()}
    return Environment.simulate(choose(ARCHS), packages=packages, memory=memory, sm_count=108)


def pairs(seed: int, count: int) -> Iterator[tuple[AttentionRequest, Environment, random.Random]]:
    rng = random.Random(seed)
    machines = [an_environment(rng.choice) for _ in range(max(100, count // 20))]
    for _ in range(count):
        yield a_request(rng.choice), rng.choice(machines), rng


def chosen(request: AttentionRequest, environment: Environment, policy: str = "default", **changes: Any) -> Decision:
    rules = Settings(policy=load_policy(policy, registry.rankable()), **changes)
    return select(request, environment, rules, registry.backends())


@cache
def rules_text() -> str:
    return matrix.rules_markdown()


def check(decision: Decision) -> None:
    """What every decision owes its reader."""
    known = matrix.rule_ids()
    for name, verdict in decision.verdicts.items():
        assert verdict.eligible is not bool(verdict.reasons), name
        assert verdict.bytes >= 0
        for reason in verdict.reasons:
            assert reason.rule in known and f"`{reason.rule}`" in rules_text(), reason
            for text in (reason.message, reason.remedy or "."):
                assert text.strip() and not set("{}") & set(text), reason
    eligible = [v for v in decision.verdicts.values() if v.eligible]
    if decision.backend is None:
        assert not eligible
        return
    winner = decision.verdicts[decision.backend]
    assert winner.eligible and winner.rank == min(v.rank for v in eligible if v.rank is not None)
    kernel = next(k for name, k in KERNELS if name == winner.backend and winner.kernel in (None, k.name))
    ignored = [f.name for f in FEATURES if f.used(decision.request) and f.name not in kernel.supports]
    assert not ignored, f"{decision.label} does not declare {ignored}"


def test_every_decision_is_whole() -> None:
    won = set()
    for request, environment, rng in pairs(1, 12_000):
        prefer = rng.choice(((), (), registry.expand((rng.choice(registry.names()),))))
        decision = chosen(request, environment, rng.choice(builtin_policies()), prefer=prefer)
        check(decision)
        won.add(decision.label)
    kernels = {f"{n}[{k.name}]" if k is not registry.backends()[n] else n for n, k in KERNELS}
    assert won == kernels | {"none"}, "the calls must be varied enough for every kernel to win one"


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_every_decision_is_whole_shrinking(data: Any) -> None:
    def choose(options: Any) -> Any:
        return data.draw(st.sampled_from(options))

    check(chosen(a_request(choose), an_environment(choose), choose(builtin_policies())))


def test_disabling_one_changes_no_other() -> None:
    for request, environment, rng in pairs(2, 3000):
        off = rng.choice(tuple(registry.backends()))
        before = chosen(request, environment)
        after = chosen(request, environment, disabled=((off, "a test"),))
        assert {n: v for n, v in before.verdicts.items() if n != off} == {
            n: v for n, v in after.verdicts.items() if n != off
        }
        assert not after.verdicts[off].eligible and after.backend != off
        if before.backend != off:
            assert after.backend == before.backend


def test_newer_versions_lose_nothing_but_by_an_advisory() -> None:
    """By kernel, and without the advisories, which are not among the rules."""
    packages = [p for p in VERSIONS if p != "torch"]
    for request, environment, rng in pairs(3, 6000):
        package = rng.choice(packages)
        installed = environment.version(package)
        newer = [v for v in VERSIONS[package] if v and installed and Version(v) > Version(installed)]
        if not newer or environment.device_type == "cpu":
            continue
        version = rng.choice(newer)
        later = replace(environment, packages=tuple((dict(environment.packages) | {package: version}).items()))
        for name, kernel in KERNELS:
            rules = (*registry.backends()[name].all_rules, *kernel.all_rules)
            if not reasons(rules, request, environment):
                lost = reasons(rules, request, later)
                assert not lost, f"{name} {kernel.name} with {package} {installed} -> {version}: {lost}"


def test_installing_a_package_loses_nothing() -> None:
    advisories = {a.id for a in load_advisories()}
    for request, environment, rng in pairs(4, 1500):
        missing = [p for p, v in environment.packages if v is None]
        if not missing:
            continue
        package = rng.choice(missing)
        version = rng.choice([v for v in VERSIONS[package] if v])
        more = replace(environment, packages=tuple((dict(environment.packages) | {package: version}).items()))
        after = chosen(request, more).verdicts
        for name, verdict in chosen(request, environment).verdicts.items():
            if verdict.eligible:
                against = {reason.rule for reason in after[name].reasons}
                assert not against or against & advisories, (name, package, version, against)


def test_forced_runs_or_nothing_does() -> None:
    for request, environment, rng in pairs(5, 3000):
        name = rng.choice(registry.names())
        members = registry.expand((name,))
        forced = chosen(request, environment, rng.choice(builtin_policies()), force=members, force_name=name)
        verdicts = [forced.verdicts[member] for member in members]
        if forced.backend is None:
            assert all(v.reasons and not v.eligible for v in verdicts)
        else:
            assert forced.backend in members
        free = chosen(request, environment).verdicts
        assert {n: v.reasons for n, v in free.items()} == {
            n: tuple(r for r in v.reasons if r.rule != "NOT_IN_POLICY") for n, v in forced.verdicts.items()
        }


def test_same_answer_in_any_order() -> None:
    questions = [(request, environment) for request, environment, _ in pairs(6, 1500)]
    first = [chosen(*question) for question in questions]
    order = random.Random(7).sample(range(len(questions)), len(questions))
    again = {i: chosen(*questions[i]) for i in order}
    assert all(first[i] == again[i] for i in order)


def test_more_memory_refuses_nothing() -> None:
    gained = 0
    for request, environment, rng in pairs(8, 2500):
        less, more = (replace(environment, free_memory=int(n * GIB)) for n in rng.choice(((0.1, 1), (1, 4), (4, 4096))))
        before, after = chosen(request, less).verdicts, chosen(request, more).verdicts
        assert {n for n, v in before.items() if v.eligible} <= {n for n, v in after.items() if v.eligible}
        gained += len([n for n, v in after.items() if v.eligible and not before[n].eligible])
    assert gained > 100, "memory must matter in some of them"


@pytest.mark.parametrize("limit", [0, 1 << 20, 1 << 30])
def test_a_lower_limit_only_refuses_what_is_unfused(limit: int) -> None:
    for request, environment, _ in pairs(9, 500):
        free, limited = (chosen(request, environment, unfused_limit=n) for n in (-1, limit))
        for name, verdict in limited.verdicts.items():
            if verdict.eligible:
                assert verdict.fused or verdict.bytes <= limit
                assert free.verdicts[name].eligible


def test_json_round_trip() -> None:
    for request, environment, rng in pairs(10, 400):
        decision = chosen(request, environment, rng.choice(builtin_policies()))
        text = decision.to_json()
        model = ReportModel.model_validate_json(text, strict=True)
        assert model.model_dump(mode="json", by_alias=True) == json.loads(text)
        assert (model.backend, model.kernel) == (decision.backend, decision.kernel)
