"""Search by cells against a scan over all tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from methods.pqcache import PQCachePlus, PQCachePlusState
from methods.pqcache.cells import InvertedLists, cell_numbers, searches_cells
from pqbench.kernels import cpu, reference
from pqbench.kernels.backend import Kernels
from pqbench.kernels.reference.cells import cell_scores
from pqbench.method import Budget
from tests.support import advance, case, output_of, start, tokens_of

searches = st.tuples(
    st.integers(1, 3),  # m
    st.integers(1, 3),  # b
    st.integers(1, 80),  # tokens listed at once
    st.integers(0, 40),  # tokens appended, one by one
    st.integers(0, 120),  # tokens wanted
    st.integers(0, 10_000),  # seed
    st.booleans(),  # codes drawn from few values: many tokens per cell
)


def drawn(m: int, b: int, tokens: int, seed: int, few: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Query ``[2, 2, 3, 4m]``, codebook and codes of ``tokens``."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(2, 2, 3, 4 * m, generator=generator)
    codebook = torch.randn(2, 2, m, 2**b, 4, generator=generator)
    if few:
        codebook[:, :, :, 1:] = codebook[:, :, :, :1]  # all cells tie
    codes = torch.randint(2 ** (1 if few else b), (2, 2, tokens, m), generator=generator).to(torch.uint8)
    return q, codebook, codes


def scanned(q: Tensor, codebook: Tensor, codes: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Computed in numpy, token by token: logits ``[B, H, G, S]``, and their softmax summed over the query group."""
    book, number = codebook.double().numpy(), codes.long().numpy()
    batch, heads, count, m = number.shape
    keys = np.zeros((batch, heads, count, m * book.shape[-1]))
    for b, h, s in np.ndindex(batch, heads, count):
        keys[b, h, s] = np.concatenate([book[b, h, j, number[b, h, s, j]] for j in range(m)])
    logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), keys)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return logits, (weights / weights.sum(-1, keepdims=True)).sum(2)


BACKENDS = [pytest.param(backend, id=backend.__name__.rpartition(".")[2]) for backend in (reference, cpu)]


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=150, deadline=None)
@given(search=searches)
def test_cells_select_what_a_scan_selects(backend: Kernels, search: tuple[int, int, int, int, int, int, bool]) -> None:
    m, b, listed, appended, wanted, seed, few = search
    q, codebook, codes = drawn(m, b, listed + appended, seed, few)
    lists = InvertedLists(cell_numbers(codes[:, :, :listed], b), m * b, backend)
    for token in range(listed, listed + appended):
        lists.append(cell_numbers(codes[:, :, token : token + 1], b), backend)
    assert len(lists) == listed + appended
    found_tokens, others_weigh = backend.best_of_cells(
        q, codebook, lists.starts, lists.tokens, lists.pending, wanted, 0.7
    )
    found = found_tokens.numpy()
    q = q * 0.7
    logits, exact = scanned(q, codebook, codes)
    count = min(wanted, listed + appended)
    assert found.shape == (2, 2, count)
    assert (np.diff(found, axis=2) > 0).all()
    left = np.ones(logits.shape[:2] + logits.shape[3:])
    np.put_along_axis(left, found, 0.0, 2)
    with np.errstate(divide="ignore"):
        assert np.allclose(others_weigh.numpy(), np.log((np.exp(logits) * left[:, :, None]).sum(-1)), atol=1e-4)
    for i, h in np.ndindex(2, 2):
        chosen = set(found[i, h].tolist())
        others = [s for s in range(listed + appended) if s not in chosen]
        if chosen and others:
            assert exact[i, h, list(chosen)].min() >= exact[i, h, others].max() * (1 - 1e-5)
        for s in others:  # within a cell the older token goes first
            same = (codes[i, h] == codes[i, h, s]).all(-1).nonzero()[:, 0].tolist()
            assert not any(t in chosen for t in same if t > s)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None)
@given(search=searches)
def test_lists_hold_every_token_once_oldest_first(
    backend: Kernels, search: tuple[int, int, int, int, int, int, bool]
) -> None:
    m, b, listed, appended, _, seed, few = search
    cells = cell_numbers(drawn(m, b, listed + appended, seed, few)[2], b)
    lists = InvertedLists(cells[:, :, :listed], m * b, backend)
    starts, tokens = backend.merge_lists(lists.starts, lists.tokens, cells[:, :, listed:])
    for i, h in np.ndindex(2, 2):
        bounds = starts[i, h].tolist()
        for cell in range(2 ** (m * b)):
            own = (cells[i, h] == cell).nonzero()[:, 0].tolist()
            assert tokens[i, h, bounds[cell] : bounds[cell + 1]].tolist() == own


