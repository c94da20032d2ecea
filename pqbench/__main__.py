"""``python -m pqbench``: compose a configuration, run it, print its table. See README.md for the overrides."""

from __future__ import annotations

from pqbench.config.interrupt import begun  # isort: skip - before the imports below, which take seconds

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pqbench.benchmarks.base import Benchmark, Prompter
from pqbench.config.compose import check_yamls, conf_folder, explain, model_source, opened, own_budgets, rehearsed
from pqbench.config.fields import check_fields
from pqbench.config.shadow import check_import_path
from pqbench.config.shape import check_shape, check_store, made_method
from pqbench.config.sweep import Failures, cell
from pqbench.engine.calibration import calibrate
from pqbench.engine.prefill import Setting
from pqbench.errors import ConfigError, DeviceError
from pqbench.kernels.backend import BACKENDS, kernels
from pqbench.measure.base import Measurement, TimingJob
from pqbench.measure.scored import Job, Summary, run
from pqbench.method import Budget, Method, compensated
from pqbench.models.devices import check_device, check_kernels
from pqbench.models.sources import LoadedModel
from pqbench.records.file import Record, RecordFile
from pqbench.records.heartbeat import heartbeat
from pqbench.records.identity import method_code
from pqbench.tables.document import bench_table
from pqbench.terminal import log_to_terminal

log = logging.getLogger("pqbench")

KEYED = (
    "benchmark",
    "model",
    "store",
    "question",
    "chunk",
    "probe_tokens",
    "threads",
    "kernels",
    "overlap",
)  # what a figure depends on besides the method
KEYED_WHEN_ON = {"graphs": ("graphs",), "select_ahead": ("select_ahead", "correction")}  # else keys are as ever
MOST_THREADS = 16  # per core; more only wait for each other


