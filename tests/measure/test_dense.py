"""Dense kernels: every back-end of torch has a row, a refusal has a reason, and a timed step only computes."""

from __future__ import annotations

import gc
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from methods.full import Full
from methods.pqcache import PQCache
from pqbench.engine.setting import Setting
from pqbench.kernels import reference
from pqbench.measure import dense
from pqbench.measure.base import Job
from pqbench.measure.dense import BACKENDS, DenseKernel, RefusedError, WithDense, dense_kernels
from pqbench.measure.geometries import SHAPES
from pqbench.measure.layer import attention
from pqbench.measure.layer.attention import Attention
from pqbench.measure.layer.turns import Layer, Subject
from pqbench.measure.source import on, synthetic
from pqbench.method import Method
from pqbench.progress.runs import read_runs
from pqbench.store.device import DeviceStore
from pqbench.store.tiers import DeviceTier, HostTier
from tests.measure.conftest import Run
from tests.measure.test_attention import SMALL, rows
from tests.support import softmax

GPU = torch.device("cuda")
METHODS: dict[str, Method] = {"full": Full(), "pqcache": PQCache(m=2, b=4)}
FORMS = ("grouped", "enable_gqa")


def tensors(group: int = 3) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries ``[2, 2, G, 16]``, keys and values ``[2, 2, 40, 16]``."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 2, group, 16), (2, 2, 40, 16), (2, 2, 40, 16)]
    q, keys, values = (torch.randn(*shape, generator=generator) for shape in shapes)
    return q, keys, values


def by_name(group: int = 3) -> dict[str, DenseKernel]:
    return {kernel.name: kernel for kernel in dense_kernels(reference, group, GPU)}


def test_a_gpu_has_a_kernel_for_every_backend_and_form() -> None:
    assert {f"torch sdpa {b.name} {form}" for b in BACKENDS for form in FORMS} <= set(by_name())
    on_cpu = [kernel.name for kernel in dense_kernels(reference, 3, torch.device("cpu"))]
    assert on_cpu == ["torch sdpa grouped", "torch sdpa enable_gqa"]  # old records go on under these names


@pytest.mark.parametrize("name", ["math grouped", "math enable_gqa", "flash grouped"])
def test_a_backend_computes_full_attention(name: str) -> None:
    q, keys, values = tensors()
    kernel = by_name()[f"torch sdpa {name}"]
    kernel.check(q, keys, values, 0.3)
    with kernel.chosen():
        output = kernel.run(q, keys, values, 0.3)
    logits = np.einsum("bhgd,bhsd->bhgs", q.double().numpy(), keys.double().numpy()) * 0.3
    expected = np.einsum("bhgs,bhsd->bhgd", softmax(logits), values.double().numpy())
    assert np.allclose(output.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_backend_that_is_not_there_refuses(form: str) -> None:
    with pytest.raises(RefusedError, match=f"torch sdpa cudnn {form}: No "):
        by_name()[f"torch sdpa cudnn {form}"].check(*tensors(), 0.3)


def test_only_copies_of_keys_and_values_need_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "available_bytes", lambda _: 1)
    q, keys, values = tensors()
    by_name()["torch sdpa flash grouped"].check(q, keys, values, 0.3)
    for name in ("math grouped", "math enable_gqa", "efficient enable_gqa"):
        with pytest.raises(MemoryError, match="copies"):
            by_name()[f"torch sdpa {name}"].check(q, keys, values, 0.3)


