"""Teacher-forced decoding against two forward passes of transformers over the whole sequence."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.oracle import Oracle
from methods.pqcache import PQCache
from methods.streaming_llm import StreamingLLM
from pqbench import decode, prefill
from pqbench.engine.decode import Generation
from pqbench.engine.dense import Dense
from pqbench.errors import ConfigError
from pqbench.measure.fidelity.forced import Drift, dense_logits, read, read_in_one_batch
from pqbench.measure.fidelity.record import cost_facts, drift_facts
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from tests.measure.fidelity.test_clean import BUDGET, PROMPT, STEPS, Odd, answer, chosen_tokens
from tests.support import prompt_of, softmax, tiny_model

TARGETS = [*answer()[1:], 17]


class LateState(LayerState):
    def select(self, q: Tensor, kv: KV) -> Selection:
        if kv.length > PROMPT + STEPS // 2:
            raise MemoryError("no room")
        return Selection()


@dataclass(frozen=True)
class Late(Method):
    """Full attention that fails half way through the answer."""

    def layer(self, geometry: Geometry) -> LayerState:
        return LateState(geometry)


def drift_of(model: PreTrainedModel, method: Method) -> Drift:
    prefilled = prefill(model, prompt_of(PROMPT), [Dense(), method])
    drift = Drift(dense_logits(prefilled, answer()), TARGETS)
    read(prefilled, 1, answer(), drift.add)
    return drift


def transformers_logits(model: PreTrainedModel, mask: Tensor | None = None) -> np.ndarray:
    """Logits ``[T, V]`` after each token of the answer, from one pass over all tokens; ``mask`` is additive, ``[S,
    S]``."""
    ids = torch.cat([prompt_of(PROMPT), torch.tensor([answer()])], 1)
    with torch.inference_mode():
        logits = model(ids, attention_mask=None if mask is None else mask[None, None]).logits
    return logits[0, PROMPT:].double().numpy()


def only_chosen() -> Tensor:
    """A mask that is causal over the prompt; each token of the answer sees the tokens that :class:`Odd` selects."""
    total = PROMPT + STEPS
    seen = torch.ones(total, total, dtype=torch.bool).tril()
    for row in range(PROMPT, total):
        seen[row] = False
        seen[row, chosen_tokens(row + 1)] = True
    return torch.zeros(total, total).masked_fill(~seen, float("-inf"))


def test_full_attention_does_not_drift(model: PreTrainedModel) -> None:
    drift = drift_of(model, Full())
    assert drift.kl == [0.0] * STEPS
    assert drift.agrees == [True] * STEPS
    assert drift.nll == drift.nll_full
    probabilities = softmax(transformers_logits(model))
    assert drift.nll == pytest.approx(-np.log(probabilities[np.arange(STEPS), TARGETS]), abs=1e-4)


def test_figures_are_those_of_two_passes_of_transformers() -> None:
    model = tiny_model("llama")
    drift = drift_of(model, Odd())
    full, mine = softmax(transformers_logits(model)), softmax(transformers_logits(model, only_chosen()))
    kl = (full * (np.log(full) - np.log(mine))).sum(1)
    assert drift.kl == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert drift.agrees == (full.argmax(1) == mine.argmax(1)).tolist()
    nll = -np.log(mine[np.arange(STEPS), TARGETS])
    assert drift.nll == pytest.approx(nll, abs=1e-3)
    facts = drift_facts(drift)
    assert facts["kl"] == pytest.approx(kl.mean(), rel=1e-3)
    assert facts["perplexity"] == pytest.approx(np.exp(nll.mean()), rel=1e-3)
    assert facts["nll_full"] == pytest.approx(-np.log(full[np.arange(STEPS), TARGETS]).mean(), abs=1e-3)
    assert np.allclose(facts["steps_kl"], kl, rtol=1e-3, atol=1e-5)
    assert kl.min() > 1e-3


@pytest.mark.parametrize("method", [Oracle, H2O, StreamingLLM, lambda budget: PQCache(budget, m=2, b=3)])
def test_a_budget_of_everything_does_not_drift(model: PreTrainedModel, method: type[Oracle]) -> None:
    drift = drift_of(model, method(Budget(sink=4, ratio=1.0)))
    assert max(drift.kl) < 1e-6
    assert all(drift.agrees)


def test_reading_a_method_s_own_tokens_repeats_its_decoding(llama: PreTrainedModel) -> None:
    prefilled = prefill(llama, prompt_of(PROMPT), [H2O(BUDGET)])
    tokens = decode(prefilled, 0, STEPS).tokens[0].tolist()
    seen: list[int] = []
    read(prefilled, 0, tokens[:-1], lambda logits: seen.append(int(logits.argmax())))
    assert seen == tokens[1:]


def test_methods_in_one_batch_equal_each_alone(model: PreTrainedModel) -> None:
    """The methods drop or select tokens; one is there twice, and one fails on the way."""
    methods: list[Method] = [Dense(), H2O(BUDGET), Odd(), Late(), StreamingLLM(BUDGET), Oracle(BUDGET), Odd()]
    prefilled = prefill(model, prompt_of(PROMPT), methods)
    seen: list[list[Tensor]] = [[] for _ in methods]
    outcomes = read_in_one_batch(prefilled, range(len(methods)), answer(), [rows.append for rows in seen])
    assert [i for i, outcome in enumerate(outcomes) if isinstance(outcome, Exception)] == [3]
    assert isinstance(outcomes[3], MemoryError)
    for i, outcome in enumerate(outcomes):
        if isinstance(outcome, Generation):
            rows: list[Tensor] = []
            alone = cost_facts(read(prefilled, i, answer(), rows.append), PROMPT)
            assert torch.allclose(torch.stack(seen[i]), torch.stack(rows), atol=1e-4)
            assert cost_facts(outcome, PROMPT) == alone
    assert not torch.allclose(torch.stack(seen[1]), torch.stack(seen[0]), atol=1e-2)


def test_a_token_that_cannot_follow_is_no_trouble() -> None:
    full = torch.tensor([[0.0, 1.0, float("-inf")]]).expand(2, -1)
    drift = Drift(full, [1, 0])
    drift.add(torch.tensor([1.0, 0.0, float("-inf")]))
    drift.add(full[1])
    p = np.exp([0.0, 1.0]) / np.exp([0.0, 1.0]).sum()
    assert drift.kl == pytest.approx([p[0] * np.log(p[0] / p[1]) + p[1] * np.log(p[1] / p[0]), 0])
    assert drift.agrees == [False, True]
    assert drift_facts(drift)["top1_agreement"] == 0.5
    assert (drift.nll[0], drift.nll_full[0]) == pytest.approx((-np.log(p[0]), -np.log(p[1])))


def test_a_model_that_computes_nan_is_refused(llama: PreTrainedModel) -> None:
    prefilled = prefill(llama, prompt_of(PROMPT), [Dense()])
    weight = llama.lm_head.weight.data.clone()
    llama.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ConfigError, match="NaN"):
        read(prefilled, 0, answer(), lambda _: None)
    llama.lm_head.weight.data.copy_(weight)


def test_bytes_follow_from_shapes(llama: PreTrainedModel) -> None:
    """Two layers with two KV heads of 16 float32 numbers; contexts of 61 to 70 tokens."""
    prefilled = prefill(llama, prompt_of(PROMPT), [Dense(), Oracle(BUDGET)])
    full, oracle = (cost_facts(read(prefilled, i, answer(), lambda _: None), PROMPT) for i in range(2))
    row, context = 2 * 16 * 4, PROMPT + (STEPS + 1) / 2
    assert full == {
        "attended_tokens": context,
        "skipped_nothing": True,
        "index_bytes": 0,
        "attended_bytes": context * row * 4,
        "bytes_per_head": context * row,
        "bits_per_key": 0,
    }
    assert oracle["bits_per_key"] == pytest.approx(16 * 32)  # it reads every key
    assert oracle["attended_tokens"] == 20
    assert oracle["skipped_nothing"] is False
    assert oracle["bytes_per_head"] == pytest.approx(20 * row + context * 16 * 4)
