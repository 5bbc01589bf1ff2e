"""What ranks are joined by, and how long a message takes. Bandwidths are data-sheet figures, one direction, per GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnrt.errors import ArgumentError, UnknownNameError
from attnrt.request import check_size


@dataclass(frozen=True)
class Link:
    """bandwidth in bytes a second, one direction; latency in seconds a message."""

    name: str
    bandwidth: float
    latency: float
    source: str

    def seconds(self, size: float, messages: int = 1) -> float:
        return messages * self.latency + size / (self.bandwidth * REACHED)


REACHED = 0.8
"""The part of a data sheet's bandwidth that a large transfer is assumed to reach."""

LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        Link("nvlink", 450e9, 5e-6, "NVLink 4 (H100, H200): 900 GB/s in both directions together"),
        Link("nvlink5", 900e9, 5e-6, "NVLink 5 (B200): 1.8 TB/s in both directions together"),
        Link("pcie", 64e9, 10e-6, "PCIe 5.0 x16: 64 GB/s each way"),
        Link("infiniband", 50e9, 10e-6, "NDR InfiniBand: 400 Gb/s a port, one port a GPU"),
        Link("ethernet", 12.5e9, 30e-6, "100 Gb/s Ethernet, one port a GPU"),
    )
}
"""Latencies are assumptions: a few microseconds for a message between GPUs of one host, more through a network."""


@dataclass(frozen=True)
class Topology:
    """`ranks` GPUs, `per_host` of them in each host; `link` joins those of a host, `between` the hosts."""

    ranks: int
    link: Link
    between: Link
    per_host: int

    @classmethod
    def of(cls, ranks: int, link: str = "nvlink", between: str = "infiniband", per_host: int = 8) -> Topology:
        """By names.

        Raises:
            UnknownNameError: no link of that name. ArgumentError, ArgumentTypeError: a size that cannot be.
        """
        check_size("ranks", ranks, at_least=1)
        check_size("per_host", per_host, at_least=1)
        for argument, name in {"link": link, "between": between}.items():
            if name not in LINKS:
                raise UnknownNameError(argument, name, LINKS)
        if ranks > per_host and ranks % per_host:
            raise ArgumentError("ranks", ranks, f"whole hosts of per_host={per_host} GPUs are needed")
        return cls(ranks, LINKS[link], LINKS[between], min(per_host, ranks))

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.per_host)

    def everybody(self, size: float) -> float:
        """Seconds until every rank has received `size` bytes of what all ranks hold, or of the sums of it.

        What comes from other hosts enters a host once, through all of its ports.
        """
        if self.ranks == 1:
            return 0.0
        far = size * (self.ranks - self.per_host) / (self.ranks - 1)
        through = self.between.seconds(far / self.per_host, self.hosts - 1) if self.hosts > 1 else 0.0
        return max(through, self.link.seconds(size, min(self.ranks, self.per_host) - 1))

    def transposed(self, size: float) -> float:
        """... until every rank has received `size` bytes, an equal part from each other one."""
        if self.ranks == 1:
            return 0.0
        far = size * (self.ranks - self.per_host) / (self.ranks - 1)
        through = self.between.seconds(far, self.hosts - 1) if self.hosts > 1 else 0.0
        return max(through, self.link.seconds(size - far, self.per_host - 1))

    def passed_on(self, size: float) -> float:
        """... until every rank has received `size` bytes from the one before it."""
        if self.ranks == 1:
            return 0.0
        return (self.link if self.hosts == 1 else self.between).seconds(size)

    def describe(self) -> str:
        if self.hosts == 1:
            return f"{self.ranks} ranks on one host, {self.link.name}"
        return f"{self.ranks} ranks on {self.hosts} hosts, {self.link.name} inside, {self.between.name} between"
