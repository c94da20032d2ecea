"""Modelled latency: predictions of the latency model for up to a million tokens and 64 sequences, beside measured
times."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from plots.latency import RUN, headline, timed
from plots.style import BASELINE, Look, footer, looks, save, style, threads, tokens
from pqbench.costs.fit import Fit, fit_machine
from pqbench.costs.model import HARDWARE, MethodProfile, ModelShape, fits, model_shape, tpot, ttft
from pqbench.errors import PqbenchError
from pqbench.records.file import plain_name

log = logging.getLogger("plots")

MADE_BY = "python -m pqbench benchmark=latency store=host method=[full,pqcache]"
NEEDS = "latency records at two contexts or more, of a model whose shape is known"

CONTEXTS = tuple(2**i for i in range(10, 21))  # 1K to 1M tokens
BATCHES = tuple(2**i for i in range(7))
TARGET, DTYPE = "llama31_8b", "bfloat16"  # the model of the panels that use data sheets
BATCH_CONTEXT = 32768
_COLUMNS = 7  # of the legend
ON_HOST = "full, KV on host"
PANELS: tuple[tuple[str, str, float, str, Callable[..., float]], ...] = (
    ("ttft_s", "time to first token", 1.0, "s", ttft),
    ("tpot_s", "time per output token", 1e3, "ms", tpot),
)


def draw(table: pd.DataFrame, folder: Path) -> list[Path]:
    """Draw two figures, by context and by batch, for the newest latency run of each model whose shape is known.

    Each method is one line, see :func:`one_setting_each`. A run with only one context, or with records that are too old
    for the fit, is left out, and a line says why.
    """
    good = timed(table)
    paths: list[Path] = []
    done: set[str] = set()
    chosen = looks(good["method"]) | {ON_HOST: Look("0.55", "o", "-")}
    for _, records in reversed(list(good.groupby(RUN, sort=False))):
        name = str(records["model"].iloc[0])
        if name in done:
            continue
        try:
            run = one_setting_each(records)
            shape = model_shape(name)
            fit = fit_machine(run, shape)
        except PqbenchError as error:
            log.info("no modelled latency of %s: %s", name, error)
            continue
        done.add(name)
        with style():
            paths += save(by_context(run, fit, shape, chosen), folder, f"costs_{plain_name(name)}")
            paths += save(by_batch(run, fit, chosen), folder, f"costs_batch_{plain_name(name)}")
    return paths


def by_context(run: pd.DataFrame, fit: Fit, shape: ModelShape, chosen: Mapping[str, Look]) -> Figure:
    """Rows are TTFT and TPOT; columns are this machine, with the measured points, and the accelerators of the data
    sheets."""
    figure = Figure(figsize=(14, 6.4), layout="constrained")
    axes = figure.subplots(2, 1 + len(HARDWARE), sharex=True)
    for row in axes:
        for axis in row[2:]:
            axis.sharey(row[1])
    dtype, target = str(run["dtype"].iloc[0]), model_shape(TARGET)
    for row, (field, title, factor, unit, predict) in zip(axes, PANELS, strict=True):
        for method, profile in fit.profiles.items():
            times = [factor * predict(fit.hardware, shape, profile, context, 1, dtype) for context in CONTEXTS]
            _line(row[0], CONTEXTS, times, chosen[method], method)
            points = run[run["method"] == method].groupby("prompt_tokens")[field].median() * factor
            row[0].plot(
                points.index,
                points,
                color=chosen[method].colour,
                marker=chosen[method].marker,
                linestyle="none",
                markersize=5,
                label=f"{method}, measured",
            )
        for axis, hardware in zip(row[1:], HARDWARE.values(), strict=True):
            for method, profile in profiles_on(fit).items():
                values = [
                    (
                        factor * predict(hardware, target, profile, context, 1, DTYPE),
                        fits(hardware, target, profile, context, 1, DTYPE),
                    )
                    for context in CONTEXTS
                ]
                _until_full(axis, CONTEXTS, values, chosen[method], method)
        row[0].set_ylabel(f"{title} ({unit})")
    for axis, name in zip(axes[0], [f"{shape.name} on {fit.hardware.name}", *_titles()], strict=True):
        axis.set_title(name)
    for axis in axes.flat:
        _scales(axis, CONTEXTS)
    for axis in axes[1]:
        axis.set_xticks(CONTEXTS[::2], [tokens(context) if context < 2**20 else "1M" for context in CONTEXTS[::2]])
        axis.set_xlabel("context length (tokens)")
    _finish(figure, run, fit, chosen, "Modelled latency by context, one sequence")
    return figure


def by_batch(run: pd.DataFrame, fit: Fit, chosen: Mapping[str, Look]) -> Figure:
    """TPOT of a whole batch on each accelerator, by the number of sequences."""
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    target = model_shape(TARGET)
    axes = figure.subplots(1, len(HARDWARE), sharey=True)
    for axis, hardware, title in zip(axes, HARDWARE.values(), _titles(), strict=True):
        for method, profile in profiles_on(fit).items():
            values = [
                (
                    1e3 * tpot(hardware, target, profile, BATCH_CONTEXT, batch, DTYPE),
                    fits(hardware, target, profile, BATCH_CONTEXT, batch, DTYPE),
                )
                for batch in BATCHES
            ]
            _until_full(axis, BATCHES, values, chosen[method], method)
        axis.set_title(title)
        _scales(axis, BATCHES)
        axis.set_xticks(BATCHES, [str(batch) for batch in BATCHES])
        axis.set_xlabel("sequences in the batch")
    axes[0].set_ylabel("time per output token (ms, whole batch)")
    _finish(figure, run, fit, chosen, f"Modelled latency by batch, {tokens(BATCH_CONTEXT)} tokens each")
    return figure


def profiles_on(fit: Fit) -> dict[str, MethodProfile]:
    """The profiles in the panels of the accelerators: full attention with keys and values on the device (and also on
    the host if that was measured), and the other methods as they were measured."""
    found: dict[str, MethodProfile] = {}
    for method, profile in fit.profiles.items():
        if method == BASELINE:
            found[BASELINE] = MethodProfile()
            if profile.on_host:
                found[ON_HOST] = profile
        else:
            found[method] = profile
    return found


def one_setting_each(run: pd.DataFrame) -> pd.DataFrame:
    """One setting (budget and key) of each method: the one that was measured at the most contexts, and the newest of
    several. A method is left out if none of its settings was measured at as many contexts as full attention."""
    widths = run.groupby(["method", "budget", "key"], sort=False)["context"].nunique().reset_index(name="contexts")
    best = widths.sort_values("contexts", kind="stable").groupby("method", sort=False).tail(1)
    least = best.loc[best["method"] == BASELINE, "contexts"].max()
    best = best[best["contexts"] >= (1 if pd.isna(least) else least)]
    return run.merge(best.drop(columns="contexts"), on=["method", "budget", "key"])


def _titles() -> list[str]:
    return [f"{TARGET} on {hardware.name}" for hardware in HARDWARE.values()]


def _line(axis: Axes, xs: Sequence[int], ys: Sequence[float], look: Look, label: str) -> None:
    """The look of a dashed line; full attention is wide, so that it stays visible below lines that coincide with it."""
    dash = (0, (4, 1.5)) if look.dash == "-" else look.dash
    axis.plot(xs, ys, color=look.colour, linestyle=dash, linewidth=2.8 if label == BASELINE else 1.5, label=label)


def _until_full(axis: Axes, xs: Sequence[int], values: Sequence[tuple[float, bool]], look: Look, label: str) -> None:
    """Draw a prediction up to the length that fits into memory, with a cross at its end; nothing if no length fits."""
    inside = [value for value, fit in values if fit]
    _line(axis, xs[: len(inside)], inside, look, label)
    if 0 < len(inside) < len(values):
        end = len(inside) - 1
        axis.plot(
            [xs[end]],
            [inside[end]],
            color=look.colour,
            marker="x",
            markersize=7,
            markeredgewidth=1.8,
            label=f"{label}, memory ends",
        )


def _scales(axis: Axes, xs: Sequence[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlim(xs[0] / 1.2, xs[-1] * 1.2)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="0.9")


def _finish(figure: Figure, run: pd.DataFrame, fit: Fit, chosen: Mapping[str, Look], title: str) -> None:
    """Title, one legend for all panels, and where the numbers come from."""
    shown = [name for name in chosen if name in {*fit.profiles, *profiles_on(fit)}]
    handles = [Line2D([], [], color=chosen[name].colour, linestyle=(0, (4, 1.5)), label=name) for name in shown]
    handles.append(Line2D([], [], color="0.3", marker="x", linestyle="none", label="device memory ends here"))
    if any(axis.lines and any("measured" in str(line.get_label()) for line in axis.lines) for axis in figure.axes):
        handles.append(Line2D([], [], color="0.3", marker="o", linestyle="none", label="measured"))
    rows = -(-len(handles) // _COLUMNS)
    below = 0.3 * (1 + rows) / figure.get_figheight()  # title and legend, as a share of the height
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 1 - 0.25 / figure.get_figheight()),
        ncols=min(_COLUMNS, len(handles)),
        frameon=False,
        fontsize=9,
    )
    figure.suptitle(f"{title}: dashed lines are modelled, not measured", fontsize=12, y=0.99)
    footer(figure, note(run, fit), above=below)


def note(run: pd.DataFrame, fit: Fit) -> str:
    """Footer: the fit, its error on contexts that it did not see, and the source of the accelerators' panels."""
    seen = " and ".join(tokens(context) for context in fit.fitted)
    errors = [
        f"{title} {100 * error:.1f} %" for field, title, *_ in PANELS if (error := fit.median_error(field)) is not None
    ]
    unseen = " and ".join(tokens(context) for context in sorted({check.context for check in fit.checks}))
    checked = (
        f"median error at {unseen}, which it did not see: {', '.join(errors)}"
        if errors
        else "nothing left to check it on"
    )
    first = run.iloc[0]
    repeats = int(np.median(run.groupby(["method", "context"]).size()))
    return (
        f"{headline(run)}: {first['device']}, {threads(first['threads'])}, {first['dtype']}, n = {repeats} per point; "
        f"constants fitted at {seen}; {checked}.\n"
        f"Accelerators: peaks of the data sheets, {TARGET} in {DTYPE}, methods' bytes per token as measured here; "
        "index building hidden beside the prefill; nobody measured these: floors."
    )
