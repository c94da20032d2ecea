"""PQCache against the paper's algorithm, written out in numpy, and tests for the defects of the released code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.oracle import Oracle
from methods.pqcache import PQCache, PQCacheState
from methods.pqcache.index import KeyIndex
from pqbench.kernels import reference
from pqbench.method import KV, Budget, ConfigError, PaperBudget
from pqbench.store.device import DeviceStore
from tests.support import Case, advance, append, case, finish, output_of, softmax, start, tokens_of

BUDGET = Budget(sink=3, window=6, tokens=21, ratio=None)


def started(method: PQCache, data: Case) -> tuple[PQCacheState, DeviceStore]:
    state, store = start(method, data)
    assert isinstance(state, PQCacheState)
    return state, store


def reconstructed(state: PQCacheState) -> np.ndarray:
    """Quantised middle keys, float64 ``[B, H, middle, D]``."""
    assert state.index.codebook is not None
    assert state.index.codes is not None
    book, codes = (
        state.index.codebook.double().numpy(),
        state.index.codes.view()[:, :, : state.index.middle].long().numpy(),
    )
    batch, heads, count, m = codes.shape
    result = np.zeros((batch, heads, count, m * book.shape[-1]))
    for b, h, s in np.ndindex(batch, heads, count):
        result[b, h, s] = np.concatenate([book[b, h, j, codes[b, h, s, j]] for j in range(m)])
    return result


@pytest.mark.parametrize(("m", "b"), [(1, 3), (2, 3), (4, 2), (16, 1)])
def test_selection_equals_the_papers_algorithm(m: int, b: int) -> None:
    data = case(90, 10, group=3, spread=2.0)
    state, store = started(PQCache(BUDGET, m=m, b=b), data)
    for step in range(10):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        length = 90 + step + 1
        logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), reconstructed(state)) / np.sqrt(16)
        summed = softmax(logits).sum(2)  # over the middle alone, per query head, then over the group
        assert summed.shape[2] == length - 9
        tokens = tokens_of(selection, store)
        for i, h in np.ndindex(2, 2):
            chosen = np.array(sorted(set(tokens[i, h].tolist()) - {0, 1, 2} - set(range(length - 6, length)))) - 3
            assert len(chosen) == 12
            rest = np.delete(summed[i, h], chosen)
            assert summed[i, h, chosen].min() >= rest.max() - 1e-6  # ties between equal codes are free
        finish(state, store, selection, q, data)


@pytest.mark.parametrize("m", [2, 4])
def test_few_distinct_subvectors_make_it_the_oracle(m: int) -> None:
    data = case(200, 0, group=1)
    width = 16 // m
    pool = torch.randn(8, width, generator=torch.Generator().manual_seed(1))  # 2**b distinct sub-vectors
    picks = torch.randint(8, (2, 2, 200, m), generator=torch.Generator().manual_seed(2))
    data.keys = pool[picks].reshape(2, 2, 200, 16)
    seeds = (_books(data, m, seed) for seed in range(200))
    state, store = next(
        s for s in seeds if np.allclose(reconstructed(s[0]), s[1].keys(3, 194).double().numpy(), atol=1e-5)
    )
    _same_mass_as_oracle(state, store, data)


def _books(data: Case, m: int, seed: int) -> tuple[PQCacheState, DeviceStore]:
    return started(PQCache(BUDGET, m=m, b=5, seed=seed), data)


def test_a_centroid_per_key_makes_it_the_oracle() -> None:
    assert started(PQCache(BUDGET, m=1, b=6), case(73, 0))[0].index.codebook is None  # 64 middle keys: attended whole
    data = case(74, 0, group=1)
    data.keys[:, :, 67] = data.keys[:, :, 66]  # 65 middle keys, 64 distinct
    for seed in range(400):
        state, store = started(PQCache(BUDGET, m=1, b=6, seed=seed), data)
        if np.allclose(reconstructed(state), store.keys(3, 68).double().numpy(), atol=1e-5):
            break
    else:
        pytest.fail("no start drew every distinct key")
    _same_mass_as_oracle(state, store, data)


def _same_mass_as_oracle(state: PQCacheState, store: DeviceStore, data: Case) -> None:
    """With one query head per group, a softmax over the middle ranks tokens like one over all tokens."""
    q, exact = data.q[:, :, :, data.prompt - 1], data.probabilities(data.prompt)[:, :, 0]
    oracle, oracle_store = start(Oracle(BUDGET), data)
    mine = tokens_of(state.select(q, store), store).numpy()
    best = tokens_of(oracle.select(q, oracle_store), oracle_store).numpy()
    assert mine.shape[2] == best.shape[2] == 21
    kept, most = (np.take_along_axis(exact, tokens, 2).sum(-1) for tokens in (mine, best))
    assert np.allclose(kept, most, atol=1e-6)


def test_an_appended_token_gets_the_nearest_centroid_of_its_own_key() -> None:
    data = case(80, 20)
    state, store = started(PQCache(BUDGET, m=2, b=3), data)
    assert state.index.codebook is not None
    books = state.index.codebook.clone()
    for step in range(20):
        advance(state, store, data, step)
        assert state.index.codes is not None
        assert len(state.index.codes) >= state.index.middle == 80 + step + 1 - 9
        token = 80 + step - 6  # the one that left the window
        for b, h, j in np.ndindex(2, 2, 2):
            own = data.keys[b, h, token, 8 * j : 8 * j + 8].double()
            nearest = int((books[b, h, j].double() - own).square().sum(-1).argmin())
            assert int(state.index.codes.view()[b, h, state.index.middle - 1, j]) == nearest
    assert torch.equal(state.index.codebook, books)  # frozen


def test_tokens_are_encoded_sixteen_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes exist up to the newest token; tokens still enter the middle one by one, as the test above shows."""
    asked: list[tuple[int, int]] = []
    encode = KeyIndex.encode

    def counted(index: KeyIndex, kv: KV, start: int, stop: int) -> Tensor:
        asked.append((start, stop))
        return encode(index, kv, start, stop)

    monkeypatch.setattr(KeyIndex, "encode", counted)
    for window, calls in ((20, [(60, 76), (76, 92)]), (6, [(74, 81), (81, 88), (88, 95), (95, 102), (102, 109)])):
        asked.clear()
        data = case(80, 30)
        state, store = start(PQCache(Budget(sink=3, window=window, tokens=50, ratio=None), m=2, b=3), data)
        for step in range(30):
            append(state, store, data, step)
        assert asked == calls, asked


