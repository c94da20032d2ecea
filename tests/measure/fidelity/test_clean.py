"""Clean figures by layer and KV head against the attention matrices of transformers, and against the probe of
benchmarks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.h2o import H2O
from methods.oracle import Oracle
from methods.sparq import SparQ
from methods.streaming_llm import StreamingLLM
from pqbench import prefill
from pqbench.engine.dense import Dense
from pqbench.measure.fidelity.clean import AGES, CleanFigures, clean_figures, each_alone
from pqbench.measure.fidelity.record import clean_facts, thirds
from pqbench.measure.probe import probe
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection, Split
from tests.measure.test_probe import exact
from tests.support import prompt_of

BUDGET = Budget(sink=3, window=2, tokens=20, ratio=None)
SPLIT = Split(3, 2, 15)
PROMPT, STEPS = 60, 10


def chosen_tokens(context: int) -> list[int]:
    """Sinks, the odd tokens from 41 on, and the window."""
    return [0, 1, 2, *range(41, context - 2, 2), context - 2, context - 1]


class OddState(LayerState):
    def select(self, q: Tensor, kv: KV) -> Selection:
        return Selection(torch.tensor(chosen_tokens(kv.length)).expand(*q.shape[:2], -1))


@dataclass(frozen=True)
class Odd(Method):
    """Selects the same tokens whatever the query."""

    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return OddState(geometry)


class BrokenState(LayerState):
    def select(self, q: Tensor, kv: KV) -> Selection:
        raise MemoryError("no room")


@dataclass(frozen=True)
class Broken(Method):
    """Fails in its first step."""

    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return BrokenState(geometry)


def answer() -> list[int]:
    return list(prompt_of(STEPS, seed=9)[0].tolist())


def figures_of(model: PreTrainedModel, *methods: Method) -> list[CleanFigures]:
    prefilled = prefill(model, prompt_of(PROMPT), [Dense(), *methods])
    return clean_figures(prefilled, answer(), range(1, len(methods) + 1))


def brute_force(model: PreTrainedModel) -> dict[str, Any]:
    """The figures of :class:`Odd` directly from their definitions: arrays ``[L, H]``, and lists by age."""
    ids = torch.cat([prompt_of(PROMPT), torch.tensor([answer()])], 1)
    attentions, values = exact(model, ids)
    shape = (len(attentions), 2, STEPS)  # [L, H, T]
    recall, mass, error, entropy = (np.zeros(shape) for _ in range(4))
    layer_error = np.zeros(shape[::2])
    found, wanted = np.zeros(3), np.zeros(3)
    for layer, step in np.ndindex(*shape[::2]):
        context = PROMPT + step + 1
        tokens, full, output = chosen_tokens(context), [], []
        for head in range(2):
            rows = attentions[layer][0, 2 * head : 2 * head + 2, context - 1, :context]  # [G, S]
            held = values[layer][0, head, :context]
            best = 3 + np.argsort(-rows.sum(0)[3 : context - 2])[:15]
            recall[layer, head, step] = np.isin(best, tokens).mean()
            ages = np.digitize(best, [PROMPT, PROMPT + STEPS // 2])
            wanted += np.bincount(ages, minlength=3)
            found += np.bincount(ages[np.isin(best, tokens)], minlength=3)
            mass[layer, head, step] = rows[:, tokens].sum(1).mean()
            entropy[layer, head, step] = -(rows * np.log(rows)).sum(1).mean()
            full.append(rows @ held)
            output.append(rows[:, tokens] / rows[:, tokens].sum(1, keepdims=True) @ held[tokens])
            error[layer, head, step] = np.linalg.norm(output[-1] - full[-1]) / np.linalg.norm(full[-1])
        layer_error[layer, step] = np.linalg.norm(np.subtract(output, full)) / np.linalg.norm(full)
    means = {"recall": recall, "mass": mass, "output_error": error, "entropy": entropy, "layer_error": layer_error}
    return {name: value.mean(-1) for name, value in means.items()} | {"age_found": found, "age_wanted": wanted}


def test_figures_equal_their_definitions_in_every_layer_and_head(model: PreTrainedModel) -> None:
    (figures,) = figures_of(model, Odd())
    wanted = brute_force(model)
    for name, value in wanted.items():
        assert np.allclose(getattr(figures, name).numpy(), value, atol=1e-4), name
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    assert figures.layers == [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    assert wanted["output_error"].min() > 0.05
    assert 0.1 < wanted["recall"].mean() < 0.9
    assert np.ptp(wanted["mass"]) > 0.01  # heads differ, so that a swap would be seen


def test_a_record_holds_them(llama: PreTrainedModel) -> None:
    (figures,) = figures_of(llama, Odd())
    wanted, facts = brute_force(llama), clean_facts(figures)
    for name in ("recall", "mass", "output_error", "entropy"):
        assert np.allclose(facts["heads"][name], wanted[name], atol=1e-4), name
    assert np.allclose(facts["layers"]["output_error"], wanted["layer_error"], atol=1e-4)
    assert np.allclose(facts["layers"]["recall"], wanted["recall"].mean(1), atol=1e-4)
    assert (facts["layer"], facts["kv_head"]) == ([0, 1], [0, 1])
    assert (wanted["age_wanted"] > 0).all()  # every age is among the exact top-k
    assert facts["output_error"] == pytest.approx(wanted["layer_error"].mean(), abs=1e-4)
    assert facts["recall"] == pytest.approx(wanted["recall"].mean(), abs=1e-4)
    assert facts["mass"] == pytest.approx(wanted["mass"].mean(), abs=1e-4)
    for i, age in enumerate(AGES):
        found, count = wanted["age_found"][i], wanted["age_wanted"][i]
        assert facts["token_age"][age]["recall"] == pytest.approx(found / count)
        assert facts["token_age"][age]["share"] == pytest.approx(count / wanted["age_wanted"].sum())


def test_thirds_are_ordered_by_entropy() -> None:
    entropy = torch.tensor([[5.0, 1.0, 3.0], [2.0, 6.0, 4.0]])
    errors = torch.tensor([[0.5, 0.1, 0.3], [0.2, 0.6, 0.4]])
    assert thirds(entropy, errors) == {
        "low": {"output_error": pytest.approx(0.15), "nats": 1.5},
        "middle": {"output_error": pytest.approx(0.35), "nats": 3.5},
        "high": {"output_error": pytest.approx(0.55), "nats": 5.5},
    }
    assert thirds(entropy[:1, :1], errors[:1, :1])["high"] == {"output_error": None, "nats": None}


def test_all_methods_at_once_equal_the_probe_of_the_benchmarks(model: PreTrainedModel) -> None:
    """This includes evicting methods, which are measured against the whole context."""
    methods: list[Method] = [Oracle(BUDGET), H2O(BUDGET), StreamingLLM(BUDGET), SparQ(BUDGET, rank=4), Dense()]
    facts = [clean_facts(figures) for figures in figures_of(model, *methods)]
    for found, other in zip(facts, probe(prefill(model, prompt_of(PROMPT), methods), answer()), strict=True):
        wanted = other.means()
        assert {name: found[name] for name in wanted} == pytest.approx(wanted, abs=1e-5)
    assert facts[0]["recall"] == 1
    assert (facts[-1]["recall"], facts[-1]["heads"]["recall"][0]) == (None, [None, None])
    assert facts[-1]["output_error"] == pytest.approx(0, abs=1e-5)


def test_one_method_s_fault_is_only_its_own(llama: PreTrainedModel) -> None:
    prefilled = prefill(llama, prompt_of(PROMPT), [Dense(), Odd(), Broken(), H2O(BUDGET)])
    odd, broken, h2o = each_alone(prefilled, answer(), [1, 2, 3])
    assert isinstance(broken, MemoryError)
    for found, method in ((odd, Odd()), (h2o, H2O(BUDGET))):
        (alone,) = figures_of(llama, method)
        assert isinstance(found, CleanFigures)
        assert torch.allclose(found.output_error, alone.output_error)


def test_one_sequence_at_a_time(llama: PreTrainedModel) -> None:
    with pytest.raises(RuntimeError, match="one sequence"):
        clean_figures(prefill(llama, prompt_of(PROMPT, batch=2), [Dense()]), answer(), [0])
