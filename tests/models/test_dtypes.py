"""Half precision against transformers in the same precision. Both round attention in different orders, so logits may
differ by a few roundings. Tokens may differ only if the two best logits of transformers are closer than that."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.h2o import H2O
from methods.pqcache import PQCache
from methods.snapkv import SnapKV
from pqbench import Budget, Method, decode, generate, prefill
from pqbench.support.miniature import small_model
from tests.support import left_padded, prompt_of

NEW = 8
WHOLE = Budget(sink=4, ratio=1.0)
METHODS: dict[str, Method] = {
    "full": Full(),
    "pqcache": PQCache(WHOLE, m=2, b=3),
    "h2o": H2O(WHOLE),
    "snapkv": SnapKV(WHOLE),
}
DTYPES = [torch.bfloat16, torch.float16]
KINDS = ["llama", "qwen3", "gemma3_text"]


@lru_cache
def small(kind: str, dtype: torch.dtype) -> PreTrainedModel:
    return small_model(kind).to(dtype)


def truth(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Transformers' tokens ``[B, new]`` and the logits ``[B, new, V]`` they come from."""
    found = model.generate(
        ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True
    )
    return found.sequences[:, ids.shape[1] :], torch.stack(found.logits, 1).float()


def bound(logits: Tensor, dtype: torch.dtype) -> float:
    """The largest allowed rounding error of a logit: four roundings of the largest logit."""
    return 4 * torch.finfo(dtype).eps * float(logits.abs().max())


def agree(ours: Tensor, tokens: Tensor, logits: Tensor, within: float) -> None:
    """Check that tokens are equal up to a first different one, to which transformers gave almost the same logit as to
    its own. At least half of the tokens must be equal."""
    equal = 0
    for mine, theirs, rows in zip(ours, tokens, logits, strict=True):
        for step in range(NEW):
            if mine[step] != theirs[step]:
                assert float(rows[step, theirs[step]] - rows[step, mine[step]]) <= 2 * within
                break
            equal += 1
    assert equal >= 0.5 * tokens.numel()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_and_logits_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    model = small(kind, dtype)
    for length in (1, 20, 130):
        ids = prompt_of(length)
        tokens, logits = truth(model, ids, torch.ones_like(ids))
        within = bound(logits, dtype)
        prefilled = prefill(model, ids, list(METHODS.values()))
        assert float((prefilled.logits.float() - logits[:, 0]).abs().max()) <= within
        for i in range(len(METHODS)):
            agree(decode(prefilled, i, NEW).tokens, tokens, logits, within)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padded_batches_and_chunks_in_half_precision(kind: str, dtype: torch.dtype) -> None:
    model = small(kind, dtype)
    ids, mask = left_padded(prompt_of(20, 1), prompt_of(3, 2), prompt_of(41, 3))
    tokens, logits = truth(model, ids, mask)
    for method in METHODS.values():
        agree(generate(model, ids, method, mask, NEW, chunk=16), tokens, logits, bound(logits, dtype))
