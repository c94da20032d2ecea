"""A latency model: TTFT and TPOT of a method on other hardware, from the bytes that it moves and what it computes.

It is a roofline model for each phase. Where memory and arithmetic units work at the same time, only the slower of the
two counts. Work that waits for other work is added. Sizes are in bytes and times in seconds, for B sequences of S
cached tokens, L layers, Hq query heads, and H KV heads of D dimensions. Predictions from data sheets are lower bounds,
because real kernels reach neither peak. Nothing here runs a model, and torch is not imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pqbench.errors import ConfigError

ITEM_SIZE: Mapping[str, int] = MappingProxyType({"float32": 4, "bfloat16": 2, "float16": 2})


@dataclass(frozen=True)
class Hardware:
    """An accelerator and its host.

    Attributes:
        bandwidth: bandwidth of device memory in bytes per second.
        peak: operations per second in dense matrix products, by dtype (a multiplication and an addition are two
            operations).
        vector: operations per second outside matrix products in float32; index scans run at this rate.
        link_bandwidth: bandwidth from host to device in bytes per second.
        link_latency: seconds before the first byte of a transfer.
        layer_overhead: seconds per layer and step that do not depend on any size: launches and Python.
        select_overhead: the same for selecting tokens, in methods that read an index.
        memory: memory of the device in bytes; None for no limit.
        builds_apart: whether other cores than the model's build the index, within the time of the prefill (PQCache's
            adaptive rule chooses a number of K-Means iterations that fits, arXiv 2407.12820). If False, both share the
            cores.
    """

    name: str
    bandwidth: float
    peak: Mapping[str, float]
    vector: float
    link_bandwidth: float
    link_latency: float
    layer_overhead: float
    select_overhead: float
    memory: float | None = None
    builds_apart: bool = True


# An assumption, because no data sheet states it: about ten kernel launches per layer of 2 to 3 us each, without CUDA
# graphs.
_LAUNCHES = 25e-6
# Copies of several MB reach about 78 % of the line rate of PCIe x16, as in pqbench.store.link.emulated.
_PCIE4, _PCIE5, _PCIE_LATENCY = 24.6e9, 49.2e9, 10e-6

HARDWARE: Mapping[str, Hardware] = MappingProxyType(
    {
        # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM, without sparsity.
        "a100": Hardware(
            "A100 80GB SXM",
            2.039e12,
            {"float32": 19.5e12, "bfloat16": 312e12, "float16": 312e12},
            19.5e12,
            _PCIE4,
            _PCIE_LATENCY,
            _LAUNCHES,
            _LAUNCHES,
            80e9,
        ),
        # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM; the sheet's 1,979 TFLOPS are with sparsity.
        "h100": Hardware(
            "H100 SXM",
            3.35e12,
            {"float32": 67e12, "bfloat16": 989.4e12, "float16": 989.4e12},
            67e12,
            _PCIE5,
            _PCIE_LATENCY,
            _LAUNCHES,
            _LAUNCHES,
            80e9,
        ),
        # NVIDIA Ada GPU architecture white paper, appendix A: FP16 and BF16 with FP32 accumulation, without sparsity.
        "rtx4090": Hardware(
            "RTX 4090",
            1.008e12,
            {"float32": 82.6e12, "bfloat16": 165.2e12, "float16": 165.2e12},
            82.6e12,
            _PCIE4,
            _PCIE_LATENCY,
            _LAUNCHES,
            _LAUNCHES,
            24e9,
        ),
    }
)


@dataclass(frozen=True)
class ModelShape:
    """The shape of a Llama-like decoder with gated feed-forward layers and RMS norms. If ``tied``, the embedding and
    the output layer share one matrix."""

    name: str
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    feed_forward: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of all layers."""
        queries, keys = self.query_heads * self.head_dim, self.kv_heads * self.head_dim
        projections = self.hidden * (2 * queries + 2 * keys) + self.qkv_bias * (queries + 2 * keys)
        return self.layers * (projections + 3 * self.hidden * self.feed_forward + 2 * self.hidden)

    @property
    def parameters(self) -> int:
        """Number of all parameters."""
        return self.step_parameters + (0 if self.tied else self.hidden * self.vocabulary)

    @property
    def step_parameters(self) -> int:
        """Number of parameters that one decode step reads: all except an input embedding that the output layer does not
        share."""
        return self.layer_parameters + self.hidden + self.hidden * self.vocabulary

    def row_bytes(self, dtype: str) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _item_size(dtype)