@pytest.mark.parametrize("backend", BACKENDS)
def test_merged_lists_select_the_same(backend: Kernels) -> None:
    """Lists are merged after 512 appended tokens."""
    q, codebook, codes = drawn(2, 3, 700, 5, False)
    grown = InvertedLists(cell_numbers(codes[:, :, :50], 3), 6, backend)
    for first in range(50, 700, 13):
        grown.append(cell_numbers(codes[:, :, first : first + 13], 3), backend)
    assert len(grown) == 700
    assert grown.pending.shape[2] < 512
    _, exact = scanned(q, codebook, codes)
    found = backend.best_of_cells(q, codebook, grown.starts, grown.tokens, grown.pending, 200, 1.0)[0].numpy()
    for i, h in np.ndindex(2, 2):
        assert np.isclose(exact[i, h, found[i, h]].sum(), np.sort(exact[i, h])[-200:].sum(), rtol=1e-5)


def test_cells_count_in_digits() -> None:
    codes = torch.tensor([[[[1, 2], [3, 0], [0, 3]]]], dtype=torch.uint8)
    assert cell_numbers(codes, 2).tolist() == [[[6, 12, 3]]]
    q, codebook, _ = drawn(3, 2, 1, 0, False)
    tables = np.einsum("bhgmw,bhmkw->bhgmk", q.view(2, 2, 3, 3, 4).double().numpy(), codebook.double().numpy())
    scores = cell_scores(q, codebook).numpy()
    assert scores.shape == (2, 2, 3, 64)
    for i, j, k in np.ndindex(4, 4, 4):
        expected = tables[..., 0, i] + tables[..., 1, j] + tables[..., 2, k]
        assert np.allclose(scores[..., 16 * i + 4 * j + k], expected, atol=1e-5)


@pytest.mark.parametrize("tail", ["none", "mean", "pq", "sampled"])
@pytest.mark.parametrize("kind", ["centred", "query_aware"])
def test_methods_answer_the_same_by_cells_and_by_scan(tail: str, kind: str) -> None:
    budget = Budget(sink=3, window=6, tokens=30, ratio=None)
    data = case(120, 40)
    data.keys[:, :, 40:60] = data.keys[:, :, 20:40]  # ties
    states = {}
    for search in ("scan", "cells"):
        states[search] = start(
            PQCachePlus(budget, b=3, b_v=3, codebook=kind, tail=tail, spread=False, search=search), data
        )
    for step in range(40):
        outputs, tokens = [], []
        for state, store in states.values():
            assert isinstance(state, PQCachePlusState)
            assert (state.index.lists is not None) == (state.method.search == "cells")
            selection = advance(state, store, data, step)
            assert (selection.residual is not None) == (tail in ("mean", "pq"))
            assert (selection.log_weights is not None) == (tail == "sampled")
            outputs.append(output_of(selection, store, data.q[:, :, :, 120 + step], data))
            tokens.append(tokens_of(selection, store).sort(-1).values)
        assert torch.equal(*tokens)
        assert np.allclose(outputs[0], outputs[1], atol=1e-5)