def main() -> None:
    """Entry point of ``python -m pqbench`` and of the console script. Exits 0, 1 on any failure, 130 on Ctrl-C."""
    begun()
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"pqbench {version('pqbench')}\n")
        sys.exit(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through; they are put into one line here
    prepare()
    failures = Failures()

    def task(config: DictConfig) -> None:
        prepare()  # launchers run this in processes of their own
        if config.debug is True:
            log.setLevel(logging.DEBUG)  # a sample that fails is a record, and its traceback a message
        try:
            lines = run_config(config)
        except DeviceError:
            raise  # no further cell could be measured in this process
        except Exception as error:  # a sweep goes on past any failing cell
            if config.debug is True:
                raise
            lines = [explain(error)]
            if failures.new(lines[0]):  # what stops several runs of a sweep is said once, and listed at the end
                log.error("%s%s", cell(), lines[0])
        failures.add(lines, cell())

    entry = hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(task)
    try:
        check_import_path()
        sys.argv[1:] = opened(sys.argv[1:])
        entry()
    except Exception as error:  # ours, Hydra's, or a launcher's
        if "debug=true" in sys.argv:
            raise
        log.error(explain(error))
        sys.exit(1)
    except KeyboardInterrupt:
        log.error("interrupted: finished samples are kept, the same command goes on from there")
        sys.exit(130)
    failed = failures.count
    if failed and len(failures.runs) > 1:
        log.error("%d failures in %d runs:", failed, len(failures.runs))
        for line in failures.listed():
            log.error(line)
    sys.exit(1 if failed else 0)


def prepare() -> None:
    """Make a process say what this command says, and nothing else."""
    log_to_terminal()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_config(config: DictConfig) -> list[str]:
    """One job of a composed configuration. Returns the failures, one line each."""
    check_shape(config)
    check_options(config)
    own_budgets(config)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    for group in ("budget", "store", "model", "benchmark", "methods"):
        check_fields(plain[group], group)
    check_store(plain["store"])
    if config.threads:
        torch.set_num_threads(config.threads)
    methods = {name: compensated(made_method(name, node)) for name, node in config.methods.items()}
    plain["methods"] = {name: whole(plain["methods"][name], method) for name, method in methods.items()}
    benchmark = instantiate(config.benchmark)
    check_start(plain, benchmark)
    timed = isinstance(benchmark, Measurement)
    plain["weights"] = model_source(plain["model"]).fingerprint if not timed or benchmark.needs_model else None
    return (_time if timed else _evaluate)(plain, methods, benchmark)


def _evaluate(plain: dict[str, Any], methods: dict[str, Method], benchmark: Benchmark) -> list[str]:
    """Score methods on a benchmark. Returns the failures."""
    model = plain["model"]["name"]
    files = {name: _record_file(plain, methods, name, benchmark.name, model) for name in methods}
    with heartbeat(list(files.values())):
        loaded = rehearsed(model_source(plain["model"]))
        chat, options = plain["model"]["chat"], plain["model"].get("chat_options") or {}
        prompter = Prompter(loaded.tokenizer, loaded.max_length, chat, options)
        job = Job(
            benchmark,
            loaded,
            prompter,
            methods,
            files,
            plain["chunk"],
            plain["question"],
            plain["probe_tokens"],
            plain["retry_failed"],
            _setting(plain, methods, loaded),
        )
        summary = run(job)
    _show(bench_table(_records(files)), footer(summary, plain["results"]), summary.failures)
    return summary.failures


def _time(plain: dict[str, Any], methods: dict[str, Method], benchmark: Measurement) -> list[str]:
    """Time methods. Returns the failures."""
    subject, names = benchmark.subject(plain["model"]["name"]), dict.fromkeys([*methods, *benchmark.further])
    files = {name: _record_file(plain, methods, name, benchmark.name, subject) for name in names}
    with heartbeat(list(files.values())):
        loaded = rehearsed(model_source(plain["model"])) if benchmark.needs_model else None
        job = TimingJob(loaded, methods, files, _setting(plain, methods, loaded), plain["retry_failed"], plain["chunk"])
        done = benchmark.measure(job)
    _show(benchmark.table(_records(files)), benchmark.footer(done, plain["results"]), done.failures)
    return done.failures


def _records(files: Mapping[str, RecordFile]) -> list[Record]:
    return [record for file in files.values() for record in file.read()]


def _show(table: Table, below: str, failures: Sequence[str]) -> None:
    console = Console()
    console.width = max(console.width, 150)  # a table cut to a narrow pipe is unreadable
    console.print(table)
    console.print(Text(below))
    for failure in failures:
        log.error(failure)


def check_options(config: DictConfig) -> None:
    """Raises ConfigError when an option of the run itself cannot work."""
    check_yamls(conf_folder(), config.get("methods") or {}, config.get("method"))
    if not config.get("methods"):
        raise ConfigError("no method is named: use e.g. method=pqcache or method=[full,pqcache]")
    if config.kernels not in BACKENDS:
        raise ConfigError(f"kernels is {config.kernels!r}: use one of {', '.join(BACKENDS)}")
    if config.question not in ("dense", "select"):
        raise ConfigError(f"question is {config.question!r}: use dense or select")
    for option in ("overlap", "retry_failed", "debug", "graphs", "select_ahead"):
        if type(config[option]) is not bool:
            raise ConfigError(f"{option} is {config[option]!r}: use true or false")
    if type(config.correction) not in (int, float):
        raise ConfigError(f"correction is {config.correction!r}: use a number from -1 to 1")
    if not isinstance(config.results, str) or not config.results.strip():
        raise ConfigError("results is empty: name the folder that records go to, e.g. results=results")
    for option, least in (("threads", 1), ("chunk", 1), ("probe_tokens", 0)):
        value, optional = config[option], option != "probe_tokens"
        if not (value is None and optional) and not (type(value) is int and value >= least):
            choices = f"a whole number from {least} up" + (", or null" if optional else "")
            raise ConfigError(f"{option} is {value!r}: use {choices}")
    most = MOST_THREADS * (os.cpu_count() or 1)
    if (config.threads or 0) > most:
        raise ConfigError(
            f"threads is {config.threads}, but this machine has {os.cpu_count()} cores: use {most} at most"
        )


def check_start(plain: dict[str, Any], benchmark: Benchmark | Measurement) -> None:
    """Raises ModelError when the configured model or this machine cannot serve the benchmark; nothing was loaded then,
    and no file made."""
    timing = benchmark if isinstance(benchmark, Measurement) else None
    device: str = getattr(benchmark, "device", None) or "cpu"
    if timing is None or timing.needs_model:
        source = model_source(plain["model"])
        source.check()
        if timing is None or timing.needs_answers:
            source.check_answers(f"benchmark={benchmark.name}")
        if source.placement is not None:
            return  # devices are known once the layers are spread; the run checks them
        device = getattr(benchmark, "device", None) or source.device
    check_device(device)
    check_kernels(plain["kernels"], torch.device(device))


def whole(given: Mapping[str, Any], method: Method) -> dict[str, Any]:
    """A method's configuration together with the values of the fields that it leaves to the code's defaults."""
    found = dict(given)
    for name in (field.name for field in fields(method)):
        value = getattr(method, name)
        if isinstance(value, Method):  # one method around another
            found[name] = whole(given.get(name, {}), value)
        elif isinstance(value, Budget) and isinstance(given.get(name), Mapping):
            found[name] = {option: getattr(value, option, was) for option, was in given[name].items()}
        elif name not in given and type(value) in (bool, int, float, str, type(None)):
            found[name] = value
    return found


def _setting(plain: dict[str, Any], methods: Mapping[str, Method], loaded: LoadedModel | None) -> Setting:
    """Where KV lives, which kernels compute and what overlaps; calibrated when a method asks for it."""
    device = torch.device("cpu") if loaded is None else loaded.model.device
    kernels(device, plain["kernels"]).use_threads(torch.get_num_threads())
    wanted = loaded is not None and any(method.needs_calibration for method in methods.values())
    calibration = calibrate(loaded.model, plain["kernels"]) if loaded and wanted else None
    options = {name: plain[name] for name in ("graphs", "select_ahead", "correction")}
    options["max_length"] = None if loaded is None else loaded.max_length
    return Setting(instantiate(plain["store"]), plain["overlap"], plain["kernels"], calibration, **options)


def _record_file(
    plain: dict[str, Any], methods: Mapping[str, Method], name: str, benchmark: str, subject: str
) -> RecordFile:
    """Where a method's records go; the key covers all that can change a figure, the method's own code included."""
    settings = {part: plain[part] for part in KEYED}
    settings |= {part: plain[part] for option, parts in KEYED_WHEN_ON.items() if plain[option] for part in parts}
    settings |= {"method": plain["methods"].get(name), "code": method_code(methods[name]) if name in methods else None}
    if plain["weights"] is not None:
        settings["weights"] = plain["weights"]
    results = Path(to_absolute_path(plain["results"]))  # some launchers' workers start elsewhere
    return RecordFile.create(results, benchmark, subject, name, settings)


def footer(summary: Summary, results: str) -> str:
    """What the run cost, and what it would have cost without sharing prefills."""
    counts = f"{summary.measured} measured, {summary.resumed} already there, {len(summary.failures)} failed"
    lines = [f"{counts}; records in {results}/"]
    if summary.compile_s > 5:  # else they came from the cache
        lines.append(f"kernels were compiled first, in {summary.compile_s:.0f} s that no figure holds")
    if summary.measured:
        own = summary.prefill_s + summary.decode_s + summary.index_s
        lines.append(
            f"wall {summary.wall_s:.1f} s = {summary.wall_s / own:.2f} x (shared prefills {summary.prefill_s:.1f} s + "
            f"decodes {summary.decode_s:.1f} s + the methods' own indices {summary.index_s:.1f} s); "
            f"fidelity probes {summary.probe_s:.1f} s"
        )
    lines.append(
        f"{torch.get_num_threads()} threads; one prefill serves all methods, so TTFT is that prefill plus the method's "
        "own watching of it; mass, recall and error: teacher-forced on the reference answer, clean inputs"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
