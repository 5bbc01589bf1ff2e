"""In a job of several ranks rank 0 decides: its tuned policy, and its measurements, are everybody's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from figures import entry, write

from attnrt.evidence.calls import Call
from attnrt.settings import NAMES

ROOT = Path(__file__).resolve().parents[2]
CALL = Call(heads_q=2, seqlen_q=24, head_dim=8, dtype="fp32", layout="bhsd")

JOB = """
import json, sys, time
import torch, torch.distributed as dist
torch.set_num_threads({threads})
import attnrt
from attnrt.evidence import store
store.WAIT_SECONDS = (30.0, 30.0)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{rendezvous}", rank=rank, world_size=2)
q = torch.randn(1, 2, 24, 8)
if rank == 0:
    time.sleep(1.0)  # so that the other one asks first
found = attnrt.explain(q, q, q)
attnrt.attention(q, q, q, policy="measure")
measured = attnrt.last_decision()
if rank == 1:  # a request that rank 0 never sees
    from attnrt.evidence import on_call
    on_call.WAIT_SECONDS = 0.5
    q = torch.randn(1, 2, 7, 8)
    attnrt.attention(q, q, q, policy="measure")
own = attnrt.last_decision()
dist.barrier()
print(json.dumps([
    [d.policy, d.label, d.evidence, list(d.notices)] for d in (found, measured, own)
]), flush=True)
dist.destroy_process_group()
"""


def job(tmp_path: Path) -> list[Any]:
    """What each of two ranks says, each with a cache directory of its own."""
    import torch

    code = JOB.format(rendezvous=tmp_path / "rendezvous", threads=torch.get_num_threads())
    environ = {n: v for n, v in os.environ.items() if n not in NAMES} | {"PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(rank)],
            env={**environ, "ATTNRT_CACHE_DIR": str(tmp_path / str(rank)), "GLOO_SOCKET_IFNAME": "lo"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [p.communicate(timeout=240)[0] for p in ranks]
    assert [p.returncode for p in ranks] == [0, 0]
    return [json.loads(text) for text in said]


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="gloo is needed")
def test_rank_0_decides(tmp_path: Path) -> None:
    write(tmp_path / "0", entry(CALL, {"reference": 1.0, "torch.flash_cpu": 5.0}))
    write(tmp_path / "1", entry(CALL, {"torch.math": 1.0, "torch.flash_cpu": 5.0}))
    (zero, zero_measured, _), (one, one_measured, own) = job(tmp_path)
    assert zero == one
    assert one[:2] == ["tuned", "reference"] and str(tmp_path / "0") in one[2]
    assert zero_measured == one_measured and "measured on this call's own tensors" in one_measured[2]
    assert "measured on this call's own tensors" in own[2]
