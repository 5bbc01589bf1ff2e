"""The public calls: check, agree with the other ranks, choose, run."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from attnrt import registry, runtime
from attnrt.api import as_environment, attention
from attnrt.distributed.agreement import Word, agree, agree_on_plan, control_of, digest
from attnrt.distributed.bind import Local, bind_local, bind_whole
from attnrt.distributed.choice import ParallelDecision, decide
from attnrt.distributed.gather import gather_attention
from attnrt.distributed.links import Topology
from attnrt.distributed.local import Call, Plan, choose
from attnrt.distributed.request import CHOICES
from attnrt.distributed.ring import ring_attention
from attnrt.distributed.simulator import evenly
from attnrt.distributed.ulysses import ulysses_attention
from attnrt.environment import Environment
from attnrt.errors import ArgumentTypeError, MethodUnavailable, UnknownNameError
from attnrt.request import AttentionRequest
from attnrt.settings import PolicySpec
from attnrt.sharded import refuse_inside_context_parallel

MAX_PLANS = 256
_kept: OrderedDict[tuple[Any, ...], Kept] = OrderedDict()
_last: ContextVar[ParallelDecision | None] = ContextVar("attnrt_last_parallel_decision", default=None)
_RUN = {"gather": gather_attention, "ulysses": ulysses_attention, "ring": ring_attention}


class Kept:
    """The plans of one signature by every rank's lengths, and a digest of which there are.

    Ranks that keep the same ones need not agree on them again.
    """

    def __init__(self) -> None:
        self.plans: dict[Any, Plan] = {}
        self.digest = digest({})

    def add(self, lengths: Any, plan: Plan) -> None:
        self.plans[lengths] = plan
        self.digest = digest({str(n): str(p.decision.method) for n, p in self.plans.items()})


Mesh = DeviceMesh | ProcessGroup
"""One dimension: a mesh's own, or a process group."""


