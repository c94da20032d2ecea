"""The embedded default model on real prose: with a budget for all tokens, each method gives the tokens of
transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from pqbench import decode, prefill
from pqbench.benchmarks.prose import prose
from pqbench.method import Method
from pqbench.models.sources import LoadedModel, PackagedGGUF
from tests.catalogue import exact, names

pytestmark = pytest.mark.embedded
METHODS: dict[str, Method] = {name: exact(name) for name in names()}
NEW = 16


@pytest.fixture(scope="module")
def smollm2() -> LoadedModel:
    """The model of conf/model/smollm2.yaml."""
    options = yaml.safe_load((Path(__file__).parents[2] / "conf/model/smollm2.yaml").read_text(encoding="utf-8"))
    fields = {name: options[name] for name in ("name", "package", "version", "file", "dtype", "device")}
    assert options["_target_"] == "pqbench.models.sources.PackagedGGUF"
    return PackagedGGUF(**fields).load()


@pytest.mark.parametrize("length", [300, 1200])
def test_tokens_equal_transformers(smollm2: LoadedModel, length: int) -> None:
    text = next(speech for speech in prose(seed=length) if len(speech) > 8 * length)
    ids = torch.tensor([smollm2.tokenizer(text).input_ids[:length]])
    assert ids.shape == (1, length)
    output = smollm2.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW)
    expected = output[0, length:].tolist()
    assert len(set(expected)) > 10
    prefilled = prefill(smollm2.model, ids, list(METHODS.values()), reserve=NEW)
    different = {}
    for i, name in enumerate(METHODS):
        tokens = decode(prefilled, i, NEW).tokens[0].tolist()
        if tokens != expected:
            different[name] = tokens
    assert different == {}


def test_the_model_is_the_one_the_configuration_promises(smollm2: LoadedModel) -> None:
    config = smollm2.model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert smollm2.max_length == 8192
    assert smollm2.tokenizer.chat_template
