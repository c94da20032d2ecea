"""Prefill and decode against ``generate`` of transformers, and all ways of running a prompt against each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.magicpig import MagicPIG
from methods.oracle import Oracle
from methods.pqcache import PQCache, PQCachePlus
from methods.pyramidkv import PyramidKV
from methods.quest import Quest
from methods.snapkv import SnapKV
from methods.sparq import SparQ
from methods.streaming_llm import StreamingLLM
from methods.tova import TOVA
from methods.vattention import VAttention
from pqbench import decode, generate, prefill
from pqbench.errors import ConfigError
from pqbench.method import Budget, Method
from tests.support import left_padded, prompt_of, tiny_model

WHOLE = Budget(sink=8, ratio=1.0)
SMALL = Budget(sink=4, ratio=0.3, minimum=12)


def methods(budget: Budget) -> dict[str, Method]:
    """Every method with this budget and an index that is small enough for short prompts."""
    return {
        "full": Full(),
        "oracle": Oracle(budget),
        "oracle query_head": Oracle(budget, rule="query_head"),
        "oracle top_p": Oracle(budget, rule="top_p", top_p=0.9),
        "streaming_llm": StreamingLLM(budget),
        "h2o": H2O(budget),
        "sparq": SparQ(budget, rank=4),
        "infllm": InfLLM(budget, block_size=8, representatives=2),
        "pqcache": PQCache(budget, m=2, b=4),
        "snapkv": SnapKV(budget, observation=8, kernel=5),
        "pyramidkv": PyramidKV(budget, observation=50, kernel=3),  # observes across the blocks of a chunked prefill
        "quest": Quest(budget, page_size=4),
        "quest query_head": Quest(budget, page_size=4, per_query_head=True),
        "tova": TOVA(budget),
        "pqcache_plus": PQCachePlus(budget, b=4, b_v=4),
        "pqcache_plus mean": PQCachePlus(budget, b=3, tail="mean", spread=False, search="cells", refresh=4),
        "pqcache_plus sampled": PQCachePlus(budget, b=4, tail="sampled", codebook="rotated"),
        "pqcache_plus arranged": PQCachePlus(budget, b=3, tail="none", spread=False, search="cells", arranged=True),
        "vattention": VAttention(PQCache(m=2, b=4), budget),
        "vattention epsilon": VAttention(SparQ(rank=4), budget, epsilon=0.3, base_sample=4),
        "magicpig": MagicPIG(budget, bits=4, tables=20),
    }


EXACT = {
    **{name: method for name, method in methods(WHOLE).items() if name not in ("oracle top_p", "infllm")},
    "oracle top_p": Oracle(WHOLE, rule="top_p", top_p=1.0),
    "infllm": InfLLM(Budget(sink=0, window=4096, ratio=1.0)),  # all local; blocks renumber by design
}
NEW = 10


def reference(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The new tokens of greedy search in transformers."""
    mask = torch.ones_like(ids) if mask is None else mask
    output = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    return output[:, ids.shape[1] :]


