"""``python -m pqbench``: compose a configuration, run it, print its table. See README.md for the overrides."""

from __future__ import annotations

from pqbench.config.interrupt import begun  # isort: skip - before the imports below, which take seconds

import logging
import os
import sys
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from hydra.utils import instantiate, to_absolute_path
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.text import Text

from pqbench.benchmarks.base import Benchmark
from pqbench.config.checks import check_machine, check_model, check_options
from pqbench.config.compose import explain, model_source, opened, own_budgets
from pqbench.config.fields import check_fields
from pqbench.config.keys import run_settings, whole
from pqbench.config.shadow import check_import_path
from pqbench.config.shape import check_shape, check_store, made_method
from pqbench.config.sweep import Failures, cell
from pqbench.errors import DeviceError
from pqbench.measure.base import Job, Measurement
from pqbench.measure.scored import Scored
from pqbench.measure.setting import run_setting
from pqbench.method import Method, compensated
from pqbench.records.claims import alone
from pqbench.records.classes import conf_folder
from pqbench.records.file import RecordFile
from pqbench.records.heartbeat import heartbeat
from pqbench.support.loading import rehearsed
from pqbench.tables.document import run_table
from pqbench.terminal import log_to_terminal

log = logging.getLogger("pqbench")


def main() -> None:
    """Entry point of ``python -m pqbench`` and of the console script. Exits 0, 1 on any failure, 130 on Ctrl-C."""
    begun()
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"pqbench {version('pqbench')}\n")
        sys.exit(0)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra must pass errors on; they are explained in one line below
    prepare()
    failures = Failures()

    def task(config: DictConfig) -> None:
        prepare()  # launchers run this in processes of their own
        if config.debug is True:
            log.setLevel(logging.DEBUG)  # log the traceback of every sample that fails
        try:
            lines = run_config(config)
        except DeviceError:
            raise  # this process cannot measure any further cell
        except (Exception, SystemExit) as error:  # a sweep continues after a cell that fails
            if config.debug is True:
                raise
            lines = [explain(error)]
            if failures.new(lines[0]):  # the same error is logged once and listed at the end
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
        log.error("interrupted: finished samples are kept, the same command continues from there")
        sys.exit(130)
    failed = failures.count
    if failed and len(failures.runs) > 1:
        log.error("%d failures in %d runs:", failed, len(failures.runs))
        for line in failures.listed():
            log.error(line)
    sys.exit(1 if failed else 0)


def prepare() -> None:
    """Make this process log as the command does and hide messages of libraries."""
    log_to_terminal()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def run_config(config: DictConfig) -> list[str]:
    """Run one composed configuration. Returns the failures, one line each."""
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
    measurement = measurement_of(instantiate(config.benchmark), plain)
    device, plain["weights"] = getattr(measurement, "device", None), None
    if measurement.needs_model:
        asks = f"benchmark={measurement.name}" if measurement.needs_answers else None
        check_model(plain["model"], plain["kernels"], device, asks)
        plain["weights"] = model_source(plain["model"]).fingerprint
    else:
        check_machine(device, plain["kernels"])
    return run(plain, methods, measurement)


def measurement_of(benchmark: Benchmark | Measurement, plain: dict[str, Any]) -> Measurement:
    """The measurement that the group ``benchmark`` of a configuration describes. A benchmark is measured by its
    scores."""
    if isinstance(benchmark, Measurement):
        return benchmark
    model = plain["model"]
    return Scored(benchmark, plain["question"], plain["probe_tokens"], model["chat"], model.get("chat_options") or {})


def run(plain: dict[str, Any], methods: dict[str, Method], measurement: Measurement) -> list[str]:
    """Measure methods and print the table of their records. Returns the failures, one line each."""
    subject, names = measurement.subject(plain["model"]["name"]), dict.fromkeys([*methods, *measurement.further])
    results = Path(to_absolute_path(plain["results"]))  # some launchers' workers start elsewhere
    settings = {name: run_settings(plain, name, methods.get(name)) for name in names}
    files = {name: RecordFile.create(results, measurement.name, subject, name, settings[name]) for name in names}
    mine = nullcontext() if measurement.shared else alone(list(files.values()))
    with mine, heartbeat(list(files.values())):
        loaded = rehearsed(model_source(plain["model"])) if measurement.needs_model else None
        setting = run_setting(instantiate(plain["store"]), plain, methods, loaded)
        done = measurement.measure(Job(loaded, methods, files, setting, plain["retry_failed"], plain["chunk"]))
    console = Console()
    console.width = max(console.width, 150)  # a narrower table, as for a pipe, would be unreadable
    console.print(run_table([record for file in files.values() for record in file.read()]))
    console.print(Text(measurement.footer(done, plain["results"])))
    for failure in done.failures:
        log.error(failure)
    return done.failures


if __name__ == "__main__":
    main()
