"""Sorted attention probabilities against a definition in float64 numpy, and the records that hold them."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from pqbench.errors import ConfigError
from pqbench.measure.layer.scores import SHARES, AttentionScores, ranks_up_to, sorted_scores
from pqbench.models.sources import LoadedModel
from pqbench.tables.kinds import sections
from tests.measure.conftest import Run
from tests.support import case


def test_curve_and_mass_are_those_of_the_sorted_softmax() -> None:
    data, count, total = case(prompt=60), 8, 60
    curve, mass = sorted_scores(data.q[:, :, :, total - count : total], data.keys[:, :, :total], data.scaling)
    rows = [-np.sort(-data.probabilities(total - count + 1 + i), -1) for i in range(count)]
    most = total - count + 1
    expected = np.mean([row[..., :most].mean(2) for row in rows], 0)
    assert curve.numpy() == pytest.approx(expected, abs=1e-6)
    for j, share in enumerate(SHARES):
        held = np.mean([row[..., : max(1, round(share * row.shape[-1]))].sum(-1).mean(2) for row in rows], 0)
        assert mass[..., j].numpy() == pytest.approx(held, abs=1e-6)


def test_ranks_are_whole_and_end_at_the_last() -> None:
    assert ranks_up_to(1) == [1]
    assert ranks_up_to(10) == [1, 2, 3, 4, 5, 6, 7, 8, 10]
    ranks = ranks_up_to(2000)
    assert ranks[-1] == 2000
    assert all(b / a <= 1.5 or b - a == 1 for a, b in pairwise(ranks))


def test_a_record_for_every_layer(measure: Run, loaded: LoadedModel) -> None:
    done, records = measure(AttentionScores([128, 256], queries=16), {}, loaded)
    assert done.failures == []
    assert sorted((r["context"], r["layer"]) for r in records) == [(128, 0), (128, 1), (256, 0), (256, 1)]
    for record in records:
        heads = np.array(record["probabilities"])
        assert heads.shape == (2, len(record["ranks"]))
        assert record["ranks"][-1] == record["context"] - 16 + 1
        assert (np.diff(heads, axis=1) <= 0).all()
        mass = np.array(record["mass"])
        assert mass.shape == (2, len(SHARES))
        assert (np.diff(mass, axis=1) >= 0).all()
        assert (mass <= 1 + 1e-6).all()
        assert record["queries"] == 16
    again, _ = measure(AttentionScores([128, 256], queries=16), {}, loaded)
    assert (again.measured, again.resumed) == (0, 2)
    (section,) = sections(records)
    assert [row[:2] for row in section.rows] == [["128", "2"], ["256", "2"]]
    masses = np.array([record["mass"] for record in records if record["context"] == 128])  # [layers, heads, shares]
    assert section.rows[0][2:] == [f"{mass:.3f}" for mass in masses.mean((0, 1))]


def test_a_failure_while_the_prompt_is_observed_is_a_row_and_the_other_contexts_are_measured(
    measure: Run, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(q: Tensor, keys: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
        if keys.shape[2] == 128:
            raise MemoryError("no room to sort")
        return sorted_scores(q, keys, scaling)

    monkeypatch.setattr("pqbench.measure.layer.scores.sorted_scores", broken)
    done, records = measure(AttentionScores([128, 256], queries=16), {}, loaded)
    assert [(r["context"], r["status"]) for r in records] == [(128, "oom"), (256, "ok"), (256, "ok")]
    assert len(done.failures) == 1
    assert "no room to sort" in done.failures[0]


@pytest.mark.parametrize(("chunk", "seen"), [(64, 8), (180, 16)])
def test_a_prefill_in_blocks_shows_queries_of_the_last(
    measure: Run, loaded: LoadedModel, chunk: int, seen: int
) -> None:
    _, records = measure(AttentionScores([200], queries=16), {}, loaded, chunk=chunk)
    assert [record["queries"] for record in records] == [seen, seen]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": [16]}, "benchmark.queries is 64, all of a context of 16"),
        ({"queries": 0}, "benchmark.queries is 0"),
        ({"contexts": []}, "benchmark.contexts"),
        ({"seed": -1}, "benchmark.seed"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        AttentionScores(**options)


def test_a_context_beyond_the_model_and_no_model_are_refused(measure: Run, loaded: LoadedModel) -> None:
    with pytest.raises(ConfigError, match=r"benchmark\.contexts has 5000, but the model takes 4096"):
        measure(AttentionScores([5000]), {}, loaded)
    with pytest.raises(ConfigError, match="needs a model"):
        measure(AttentionScores([128]), {})
