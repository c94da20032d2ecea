"""The report: its numbers against pandas, its limits, and hostile and damaged records. The page is parsed with lxml."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from base64 import b64encode
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from lxml import html

from plots.report import leaderboard, samples
from plots.report.__main__ import main
from plots.report.load import load
from plots.report.page import render
from plots.report.pareto import frontier
from plots.report.text import clip, facts, inert
from pqbench.records.file import VERSION, encode
from pqbench.tables import command as tables
from tests.plots.sample_results import BYTES_READ, EVIL, SCORES, record, write


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def page(results: Path) -> html.HtmlElement:
    assert main([str(results)]) == 0
    return html.fromstring((results / "report" / "index.html").read_bytes())


def build(root: Path) -> html.HtmlElement:
    return html.fromstring(render(load(root)).encode())


def lines(root: Path, name: str, records: list[dict[str, Any]]) -> None:
    folder = root / "needle" / "tiny" / name
    folder.mkdir(parents=True)
    (folder / "records.jsonl").write_bytes(b"".join(map(encode, records)))


def grid(table: html.HtmlElement) -> pd.DataFrame:
    """A table as strings, by headings without units."""
    heads = [cell.xpath("string(button/text() | text())").strip() for cell in table.xpath("thead/tr/th")]
    rows = [[cell.text_content().strip() for cell in row.xpath("th|td")] for row in table.xpath("tbody/tr")]
    return pd.DataFrame(rows, columns=heads)


def embedded(page: html.HtmlElement) -> dict[str, Any]:
    return json.loads(page.xpath("//script[@id='data']")[0].text)


def test_the_leaderboard_holds_the_means_of_the_records(page: html.HtmlElement) -> None:
    board = grid(page.xpath("//table[@id='runs']")[0])
    assert len(board) == 7
    for (method, benchmark), part in board.groupby(["method", "benchmark"]):
        name = str(method).split(" ")[0]
        if name not in SCORES:
            continue
        row, scores = part.iloc[0], pd.Series(SCORES[name])
        assert row["n"] == "4"
        assert row["score"] == f"{scores.mean():.1f}"
        tasks = scores.groupby([0, 0, 1, 1]).mean() if benchmark == "ruler" else pd.Series(dtype=float)
        assert row["average"] == (f"{tasks.mean():.1f}" if benchmark == "ruler" else "-")
        assert row["mass"] == "0.500"
        assert row["read"] == f"{BYTES_READ[name] / 1e6:.2f}"
        assert row["TPOT"] == {"full": "100.0", "pqcache": "20.0", "h2o": "30.0"}[name]
    assert "recall" not in board  # no record has it


def test_cells_carry_exact_values_to_sort_by(page: html.HtmlElement) -> None:
    for row in page.xpath("//table[@id='runs']/tbody/tr"):
        method = row.xpath("string(th/text())")
        if method in SCORES:
            values = [float(value) for value in row.xpath("td/@data-value")]
            assert BYTES_READ[method] in values
            assert pd.Series(SCORES[method]).mean() in values


def test_scores_by_task(page: html.HtmlElement) -> None:
    (table,) = page.xpath("//section[@id='tasks']/div[@data-benchmark='ruler']//table")
    shown = grid(table).set_index("method").to_dict("index")
    for method, scores in SCORES.items():
        assert shown[method]["vt"].startswith(f"{(scores[0] + scores[1]) / 2:.1f}")
        assert shown[method]["cwe"].startswith(f"{(scores[2] + scores[3]) / 2:.1f}")
        assert shown[method]["vt"].endswith("n 2")


def test_emulated_links_say_so_wherever_time_is_shown(page: html.HtmlElement) -> None:
    stamped = page.xpath("//table[@id='runs']//tr[.//small[@class='stamp']]")
    assert [(row.get("data-benchmark"), row.xpath("string(th/text())").strip()) for row in stamped] == [
        ("ruler", "pqcache")
    ]
    notes = {
        (figure.get("data-benchmark"), figure.xpath("string(.//*[@class='title'])")): figure.xpath("string(p)")
        for figure in page.xpath("//figure[@data-panel]")
    }
    assert [key for key, note in notes.items() if "emulated link (pcie4)" in note] == [
        ("ruler", "time per output token, ms")
    ]


def test_the_plot_puts_better_scores_higher_and_dearer_runs_to_the_right(page: html.HtmlElement) -> None:
    figures = page.xpath("//figure[@data-benchmark='ruler']")
    (figure,) = [figure for figure in figures if "read per" in figure.text_content()]
    found = {}
    for point in figure.xpath(".//*[@class='point']"):
        x, y = re.findall(r"[\d.]+", point.xpath("string(*[@class='shape']/@transform)"))
        found[point.xpath("string(title)").split(",")[0]] = (float(x), float(y))
    assert sorted(found, key=lambda method: found[method][0]) == sorted(BYTES_READ, key=lambda name: BYTES_READ[name])
    assert sorted(found, key=lambda method: -found[method][1]) == ["h2o", "pqcache", "full"]
    ticks = {text.text: text for text in figure.xpath(".//*[@class='ticks']/*[@text-anchor='end']")}
    zero, hundred = (float(ticks[label].get("y")) - 4 for label in ("0", "100"))
    for method, (_, y) in found.items():
        assert (zero - y) / (zero - hundred) * 100 == pytest.approx(pd.Series(SCORES[method]).mean(), abs=0.2)


def test_the_frontier_is_what_no_run_beats() -> None:
    points = [(1, 10), (2, 10), (2, 30), (3, 20), (4, 40), (4, 41), (9, 41)]
    costs, scores = [c for c, _ in points], [s for _, s in points]
    beaten = {i for i, (c, s) in enumerate(points) if any((a <= c and b >= s) and (a, b) != (c, s) for a, b in points)}
    assert frontier(costs, scores) == [i for i in range(len(points)) if i not in beaten]


def test_methods_are_described_from_their_source_without_running_it(page: html.HtmlElement) -> None:
    sections = {part.get("data-method"): part for part in page.xpath("//details[@class='method']")}
    described = sections["pqcache"]
    assert "https://arxiv.org/abs/2407.12820" in described.xpath(".//a/@href")
    for words in ("Differs from the paper", "sub-spaces; must divide the head dimension"):
        assert words in described.text_content()
    rows = described.xpath(".//table[contains(@class,'settings')]//tr")
    settings = {row.xpath("string(th)"): row.xpath("string(td)") for row in rows}
    assert settings == {"budget.ratio": "0.1"}
    assert "https://arxiv.org/abs/2306.14048" in sections["h2o"].xpath(".//a/@href")  # of a module that is gone


def test_needle_heatmaps_hold_mean_scores_by_depth_and_length(page: html.HtmlElement) -> None:
    (table,) = page.xpath("//details[@data-method='pqcache']//figure[@class='heat']/table")
    assert table.xpath("thead//th/text()") == ["depth %", "1K"]
    shown = {row.xpath("string(th)"): row.xpath("string(td)") for row in table.xpath("tbody/tr")}
    depths = [50 * (len("number-" + "i" * i) % 3) for i in range(4)]
    expected = pd.Series(SCORES["pqcache"]).groupby(depths).mean()
    assert shown == {f"{depth}": f"{score:.0f}" for depth, score in expected.items()}


def test_samples_show_every_prediction_beside_its_reference(page: html.HtmlElement) -> None:
    data = embedded(page)
    entry = next(one for one in data["samples"] if (one["benchmark"], one["id"]) == ("needle", "number-i"))
    answers = {data["runs"][answer["run"]]["method"]: answer for answer in entry["answers"]}
    assert {method: (one["score"], one["text"]) for method, one in answers.items()} == {
        method: (scores[1], f"{method} says {scores[1]}") for method, scores in SCORES.items()
    }
    assert entry["references"] == [{"text": "42"}]
    assert len(entry["prompt"]) == 600
    assert entry["prompt"].endswith("begin and the end of number-i")
    assert sum(len(one["answers"]) for one in data["samples"]) == 25


def test_hostile_text_is_inert_in_the_page(results: Path, page: html.HtmlElement) -> None:
    source = (results / "report" / "index.html").read_text()
    assert not set(source) & {"\x1b", "\x00", "\u202e", "\ud800"}
    assert source.count("<script") == source.count("</script>") == 2
    (data, script) = page.xpath("//script")
    assert data.get("type") == "application/json"
    digest = b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    (policy,) = page.xpath("//meta[@http-equiv='Content-Security-Policy']/@content")
    assert f"script-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    entry = next(one for one in embedded(page)["samples"] if one["task"].startswith("<script>"))
    (answer,) = entry["answers"]
    assert answer["text"] == inert(EVIL) + "\nsecond line"
    assert entry["prompt"] == inert(EVIL)
    assert r"\x1b[31mred" in answer["text"]
    assert r"\u202e" in answer["text"]
    assert not [name for node in page.iter("*") for name in node.attrib if name.startswith("on")]


def test_the_page_asks_for_nothing_outside_itself(page: html.HtmlElement) -> None:
    assert page.xpath("//@src | //link | //img | //iframe | //object") == []
    assert all(href.startswith(("#", "https://arxiv.org/abs/")) for href in page.xpath("//a/@href"))


def test_hostile_names_stay_inside_the_results_folder(results: Path) -> None:
    written = {path.relative_to(results).parts[0] for path in results.rglob("*")}
    assert written - {"report"} == {"needle", "ruler", "_up"}
    for path in results.rglob("*"):
        assert path.resolve().is_relative_to(results.resolve())
        assert not set(path.name) & set("<>|\x1b\x00\u202e\\")


def test_hostile_text_is_inert_in_the_tables(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.main([str(results)]) == 0
    text = capsys.readouterr().out
    assert not set(text) & {"\x1b", "\x00", "\u202e", "\ud800"}
    assert "<script" not in text
    rows = [line for line in text.splitlines() if "document.title" in line and line.startswith("|")]
    assert rows
    for row in rows:
        bars = len(re.findall(r"(?<!\\)\|", row))
        assert bars in {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ---")}


def test_inert_keeps_what_languages_need() -> None:
    assert inert("a\tb\nक्\u200dष 👩\u200d🚀 é\r\nz") == "a\tb\nक्\u200dष 👩\u200d🚀 é\nz"
    assert inert("\x9b\u2066\ufeff\r") == r"\x9b\u2066\ufeff\x0d"
    assert clip("abcdef", 4) == clip("abcd", 4).__class__("abcd", 2)


def test_settings_with_cycles_of_references_stay_small() -> None:
    bomb: list[Any] = ["x"]
    for _ in range(60):
        bomb = [bomb, bomb]
    assert all(len(value) <= 80 for value in facts({"a": bomb, "b": {str(i): i for i in range(1000)}}).values())
    assert len(facts({str(i): i for i in range(1000)})) == 200


def test_no_records_is_one_line_that_names_the_command(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([str(tmp_path)]) == 1
    assert [line for line in caplog.messages if "make bench METHOD=pqcache" in line] == caplog.messages
    assert main([str(tmp_path / "absent")]) == 1
    assert "no results folder" in caplog.messages[-1]
    assert not (tmp_path / "report").exists()


def test_a_report_that_cannot_be_written_is_one_line(
    results: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copied = tmp_path / "copy"
    shutil.copytree(results / "needle", copied / "needle")
    (copied / "report").write_text("a file where the folder belongs")
    assert main([str(copied)]) == 1
    assert "cannot write" in caplog.messages[-1]


def test_other_versions_broken_lines_and_older_records_are_counted(tmp_path: Path) -> None:
    kept = [record("full", "needle", "number", str(i), 100.0, version=VERSION) for i in range(3)]
    foreign = [one | {"version": version} for one, version in zip(kept, (0, 0, "<b>"), strict=True)]
    lines(tmp_path, "full-1", [*kept, kept[0] | {"score": 0.0}, *foreign])
    with (tmp_path / "needle/tiny/full-1/records.jsonl").open("ab") as file:
        file.write(b'{"cut\n\n[1]\n')
    page = build(tmp_path)
    assert page.xpath("//ul[@id='left-out']/li/text()") == [
        f"2 of format version 0 (this pqbench reads 1, {VERSION})",
        f"1 of format version <b> (this pqbench reads 1, {VERSION})",
        "2 broken lines",
        "1 replaced by a newer record of the same sample",
    ]
    assert grid(page.xpath("//table[@id='runs']")[0]).loc[0, "score"] == f"{200 / 3:.1f}"


@pytest.mark.parametrize("value", ["text", [1], {"a": [1]}, True, -1, 10**30, None], ids=range(7))
def test_fields_of_the_wrong_type_or_absent_break_nothing(tmp_path: Path, value: Any) -> None:
    bare = {"version": VERSION, "sample_id": "a", "status": "ok"}
    every = dict.fromkeys(record("full", "needle", "t", "b", 1.0), value) | bare
    timed = [every | {"kind": name, "benchmark": name, "sample_id": name} for name in ("latency", "attention")]
    timed.append(
        every | {"kind": "fidelity", "benchmark": "fidelity", "sample_id": "fidelity", "ratio": value, "kl": value}
    )
    placed = [one | {"method": "m", "context": 8, "length": 8, "sample_id": one["sample_id"] + "2"} for one in timed]
    failed = [bare | {"sample_id": "c", "status": "oom"}, every | {"sample_id": "e", "status": "error"}]
    needle = every | {"sample_id": "n", "benchmark": "needle", "model": "m", "method": "x"}
    good = record("full", "needle", "number", "d", 50.0, version=VERSION)
    lines(tmp_path, "x-1", [bare, every | {"sample_id": "b"}, *timed, *placed, *failed, needle, good])
    (tmp_path / "needle/tiny/x-1/config.yaml").write_text("method: [\x00")
    (tmp_path / "needle/tiny/x-1/environment.json").write_text('[{"packages": 3}, 4]')
    page = build(tmp_path)
    assert "full" in set(grid(page.xpath("//table[@id='runs']")[0])["method"])
    (left_out,) = page.xpath("//ul[@id='left-out']/li/text()")
    assert re.fullmatch("[2-6] records without scores that do not say what they measured", left_out)


def test_fidelity_has_its_tables(tmp_path: Path) -> None:
    def one(method: str, document: str, ratio: float, error: float) -> dict[str, Any]:
        return {
            "version": VERSION,
            "benchmark": "fidelity",
            "model": "tiny",
            "method": method,
            "key": method,
            "sample_id": f"{document}-{ratio}",
            "status": "ok",
            "document": document,
            "length": 4096,
            "steps": 8,
            "ratio": ratio,
            "output_error": error,
            "kl": error / 10,
            "attended_tokens": 9,
        }

    for method, factor in (("oracle", 1.0), ("ours", 0.5)):
        rows = [one(method, d, ratio, factor * e) for d, e in (("a", 0.2), ("b", 0.4)) for ratio in (0.1, 0.2)]
        lines(tmp_path, f"{method}-1", rows)
    page = build(tmp_path)
    (heading,) = page.xpath("//section[@id='timings']/h2/text()")
    assert heading == "Measurements: fidelity"
    assert page.xpath("//ul[@id='left-out']/li") == []
    titles = [title.text for title in page.xpath("//section[@id='timings']//h3")]
    place = next(i for i, title in enumerate(titles) if "output error at 4096 tokens by budget, 2 documents" in title)
    table = page.xpath("//section[@id='timings']//table")[place]
    cells = [[cell.text_content() for cell in row] for row in table.xpath("./tbody/tr")]
    assert [row[0] for row in cells] == ["oracle", "ours"]
    assert [row[1].split()[0] for row in cells] == ["0.300", "0.150"]
    assert table.xpath("./tbody/tr[2]/td[2]/@data-value") == ["0.15"]


def test_fifty_thousand_records_make_a_page_of_less_than_ten_megabytes(tmp_path: Path) -> None:
    text = "words of a long prediction <b>&</b> " * 60
    for i in range(50):
        lines(
            tmp_path,
            f"m{i}-1",
            [
                record(f"m{i % 10}", "needle", "number", f"s{j}", 50.0, version=VERSION, key=f"k{i}", prediction=text)
                for j in range(1000)
            ],
        )
    source = render(load(tmp_path))
    assert len(source.encode()) < 10e6
    page = html.fromstring(source.encode())
    data = embedded(page)
    shown = len(data["samples"])
    note = f"First {shown} of 1000 samples embedded ({50 * shown} of 50000 predictions)"
    assert note in page.xpath("string(//*[@id='sample-limit'])")
    assert 0 < shown < 1000
    answer = data["samples"][0]["answers"][0]
    assert (answer["text"], answer["cut"]) == (text[: samples.PREDICTION], len(text) - samples.PREDICTION)
    assert set(grid(page.xpath("//table[@id='runs']")[0])["n"]) == {"1000"}


def test_what_a_page_has_no_room_for_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines(tmp_path, "many-1", [record(f"m{i}", "needle", "number", f"s{i}", 1.0, version=VERSION) for i in range(9)])
    for limit, value in (("ROWS", 7), ("METHODS", 6), ("CELLS", 5), ("PANELS", 1)):
        monkeypatch.setattr(f"plots.report.page.{limit}", value)
    page = build(tmp_path)
    assert len(page.xpath("//table[@id='runs']/tbody/tr")) == 7
    assert page.xpath("//p[contains(@class,'limit')]/text()") == [
        "First 7 of 9 rows are listed.",
        "First 1 of 2 plots are drawn.",
        "First 5 of 9 runs are listed.",
        "First 6 of 9 methods are described.",
    ]


def test_bytes_of_a_step_count_rows_where_all_of_them_are() -> None:
    table = pd.DataFrame(
        {
            "index_bytes": [10, 10, 10, None],
            "attended_tokens": [5.0, 5.0, 5.0, 5.0],
            "kv_tokens": [100, 100, 0, 100],
            "device_bytes": [800, 300, 800, 800],
            "host_bytes": [0, 800, 0, 0],
        }
    )
    assert leaderboard.step_bytes(table).fillna(-1).tolist() == [50.0, 50.0, -1.0, -1.0]
