"""Which calls `bench` and `tune` measure: presets of models, or sizes given as lists, every combination."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from attnrt.cli.explain import parse_window
from attnrt.environment import Environment
from attnrt.errors import ArgumentError

Preset = Annotated[
    list[str] | None, typer.Option(help="A model's shapes; `--presets` lists them. Repeatable.", show_default=False)
]
Phase = Annotated[
    list[str] | None,
    typer.Option(help="prefill, decode or training, of a preset. Repeatable. Default: all three.", show_default=False),
]
Batch = Annotated[str | None, typer.Option(help="Batch sizes: 1,4,16.")]
Heads = Annotated[str | None, typer.Option(help="Query heads.")]
KvHeads = Annotated[str | None, typer.Option(help="KV heads. Default: as many as query heads.")]
Seqlen = Annotated[str | None, typer.Option(help="Lengths: 512,2k,8k. Of a preset's cache in decode.")]
KvSeqlen = Annotated[str | None, typer.Option(help="Key lengths. Default: the query length.")]
HeadDim = Annotated[str | None, typer.Option(help="Head dims of q and k.")]
HeadDimV = Annotated[int | None, typer.Option(help="Head dim of v. Default: that of q and k.")]
Dtype = Annotated[str | None, typer.Option(help="bf16,fp16,fp32. Default: bf16 on a GPU, fp32 on a CPU.")]
Layout = Annotated[str | None, typer.Option(help="bhsd, bshd, sbhd or thd.")]
Causal = Annotated[bool, typer.Option("--causal", help="Causal masking.")]
Window = Annotated[str | None, typer.Option(help="LEFT,RIGHT in keys: 1023,0.")]
Alignment = Annotated[str | None, typer.Option(help="top_left or bottom_right, where Sq and Skv differ.")]
Training = Annotated[bool, typer.Option("--training", help="With the backward.")]
Packed = Annotated[bool, typer.Option("--packed", help="Packed sequences (thd).")]
Features = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        help="padded, padded-kv, mask, bias, bias-grad, alibi, sinks, lse, deterministic, softcap=50, dropout=0.1, "
        "page-size=16. Repeatable.",
        show_default=False,
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda:0. Default: the GPU if there is one.")]

_FLAGS: dict[str, dict[str, Any]] = {
    "padded": {"padded": True},
    "padded-kv": {"padded": "kv"},
    "mask": {"mask": True},
    "bias": {"bias": True},
    "bias-grad": {"bias": True, "bias_grad": True},
    "alibi": {"alibi": True},
    "sinks": {"sinks": True},
    "lse": {"return_lse": True},
    "deterministic": {"deterministic": True},
}
_VALUES = {"softcap": ("softcap", float), "dropout": ("dropout_p", float), "page-size": ("page_size", int)}


def sizes(option: str, text: str | None, default: int | None) -> list[int | None]:
    """'512,2k' as [512, 2048]."""
    if text is None:
        return [default]
    found: list[int | None] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([kK]?)", part.strip())
        if match is None:
            raise ArgumentError(option, text, "sizes are needed, such as 512,2k,8k")
        found.append(int(match[1]) * (1024 if match[2] else 1))
    return found


def features(listed: list[str] | None) -> dict[str, Any]:
    """What --with says, as arguments of a call."""
    found: dict[str, Any] = {}
    for entry in listed or ():
        name, equals, value = entry.partition("=")
        if not equals and name in _FLAGS:
            found |= _FLAGS[name]
        elif equals and name in _VALUES:
            argument, convert = _VALUES[name]
            try:
                found[argument] = convert(value)
            except ValueError:
                raise ArgumentError("--with", entry, f"{name} needs a number") from None
        else:
            valid = ", ".join((*_FLAGS, *(f"{n}=..." for n in _VALUES)))
            raise ArgumentError("--with", entry, f"valid are {valid}")
    return found


def calls_from(options: Mapping[str, Any], environment: Environment) -> list[Any]:
    """The calls that the options of a command describe; empty if they describe none.

    Raises:
        ArgumentError, UnknownNameError: a size, preset, phase or feature that cannot be.
    """
    from pydantic import ValidationError

    from attnrt.evidence.calls import Call
    from attnrt.evidence.presets import PHASES, preset_calls

    dtypes = (options["dtype"] or ("bf16" if environment.device_type == "cuda" else "fp32")).split(",")
    if options["preset"]:
        shaped = (
            "heads",
            "kv_heads",
            "kv_seqlen",
            "head_dim",
            "head_dim_v",
            "window",
            "alignment",
            "features",
            "layout",
        )
        if given := [name for name in shaped if options[name]] + [
            n for n in ("causal", "training", "packed") if options[n]
        ]:
            said = "a preset has its own; only --phase, --batch, --seqlen and --dtype go with it"
            raise ArgumentError("--" + given[0].replace("_", "-"), options[given[0]], said)
        lengths = [n for n in sizes("--seqlen", options["seqlen"], None) if n]
        batches = [n for n in sizes("--batch", options["batch"], None) if n]
        phases = options["phase"] or PHASES
        return [c for dtype in dtypes for c in preset_calls(options["preset"], phases, dtype, lengths, batches)]
    if options["phase"]:
        raise ArgumentError("--phase", options["phase"], "goes with --preset; without one, --training and --kv-seqlen")
    if not any(options[name] for name in ("batch", "heads", "kv_heads", "seqlen", "kv_seqlen", "head_dim")):
        others = ("dtype", "head_dim_v", "layout", "causal", "window", "alignment", "training", "packed", "features")
        if given := [name for name in others if options[name]]:
            name = {"features": "with"}.get(given[0], given[0].replace("_", "-"))
            said = "describes a call only beside its sizes: --batch, --heads, --seqlen or --head-dim"
            raise ArgumentError(f"--{name}", options[given[0]], said)
        return []
    lists = {
        "dtype": dtypes,
        "head_dim": sizes("--head-dim", options["head_dim"], 128),
        "heads_q": sizes("--heads", options["heads"], 32),
        "heads_kv": sizes("--kv-heads", options["kv_heads"], None),
        "batch": sizes("--batch", options["batch"], 1),
        "seqlen_q": sizes("--seqlen", options["seqlen"], 4096),
        "seqlen_kv": sizes("--kv-seqlen", options["kv_seqlen"], None),
    }
    rest = {name: options[name] for name in ("head_dim_v", "layout", "causal", "alignment", "training", "packed")}
    rest |= {"window": parse_window(options["window"]), **features(options["features"])}
    found = []
    for values in itertools.product(*lists.values()):
        try:
            call = Call(**dict(zip(lists, values, strict=True)), **rest)
        except ValidationError as invalid:
            first = invalid.errors()[0]
            raise ArgumentError(f"--{first['loc'][0]}", first["input"], first["msg"]) from None
        call.request()
        found.append(call)
    return found


def list_presets() -> str:
    """One line for each."""
    from attnrt.evidence.presets import PRESETS

    width = max(map(len, PRESETS))
    return "\n".join(f"{name:{width}}  {preset.title} ({', '.join(preset.phases)})" for name, preset in PRESETS.items())
