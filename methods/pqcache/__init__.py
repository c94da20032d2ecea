"""PQCache as published (:class:`PQCache`), and beyond the paper (:class:`PQCachePlus`)."""

from methods.pqcache.method import PQCache, PQCacheState, adaptive_iterations
from methods.pqcache.plus import PQCachePlus, PQCachePlusState

__all__ = ["PQCache", "PQCachePlus", "PQCachePlusState", "PQCacheState", "adaptive_iterations"]
