"""Methods with one fault in their selection: decoding ends with an error that names method, layer and step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from methods.full import Full
from methods.oracle import Oracle
from methods.pqcache import PQCache
from methods.pyramidkv import PyramidKV
from methods.quest import Quest
from methods.snapkv import SnapKV
from pqbench import decode, prefill
from pqbench.engine.setting import Setting
from pqbench.errors import SelectionError
from pqbench.integrations.lm_eval import likelihood
from pqbench.measure.fidelity.forced import read_in_one_batch
from pqbench.measure.probe import probe
from pqbench.method import KV, Budget, Geometry, LayerState, Method, Selection
from tests.support import prompt_of, tiny_model

PROMPT, NEW = 512, 6
BUDGET = Budget(sink=4, tokens=64, ratio=None)
Choice = Callable[[Tensor, KV], Any]


def rows(q: Tensor, listed: list[int]) -> Tensor:
    """The same rows for every sequence and KV head, ``[B, H, n]``."""
    return torch.tensor(listed).expand(*q.shape[:2], -1)


def sound(q: Tensor, kv: KV) -> Selection:
    """A correct selection within the budget: the first and the last tokens."""
    return Selection(rows(q, [*range(32), *range(kv.length - 32, kv.length)]))


def drifting(q: Tensor, kv: KV) -> Selection:
    """Like :func:`sound` in the first two steps, then with one more token in every step."""
    extra = max(0, kv.length - PROMPT - 2)
    return Selection(rows(q, [*range(32 + extra), *range(kv.length - 32, kv.length)]))


def unseen(count: int) -> Choice:
    """300 rows of which a query head sees ``count``, so that the number of attended rows is known only on the
    device."""

    def choose(q: Tensor, kv: KV) -> Selection:
        visible = torch.arange(300) >= 300 - count
        return Selection(rows(q, list(range(kv.length - 300, kv.length))), visible.expand(*q.shape[:3], -1))

    return choose


class State(LayerState):
    """Selects by the function of its method."""

    def __init__(self, method: Faulty, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.method = method

    def select(self, q: Tensor, kv: KV) -> Selection:
        faulty = self.geometry.layer == self.method.where
        selection: Selection = (self.method.choice if faulty else sound)(q, kv)
        return selection


@dataclass(frozen=True)
class Faulty(Method):
    """Selects by a function in one layer, and soundly in the others."""

    choice: Choice = sound
    where: int = 1
    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return State(self, geometry)


class Hoarding(LayerState):
    """Keeps 64 rows of the prompt, and drops one in each of the first ``drops`` steps."""

    def __init__(self, method: Evicting, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.drops, self.kept = method.drops, method.kept

    def finish_prefill(self, kv: KV) -> Tensor:
        known = self.geometry
        return torch.arange(kv.length - self.kept, kv.length).expand(known.batch, known.kv_heads, -1)

    def attended(self, weights: Tensor | None, kv: KV) -> Tensor | None:
        self.drops -= 1
        known = self.geometry
        return torch.zeros(known.batch, known.kv_heads, 1, dtype=torch.long) if self.drops >= 0 else None


@dataclass(frozen=True)
class Evicting(Method):
    """An evicting method that forgets to evict."""

    evicts: ClassVar[bool] = True

    kept: int = 63
    drops: int = 0
    budget: Budget = field(default_factory=lambda: BUDGET)

    def layer(self, geometry: Geometry) -> LayerState:
        return Hoarding(self, geometry)


def run(method: Method, setting: Setting | None = None, new: int = NEW) -> Any:
    """Decode a prompt by one method."""
    prefilled = prefill(tiny_model("llama"), prompt_of(PROMPT), [method], setting=setting)
    return decode(prefilled, 0, new)


FAULTS: dict[str, tuple[Choice, str]] = {
    "None": (lambda *_: None, "select.. returned NoneType instead of a Selection"),
    "a tensor": (lambda q, kv: rows(q, [kv.length - 1]), "returned Tensor"),
    "rows of one dimension": (lambda _, kv: Selection(torch.arange(kv.length - 4, kv.length)), r"indices are \(4,\)"),
    "one head": (lambda _, kv: Selection(torch.tensor([[[kv.length - 1]]])), r"indices are \(1, 1, 1\)"),
    "numbers that are not whole": (lambda q, kv: Selection(rows(q, [kv.length - 1]).float()), "whole numbers"),
    "no row": (lambda q, _: Selection(rows(q, [])[..., :0].long()), "lacks the current token, row 512"),
    "beyond the end": (lambda q, kv: Selection(rows(q, [0, kv.length - 1, kv.length])), "range: rows go from 0 to 512"),
    "before the start": (lambda q, kv: Selection(rows(q, [-1, 3, kv.length - 1])), "out of range"),
    "twice": (lambda q, kv: Selection(rows(q, [0, 5, 5, kv.length - 1])), "names a row twice"),
    "without the current token": (lambda q, _: Selection(rows(q, [0, 1, 2])), "lacks the current token"),
    "300 of 513": (
        lambda q, kv: Selection(rows(q, list(range(kv.length - 300, kv.length)))),
        "300 tokens, .* allows 64",
    ),
    "all of them": (lambda *_: Selection(), "513 tokens, but the budget allows 64"),
    "65 that heads see": (unseen(65), "more tokens than the 64"),
    "a current token that no head sees": (
        lambda q, kv: Selection(
            rows(q, list(range(kv.length - 20, kv.length))),
            (torch.arange(20) < 19).expand(*q.shape[:3], -1),
        ),
        "no query head of a KV head sees the current token, row 512",
    ),
    "a current token that one KV head does not see": (
        lambda q, kv: Selection(
            rows(q, list(range(kv.length - 20, kv.length))),
            (torch.arange(20) < torch.tensor([20, 19])[:, None, None]).expand(1, 2, q.shape[2], 20),
        ),
        "no query head of a KV head sees the current token, row 512",
    ),
    "one head sees more": (
        lambda q, kv: Selection(
            rows(q, list(range(kv.length - 100, kv.length))),
            (torch.arange(100) >= torch.tensor([90, 0])[:, None, None]).expand(1, 2, q.shape[2], 100),
        ),
        "more tokens than the 64",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_selection_ends_the_decode_in_its_first_step(name: str) -> None:
    choice, reason = FAULTS[name]
    with pytest.raises(SelectionError, match=rf"^Faulty, layer 1, step 1: .*{reason}"):
        run(Faulty(choice))


@pytest.mark.parametrize("choice", [sound, unseen(64)])
def test_a_sound_selection_passes_in_any_order(choice: Choice) -> None:
    def reversed_rows(q: Tensor, kv: KV) -> Selection:
        selection = choice(q, kv)
        visible = None if selection.visible is None else selection.visible.flip(-1)
        return Selection(selection.indices.flip(-1), visible)

    for method in (Faulty(choice), Faulty(reversed_rows)):
        assert run(method).tokens.shape == (1, NEW)


def test_a_method_that_drifts_beyond_its_budget_fails_at_the_end() -> None:
    assert run(Faulty(drifting), new=3).tokens.shape == (1, 3)
    with pytest.raises(SelectionError, match=r"Faulty, layer 1, step 3: attended to 65 tokens, .* allows 64"):
        run(Faulty(drifting))


def test_a_drift_that_only_the_device_counts_is_found_at_the_end() -> None:
    def choose(q: Tensor, kv: KV) -> Selection:
        return unseen(64 + max(0, kv.length - PROMPT - 1))(q, kv)

    with pytest.raises(SelectionError, match=r"layer 1, step 5 or before: a KV head attended to 4 tokens more"):
        run(Faulty(choose))


def test_steps_far_below_the_budget_make_up_for_none_above_it() -> None:
    def choose(q: Tensor, kv: KV) -> Selection:
        return unseen(250 if kv.length == PROMPT + 4 else 1)(q, kv)

    with pytest.raises(SelectionError, match=r"layer 1, step 5 or before: a KV head attended to 186 tokens more"):
        run(Faulty(choose))


def test_heads_far_below_the_budget_make_up_for_none_above_it() -> None:
    def choose(q: Tensor, kv: KV) -> Selection:
        selection = unseen(100 if kv.length > PROMPT + 1 else 1)(q, kv)
        visible = torch.as_tensor(selection.visible).clone()
        visible[:, 1:, :, :-1] = False  # The second KV head sees the current token alone.
        return Selection(selection.indices, visible)

    with pytest.raises(SelectionError, match=r"layer 1, step 5 or before: a KV head attended to 36 tokens more"):
        run(Faulty(choose))


def test_an_evicting_method_that_does_not_evict_fails() -> None:
    with pytest.raises(SelectionError, match=r"Evicting, layer 0, step 1: the method holds 101 tokens, .* allows 64"):
        run(Evicting(kept=100))
    with pytest.raises(SelectionError, match=r"Evicting, layer 0, step 4: attended to 65 tokens, .* allows 64"):
        run(Evicting(drops=2))
    assert run(Evicting(drops=NEW)).tokens.shape == (1, NEW)


def test_the_check_comes_before_a_step_is_captured() -> None:
    @dataclass(frozen=True)
    class Captured(Faulty):
        def why_not_captured(self, offloads: bool) -> str | None:
            return None

    with pytest.raises(SelectionError, match="Captured, layer 1, step 1"):
        run(Captured(FAULTS["twice"][0]), Setting(graphs=True))


def test_every_way_of_decoding_checks(llama: PreTrainedModel) -> None:
    choice, reason = FAULTS["300 of 513"]
    prefilled = prefill(llama, prompt_of(PROMPT), [Faulty(choice), Full()])
    with pytest.raises(SelectionError, match=reason):
        probe(prefilled, [5, 6], [0])
    with pytest.raises(SelectionError, match=reason):
        likelihood(prefilled, [5, 6])
    faulty, full = read_in_one_batch(prefilled, [0, 1], [5, 6], [lambda _: None, lambda _: None])
    assert isinstance(faulty, SelectionError)
    assert not isinstance(full, Exception)


def test_teacher_forced_decodes_compare_every_step_with_the_budget(llama: PreTrainedModel) -> None:
    prefilled = prefill(llama, prompt_of(PROMPT), [Faulty(drifting), Full()])
    reason = r"Faulty, layer 1, step 3: attended to 65 tokens"
    with pytest.raises(SelectionError, match=reason):
        likelihood(prefilled, [5, 6, 7, 8, 9])
    faulty, full = read_in_one_batch(prefilled, [0, 1], [5, 6, 7, 8], [lambda _: None, lambda _: None])
    with pytest.raises(SelectionError, match=reason):
        raise faulty if isinstance(faulty, Exception) else RuntimeError
    assert not isinstance(full, Exception)


@pytest.mark.parametrize(
    "method",
    [
        Quest(BUDGET, page_size=4, per_query_head=True),
        Oracle(BUDGET, "query_head"),
        Oracle(BUDGET, "top_p", 0.99),
        SnapKV(BUDGET, evict_generated=False),
        PyramidKV(BUDGET, evict_generated=False),
    ],
    ids=repr,
)
def test_methods_that_exceed_the_budget_by_design_declare_it(method: Method) -> None:
    assert method.beyond_budget
    meters = run(method).meters()
    assert sum(meter.attended for meter in meters) > 64 * sum(meter.steps for meter in meters)


def test_layers_whose_share_differs_from_the_budget_keep_their_own_limit() -> None:
    """34 tokens are sinks and window. Of the other 2 x 30, the first layer has 53 and the second layer 7."""
    generation = run(PyramidKV(BUDGET, beta=4))
    assert [meter.counts for meter in generation.meters()] == [[34 + 53] * (NEW - 1), [34 + 7] * (NEW - 1)]
    dense, sparse = run(Quest(BUDGET, page_size=4, dense_layers=1)).meters()
    assert dense.counts == list(range(PROMPT + 1, PROMPT + NEW))
    assert sparse.counts == [64] * (NEW - 1)


def test_a_context_too_short_for_an_index_is_attended_whole_without_a_fault() -> None:
    assert run(PQCache(Budget(tokens=64, ratio=None), m=2, b=8)).meters()[0].counts == [64] * (NEW - 1)
    whole = run(PQCache(Budget(tokens=500, ratio=None), m=2, b=8))  # 512 tokens leave a middle below 256
    assert whole.meters()[0].counts == list(range(PROMPT + 1, PROMPT + NEW))


def test_the_clock_holds_no_check() -> None:
    generation = run(Faulty())
    assert all(cohort.checking.total > 0 for cohort in generation.cohorts())
    assert len(generation.steps_s) == NEW - 1
    assert all(seconds >= 0 for seconds in generation.steps_s)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama")
