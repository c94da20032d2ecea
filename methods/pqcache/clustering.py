"""K-Means on the keys of one layer: the number of iterations, and a check that keys are finite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pqbench.kernels.backend import kernels
from pqbench.method import Check, ConfigError, Geometry

if TYPE_CHECKING:
    from methods.pqcache.method import PQCache

_UNMEASURED = 10  # iterations of the adaptive rule on hardware that was not measured


def adaptive_iterations(idle: float, fit: tuple[float, float], points: int) -> int:
    """The paper's rule: the number of iterations that fit into ``idle`` seconds when clustering ``points`` keys takes
    a + b * points * iterations seconds, with ``fit`` = (a, b). At least 3 and at most 300, as in the released code."""
    a, b = fit
    return max(3, min(300, int((idle - a) / max(b * points, 1e-12))))


class Clustering:
    """Computes codebooks from keys.

    Attributes:
        iterations: K-Means iterations of the last codebook.
        finite: bool ``[]``, whether the keys of the last codebook were finite; a GPU may not have computed it yet.
    """

    def __init__(self, method: PQCache, geometry: Geometry) -> None:
        self._method, self._geometry = method, geometry
        self.iterations = 0
        self.finite: Tensor | None = None
        problems = geometry.batch * geometry.kv_heads * method.m
        known = geometry.calibration if method.needs_calibration else None
        self._fit = None if known is None else known.clustering(problems, geometry.head_dim // method.m, 2**method.b)

    def train(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Codebook ``[B, H, m, 2**b, D/m]`` and codes ``[B, H, S, m]`` of keys ``[B, H, S, D]``, computed on the device
        of the keys.

        Raises:
            ConfigError: keys on the CPU are not finite. Keys on a GPU are checked later, because this does not wait for
                the GPU; see :attr:`checks`.
        """
        # A NaN makes both extremes NaN. This avoids a mask of isfinite() as large as the keys.
        extremes = torch.stack(keys.aminmax())
        self.finite = extremes.isfinite().all()
        if keys.device.type == "cpu" and not bool(self.finite):
            raise ConfigError(self.checks[0].message)
        method, clusters = self._method, 2**self._method.b
        self.iterations = self._wanted(keys.shape[2])
        sample = None if method.sample is None else method.sample * clusters
        backend = kernels(keys.device, self._geometry.backend)
        return backend.train_codebook(keys, method.m, clusters, self.iterations, method.seed, sample, method.tolerance)

    def _wanted(self, points: int) -> int:
        """Number of iterations for ``points`` keys."""
        if self._method.iterations is not None:
            return self._method.iterations
        calibration = self._geometry.calibration
        if calibration is None or self._fit is None:
            return _UNMEASURED
        return adaptive_iterations(calibration.idle_seconds(self._geometry.prompt), self._fit, points)

    @property
    def checks(self) -> list[Check]:
        """The check that the keys are finite; see :attr:`pqbench.method.LayerState.checks`."""
        if self.finite is None:
            return []
        layer = self._geometry.layer
        return [Check(self.finite, f"layer {layer} has keys that are NaN or infinite: try model.dtype=float32")]
