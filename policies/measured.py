"""Preference by measurement: the figures of the calls nearest to this one, and the static policy everywhere else.

Pure: files are read elsewhere, before. A call is compared with measured ones of its own kind only (dtype, head dims,
features, training), by how many times longer, wider or more numerous they are.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

from attnrt.policies.base import REST, InformedRanking, Policy, Ranking, informed
from attnrt.policies.kinds import Kind, Place, distance, kind_of, place_of

if TYPE_CHECKING:
    from attnrt.environment import Environment
    from attnrt.request import AttentionRequest

REACH = 2.0
"""How far the nearest measured call may be, in doublings (see `distance`): beyond it nothing is known."""
NEIGHBOURS = 4
MANY = 64 << 20
"""Bytes of float32 scores from which a kernel that holds them all does not go ahead by its speed."""
LISTED = 2.0
"""Kernels this many times as slow as the fastest are left where the static policy puts them."""
SAME_TO_MINOR = ("torch", "attnrt")
"""A change of their minor version makes every figure void."""
DEPENDS = {
    "cudnn": ("cudnn", "torch.cudnn"),
    "nvidia-cudnn-frontend": ("cudnn",),
    "triton": ("triton",),
    "flash-attn": ("flash_attn_2",),
    "flash-attn-3": ("flash_attn_3",),
    "flash-attn-4": ("flash_attn_4",),
}
"""Whose figures another minor version of a package makes void."""


class Known(NamedTuple):
    """What the registry has on a kernel: its backend, that one's family, and whether it never holds the scores."""

    backend: str
    family: str | None
    fused: bool


class Point(NamedTuple):
    """One measured call: seconds by kernel name ("torch.flash_cpu"), what was wrong with others, and when."""

    place: Place
    device: Mapping[str, float]
    """On the device alone: what a CUDA graph replays."""
    wrong: Mapping[str, str]
    date: str
    host: Mapping[str, float] = {}
    """Until the call has returned to Python; nothing on a CPU, where that is the call."""

    @property
    def seconds(self) -> dict[str, float]:
        """In a long row of calls: on the device, or until they have returned to Python if that is longer."""
        return {name: max(value, self.host.get(name, 0.0)) for name, value in self.device.items()}


@dataclass(frozen=True)
class Machine:
    """What the figures were measured on, as far as they depend on it."""

    device: str
    arch: str
    sm_count: int | None
    threads: int | None
    attnrt: str
    packages: tuple[tuple[str, str | None], ...]
    driver: str | None = None
    cuda: str | None = None

    def differs(self, here: Machine, kernels: Iterable[str]) -> tuple[list[str], list[str]]:
        """(what makes figures from this machine void `here`, what a reader should only know).

        Args:
            kernels: those that were measured: a package matters as far as one of them depends on it.
        """
        void: list[str] = []
        known: list[str] = []
        for name, ours, theirs in (
            ("on", self.device, here.device),
            ("for", self.arch, here.arch),
            ("with SMs:", self.sm_count, here.sm_count),
            ("with CPU threads:", self.threads, here.threads),
        ):
            if ours != theirs:
                void.append(f"measured {name} {ours}, and here it is {theirs}")
        measured = set(kernels) | {k.partition(".")[0] for k in kernels}
        before, now = {**dict(self.packages), "attnrt": self.attnrt}, {**dict(here.packages), "attnrt": here.attnrt}
        for package, version in now.items():
            was = before.get(package)
            if was == version:
                continue
            matters = package in SAME_TO_MINOR or not measured.isdisjoint(DEPENDS.get(package, ()))
            if was is None:
                known.append(f"{package} {version} was not installed then")
            elif version is not None and matters and _minor(was) != _minor(version):
                void.append(f"measured with {package} {was}, and {version} is here")
            elif version is not None:
                known.append(f"measured with {package} {was}, and {version} is here")
        for name, was, version in (("driver", self.driver, here.driver), ("CUDA", self.cuda, here.cuda)):
            if was is not None and version is not None and was != version:
                known.append(f"measured with {name} {was}, and {version} is here")
        return void, known


def _minor(version: str) -> list[str]:
    return version.partition("+")[0].split(".")[:2]


