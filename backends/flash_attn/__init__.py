"""Tri Dao's flash-attn, three generations: each is a package of its own with limits of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from attnrt.backends.base import FEATURE_NAMES, Backend, Reason, Rule
from attnrt.backends.flash_attn import fa2_rules, fa3_rules, fa4_rules, memory, padding
from attnrt.backends.flash_attn.common import cut
from attnrt.environment import Environment
from attnrt.request import AttentionRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from attnrt.backends.base import Run
    from attnrt.backends.flash_attn.discovery import Library

_NEVER = frozenset({"mask", "bias", "bias_grad", "empty"})


class FlashAttention(Backend):
    """One generation: rules that need nothing installed, and an adapter that loads the package when a call needs it."""

    family = "flash_attn"
    generation: ClassVar[int]
    package: ClassVar[str]
    dispensable: ClassVar[frozenset[str]] = frozenset()
    """Arguments without which an older build does what they ask for."""

    @cached_property
    def all_rules(self) -> tuple[Rule, ...]:
        return tuple(map(self._as_run_rule, super().all_rules))

    def _as_run_rule(self, rule: Rule) -> Rule:
        """The rule for the request as it would run."""
        remedy = rule.remedy
        if remedy is not None and remedy.startswith("pad ") and "PAGED" not in rule.id:
            remedy += "; for all but KV caches a policy with allow_padding: true does that"
        return replace(rule, remedy=remedy, fails=lambda r, e: rule.fails(self.as_run(r, e), e))

    def as_run(self, request: AttentionRequest, environment: Environment) -> AttentionRequest:
        """The request with the head dims that its kernel sees: larger ones, where the policy allows to pad."""
        return padding.widened(request, environment, self._of_head_dims) if request.may_pad else request

    @cached_property
    def _of_head_dims(self) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if "HEAD_DIM" in rule.id)

    def bytes(self, request: AttentionRequest, environment: Environment) -> int:
        wide = self.as_run(request, environment)
        return self.own_bytes(wide, environment) + padding.copied_bytes(request, wide)

    def own_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        """`bytes` for head dims that it has kernels for."""
        raise NotImplementedError

    def notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        wide = self.as_run(request, environment)
        said = () if wide is request else (padding.note(request, wide),)
        return (*said, *self.own_notes(wide, environment))

    def own_notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        """`notes` for head dims that it has kernels for."""
        raise NotImplementedError

    def answers(self) -> Mapping[str, str]:
        found = {
            "BROKEN": "The package is installed and does not load; the loader's own words follow.",
            "BUILT_FOR": "Its compiled part has no code that runs on this GPU.",
            "SIGNATURE": "Its function has no argument that this call needs.",
            "LEFT_OUT": "It was built without something that this call needs.",
            "SHADOWED": "Another package has overwritten its files.",
        }
        # flash-attn 4 has no compiled part, and lies in a folder of flash-attn 2's.
        unsaid = {"BUILT_FOR", "LEFT_OUT"} if self.generation == 4 else {"SHADOWED"}
        return {f"{self.prefix}_{id}": sentence for id, sentence in found.items() if id not in unsaid}

    def answer(self, request: AttentionRequest, environment: Environment) -> tuple[Reason, ...]:
        """What the package here says for itself: that it does not load, was built for other GPUs, or has other
        functions than the adapter calls."""
        from attnrt.backends.flash_attn.discovery import GENERATIONS, Library, built_elsewhere

        found = self._load(environment)
        if not isinstance(found, Library):
            return (found,)
        if (elsewhere := built_elsewhere(GENERATIONS[self.generation], environment)) is not None:
            return (elsewhere,)
        request = self.as_run(request, environment)
        how = self.adapter().call(request, environment)
        if missing := [n for n in found.lacks(how.function, how.arguments) if n not in self.dispensable]:
            return (self._unknown_arguments(found, how.function, missing),)
        return self.left_out(request, found)

    def left_out(self, request: AttentionRequest, library: Library) -> tuple[Reason, ...]:
        """What the installed build was made without."""
        return ()

    def prepare(self, request: AttentionRequest, environment: Environment) -> Run:
        found = self._load(environment)
        if isinstance(found, Reason):
            raise RuntimeError(f"{found.message}; {found.remedy}")
        wide = self.as_run(request, environment)
        run: Run = self.adapter().prepare(wide, environment, found)
        return run if wide is request else padding.unpadded(run, request, wide)

    def adapter(self) -> Any:
        """The module with `call` and `prepare` for this generation."""
        from importlib import import_module

        return import_module(f"attnrt.backends.flash_attn.fa{self.generation}")

    def _load(self, environment: Environment) -> Library | Reason:
        from attnrt.backends.flash_attn.discovery import load

        return load(self.generation, environment.version(self.package) or "", self.disk_cache())

    def disk_cache(self) -> Path | None:
        """Where it keeps what it compiles, if it compiles."""
        return None

    def _unknown_arguments(self, found: Library, function: str, missing: list[str]) -> Reason:
        return Reason(
            f"{self.prefix}_SIGNATURE",
            f"{function} of {self.package} {found.version} has no argument {', '.join(missing)}, which this call needs",
            f"install a version of {self.package} that has it; attnrt calls the one described in docs/rules.md",
        )


class FlashAttention2(FlashAttention):
    """The widest reach in GPUs, and the only generation with ALiBi and dropout."""

    name = "flash_attn_2"
    title = "flash-attn 2"
    prefix = "FA2"
    generation = 2
    package = fa2_rules.PACKAGE
    # What is refused with a remedy has a rule of its own.
    supports = (FEATURE_NAMES | {"paged"}) - _NEVER
    rules = fa2_rules.RULES

    def own_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        r = request
        total = memory.linear(r) + memory.sinks(r)
        if not r.needs_grad:
            return total
        if r.heads_q != r.heads_kv:  # dk and dv of every query head, summed afterwards
            total += r.tokens_kv * r.heads_q * 2 * r.head_dim * r.itemsize
        return total + (memory.dq_copies(r, environment) - 1) * r.tokens_q * r.heads_q * memory.rounded(r.head_dim) * 4

    def own_notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        said = []
        if request.padded_kv:
            said.append("padded keys run by flash_attn_with_kvcache")
        if cut(request):
            said.append(_CUT)
        if request.sinks:
            said.append(_sunk(request))
        if (copies := memory.dq_copies(request, environment)) > 1:
            said.append(f"a deterministic backward keeps {copies} float32 copies of dq")
        return tuple(said)

    def left_out(self, request: AttentionRequest, library: Library) -> tuple[Reason, ...]:
        from attnrt.backends.flash_attn import fa2_build
        from attnrt.backends.flash_attn.discovery import binary

        path = binary(library.generation)
        if path is None:
            return ()
        try:
            found = fa2_build.build(path, path.stat().st_mtime_ns)
        except OSError:
            return ()
        return fa2_build.against(request, found, library.version)


class FlashAttention3(FlashAttention):
    """The fastest published kernels for sm90."""

    name = "flash_attn_3"
    title = "flash-attn 3"
    prefix = "FA3"
    generation = 3
    package = fa3_rules.PACKAGE
    dispensable = frozenset({"return_attn_probs"})
    supports = (FEATURE_NAMES | {"paged"}) - _NEVER - {"alibi", "dropout"}
    rules = fa3_rules.RULES

    def own_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        return memory.linear(request) + memory.grouped_accumulators(request) + memory.sinks(request)

    def own_notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        said = []
        if request.packed:
            said.append(_STRAY)
        if cut(request):
            said.append(_CUT)
        if request.padded_kv and not request.paged:
            said.append(_ONE_PAGE_EACH)
        if request.sinks:
            said.append(_sunk(request))
        return tuple(said)

    def left_out(self, request: AttentionRequest, library: Library) -> tuple[Reason, ...]:
        from attnrt.backends.flash_attn import fa3

        return fa3.left_out(request, library)


class FlashAttention4(FlashAttention):
    """Written in CuTe DSL for sm100 and sm90, compiled at the first call of each kind."""

    name = "flash_attn_4"
    title = "flash-attn 4"
    prefix = "FA4"
    generation = 4
    package = fa4_rules.PACKAGE
    compiles = True
    supports = (FEATURE_NAMES | {"paged"}) - _NEVER - {"alibi", "dropout"}
    rules = fa4_rules.RULES

    def own_bytes(self, request: AttentionRequest, environment: Environment) -> int:
        r = request
        # Sinks by the log-sum-exp: the output in float32, and once more as it is.
        sunk = r.tokens_q * r.heads_q * r.head_dim_v * (4 + r.itemsize) if r.sinks and r.needs_lse else 0
        return memory.linear(r) + memory.grouped_accumulators(r) + sunk

    def own_notes(self, request: AttentionRequest, environment: Environment) -> tuple[str, ...]:
        from attnrt.backends.flash_attn import fa4

        said = [_COMPILES]
        if (took := fa4.first_calls.get(request)) and not environment.simulated:
            halves = ", ".join(f"the first {half} in this process took {s:.1f} s" for half, s in took.items())
            said[0] += f"; {halves}"
        if fa4.by_rows(request, environment):
            said.append(_ONE_PAGE_EACH)
        if fa4.sinks_by_lse(request):
            said.append(_SUNK)
        if request.packed:
            said.append(_STRAY)
        if cut(request):
            said.append(_CUT)
        return tuple(said)

    def disk_cache(self) -> Path | None:
        """Its own cache of compiled kernels on disk, apart for each torch: its key does not have the CUDA flavour.
        Another folder, or none, where the package's own variables say so."""
        import torch

        from attnrt.backends.flash_attn.discovery import CACHE_DIR, CACHE_ENABLED
        from attnrt.runtime import variables

        if CACHE_DIR in os.environ or CACHE_ENABLED in os.environ:
            wanted = os.environ.get(CACHE_ENABLED) == "1" and os.environ.get(CACHE_DIR)
            return Path(wanted) if wanted else None
        return variables().cache_dir / "flash_attn_4" / f"torch-{torch.__version__}"


_CUT = "reads the first Sq keys, all that a top-left causal mask shows to any query"
_ONE_PAGE_EACH = "the cache is read as one page a sequence, so that no key past its end is read"
_STRAY = "tokens after the last sequence must be finite numbers: its last tile weighs them with 0"
_SUNK = "applies the sinks to its output by the log-sum-exp"
_COMPILES = "compiles once for each kind of call, in 2 to 4 s for each of forward and backward, and keeps it on disk"


def _sunk(r: AttentionRequest) -> str:
    return _SUNK + (", and runs its forward again in the backward" if r.needs_grad else "")
