"""Chunked prefill and greedy decoding with a KV cache, for MHA, GQA and MQA: tokens per second, and what ran.

    python examples/decode.py [--config small_gqa] [--tokens 32] [--paged]

Weights are random. Each result is compared with the same decoding without a cache.
"""

from __future__ import annotations

import argparse
import time

import torch
from language_model import LanguageModel
from torch import Tensor

import attnrt
from attnrt.nn import KVCache, ModelConfig, PagedKVCache, load_config

BATCH, PROMPT, CHUNK, PAGE = 4, 64, 24, 16


@torch.inference_mode()
def decode(model: LanguageModel, prompt: Tensor, count: int, cache: KVCache | PagedKVCache) -> tuple[Tensor, list[str]]:
    """(B, count) new tokens, and the backends that ran: for the prefill, then for the decode steps."""
    ran = []
    for chunk in prompt.split(CHUNK, 1):
        logits = model(chunk, cache.extend(chunk.shape[1]))
        ran.append(f"prefill {attnrt.last_decision().label}")  # type: ignore[union-attr]
    tokens = [logits[:, -1:].argmax(-1)]
    while len(tokens) < count:
        logits = model(tokens[-1], cache.extend(1))
        tokens.append(logits.argmax(-1))
        ran.append(f"decode {attnrt.last_decision().label}")  # type: ignore[union-attr]
    return torch.cat(tokens, 1), list(dict.fromkeys(ran))


@torch.inference_mode()
def without_cache(model: LanguageModel, prompt: Tensor, count: int) -> Tensor:
    """The same tokens, everything computed anew for each."""
    tokens = prompt
    for _ in range(count):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], 1)
    return tokens[:, prompt.shape[1] :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="small_gqa", help="a name under configs/models, or a YAML file")
    parser.add_argument("--tokens", type=int, default=32, help="how many to decode")
    parser.add_argument("--paged", action="store_true", help="keep the cache in pages")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    base = load_config(options.config)
    wrong = 0
    for groups in dict.fromkeys((None, base.groups, 1)):
        config: ModelConfig = base.but(num_query_groups=groups)
        torch.manual_seed(0)
        model = LanguageModel(config).to(device, dtype).eval()
        prompt = torch.randint(config.vocab_size, (BATCH, PROMPT), device=device)
        length = PROMPT + options.tokens
        cache: KVCache | PagedKVCache
        if options.paged:
            pages = BATCH * -(-length // PAGE)
            cache = PagedKVCache.of(config, BATCH, pages, PAGE, max_length=length, device=device, dtype=dtype)
        else:
            cache = KVCache.of(config, BATCH, length, device=device, dtype=dtype)
        decode(model, prompt, 2, cache)  # what compiles, compiles here
        cache.reset()
        begin = time.perf_counter()
        tokens, ran = decode(model, prompt, options.tokens, cache)
        if device.type == "cuda":
            torch.cuda.synchronize()
        rate = tokens.numel() / (time.perf_counter() - begin)
        same = torch.equal(tokens, without_cache(model, prompt, options.tokens))
        wrong += not same
        held = (cache.k.numel() + cache.v.numel()) * cache.k.element_size() / 2**20
        heads = f"{config.num_attention_heads} heads, {config.groups} groups"
        verdict = "as" if same else "NOT as"
        print(f"{heads}: {rate:7,.0f} tokens/s, cache {held:5.1f} MiB, {', '.join(ran)}; {verdict} without a cache")
    # In 16 bits two tokens can be so close that the order of a sum decides.
    if wrong and dtype == torch.float32:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
