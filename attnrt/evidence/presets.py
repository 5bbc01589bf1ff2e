"""What well-known models ask of attention: heads, KV heads, head dims, masks, by phase.

Sizes are those of the models' published configurations.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from attnrt.errors import UnknownNameError
from attnrt.evidence.calls import Call

PHASES = ("prefill", "decode", "training")
LENGTHS: Mapping[str, tuple[int, ...]] = {
    "prefill": (512, 1024, 2048, 4096, 8192, 16384, 32768),
    "decode": (1024, 4096, 16384, 65536),
    "training": (1024, 2048, 4096, 8192, 16384),
}
"""Of the sequence (prefill, training), or of the KV cache (decode)."""
BATCHES: Mapping[str, tuple[int, ...]] = {"prefill": (1,), "decode": (1, 16), "training": (1,)}


@dataclass(frozen=True)
class Preset:
    """One model's attention. `decode`: what differs there. `fixed`: lengths that the model itself sets."""

    title: str
    sizes: Mapping[str, Any]
    phases: tuple[str, ...] = PHASES
    decode: Mapping[str, Any] = field(default_factory=dict)
    fixed: tuple[Mapping[str, Any], ...] = ()

    def calls(self, phase: str, dtype: str, lengths: Iterable[int] = (), batches: Iterable[int] = ()) -> Iterator[Call]:
        """The calls of one phase; nothing if the model has no such phase."""
        if phase not in self.phases:
            return
        training = {"training": True} if phase == "training" else {}
        batches = tuple(batches)
        if self.fixed:
            for shape in self.fixed:
                for batch in batches or (shape.get("batch", 1),):
                    yield Call(**{**self.sizes, **shape, **training, "batch": batch, "dtype": dtype})
            return
        for batch in batches or BATCHES[phase]:
            for length in tuple(lengths) or LENGTHS[phase]:
                sizes = {**self.sizes, **training, "batch": batch, "dtype": dtype}
                if phase != "decode":
                    yield Call(**{**sizes, "seqlen_q": length})
                    continue
                # One query at the end of its keys sees them all, so causal says nothing more.
                sizes |= {"causal": False, "seqlen_q": 1, "seqlen_kv": length, **self.decode}
                if (window := sizes.pop("window", None)) is not None and window[0] < length - 1:
                    sizes |= {"window": (window[0], 0), "alignment": "bottom_right"}
                yield Call(**sizes)


def _decoder(title: str, heads_q: int, heads_kv: int, head_dim: int = 128, **more: Any) -> Preset:
    sizes = {"heads_q": heads_q, "heads_kv": heads_kv, "head_dim": head_dim, "causal": True, **more}
    return Preset(title, sizes)


PRESETS: Mapping[str, Preset] = {
    "llama3-8b": _decoder("Llama 3 8B", 32, 8),
    "llama3-70b": _decoder("Llama 3 70B", 64, 8),
    "mistral-7b": _decoder("Mistral 7B v0.1, sliding window 4096", 32, 8, window=(4095, 0)),
    "qwen2.5-7b": _decoder("Qwen2.5 7B", 28, 4),
    "qwen3-32b": _decoder("Qwen3 32B", 64, 8),
    "gemma2-9b": _decoder("Gemma 2 9B, global layers: softcap 50", 16, 8, 256, softcap=50.0),
    "gemma3-12b": _decoder("Gemma 3 12B, local layers: window 1024", 16, 8, 256, window=(1023, 0)),
    "gpt-oss-20b": _decoder("gpt-oss 20B, full layers: sinks", 64, 8, 64, sinks=True),
    "deepseek-mla": Preset(
        "DeepSeek V3 MLA: 192/128 as MHA, absorbed 576/512 as MQA in decode",
        {"heads_q": 128, "heads_kv": 128, "head_dim": 192, "head_dim_v": 128, "causal": True},
        decode={"heads_kv": 1, "head_dim": 576, "head_dim_v": 512},
    ),
    "vit-l16": Preset(
        "ViT-L/16 at 224 and 384 pixels",
        {"heads_q": 16, "head_dim": 64},
        phases=("prefill", "training"),
        fixed=({"seqlen_q": 197, "batch": 32}, {"seqlen_q": 577, "batch": 16}),
    ),
    "sdxl-cross": Preset(
        "SDXL cross-attention: 1024-pixel latents to 77 text tokens",
        {"head_dim": 64},
        phases=("prefill", "training"),
        fixed=(
            {"heads_q": 10, "seqlen_q": 4096, "seqlen_kv": 77, "batch": 2},
            {"heads_q": 20, "seqlen_q": 1024, "seqlen_kv": 77, "batch": 2},
        ),
    ),
    "flux": Preset(
        "FLUX.1 joint attention: 1024-pixel latents and 512 text tokens",
        {"heads_q": 24, "head_dim": 128},
        phases=("prefill", "training"),
        fixed=({"seqlen_q": 4608, "batch": 1},),
    ),
}
"""By the name that --preset takes."""


def preset_calls(
    names: Iterable[str],
    phases: Iterable[str] = PHASES,
    dtype: str = "bf16",
    lengths: Iterable[int] = (),
    batches: Iterable[int] = (),
) -> list[Call]:
    """The calls of these models in these phases, each once, the models' own order kept.

    Raises:
        UnknownNameError: no preset, or no phase, of that name.
    """
    found: dict[Call, None] = {}
    phases, lengths, batches = tuple(phases), tuple(lengths), tuple(batches)
    for phase in phases:
        if phase not in PHASES:
            raise UnknownNameError("phase", phase, PHASES)
    for name in names:
        if name not in PRESETS:
            raise UnknownNameError("preset", name, PRESETS)
        for phase in phases:
            found |= dict.fromkeys(PRESETS[name].calls(phase, dtype, lengths, batches))
    return list(found)
