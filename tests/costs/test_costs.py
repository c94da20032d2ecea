"""The latency model against numbers worked out by hand; and its fit, which must recover the machine behind given
records."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pqbench.costs.fit import FIELDS, fit_machine
from pqbench.costs.model import (
    HARDWARE,
    MODELS,
    Hardware,
    MethodProfile,
    ModelShape,
    device_bytes,
    fits,
    model_shape,
    product_quantised,
    step_cost,
    tpot,
    ttft,
)
from pqbench.errors import ConfigError, DataError
from pqbench.measure.geometries import SHAPES

# 2 layers, 2 query heads and 1 KV head of 4 dimensions, hidden 8, feed-forward 10, 16 words, tied.
TOY = ModelShape("toy", 2, 2, 1, 4, 8, 10, 16, tied=True)
# 1000 B/s, 1e4 operations/s, 500 scans/s, link 100 B/s + 0.5 s, 0.25 s per layer, 0.125 s to select; 20 kB.
MACHINE = Hardware("toy", 1000.0, {"float32": 1e4}, 500.0, 100.0, 0.5, 0.25, 0.125, 2e4, builds_apart=False)
QUANTISED = MethodProfile(attended=0.25, index_bytes=2.0, fetched=0.5, on_host=True, build=3.0)
DENSE = MethodProfile()


def test_parameters_are_those_the_models_publish() -> None:
    # https://huggingface.co: "Model size" of the safetensors files, exact.
    assert MODELS["llama31_8b"].parameters == 8_030_261_248
    assert MODELS["mistral_7b"].parameters == 7_241_732_096
    assert MODELS["qwen25_7b"].parameters == 7_615_616_512
    assert MODELS["smollm2"].parameters == 134_515_008


def test_shapes_agree_with_those_of_the_attention_benchmark() -> None:
    for name, shape in MODELS.items():
        other = SHAPES[name]
        assert (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim) == (
            other.layers,
            other.query_heads,
            other.kv_heads,
            other.head_dim,
        )


def test_a_step_by_hand() -> None:
    # Layer: 8 * (2 * 8 + 2 * 4) = 192, 3 * 8 * 10 = 240, norms 16: 448. Two: 896. Final norm 8, output 128: 1032.
    assert (TOY.layer_parameters, TOY.step_parameters, TOY.parameters) == (896, 1032, 1032)
    assert replace(TOY, tied=False).parameters == 1160
    assert replace(TOY, qkv_bias=True).layer_parameters == 896 + 2 * (8 + 4 + 4)
    assert TOY.row_bytes("float32") == 64  # 2 (K, V) * 2 layers * 1 head * 4 * 4 B
    cost = step_cost(TOY, QUANTISED, 100, 1, "float32")
    assert cost.read_bytes == 1032 * 4 + 25 * 64
    assert cost.operations == 2 * 1032 + 4 * 25 * 2 * 2 * 4
    assert cost.index_bytes == 100 * 2 * 1 * 2
    assert cost.index_operations == 400 * 2
    assert cost.link_bytes == 0.5 * 25 * 64
    # read 5.728 s against 0.3664 s of arithmetic; scan 0.4 s against 1.6 s; link 8 s; 2 layers * (0.25 + 0.125 + 0.5).
    assert tpot(MACHINE, TOY, QUANTISED, 100, 1, "float32") == pytest.approx(5.728 + 1.6 + 8 + 1.75)
    assert tpot(MACHINE, TOY, DENSE, 100, 1, "float32") == pytest.approx((4128 + 6400) / 1000 + 0.5)


def test_a_prefill_by_hand() -> None:
    # 2 * 10 * 896 + 2 * 8 * 16 + attention 2 * 2 layers * 2 heads * 4 * 10 * 11 = 17920 + 256 + 3520 = 21696.
    assert ttft(MACHINE, TOY, DENSE, 10, 1, "float32") == pytest.approx((4128 + 640) / 1000 + 0.5)  # memory-bound
    slow = replace(MACHINE, peak={"float32": 1e3})
    assert ttft(slow, TOY, DENSE, 10, 1, "float32") == pytest.approx(21.696 + 0.5)
    built = 10 * 2 * 1 * 3 / 1e3
    assert ttft(slow, TOY, QUANTISED, 10, 1, "float32") == pytest.approx(21.696 + built + 0.5)
    apart = replace(slow, builds_apart=True)
    assert ttft(apart, TOY, QUANTISED, 10, 1, "float32") == pytest.approx(21.696 + 0.5)
    narrow = replace(apart, link_bandwidth=10.0)  # 640 bytes to the host take longer than the layers
    assert ttft(narrow, TOY, QUANTISED, 10, 1, "float32") == pytest.approx(64 + 0.5)
    assert ttft(narrow, TOY, DENSE, 10, 1, "float32") == pytest.approx(21.696 + 0.5)


def test_memory_by_hand() -> None:
    assert device_bytes(TOY, DENSE, 100, 2, "float32") == 4128 + 2 * 6400
    held = 0.25 * (0.5 + 0.5 / 2) * 64 + 2 * 1 * 2  # rows that stay, fetched rows of one of two layers; index
    assert device_bytes(TOY, QUANTISED, 100, 2, "float32") == pytest.approx(4128 + 200 * held)
    assert fits(MACHINE, TOY, DENSE, 100, 2, "float32")
    assert not fits(MACHINE, TOY, DENSE, 100, 3, "float32")
    assert fits(replace(MACHINE, memory=None), TOY, DENSE, 100, 3000, "float32")


@pytest.mark.parametrize("name", sorted(HARDWARE))
@pytest.mark.parametrize("model", sorted(MODELS))
def test_longer_contexts_and_larger_batches_never_take_less(name: str, model: str) -> None:
    method = product_quantised(2, 6, 0.2, MODELS[model].head_dim)
    for profile in (DENSE, method, replace(DENSE, on_host=True, fetched=1.0)):
        for predict in (ttft, tpot):
            by_context = [predict(HARDWARE[name], MODELS[model], profile, 2**i) for i in range(10, 21)]
            by_batch = [predict(HARDWARE[name], MODELS[model], profile, 32768, 2**i) for i in range(7)]
            for times in (by_context, by_batch):
                assert all(a < b for a, b in pairwise(times))


def test_a_batch_shares_the_weights_and_nothing_else() -> None:
    hardware, shape = replace(HARDWARE["h100"], layer_overhead=0.0), MODELS["llama31_8b"]
    one, many = (tpot(hardware, shape, DENSE, 32768, batch) for batch in (1, 8))
    weights = 2 * shape.step_parameters / hardware.bandwidth
    assert many - weights == pytest.approx(8 * (one - weights))
    one, many = (ttft(hardware, shape, DENSE, 32768, batch) for batch in (1, 8))
    assert many == pytest.approx(8 * one)


def test_product_quantised_by_hand() -> None:
    # Two codes of a byte; 64 centroids, 2 * 64 * 128 operations per key and pass, five iterations and one to encode.
    profile = product_quantised(2, 6, 0.1, 128)
    assert (profile.index_bytes, profile.build, profile.on_host) == (2.0, 2 * 64 * 128 * 6, True)


def test_unknown_names_say_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"'gpt'.*llama31_8b"):
        model_shape("gpt")
    with pytest.raises(ConfigError, match=r"float8.*bfloat16"):
        tpot(MACHINE, TOY, DENSE, 10, 1, "float8")
    with pytest.raises(ConfigError, match=r"toy has no peak.*float32"):
        tpot(MACHINE, TOY, DENSE, 10, 1, "bfloat16")


def made_by(machine: Hardware, contexts: tuple[int, ...], host: bool = True, stretch: float = 1.0) -> pd.DataFrame:
    """Records that the given machine would make, computed from the definition of a step; ``stretch`` multiplies the
    times of the second and fourth context."""
    rows = []
    for i, context in enumerate(contexts):
        for method, share, index, fetched, build in (("full", 1.0, 0, 1.0, 0), ("pq", 0.25, 4, 0.5, 5000)):
            length, factor = context + 16, stretch if i % 2 else 1.0
            kv = share * length * 2 * 30 * 3 * 64 * 4
            fetch = fetched * kv / machine.link_bandwidth + 30 * machine.link_latency if host else 0.0
            indexed = length * 90 * index
            select = indexed * 3 / machine.vector + 30 * machine.select_overhead * bool(index)
            model = 134515008 * 4 / machine.bandwidth + 30 * machine.layer_overhead
            attend = kv / machine.bandwidth
            built = context * 90 * build / machine.peak["float32"]
            whole = (
                2 * context * (134515008 - 576 - 576 * 49152)
                + 2 * 576 * 49152
                + 2 * 30 * 9 * 64 * context * (context + 1)
            )
            prefill = whole / machine.peak["float32"] + built + 30 * machine.layer_overhead
            rows += [
                {
                    "method": method,
                    "context": context,
                    "prompt_tokens": context,
                    "new_tokens": 32,
                    "repeat": repeat,
                    "dtype": "float32",
                    "device": "toy",
                    "attended_tokens": share * length,
                    "index_bytes": indexed,
                    "index_build_s": built,
                    "to_device_bytes_step": fetched * kv if host else 0.0,
                    "host_bytes": 1.0 if host else 0.0,
                    "dense_step_s": model,
                    "attend_step_s": attend,
                    "fetch_step_s": fetch,
                    "select_step_s": select,
                    "append_step_s": 0.0,
                    "ttft_s": factor * prefill * late,
                    "tpot_s": factor * (model + attend + fetch + select) * late,
                }
                for repeat, late in enumerate((1.0, 1.0, 3.0))
            ]
    return pd.DataFrame(rows)


EXACT = Hardware("toy", 2e10, {"float32": 1e11}, 1e9, 5e9, 2e-4, 1e-3, 4e-4, None, builds_apart=False)


@pytest.mark.parametrize("host", [True, False])
def test_the_fit_finds_the_machine_that_made_the_records(host: bool) -> None:
    fit = fit_machine(made_by(EXACT, (1024, 2048, 4096, 8192), host), MODELS["smollm2"])
    found = fit.hardware
    assert found.bandwidth == pytest.approx(EXACT.bandwidth, rel=1e-3)
    assert found.vector == pytest.approx(EXACT.vector, rel=1e-3)
    assert found.select_overhead == pytest.approx(EXACT.select_overhead, rel=1e-3)
    assert found.layer_overhead == pytest.approx(EXACT.layer_overhead, rel=1e-2)
    assert found.peak["float32"] == pytest.approx(1e11, rel=1e-3)
    if host:
        assert found.link_bandwidth == pytest.approx(EXACT.link_bandwidth, rel=1e-3)
        assert found.link_latency == pytest.approx(EXACT.link_latency, rel=1e-2)
    quantised = fit.profiles["pq"]
    assert quantised.attended == pytest.approx(0.25)
    assert quantised.index_bytes == pytest.approx(4)
    assert (quantised.fetched, quantised.on_host) == (pytest.approx(0.5 if host else 0), host)
    assert quantised.build == pytest.approx(5000, rel=1e-3)
    assert fit.fitted == [1024, 4096]
    assert {check.context for check in fit.checks} == {2048, 8192}
    for field in FIELDS:
        assert fit.median_error(field) == pytest.approx(0, abs=1e-3)


def test_the_error_is_that_of_contexts_the_fit_did_not_see() -> None:
    table = made_by(EXACT, (1024, 2048, 4096, 8192), stretch=1.25)
    fit = fit_machine(table, MODELS["smollm2"])
    assert fit.median_error("tpot_s") == pytest.approx(0.2, abs=1e-3)  # predicts 1 where 1.25 was measured
    unseen = table[table["context"].isin([2048, 8192])]
    measured = unseen.groupby(["method", "context"])["tpot_s"].median().rename_axis([None, None])
    predicted = pd.Series({(c.method, c.context): c.predicted for c in fit.checks if c.field == "tpot_s"})
    by_hand = ((predicted - measured).abs() / measured).median()
    assert fit.median_error("tpot_s") == pytest.approx(by_hand)
    assert len(fit.checks) == 2 * 2 * len(FIELDS)


def test_two_contexts_leave_nothing_to_check_and_one_is_too_few() -> None:
    table = made_by(EXACT, (1024, 4096))
    fit = fit_machine(table, MODELS["smollm2"])
    assert (fit.fitted, fit.checks, fit.median_error("ttft_s")) == ([1024, 4096], [], None)
    with pytest.raises(DataError, match=r"two contexts"):
        fit_machine(table[table["context"] == 1024], MODELS["smollm2"])
    with pytest.raises(DataError, match=r"without fetch_step_s"):
        fit_machine(table.drop(columns="fetch_step_s"), MODELS["smollm2"])


def test_noise_gives_no_negative_constants() -> None:
    generator = np.random.default_rng(0)
    table = made_by(EXACT, (1024, 2048, 4096))
    times = [name for name in table if str(name).endswith("_s")]
    noisy: Any = table[times] * generator.uniform(0.5, 2.0, (len(table), len(times)))
    found = fit_machine(table.assign(**noisy), MODELS["smollm2"]).hardware
    assert min(found.bandwidth, found.vector, found.link_bandwidth, *found.peak.values()) > 0
    assert min(found.layer_overhead, found.select_overhead, found.link_latency) >= 0


def test_captured_steps_have_no_phases_and_do_not_enter_the_fit() -> None:
    run = made_by(HARDWARE["a100"], (4096, 16384))
    captured = run.assign(**dict.fromkeys(("dense_step_s", "attend_step_s", "select_step_s"), float("nan")))
    expected = fit_machine(run, MODELS["llama31_8b"])
    found = fit_machine(pd.concat([run, captured]), MODELS["llama31_8b"])
    assert found.hardware == expected.hardware
    with pytest.raises(DataError, match="two contexts"):
        fit_machine(captured, MODELS["llama31_8b"])
