"""Train a small grouped-query language model on the Python manual that ships with Python, with attnrt and with eager
attention from the same start on the same batches, and plot both losses.

    python examples/train_gqa.py [--groups 2] [--steps 200] [--plot docs/training.png]

`--groups` is num_query_groups: null (one KV head per query head), 1 or a divisor of the heads.
"""

from __future__ import annotations

import argparse
import time
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
import yaml
from language_model import Eager, LanguageModel, with_attention
from torch import Tensor

import attnrt
from attnrt.nn import ModelConfig

LENGTH, BATCH, RATE = 128, 8, 1e-3


def text() -> Tensor:
    """The language reference, one byte a token."""
    return torch.tensor(list("\n".join(topics[name] for name in sorted(topics)).encode()), dtype=torch.long)


def batches(steps: int, device: torch.device) -> Tensor:
    """(steps, BATCH, LENGTH + 1) token ids, the same ones each time."""
    tokens = text()
    generator = torch.Generator().manual_seed(0)
    starts = torch.randint(len(tokens) - LENGTH - 1, (steps, BATCH, 1), generator=generator)
    return tokens[starts + torch.arange(LENGTH + 1)].to(device)


def train(model: LanguageModel, data: Tensor) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    losses = []
    for batch in data:
        logits = model(batch[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def smoothed(losses: list[float], over: int = 10) -> list[float]:
    return [sum(losses[max(0, i - over + 1) : i + 1]) / min(i + 1, over) for i in range(len(losses))]


def plot(curves: dict[str, list[float]], title: str, file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(smoothed(losses), style, label=name)
    axes.set(xlabel="step", ylabel="loss per byte (nats), mean of 10 steps", title=title)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    print(f"wrote {file}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", type=yaml.safe_load, default=2, help="num_query_groups: null, 1 or a divisor of 8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--plot", help="write the loss curves to this file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ModelConfig(
        num_query_groups=options.groups,
        num_attention_heads=8,
        hidden_size=128,
        num_layers=4,
        ffn_hidden_size=384,
        vocab_size=256,
        max_position_embeddings=LENGTH,
    )
    data = batches(options.steps, device)
    torch.manual_seed(0)
    model = LanguageModel(config).to(device)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{config.num_attention_heads} heads in {config.groups} groups, {parameters / 1e6:.1f}M parameters, {device}")
    curves = {}
    for name in ("attnrt", "eager"):
        model.load_state_dict(start)
        if name == "eager":
            with_attention(model, Eager)
        begin = time.perf_counter()
        curves[name] = train(model, data)
        seconds = time.perf_counter() - begin
        tokens = options.steps * BATCH * LENGTH / seconds
        ran = attnrt.last_decision()
        by = f" ({ran.label})" if name == "attnrt" and ran else ""
        losses = smoothed(curves[name])
        print(f"{name}{by}: loss {losses[0]:.3f} to {losses[-1]:.3f} in {options.steps} steps, {tokens:,.0f} tokens/s")
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    print(f"largest difference between the curves: {apart:.2g}")
    if options.plot:
        plot(curves, f"{config.num_attention_heads} heads, {config.groups} groups, {device}", options.plot)


if __name__ == "__main__":
    main()
