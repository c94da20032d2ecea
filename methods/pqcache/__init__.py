"""PQCache as published (:class:`PQCache`), and with additions (:class:`PQCachePlus`)."""

from methods.pqcache.clustering import adaptive_iterations
from methods.pqcache.method import PQCache
from methods.pqcache.plus import PQCachePlus
from methods.pqcache.plus_state import PQCachePlusState
from methods.pqcache.state import PQCacheState

__all__ = ["PQCache", "PQCachePlus", "PQCachePlusState", "PQCacheState", "adaptive_iterations"]
