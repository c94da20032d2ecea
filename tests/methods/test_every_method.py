"""Properties of all methods: valid selections, exactly as many tokens as the budget, and exactness if all tokens
fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from methods.oracle import Oracle
from methods.pqcache import PQCachePlus
from methods.quest import Quest
from methods.streaming_llm import StreamingLLM
from pqbench.engine.cohort import Cohort, Rows
from pqbench.method import Budget, Method, PaperBudget
from tests.catalogue import EVERY, SELECTING, exact, small
from tests.support import append, case, finish, output_of, rows_of, start, tokens_of

BUDGETS = {
    "ratio": Budget(sink=4, ratio=0.3, minimum=8),
    "fixed ratio": Budget(sink=4, ratio=0.3, minimum=8, grow=False),
    "tokens": Budget(sink=3, window=5, tokens=23, ratio=None),
    "window of one": Budget(sink=2, window=1, tokens=9, ratio=None),
    "no sinks": Budget(sink=0, window=4, tokens=17, ratio=None),
    "no middle": Budget(sink=4, window=6, tokens=10, ratio=None),
    "paper": PaperBudget(sink=4, ratio=0.3),
}
STEPS = 30


@pytest.mark.parametrize("prompt", [61, 3, 15])  # far above the budgets; below all of them, then across while decoding
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.parametrize("name", SELECTING)
def test_selections_are_valid_and_meet_the_budget(name: str, budget: Budget, prompt: int) -> None:
    data = case(prompt, STEPS)
    method = small(name, budget)
    state, store = start(method, data)
    gone: set[tuple[int, int, int]] = set()
    for step in range(STEPS):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        context = data.prompt + step + 1
        split = budget.resolve(context, data.prompt)
        rows, tokens = rows_of(selection, store), tokens_of(selection, store)
        whole = method.attends_all(context, data.prompt)
        assert tokens.shape == (2, 2, context if whole else split.total)
        sinks, window = split.sink, split.window
        if isinstance(method, StreamingLLM):  # its sinks are its own, and the rest of the budget is window
            sinks = min(method.sink, context)
            window = max(1, split.total - sinks)
        for b, h in np.ndindex(2, 2):
            mine = tokens[b, h].tolist()
            assert len(set(mine)) == len(mine)
            assert 0 <= min(mine) <= max(mine) < context
            assert 0 <= int(rows[b, h].min()) <= int(rows[b, h].max()) < store.length
            assert set(range(sinks)) <= set(mine)
            held = store.positions[b, h].tolist()
            # With a growing budget an evicting method cannot bring back tokens that it dropped before the window grew.
            edge = context - window + (method.evicts and budget.grow and budget.ratio is not None)
            assert set(range(edge, context)) <= set(mine)
            assert not gone & {(b, h, token) for token in mine}
            gone |= {(b, h, token) for token in set(range(context)) - set(held)}
        finish(state, store, selection, q, data)


@pytest.mark.parametrize("prompt", [1, 2, 5, 40])
@pytest.mark.parametrize(
    "name", [*EVERY, "oracle query_head", "oracle top_p", "quest query_head", "pqcache_plus top_p"]
)
def test_everything_fits_gives_full_attention(name: str, prompt: int) -> None:
    budget = Budget(sink=4, ratio=1.0)
    others: dict[str, Method] = {
        "oracle query_head": Oracle(budget, "query_head"),
        "oracle top_p": Oracle(budget, "top_p", 1.0),
        "quest query_head": Quest(budget, page_size=4, per_query_head=True),
        "pqcache_plus top_p": PQCachePlus(budget, b=3, b_v=3, top_p=1.0),
    }
    method = others[name] if name in others else exact(name)
    data = case(prompt, 25)
    state, store = start(method, data)
    for step in range(25):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        assert np.allclose(output_of(selection, store, q, data), data.full(prompt + step + 1), atol=1e-5)
        finish(state, store, selection, q, data)


@pytest.mark.parametrize(
    "name", [*EVERY, "oracle query_head", "oracle top_p", "quest query_head", "pqcache_plus top_p"]
)
def test_the_harness_computes_what_the_selection_says(name: str) -> None:
    budget = Budget(sink=4, ratio=0.3, minimum=8)
    others: dict[str, Method] = {
        "oracle query_head": Oracle(budget, "query_head"),
        "oracle top_p": Oracle(budget, "top_p", 0.8),
        "quest query_head": Quest(budget, page_size=4, per_query_head=True),
        "pqcache_plus top_p": PQCachePlus(budget, b=3, b_v=3, top_p=0.6),
    }
    method = others[name] if name in others else small(name, budget)
    data = case(50, 12)
    state, store = start(method, data)
    mirror, mirror_store = start(method, data)
    cohort = Cohort(Rows(slice(None), 0, 2), store, state, method)
    attended = []
    for step in range(12):
        at = data.prompt + step
        cohort.append(data.keys[:, :, at : at + 1], data.values[:, :, at : at + 1])
        output = cohort.attend(data.q[:, :, :, at])
        q = append(mirror, mirror_store, data, step)
        selection = mirror.select(q, mirror_store)
        assert np.allclose(output.numpy(), output_of(selection, mirror_store, q, data), atol=2e-5)
        seen = torch.ones(2, 2, 1, 1, dtype=torch.bool) if selection.visible is None else selection.visible
        attended.append(seen.expand(2, 2, -1, rows_of(selection, mirror_store).shape[2]).any(2).sum(-1).float().mean())
        finish(mirror, mirror_store, selection, q, data)
    assert cohort.meter.steps == 12
    assert cohort.meter.attended == pytest.approx(float(sum(attended)))


@pytest.mark.parametrize("name", EVERY)
def test_meters_follow_the_cost_table(name: str) -> None:
    """Index bytes that a step reads in a layer, by the formulas of the cost table; numbers of keys have four bytes
    here."""
    batch, heads, width, length = 2, 2, 16, 70
    budget = Budget(sink=4, window=6, tokens=22, ratio=None)
    data = case(length - 1, 1, batch=batch, heads=heads, width=width)
    method = small(name, budget)
    state, store = start(method, data)
    q = append(state, store, data, 0)
    before = store.usage.key_bytes_read
    state.select(q, store)
    read = state.index_bytes + store.usage.key_bytes_read - before
    middle = length - 4 - 6
    formulas = {
        "full": 0,
        "oracle": batch * length * heads * width * 4,  # all keys: phi = 1
        "streaming_llm": 0,
        "h2o": batch * heads * 22 * 4,  # one float32 score per kept token
        "sparq": batch * length * heads * 4 * 4,  # s h_kv r e: phi = r / d
        "infllm": batch * -(-middle // 4) * heads * width * 4,  # one vector per block and KV head: phi = 1 / P
        "infllm per head": batch * -(-middle // 5) * heads * width * 4,
        "pqcache": batch * middle * heads * 2,  # m one-byte codes per middle key
        "pqcache_plus": batch * heads * (middle * (3 + 1) + middle // 2),  # codes of keys and values, and the spread
        # 2**(m b) + 1 list bounds, the token that waits to join and those taken from the lists, four bytes each
        "pqcache_plus mean": batch * heads * (64 + 1 + 1 + 12) * 4,
        "pqcache_plus sampled": batch * heads * (middle * 3 + middle // 2),
        "snapkv": 0,
        "snapkv avg": 0,
        "pyramidkv": 0,
        "quest": 2 * batch * -(-middle // 4) * heads * width * 4,  # two vectors per page and KV head: phi = 2 / P
        "quest max": 2 * batch * -(-middle // 5) * heads * width * 4,
        "tova": 0,
        "random_tokens": 0,
        "tova per head": 0,
        # two bytes per hash, and the keys of twelve tokens once more
        "magicpig": batch * heads * (middle * 12 * 2 + 12 * width * 4),
        "vattention": batch * length * heads * 4 * 4,  # as the base method: the random sample needs no index
        "vattention oracle": batch * length * heads * width * 4,
    }
    assert read == formulas[name]
    held = 22 if method.evicts else length
    assert store.usage.device_bytes == 2 * batch * heads * held * width * 4


@pytest.mark.parametrize("name", EVERY)
def test_sequences_and_heads_do_not_mix(name: str) -> None:
    """A batch of two gives the same as two batches of one; a query group of one head works like multi-head
    attention."""
    budget = Budget(sink=4, ratio=0.3, minimum=8)
    method = small(name, budget)
    both = case(47, 6, group=1)
    together = start(method, both)
    outputs = []
    for step in range(6):
        q = append(*together, both, step)
        selection = together[0].select(q, together[1])
        outputs.append(output_of(selection, together[1], q, both))
        finish(*together, selection, q, both)
    for b in range(2):
        alone = case(47, 6, group=1)
        alone.q, alone.keys, alone.values = both.q[b : b + 1], both.keys[b : b + 1], both.values[b : b + 1]
        state, store = start(method, alone, chunk=10)
        for step in range(6):
            q = append(state, store, alone, step)
            selection = state.select(q, store)
            assert np.allclose(output_of(selection, store, q, alone)[0], outputs[step][b], atol=1e-5)
            finish(state, store, selection, q, alone)


@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.4])
def test_the_oracle_holds_the_most_mass_at_equal_size(ratio: float) -> None:
    """With the same sinks and window, no selection of the same size keeps more probability of a KV head."""
    budget = Budget(sink=4, window=6, ratio=ratio, minimum=12)
    data = case(150, 3, spread=2.5)

    def mass(method: Method, step: int) -> np.ndarray:
        state, store = start(method, data)
        for before in range(step):
            q = append(state, store, data, before)
            finish(state, store, state.select(q, store), q, data)
        q = append(state, store, data, step)
        tokens = tokens_of(state.select(q, store), store).numpy()
        exact = data.probabilities(data.prompt + step + 1).sum(2)
        return np.take_along_axis(exact, tokens, 2).sum(-1)

    for step in range(3):
        best = mass(Oracle(budget), step)
        methods = {name: small(name, budget) for name in SELECTING}
        masses = {
            name: mass(method, step)
            for name, method in methods.items()
            if not isinstance(method, Oracle | StreamingLLM)  # the oracle itself, and a method with another window
        }
        for name, value in masses.items():
            assert (value <= best + 1e-6).all(), name
        assert any((value < best - 1e-3).any() for value in masses.values())