def test_codebooks_see_the_middle_alone() -> None:
    """Sinks, window and memory after the prompt must not be clustered; the released code clusters stale rows."""
    data, poisoned = case(80, 1), case(80, 1)
    for tokens in (slice(0, 3), slice(74, 81)):
        poisoned.keys[:, :, tokens] = float("nan")
    clean, dirty = started(PQCache(BUDGET, m=2, b=3), data)[0], started(PQCache(BUDGET, m=2, b=3), poisoned)[0]
    assert clean.index.codebook is not None
    assert dirty.index.codebook is not None
    assert torch.equal(clean.index.codebook, dirty.index.codebook)
    assert clean.index.codes is not None
    assert dirty.index.codes is not None
    assert torch.equal(clean.index.codes.view(), dirty.index.codes.view())


def test_permuting_middle_tokens_permutes_the_selection() -> None:
    data = case(90, 1)
    order = torch.arange(91)
    order[3:85] = 3 + torch.randperm(82, generator=torch.Generator().manual_seed(3))
    state, store = started(PQCache(BUDGET, m=2, b=3), data)
    assert state.index.codebook is not None
    moved = case(90, 1)
    moved.keys, moved.values = data.keys[:, :, order], data.values[:, :, order]
    # K-Means starts from randomly drawn rows, so both get the same codebooks, and the selections are compared.
    other, other_store = started(PQCache(BUDGET, m=2, b=3), moved)
    other.index.codebook = state.index.codebook
    other.index.codes = type(state.index.codes)(reference.encode(moved.keys[:, :, 3:84], state.index.codebook))  # type: ignore[misc]
    q, _ = append(state, store, data, 0), append(other, other_store, moved, 0)
    assert np.array_equal(reconstructed(other), reconstructed(state)[:, :, order[3:85].numpy() - 3])
    scores = [s.index.known.view()[:, :, : s.index.middle] for s in (state, other)]
    assert torch.equal(scores[1], scores[0][:, :, order[3:85] - 3])
    mine = tokens_of(state.select(q, store), store)
    theirs = order[tokens_of(other.select(q, other_store), other_store)]
    logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), reconstructed(state)) / 4
    summed = softmax(logits).sum(2)
    for b, h in np.ndindex(2, 2):  # tokens of one code pair are ties, so scores are compared
        picks = [sorted(summed[b, h, t - 3] for t in chosen[b, h].tolist() if 3 <= t < 85) for chosen in (mine, theirs)]
        assert np.allclose(picks[0], picks[1], atol=1e-7)