@dataclass(frozen=True, eq=False)
class Table:
    """The figures of one file."""

    file: str
    machine: Machine
    margin: float
    date: str
    """Of its newest figure."""
    points: Mapping[Kind, tuple[Point, ...]]

    @cached_property
    def kernels(self) -> frozenset[str]:
        return frozenset(name for points in self.points.values() for p in points for name in p.device)

    def nearest(self, kind: Kind, place: Place) -> list[tuple[float, Point]]:
        """(distance, point) of the measured calls around this one, nearest first. An exact one stands alone.

        Of several that lie in the same direction only the first counts: one is left out that is nearer to a nearer one
        than to the call.
        """
        found = sorted(
            ((distance(place, p.place), i, p) for i, p in enumerate(self.points.get(kind, ())) if p.device),
            key=lambda entry: entry[:2],
        )
        if not found or found[0][0] > REACH:
            return []
        if found[0][0] == 0:
            return [(0.0, found[0][2])]
        around: list[tuple[float, Point]] = []
        for d, _, point in found:
            if d > REACH + 1 or len(around) == NEIGHBOURS:
                break
            if all(distance(point.place, kept.place) >= d for _, kept in around):
                around.append((d, point))
        return around

    def wrong(self, kind: Kind) -> dict[str, str]:
        """Kernels that gave a wrong result for some call of the kind."""
        return {name: said for p in self.points.get(kind, ()) for name, said in p.wrong.items()}


def relative(
    near: list[tuple[float, Point]], able: Container[str], place: Place, replayed: bool = False
) -> dict[str, float]:
    """Estimated time of each able kernel at `place` over that of the fastest, nearer calls counting more.

    On the device the measured ratios are carried over, on the host the times: what a call costs there does not grow
    with it, so a kernel that was the slower one in a short call for its host alone is not in a longer one.

    Args:
        replayed: the call is captured in a CUDA graph, so the host's time does not count.
    """
    ratios, hosts = Logs(), Logs()
    best = Logs()
    for d, point in near:
        device = {name: value for name, value in point.device.items() if name in able}
        weight, least = 1 / max(d * d, 1e-9), min(device.values(), default=1.0)
        best.add("", weight, least / work(point.place))
        for name, value in device.items():
            ratios.add(name, weight, value / least)
            if name in point.host and not replayed:
                hosts.add(name, weight, point.host[name])
    if not (found := ratios.means()):
        return {}
    fastest, host = best.means()[""] * work(place), hosts.means()
    seconds = {name: max(ratio * fastest, host.get(name, 0.0)) for name, ratio in found.items()}
    shortest = min(seconds.values())
    return {name: value / shortest for name, value in seconds.items()}


def work(place: Place) -> float:
    """What the time on a device grows with, within a kind: scores."""
    seen = min(place.seqlen_kv, place.window or place.seqlen_kv)
    return float(place.batch * place.heads_q * place.seqlen_q * max(1, seen))


