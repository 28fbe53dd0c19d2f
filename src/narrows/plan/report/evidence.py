"""How much of a plan's predicted time was measured on the device, in numbers and in one line.

An op counts by its weakest source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from narrows.cost.devices import Device
from narrows.cost.price import Source
from narrows.plan.plan import Plan
from narrows.plan.planner import Deployment

__all__ = ["Evidence", "evidence_line", "nodes_line", "ranks_line"]

_WAY_OUT = "narrows calibrate measures such ranks"
_LEAST = 0.01
"""The share of unmeasured prices from which on it is mentioned: less cannot have decided much."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Predicted picoseconds of one or several plans by where their prices come from, strongest first: what was measured
    and what lies between two measured points, then what is scaled or of peaks alone."""

    ps: tuple[int, ...]

    @classmethod
    def of(cls, *plans: Plan) -> Evidence:
        """All plans added up, each run once."""
        ps = dict.fromkeys(Source, 0)
        for plan in plans:
            ps[plan.host_overhead.source] += plan.host_overhead.ps
            for segment in plan.segments:
                for op in segment.ops:
                    ps[op.source] += op.ps * segment.times
        return cls(tuple(ps.values()))

    @property
    def shares(self) -> dict[str, float]:
        """Share of the predicted time by source, those that are there; they add up to 1.

        >>> Evidence((1, 0, 0, 3)).shares
        {'measured': 0.25, 'roofline': 0.75}
        """
        total = sum(self.ps)
        return {source.label: ps / total for source, ps in zip(Source, self.ps, strict=True) if ps}

    @property
    def unmeasured(self) -> float:
        """The share that is neither measured nor between two measured points.

        >>> Evidence((1, 1, 0, 2)).unmeasured, Evidence((0, 0, 0, 0)).unmeasured
        (0.5, 0.0)
        """
        return sum(self.ps[Source.SCALED :]) / max(sum(self.ps), 1)


def evidence_line(device: str, plans: Mapping[str, Plan], *, way_out: str = _WAY_OUT) -> str:
    """One line if predictions rest on unmeasured prices, with the shares per plan; empty if they do not.

    Args:
        device: the name of what the plans are priced for.
        plans: by what they are for, in words: ``{"decode of 8 rows": plan}``.
        way_out: what the reader can do about it; empty for nothing.
    """
    found = {what: Evidence.of(plan) for what, plan in plans.items()}
    weak = {what: evidence for what, evidence in found.items() if evidence.unmeasured >= _LEAST}
    if not weak:
        return ""
    shares = "; ".join(f"{what} {_words(evidence)}" for what, evidence in weak.items())
    line = f"predictions for {device} rest on unmeasured prices: {shares}"
    return f"{line}; {way_out}" if way_out else line


def ranks_line(device: Device, num_ranks: int) -> str:
    """One line if a profile is of another number of ranks than plans are made for; empty if it is not."""
    measured = device.measured
    if measured is None or measured.num_ranks in (0, num_ranks):
        return ""
    return (
        f"the profile {device.name} is of {measured.num_ranks} rank(s), the mesh has {num_ranks}: what ranks share "
        f"with each other is priced as if they did not; make one with: narrows calibrate --num-ranks {num_ranks}"
    )


def nodes_line(deployment: Deployment) -> str:
    """One line on what connects the ranks where one node does not hold them all, or is only taken to; else empty."""
    topology, device, num_ranks = deployment.topology, deployment.device, deployment.mesh.size
    if not topology.is_one_node:
        between = deployment.network
        return (
            f"{topology.num_nodes} nodes of {topology.ranks_per_node} ranks, connected by {between.words}: "
            f"{between.source}"
        )
    if device.node_ranks is None or num_ranks <= device.node_ranks:
        return ""
    return (
        f"{num_ranks} ranks are priced as one node, and {device.name} has at most {device.node_ranks} in one; --nodes "
        f"{-(-num_ranks // device.node_ranks)}x{device.node_ranks} prices the network between them"
    )


def _words(evidence: Evidence) -> str:
    """
    >>> _words(Evidence((1, 0, 1, 2)))
    '25 % scaled + 50 % roofline'
    """
    weak = (Source.SCALED.label, Source.ROOFLINE.label)
    return " + ".join(f"{100 * share:.0f} % {label}" for label, share in evidence.shares.items() if label in weak)