@pytest.mark.parametrize("budget", [BUDGET, Budget(sink=3, ratio=0.2, minimum=10), PaperBudget(sink=3, ratio=0.2)])
def test_every_short_prompt_equals_full_attention(budget: Budget) -> None:
    """Prompts of 1 to 2**b + sink + window + 2 tokens; there the released code attends only to the current token."""
    method = PQCache(budget, m=2, b=3)
    whole = 0
    for prompt in range(1, 8 + 3 + 6 + 3):
        data = case(prompt, 3)
        state, store = started(method, data)
        for step in range(3):
            q = append(state, store, data, step)
            selection = state.select(q, store)
            first, stop = budget.resolve(prompt + step + 1, prompt).middle(prompt + step + 1)
            if stop - first <= 8:
                assert selection.indices is None
                assert np.allclose(output_of(selection, store, q, data), data.full(prompt + step + 1), atol=1e-5)
                assert method.attends_all(prompt + step + 1) or isinstance(budget, PaperBudget)
                whole += 1
            else:
                assert state.index.codebook is not None
    assert whole > 20


def test_prompts_in_sequence_equal_each_alone() -> None:
    method = PQCache(BUDGET, m=2, b=3)
    outputs = []
    for _ in range(2):
        for seed in (1, 2):
            data = case(80, 2, seed=seed)
            state, store = started(method, data)
            outputs.append(torch.cat([tokens_of(advance(state, store, data, s), store) for s in range(2)]))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_keys_that_are_not_finite_are_refused(value: float) -> None:
    data = case(80, 1)
    data.keys[1, 0, 40, 3] = value
    with pytest.raises(ConfigError, match=r"layer 0 .*NaN"):
        start(PQCache(BUDGET, m=2, b=3), data)


def test_sizes_are_those_of_bytes_and_codebooks() -> None:
    data = case(80, 1)
    state, _ = started(PQCache(BUDGET, m=4, b=3), data)
    codes = 2 * 2 * (80 - 9) * 4
    assert state.index_bytes == codes
    assert state.resident_bytes == codes + 2 * 2 * 8 * 16 * 4


@pytest.mark.parametrize(("m", "b", "word"), [(2, 0, "b is 0"), (2, 9, "b is 9"), (0, 6, "m >= 1")])
def test_wrong_options_are_named(m: int, b: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        PQCache(m=m, b=b)


def test_subspaces_must_divide_the_head_dimension() -> None:
    with pytest.raises(ConfigError, match=r"m is 3.*16"):
        PQCache(m=3).layer(case(4, 1).geometry)


def test_presets_are_the_papers() -> None:
    longbench, infinitebench = PQCache.paper_longbench(), PQCache.paper_infinitebench(0.2)
    assert (longbench.m, longbench.b, longbench.budget) == (2, 6, PaperBudget(ratio=0.1))
    assert (infinitebench.m, infinitebench.b, infinitebench.budget) == (4, 8, PaperBudget(ratio=0.2))
