"""Every error attnrt raises on purpose. All are `AttnrtError` and one builtin kind, so either can be caught."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from attnrt.decision import Decision


class AttnrtError(Exception):
    """Base of every error attnrt raises on purpose."""


class _Argument(AttnrtError):
    """An argument, the value it had, and what would be right."""

    def __init__(self, argument: str, value: Any, expected: str) -> None:
        self.argument, self.value, self.expected = argument, value, expected
        super().__init__(f"{argument}={shown(value)}: {expected}")


class ArgumentError(_Argument, ValueError):
    """An argument has a value that cannot be right."""


class ArgumentTypeError(_Argument, TypeError):
    """An argument has a type or dtype that cannot be right."""


class UnknownNameError(ArgumentError):
    """A backend, policy, environment or variable of that name does not exist."""

    def __init__(self, argument: str, value: Any, valid: Iterable[str]) -> None:
        self.valid = tuple(valid)
        super().__init__(
            argument, value, f"no such name{nearest(value, self.valid)}; valid are {', '.join(self.valid)}"
        )


class DeviceLost(AttnrtError, RuntimeError):
    """A kernel left the GPU in a state in which this process can run nothing on it any more."""


class VariableError(AttnrtError, ValueError):
    """An environment variable of ours is malformed, or an `ATTNRT_` name does not exist."""


class PolicyError(AttnrtError, ValueError):
    """A policy or advisory file is wrong; `file` and `line` say where."""

    def __init__(self, file: str, line: int | None, message: str) -> None:
        self.file, self.line = file, line
        super().__init__(f"{file}:{line}: {message}" if line else f"{file}: {message}")


class BackendUnavailable(AttnrtError, RuntimeError):
    """No backend, or not the forced one, can serve the call. `report` holds every reason of every backend."""

    def __init__(self, message: str, report: Decision) -> None:
        self.report = report
        super().__init__(message)


class BackendFailed(AttnrtError, RuntimeError):
    """The chosen kernel raised while it ran. `__cause__` is its own error, `report` the choice."""

    def __init__(self, message: str, report: Decision) -> None:
        self.report = report
        super().__init__(message)


class GradientError(AttnrtError, RuntimeError):
    """A gradient was asked for that no kernel computes, or that the forward was told not to prepare for."""


class TransformError(GradientError, NotImplementedError):
    """torch.compile traces a transform of torch.func around attention. Without fullgraph it then leaves it to eager."""


class VerificationFailed(AttnrtError, RuntimeError):
    """`ATTNRT_VERIFY=1` found a result that differs from the reference's. `report` holds the choice, `script` the path
    of a script that shows it again (None if it could not be written)."""

    def __init__(self, message: str, report: Decision, script: Path | None = None) -> None:
        self.report, self.script = report, script
        super().__init__(message)


class IntegrationError(AttnrtError, RuntimeError):
    """A library that attnrt was asked to plug into is absent, or of a version it does not know."""


class ConfigError(AttnrtError, ValueError):
    """A module's configuration is wrong; the message says every field that is, and of which file."""


class MethodUnavailable(AttnrtError, RuntimeError):
    """No way, or not the named one, of cutting a call across ranks can serve it. `report` holds every reason."""

    def __init__(self, message: str, report: Any) -> None:
        self.report = report
        super().__init__(message)


class RanksDisagree(AttnrtError, RuntimeError):
    """Ranks that take part in one call differ in what they ask for, or one of them cannot take part; none of them ran.

    Every rank raises it with the same text. `ranks` has what each one said.
    """

    def __init__(self, message: str, ranks: dict[int, str]) -> None:
        self.ranks = ranks
        super().__init__(message)


class RankFailed(AttnrtError, RuntimeError):
    """An exchange with the other ranks broke off or ran into the group's timeout. `__cause__` is torch's own error."""


class DemotionWarning(RuntimeWarning):
    """A kernel failed, and, as the policy allows, the next candidate ran."""


class PassThroughWarning(RuntimeWarning):
    """`patch_sdpa` left a call, or a module, to PyTorch."""


class AdvisoryWarning(RuntimeWarning):
    """A known defect of the chosen kernel may touch this call."""


def nearest(value: Any, valid: Iterable[str]) -> str:
    """' (did you mean X?)' for the valid name closest to `value`, or nothing."""
    found = get_close_matches(str(value), list(valid), n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


def shown(value: Any) -> str:
    """A value as an error message shows it: tensors by shape and dtype, long things cut."""
    shape = getattr(value, "shape", None)
    if shape is not None and hasattr(value, "dtype"):
        return f"<{type(value).__name__} {tuple(shape)} {str(value.dtype).removeprefix('torch.')} on {value.device}>"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
