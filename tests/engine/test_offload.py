"""After decoding with a whole model, the host holds each token's key and value, and each key's code."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from methods.h2o import H2O
from methods.magicpig import MagicPIG
from methods.pqcache import PQCache
from methods.sparq import SparQ
from methods.vattention import VAttention
from pqbench.engine.decode import Generation, decode
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.kernels import reference
from pqbench.method import Budget
from pqbench.store.host.rows import HostPrompt
from pqbench.store.host.store import HostStore
from pqbench.store.link.local import LocalLink
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.support import case, prompt_of

PROMPT, NEW = 150, 90  # the ring of window + 4 wraps several times
GROWING, FIXED = Budget(sink=4, ratio=0.3, minimum=12), Budget(sink=4, window=9, tokens=40, ratio=None)
METHOD = partial(PQCache, m=2, b=4)


def decoded(model: PreTrainedModel, method: PQCache, tier: Tier, seed: int = 3) -> Generation:
    """Decode one prompt and wait for all transfers."""
    generation = decode(prefill(model, prompt_of(PROMPT, seed), [method], setting=Setting(tier)), 0, NEW)
    generation.settle()
    return generation


@pytest.mark.parametrize("budget", [GROWING, FIXED])
def test_every_host_row_is_its_own_token_in_every_layer(llama: PreTrainedModel, budget: Budget) -> None:
    """The released code stores a new token in place of the evicted one, and one row too late in all layers but the
    first."""
    kept = decoded(llama, METHOD(budget), DeviceTier())
    moved = decoded(llama, METHOD(budget), HostTier(link="local", margin=4, debug=True))
    assert len(kept.cohorts()) > 1
    for device, host in zip(kept.cohorts(), moved.cohorts(), strict=True):
        assert host.store.length == PROMPT + NEW - 1
        assert torch.equal(host.store.stored_keys(), device.store.keys())
        assert torch.equal(host.store.values(), device.store.values())


@pytest.mark.parametrize("budget", [GROWING, FIXED])
def test_every_middle_token_has_the_code_of_its_own_key(llama: PreTrainedModel, budget: Budget) -> None:
    for group in decoded(llama, METHOD(budget), HostTier(link="local", margin=4)).cohorts():
        state = group.state
        first, stop = budget.resolve(group.store.length, PROMPT).middle(group.store.length)
        keys = group.store.stored_keys(first, stop)
        expected = reference.encode(keys, state.index.codebook)  # type: ignore[attr-defined]
        assert torch.equal(state.index.codes.view()[:, :, : stop - first], expected)  # type: ignore[attr-defined]
        assert stop - first > len(prompt_of(PROMPT)[0]) - 4 - 60  # tokens joined while decoding


def test_codebooks_come_from_middle_tokens_of_this_prompt_alone(llama: PreTrainedModel) -> None:
    """The released code clusters rows that were never written, or that hold the previous prompt. In debug mode new host
    memory is NaN, so that one such row would make a centroid NaN."""
    tier = HostTier(link="local", debug=True)
    decoded(llama, METHOD(GROWING), tier, seed=5)
    group = decoded(llama, METHOD(GROWING), tier).cohorts()[0]
    first, stop = GROWING.resolve(PROMPT, PROMPT).middle(PROMPT)
    keys = group.store.stored_keys(first, stop)
    codebook, _ = reference.train_codebook(keys, 2, 16, 5, 0, 128 * 16, 0.02)
    torch.testing.assert_close(group.state.index.codebook, codebook)  # type: ignore[attr-defined]


def test_codes_from_the_host_cost_a_byte_each_and_only_the_valid_ones(llama: PreTrainedModel) -> None:
    """The released code transfers its whole reserved buffer of 8-byte codes in every step."""
    near = decoded(llama, METHOD(FIXED), HostTier(link="local"))
    far = decoded(llama, PQCache(FIXED, m=2, b=4, codes_on="host"), HostTier(link="local"))
    assert torch.equal(near.tokens, far.tokens)
    for here, there in zip(near.cohorts(), far.cohorts(), strict=True):
        codes = there.store.usage.bytes_to_device - here.store.usage.bytes_to_device
        most = (PROMPT + NEW - 4 - 9) * 2 * 2  # middle tokens x KV heads x sub-spaces
        assert (NEW - 2) * (PROMPT - 4 - 9) * 2 * 2 <= codes <= (NEW + 1) * most


def test_an_evicting_method_leaves_nothing_but_its_budget_on_the_device(llama: PreTrainedModel) -> None:
    generation = decode(prefill(llama, prompt_of(PROMPT), [H2O(FIXED)], setting=Setting(HostTier(link="local"))), 0, 20)
    for group in generation.cohorts():
        assert group.store.length == 39  # the next token completes the budget
        assert group.store.usage.host_bytes == 0
        assert group.store.usage.device_bytes == 2 * 39 * 2 * 16 * 4  # K and V, rows, KV heads, D, float32


def test_an_index_is_no_traffic_of_decoding(llama: PreTrainedModel) -> None:
    """SparQ reads every key once to build its index, and afterwards only rows that it selects."""
    prefilled = prefill(llama, prompt_of(PROMPT), [SparQ(FIXED, rank=4)], setting=Setting(HostTier(link="local")))
    keys = PROMPT * 2 * 16 * 4  # of two heads
    stores = [prefilled.built(0, layer, 0).stores[0] for layer in prefilled.layers]
    assert all(store.usage.bytes_to_device == 0 for store in stores)
    assert all(store.usage.opening_bytes >= keys for store in stores)


def test_keys_that_are_read_to_weigh_a_sample_cross_the_link(llama: PreTrainedModel) -> None:
    data = case(120, 1)
    rows = torch.stack([data.keys, data.values], dim=3)[:, :, :120]
    for method in (MagicPIG(FIXED, bits=1, tables=12), VAttention(SparQ(rank=4), FIXED, epsilon=0.1, base_sample=9)):
        with LocalLink() as link:
            prompt = HostPrompt.offload(link, rows[..., 0, :], rows[..., 1, :])
            store, state = HostStore(prompt, lambda n: FIXED.resolve(n, 120)), method.layer(data.geometry)
            state.finish_prefill(store)
            store.usage.open()
            store.append(data.keys[:, :, 120:], data.values[:, :, 120:])
            state.append(store)
            selection = state.select(data.q[:, :, :, 120], store)
            assert selection.indices is not None
            weighed = selection.indices if isinstance(method, MagicPIG) else selection.indices[..., : 40 - 13 + 9]
            # Neither sinks nor in the ring, which still holds the token that left the window with this append.
            away = int(((weighed >= 4) & (weighed < 121 - 9 - 1)).sum())
            assert away > 0
            assert store.usage.bytes_to_device == away * 2 * 16 * 4
            store.settle()
