"""The exception tree of narrows.

NarrowsError
+-- ConfigError (also a ValueError)   what a user can cause: one clear line, the numbers, the way out; exit code 2
|   +-- CheckpointError               a file of the checkpoint is missing, truncated or not what config.json says
+-- LayoutError (also a ValueError)   a layout that is not legal, or a pair of layouts that no move connects
+-- PlanError                         a plan that would read a tensor in another layout than the one it has
+-- RankError                         a rank failed; raised on every rank of the world, naming the first one
    +-- CollectiveMismatchError            ranks met in different collectives (checked mode)
"""

__all__ = [
    "CheckpointError",
    "CollectiveMismatchError",
    "ConfigError",
    "LayoutError",
    "NarrowsError",
    "PlanError",
    "RankError",
]


class NarrowsError(Exception):
    """Base of everything narrows raises on purpose."""


class ConfigError(NarrowsError, ValueError):
    """A request that cannot be done; the message says why, with the numbers, and what would work."""


class CheckpointError(ConfigError):
    """A checkpoint that is incomplete, truncated, or inconsistent with its ``config.json``."""


class LayoutError(NarrowsError, ValueError):
    """A layout that is not legal on a mesh, or two layouts that no sequence of moves connects."""


class PlanError(NarrowsError):
    """A plan whose ops do not fit together: a stage would read a field whose sum is owed, or in another layout."""


class RankError(NarrowsError):
    """A rank of the world failed. Every other rank raises this too, naming the rank that failed first."""


class CollectiveMismatchError(RankError):
    """Ranks of one group met in different collectives: another label, sequence number, operation or shape."""
