"""What ranks do in tests/distributed/test_example.py: train the example's model on a cut sequence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))


def alone(steps: int) -> list[float]:
    """The losses of one process on whole sequences."""
    from context_parallel import CONFIG, train
    from language_model import LanguageModel
    from train_gqa import batches

    from attnrt.nn import ModelConfig

    torch.manual_seed(0)
    return train(LanguageModel(ModelConfig(**CONFIG)), batches(steps, torch.device("cpu")))


def together(steps: int, ways: list[tuple[str, str]]) -> dict[Any, list[float]]:
    """(method, placement) to the losses of this group."""
    from context_parallel import CONFIG, SharedModel, train
    from train_gqa import batches

    from attnrt.nn import ModelConfig

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for method, placement in ways:
        torch.manual_seed(0)
        model = SharedModel(ModelConfig(**CONFIG), mesh, method, placement)
        found[method, placement] = train(model, batches(steps, torch.device("cpu")), mesh, placement)
    return found
