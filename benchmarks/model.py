"""What attnrt costs a whole model: forwards of 12 layers with attnrt and with PyTorch's SDPA, in one run, alternating.

    python benchmarks/model.py [--rounds 60] [--shapes 1x64 ...] [--no-compile] [--json FILE]

On the CPU, one thread, the same weights. Each round runs both, and the model with SDPA once more, in turns of who is
first; the figures are medians of the thread's CPU time, which other work on the machine disturbs least, and of the
ratio within each round. Where buffers happen to lie is a few percent of a short call and stays so for a whole process,
so before each call blocks of random sizes are taken, which moves them. What the second SDPA is over the first is what
the machine can tell apart. Short calls take more rounds. With transformers installed, a Llama of 12 layers too, its
"sdpa" against "attnrt". On a GPU, wall time, synchronised.

Compare compiled models with an empty TORCHINDUCTOR_CACHE_DIR: kernels kept from another machine may be for its
instructions.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import attnrt
from attnrt.nn import load_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from language_model import SDPA, LanguageModel, with_attention

SHAPES = ("1x64", "1x256", "4x128")
"""Batch and tokens."""
SHORT = 128
"""Tokens below which four times as many rounds are run."""


def alternating(
    variants: dict[str, Callable[[], Any]], rounds: int, device: torch.device
) -> tuple[dict[str, float], dict[str, float]]:
    """Median seconds a call of each, and the medians of each over sdpa within a round."""
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for function in variants.values():
        for _ in range(3):
            function()
    for index in range(rounds):
        order = list(variants.items())
        order = order[index % len(order) :] + order[: index % len(order)]
        for name, function in order if index // len(order) % 2 else reversed(order):
            spacer = [torch.empty(16 * random.randint(1, 1 << 14)) for _ in range(8)]  # see the top
            if device.type == "cuda":
                torch.cuda.synchronize()
                start = time.perf_counter()
                function()
                torch.cuda.synchronize()
                samples[name].append(time.perf_counter() - start)
            else:
                start = time.thread_time()
                function()
                samples[name].append(time.thread_time() - start)
            del spacer
    ratios = {
        name: statistics.median([one / other for one, other in zip(values, samples["sdpa"], strict=True)])
        for name, values in samples.items()
    }
    return {name: statistics.median(values) for name, values in samples.items()}, ratios


def share(models: dict[str, Any]) -> None:
    """One set of weights, at one place in memory: where weights lie changes how fast they are read."""
    for model in models.values():
        model.load_state_dict(models["sdpa"].state_dict(), assign=True)


def our_models(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    """The models, how many layers, and the vocabulary."""
    config = load_config("small_gqa")
    torch.manual_seed(0)
    models = {name: LanguageModel(config).to(device, dtype).eval() for name in ("sdpa", "attnrt", "again")}
    with_attention(models["sdpa"], SDPA)
    with_attention(models["again"], SDPA)
    share(models)
    return models, config.num_layers, config.vocab_size


def llamas(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Any], int, int]:
    # It looks for a package named kernels, and finds the benchmark of that name beside this file.
    sys.path[:] = [p for p in sys.path if Path(p).resolve() != Path(__file__).resolve().parent]
    import transformers

    from attnrt.integrations.transformers import register

    register()
    config = transformers.LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    models = {}
    for name, how in (("sdpa", "sdpa"), ("attnrt", "attnrt"), ("again", "sdpa")):
        model = transformers.LlamaForCausalLM._from_config(copy.deepcopy(config), attn_implementation=how)
        models[name] = model.to(device, dtype).eval()
    share(models)
    return models, config.num_hidden_layers, config.vocab_size


def logits(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.logits


@torch.inference_mode()
def measure(
    title: str, models: dict[str, Any], vocabulary: int, shapes: list[str], rounds: int, device: torch.device
) -> dict[str, float]:
    """Prints a line a shape; gives the ratios."""
    # A compiled model has the attributes of the one inside.
    options = {} if hasattr(next(iter(models.values())), "blocks") else {"use_cache": False}
    found = {}
    for batch, length in (map(int, shape.split("x")) for shape in shapes):
        tokens = torch.randint(vocabulary, (batch, length), device=device)
        apart = (logits(models["attnrt"](tokens, **options)) - logits(models["sdpa"](tokens, **options))).abs().max()
        calls = {name: lambda m=model, t=tokens: m(t, **options) for name, model in models.items()}  # type: ignore[misc]
        seconds, ratios = alternating(calls, rounds * (4 if batch * length < SHORT else 1), device)
        found[f"{title} {batch}x{length}"] = ratios["attnrt"]
        print(
            f"{title:31s} {batch} x {length:4d}   sdpa {seconds['sdpa'] * 1e3:8.2f} ms  attnrt"
            f" {seconds['attnrt'] * 1e3:8.2f} ms   {ratios['attnrt']:6.4f}x   sdpa again {ratios['again']:6.4f}x  "
            f" (outputs {apart:.1e} apart)",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="BxS", help="batch and tokens")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which needs a C++ compiler")
    parser.add_argument("--json", help="also write the ratios to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kind = "wall time" if device.type == "cuda" else "CPU time of one thread"
    print(f"torch {torch.__version__}, {device}, {dtype}, median {kind} of {options.rounds} alternating rounds\n")
    makers = {"12 layers of attnrt.nn": our_models}
    if find_spec("transformers"):
        makers["Llama of transformers"] = llamas
    ratios: dict[str, float] = {}
    for name, make in makers.items():
        models, layers, vocabulary = make(device, dtype)
        assert layers == 12
        ratios |= measure(name, models, vocabulary, options.shapes, options.rounds, device)
        if not options.no_compile:
            compiled = {n: torch.compile(model, dynamic=False) for n, model in models.items()}
            ratios |= measure(f"{name}, compiled", compiled, vocabulary, options.shapes, options.rounds, device)
    ran = attnrt.last_decision()
    print(f"\nattnrt ran {ran.label if ran else '?'}; slowest ratio {max(ratios.values()):.4f}")
    if options.json:
        Path(options.json).write_text(json.dumps({"torch": torch.__version__, "device": str(device), "ratios": ratios}))


if __name__ == "__main__":
    main()
