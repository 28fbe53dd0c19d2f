"""Ranks as threads or processes: starts them, hands them calls in order, finds dead and stuck ones, and ends them.

Collectives between the ranks are in `comm`.
"""

from narrows.ranks.launch import Launch
from narrows.ranks.processes import ProcessRanks
from narrows.ranks.threads import ThreadRanks, run_ranks

__all__ = ["Launch", "ProcessRanks", "ThreadRanks", "run_ranks"]