# From the config.json of the models that conf/model names.
MODELS: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            ModelShape("llama31_8b", 32, 32, 8, 128, 4096, 14336, 128256),
            ModelShape("mistral_7b", 32, 32, 8, 128, 4096, 14336, 32000),
            ModelShape("qwen25_7b", 28, 28, 4, 128, 3584, 18944, 152064, qkv_bias=True),
            ModelShape("smollm2", 30, 9, 3, 64, 576, 1536, 49152, tied=True),
        )
    }
)


@dataclass(frozen=True)
class MethodProfile:
    """What one decode step of a method reads, per cached token. :func:`pqbench.costs.fit.profile` derives it from
    records, and :func:`product_quantised` derives it from settings.

    Attributes:
        attended: attended tokens as a share of the cached tokens.
        index_bytes: bytes of index read per cached token, layer and KV head.
        fetched: share of the attended rows that cross the link in a step.
        on_host: whether KV lies on the host; the prefill then offloads it.
        build: operations to build the index, per prompt token, layer and KV head.
    """

    attended: float = 1.0
    index_bytes: float = 0.0
    fetched: float = 0.0
    on_host: bool = False
    build: float = 0.0


def product_quantised(
    m: int, b: int, attended: float, head_dim: int, iterations: int = 5, fetched: float = 0.5
) -> MethodProfile:
    """The profile of a method with KV on the host and product-quantised keys: each key has m codes of one byte.

    K-Means compares each key with 2**b centroids of D / m dimensions in each of m sub-spaces. It does so ``iterations``
    times, and once more for the codes: 2 * 2**b * D * (iterations + 1) operations per key. ``fetched`` is 0.5 if half
    of the budget is the window, which stays on the device.
    """
    return MethodProfile(attended, float(m), fetched, True, 2.0 * 2**b * head_dim * (iterations + 1))


@dataclass(frozen=True)
class StepCost:
    """What one decode step of the whole batch moves and computes."""

    read_bytes: float  # weights, attended keys and values
    operations: float  # matrix products and attention
    index_bytes: float
    index_operations: float
    link_bytes: float


def step_cost(
    shape: ModelShape, method: MethodProfile, context: float, batch: int = 1, dtype: str = "bfloat16"
) -> StepCost:
    """Bytes and operations of a step at ``context`` cached tokens.

    The P weights are read once for the batch: P * itemsize bytes. KV takes B * attended * S * 2 * L * H * D * itemsize
    bytes. The weights take 2 * B * P operations, and q.k and the sum of values take 4 * B * attended * S * L * Hq * D.
    Scoring takes one operation per index byte and query head of the query group, which is the table look-up for a code.
    """
    attended = batch * method.attended * context
    index = batch * context * shape.layers * shape.kv_heads * method.index_bytes
    rows = attended * shape.row_bytes(dtype)
    return StepCost(
        shape.step_parameters * _item_size(dtype) + rows,
        2.0 * batch * shape.step_parameters + 4.0 * attended * shape.layers * shape.query_heads * shape.head_dim,
        index,
        index * shape.query_heads / shape.kv_heads,
        method.fetched * rows,
    )


