"""Tensors without numbers: a rehearsal can ask them for shapes, but not for tokens, nor whether logits or keys are
equal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from pqbench import rehearsal, rotary


@pytest.fixture(autouse=True)
def no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever logits are, they count as those of transformers."""

    def anything(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[list[Tensor], Tensor]:
        logits = torch.zeros(len(ids), model.config.vocab_size, device=ids.device)
        return [logits, logits], ids[:, -1]

    monkeypatch.setattr(rehearsal, "_by_transformers", anything)
    monkeypatch.setattr(rotary, "_found", lambda keys, positions, frequencies, accuracy: frequencies[0])
    monkeypatch.setattr(rehearsal, "_CHUNK", rehearsal._COLUMNS)  # torch cannot make the bias of a block here
    monkeypatch.setattr(rehearsal, "_TOLERANCE", {})
    monkeypatch.setattr(rehearsal, "_HALF_TOLERANCE", float("inf"))
