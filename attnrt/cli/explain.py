"""`attnrt explain`: what would run for a call of this shape, and every reason against the others."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Annotated, Any

import typer

from attnrt import registry, runtime
from attnrt.api import explain_shape
from attnrt.cli.common import Arch, Json, Package, environment_from, one_format
from attnrt.cli.parallel import Between, LinkName, MethodName, PerHost, PlacementName, Ranks, explain_across
from attnrt.decision import Decision
from attnrt.errors import ArgumentError
from attnrt.selector import select
from attnrt.settings import Settings


def explain(
    arch: Arch = None,
    batch: Annotated[int, typer.Option(help="Batch size, or packed sequences.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 32,
    kv_heads: Annotated[
        int | None, typer.Option(help="KV heads (num_query_groups). Default: as many as query heads.")
    ] = None,
    seqlen: Annotated[int, typer.Option(help="Query length.")] = 4096,
    kv_seqlen: Annotated[int | None, typer.Option(help="Key length. Default: the query length.")] = None,
    head_dim: Annotated[int, typer.Option(help="Head dim of q and k.")] = 128,
    head_dim_v: Annotated[int | None, typer.Option(help="Head dim of v. Default: that of q and k.")] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16, fp32 or fp64.")] = "bf16",
    layout: Annotated[str | None, typer.Option(help="bhsd, bshd, sbhd or thd.")] = None,
    causal: Annotated[bool, typer.Option("--causal", help="Causal masking.")] = False,
    window: Annotated[
        str | None, typer.Option(help="LEFT,RIGHT in keys; leave a side empty for unbounded: 1023,")
    ] = None,
    alignment: Annotated[str | None, typer.Option(help="top_left or bottom_right, where Sq and Skv differ.")] = None,
    training: Annotated[bool, typer.Option("--training", help="Gradients are needed.")] = False,
    packed: Annotated[bool, typer.Option("--packed", help="Packed sequences (thd).")] = False,
    padded: Annotated[bool, typer.Option("--padded", help="A padded batch: seqlens_q and seqlens_kv.")] = False,
    padded_kv: Annotated[bool, typer.Option("--padded-kv", help="Only seqlens_kv, as for a KV cache.")] = False,
    page_size: Annotated[int | None, typer.Option(help="Keys a page, for a paged KV cache.")] = None,
    mask: Annotated[bool, typer.Option("--mask", help="A boolean mask.")] = False,
    bias: Annotated[bool, typer.Option("--bias", help="An additive bias.")] = False,
    bias_grad: Annotated[bool, typer.Option("--bias-grad", help="... that is learned.")] = False,
    alibi: Annotated[bool, typer.Option("--alibi", help="ALiBi slopes.")] = False,
    sinks: Annotated[bool, typer.Option("--sinks", help="Attention sinks.")] = False,
    softcap: Annotated[float | None, typer.Option(help="Softcap of the scores.")] = None,
    dropout: Annotated[float, typer.Option(help="Dropout probability.")] = 0.0,
    return_lse: Annotated[bool, typer.Option("--return-lse", help="The log-sum-exp too.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="A deterministic backward.")] = False,
    backend: Annotated[
        str | None, typer.Option(help="Force one.", autocompletion=lambda: list(registry.names()))
    ] = None,
    policy: Annotated[str | None, typer.Option(help="A policy's name or file.")] = None,
    ranks: Ranks = None,
    link: LinkName = "nvlink",
    between: Between = "infiniband",
    per_host: PerHost = 8,
    method: MethodName = "auto",
    placement: PlacementName = None,
    package: Package = None,
    ask_cudnn: Annotated[
        bool, typer.Option("--ask-cudnn", help="Also ask the real cuDNN about the GPU that --arch names.")
    ] = False,
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """What would run for a call of this shape, and every reason against the others."""
    one_format(as_json, markdown)
    shape: dict[str, Any] = {
        "environment": environment_from(arch, package),
        "batch": batch,
        "heads_q": heads,
        "heads_kv": kv_heads,
        "seqlen_q": seqlen,
        "seqlen_kv": kv_seqlen,
        "head_dim": head_dim,
        "head_dim_v": head_dim_v,
        "dtype": dtype,
        "layout": layout,
        "causal": causal,
        "window": parse_window(window),
        "alignment": alignment,
        "training": training,
        "packed": packed,
        "padded": "kv" if padded_kv and not padded else padded,
        "page_size": page_size,
        "mask": mask,
        "bias": bias or bias_grad,
        "bias_grad": bias_grad,
        "alibi": alibi,
        "sinks": sinks,
        "softcap": softcap,
        "dropout_p": dropout,
        "return_lse": return_lse,
        "deterministic": deterministic or None,
        "backend": backend,
        "policy": policy,
    }
    if ranks is not None:
        if ask_cudnn:
            raise ArgumentError("--ask-cudnn", True, "not with --ranks: ask about one rank's own call")
        links = {"link": link, "between": between, "per_host": per_host, "method": method}
        across = explain_across(ranks, placement, links, shape)
        typer.echo(across.to_json() if as_json else across.to_markdown() if markdown else str(across))
        raise typer.Exit(0 if across.method else 1)
    across_ranks = {"link": (link, "nvlink"), "between": (between, "infiniband"), "per-host": (per_host, 8)}
    across_ranks |= {"method": (method, "auto"), "placement": (placement, None)}
    for name, (value, default) in across_ranks.items():
        if value != default:
            raise ArgumentError(f"--{name}", value, "goes with --ranks")
    decision = explain_shape(**shape)
    if ask_cudnn:
        decision = asked_of_cudnn(decision, arch, runtime.settings(backend, policy))
    typer.echo(decision.to_json() if as_json else decision.to_markdown() if markdown else str(decision))
    raise typer.Exit(0 if decision.backend else 1)


def asked_of_cudnn(decision: Decision, arch: str | None, settings: Settings) -> Decision:
    """The decision with the real library's word in it, for a GPU that is not here."""
    if arch is None:
        raise ArgumentError("--ask-cudnn", True, "needs --arch: about the GPU of this machine cuDNN is asked anyway")
    if not decision.verdicts["cudnn"].eligible:
        return replace(decision, notices=(*decision.notices, "cuDNN was not asked: the rules refuse the call already"))
    from attnrt.backends.cudnn.deviceless import ask

    said = ask(decision.request, arch)
    who = f"cuDNN {said.library}, asked about {said.gpu},"
    verdict = "refuses the call" if said.refusals else f"takes the call with {' and '.join(said.plans)}"
    backends = registry.backends()
    made = select(decision.request, decision.environment, settings, backends, answers={"cudnn": said.refusals})
    return replace(made, notices=(*made.notices, f"{who} {verdict}"))


def parse_window(text: str | None) -> tuple[int | None, int | None] | None:
    """'1023,0' or '1023,' as (left, right)."""
    if text is None:
        return None
    sides = text.split(",")
    if len(sides) != 2 or not all(re.fullmatch(r"[0-9]*", s.strip()) for s in sides):
        raise ArgumentError("--window", text, "LEFT,RIGHT is needed, such as 1023,0; an empty side is unbounded")
    left, right = (int(s) if s.strip() else None for s in sides)
    return left, right
