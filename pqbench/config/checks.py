"""The options of a run, checked before any work starts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from omegaconf import DictConfig

from pqbench.config.compose import check_yamls, chosen_methods, model_source
from pqbench.errors import ConfigError
from pqbench.kernels.backend import BACKENDS
from pqbench.models.devices import check_device, check_kernels
from pqbench.records.classes import conf_folder
from pqbench.typed import shown

MOST_THREADS = 16  # largest accepted number of threads per core; more threads would only wait for each other
SWITCHES = ("overlap", "retry_failed", "debug", "graphs", "select_ahead")


def check_options(config: DictConfig) -> None:
    """Raises ConfigError when an option of the run itself cannot work."""
    check_yamls(conf_folder(), config.get("methods") or {}, config.get("method"), chosen_methods())
    if not config.get("methods"):
        raise ConfigError("no method is named: use e.g. method=pqcache or method=[full,pqcache]")
    if config.kernels not in BACKENDS:
        raise ConfigError(f"kernels is {config.kernels!r}: use one of {', '.join(BACKENDS)}")
    if config.question not in ("dense", "select"):
        raise ConfigError(f"question is {config.question!r}: use dense or select")
    for option in SWITCHES:
        if type(config[option]) is not bool:
            raise ConfigError(f"{option} is {config[option]!r}: use true or false")
    if type(config.correction) not in (int, float):
        raise ConfigError(f"correction is {config.correction!r}: use a number from -1 to 1")
    if not -1 <= config.correction <= 1:
        raise ConfigError(f"correction is {config.correction}: it is a cosine, from -1 to 1")
    if not isinstance(config.results, str | None):
        raise ConfigError(f"results is {shown(config.results)}: name the folder that records go to, results=results")
    if config.results is None or not config.results.strip():
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


def check_machine(device: str | None, kernels: str, option: str = "benchmark.device") -> None:
    """Raises ModelError when this machine lacks the device or a backend for it. ``device`` None means the CPU;
    ``option`` is the name of the option that chose the device."""
    place = "cpu" if device is None else device
    check_device(place, option)
    check_kernels(kernels, torch.device(place))


def check_model(model: Mapping[str, Any], kernels: str, device: str | None, asks: str | None) -> None:
    """Check the configured model before it is loaded.

    Args:
        model: the group ``model`` of the configuration.
        kernels: the name of the backend that computes.
        device: the device of the measurement; None for the device of the model.
        asks: what needs the answers of a trained model, as an option of the command line; None when nothing does.

    Raises:
        ModelError: the model does not suit the measurement, or this machine cannot run the model.
    """
    source = model_source(model)
    source.check()
    if asks is not None:
        source.check_answers(asks)
    if source.placement is None:  # otherwise the devices are checked after loading
        option = "model.device" if device is None else "benchmark.device"
        check_machine(source.device if device is None else device, kernels, option)
