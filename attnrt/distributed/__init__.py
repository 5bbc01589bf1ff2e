"""Attention over a sequence that is cut across ranks, on torch.distributed, over any backend of the selector."""

from attnrt.distributed.api import context_parallel_attention, explain, explain_shape, last_decision
from attnrt.distributed.choice import MethodVerdict, ParallelDecision
from attnrt.distributed.links import LINKS, Link, Topology
from attnrt.distributed.placement import Placement
from attnrt.distributed.request import ParallelRequest
from attnrt.distributed.sharding import local_positions, shard, unshard
from attnrt.errors import MethodUnavailable, RankFailed, RanksDisagree

__all__ = [
    "LINKS",
    "Link",
    "MethodUnavailable",
    "MethodVerdict",
    "ParallelDecision",
    "ParallelRequest",
    "Placement",
    "RankFailed",
    "RanksDisagree",
    "Topology",
    "context_parallel_attention",
    "explain",
    "explain_shape",
    "last_decision",
    "local_positions",
    "shard",
    "unshard",
]
