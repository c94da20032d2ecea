"""How prompts run on a device with streams: tested on the CPU with streams that only keep a log."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from methods.pqcache import PQCache
from pqbench.engine.decode import Generation, decode, generate
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError
from pqbench.method import KV, Budget, Check, Geometry, LayerState, Method, Selection
from pqbench.store.tiers import DeviceTier, HostTier, Tier
from tests.engine.streams import Streams
from tests.engine.test_generation import SMALL, methods
from tests.support import left_padded, prompt_of

PLAIN = Setting(overlap=False)
NEW = 12


def queued(overlap: bool = True, tier: Tier | None = None, lag: int | None = None) -> tuple[Setting, Streams]:
    """A setting whose device has such streams, and their log."""
    streams = Streams(lag)
    return Setting(DeviceTier() if tier is None else tier, overlap, streams=streams), streams


@dataclass(frozen=True)
class Watcher(Method):
    """Full attention that logs when its parts are queued; ``sound`` is the result of the check of its index."""

    streams: Streams
    sound: bool = True

    def layer(self, geometry: Geometry) -> LayerState:
        return WatcherState(self, geometry)


class WatcherState(LayerState):
    """See :class:`Watcher`."""

    def __init__(self, method: Watcher, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method, self.streams = method, method.streams
        self.learnt: dict[str, Tensor] = {}
        self.holds: Tensor | None = None

    def observe(self, q: Tensor, keys: Tensor, values: Tensor) -> None:
        self.streams.note("observes", self.geometry.layer)
        self.learnt["sum"] = keys.sum(2)

    def finish_prefill(self, kv: KV) -> None:
        self.streams.note("builds", self.geometry.layer)
        self.learnt = {}
        self.holds = torch.tensor(self.method.sound)

    def select(self, q: Tensor, kv: KV) -> Selection:
        self.streams.note("selects", self.geometry.layer)
        return Selection()

    @property
    def checks(self) -> list[Check]:
        return [] if self.holds is None else [Check(self.holds, f"layer {self.geometry.layer} is unsound")]


def ran(model: PreTrainedModel, method: Method, setting: Setting, new: int = NEW, **options: Any) -> Generation:
    """Decode after a prompt of 90 tokens."""
    prefilled = prefill(model, prompt_of(90, seed=4), [method], setting=setting)
    generation = decode(prefilled, 0, new, **options)
    generation.settle()
    prefilled.close()
    return generation


@pytest.mark.parametrize("tier", [DeviceTier(), HostTier(link="local"), HostTier(link="local", debug=True)])
@pytest.mark.parametrize("name", list(methods(SMALL)))
def test_queues_change_no_token(llama: PreTrainedModel, name: str, tier: Tier) -> None:
    method = methods(SMALL)[name]
    expected = ran(llama, method, replace(PLAIN, tier=tier))
    for overlap in (False, True):
        setting, _ = queued(overlap, tier)
        generation = ran(llama, method, setting, spend=True)
        assert torch.equal(generation.tokens, expected.tokens)
        assert [meter.steps for meter in generation.meters()] == [meter.steps for meter in expected.meters()]
        assert [meter.attended for meter in generation.meters()] == [meter.attended for meter in expected.meters()]
        assert [g.store.usage.link_bytes for g in generation.cohorts()] == [
            g.store.usage.link_bytes for g in expected.cohorts()
        ]
        assert min(generation.steps_s) > 0
        assert generation.ttft_s > 0
        assert generation.build_s > 0


def test_an_index_is_built_on_the_side_and_used_after_it_is_done(llama: PreTrainedModel) -> None:
    setting, streams = queued()
    ran(llama, Watcher(streams), setting, 3)
    for layer in range(2):
        build = streams.log.index(("builds", "side", layer))
        # The side stream first waits for the work that made the layer's keys.
        waits = max(i for i, entry in enumerate(streams.log[:build]) if entry[:2] == ("waits", "side"))
        made = streams.log.index(("records", "main", streams.log[waits][2]))
        assert streams.log.index(("observes", "main", layer)) < made < waits
        # An event marks the end of the build, and the first use of the layer waits for it.
        select = streams.log.index(("selects", "main", layer))
        done = [e[2] for e in streams.log[build:] if e[:2] == ("records", "side")]
        waited = [e[2] for e in streams.log[build:select] if e[:2] == ("waits", "main")]
        assert set(waited) & set(done)
    assert streams.log.index(("builds", "side", 0)) < streams.log.index(("observes", "main", 1))


def test_the_host_waits_for_nothing_while_it_queues_a_prompt_or_steps(llama: PreTrainedModel) -> None:
    setting, streams = queued()
    ran(llama, Watcher(streams), setting, NEW)
    places = {what: [i for i, e in enumerate(streams.log) if e[0] == what] for what in ("builds", "selects")}
    waits = [i for i, e in enumerate(streams.log) if e[0] == "synchronises"]
    assert waits
    assert not [i for i in waits if i < places["builds"][-1]]
    assert not [i for i in waits if places["selects"][0] < i < places["selects"][-1]]
    assert streams.queries == 0


def test_what_an_index_is_built_of_is_lent_to_its_stream(llama: PreTrainedModel) -> None:
    setting, streams = queued()
    ran(llama, Watcher(streams), setting, 2)
    assert streams.lent.count((1, 2, 90, 16)) == 4  # keys and values of both layers
    assert streams.lent.count((1, 2, 16)) == 2  # what was learnt, and let go of while the index was built


def test_several_methods_build_on_the_callers_stream(llama: PreTrainedModel) -> None:
    setting, streams = queued()
    both = [Watcher(streams), Watcher(streams)]
    prefilled = prefill(llama, prompt_of(60), both, setting=setting)
    decode(prefilled, 0, 2)
    assert {entry[1] for entry in streams.log if entry[0] == "builds"} == {"main"}


@pytest.mark.parametrize("overlap", [False, True])
def test_an_unsound_index_is_found_without_waiting_in_the_prefill(llama: PreTrainedModel, overlap: bool) -> None:
    setting, streams = queued(overlap)
    prefilled = prefill(llama, prompt_of(60), [Watcher(streams, sound=False)], setting=setting)
    with pytest.raises(ConfigError, match="layer 0 is unsound"):
        decode(prefilled, 0, 3)
    with pytest.raises(ConfigError, match="layer 0 is unsound"):
        prefilled.build(0)


def test_an_unsound_index_is_refused_at_once_where_nothing_is_queued(llama: PreTrainedModel) -> None:
    streams = Streams()
    prefilled = prefill(llama, prompt_of(60), [Watcher(streams, sound=False)], setting=PLAIN)
    with pytest.raises(ConfigError, match="layer 0 is unsound"):
        decode(prefilled, 0, 3)
    assert not [entry for entry in streams.log if entry[0] == "selects"]


def test_phases_are_timed_in_a_few_steps_which_the_time_of_a_step_leaves_out(llama: PreTrainedModel) -> None:
    generation = ran(llama, PQCache(SMALL, m=2, b=3), queued()[0], 20)  # 19 steps
    assert generation.phased == {1, 9, 17}
    assert [meter.timed for meter in generation.meters()] == [3, 3]
    assert all(set(meter.seconds) and min(meter.seconds.values()) > 0 for meter in generation.meters())
    usual = [seconds for i, seconds in enumerate(generation.steps_s) if i not in {0, 1, 9, 17}]
    assert generation.usual_steps_s == usual
    # In the log an event takes a millisecond; only the timed steps count, with ten events in each of two layers.
    assert generation.tpot_s == pytest.approx(1e-3)
    assert generation.steps_s[9] == pytest.approx(21e-3)
    plain = ran(llama, PQCache(SMALL, m=2, b=3), PLAIN, 20)
    assert plain.phased == frozenset()
    assert [meter.timed for meter in plain.meters()] == [19, 19]
    assert plain.usual_steps_s == plain.steps_s[1:]


class Reads(TorchFunctionMode):
    """Counts how often the host reads a tensor's value, since each read would wait for a GPU."""

    NAMES = ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "nonzero", "numpy", "equal", "cpu")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += getattr(func, "__name__", "") in self.NAMES
        return func(*args, **(kwargs or {}))


