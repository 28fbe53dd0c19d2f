"""The networks between hosts that plans are priced for: bandwidth, latency, and where each figure comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from narrows.errors import ConfigError
from narrows.layout import Levels

__all__ = ["NETWORKS", "Network", "network"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """What connects the nodes of a topology; every node reaches every other at the same rate."""

    name: str
    title: str
    bytes_per_s: float
    """Of one network card, in each direction: nominal of InfiniBand and RoCE, what TCP leaves of Ethernet."""
    card_per_rank: bool = True
    """Each rank has its own card (HGX and DGX boxes); else all ranks of a node share one."""
    latency_s: float
    """What a step from one node to another adds to a collective."""
    source: str

    def group_bytes_per_s(self, levels: Levels) -> float:
        """What one group has between its nodes: the cards of its ranks on a node, or its share of the one card."""
        return self.bytes_per_s * levels.per_node if self.card_per_rank else self.bytes_per_s / levels.sharing

    @property
    def words(self) -> str:
        """For people: ``ib-400 (InfiniBand NDR, 50 GB/s per rank)``."""
        per = "rank" if self.card_per_rank else "host"
        return f"{self.name} ({self.title}, {self.bytes_per_s / 1e9:.3g} GB/s per {per})"


def network(name: str) -> Network:
    """The network called ``name``.

    Raises:
        ConfigError: there is none; the text lists those that there are.
    """
    try:
        return NETWORKS[name]
    except KeyError:
        raise ConfigError(f"unknown network {name!r}; known networks: {', '.join(NETWORKS)}") from None


_IB_LATENCY = 7.1e-6
"""Half of what an all-reduce of 16 KiB takes longer among 32 H100 on 4 hosts than among 16 on 2, which is two more
steps: 46.4 - 32.2 us (nccl-tests#309)."""
_ROCE_LATENCY = _IB_LATENCY + 1e-6
_IB = "nominal bandwidth; latency of nccl-tests#309, NCCL 2.26 on InfiniBand"
_ROCE = "nominal bandwidth; InfiniBand's latency + 1 us, assumed"
_TCP = "94 % of nominal, which TCP leaves at 1500 bytes a packet; latency assumed"


def _ethernet(gigabits: float, latency_s: float) -> Network:
    return Network(
        name=f"ethernet-{gigabits:g}",
        title=f"{gigabits:g} Gb/s Ethernet, TCP",
        bytes_per_s=gigabits * 0.94e9 / 8,
        card_per_rank=False,
        latency_s=latency_s,
        source=_TCP,
    )


NETWORKS: Mapping[str, Network] = MappingProxyType(
    {
        found.name: found
        for found in (
            Network(name="ib-200", title="InfiniBand HDR", bytes_per_s=25e9, latency_s=_IB_LATENCY, source=_IB),
            Network(name="ib-400", title="InfiniBand NDR", bytes_per_s=50e9, latency_s=_IB_LATENCY, source=_IB),
            Network(name="ib-800", title="InfiniBand XDR", bytes_per_s=100e9, latency_s=_IB_LATENCY, source=_IB),
            Network(name="roce-200", title="RoCE, 200 Gb/s", bytes_per_s=25e9, latency_s=_ROCE_LATENCY, source=_ROCE),
            Network(name="roce-400", title="RoCE, 400 Gb/s", bytes_per_s=50e9, latency_s=_ROCE_LATENCY, source=_ROCE),
            Network(name="roce-800", title="RoCE, 800 Gb/s", bytes_per_s=100e9, latency_s=_ROCE_LATENCY, source=_ROCE),
            _ethernet(100, 25e-6),
            _ethernet(10, 50e-6),
            _ethernet(1, 100e-6),
        )
    }
)
"""Every known network by name."""
