"""The setting that all measurements of a run share: where KV lies, which kernels compute, and what overlaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pqbench.engine.setting import Setting
from pqbench.kernels.backend import kernels
from pqbench.measure.calibration import calibrate
from pqbench.method import Method
from pqbench.models.sources import LoadedModel
from pqbench.store.tiers import Tier

OPTIONS = ("graphs", "select_ahead", "correction")  # options of a run that are passed on to the setting unchanged


def run_setting(
    tier: Tier, options: Mapping[str, Any], methods: Mapping[str, Method], loaded: LoadedModel | None
) -> Setting:
    """The setting for these methods. The model is calibrated if one of the methods needs it.

    Args:
        tier: where keys and values lie.
        options: the options of the run, by their names on the command line.
        methods: the methods to measure.
        loaded: the model; None if the measurement needs none.
    """
    device = torch.device("cpu") if loaded is None else loaded.model.device
    kernels(device, options["kernels"]).use_threads(torch.get_num_threads())
    wanted = loaded is not None and any(method.needs_calibration for method in methods.values())
    calibration = calibrate(loaded.model, options["kernels"]) if loaded and wanted else None
    further = {name: options[name] for name in OPTIONS}
    further["max_length"] = None if loaded is None else loaded.max_length
    return Setting(tier, options["overlap"], options["kernels"], calibration, **further)