class Logs:
    """Weighted geometric means by name."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, name: str, weight: float, value: float) -> None:
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += weight * math.log(value)
        entry[1] += weight

    def means(self) -> dict[str, float]:
        return {name: math.exp(total / weight) for name, (total, weight) in self._sums.items()}


@dataclass(frozen=True, eq=False, kw_only=True)
class MeasuredPolicy(Policy):
    """Tables of figures over a static policy, whose preference stands wherever it is not beaten by the margin.

    Attributes:
        static: what serves where nothing was measured. tables: one for each device that was.
        kernels: every kernel that there is, by name, in the order of the registry.
        here: (device type, facts) of this machine that an `Environment` does not carry: CPU model, driver.
        automatic: it was found, not asked for: on a simulated machine it keeps out of the way.
        refused: files that are not used at all, and why.
    """

    static: Policy
    tables: tuple[Table, ...]
    kernels: Mapping[str, Known]
    here: Mapping[str, tuple[str, str | None]] = field(default_factory=dict)
    automatic: bool = True
    refused: tuple[str, ...] = ()
    name: str = "tuned"

    @property
    def on_failure(self) -> Literal["raise", "next"]:  # type: ignore[override]
        return self.static.on_failure

    @property
    def deterministic(self) -> bool:  # type: ignore[override]
        return self.static.deterministic

    @property
    def allow_padding(self) -> bool:  # type: ignore[override]
        return self.static.allow_padding

    @property
    def source(self) -> str:  # type: ignore[override]
        return ", ".join(t.file for t in self.tables) or self.static.source

    @property
    def description(self) -> str:  # type: ignore[override]
        if not self.tables:
            return self.static.description
        measured = [
            f"{sum(map(len, t.points.values()))} calls on {t.machine.device}, {t.date[:10]}" for t in self.tables
        ]
        return f"measured ({'; '.join(measured)}); elsewhere {self.static.name}"

    def rank(self, request: AttentionRequest, environment: Environment) -> InformedRanking:
        if environment.simulated and self.automatic:
            return self._static(request, environment, ())
        table, notices = self.table_for(environment)
        notices += self.refused
        if table is None:
            return self._static(request, environment, notices)
        kind, place = kind_of(request), place_of(request)
        wrong = table.wrong(kind)
        near = table.nearest(kind, place)
        times = relative(near, self.kernels.keys() - wrong.keys(), place, request.capturing)
        if not times:
            what = f"no call near {place.heads}, {place.lengths}" if kind in table.points else f"nothing for {kind}"
            told = (f"tuned policy from {table.file}, measured {table.date[:10]}, has {what}", *notices)
            return informed(self._static(request, environment, told), wrong=tuple(wrong.items()))
        fallback = self.static.rank(request, environment)
        order = self.prefer(times, fallback.order, table.margin, request)
        why = f"{_where(near)}: {_figures(near, times, request.capturing)}{_kept(order, times)}"
        ranking = Ranking(
            order=tuple(dict.fromkeys((*(n for n in order if times[n] <= LISTED), *fallback.order))),
            line=f"{self.name}: {kind}",
            why=f"{why}; tuned policy from {table.file}, measured {table.date[:10]}",
        )
        return informed(ranking, policy=self.name, notices=notices, wrong=tuple(wrong.items()))

    def prefer(
        self, times: Mapping[str, float], static: tuple[str, ...], margin: float, request: AttentionRequest
    ) -> list[str]:
        """Kernels by time; among those within the margin of the fastest that is left, the static preference decides.

        A kernel that would hold many scores is left where the static policy has it, however fast it is.
        """
        many = request.scores * 4 > MANY
        left, order = {n: x for n, x in times.items() if not many or self.kernels[n].fused}, []
        place = {name: self._place(name, static) for name in times}
        while left:
            limit = min(left.values()) * (1 + margin)
            chosen = min((n for n in left if left[n] <= limit), key=lambda n: (place[n], left[n]))
            order.append(chosen)
            del left[chosen]
        return order

    def _place(self, name: str, static: tuple[str, ...]) -> tuple[int, int]:
        """Where the static order has a kernel, by its own name, its backend's, its family's, or as one of the rest."""
        known = self.kernels[name]
        at = next((static.index(n) for n in (name, known.backend, known.family, REST) if n in static), len(static))
        return at, list(self.kernels).index(name)

    def table_for(self, environment: Environment) -> tuple[Table | None, tuple[str, ...]]:
        """The table for this device with what is to be said of it; or why there is none."""
        left_out: list[str] = []
        for table in self.tables:
            if (table.machine.arch == "cpu") != (environment.device_type == "cpu"):
                continue
            void, known = table.machine.differs(self._machine(environment, table.machine), table.kernels)
            if not void:
                return table, tuple(f"{table.file}: {fact}" for fact in known)
            left_out.append(f"{table.file} is not used: {'; '.join(void)}. `attnrt tune` measures again")
        return None, tuple(left_out)

    def _machine(self, environment: Environment, like: Machine) -> Machine:
        """This machine, or a simulated one, to compare with the table's."""
        from attnrt import __version__

        device, driver = self.here.get(environment.device_type, (environment.name, None))
        if environment.simulated:  # it is asked about by arch and versions; the rest is taken as it was
            device, driver = like.device, like.driver
        return Machine(
            device=device if environment.device_type == "cpu" or environment.simulated else environment.name,
            arch=environment.arch,
            sm_count=like.sm_count if environment.simulated else environment.sm_count,
            threads=like.threads if environment.simulated else environment.threads,
            attnrt=__version__,
            packages=environment.packages,
            driver=driver,
            cuda=environment.cuda,
        )

    def _static(self, request: AttentionRequest, environment: Environment, notices: tuple[str, ...]) -> InformedRanking:
        return informed(self.static.rank(request, environment), policy=self.static.name, notices=notices)


def _where(near: list[tuple[float, Point]]) -> str:
    """'measured at 4k and 8k (B 1, 32/8 heads)', of the calls that weigh most."""
    if near[0][0] == 0:
        place = near[0][1].place
        return f"measured at {place.lengths} ({place.heads})"
    total = sum(1 / (d * d) for d, _ in near)
    heavy = [p.place for d, p in near if 1 / (d * d) >= 0.1 * total]
    heads = {p.heads for p in heavy}
    if len(heads) == 1:
        lengths = dict.fromkeys(p.lengths for p in sorted(heavy, key=lambda p: (p.seqlen_q, p.seqlen_kv)))
        return f"measured at {_and(list(lengths))} ({heads.pop()})"
    return f"measured at {_and([f'{p.lengths} ({p.heads})' for p in heavy])}"


def _and(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _figures(near: list[tuple[float, Point]], times: Mapping[str, float], replayed: bool) -> str:
    fastest = sorted(times, key=lambda n: times[n])
    if near[0][0] == 0:
        measured = near[0][1].device if replayed else near[0][1].seconds
        return ", ".join(f"{n} {figure(measured[n])}" for n in fastest)
    return ", ".join(f"{n} {times[n]:.2f}x" for n in fastest)


def figure(seconds: float) -> str:
    """Seconds for a person: '1.23 ms'."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _kept(order: list[str], times: Mapping[str, float]) -> str:
    if not order or times[order[0]] <= 1:
        return ""
    fastest = min(times, key=lambda n: times[n])
    why = "within the margin" if fastest in order else f"as {fastest} holds all scores"
    return f"; {order[0]} is kept, {why}"
