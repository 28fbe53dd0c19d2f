"""Ranks: started as threads or as processes, handed calls in order, watched, and ended.

The room decides who is late, stuck or gone; how activations move between ranks is `comm`'s.
"""

from narrows.ranks.launch import Launch
from narrows.ranks.processes import ProcessRanks
from narrows.ranks.threads import ThreadRanks, run_ranks

__all__ = ["Launch", "ProcessRanks", "ThreadRanks", "run_ranks"]
