"""PQCache with additions: codebooks that are fitted to the queries, and an estimate of the unselected tokens."""

from __future__ import annotations

from dataclasses import dataclass

from methods.pqcache import codebook, tail
from methods.pqcache.cells import MOST_BITS, SEARCHES
from methods.pqcache.method import PQCache
from methods.pqcache.plus_state import PQCachePlusState
from pqbench.method import ConfigError, Geometry, LayerState


@dataclass(frozen=True)
class PQCachePlus(PQCache):
    """PQCache with additions, each of which is an option. With the defaults, the index has 36 bits per token and KV
    head: 24 for the key, 8 for the value, 4 for the spread.

    Codebook: see :func:`methods.pqcache.codebook.key_map`. With ``query_aware``, the squared error in K-Means is the
    expected squared error of q.k over the prompt's own queries of the KV head.

    Tail: the middle tokens that are not selected are added as a residual. ``pq`` uses their approximate weights and
    product-quantised values. ``mean`` uses the sum of their approximate weights and the mean value of all middle
    tokens. ``sampled`` estimates nothing from codes; a share of top_k goes to a uniform sample of the other tokens,
    each attended to exactly and weighted by the number of tokens that it represents (vAttention, arXiv 2510.05688, with
    a sample of fixed size). ``none`` adds nothing, as in the paper.

    Calibration: one factor per KV head corrects the estimated weight of the tail (see
    :func:`methods.pqcache.tail.tail_share`). It is fitted to the last 64 queries before the codebooks are computed,
    usually the last of the prompt.

    Spread: four bits per token hold the likely error of its estimated logit (:mod:`methods.pqcache.spread`), so that
    unusual keys, which codes describe worst, are not missed.

    Search by cells (:mod:`methods.pqcache.cells`): with few bits, all tokens with equal codes are scored once.

    Attributes:
        m: sub-spaces of keys; if the head dimension is not a multiple of it, keys are padded with zeros.
        codebook: plain, centred, rotated or query_aware.
        queries: number of last prompt queries that query_aware learns from; None for all.
        tail: none, mean, pq or sampled.
        m_v, b_v: sub-spaces and bits of the value codes of the pq tail.
        calibrated: correct the weight of the tail, see above; only for the tails mean and pq.
        sampled_share: share of top_k that the tail ``sampled`` gets, in [0, 1].
        spread: use the spread, see above; not with search by cells, whose tokens share one score.
        search: scan, cells (m * b at most 16), or auto, which uses cells if there are at least 4 tokens per cell and
            neither the tail nor the spread reads every code anyway.
        arranged: store the prompt in the order of the lists, so that tokens of a cell, which are selected together, are
            adjacent in memory. The selection stays the same (except that a ``sampled`` tail draws other tokens). The
            prompt's KV is copied when the index is built; the original is then freed if it is decoded from only once.
            Only with ``search=cells``, and not with ``refresh``, which makes new lists.
        top_p: attend only to as many of the top_k tokens as hold, with sinks and window, this share of the attention.
            Selected tokens count by estimated scores, sinks and window by exact ones. The number of tokens then differs
            by head and step. None for all of top_k; not with the tail ``sampled`` or search by cells.
        refresh: compute codebooks and codes again each time that this many tokens were generated, from all middle keys
            and with the queries of generated tokens included; None for never.
    """

    m: int = 3
    iterations: int | None = 10
    tolerance: float = 0.0
    codebook: str = "query_aware"
    queries: int | None = 1024
    tail: str = "pq"
    m_v: int = 1
    b_v: int = 8
    calibrated: bool = True
    spread: bool = True
    sampled_share: float = 0.5
    search: str = "auto"
    arranged: bool = False
    top_p: float | None = None
    refresh: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("codebook", codebook.KINDS), ("tail", tail.KINDS), ("search", SEARCHES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"pqcache_plus.{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if not 1 <= self.b_v <= 8 or self.m_v < 1:
            raise ConfigError(f"pqcache_plus needs m_v >= 1 and 1 <= b_v <= 8, got {self.m_v} and {self.b_v}")
        if not 0 <= self.sampled_share <= 1:
            raise ConfigError(f"pqcache_plus.sampled_share is {self.sampled_share}: it must lie in [0, 1]")
        if self.search == "cells" and self.m * self.b > MOST_BITS:
            raise ConfigError(
                f"pqcache_plus.search=cells needs m * b of at most {MOST_BITS} bits, got {self.m * self.b}"
            )
        if self.search == "cells" and self.spread:
            raise ConfigError(
                "pqcache_plus.search=cells gives tokens of a cell one score: set pqcache_plus.spread=false"
            )
        if self.top_p is not None:
            if not 0 < self.top_p <= 1:
                raise ConfigError(f"pqcache_plus.top_p is {self.top_p}: it must lie in (0, 1], or be null")
            if self.tail == "sampled" or self.search == "cells":
                raise ConfigError("pqcache_plus.top_p needs another tail than sampled, and search scan or auto")
        if self.arranged and (self.search != "cells" or self.refresh is not None):
            raise ConfigError(
                "pqcache_plus.arranged stores rows once, in the order of the lists of cells: set search=cells, and no "
                "refresh, which makes new lists"
            )
        for name in ("queries", "refresh"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"pqcache_plus.{name} is {value}: it must be at least 1, or null")

    def why_not_captured(self, offloads: bool) -> str | None:
        return "has steps of changing shape"

    def why_not_ahead(self) -> str | None:
        return "does not select with the query of the step before"

    def layer(self, geometry: Geometry) -> LayerState:
        if self.m > geometry.head_dim:
            raise ConfigError(f"pqcache_plus.m is {self.m}: it may not exceed the head dimension {geometry.head_dim}")
        if self.tail == "pq" and geometry.head_dim % self.m_v:
            raise ConfigError(f"pqcache_plus.m_v is {self.m_v}: it must divide the head dimension {geometry.head_dim}")
        return PQCachePlusState(self, geometry)

    @property
    def estimates_tail(self) -> bool:
        """Whether the contribution of unselected tokens is estimated from codes."""
        return self.tail in ("mean", "pq")

    @property
    def calibrates(self) -> bool:
        """Whether the weight of the tail is calibrated with queries."""
        return self.calibrated and self.estimates_tail

    @property
    def scores_all(self) -> bool:
        """Whether a step scores every token with any search, because the tail, the spread or top_p needs the scores."""
        return self.tail == "pq" or self.spread or self.top_p is not None

    @property
    def wants_logits(self) -> bool:
        """Whether a scan needs logits that have the scale of exact logits, because other weights are compared with
        them."""
        return self.estimates_tail or self.spread or self.top_p is not None

    @property
    def clusters(self) -> int:
        """Number of middle tokens up to which there is no codebook."""
        return 2 ** max(self.b, self.b_v if self.tail == "pq" else 0)
