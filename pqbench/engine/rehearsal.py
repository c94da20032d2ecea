"""A rehearsal of a model on a few tokens, before any prompt runs. It finds the shapes of the model's attention and
checks that our layers compute the same as transformers.

First, one short sequence goes through transformers' own ``generate`` and through our layers with full attention, in one
block. Then two sequences, one of them padded, do so in chunks. One token is decoded after each. The calls that our
layers get are the model's :class:`Profile`. A model whose logits differ, or that calls attention in a way that our
layers would not answer correctly, is refused in one line that starts with its type. The cost is nine forward passes of
at most twelve tokens, once for every loaded model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from pqbench.engine.attention import attached, forward
from pqbench.engine.batch import positions_of, rows_by_length
from pqbench.engine.cohort import Cohort, Rows
from pqbench.engine.dense import Dense
from pqbench.engine.layers import DecodeLayer, LayeredCache, PrefillLayer, Shape, layer_types, sliding_layers
from pqbench.errors import ModelError, PqbenchError
from pqbench.store.tiers import DeviceTier

_COLUMNS, _SHORT, _CHUNK = 6, 4, 4  # tokens of the sequences, of the shorter one, and of a prefill block
# Largest relative difference of logits. In half precision the two computations round in different orders, and a mixture
# of experts may then choose another expert. The faults that are looked for change all logits by far more.
_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3}
_HALF_TOLERANCE = 0.2
# In half precision, rounding can send a token to another expert of a mixture, which changes everything after it. This
# happens for few prompts, whereas a real fault shows for every prompt.
_HALF_ATTEMPTS = 4
_ATTRIBUTE = "pqbench_known"  # the attribute of a model that holds its profile


@dataclass(frozen=True)
class Profile:
    """The shapes of a model's full-attention layers by layer index, taken from its attention calls."""

    layers: Mapping[int, Shape]

    @property
    def row_numbers(self) -> int:
        """How many numbers the keys and values of one token have, over all these layers together."""
        return sum(2 * shape.kv_heads * shape.head_dim for shape in self.layers.values())

    @property
    def kinds(self) -> list[int]:
        """One layer of each kind. Layers are of one kind when they agree in heads, width and scaling; the first of them
        is listed."""
        first: dict[tuple[float, ...], int] = {}
        for i, shape in self.layers.items():
            first.setdefault((shape.kv_heads, shape.group, shape.head_dim, shape.scaling), i)
        return list(first.values())


@dataclass(frozen=True)
class Known:
    """What a rehearsal found, and for which model. A copy of the model is rehearsed again, and so is a model that has
    moved to another device or changed its dtype."""

    model: int
    device: torch.device
    dtype: torch.dtype
    profile: Profile

    def of(self, model: PreTrainedModel) -> bool:
        """Whether this result applies to the model as it is now."""
        return (self.model, self.device, self.dtype) == (id(model), model.device, model.dtype)


def profile(model: PreTrainedModel) -> Profile:
    """The model's profile. The first call rehearses the model and keeps the profile in an attribute of the model (as
    transformers does with ``hf_device_map``), so that the profile lives as long as the model.

    Raises:
        ModelError: no method can serve this model exactly. The message is one line with the model's type and the
            reason.
    """
    known: Known | None = getattr(model, _ATTRIBUTE, None)
    if known is None or not known.of(model):
        known = Known(id(model), model.device, model.dtype, _named(model))
        setattr(model, _ATTRIBUTE, known)
    return known.profile


def _named(model: PreTrainedModel) -> Profile:
    """Rehearse a model. Errors other than a lack of memory become ModelErrors that name the model's type."""
    kind = model.config.model_type
    try:
        return rehearse(model)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except PqbenchError as error:
        raise ModelError(f"{kind} is not supported: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ModelError(
            f"{kind} is not supported: it cannot run with caches and attention that are not its own "
            f"({type(error).__name__}: {reason})"
        ) from error


def rehearse(model: PreTrainedModel) -> Profile:
    """The profile of a model that computes the same through our layers as through transformers' ``generate``.

    Raises:
        ModelError: the model computes something else through our layers, or it has features that no method serves.
    """
    config = model.config.get_text_config(decoder=True)
    check_config(model.config)
    check_config(config)
    types = layer_types(config)
    if "full_attention" not in types:
        raise ModelError(
            f"all its {len(types)} layers have sliding windows, so that no method has a layer to serve; "
            "with sliding_window null in the model's config.json they attend to everything"
        )
    attempts = 1 if model.dtype in _TOLERANCE else _HALF_ATTEMPTS
    for attempt in range(attempts):
        ids, mask = _batch(model, config, attempt)
        try:
            shapes = _compared(model, config, types, ids[:1], mask[:1], _COLUMNS)
            _compared(model, config, types, ids, mask, _CHUNK)
        except ModelError:
            if attempt == attempts - 1:
                raise
        else:
            return Profile(shapes)
    raise AssertionError("the last attempt returns or raises")