def reads_of_a_step(prefilled: Prefilled, **options: Any) -> float:
    """The number of reads in one further decode step, over all layers."""
    counts = []
    for new in (4, 24):
        with Reads() as reads:
            decode(prefilled, 0, new, **options)
        counts.append(reads.count)
    return (counts[1] - counts[0]) / 20


WITHOUT = [
    "full",
    "oracle",
    "streaming_llm",
    "h2o",
    "sparq",
    "infllm",
    "pqcache",
    "snapkv",
    "pyramidkv",
    "quest",
    "tova",
    "pqcache_plus",
    "pqcache_plus sampled",
    "vattention",
]


@pytest.mark.parametrize("name", WITHOUT)
def test_a_step_reads_nothing_unless_an_end_may_come(model: PreTrainedModel, name: str) -> None:
    method = methods(Budget(sink=4, tokens=40, ratio=None))[name]
    ids, mask = left_padded(prompt_of(90, 1), prompt_of(120, 2))
    setting = Setting(backend="cpu", overlap=False, streams=Streams())
    for prompt, valid in ((ids[1:], None), (ids, mask)):
        prefilled = prefill(model, prompt, [method], valid, setting=setting)
        chosen = set(decode(prefilled, 0, 24).tokens.flatten().tolist())
        padded_sliding = valid is not None and len(prefilled.sliding) > 0  # transformers looks at the mask there
        assert reads_of_a_step(prefilled) == padded_sliding
        ended = copy.deepcopy(model.generation_config)
        ended.eos_token_id = min(set(range(128)) - chosen)  # an end that does not come
        assert reads_of_a_step(prefilled, config=ended) == 1 + padded_sliding
        assert reads_of_a_step(prefilled, config=ended, min_new_tokens=24) == padded_sliding


def test_ends_are_noticed_in_the_step_they_come(llama: PreTrainedModel) -> None:
    ids = prompt_of(90)
    free = generate(llama, ids, methods(SMALL)["pqcache"], max_new_tokens=NEW)[0].tolist()
    config = copy.deepcopy(llama.generation_config)
    for place, token in enumerate(free):
        config.eos_token_id = token
        for least in range(place + 1):
            prefilled = prefill(llama, ids, [methods(SMALL)["pqcache"]], setting=queued()[0])
            tokens = decode(prefilled, 0, NEW, least, config=config).tokens[0].tolist()
            if least <= free.index(token):
                assert tokens == free[: free.index(token) + 1]


def test_codes_in_host_memory_come_over_without_the_host(llama: PreTrainedModel) -> None:
    method = PQCache(Budget(sink=4, tokens=40, ratio=None), m=2, b=4, codes_on="host")
    setting = Setting(backend="cpu", overlap=False, streams=Streams())
    prefilled = prefill(llama, prompt_of(120, 2), [method], setting=setting)
    decode(prefilled, 0, 2)
    assert reads_of_a_step(prefilled) == 0