@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mesh: Mesh, return_lse: Literal[False] = False, **options: Any
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor, k: Tensor, v: Tensor, *, mesh: Mesh, return_lse: Literal[True], **options: Any
) -> tuple[Tensor, Tensor]: ...
def context_parallel_attention(  # type: ignore[misc]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: Mesh,
    method: str = "auto",
    placement: str = "contiguous",
    link: str | None = None,
    layout: str = "bhsd",
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    alignment: str | None = None,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    seqlens_q: Tensor | None = None,
    seqlens_kv: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool | None = None,
    backend: str | None = None,
    policy: PolicySpec = None,
) -> Any:
    """Attention over a sequence that is cut across ranks. Every rank of the mesh calls it, each with its own shard.

    Args:
        q, k, v: this rank's tokens, in `layout`, as `shard` gives them: (B, Hq, Sq of this rank, Dqk) and so on. Every
            rank has all heads. Lengths may differ by rank.
        mesh: a DeviceMesh of one dimension (mesh["cp"]) or a process group; CPU tensors need gloo, CUDA ones NCCL.
        method: "gather" fetches the keys that a rank's queries see; "ulysses" exchanges tokens for heads; "ring" sends
            the keys around while it computes; "auto" takes the one predicted to be quickest, and says why.
        placement: how tokens lie on ranks: "contiguous", or "zigzag", which balances a causal mask.
        link: what joins the ranks of one host, for predictions: a name of `attnrt.distributed.LINKS`. None: assumed
            from the device.
        causal, window, alignment: by position in the whole sequence, whatever its placement.
        mask, bias: (B, Hq, Sq of this rank, Skv of the whole sequence in its order), or with ones to broadcast.
        seqlens_q, seqlens_kv: (B,) lengths in the whole sequence. cu_seqlens_q, cu_seqlens_kv: offsets in the whole
            packed batch (read on the host: on a GPU this synchronises). The same on every rank.
        the rest: as `attnrt.attention` has it. Dropout is refused.

    Returns:
        This rank's part of the output, as q lies; with `return_lse` (output, LSE). Gradients of q, k and v are those of
        the whole call. Gradients of sinks and bias are this rank's share: sum them over the mesh like those of any
        other parameter that all ranks have.

    Raises:
        ArgumentError, ArgumentTypeError: an argument cannot be right on any rank.
        MethodUnavailable: the method, or each of them, refuses the call; `.report` has every reason.
        RanksDisagree: ranks differ in what they ask for or in what they would run. All ranks raise it; none has run.
        RankFailed: an exchange broke off, or ran into the group's timeout.
        BackendFailed: a local kernel raised. The other ranks then raise RankFailed, at the latest at the timeout.
    """
    options = dict(locals())
    for name in ("q", "k", "v", "mesh"):
        del options[name]
    group = group_of(mesh)
    if isinstance(q, Tensor) and _autocast_on(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        cast = (t if not isinstance(t, Tensor) or t.dtype is torch.float64 else t.to(dtype) for t in (q, k, v))
        with torch.autocast(q.device.type, enabled=False):
            return _run(*cast, group, options)
    return _run(q, k, v, group, options)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _run(q: Any, k: Any, v: Any, group: ProcessGroup, options: dict[str, Any]) -> Any:
    refuse_inside_context_parallel()
    plan, local = _planned(q, k, v, group, options)
    _last.set(plan.decision)
    if plan.request.ranks == 1:
        return attention(q, k, v, **_alone(options))
    passed = {name: options[name] for name in ("softcap", "scale", "deterministic", "backend", "policy")}
    call = Call(q, k, v, local.operands, options["layout"], options["return_lse"], passed)
    return _RUN[plan.method](call, plan)


def explain(q: Tensor, k: Tensor, v: Tensor, *, mesh: Mesh, **options: Any) -> ParallelDecision:
    """What `context_parallel_attention` would do for the same arguments. Every rank calls it; runs no attention.

    A forced method that cannot serve the call gives a report whose `.method` is None.

    Raises:
        As `context_parallel_attention` does, but for MethodUnavailable.
    """
    defaults = context_parallel_attention.__kwdefaults__ or {}
    if unknown := options.keys() - defaults.keys():
        raise UnknownNameError("argument", min(unknown), defaults)
    plan, _ = _planned(q, k, v, group_of(mesh), {**defaults, **options}, refuse=False)
    chosen, r = plan.decision, plan.request
    return decide(r, chosen.environment, chosen.topology, {**defaults, **options}["method"], plan.choose, plan.rank)


def explain_shape(
    *,
    ranks: int,
    method: str = "auto",
    placement: str = "contiguous",
    link: str = "nvlink",
    between: str = "infiniband",
    per_host: int = 8,
    environment: Environment | str | None = None,
    deterministic: bool | None = None,
    backend: str | None = None,
    policy: PolicySpec = None,
    **shape: Any,
) -> ParallelDecision:
    """What would be done for a call of that shape, on machines that need not be here. Takes no tensor, no group.

    Args:
        ranks: how many share the sequence, in equal parts. link, between, per_host: what joins the ranks of a host,
            what joins hosts, and how many ranks a host has.
        environment, shape: as in `attnrt.explain_shape`; lengths are those of the whole sequence.

    Raises:
        ArgumentError, ArgumentTypeError: a size, name or combination cannot be right.
    """
    topology = Topology.of(ranks, link, between, per_host)
    _check_method(method)
    settings, deterministic = runtime.determinism(runtime.settings(backend, policy), deterministic)
    whole = AttentionRequest.from_shape(deterministic=deterministic, **shape)
    machine = as_environment(environment)
    request = evenly(whole, ranks, placement)
    return decide(request, machine, topology, method, lambda r: choose(r, machine, settings))


def last_decision() -> ParallelDecision | None:
    """The choice that the last `context_parallel_attention` in this thread or async task ran by."""
    return _last.get()


def group_of(mesh: Any) -> ProcessGroup:
    """The process group of a mesh.

    Raises:
        ArgumentTypeError: neither a mesh of one dimension nor a process group.
    """
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            named = f", such as mesh[{mesh.mesh_dim_names[-1]!r}]" if mesh.mesh_dim_names else ""
            raise ArgumentTypeError(
                "mesh", mesh, f"one dimension is needed, not {mesh.ndim}: pass the one to use{named}"
            )
        return mesh.get_group()
    if isinstance(mesh, ProcessGroup):
        return mesh
    raise ArgumentTypeError("mesh", mesh, "a DeviceMesh of one dimension or a process group is needed")


def _planned(
    q: Any, k: Any, v: Any, group: ProcessGroup, options: dict[str, Any], refuse: bool = True
) -> tuple[Plan, Local]:
    """What all ranks agreed to do. The first exchange has every rank's lengths and a digest of its arguments; a second
    one, for a signature that is new somewhere, a digest of what was chosen."""
    control = control_of(group)
    try:
        _check_method(options["method"])
        topology = _topology(group, options["link"], q)
        local = bind_local(q, k, v, options)
        facts = {**local.facts, **_surroundings(options, topology)}
        kept = _kept.setdefault((group, local.key), Kept())
        word = Word(local.length_q, local.length_kv, digest(facts), kept.digest)
    except Exception as error:
        agree(control, None, {}, error)
        raise
    words = agree(control, word, facts)
    lengths = tuple(w.length_q for w in words), tuple(w.length_kv for w in words)
    if len({w.plans for w in words}) > 1 or lengths not in kept.plans:
        kept.add(lengths, _agreed(control, group, topology, local, lengths, options))
        if len(_kept) > MAX_PLANS:
            _kept.popitem(last=False)
    plan = kept.plans[lengths]
    if refuse and plan.decision.method is None:
        raise MethodUnavailable(str(plan.decision), plan.decision)
    return plan, local


def _agreed(
    control: ProcessGroup, group: ProcessGroup, topology: Topology, local: Local, lengths: Any, options: dict[str, Any]
) -> Plan:
    try:
        plan = _new_plan(group, topology, local, lengths, options)
        chosen = plan.decision
        ends = {name: d.label for name, d in chosen.local.items()}
        verdicts = {name: str([r.rule for r in v.reasons]) for name, v in chosen.verdicts.items()}
        shared = plan.request.local_requests(chosen.method, (0, plan.request.ranks - 1)) if chosen.method else {}
        labels = {f"backend for {name}": ends[name] for name in shared.values()}
        plan_facts: Mapping[str, str] = {"method": str(chosen.method), "refused": str(verdicts), **labels}
    except Exception as error:
        agree_on_plan(control, {}, error)
        raise
    agree_on_plan(control, plan_facts)
    return plan


def _new_plan(group: ProcessGroup, topology: Topology, local: Local, lengths: Any, options: dict[str, Any]) -> Plan:
    settings = runtime.settings(options["backend"], options["policy"])
    settings, deterministic = runtime.determinism(settings, options["deterministic"])
    request = bind_whole(local, lengths[0], lengths[1], options, deterministic)
    environment = Environment.detect(local.device).with_free_memory()
    rank = group.rank()
    decision = decide(
        request, environment, topology, options["method"], lambda r: choose(r, environment, settings), rank, every=False
    )
    return Plan(request, decision, decision.method or "gather", group, rank, local.device, environment, settings)


def _surroundings(options: dict[str, Any], topology: Topology) -> dict[str, str]:
    """What choices depend on besides the call: packages, registered backends, overrides."""
    settings = runtime.settings(options["backend"], options["policy"])
    packages = Environment.detect("cpu").packages
    return {
        "method": options["method"],
        "installed": ", ".join(f"{name} {version}" for name, version in packages if version),
        "backends": ", ".join(registry.backends()),
        "overrides": "; ".join(str(o) for o in settings.overrides) or "none",
        "links": topology.describe(),
    }


def _topology(group: ProcessGroup, link: str | None, q: Any) -> Topology:
    """The links that predictions go by. Nothing about the result depends on them."""
    ranks = group.size()
    on_gpu = isinstance(q, Tensor) and q.is_cuda
    given = os.environ.get("LOCAL_WORLD_SIZE", "")
    per_host = int(given) if given.isdigit() else torch.cuda.device_count() if on_gpu else ranks
    if not 0 < per_host < ranks or ranks % per_host:
        per_host = ranks
    if link is None:
        link = _link_of(Environment.detect(q.device)) if on_gpu else "ethernet"
    return Topology.of(ranks, link, "infiniband" if on_gpu else "ethernet", per_host)


def _link_of(environment: Environment) -> str:
    """NVLink on data-centre GPUs, else PCIe."""
    if environment.sm in (100, 103):
        return "nvlink5"
    return "nvlink" if environment.sm in (80, 90) and "PCIe" not in environment.name else "pcie"


def _alone(options: dict[str, Any]) -> dict[str, Any]:
    """A group of one rank has no one to ask."""
    return {name: value for name, value in options.items() if name not in ("method", "placement", "link")}


def _check_method(method: Any) -> None:
    if not isinstance(method, str) or method not in CHOICES:
        raise UnknownNameError("method", method, CHOICES)


def _autocast_on(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def _forget() -> None:
    _kept.clear()


registry.on_change.append(_forget)
