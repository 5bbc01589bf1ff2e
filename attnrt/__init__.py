"""attnrt: which attention kernel should this call run, here, now, and why?

>>> import torch, attnrt
>>> q = k = v = torch.randn(1, 8, 128, 64)
>>> attnrt.attention(q, k, v, causal=True).shape
torch.Size([1, 8, 128, 64])
>>> attnrt.last_decision().backend
'torch'
"""

from attnrt.api import attention, explain, explain_shape, last_decision
from attnrt.backends.base import Backend, Reason, Rule
from attnrt.decision import Decision, Verdict
from attnrt.environment import Environment
from attnrt.errors import (
    AdvisoryWarning,
    ArgumentError,
    ArgumentTypeError,
    AttnrtError,
    BackendFailed,
    BackendUnavailable,
    DemotionWarning,
    GradientError,
    PassThroughWarning,
    PolicyError,
    UnknownNameError,
    VariableError,
    VerificationFailed,
)
from attnrt.patch import patch_sdpa
from attnrt.registry import register_backend, unregister_backend
from attnrt.request import AttentionRequest
from attnrt.runtime import refresh
from attnrt.settings import override, use_backend

__version__ = "0.1.0"

__all__ = [
    "AdvisoryWarning",
    "ArgumentError",
    "ArgumentTypeError",
    "AttentionRequest",
    "AttnrtError",
    "Backend",
    "BackendFailed",
    "BackendUnavailable",
    "Decision",
    "DemotionWarning",
    "Environment",
    "GradientError",
    "PassThroughWarning",
    "PolicyError",
    "Reason",
    "Rule",
    "UnknownNameError",
    "VariableError",
    "Verdict",
    "VerificationFailed",
    "attention",
    "explain",
    "explain_shape",
    "last_decision",
    "override",
    "patch_sdpa",
    "refresh",
    "register_backend",
    "unregister_backend",
    "use_backend",
]
