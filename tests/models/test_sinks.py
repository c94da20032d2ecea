"""Learned sinks (logits in the softmax of a head without a value) against eager attention of transformers and
float64."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.infllm import InfLLM
from methods.oracle import Oracle
from methods.pqcache import PQCache
from pqbench import Budget, decode, generate, prefill
from pqbench.engine.attention import dense_attention
from pqbench.engine.rehearsal import profile
from pqbench.engine.setting import Setting
from pqbench.kernels import reference, sinks
from pqbench.measure.probe import probe
from pqbench.store.tiers import HostTier
from pqbench.support.miniature import small_model
from tests import catalogue
from tests.support import left_padded, prompt_of, softmax

NEW = 8
KINDS = ["gpt_oss", "granite_swa", "mimo_v2_flash"]
WHOLE = Budget(sink=4, ratio=1.0)
SMALL = Budget(sink=4, ratio=0.3, minimum=12)


@lru_cache
def small(kind: str) -> PreTrainedModel:
    """A small model whose sinks take a large share."""
    model = small_model(kind)
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 8.0, 2.0)
    return model


def truth(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    return tokens[:, ids.shape[1] :]


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_exact_at_full_budget(kind: str) -> None:
    model = small(kind)
    ids, mask = left_padded(prompt_of(20, 1), prompt_of(3, 2), prompt_of(130, 3))
    right, padded = truth(model, prompt_of(130)), truth(model, ids, mask)
    for name in catalogue.names():
        method = catalogue.exact(name)
        assert torch.equal(generate(model, prompt_of(130), method, max_new_tokens=NEW, chunk=16), right), name
        assert torch.equal(generate(model, ids, method, mask, NEW), padded), name


def test_sinks_matter_and_the_host_tier_and_the_reference_kernels_count_them() -> None:
    model, ids = small("gpt_oss"), prompt_of(130)
    right = truth(model, ids)
    without = small_model("gpt_oss")
    for name, parameter in without.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.constant_(parameter, -1e4)
    assert not torch.equal(truth(without, ids), right)
    for setting in (Setting(HostTier()), Setting(backend="reference")):
        for method in (Full(), PQCache(WHOLE, m=2, b=3), H2O(WHOLE)):
            assert torch.equal(generate(model, ids, method, max_new_tokens=NEW, setting=setting), right)


def test_the_infllm_prefill_counts_sinks() -> None:
    model, ids = small("gpt_oss"), prompt_of(60)
    method = InfLLM(Budget(sink=0, window=4096, ratio=1.0), prefill="infllm")
    assert torch.equal(generate(model, ids, method, max_new_tokens=NEW), truth(model, ids))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 5, 33])
@pytest.mark.parametrize("masked", [False, True])
def test_dense_attention_with_sinks(count: int, masked: bool) -> None:
    """Compared with float64 and one more column in the softmax."""
    if count not in (1, 33) and not masked:
        pytest.skip("a block of a longer prompt always has a mask")
    module = torch.nn.Module()
    module.num_key_value_groups = 2  # type: ignore[assignment]
    q, k, v, sink = random(2, 4, count, 20), random(2, 2, 33, 20, seed=1), random(2, 2, 33, 12, seed=2), random(4) * 2
    visible = torch.ones(count, 33, dtype=torch.bool).tril(33 - count)
    ours = dense_attention(module, q, k, v, visible.expand(2, 1, -1, -1) if masked else None, 0.3, sink)
    logits = np.einsum("bhnd,bhsd->bhns", q.double().numpy(), k.double().repeat_interleave(2, 1).numpy()) * 0.3
    logits = np.where(visible.numpy(), logits, -np.inf)
    column = np.broadcast_to(sink.double().numpy()[:, None, None], (2, 4, count, 1))
    weights = softmax(np.concatenate([logits, column], -1))[..., :-1]
    expected = np.einsum("bhns,bhsd->bnhd", weights, v.double().repeat_interleave(2, 1).numpy())
    assert np.allclose(ours.numpy(), expected, atol=1e-5)


def with_column(logits: np.ndarray, sink: Tensor) -> np.ndarray:
    """Softmax of ``[B, H, G, n, S]`` together with a sink ``[H, G]``, in float64, without the column of the sink."""
    column = np.broadcast_to(sink.double().numpy()[:, :, None, None], (*logits.shape[:-1], 1))
    return softmax(np.concatenate([logits, column], -1))[..., :-1]


@pytest.mark.parametrize("band", [None, 7])
def test_column_sums_and_probabilities_with_sinks(band: int | None) -> None:
    q, keys, sink = random(2, 2, 3, 30, 16), random(2, 2, 50, 16, seed=1), random(2, 3, seed=2) * 2
    logits = np.einsum("bhgnd,bhsd->bhgns", q.double().numpy(), keys.double().numpy()) * 0.3
    position, key = np.arange(20, 50)[:, None], np.arange(50)
    hidden = key > position if band is None else (key > position) | (key <= position - band)
    expected = with_column(np.where(hidden, -np.inf, logits), sink).sum((2, 3))
    assert np.allclose(sinks.column_sums(q, keys, 0.3, sink, band, rows=8).numpy(), expected, atol=1e-5)
    last = with_column(logits[:, :, :, -1:], sink)[:, :, :, 0].sum(2)
    assert np.allclose(sinks.exact_probabilities(q[:, :, :, -1], keys, 0.3, sink).numpy(), last, atol=1e-5)


def test_sinks_take_their_share_of_output_and_weights() -> None:
    q, keys, values, sink = (
        random(2, 2, 3, 16),
        random(2, 2, 50, 16),
        random(2, 2, 50, 16, seed=1),
        random(2, 3, seed=2),
    )
    output, lse, weights = reference.attention(q, keys, values, 0.3, need_weights=True)
    ours, shrunk = sinks.with_sinks(output, lse, weights, sink)
    logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), keys.double().numpy()) * 0.3
    expected = with_column(logits[:, :, :, None], sink)[:, :, :, 0]
    assert shrunk is not None
    assert np.allclose(shrunk.numpy(), expected, atol=1e-6)
    assert np.allclose(ours.numpy(), np.einsum("bhgs,bhsd->bhgd", expected, values.double().numpy()), atol=1e-6)
    none = reference.merge(output, lse, torch.zeros_like(output), sink.expand_as(lse))
    assert torch.allclose(ours, none)  # a set of tokens whose mean value is zero


def test_the_probe_counts_the_mass_of_sinks() -> None:
    """Mass is the share of the attended tokens and the sink in the eager weights of transformers; with a full budget it
    is one and there is no error."""
    model, ids = small("gpt_oss"), prompt_of(80)
    chosen = [Full(), Oracle(WHOLE), Oracle(SMALL)]
    full, whole, little = (found.means() for found in probe(prefill(model, ids, chosen), [7]))
    for found in (full, whole):
        assert found["mass"] == pytest.approx(1.0, abs=1e-5)
        assert found["output_error"] == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():  # gpt_oss is eager by default
        weights = model(torch.cat([ids, torch.tensor([[7]])], 1), output_attentions=True).attentions
    split = SMALL.resolve(81, 80)
    first, stop = split.middle(81)
    masses = []
    for layer in profile(model).layers:
        row = weights[layer][0, :, -1].double().view(2, 2, -1)  # [H, G, S], the sink left out
        assert row.sum(-1).min() < 0.95
        top = first + row.sum(1)[:, first:stop].topk(split.top_k).indices
        kept = torch.zeros(2, 81, dtype=torch.bool).scatter(1, top, True)
        kept[:, :first] = kept[:, stop:] = True
        masses.append(1 - (row * ~kept[:, None]).sum(-1).mean())
    assert little["mass"] == pytest.approx(float(torch.stack(masses).mean()), abs=1e-4)
    error = little["output_error"]
    assert error is not None
    assert error > 1e-3


def test_small_budgets_change_tokens_and_stay_within_budget() -> None:
    model, ids = small("gpt_oss"), prompt_of(130)
    right = truth(model, ids)
    changed = [
        name
        for name, method in ((name, catalogue.small(name, SMALL)) for name in catalogue.names())
        if not torch.equal(decode(prefill(model, ids, [method]), 0, NEW).tokens, right)
    ]
    assert "full" not in changed
    assert len(changed) >= 5