def test_refused_kernels_are_rows_and_the_fastest_of_the_others_is_named(
    measure: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(attention, "dense_kernels", lambda backend, group, _: dense_kernels(backend, group, GPU))
    done, records = measure(Attention(**SMALL), METHODS)
    full = rows(records, "full")
    refused = {r["kernel"]: r["reason"] for r in full if r["status"] == "refused"}
    assert {"torch sdpa cudnn grouped", "torch sdpa efficient grouped"} <= set(refused)
    assert all("kernel" in reason for reason in refused.values())
    good = [r for r in full if r["status"] == "ok"]
    assert {"torch sdpa grouped", "torch sdpa math grouped"} <= {r["kernel"] for r in good}
    assert len(refused) + len(good) == len(full) == 2 + 2 * len(BACKENDS)
    fastest = min(good, key=lambda r: r["total_s"])
    for record in [*good, *rows(records, "pqcache")]:
        assert record["fastest_dense"] == fastest["kernel"]
        assert record["dense_ratio"] == pytest.approx(fastest["total_s"] / record["total_s"])
    assert done.failures == []
    again, _ = measure(Attention(**SMALL), METHODS)
    assert (again.measured, again.resumed, again.failures) == (0, len(full) + 1, [])
    assert all(run.failed == 0 for run in read_runs(tmp_path))


def test_a_timed_step_asks_for_no_memory_and_collects_no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = SHAPES["tiny"]
    layer = Layer(shape, torch.float32, 64, 4, synthetic(shape, 0), torch.device("cpu"), Setting(backend="reference"))
    collecting: list[bool] = []
    run = dense_kernels(reference, shape.group, torch.device("cpu"))[1]

    def noted(*arguments: Any) -> torch.Tensor:
        collecting.append(gc.isenabled())
        return run.run(*arguments)

    subject = Subject("full", "x", "all", dense=DenseKernel("x", noted, copies=shape.group))
    subject.build(layer)
    monkeypatch.setattr(dense, "available_bytes", lambda _: pytest.fail("asked inside a step"))
    for number in range(4):
        subject.take_turn(layer, number)
    assert len(subject.steps) == 4
    assert set(collecting[1:]) == {False}
    assert gc.isenabled()


def test_where_rows_are_counted_on_the_device_the_body_computes() -> None:
    asked: list[Any] = []

    class Backend:
        __name__ = "pqbench.kernels.some"

        def dense_attention(self, *arguments: Any) -> str:
            asked.append(arguments)
            return "by the backend"

    backend: Any = Backend()
    replaced: Any = WithDense(backend, DenseKernel("other", lambda *_: torch.zeros(1)))
    assert replaced.dense_attention(1, 2, 3, 0.5, 7) == "by the backend"
    assert asked == [(1, 2, 3, 0.5, 7)]
    assert torch.equal(replaced.dense_attention(1, 2, 3, 0.5), torch.zeros(1))
    assert torch.equal(replaced.dense_attention(1, 2, 3, 0.5, None), torch.zeros(1))


@pytest.mark.parametrize("name", ["block", "decoded", "last_queries"])
def test_a_source_makes_its_rows_where_its_tensors_are(name: str) -> None:
    """Meta tensors cannot be combined with tensors of another device, like tensors of a GPU."""
    source = on(synthetic(SHAPES["tiny"], 0), torch.device("meta"))
    makers: dict[str, Any] = {"block": partial(source.block, 3), "decoded": source.decoded}
    made = makers.get(name, source.last_queries)(100)
    assert {x.device.type for x in (made if isinstance(made, tuple) else (made,))} == {"meta"}


def test_a_layer_is_made_on_its_device() -> None:
    shape = SHAPES["tiny"]
    layer = Layer(
        shape, torch.bfloat16, 5000, 2, synthetic(shape, 0), torch.device("meta"), Setting(backend="reference")
    )
    assert {x.device.type for x in (layer.keys.view(), layer.values.view(), *layer.token(1))} == {"meta"}
    assert layer.keys.view().shape == (1, 2, 5000, 16)


def test_rows_are_the_same_on_every_device() -> None:
    """Random numbers are drawn on the CPU, so a seed gives the same layer on every device."""
    source = synthetic(SHAPES["tiny"], 0)
    keys, values = source.block(1, 50)
    again = on(source, torch.device("cpu")).block(1, 50)
    assert torch.equal(keys, again[0])
    assert torch.equal(values, again[1])


def test_on_a_gpu_full_attention_reads_the_device_whatever_the_store(measure: Run) -> None:
    benchmark, setting = Attention(**{**SMALL, "device": "cpu"}), Setting(HostTier(), backend="reference")
    job = Job(None, METHODS, {}, setting)
    condition = attention.Condition("float32", 64, 0.5)
    benchmark.device = "cuda"  # nothing runs; only the choice of subjects is tested
    subjects = list(benchmark._subjects(job, condition, ["full"], reference))  # type: ignore[arg-type]
    assert {type(subject.tier) for subject in subjects} == {DeviceTier}
    layer = Layer(SHAPES["tiny"], torch.float32, 64, 2, synthetic(SHAPES["tiny"], 0), torch.device("cpu"), setting)
    subject = Subject("full", "x", "all", dense=subjects[0].dense, tier=subjects[0].tier)
    assert isinstance(subject.build(layer).store, DeviceStore)
    subject.close()
