"""Records of timing benchmarks to tables: medians with their spread, never scores. Loads nothing that runs a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from types import MappingProxyType
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from pqbench.records.file import Record
from pqbench.terminal import plain

DENSE = "full"  # what times are compared with
RANDOM = "random"  # weights of a model that only has another's shape

AUTO = "four digits"
# Field of a record -> (heading, factor, format).
Column = tuple[str, str, float, str]
ATTENTION: tuple[Column, ...] = (
    ("select_s", "select ms", 1e3, AUTO),
    ("fetch_s", "fetch ms", 1e3, AUTO),
    ("attend_s", "attend ms", 1e3, AUTO),
    ("append_s", "append ms", 1e3, AUTO),
    ("total_s", "total ms", 1e3, AUTO),
    ("total_min_s", "min", 1e3, AUTO),
    ("total_p90_s", "p90", 1e3, AUTO),
    ("dense_ratio", "x dense", 1, "{:.2f}"),
    ("bandwidth_gbps", "GB/s", 1, "{:.1f}"),
    ("copy_share", "% of copy", 100, "{:.0f}"),
    ("attended_tokens", "attended", 1, "{:.0f}"),
    ("build_s", "build s", 1, "{:.2f}"),
    ("index_bytes", "index MB", 1e-6, "{:.2f}"),
    ("peak_rss_bytes", "peak GB", 1e-9, "{:.1f}"),
    ("timed_steps", "n", 1, "{:.0f}"),
)
PHASES: tuple[Column, ...] = (
    ("dense_step_s", "model ms", 1e3, "{:.1f}"),
    ("select_step_s", "select ms", 1e3, "{:.2f}"),
    ("fetch_step_s", "fetch ms", 1e3, "{:.2f}"),
    ("attend_step_s", "attend ms", 1e3, "{:.2f}"),
    ("append_step_s", "append ms", 1e3, "{:.2f}"),
    ("wait_s", "wait ms", 1e3, "{:.1f}"),
    ("index_build_s", "index s", 1, "{:.2f}"),
    ("attended_tokens", "attended", 1, "{:.0f}"),
    ("index_bytes", "index MB/step", 1e-6, "{:.2f}"),
    ("to_device_bytes_step", "in MB/step", 1e-6, "{:.2f}"),
    ("to_host_bytes_step", "out MB/step", 1e-6, "{:.2f}"),
    ("cache_hit_rate", "hits %", 100, "{:.0f}"),
    ("device_bytes", "device MB", 1e-6, "{:.1f}"),
    ("host_bytes", "host MB", 1e-6, "{:.1f}"),
    ("copy_share", "% of copy", 100, "{:.0f}"),
    ("peak_rss_bytes", "peak GB", 1e-9, "{:.2f}"),
)
PROFILE: tuple[Column, ...] = (
    ("operations", "torch operations", 1, "{:.0f}"),
    ("launches", "launches", 1, "{:.0f}"),
    ("synchronisations", "waits", 1, "{:.0f}"),
    ("host_s", "host ms", 1e3, "{:.2f}"),
    ("device_s", "device ms", 1e3, "{:.2f}"),
    ("copied_bytes", "over link MB", 1e-6, "{:.2f}"),
    ("bytes", "MB", 1e-6, "{:.2f}"),
    ("memory_s", "MB over bandwidth ms", 1e3, "{:.3f}"),
)
TIMES: tuple[Column, ...] = (
    ("ttft_s", "TTFT s", 1, "{:.2f}"),
    ("tt2t_s", "TT2T s", 1, "{:.2f}"),
    ("tpot_s", "TPOT ms", 1e3, "{:.1f}"),
)


@dataclass(frozen=True)
class Section:
    """One table: a title, headings, rows, how many columns from the left are labels, and which of the others a
    terminal has no room for."""

    title: str
    headings: list[str]
    rows: list[list[str]]
    labels: int
    wide: tuple[str, ...] = ()

    def rich(self) -> Table:
        """For a terminal: units on a line of their own. Names are Text, never markup."""
        table = Table(title=Text(plain(self.title)), box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        shown = [i for i, heading in enumerate(self.headings) if heading not in self.wide]
        for i in shown:
            name = Text(plain(self.headings[i]).replace(" ", "\n", 1))
            table.add_column(name, justify="left" if i < self.labels else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*(Text(plain(row[i])) for i in shown))
        return table


def is_timing(benchmark: object) -> bool:
    """Whether records of a benchmark hold times alone."""
    return isinstance(benchmark, str) and benchmark in _MAKERS


def sections(records: Sequence[Record], base: str | None = None) -> list[Section]:
    """The tables of every timing benchmark and subject among the records, in the order they first appear; those of
    fidelity also as multiples of a ``base`` method, see :func:`pqbench.tables.fidelity.multiples`."""
    found: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if is_timing(record.get("benchmark")):
            found.setdefault((str(record["benchmark"]), str(record.get("model", "-"))), []).append(record)
    return [section for (name, _), rows in found.items() for section in _MAKERS[name](rows, base) if section.rows]


def timing_table(records: Sequence[Record]) -> Table:
    """The tables a timing run prints, one below the other."""
    grid = Table.grid()
    for section in sections(records):
        grid.add_row(section.rich())
    return grid


def flat(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Timing records as rows of a csv: names and single figures, no lists."""
    return [
        {name: value for name, value in record.items() if isinstance(value, str | int | float | bool)}
        for record in records
        if is_timing(record.get("benchmark"))
    ]


