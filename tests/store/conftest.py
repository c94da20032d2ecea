"""Small chunks of host memory for every test in this folder."""

from __future__ import annotations

import pytest

from pqbench.store.host import rows as host_rows


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_rows, "_CHUNK", 50)  # several chunks, and blocks and batches that lie across two
