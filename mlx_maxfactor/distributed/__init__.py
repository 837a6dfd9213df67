"""Several machines: who updates what, and how they communicate."""

from .collectives import LostRankError, bounded_wait
from .sharding import Sharding

__all__ = ["LostRankError", "Sharding", "bounded_wait"]
