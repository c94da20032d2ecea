"""PQCache with selection ahead: which heads are corrected, what they attend to, and how the generated tokens change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.pqcache import PQCache
from methods.pqcache.previous import PreviousQuery
from pqbench.engine.decode import decode, generate
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.method import Budget
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.support import append, case, prompt_of, start

NEW = 80
GROWING = Budget(sink=4, ratio=0.3, minimum=12)
TIERS: dict[str, Tier] = {"device": DeviceTier(), "host": HostTier(link="local", margin=16, debug=True)}


def cosines(one: Tensor, other: Tensor) -> np.ndarray:
    """Cosines of query heads in float64, averaged over the query group: ``[B, H]``."""
    a, b = one.double().numpy(), other.double().numpy()
    return ((a * b).sum(-1) / np.sqrt((a**2).sum(-1) * (b**2).sum(-1))).mean(-1)


def test_heads_that_have_turned() -> None:
    torch.manual_seed(0)
    before = torch.randn(3, 4, 2, 16)
    now = before + torch.randn(3, 4, 2, 16) * torch.linspace(0.0, 2.0, 12).view(3, 4, 1, 1)
    known = cosines(before, now)
    for threshold in (-1.0, 0.5, 0.9):
        previous = PreviousQuery(threshold)
        previous.follow(before)
        assert np.array_equal(previous.turned(now).numpy(), known <= threshold)
        previous.steps = 1
        assert previous.share(12) == pytest.approx((known <= threshold).mean())
    always = PreviousQuery(1.0)
    always.follow(before)
    assert bool(always.turned(before).all())
    assert bool(always.turned(torch.full_like(before, float("nan"))).all())


@pytest.mark.parametrize("threshold", [-1.0, 0.2])
def test_each_head_attends_to_what_its_query_or_the_one_before_selects(threshold: float) -> None:
    data = case(90, 20)
    method = PQCache(GROWING, m=2, b=3)
    geometry = replace(data.geometry, correction=threshold)
    own, store = start(method, data)
    ahead = method.layer(geometry)
    ahead.finish_prefill(store)
    before: Tensor | None = None
    seen = set()
    for step in range(20):
        ahead.prefetch(store)
        q = append(own, store, data, step)
        ahead.append(store)
        expected = own.select(q, store).indices
        assert expected is not None
        if before is not None:
            earlier = own.select(before, store).indices
            turned = torch.from_numpy(cosines(before, q) <= threshold)[:, :, None]
            assert earlier is not None
            expected = torch.where(turned, expected, earlier)
            seen |= set(turned.flatten().tolist())
        chosen = ahead.select(q, store).indices
        assert chosen is not None
        assert torch.equal(chosen, expected)
        before = q
    assert seen == ({False} if threshold == -1.0 else {False, True})


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
@pytest.mark.parametrize("kernels", ["reference", "cpu"])
def test_correcting_always_changes_nothing(llama: PreTrainedModel, tier: Tier, kernels: str) -> None:
    ids, method = prompt_of(200, seed=7), PQCache(GROWING, m=2, b=4)
    settings = (Setting(tier, backend=kernels, select_ahead=on, correction=1.0) for on in (True, False))
    first, second = (generate(llama, ids, method, max_new_tokens=NEW, setting=setting) for setting in settings)
    assert torch.equal(first, second)


@pytest.mark.parametrize("correction", [-1.0, 0.5])
def test_a_budget_for_everything_is_exact(llama: PreTrainedModel, correction: float) -> None:
    ids, setting = prompt_of(150, seed=2), Setting(select_ahead=True, correction=correction)
    method = PQCache(Budget(sink=8, ratio=1.0), m=2, b=4)
    expected = generate(llama, ids, Full(), max_new_tokens=NEW)
    assert torch.equal(generate(llama, ids, method, max_new_tokens=NEW, setting=setting), expected)


@pytest.mark.parametrize("tier", TIERS.values(), ids=TIERS)
def test_no_correction_changes_tokens_and_says_so(llama: PreTrainedModel, tier: Tier) -> None:
    ids, method = prompt_of(200, seed=7), PQCache(GROWING, m=2, b=4)
    shares = {}
    for correction in (-1.0, 0.5, 1.0):
        setting = Setting(tier, select_ahead=True, correction=correction)
        prefilled = prefill(llama, ids, [method], reserve=NEW, setting=setting)
        generation = decode(prefilled, 0, NEW)
        generation.settle()
        prefilled.close()
        shares[correction] = generation.corrected_heads
        if correction == -1.0:
            assert not torch.equal(generation.tokens, generate(llama, ids, method, max_new_tokens=NEW))
    assert shares[-1.0] == 0.0
    assert shares[0.5] is not None
    assert 0.0 < shares[0.5] < 1.0
    assert shares[1.0] == 1.0
