"""Times on this hardware for different lengths, measured once and kept: the dense prefill of one layer, and K-Means.

Both are fitted as in PQCache (arXiv 2407.12820): layer time a + b s + c s^2, clustering time a + b s T. The entries of
``calibration.json`` in the cache folder have keys made of processor, accelerator, threads, model shape, dtype and
versions, so that they are never used for another machine.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import torch
from filelock import FileLock
from transformers import PreTrainedModel

from pqbench.engine.clock import Spans, clock_of, streams_of
from pqbench.engine.layers import layer_types
from pqbench.errors import ConfigError
from pqbench.kernels.backend import Kernels, kernels
from pqbench.models.gguf import cache_folder
from pqbench.records.environment import environment
from pqbench.records.file import run_key, write_atomically

log = logging.getLogger(__name__)

LENGTHS = (128, 256, 512, 1024, 2048)  # lengths of the prompts timed for the layer fit, up to the model's limit
POINTS = (1024, 2048, 4096)  # numbers of keys timed for the clustering fit
ITERATIONS = (3, 9)  # as in PQCache's released code
SHARED = 0.05  # share of a layer's time, where the model and clustering use the same cores


@dataclass
class HardwareCalibration:
    """Fitted times for one model on this machine. It has the interface of :class:`pqbench.method.Calibration`.

    Attributes:
        layer: a, b, c of the seconds of one layer's dense prefill, a + b s + c s^2.
        share: the share of that time that clustering may take. It is 1 if the model runs on an accelerator, and
            :data:`SHARED` if it runs on the CPU and leaves no core idle.
        backend, device: the backend that clusters, and the model's device, which holds the keys when an index is built.
    """

    layer: tuple[float, float, float]
    share: float
    backend: Kernels
    device: torch.device
    folder: Path
    key: str
    _fits: dict[tuple[int, int, int], tuple[float, float]] = field(default_factory=dict)

    def idle_seconds(self, length: int) -> float:
        """Seconds of clustering that one layer's dense prefill of ``length`` tokens hides."""
        a, b, c = self.layer
        return self.share * max(0.0, a + b * length + c * length * length)

    def clustering(self, problems: int, width: int, clusters: int) -> tuple[float, float]:
        """a, b of the clustering time in seconds, a + b * points * iterations. It is measured at first use."""
        shape = problems, width, clusters
        if shape not in self._fits:
            name = f"{self.key}-kmeans-{self.backend.__name__.rpartition('.')[2]}-{problems}x{width}x{clusters}"
            a, b = stored(self.folder, name, lambda: fit_clustering(self.backend, *shape, self.device))
            self._fits[shape] = a, b
        return self._fits[shape]


def calibrate(model: PreTrainedModel, backend: str = "auto", folder: Path | None = None) -> HardwareCalibration:
    """The calibration of a model on this machine. It is read from the cache folder; at first use it is measured with a
    few short prompts."""
    folder = cache_folder() if folder is None else folder
    config = model.config.get_text_config()
    facts = {name: value for name, value in environment().items() if name != "commit"}
    shape = {
        name: getattr(config, name, None)
        for name in (
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    }
    key = run_key({"environment": facts, "model": shape, "dtype": str(model.dtype), "device": model.device.type})
    a, b, c = stored(folder, f"{key}-layer", lambda: fit_layer(model))
    share = SHARED if model.device.type == "cpu" else 1.0
    return HardwareCalibration((a, b, c), share, kernels(model.device, backend), model.device, folder, key)


def stored(folder: Path, name: str, measure: Callable[[], Sequence[float]]) -> list[float]:
    """A fit from ``calibration.json``. A missing fit is measured and added."""
    path = folder / "calibration.json"
    with FileLock(f"{path}.lock"):
        try:
            known = json.loads(path.read_bytes()) if path.exists() else {}
        except ValueError:
            known = {}  # the file is damaged, so the fit is measured again
        if name not in known:
            known[name] = [float(value) for value in measure()]
            write_atomically(path, json.dumps(known, indent=1).encode())
        return list(known[name])


@torch.inference_mode()
def fit_layer(model: PreTrainedModel) -> list[float]:
    """Coefficients a, b, c of the seconds of one layer's prefill, measured with prompts of random tokens.

    Raises:
        ConfigError: the model's context is too short for a fit.
    """
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None) or LENGTHS[-1]
    lengths = [length for length in LENGTHS if length <= limit]
    if len(lengths) < 3:
        raise ConfigError(f"a model of {limit} tokens is too short for a calibration: set the method's iterations")
    log.info("calibrating prefill time once, on prompts of %d to %d tokens", lengths[0], lengths[-1])
    layers = len(layer_types(config))
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for length in lengths:
        ids = torch.randint(config.vocab_size, (1, length), generator=generator).to(model.device)
        seconds.append(_seconds(partial(model, ids, logits_to_keep=1, use_cache=False), model.device) / layers)
    return fit([[1.0, s, s * s] for s in map(float, lengths)], seconds)


def fit_clustering(backend: Kernels, problems: int, width: int, clusters: int, device: torch.device) -> list[float]:
    """Coefficients a, b of the seconds of K-Means with this backend on this device, measured with random points."""
    rows, seconds = [], []
    generator = torch.Generator().manual_seed(0)
    for points in (max(count, 2 * clusters) for count in POINTS):
        keys = torch.randn(1, problems, points, width, generator=generator).to(device)
        for iterations in ITERATIONS:
            seconds.append(_seconds(partial(backend.train_codebook, keys, 1, clusters, iterations, 0), keys.device))
            rows.append([1.0, float(points * iterations)])
    return fit(rows, seconds)


def fit(rows: Sequence[Sequence[float]], seconds: Sequence[float]) -> list[float]:
    """Least squares of relative errors, so that short runs weigh as much as long ones."""
    weights = 1 / np.maximum(np.array(seconds), 1e-9)
    matrix = np.array(rows) * weights[:, None]
    return [float(value) for value in np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0]]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median seconds of three runs after one warm-up run."""
    clock = clock_of(device, streams_of(device))
    run()
    spans = Spans(clock, listed=True)
    for _ in range(3):
        with spans:
            run()
    return median(spans.each)
