"""A CUDA graph, in which one launch starts all kernels of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from pqbench.engine.graphs.base import Work


class CudaGraph:
    """See :class:`pqbench.engine.graphs.base.Graph`. Rehearsals and the capture run on a stream of their own, which
    CUDA requires for capturing. Replays run on the current stream, in order with what the caller launches there."""

    def __init__(self, device: torch.device) -> None:
        self._graph = torch.cuda.CUDAGraph()
        self._stream = torch.cuda.Stream(device)

    def rehearse(self, work: Work) -> Tensor:
        """See :meth:`pqbench.engine.graphs.base.Graph.rehearse`."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        result.record_stream(current)
        return result

    def capture(self, work: Work) -> Tensor:
        """See :meth:`pqbench.engine.graphs.base.Graph.capture`. Other threads may use the GPU during the capture."""
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """See :meth:`pqbench.engine.graphs.base.Graph.replay`."""
        self._graph.replay()
