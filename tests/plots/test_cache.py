"""The cache figure draws hit rate and change of TPOT by size and policy, and published numbers as hollow marks."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from plots import cache
from plots.data import published
from tests.plots.support import Results, texts


@pytest.fixture
def results() -> Results:
    found = Results("latency")
    for policy in ("lfu", "lru"):
        for size, hits, tpot in ((0, None, 0.1), (256, 0.4, 0.09), (1024, 0.6 if policy == "lfu" else 0.5, 0.08)):
            row = {
                "cache_hit_rate": hits,
                "tpot_s": tpot,
                "context": 2048,
                "link": "emulated 4 GB/s",
                "emulated": True,
                "new_tokens": 32,
                "device": "Test CPU",
                "threads": 2,
            }
            store = {"cache_tokens": size, "cache_policy": policy}
            found.run("pqcache", "pqcache", [row], store=store)
    return found


def test_lines_by_policy_and_published_points(results: Results, tmp_path: Path) -> None:
    figure = cache.panels(cache.cached(results.table), published("cache"))
    hits, times = figure.axes
    lfu, lru, paper = hits.lines
    assert (list(lfu.get_xdata()), list(lfu.get_ydata())) == ([256, 1024], pytest.approx([40, 60]))
    assert list(lru.get_ydata()) == pytest.approx([40, 50])
    assert (list(paper.get_xdata()), list(paper.get_ydata())) == ([4096], [60])
    assert paper.get_markerfacecolor() == "none"
    assert list(times.lines[0].get_ydata()) == pytest.approx([-10, -20])
    assert list(times.lines[2].get_ydata()) == [-26.3, -32.8]
    assert times.get_title() == "time per output token, no cache = 100.0 ms"
    assert [label.get_text() for label in hits.get_xticklabels()] == ["256", "1K", "4K"]
    written = texts(figure)
    assert "[emulated]" in written
    assert "KV over 4 GB/s" in written
    assert "third-party note, unverified" in written
    assert "n = 1 per point, 32 tokens generated; Test CPU, 2 threads" in written
    assert [path.name for path in cache.draw(results.table, tmp_path)] == [
        "cache_pqcache_toy_2048.png",
        "cache_pqcache_toy_2048.pdf",
    ]


def test_without_published_numbers(results: Results) -> None:
    figure = cache.panels(cache.cached(results.table), published("absent"))
    assert len(figure.axes[0].lines) == 2
    assert "published" not in texts(figure)


def test_one_size_is_no_figure(results: Results, tmp_path: Path) -> None:
    table = results.table
    none = pd.DataFrame(table[[settings["store"]["cache_tokens"] == 0 for settings in table["settings"]]])
    assert cache.draw(none, tmp_path) == []
    assert cache.draw(table.assign(kind="scores"), tmp_path) == []
    assert cache.draw(table.drop(columns=["tpot_s"]), tmp_path) == []
