"""Decoding with every method on every tier, on the fake device."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

from tests.fake_cuda.budgets import COSTS
from tests.fake_cuda.drive import METHODS, TIERS, decode_layer, method_of


def test_every_method_has_a_budget() -> None:
    assert set(COSTS) == set(METHODS)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", METHODS)
def test_a_decode_stays_within_its_budget(name: str, tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = decode_layer(monkeypatch, method_of(name), TIERS[tier])
    assert not decode.tally.faults
    assert not decode.host_work
    assert not COSTS[name][list(TIERS).index(tier)].exceeded(decode)