def group_records(records: Sequence[Record], *names: str) -> dict[tuple[Any, ...], list[Record]]:
    """Records by the values of some fields, in the order these first appear."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record.get(name) for name in names), []).append(record)
    return groups


def middle(records: Sequence[Record], field: str) -> float | None:
    """Median of a field over the records that have it."""
    numbers = [float(record[field]) for record in records if isinstance(record.get(field), int | float)]
    return median(numbers) if numbers else None


def facts(records: Sequence[Record]) -> str:
    """Threads, kernels, dtype and roof of the records, as far as they agree, in words for a title or footer."""
    parts = []
    for field, form in (("dtype", "{}"), ("threads", "{} threads"), ("kernels", "kernels {}")):
        values = sorted({str(record[field]) for record in records if record.get(field) is not None})
        if values:
            parts.append(form.format("/".join(values)))
    if records and all(record.get("weights") == RANDOM for record in records):
        parts.append("random weights")
    copy = middle(records, "copy_bandwidth_gbps")
    return ", ".join([*parts, *([f"copy {copy:.1f} GB/s (read and written)"] if copy else [])])


def link_of(records: Sequence[Record]) -> str:
    """The link the records were measured over, empty without one; says so when time on it is a model's."""
    labels = sorted({str(record["link"]) for record in records if record.get("link")})
    emulated = any(record.get("emulated") for record in records)
    named = " and ".join(labels)
    return f"emulated {named}" if emulated and "emulated" not in named else named


def _attention(records: Sequence[Record]) -> list[Section]:
    """One row per dtype, context, budget, method and kernel, dense kernels first."""
    varying = ("dtype", "threads", "kernels", "link", "keys")
    further = [name for name in varying if len({str(record.get(name)) for record in records}) > 1]
    labels = [*further, "context", "budget", "method", "kernel"]
    ordered = sorted(records, key=lambda r: (str(r.get("dtype")), r.get("context", 0), r.get("method") != DENSE))
    rows = []
    for record in ordered:
        named = [str(record.get(name, "-")).removeprefix("torch ") for name in labels]
        if record["status"] == "ok":
            rows.append([*named, *(_shown(record.get(field), factor, form) for field, _, factor, form in ATTENTION)])
        else:
            rows.append([*named, record["status"], *["-"] * (len(ATTENTION) - 1)])
    title = f"one {records[0].get('model', '-')} attention layer{_over(records)}, median decode step ({facts(records)})"
    headings = [*labels, *(heading for _, heading, _, _ in ATTENTION)]
    return [Section(title, headings, rows, len(labels), ("min", "attended", "peak GB", "n"))]


