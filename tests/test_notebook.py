"""docs/pqcache.ipynb runs on the embedded model, and its output agrees with its text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.notebook import Output, execute

BOOK = Path(__file__).resolve().parent.parent / "docs/pqcache.ipynb"


@pytest.fixture(scope="module")
def ran() -> tuple[dict[str, Any], list[list[Output]]]:
    """The executed notebook."""
    return execute(BOOK)


@pytest.mark.embedded
def test_scores_from_codes_are_scores_of_the_nearest_centroids(ran: tuple[dict[str, Any], list[list[Output]]]) -> None:
    names, _ = ran
    keys, q = names["keys"][0, names["HEAD"]].double().numpy(), names["q"][0, names["HEAD"], 0].double().numpy()
    book, codes = names["codebook"][0, names["HEAD"]].double().numpy(), names["codes"][0, names["HEAD"]].numpy()
    rebuilt = np.concatenate([book[i][codes[:, i]] for i in range(2)], 1)
    for i in range(2):
        distance = ((keys[:, None, 32 * i : 32 * i + 32] - book[i][None]) ** 2).sum(-1)
        assert np.take_along_axis(distance, codes[:, i : i + 1].astype(int), 1)[:, 0] == pytest.approx(distance.min(1))
    assert names["approximate"](2, 6).numpy() == pytest.approx(rebuilt @ q, rel=1e-4, abs=1e-3)


@pytest.mark.embedded
def test_recall_grows_with_bits_and_the_needle_is_found(ran: tuple[dict[str, Any], list[list[Output]]]) -> None:
    names, outputs = ran
    recall = names["table"].set_index(["m", "b"])["recall"]
    assert 0.1 < recall.min() < recall.max() < 1
    assert recall[4, 8] > recall[2, 6] > recall[1, 4]
    number = names["sample"].references[0]
    for name in ("full", "pqcache 4x8"):
        assert number in names["prompter"].decode(names["answers"][name].tokens[0].tolist()), name
    pictures = [output for cell in outputs for output in cell if "image/png" in output["data"]]
    assert len(pictures) == 3


def test_the_notebook_holds_its_outputs_and_stays_small() -> None:
    cells = [cell for cell in json.loads(BOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum("image/png" in output["data"] for cell in cells for output in cell["outputs"]) == 3
    assert BOOK.stat().st_size < 400_000
