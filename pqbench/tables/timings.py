"""Makes tables from records of times: medians with their spread. Loads nothing that runs a model."""

from __future__ import annotations

from collections.abc import Sequence

from pqbench.records.file import Record
from pqbench.records.kinds import DENSE
from pqbench.tables.section import AUTO, Column, Section, facts, group_records, middle, over_link, shown, telling

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

# Fields in which latency runs of one method and budget may differ.
VARYING = ("weights", "link", "kernels", "threads", "dtype", "overlap", "graphs", "select_ahead", "variant", "key")


def attention_sections(records: Sequence[Record]) -> list[Section]:
    """A table with one row per dtype, context, budget, method and kernel, dense kernels first."""
    varying = ("dtype", "threads", "kernels", "link", "keys")
    further = [name for name in varying if len({str(record.get(name)) for record in records}) > 1]
    labels = telling(records, [*further, "context", "budget", "method", "kernel"], "variant", "key")
    ordered = sorted(records, key=lambda r: (str(r.get("dtype")), r.get("context", 0), r.get("method") != DENSE))
    rows = []
    for record in ordered:
        named = [str(record.get(name, "-")).removeprefix("torch ") for name in labels]
        if record["status"] == "ok":
            rows.append([*named, *(shown(record.get(field), factor, form) for field, _, factor, form in ATTENTION)])
        else:
            rows.append([*named, record["status"], *["-"] * (len(ATTENTION) - 1)])
    layer = f"one {records[0].get('model', '-')} attention layer{over_link(records)}"
    title = f"{layer}, median decode step ({facts(records)})"
    headings = [*labels, *(heading for _, heading, _, _ in ATTENTION)]
    return [Section(title, headings, rows, len(labels), ("min", "attended", "peak GB", "n"))]


def latency_sections(records: Sequence[Record]) -> list[Section]:
    """Two tables and a profile: times with their range and their ratio to full attention; where the time of a step
    goes; and the phases under the profiler."""
    records = [record | {"weights": record.get("weights") or "pretrained"} for record in records]
    title = f"latency of {records[0].get('model', '-')}{over_link(records)} ({facts(records)})"
    labels = telling(records, ["method", "budget"], *VARYING)
    times, costs = [], []
    groups = group_records(records, "context", *labels)
    for key, rows in sorted(groups.items(), key=lambda item: item[0][0] or 0):
        good = [row for row in rows if row["status"] == "ok"]
        named = [str(part) for part in key]
        count = f"{len(good)}" + (f" (+{len(rows) - len(good)} failed)" if len(good) < len(rows) else "")
        dense = _dense(records, rows[0])
        times.append([*named, count, *(cell for column in TIMES for cell in _ranged(good, dense, column))])
        if good:
            costs.append([*named, *(shown(middle(good, field), factor, form) for field, _, factor, form in PHASES)])
    headings = ["context", *labels, "n"] + [text for _, name, _, _ in TIMES for text in (name, "range", "/ full")]
    further = ["context", *labels, *(heading for _, heading, _, _ in PHASES)]
    return [
        Section(f"{title}: medians over repeats", headings, times, 1 + len(labels)),
        Section(f"{title}: a decode step", further, costs, 1 + len(labels), ("attended", "peak GB")),
        _profiled(records, title, labels),
    ]


def _profiled(records: Sequence[Record], title: str, labels: Sequence[str]) -> Section:
    """The profiler's figures of every phase. Prefill, observation and index are phases of the whole run; all others are
    given per step."""
    rows = [
        [
            *(str(record.get(name)) for name in ("context", *labels)),
            phase,
            *(shown(found.get(field), factor, form) for field, _, factor, form in PROFILE),
        ]
        for record in records
        for phase, found in (record.get("profile") or {}).items()
    ]
    headings = ["context", *labels, "phase", *(heading for _, heading, _, _ in PROFILE)]
    return Section(f"{title}: a step under the profiler", headings, rows, 2 + len(labels))


def _dense(records: Sequence[Record], like: Record) -> list[Record]:
    """Records of full attention with the same context, weights, link, kernels, threads, dtype and use of graphs."""
    alike = ("context", "weights", "link", "kernels", "threads", "dtype", "graphs")
    return [
        record
        for record in records
        if record["method"] == DENSE
        and record["status"] == "ok"
        and all(record.get(name) == like.get(name) for name in alike)
    ]


def _ranged(good: Sequence[Record], dense: Sequence[Record], column: Column) -> list[str]:
    """Median, range over repeats, and the ratio of the median to that of full attention."""
    field, _, factor, form = column
    value, base = middle(good, field), middle(dense, field)
    numbers = [float(row[field]) * factor for row in good if isinstance(row.get(field), int | float)]
    span = f"{form.format(min(numbers))}-{form.format(max(numbers))}" if len(numbers) > 1 else "-"
    return [shown(value, factor, form), span, shown(value / base if value and base else None, 1, "{:.2f}")]
