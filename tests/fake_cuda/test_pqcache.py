"""PQCache at lengths up to 131072 tokens, with codes on either side, and with kernels=gpu."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: pip install pqbench[gpu]")

from tests.fake_cuda.budgets import CODES_ON_HOST, COSTS
from tests.fake_cuda.drive import TIERS, decode_layer, method_of
from tests.fake_cuda.tally import SYNC


@pytest.mark.parametrize("codes_on", ["device", "host"])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("context", "ratio"), [(4096, 0.1), (131072, None), (131072, 0.1)])
def test_a_decode_stays_within_its_budget(
    context: int, ratio: float | None, tier: str, codes_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = method_of("pqcache", ratio, codes_on=codes_on)
    decode = decode_layer(monkeypatch, method, TIERS[tier], context)
    assert not decode.tally.faults
    assert not decode.host_work
    costs = COSTS["pqcache"] if codes_on == "device" else CODES_ON_HOST
    assert not costs[list(TIERS).index(tier)].exceeded(decode)


@pytest.mark.parametrize("backend", ["auto", "gpu"])
@pytest.mark.parametrize("tier", TIERS)
def test_the_index_is_made_on_the_gpu(tier: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = decode_layer(monkeypatch, method_of("pqcache"), TIERS[tier], backend=backend, steps=2)
    assert not decode.tally.faults
    work = {place: size for place, size in decode.tally.host_work.items() if "pqbench/measure/source.py" not in place}
    assert work == {}
    assert decode.building.of(SYNC) <= 5, decode.building.listed(SYNC)