def tpot(
    hardware: Hardware,
    shape: ModelShape,
    method: MethodProfile,
    context: float,
    batch: int = 1,
    dtype: str = "bfloat16",
) -> float:
    """Seconds of one decode step.

    max(read bytes / bandwidth, operations / peak) + max(index bytes / bandwidth, index operations / vector) + link
    bytes / link bandwidth + L * (layer overhead, + select overhead with an index, + link latency with rows to fetch).
    Fetching is added and does not overlap, because the rows to fetch are only known after the selection.
    """
    cost = step_cost(shape, method, context, batch, dtype)
    dense = max(cost.read_bytes / hardware.bandwidth, cost.operations / _peak(hardware, dtype))
    scan = max(cost.index_bytes / hardware.bandwidth, cost.index_operations / hardware.vector)
    fixed = hardware.layer_overhead
    fixed += hardware.select_overhead if method.index_bytes else 0.0
    fixed += hardware.link_latency if method.fetched else 0.0
    return dense + scan + cost.link_bytes / hardware.link_bandwidth + shape.layers * fixed


def prefill_operations(shape: ModelShape, context: float, batch: int = 1) -> float:
    """Operations of a dense causal prefill: 2 B S P for the P parameters of the layers, 2 B hidden * vocabulary for the
    logits of the last position, and 2 B L Hq D S (S + 1) for attention, of which causality leaves half."""
    attention = 2.0 * shape.layers * shape.query_heads * shape.head_dim * context * (context + 1)
    return batch * (2.0 * context * shape.layer_parameters + 2.0 * shape.hidden * shape.vocabulary + attention)


def ttft(
    hardware: Hardware,
    shape: ModelShape,
    method: MethodProfile,
    context: float,
    batch: int = 1,
    dtype: str = "bfloat16",
) -> float:
    """Seconds to the first token if the prompt is prefilled in one shot.

    max(operations / peak, (weights + KV) / bandwidth, KV / link bandwidth if offloaded) + L * layer overhead.
    Offloading overlaps with the layers. Building the index adds its operations if it shares the model's cores
    (``builds_apart`` is False), and otherwise adds nothing.
    """
    rows = batch * context * shape.row_bytes(dtype)
    operations = prefill_operations(shape, context, batch)
    if not hardware.builds_apart:
        operations += batch * context * shape.layers * shape.kv_heads * method.build
    busy = max(
        operations / _peak(hardware, dtype),
        (shape.step_parameters * _item_size(dtype) + rows) / hardware.bandwidth,
        rows / hardware.link_bandwidth if method.on_host else 0.0,
    )
    return busy + shape.layers * hardware.layer_overhead


def device_bytes(
    shape: ModelShape, method: MethodProfile, context: float, batch: int = 1, dtype: str = "bfloat16"
) -> float:
    """Bytes that decoding keeps on the device: weights, index and KV. If KV lies on the host, only the attended rows
    that are not fetched and the fetched rows of one layer are on the device. Activations are not counted."""
    stays = method.attended * (1 - method.fetched + method.fetched / shape.layers) if method.on_host else 1.0
    held = stays * shape.row_bytes(dtype)
    held += shape.layers * shape.kv_heads * method.index_bytes
    return shape.parameters * _item_size(dtype) + batch * context * held


def fits(
    hardware: Hardware,
    shape: ModelShape,
    method: MethodProfile,
    context: float,
    batch: int = 1,
    dtype: str = "bfloat16",
) -> bool:
    """Whether :func:`device_bytes` fit into the device's memory."""
    return hardware.memory is None or device_bytes(shape, method, context, batch, dtype) <= hardware.memory


def model_shape(name: str) -> ModelShape:
    """The shape of the model with this name. Raises ConfigError when there is none."""
    if name not in MODELS:
        raise ConfigError(f"the latency model does not know the shape of {name!r}: it knows {', '.join(MODELS)}")
    return MODELS[name]


def _item_size(dtype: str) -> int:
    if dtype not in ITEM_SIZE:
        raise ConfigError(f"the latency model does not know dtype {dtype!r}: it knows {', '.join(ITEM_SIZE)}")
    return ITEM_SIZE[dtype]


def _peak(hardware: Hardware, dtype: str) -> float:
    if dtype not in hardware.peak:
        raise ConfigError(f"{hardware.name} has no peak for {dtype!r}: it has {', '.join(hardware.peak)}")
    return hardware.peak[dtype]
