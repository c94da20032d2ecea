"""PQCache beyond the paper: tails, calibration, samples and refreshed codebooks against numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from methods.pqcache import PQCache, PQCachePlus, PQCachePlusState
from pqbench.kernels import reference
from pqbench.method import Budget, ConfigError, Selection
from pqbench.store.device import DeviceStore
from tests.support import (
    Case,
    advance,
    append,
    assert_unbiased,
    case,
    estimate_of,
    output_of,
    softmax,
    start,
    tokens_of,
)

BUDGET = Budget(sink=3, window=6, tokens=21, ratio=None)
KINDS = ["plain", "centred", "rotated", "query_aware"]
TAILS = ["none", "mean", "pq", "sampled"]


def plus(budget: Budget = BUDGET, **options: Any) -> PQCachePlus:
    """A method with small codebooks, by default without calibration and spread."""
    return PQCachePlus(budget, **{"b": 3, "m_v": 2, "b_v": 3, "calibrated": False, "spread": False, **options})


def started(method: PQCachePlus, data: Case, chunk: int | None = None) -> tuple[PQCachePlusState, DeviceStore]:
    state, store = start(method, data, chunk)
    assert isinstance(state, PQCachePlusState)
    return state, store


def decoded(codebook: Tensor | None, codes: Tensor) -> np.ndarray:
    """The rows ``[B, H, n, D]`` in float64 that codes ``[B, H, n, m]`` represent."""
    assert codebook is not None
    book, number = codebook.double().numpy(), codes.long().numpy()
    batch, heads, count, m = number.shape
    rows = np.zeros((batch, heads, count, m * book.shape[-1]))
    for b, h, s in np.ndindex(batch, heads, count):
        rows[b, h, s] = np.concatenate([book[b, h, j, number[b, h, s, j]] for j in range(m)])
    return rows


def estimates(state: PQCachePlusState, q: Tensor) -> np.ndarray:
    """Logits ``[B, H, n, M]`` of queries ``[B, H, n, D]`` with keys decoded and mapped back, float64."""
    assert state.index.codes is not None
    keys = decoded(state.index.codebook, state.index.codes.view()[..., : state.method.m])
    if state.index.map.forward is not None:
        keys = keys @ np.linalg.pinv(state.index.map.forward.double().numpy())
    if state.index.map.offset is not None:
        keys = keys + state.index.map.offset.double().numpy()
    logits = np.einsum("bhnd,bhsd->bhns", q.double().numpy(), keys) * state.geometry.scaling
    if state.index.spread is None:
        return logits
    return logits + ((levels(state) / 15) ** 2 * state.index.spread.most.double().numpy())[:, :, None]


def levels(state: PQCachePlusState) -> np.ndarray:
    """The spread's four bits of every middle token, ``[B, H, M]`` float64."""
    assert state.index.spread is not None
    assert state.index.codes is not None
    pairs = state.index.spread.numbers.pairs().numpy()
    both = np.stack([pairs % 16, pairs // 16], axis=-1).reshape(*pairs.shape[:2], -1)
    return both[:, :, : len(state.index.codes)].astype(float)


def lse(x: np.ndarray) -> np.ndarray:
    """Log-sum-exp over the last axis."""
    top = x.max(-1, keepdims=True)
    return np.log(np.exp(x - top).sum(-1)) + top[..., 0]


def unselected(selection: Selection, store: DeviceStore, budget: Budget, prompt: int) -> np.ndarray:
    """Bool ``[B, H, M]``: middle tokens that are not attended."""
    first, stop = budget.resolve(store.length, prompt).middle(store.length)
    free = np.ones((*selection.indices.shape[:2], store.length), dtype=bool) if selection.indices is not None else None
    assert free is not None
    np.put_along_axis(free, tokens_of(selection, store).numpy(), False, 2)
    assert not free[..., :first].any()
    assert not free[..., stop:].any()
    return free[..., first:stop]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tail", ["mean", "pq"])
@pytest.mark.parametrize("spread", [False, True])
def test_tail_is_the_estimate_of_exactly_the_unselected(kind: str, tail: str, spread: bool) -> None:
    """Compared with numpy; the weights of selection and tail together are the estimate of the whole scan."""
    data = case(90, 8, group=3)
    state, store = started(plus(codebook=kind, tail=tail, spread=spread), data)
    for step in range(8):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        assert selection.residual is not None
        assert state.index.codes is not None
        logits, rest = estimates(state, q), unselected(selection, store, BUDGET, 90)
        assert (rest.sum(-1) == 90 + step + 1 - 21).all()
        free = np.where(rest[:, :, None], logits, -np.inf)
        weight = selection.residual.log_weight.numpy()
        assert np.allclose(weight, lse(free), atol=1e-4)
        held = np.where(rest[:, :, None], -np.inf, logits)
        assert np.allclose(np.logaddexp(weight, lse(held)), lse(logits), atol=1e-4)
        if tail == "pq":
            values = decoded(state.index.value_codebook, state.index.codes.view()[..., state.method.m :])
            expected = np.einsum("bhgs,bhsd->bhgd", softmax(free), values)
        else:
            middle = data.values[:, :, 3 : 90 + step + 1 - 6].double().numpy().mean(2)
            expected = np.broadcast_to(middle[:, :, None], (2, 2, 3, 16))
        assert np.allclose(selection.residual.value.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spread", [False, True])
def test_selection_is_the_best_by_the_estimate(kind: str, spread: bool) -> None:
    data = case(90, 5, group=3)
    state, store = started(plus(codebook=kind, tail="none", spread=spread), data)
    for step in range(5):
        q = append(state, store, data, step)
        selection = state.select(q, store)
        assert selection.residual is None
        summed, rest = softmax(estimates(state, q)).sum(2), unselected(selection, store, BUDGET, 90)
        for b, h in np.ndindex(2, 2):
            assert summed[b, h][~rest[b, h]].min() >= summed[b, h][rest[b, h]].max() - 1e-5


@pytest.mark.parametrize("prompt", [1, 3, 12, 40])
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("search", ["scan", "cells"])
def test_a_budget_for_everything_is_full_attention(prompt: int, tail: str, search: str) -> None:
    budget = Budget(sink=4, ratio=1.0)
    data = case(prompt, 15)
    state, store = started(plus(budget, tail=tail, search=search, spread=search == "scan", calibrated=True), data)
    for step in range(15):
        selection = advance(state, store, data, step)
        output = output_of(selection, store, data.q[:, :, :, prompt + step], data)
        assert np.allclose(output, data.full(prompt + step + 1), atol=1e-5)
        if selection.residual is not None:
            assert (selection.residual.log_weight == float("-inf")).all()
        if selection.log_weights is not None:
            assert (selection.log_weights == 0).all()
    assert prompt < 12 or state.index.codebook is not None


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("tokens", [9, 10, 21, 60])
def test_identical_values_give_full_attention_at_any_budget(tail: str, tokens: int) -> None:
    data = case(90, 3)
    data.values[:] = torch.randn(2, 2, 1, 16, generator=torch.Generator().manual_seed(4))
    method = plus(replace(BUDGET, tokens=tokens), tail=tail, calibrated=True, spread=True)
    state, store = started(method, data)
    for step in range(3):
        selection = advance(state, store, data, step)
        output = output_of(selection, store, data.q[:, :, :, 90 + step], data)
        assert np.allclose(output, data.full(90 + step + 1), atol=1e-5)


@pytest.mark.parametrize("prompt", [100, 60])
def test_factor_is_true_over_estimated_mass_of_the_last_queries(prompt: int) -> None:
    """The factor is written out per query. With 60 tokens the earliest of the 64 queries see no middle token."""
    data = case(prompt, 0, group=3)
    state, _ = started(plus(calibrated=True, codebook="centred"), data)
    first, stop = 3, prompt - 6
    true, guessed = np.zeros((2, 2)), np.zeros((2, 2))
    for position in range(max(0, prompt - 64), prompt):
        q, seen = data.q[:, :, :, position], np.arange(first, stop) <= position
        exact = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), data.keys.double().numpy()) * data.scaling
        normaliser = lse(exact[..., : position + 1])[..., None]
        estimated = np.where(seen, estimates(state, q), -np.inf)
        summed = softmax(estimated).sum(2) if seen.any() else np.zeros((2, 2, stop - first))
        for b, h in np.ndindex(2, 2):
            order = np.argsort(-summed[b, h], kind="stable")[:12]
            rest = np.isin(np.arange(stop - first), order, invert=True) & seen
            true[b, h] += np.exp(exact[b, h, :, first:stop] - normaliser[b, h])[:, rest].sum()
            guessed[b, h] += np.exp(estimated[b, h] - normaliser[b, h])[:, rest].sum()
    assert np.allclose(state.tail.log_factor.numpy(), np.log(true / guessed), atol=2e-3)
    assert (state.tail.log_factor > 0.02).all()  # Jensen: codes underestimate the tail


def test_factor_is_added_to_the_weight() -> None:
    data = case(100, 1)
    plain, calibrated = started(plus(), data), started(plus(calibrated=True), data)
    weights = [advance(*pair, data, 0).residual for pair in (plain, calibrated)]
    assert weights[0] is not None
    assert weights[1] is not None
    factor = calibrated[0].tail.log_factor[:, :, None].expand(2, 2, 2)
    assert torch.allclose(weights[1].log_weight - weights[0].log_weight, factor, atol=1e-5)


def test_exact_codes_need_no_correction() -> None:
    """With eight distinct keys and eight centroids, the output is that of full attention with quantised values."""
    data = case(100, 1)
    pool = torch.randn(2, 2, 4, 16, generator=torch.Generator().manual_seed(2))
    data.keys = pool[:, :, torch.arange(101) % 4]
    for seed in range(200):
        state, store = started(plus(m=1, b=4, calibrated=True, seed=seed, codebook="plain"), data)
        keys = decoded(state.index.codebook, state.index.known.view()[..., :1])
        if np.allclose(keys, data.keys[:, :, 3:94], atol=1e-5):
            break
    else:
        pytest.fail("no start drew every distinct key")
    assert np.allclose(state.tail.log_factor.numpy(), 0, atol=1e-4)
    residual = advance(state, store, data, 0).residual
    assert residual is not None


def test_samples_are_unbiased() -> None:
    """Means of numerator and denominator over 1000 seeds are within 4.5 standard errors of the truth (136 values)."""
    data = case(80, 1, spread=1.0)
    state, store = started(plus(tail="sampled"), data)
    q, sums = append(state, store, data, 0), []
    for seed in range(1000):
        state.method = replace(state.method, seed=seed)  # seed of the sample; the codebooks exist already
        selection = state.select(q, store)
        assert selection.indices is not None
        assert selection.indices.shape == (2, 2, 21)
        sums.append(estimate_of(selection, store, data))
    assert_unbiased(np.stack(sums), data.sums(81))


def test_samples_differ_by_step_and_head_and_repeat_with_the_seed() -> None:
    data = case(80, 2)
    first, again = started(plus(tail="sampled"), data), started(plus(tail="sampled"), data)
    tokens = [tokens_of(advance(*first, data, step), first[1]) for step in range(2)]
    assert torch.equal(tokens[0], tokens_of(advance(*again, data, 0), again[1]))
    draws = tokens[0][..., 3 + 6 : 3 + 12]  # after sinks and top
    assert not torch.equal(draws[:, 0], draws[:, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunked_prefill_equals_one_shot(kind: str, chunk: int) -> None:
    data = case(100, 3)
    method = plus(codebook=kind, calibrated=True, queries=50)
    whole, chunked = started(method, data), started(method, data, chunk)
    assert np.allclose(whole[0].tail.log_factor.numpy(), chunked[0].tail.log_factor.numpy(), atol=1e-5)
    for step in range(3):
        outputs = [
            output_of(advance(*pair, data, step), pair[1], data.q[:, :, :, 100 + step], data)
            for pair in (whole, chunked)
        ]
        assert np.allclose(outputs[0], outputs[1], atol=1e-5)


def test_prompts_in_sequence_equal_each_alone() -> None:
    method, outputs = plus(calibrated=True, refresh=2), []
    for _ in range(2):
        for seed in (1, 2):
            data = case(80, 4, seed=seed)
            pair = started(method, data)
            steps = [output_of(advance(*pair, data, s), pair[1], data.q[:, :, :, 80 + s], data) for s in range(4)]
            outputs.append(np.stack(steps))
    assert np.array_equal(outputs[0], outputs[2])
    assert np.array_equal(outputs[1], outputs[3])
    assert not np.allclose(outputs[0], outputs[1])


def test_an_appended_token_gets_the_nearest_centroids_of_its_own_key_and_value() -> None:
    data = case(80, 20)
    state, store = started(plus(), data)
    assert state.index.map.forward is not None
    for step in range(20):
        advance(state, store, data, step)
        assert state.index.codes is not None
        token = 80 + step - 6  # the one that left the window
        key = data.keys[:, :, token : token + 1].double().numpy() @ state.index.map.forward.double().numpy()
        own = {"key": key, "value": data.values[:, :, token : token + 1].double().numpy()}
        for name, book, codes in (
            ("key", state.index.codebook, state.index.codes.view()[:, :, -1, :3]),
            ("value", state.index.value_codebook, state.index.codes.view()[:, :, -1, 3:]),
        ):
            assert book is not None
            parts, width = codes.shape[2], book.shape[4]
            assert (parts, width) == {"key": (3, 6), "value": (2, 8)}[name]  # 16 dimensions, for keys two zeros
            for b, h, j in np.ndindex(2, 2, parts):
                own_part = own[name][b, h, 0, width * j : width * (j + 1)]
                distance = np.square(book[b, h, j].double().numpy() - own_part).sum(-1)
                assert distance[int(codes[b, h, j])] <= distance.min() + 1e-5


def test_refresh_learns_from_all_keys_and_queries_so_far() -> None:
    data = case(80, 12)
    state, store = started(plus(refresh=5), data)
    frozen, frozen_store = started(plus(), data)
    for step in range(12):
        before = state.index.codebook
        advance(state, store, data, step)
        advance(frozen, frozen_store, data, step)
        assert state.index.codebook is not None
        assert (state.index.codebook is not before) == (step in (4, 9))
    assert state.index.codes is not None
    # Codebooks are made again in step 9, from 90 tokens; the query of the current one has not been seen.
    x = data.q[:, :, :, :89].double().numpy()
    moment = np.einsum("bhgnd,bhgne->bhde", x, x) / (2 * 89)
    moment += 1e-3 * np.trace(moment, axis1=2, axis2=3)[..., None, None] / 16 * np.eye(16)
    assert state.index.map.forward is not None
    forward = state.index.map.forward.double().numpy()
    assert np.allclose(forward @ forward.transpose(0, 1, 3, 2), moment, atol=1e-3)
    keys = data.keys[:, :, 3:84] @ state.index.map.forward
    codebook, codes = reference.train_codebook(keys, 3, 8, 10, 0, 128 * 8)
    assert torch.allclose(state.index.codebook, codebook, atol=1e-4)
    assert torch.equal(state.index.codes.view()[:, :, :81, :3], codes)
    assert len(state.index.codes) == 92 - 9
    assert not torch.equal(state.index.codebook, frozen.index.codebook)  # type: ignore[arg-type]


def test_codes_on_the_host_answer_the_same() -> None:
    data = case(80, 6)
    near, far = started(plus(), data), started(plus(codes_on="host"), data)
    for step in range(6):
        far[0].prefetch(far[1])
        pair = [advance(*p, data, step) for p in (near, far)]
        assert torch.equal(pair[0].indices, pair[1].indices)  # type: ignore[arg-type]
        assert torch.equal(pair[0].residual.value, pair[1].residual.value)  # type: ignore[union-attr]


def test_sizes_count_codes_of_keys_and_values() -> None:
    state, _ = started(plus(m=4, m_v=2), case(80, 1))
    codes, heads = 2 * 2 * (80 - 9) * (4 + 2), 2 * 2
    assert state.index_bytes == codes
    books, maps, moment = heads * 16 * 8 * 4 * 2, heads * 16 * 16 * 4 * 2, heads * 16 * 16 * 8
    assert state.resident_bytes == codes + books + maps + moment
    state, _ = started(plus(m=4, m_v=2, spread=True), case(80, 1))
    assert state.index_bytes == codes + 2 * 2 * 36  # half a byte for each of 71 tokens
    assert state.resident_bytes == codes + books + maps + moment + heads * (36 + 16 * 16 * 4 + 4)


def test_defaults_read_36_bits_of_a_token() -> None:
    state, _ = started(PQCachePlus(Budget(sink=3, window=6, tokens=30, ratio=None)), case(1009, 1))
    assert state.index_bytes * 8 == 2 * 2 * 1000 * 36
    method = state.method
    assert (method.codebook, method.tail, method.calibrated) == ("query_aware", "pq", True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", [1, 3, 5, 16])
def test_sub_spaces_need_not_divide_the_head_dimension(kind: str, m: int) -> None:
    """Zeros that are appended to keys and queries change no product and get no weight."""
    data = case(90, 1)
    state, store = started(plus(codebook=kind, m=m), data)
    q, keys = data.q[:, :, :, 90], store.keys(3, 84)
    mapped = state.index.map.queries(q) @ state.index.map.keys(keys).transpose(2, 3)
    assert mapped.shape == (2, 2, q.shape[2], 81)
    assert state.index.map.keys(keys).shape[-1] == -(-16 // m) * m
    exact = q @ keys.transpose(2, 3)
    assert torch.allclose(mapped + state.index.map.constant(q)[..., None], exact, atol=1e-3)


def test_without_additions_it_is_pqcache() -> None:
    data = case(90, 5)
    ours = started(plus(codebook="plain", tail="none", m=2, iterations=10, tolerance=0.0), data)
    paper = start(PQCache(BUDGET, m=2, b=3, iterations=10, tolerance=0.0), data)
    for step in range(5):
        assert torch.equal(*(advance(*pair, data, step).indices for pair in (ours, paper)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"codebook": "best"}, "codebook is 'best'.*query_aware"),
        ({"tail": "long"}, "tail is 'long'.*sampled"),
        ({"search": "fast"}, "search is 'fast'.*cells"),
        ({"b_v": 9}, "b_v"),
        ({"m_v": 0}, "m_v"),
        ({"sampled_share": 1.5}, r"sampled_share is 1.5"),
        ({"search": "cells", "m": 4, "b": 8}, "at most 16 bits, got 32"),
        ({"queries": 0}, "queries is 0"),
        ({"refresh": 0}, "refresh is 0"),
        ({"arranged": True, "search": "scan"}, "set search=cells"),
        ({"arranged": True, "refresh": 5}, "no refresh"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 0.9, "tail": "sampled"}, "another tail"),
        ({"top_p": 0.9, "search": "cells"}, "scan or auto"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        plus(**options)


def test_subspaces_of_values_must_divide_the_head_dimension() -> None:
    with pytest.raises(ConfigError, match=r"m_v is 3.*16"):
        plus(m_v=3).layer(case(4, 1).geometry)


def test_more_sub_spaces_of_keys_than_dimensions_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"m is 17.*16"):
        plus(m=17).layer(case(4, 1).geometry)
