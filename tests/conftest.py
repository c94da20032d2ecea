"""Settings and fixtures for the whole suite: one thread, no network, and tiny models that are made once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # set before transformers is imported, so that no test reaches the network

import pytest
import torch
from hypothesis import settings
from transformers import PreTrainedModel

from tests.support import TINY, tiny_model

torch.set_num_threads(1)
settings.register_profile("pqbench", deadline=None, max_examples=40, derandomize=True)
settings.load_profile("pqbench")


@pytest.fixture(scope="session", params=sorted(TINY))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    """A tiny random model of each architecture in turn."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """The tiny random Llama."""
    return tiny_model("llama")