def _compared(
    model: PreTrainedModel, config: PreTrainedConfig, types: list[str], ids: Tensor, mask: Tensor, chunk: int
) -> dict[int, Shape]:
    """The shapes of the calls that our layers got for this batch. Raises ModelError when the logits differ from those
    of transformers."""
    expected, token = _by_transformers(model, ids, mask)
    ours, shapes = _by_layers(model, config, types, ids, mask, token, chunk)
    limit = _TOLERANCE.get(model.dtype, _HALF_TOLERANCE)
    for step, (mine, theirs) in enumerate(zip(ours, expected, strict=True)):
        difference = float((mine - theirs).norm() / theirs.norm())
        if bool(theirs.isfinite().all()) and not difference <= limit:  # NaN is reported when the prompt runs
            where = "a prompt" if step == 0 else "a decoded token"
            raise ModelError(
                f"the logits after {where} differ from those of transformers by {difference:.1%}, so it "
                "uses keys or positions in a way that pqbench does not know"
            )
    return shapes


def check_config(config: PreTrainedConfig) -> None:
    """Raises ModelError for features that the configuration names and no method serves."""
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError("it has an encoder, but pqbench serves only decoders")
    if getattr(config, "num_kv_shared_layers", 0) or "reuse" in (getattr(config, "kv_sharing_modes", None) or ()):
        raise ModelError("its last layers share keys and values with earlier ones (cross-layer shared KV)")
    if getattr(config, "attn_logit_softcapping", None):
        raise ModelError("its attention uses logit soft-capping (attn_logit_softcapping)")


def _batch(model: PreTrainedModel, config: PreTrainedConfig, seed: int) -> tuple[Tensor, Tensor]:
    """Two sequences of ordinary tokens, the second padded on the left: ids and mask ``[2, columns]``."""
    every = {**model.config.to_dict(), **config.to_dict()}
    special = {
        value for name, value in every.items() if name.endswith(("_token_id", "_token_index")) if isinstance(value, int)
    }
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 1000)) if token not in special])
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))
    ids = ordinary[order[torch.arange(2 * _COLUMNS) % len(order)]].view(2, _COLUMNS)
    mask = torch.ones_like(ids)
    mask[1, : _COLUMNS - _SHORT] = 0
    return ids.to(model.device), mask.to(model.device)


def _by_transformers(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
    """What ``generate`` computes: logits ``[2, V]`` after the prompt and after one token, and that token ``[2]``."""
    options = GenerationConfig(
        do_sample=False,
        max_new_tokens=2,
        min_new_tokens=2,
        pad_token_id=0,
        num_beams=1,
        output_logits=True,
        return_dict_in_generate=True,
    )
    answer = model.generate(ids, attention_mask=mask, generation_config=options)
    return [logits.float() for logits in answer.logits], answer.sequences[:, ids.shape[1]]


@torch.inference_mode()
def _by_layers(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    types: list[str],
    ids: Tensor,
    mask: Tensor,
    token: Tensor,
    chunk: int,
) -> tuple[list[Tensor], dict[int, Shape]]:
    """The same logits computed through our layers, and the shapes of the attention calls that these layers got."""
    rows, placement = rows_by_length(mask.bool()), DeviceTier().open(model.device)
    prompt = {i: PrefillLayer(_COLUMNS, 1, rows, placement) for i, kind in enumerate(types) if kind == "full_attention"}
    sliding = sliding_layers(config)
    positions = positions_of(mask)
    with attached(model):
        cache = _cache({**sliding, **prompt})
        padded = None if bool(mask.all()) else mask
        for start in range(0, _COLUMNS, chunk):
            block, seen = slice(start, start + chunk), None if padded is None else padded[:, : start + chunk]
            logits = forward(model, ids[:, block], cache, seen, positions[:, block])
        answers, shapes = [logits.float()], {i: layer.shape for i, layer in prompt.items() if layer.shape is not None}
        cache = _cache({**sliding, **{i: _decoding(layer, i, shapes[i], rows) for i, layer in prompt.items()}})
        longer = None if padded is None else torch.nn.functional.pad(padded, (0, 1), value=1)
        answers.append(forward(model, token[:, None], cache, longer, mask.sum(-1, keepdim=True)).float())
    return answers, shapes


def _cache(layers: Mapping[int, CacheLayerMixin]) -> LayeredCache:
    return LayeredCache([layers[i] for i in range(len(layers))])


def _decoding(layer: PrefillLayer, index: int, shape: Shape, rows: list[Rows]) -> DecodeLayer:
    """A layer that decodes after the prompt with full attention."""

    dense = Dense()

    def cohort(part: Rows) -> Cohort:
        state = dense.layer(shape.geometry(index, part))
        return Cohort(part, layer.prompt(part).store(None), state, dense)

    return DecodeLayer(lambda: [cohort(part) for part in rows], layer.seen)
