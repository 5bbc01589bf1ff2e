"""How context parallelism is predicted to scale: to a million tokens and more, and to thousands of GPUs.

    python benchmarks/scaling.py [--plot docs/scaling.png]

A model on paper (attnrt/distributed/simulator.py), not a measurement. The speed of the local kernel is what PyTorch's
cuDNN kernel reached on one H200, read from docs/h200.md; bandwidths are data-sheet figures. One attention layer,
forward and backward, 64 query and 8 KV heads of 128, bf16, causal, zigzag placement, hosts of 8 GPUs joined by NVLink 4
inside, and by one port a GPU outside.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import attnrt
from attnrt.distributed import Topology
from attnrt.distributed.links import LINKS
from attnrt.distributed.request import METHODS, Method
from attnrt.distributed.simulator import Prediction, Rate, measured, predict, work_at_scale

ROOT = Path(__file__).resolve().parent.parent
RANKS = [2**i for i in range(13)]
HEADS, HEADS_KV, DIM = 64, 8, 128
FIXED, EACH = 1 << 20, 1 << 12
"""Tokens in all where more GPUs share the same call; tokens a GPU where the call grows with them."""


def kernel(which: str) -> Rate:
    """FLOP/s of PyTorch's cuDNN kernel on full blocks, GQA, head dim 128, by length: the rows of docs/h200.md."""
    pattern = rf"^\| {which} \| 128 \| GQA 4:1 \| full \| \d+ \| (\d+) \|[^|]*\|[^|]*\| *([\d.]+)[^|]*\|"
    rows = re.findall(pattern, (ROOT / "docs" / "h200.md").read_text(), re.MULTILINE)
    if not rows:
        raise SystemExit("docs/h200.md has no rows of that kernel")
    return measured({int(length): float(speed) * 1e12 for length, speed in rows})


def prediction(length: int, ranks: int, method: Method, between: str) -> Prediction | None:
    """None where the heads do not divide."""
    if method == "ulysses" and HEADS % ranks:
        return None
    shape = {"batch": 1, "heads_q": HEADS, "heads_kv": HEADS_KV, "seqlen_q": length, "head_dim": DIM}
    whole = attnrt.AttentionRequest.from_shape(**shape, causal=True, training=True)
    topology = Topology.of(ranks, "nvlink", between, min(8, ranks))
    return predict(work_at_scale(whole, ranks, method), topology, kernel("forward"), kernel("backward"))


def fits(length: int, ranks: int, method: Method) -> bool:
    """Within 100 GiB: gather holds every key, its gradients, and both in the ranks' order."""
    if method != "gather":
        return True
    row = HEADS_KV * 2 * DIM * 2
    return length * row * (2 + 2 * 2) <= 100 << 30


def table(lengths: dict[int, int], between: str) -> dict[Method, dict[int, Prediction]]:
    """Predictions by method and ranks; `lengths` has the sequence's length for each number of ranks."""
    found: dict[Method, dict[int, Prediction]] = {}
    for method in METHODS:
        for ranks, length in lengths.items():
            one = prediction(length, ranks, method, between)
            if one is not None and fits(length, ranks, method):
                found.setdefault(method, {})[ranks] = one
    return found


def efficiency(length: int, ranks: int, one: Prediction) -> float:
    """One GPU's time for the whole call, shared out, over the time that is predicted."""
    alone = prediction(length, 1, "gather", "infiniband")
    assert alone is not None
    return alone.seconds / ranks / one.seconds


def show(title: str, found: dict[Method, dict[int, Prediction]], lengths: dict[int, int]) -> None:
    print(f"\n{title}: time of a layer, and its part of one GPU's time / n")
    print(f"{'GPUs':>6} {'tokens':>12}" + "".join(f"{method:>24}" for method in METHODS))
    for ranks, length in lengths.items():
        cells = []
        for method in METHODS:
            one = found.get(method, {}).get(ranks)
            cells.append("" if one is None else f"{one.seconds:,.4g} s, {efficiency(length, ranks, one):.0%}")
        print(f"{ranks:>6} {length:>12,}" + "".join(f"{cell:>24}" for cell in cells))


def plot(file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = {"gather": "tab:blue", "ulysses": "tab:green", "ring": "tab:orange"}
    styles = {"infiniband": "-", "ethernet": "--"}
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    titles = (
        f"{tokens(FIXED)} tokens, shared by more and more GPUs",
        f"{tokens(EACH)} tokens a GPU, so a longer sequence",
    )
    for axes, title, lengths in zip(panels, titles, calls(), strict=True):
        for between, style in styles.items():
            for method, found in table(lengths, between).items():
                part = [efficiency(lengths[ranks], ranks, one) for ranks, one in found.items()]
                axes.plot(list(found), part, style, color=colors[method], marker=".")
        axes.set(xscale="log", ylim=(0, 1.05), xlabel="GPUs, 8 a host, NVLink inside\n(tokens of the sequence)")
        ticks = RANKS[::2]
        axes.set_xticks(ticks, [f"{n}\n({tokens(lengths[n])})" for n in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.set_title(title, fontsize=11)
    panels[0].set_ylabel("one GPU's time / n, over the predicted time")
    for method, color in colors.items():
        panels[0].plot([], [], color=color, label=method)
    panels[0].plot([], [], "k-", label="400 Gb/s InfiniBand between hosts")
    panels[0].plot([], [], "k--", label="100 Gb/s Ethernet between hosts")
    panels[0].legend(loc="lower left", fontsize=9)
    title = f"Predicted, not measured: forward and backward of a layer, {HEADS}/{HEADS_KV} heads of {DIM}, bf16, causal"
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    print(f"wrote {file}")


def calls() -> tuple[dict[int, int], dict[int, int]]:
    """Sequence lengths by ranks: one call shared, and one that grows."""
    return dict.fromkeys(RANKS, FIXED), {n: EACH * n for n in RANKS}


def tokens(count: int) -> str:
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}k"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", help="write the plot to this file")
    options = parser.parse_args()
    for link in ("nvlink", "infiniband", "ethernet"):
        print(f"{link}: {LINKS[link].bandwidth / 1e9:g} GB/s ({LINKS[link].source})")
    fixed, growing = calls()
    for between in ("infiniband", "ethernet"):
        show(f"{tokens(FIXED)} tokens in all, {between} between hosts", table(fixed, between), fixed)
        show(f"{tokens(EACH)} tokens a GPU, {between} between hosts", table(growing, between), growing)
    if options.plot:
        plot(options.plot)


if __name__ == "__main__":
    main()
