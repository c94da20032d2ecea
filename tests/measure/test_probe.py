"""Mass, recall and output error against the attention matrices of transformers, and against values worked out by
hand."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.oracle import Oracle
from methods.pqcache import PQCache
from methods.sparq import SparQ
from methods.streaming_llm import StreamingLLM
from pqbench import decode, prefill
from pqbench.errors import SelectionError
from pqbench.measure.probe import Exact, Fidelity, Seen, probe
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection, Split
from tests.support import prompt_of, tiny_model

BUDGET = Budget(sink=3, window=5, tokens=20, ratio=None)
PROMPT, STEPS = 60, 4


def fixed_tokens(context: int) -> list[int]:
    """Sinks, the first twelve even tokens of the middle, and the window."""
    return [0, 1, 2, *range(4, 28, 2), *range(context - 5, context)]


class FixedState(LayerState):
    def select(self, q: Tensor, kv: KV) -> Selection:
        return Selection(torch.tensor(fixed_tokens(kv.length)).expand(*q.shape[:2], -1))


@dataclass(frozen=True)
class Fixed(Method):
    """Selects the same tokens whatever the query."""

    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return FixedState(geometry)


def exact(model: PreTrainedModel, ids: Tensor) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Attention ``[B, Hq, S, S]`` and values ``[B, H, S, D]`` of the full-attention layers, by eager transformers."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    cache = DynamicCache()  # without the config: no sliding layer forgets
    output = model(ids, output_attentions=True, past_key_values=cache)
    model.set_attn_implementation(before)
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    wanted = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    attentions = [output.attentions[i].detach().double().numpy() for i in wanted]
    return attentions, [cache.layers[i].values.detach().double().numpy() for i in wanted]


def expected(model: PreTrainedModel, ids: Tensor, tokens: list[list[int]], split: Split) -> dict[str, float]:
    """The three figures, directly from their definitions, if step t attends to ``tokens[t]`` in every head."""
    masses, recalls, errors = [], [], []
    for (attention, values), (step, chosen) in product(zip(*exact(model, ids), strict=True), enumerate(tokens)):
        context = PROMPT + step + 1
        rows = attention[:, :, context - 1, :context].reshape(1, 2, 2, context)  # [B, H, G, S]
        held = values[:, :, :context]
        mine = rows[..., chosen]
        masses.append(mine.sum(-1).mean())
        full = np.einsum("bhgs,bhsd->bhgd", rows, held)
        output = np.einsum("bhgs,bhsd->bhgd", mine / mine.sum(-1, keepdims=True), held[:, :, chosen])
        errors.append(np.linalg.norm(output - full) / np.linalg.norm(full))
        first, stop = split.sink, context - split.window
        for h in range(2):
            best = first + np.argsort(-rows[0, h].sum(0)[first:stop])[: split.top_k]
            recalls.append(len(set(best) & set(chosen)) / split.top_k)
    return {"mass": float(np.mean(masses)), "recall": float(np.mean(recalls)), "output_error": float(np.mean(errors))}


def test_figures_equal_their_definitions(model: PreTrainedModel) -> None:
    ids, answer = prompt_of(PROMPT), prompt_of(STEPS, seed=9)[0].tolist()
    (fidelity,) = probe(prefill(model, ids, [Fixed()]), answer)
    tokens = [fixed_tokens(PROMPT + step + 1) for step in range(STEPS)]
    everything = torch.cat([ids, torch.tensor([answer])], 1)
    wanted = expected(model, everything, tokens, Split(3, 5, 12))
    assert fidelity.means() == pytest.approx(wanted, abs=1e-4)
    assert 0.05 < wanted["mass"] < 0.95
    assert wanted["output_error"] > 0.05
    assert len(fidelity.mass) == STEPS * len(exact(model, everything)[0])


def test_an_evicting_method_is_measured_against_the_whole_context(llama: PreTrainedModel) -> None:
    """Recall and mass count tokens by position, even after rows were dropped and reordered."""
    ids, answer = prompt_of(PROMPT), prompt_of(STEPS, seed=9)[0].tolist()
    method = StreamingLLM(Budget(sink=4, window=5, tokens=20, ratio=None), sink=4)
    (fidelity,) = probe(prefill(llama, ids, [method]), answer)
    tokens = [[0, 1, 2, 3, *range(PROMPT + step + 1 - 16, PROMPT + step + 1)] for step in range(STEPS)]
    wanted = expected(llama, torch.cat([ids, torch.tensor([answer])], 1), tokens, Split(4, 5, 11))
    assert fidelity.means()["mass"] == pytest.approx(wanted["mass"], abs=1e-4)
    assert fidelity.means()["recall"] == pytest.approx(wanted["recall"], abs=1e-6)


def test_full_and_oracle_are_the_rails(model: PreTrainedModel) -> None:
    methods = [Full(), Oracle(BUDGET), PQCache(BUDGET, b=3), H2O(BUDGET), SparQ(BUDGET, rank=4), Fixed()]
    prefilled = prefill(model, prompt_of(PROMPT), methods)
    full, oracle, *others = [fidelity.means() for fidelity in probe(prefilled, prompt_of(STEPS, seed=9)[0].tolist())]
    assert full == {"mass": pytest.approx(1.0), "recall": None, "output_error": pytest.approx(0.0, abs=1e-5)}
    assert oracle["recall"] == 1.0
    for other in others:
        assert (other["mass"] or 0) <= (oracle["mass"] or 0) + 1e-6
        assert (other["recall"] or 0) < 1


def test_together_equals_alone_and_leaves_the_prompt_untouched(model: PreTrainedModel) -> None:
    methods: list[Method] = [PQCache(BUDGET, b=3), H2O(BUDGET), StreamingLLM(BUDGET), SparQ(BUDGET, rank=4)]
    ids, answer = prompt_of(PROMPT), prompt_of(STEPS, seed=9)[0].tolist()
    prefilled = prefill(model, ids, methods)
    before = [decode(prefilled, i, 8).tokens for i in range(4)]
    together = probe(prefilled, answer)
    assert all(torch.equal(decode(prefilled, i, 8).tokens, tokens) for i, tokens in enumerate(before))
    again = probe(prefilled, answer)
    for i, method in enumerate(methods):
        (alone,) = probe(prefill(model, ids, [method]), answer)
        assert alone.means() == pytest.approx(together[i].means(), abs=1e-6)
        assert again[i] == together[i]


def test_padding_changes_nothing(model: PreTrainedModel) -> None:
    ids, answer = prompt_of(30), prompt_of(STEPS, seed=9)[0].tolist()[:1]
    ids = ids[:, :12] if model.config.model_type == "gemma3_text" else ids  # all inside the sliding window
    chosen = StreamingLLM(Budget(sink=2, window=2, tokens=6, ratio=None), sink=2)
    padded, mask = torch.nn.functional.pad(ids, (9, 0)), torch.nn.functional.pad(torch.ones_like(ids), (9, 0))
    (plain,), (other,) = (
        probe(prefill(model, ids, [chosen]), answer),
        probe(prefill(model, padded, [chosen], mask), answer),
    )
    assert other.means() == pytest.approx(plain.means(), abs=1e-5)


@pytest.mark.parametrize("visible", [None, torch.ones(1, 1, 2, 2, dtype=torch.bool)])
def test_figures_by_hand(visible: torch.Tensor | None) -> None:
    """One KV head, two query heads and four tokens; the method attends to tokens 1 and 3; no sinks, window 1, k 2."""
    fidelity = Fidelity()
    probabilities = torch.tensor([[[[0.5, 0.1, 0.2, 0.2], [0.3, 0.4, 0.1, 0.2]]]])
    seen = Seen(torch.tensor([[[3, 1]]]), visible)
    full, output = torch.tensor([[[[3.0, 0.0], [0.0, 4.0]]]]), torch.tensor([[[[3.0, 0.0], [0.0, 3.0]]]])
    fidelity.add(Exact(probabilities, full), output, seen, Split(0, 1, 2))
    assert torch.stack(fidelity.mass).tolist() == [pytest.approx((0.3 + 0.6) / 2)]
    # Sums 0.8, 0.5, 0.3: the best two are tokens 0 and 1, of which 1 is attended.
    assert torch.stack(fidelity.recall).tolist() == [0.5]
    assert fidelity.output_error == [pytest.approx(1 / 5)]


def test_no_steps_mean_nothing() -> None:
    assert Fidelity().means() == {"mass": None, "recall": None, "output_error": None}


def test_a_method_that_selects_wrongly_is_caught_by_the_probe(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefilled = prefill(llama, prompt_of(PROMPT), [Fixed()])
    monkeypatch.setattr(FixedState, "select", lambda *_: Selection(torch.zeros(1, 2, 4, dtype=torch.long)))
    with pytest.raises(SelectionError, match="Fixed, layer 0, step 1"):
        probe(prefilled, [5])


def test_lengths_must_be_equal() -> None:
    ids, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8, dtype=torch.long)
    mask[0, :3] = 0
    prefilled = prefill(tiny_model("llama"), ids, [Full()], mask)
    with pytest.raises(RuntimeError, match="equal length"):
        probe(prefilled, [5])