def run(
    model: PreTrainedModel, ids: Tensor, chosen: dict[str, Method], mask: Tensor | None = None, chunk: int | None = None
) -> dict[str, Tensor]:
    """The new tokens of each method, all from one prefill."""
    prefilled = prefill(model, ids, list(chosen.values()), mask, chunk)
    return {name: decode(prefilled, i, NEW).tokens for i, name in enumerate(chosen)}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Fails with the names of the methods that differ."""
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_small_budgets_change_what_is_generated(model: PreTrainedModel) -> None:
    """Without this, the comparisons below would compare full attention with itself."""
    changed = dict.fromkeys(methods(SMALL), False)
    for seed in range(3):
        tokens = run(model, prompt_of(130, seed), methods(SMALL))
        changed = {name: changed[name] or not torch.equal(tokens[name], tokens["full"]) for name in changed}
    assert [name for name, differs in changed.items() if not differs] == ["full"]


@pytest.mark.parametrize("length", [1, 2, 50, 130])
def test_a_budget_for_everything_gives_what_transformers_gives(model: PreTrainedModel, length: int) -> None:
    ids = prompt_of(length)
    expected = reference(model, ids)
    assert len(set(expected[0].tolist())) > 2 or length < 50  # a continuation of several different tokens
    same(run(model, ids, EXACT), dict.fromkeys(EXACT, expected))


def test_streaming_llm_is_exact_while_nothing_is_dropped(llama: PreTrainedModel) -> None:
    method = StreamingLLM(Budget(sink=4, tokens=100, ratio=None))
    ids = prompt_of(91)  # 91 + 9 decode steps: the hundredth token completes the budget
    assert torch.equal(generate(llama, ids, method, max_new_tokens=NEW), reference(llama, ids))


def test_left_padded_batch_equals_batches_of_one(model: PreTrainedModel) -> None:
    prompts = [prompt_of(61, 1), prompt_of(120, 2), prompt_of(61, 3)]
    ids, mask = left_padded(*prompts)
    together = run(model, ids, methods(SMALL), mask)
    assert torch.equal(together["full"], reference(model, ids, mask))
    for row, prompt in enumerate(prompts):
        same({name: tokens[row : row + 1] for name, tokens in together.items()}, run(model, prompt, methods(SMALL)))


def test_padding_of_a_single_prompt_changes_nothing(model: PreTrainedModel) -> None:
    prompt = prompt_of(50)
    ids, mask = torch.nn.functional.pad(prompt, (13, 0)), torch.nn.functional.pad(torch.ones_like(prompt), (13, 0))
    same(run(model, ids, methods(SMALL), mask), run(model, prompt, methods(SMALL)))


@pytest.mark.parametrize(("budget", "chunk"), [(SMALL, 77), (SMALL, 43), (SMALL, 1), (WHOLE, 43)])  # 130 = 3 * 43 + 1
def test_chunked_prefill_equals_one_shot(model: PreTrainedModel, budget: Budget, chunk: int) -> None:
    ids = prompt_of(130)
    same(run(model, ids, methods(budget), chunk=chunk), run(model, ids, methods(budget)))


def test_chunked_prefill_of_a_padded_batch(model: PreTrainedModel) -> None:
    ids, mask = left_padded(prompt_of(30, 1), prompt_of(130, 2))  # whole blocks of the first are padding
    same(run(model, ids, methods(SMALL), mask, chunk=43), run(model, ids, methods(SMALL), mask))


def test_prompts_one_after_the_other_equal_each_alone(model: PreTrainedModel) -> None:
    chosen = methods(SMALL)  # the same method objects for all prompts
    first = [run(model, prompt_of(length, seed), chosen) for seed, length in enumerate((90, 130, 70))]
    again = [run(model, prompt_of(length, seed), methods(SMALL)) for seed, length in ((2, 70), (0, 90), (1, 130))]
    for before, after in zip(first, (again[1], again[2], again[0]), strict=True):
        same(before, after)


@pytest.mark.parametrize("padded", [False, True])
def test_a_method_after_others_equals_the_method_alone(model: PreTrainedModel, padded: bool) -> None:
    ids, mask = left_padded(prompt_of(70, 1), prompt_of(110, 2)) if padded else (prompt_of(110, 2), None)
    chosen = methods(SMALL)
    alone = {name: run(model, ids, {name: method}, mask)[name] for name, method in chosen.items()}
    same(run(model, ids, chosen, mask), alone)
    backwards = dict(reversed(chosen.items()))
    same(dict(reversed(run(model, ids, backwards, mask).items())), alone)
    prefilled = prefill(model, ids, list(chosen.values()), mask)
    repeated = [decode(prefilled, i, NEW).tokens for i in (8, 4, 8, 5)]
    names = list(chosen)
    assert all(torch.equal(t, alone[names[i]]) for t, i in zip(repeated, (8, 4, 8, 5), strict=True))


def test_decoding_beyond_the_reserve_changes_nothing(model: PreTrainedModel) -> None:
    ids, chosen = prompt_of(60), methods(SMALL)
    tight = prefill(model, ids, list(chosen.values()), reserve=1)
    same({name: decode(tight, i, NEW).tokens for i, name in enumerate(chosen)}, run(model, ids, chosen))


def test_an_interrupted_decode_leaves_the_prompt_untouched(llama: PreTrainedModel) -> None:
    ids, chosen = prompt_of(60), methods(SMALL)
    prefilled = prefill(llama, ids, list(chosen.values()))
    older = prefilled.fork(0)
    expected = run(llama, ids, chosen)
    same({name: decode(prefilled, i, NEW).tokens for i, name in enumerate(chosen)}, expected)
    with pytest.raises(RuntimeError, match="stale"):  # its slack now holds another method's tokens
        older.layers[0].cohorts[0].append(torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1, 16))


def test_question_through_full_attention_equals_its_dense_prefill(model: PreTrainedModel) -> None:
    ids = prompt_of(60)
    prefilled = prefill(model, ids[:, :-9], list(EXACT.values()))
    for i in range(len(EXACT)):
        assert torch.equal(decode(prefilled, i, NEW, question=ids[0, -9:].tolist()).tokens, reference(model, ids))


def test_question_is_decoded_by_the_method(llama: PreTrainedModel) -> None:
    ids = prompt_of(130)
    prefilled = prefill(llama, ids[:, :-20], [Oracle(SMALL)])
    generation = decode(prefilled, 0, NEW, question=ids[0, -20:].tolist())
    assert [meter.steps for meter in generation.meters()] == [20 + NEW - 1] * 2
    budgets = [SMALL.resolve(context, 110).total for context in range(111, 111 + 20 + NEW - 1)]
    assert [meter.attended for meter in generation.meters()] == [sum(budgets)] * 2
    assert generation.ttft_s >= prefilled.seconds + prefilled.build(0)
    assert len(generation.steps_s) == NEW - 1


def test_softmax_scale_of_the_model_is_used() -> None:
    model = tiny_model("gemma3")
    assert model.model.layers[1].self_attn.scaling == 16**-0.5
    prefilled = prefill(model, prompt_of(20), [Full()])
    assert sorted(prefilled.layers) == [1]  # sliding layers stay with transformers
    assert sorted(prefilled.sliding) == [0, 2]
    assert [o.state.geometry.prompt for observers in prefilled.layers[1].observers for o in observers] == [20]


def test_wrong_number_of_new_tokens_is_refused(llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="max_new_tokens"):
        generate(llama, prompt_of(5), Full(), max_new_tokens=0)
