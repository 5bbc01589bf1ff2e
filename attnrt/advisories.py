"""Known defects of kernels, as data: which versions, which calls, what goes wrong, what to do, and who found it.

The data is `configs/advisories.yaml`. A "refuse" makes the backend ineligible, a "warn" shows in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from attnrt.environment import Environment
    from attnrt.policies.conditions import Condition
    from attnrt.request import AttentionRequest

SUBJECTS = (
    "cudnn",
    "flash_attn_4",
    "flash_attn_3",
    "flash_attn_2",
    "triton",
    "torch",
    "torch.cudnn",
    "torch.flash",
    "torch.efficient",
    "torch.math",
    "reference",
)
"""What an advisory may be about: a backend, or one kernel of a backend that has several."""


@dataclass(frozen=True, eq=False)
class Advisory:
    """One known defect.

    Args:
        id: stable name, such as "CUDNN_BWD_NAN_BIAS_SKV_64".
        backends: from `SUBJECTS`.
        packages: (name, version range) pairs, all of which must be installed and in range.
        when: the calls it touches, in the language of `policies.conditions`; `holds` is what it compiles to.
        effect, remedy: one sentence each. source: where it was reported.
        action: "refuse" if the request alone tells that the result is wrong; "warn" if the values decide, or nobody has
            confirmed it for this very case.
        described: it is about what lies on a machine, so it is said of one that is described alone. Of this machine the
            backend's `answer` says whether it is so.
    """

    id: str
    backends: tuple[str, ...]
    packages: tuple[tuple[str, str], ...]
    when: Mapping[str, Any]
    effect: str
    remedy: str
    source: str
    action: Literal["refuse", "warn"]
    holds: Condition
    described: bool = False

    def touches(self, request: AttentionRequest, environment: Environment) -> bool:
        if self.described and not environment.simulated:
            return False
        return self.holds(request, environment) and all(environment.has(p, versions) for p, versions in self.packages)


@cache
def load_advisories() -> tuple[Advisory, ...]:
    """Every advisory that ships, in the file's order. Read once.

    Raises:
        PolicyError: the file is wrong.
    """
    from attnrt.policies import shipped

    file = resources.files("attnrt.configs") / "advisories.yaml"
    text = file.read_text("utf-8")
    if (found := shipped.advisories(text)) is None:
        from attnrt.policies.loading import read_advisories

        found = read_advisories(str(file), text)
    return found


@lru_cache(maxsize=256)
def about(backend: str, kernel: str) -> tuple[Advisory, ...]:
    """The advisories about a kernel of a backend, whatever the versions and the call."""
    names = {backend, f"{backend}.{kernel}"}
    return tuple(advisory for advisory in load_advisories() if names.intersection(advisory.backends))


def matching(backend: str, kernel: str, request: AttentionRequest, environment: Environment) -> tuple[Advisory, ...]:
    """The advisories that touch this call. A backend with a single kernel gives its own name for both."""
    return tuple(advisory for advisory in about(backend, kernel) if advisory.touches(request, environment))