@pytest.mark.parametrize("tail", ["none", "mean", "pq"])
@pytest.mark.parametrize("codes_on", ["device", "host"])
def test_rows_in_the_order_of_the_lists_give_the_same_answers(
    tail: str, codes_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("methods.pqcache.cells._PENDING", 40)  # lists are merged on the way
    budget = Budget(sink=3, window=6, tokens=50, ratio=None)
    data, states = case(300, 100), {}
    for arranged in (False, True):
        method = PQCachePlus(
            budget, m=2, b=2, b_v=3, tail=tail, codes_on=codes_on, spread=False, search="cells", arranged=arranged
        )
        states[arranged] = start(method, data)
    positions = states[True][1].positions
    assert torch.equal(positions.sort(2).values, torch.arange(300).expand(2, 2, -1))
    assert torch.equal(positions[:, :, :3], torch.arange(3).expand(2, 2, -1))
    assert torch.equal(positions[:, :, -6:], torch.arange(294, 300).expand(2, 2, -1))
    for step in range(100):
        selections = {arranged: advance(*states[arranged], data, step) for arranged in states}
        tokens = [tokens_of(selections[arranged], states[arranged][1]).sort(-1).values for arranged in states]
        assert torch.equal(*tokens)
        if step % 20 == 0:
            q = data.q[:, :, :, 300 + step]
            outputs = [output_of(selections[arranged], states[arranged][1], q, data) for arranged in states]
            assert np.allclose(outputs[0], outputs[1], atol=1e-5)


def test_tokens_of_a_cell_lie_side_by_side() -> None:
    budget = Budget(sink=3, window=6, tokens=50, ratio=None)
    data = case(300, 1)
    state, store = start(PQCachePlus(budget, m=2, b=2, tail="none", spread=False, search="cells", arranged=True), data)
    plain, _ = start(PQCachePlus(budget, m=2, b=2, tail="none", spread=False, search="cells"), data)
    assert isinstance(plain, PQCachePlusState)
    assert plain.index.lists is not None
    rows = advance(state, store, data, 0).indices
    assert rows is not None
    for b, h in np.ndindex(2, 2):
        owner = np.repeat(np.arange(16), plain.index.lists.starts[b, h].diff().numpy())  # cell of each middle row
        chosen = rows[b, h, 3:-6].numpy() - 3
        chosen = chosen[chosen < len(owner)]  # the token that has just left the window comes after them
        assert (np.diff(chosen) > 0).all()
        for cell in np.unique(owner[chosen]):
            own = chosen[owner[chosen] == cell]
            assert own.tolist() == list(range(np.searchsorted(owner, cell), np.searchsorted(owner, cell) + len(own)))


@pytest.mark.parametrize("tokens", [1000, 70_000])
@pytest.mark.parametrize(("parts", "bits"), [(2, 6), (1, 8), (2, 8), (4, 4)])
def test_compiled_cells_equal_the_reference(tokens: int, parts: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(tokens + bits)
    q, codebook = torch.randn(1, 3, 4, 64, generator=generator), torch.randn(1, 3, parts, 2**bits, 64 // parts)
    codes = (torch.randn(1, 3, tokens, parts, generator=generator).abs() * 2**bits / 3).clamp(max=2**bits - 1).byte()
    lists = InvertedLists(cell_numbers(codes[:, :, :-100], bits), parts * bits, cpu)  # type: ignore[arg-type]
    lists.append(cell_numbers(codes[:, :, -100:], bits), cpu)  # type: ignore[arg-type]
    for wanted in (1, 300, tokens - 1, tokens, tokens + 5):
        arguments = (q, codebook, lists.starts, lists.tokens, lists.pending, wanted, 0.3)
        found, weight = cpu.best_of_cells(*arguments)
        theirs, their_weight = reference.best_of_cells(*arguments)
        agreement = [len(set(a.tolist()) & set(b.tolist())) for a, b in zip(found[0], theirs[0], strict=True)]
        assert min(agreement) >= theirs.shape[2] - 1  # sums that differ in the last bit may change places
        assert torch.allclose(weight, their_weight, atol=1e-4) or wanted >= tokens - 1


def test_when_cells_are_searched() -> None:
    assert not searches_cells("auto", 12, 4 * 4096 - 1, False)
    assert searches_cells("auto", 12, 4 * 4096, False)
    assert not searches_cells("auto", 12, 1 << 20, True)  # the pq tail reads every token's codes
    assert not searches_cells("auto", 24, 1 << 30, False)
    assert searches_cells("cells", 16, 1, True)
    assert not searches_cells("scan", 2, 1 << 20, False)


def test_what_cells_read_and_hold() -> None:
    budget = Budget(sink=3, window=6, tokens=30, ratio=None)
    for tail, read in (("none", 0), ("mean", 0), ("pq", 2 + 1)):
        data = case(100, 1)
        state, store = start(PQCachePlus(budget, m=2, b=3, b_v=3, tail=tail, spread=False, search="cells"), data)
        advance(state, store, data, 0)
        middle, bounds = 101 - 9, 2 * 2 * (64 + 1 + 1) * 4  # one token waits
        assert state.index_bytes == 4 * middle * read + bounds + 2 * 2 * 21 * 4
        assert state.resident_bytes > state.index_bytes
