"""The contents of one record of ``benchmark=fidelity``: figures of one method with one budget on one document.

Single figures. They are means over steps and layers unless the text says otherwise:

=================  ====================================================================================================
recall             share of the exact top-k that is attended (clean inputs), null without a budget
mass               share of the exact attention probability that the attended tokens hold (clean inputs)
output_error       ||o - o_full|| / ||o_full|| of a layer's attention output, all heads together (clean inputs)
kl                 KL(full || method) of the next token in nats (the method in all layers)
top1_agreement     share of the steps in which the method's most likely token is that of full attention
nll, nll_full      -log probability of the text's next token, under the method and under full attention
perplexity         exp(nll)
bits_per_key       bits of the index that a step reads for each token of the context, KV head and layer
attended_tokens    tokens attended to per KV head
skipped_nothing    whether every step attended to every token, in all layers
index_bytes        bytes of the index read by a step, all layers
attended_bytes     bytes of keys and values attended to by a step, all layers
bytes_per_head     index_bytes and attended_bytes together, for one KV head of one layer
=================  ====================================================================================================

Nested figures:

``layer``      ``[L]``, indices of the full-attention layers in the model
``kv_head``    ``[H]``, indices of the KV heads; ``layers`` and ``heads`` are ordered by ``layer`` and ``kv_head``
``layers``     ``{recall, mass, output_error: [L]}``, one value per layer (all heads together)
``heads``      ``{recall, mass, output_error, entropy: [L][H]}``, one value per KV head; entropy is that of exact
               attention, in nats
``token_age``  ``{prompt, early, late: {recall, share}}``: recall among the tokens of the exact top-k that belong to the
               prompt, or were decoded in the first or second half of the steps; ``share`` of such tokens in the top-k.
               Only tokens that have left the window compete, so the last two need more steps than the window is wide.
``entropy``    ``{low, middle, high: {output_error, nats}}``: means over the third of all KV heads (of all layers) with
               the most concentrated exact attention, over the middle third and over the last third
``steps_kl``   ``[T]``, kl of every step
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
from torch import Tensor

from pqbench.engine.decode import Generation
from pqbench.measure.checks import attended_all
from pqbench.measure.fidelity.clean import AGES, CleanFigures
from pqbench.measure.fidelity.forced import Drift
from pqbench.records.file import Record

_DIGITS = 5
THIRDS = ("low", "middle", "high")


def clean_facts(figures: CleanFigures) -> Record:
    """The fields of a record that come from clean inputs."""
    by_head = {"recall": figures.recall, "mass": figures.mass, "output_error": figures.output_error}
    layers = {"recall": figures.recall.nanmean(1), "mass": figures.mass.mean(1), "output_error": figures.layer_error}
    wanted = float(figures.age_wanted.sum())
    return {
        "recall": float(figures.age_found.sum()) / wanted if wanted else None,
        "mass": float(figures.mass.mean()),
        "output_error": float(figures.layer_error.mean()),
        "layer": figures.layers,
        "kv_head": list(range(figures.output_error.shape[1])),
        "layers": {name: short(values) for name, values in layers.items()},
        "heads": {name: short(values) for name, values in (by_head | {"entropy": figures.entropy}).items()},
        "token_age": {
            age: {"recall": found / count if count else None, "share": count / wanted if wanted else None}
            for age, found, count in zip(AGES, figures.age_found.tolist(), figures.age_wanted.tolist(), strict=True)
        },
        "entropy": thirds(figures.entropy, figures.output_error),
    }


def thirds(entropy: Tensor, errors: Tensor) -> dict[str, dict[str, float | None]]:
    """Mean error and entropy of each third of all heads ``[L, H]``, ordered by entropy; None for an empty third."""
    order = np.argsort(entropy.flatten().numpy(), kind="stable")
    nats, values = entropy.flatten().numpy()[order], errors.flatten().numpy()[order]
    parts = zip(THIRDS, np.array_split(values, 3), np.array_split(nats, 3), strict=True)
    return {
        name: {
            "output_error": float(error.mean()) if len(error) else None,
            "nats": float(level.mean()) if len(level) else None,
        }
        for name, error, level in parts
    }


def drift_facts(drift: Drift) -> Record:
    """The fields of a record that come from teacher-forced decoding."""
    return {
        "kl": fmean(drift.kl),
        "top1_agreement": fmean(drift.agrees),
        "nll": fmean(drift.nll),
        "nll_full": fmean(drift.nll_full),
        "perplexity": math.exp(min(700.0, fmean(drift.nll))),  # larger values overflow, and a record holds no infinity
        "steps_kl": [rounded(value) for value in drift.kl],
    }


def cost_facts(generation: Generation, prompt: int) -> Record:
    """Bytes that the steps of one sequence read after ``prompt`` tokens."""
    cohorts, meters = generation.cohorts(), generation.meters()
    known, steps, layers = cohorts[0].state.geometry, generation.tokens.shape[1], len(cohorts)
    element = cohorts[0].store.keys(0, 1).element_size()
    attended = fmean(meter.attended / meter.steps for meter in meters)
    index_bytes = sum(meter.index_bytes for meter in meters) / steps
    attended_bytes = attended * layers * 2 * known.kv_heads * known.head_dim * element
    context = prompt + (steps + 1) / 2  # mean over the steps, the current token included
    return {
        "attended_tokens": attended,
        "skipped_nothing": attended_all(cohorts),
        "index_bytes": index_bytes,
        "attended_bytes": attended_bytes,
        "bytes_per_head": (index_bytes + attended_bytes) / (layers * known.kv_heads),
        "bits_per_key": 8 * index_bytes / (layers * known.kv_heads * context),
    }


def short(values: Tensor) -> list[Any]:
    """A tensor as nested lists of numbers with five significant digits. NaN becomes None."""
    return [rounded(value) if not isinstance(value, list) else _each(value) for value in values.tolist()]


def _each(values: Sequence[float]) -> list[float | None]:
    return [rounded(value) for value in values]


def rounded(value: float) -> float | None:
    """The value with five significant digits; None for NaN."""
    return None if math.isnan(value) else float(f"{value:.{_DIGITS}g}")