def _latency(records: Sequence[Record]) -> list[Section]:
    """Times with their range and the ratio to full attention; then where a step's time goes."""
    records = [record | {"weights": record.get("weights") or "pretrained"} for record in records]
    title = f"latency of {records[0].get('model', '-')}{_over(records)} ({facts(records)})"
    labels = _labels(records)
    times, costs = [], []
    groups = group_records(records, "context", *labels)
    for key, rows in sorted(groups.items(), key=lambda item: item[0][0] or 0):
        good = [row for row in rows if row["status"] == "ok"]
        named = [str(part) for part in key]
        count = f"{len(good)}" + (f" (+{len(rows) - len(good)} failed)" if len(good) < len(rows) else "")
        dense = _dense(records, rows[0])
        times.append([*named, count, *(cell for column in TIMES for cell in _ranged(good, dense, column))])
        if good:
            costs.append([*named, *(_shown(middle(good, field), factor, form) for field, _, factor, form in PHASES)])
    headings = ["context", *labels, "n"] + [text for _, name, _, _ in TIMES for text in (name, "range", "/ full")]
    further = ["context", *labels, *(heading for _, heading, _, _ in PHASES)]
    return [
        Section(f"{title}: medians over repeats", headings, times, 1 + len(labels)),
        Section(f"{title}: a decode step", further, costs, 1 + len(labels), ("attended", "peak GB")),
        _profiled(records, title, labels),
    ]


def _profiled(records: Sequence[Record], title: str, labels: Sequence[str]) -> Section:
    """What a profiler saw of every phase; prefill, what is watched of it, and the index are those of the whole run."""
    rows = [
        [
            *(str(record.get(name)) for name in ("context", *labels)),
            phase,
            *(_shown(found.get(field), factor, form) for field, _, factor, form in PROFILE),
        ]
        for record in records
        for phase, found in (record.get("profile") or {}).items()
    ]
    headings = ["context", *labels, "phase", *(heading for _, heading, _, _ in PROFILE)]
    return Section(f"{title}: a step under the profiler", headings, rows, 2 + len(labels))


def _over(records: Sequence[Record]) -> str:
    link = link_of(records)
    return f", KV over {link}" if link else ""


def _labels(records: Sequence[Record]) -> list[str]:
    """Method and budget, and what else tells runs apart."""
    labels = ["method", "budget"]
    for name in ("weights", "link", "kernels", "threads", "dtype", "overlap", "graphs", "select_ahead", "key"):
        by_method = group_records(records, *labels)
        if any(len({str(row.get(name)) for row in rows}) > 1 for rows in by_method.values()):
            labels.append(name)
    return labels


def _dense(records: Sequence[Record], like: Record) -> list[Record]:
    """Measurements of full attention at the same context with the same weights, link, kernels, threads, dtype, and
    graphs or none."""
    alike = ("context", "weights", "link", "kernels", "threads", "dtype", "graphs")
    return [
        record
        for record in records
        if record["method"] == DENSE
        and record["status"] == "ok"
        and all(record.get(name) == like.get(name) for name in alike)
    ]


def _ranged(good: Sequence[Record], dense: Sequence[Record], column: Column) -> list[str]:
    """Median, range over repeats, and the ratio of the median to full attention's."""
    field, _, factor, form = column
    value, base = middle(good, field), middle(dense, field)
    numbers = [float(row[field]) * factor for row in good if isinstance(row.get(field), int | float)]
    span = f"{form.format(min(numbers))}-{form.format(max(numbers))}" if len(numbers) > 1 else "-"
    return [_shown(value, factor, form), span, _shown(value / base if value and base else None, 1, "{:.2f}")]


def _shown(value: Any, factor: float, form: str) -> str:
    if not isinstance(value, int | float) or value != value:
        return "-"
    figure = value * factor
    return f"{figure:.{3 - sum(figure >= limit for limit in (10, 100))}f}" if form == AUTO else form.format(figure)


def _fidelity(records: Sequence[Record], base: str | None) -> list[Section]:
    from pqbench.tables.fidelity import sections as fidelity_sections  # which is made of what is here

    return fidelity_sections(records, base)


_MAKERS: Mapping[str, Callable[[Sequence[Record], str | None], list[Section]]] = MappingProxyType(
    {
        "attention": lambda records, _: _attention(records),
        "latency": lambda records, _: _latency(records),
        "fidelity": _fidelity,
    }
)
