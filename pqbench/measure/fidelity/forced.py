"""Teacher-forced decoding with a method in all layers. The method's errors reach all later layers and steps, as in
generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pqbench.engine.batch import check_logits
from pqbench.engine.cohort import check_cohorts
from pqbench.engine.decode import Generation
from pqbench.engine.layers import DecodeLayer, LayeredCache, OurLayer
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.steps import Forced, Steps


class Drift:
    """Compares next-token predictions with those of full attention, step by step. It waits for the device only when a
    figure is read.

    Attributes:
        full: ``[T, V]`` logits of full attention after each token read.
        targets: the T tokens of the text that follow those.
    """

    def __init__(self, full: Tensor, targets: Sequence[int]) -> None:
        self.full, self.targets = full, targets
        self._steps: list[Tensor] = []  # for each step, float64 [4]: KL, agreement, and both log probabilities

    def add(self, logits: Tensor) -> None:
        """Count the next step, given its logits ``[V]``. Computes in float64, because the distributions hardly
        differ."""
        target = self.targets[len(self._steps)]
        exact, mine = self.full[len(self._steps)].double().log_softmax(-1), logits.double().log_softmax(-1)
        kl = (exact.exp() * (exact - mine)).nansum()  # 0 * (-inf + inf) where p is 0
        agrees = (exact.argmax() == mine.argmax()).double()
        self._steps.append(torch.stack([kl, agrees, mine[target], exact[target]]))

    @property
    def kl(self) -> list[float]:
        """KL(full || method) in nats of every step."""
        return [max(0.0, value) for value in self._told(0)]

    @property
    def agrees(self) -> list[bool]:
        """Whether the most likely token is that of full attention, for every step."""
        return [value > 0 for value in self._told(1)]

    @property
    def nll(self) -> list[float]:
        """-log probability of the text's next token under the method, in nats, for every step."""
        return [-value for value in self._told(2)]

    @property
    def nll_full(self) -> list[float]:
        """-log probability of the text's next token under full attention, in nats, for every step."""
        return [-value for value in self._told(3)]

    def _told(self, column: int) -> list[float]:
        values: list[float] = torch.stack(self._steps)[:, column].tolist() if self._steps else []
        return values


def dense_logits(prefilled: Prefilled, tokens: Sequence[int]) -> Tensor:
    """Logits ``[T, V]`` of the prompt's method 0 after each of the T tokens read."""
    rows: list[Tensor] = []
    read(prefilled, 0, tokens, rows.append)
    return torch.stack(rows)


def read(prefilled: Prefilled, method: int, tokens: Sequence[int], visit: Callable[[Tensor], None]) -> Generation:
    """Let one method alone read ``tokens``, see :func:`read_in_one_batch`.

    Raises:
        ConfigError: the model computes NaN.
        SelectionError: the method breaks its contract.
        Exception: any other error of the method's own code.
    """
    (outcome,) = read_in_one_batch(prefilled, [method], tokens, [visit])
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


class JoinedLayer(OurLayer):
    """Copies of one prompt as a batch, each with a method of its own: sequence i is answered by the i-th of ``layers``.

    A method that fails is entered in ``failed``. From then on its output is zero, and the other methods continue.
    """

    def __init__(self, layers: Sequence[DecodeLayer], failed: dict[int, Exception]) -> None:
        super().__init__()
        self.layers, self.failed, self.seen = layers, failed, layers[0].seen

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        for i, layer in self._asked():
            with blamed(self.failed, i):
                layer.update(key_states[i : i + 1], value_states[i : i + 1])
        self.seen += 1
        return key_states, value_states

    def attention(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float
    ) -> Tensor:
        """Attention of one query per sequence, ``[B, 1, Hq, D]``."""
        output = torch.zeros_like(q.transpose(1, 2))
        for i, layer in self._asked():
            with blamed(self.failed, i):
                output[i : i + 1] = layer.attention(module, q[i : i + 1], k[i : i + 1], v[i : i + 1], None, scaling)
        return output

    def _asked(self) -> list[tuple[int, DecodeLayer]]:
        """The layers of the methods that have not failed, each with its sequence."""
        return [(i, layer) for i, layer in enumerate(self.layers) if i not in self.failed]


@contextmanager
def blamed(failed: dict[int, Exception], i: int) -> Iterator[None]:
    """Run the block for method ``i``. Its first failure is entered in ``failed``; later failures are ignored, because
    they follow from the first."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - becomes the row of the method at fault
        failed.setdefault(i, error)


@torch.inference_mode()
def read_in_one_batch(
    prefilled: Prefilled, methods: Sequence[int], tokens: Sequence[int], visits: Sequence[Callable[[Tensor], None]]
) -> list[Generation | Exception]:
    """Let methods read ``tokens`` after the prompt, all methods in one batch, so that each step reads the weights only
    once.

    The prompt has one sequence. Each of ``visits`` gets its method's logits ``[V]`` after each token. Returns for each
    method its error or a :class:`Generation`, as if the method had generated the tokens. The seconds in it are those of
    the whole batch.
    """
    failed: dict[int, Exception] = {}
    caches = {i: cache for i, method in enumerate(methods) if (cache := _forked(prefilled, method, i, failed))}
    if len(caches) > 1:
        for cohort in (cohort for cache in caches.values() for cohort in cache.cohorts):
            cohort.store.separate()
    generations: dict[int, Generation] = {}
    if caches:
        rows, lost = list(caches), dict[int, Exception]()
        seconds = _steps(prefilled, list(caches.values()), tokens, [visits[i] for i in rows], lost)
        failed |= {rows[at]: error for at, error in lost.items()}
        ids = torch.tensor([list(tokens)], device=prefilled.model.device)
        for i in rows:
            observe, build = prefilled.observe_seconds[methods[i]], prefilled.build(methods[i])
            generations[i] = Generation(ids, prefilled.seconds + observe, seconds, observe, build, 0.0, caches[i])
            generations[i].settle()
    return [failed[i] if i in failed else generations[i] for i in range(len(methods))]


def _forked(prefilled: Prefilled, method: int, i: int, failed: dict[int, Exception]) -> LayeredCache | None:
    """The cache with which one method continues from the prompt; None if making it failed."""
    with blamed(failed, i):
        prefilled.build(method)
        return prefilled.fork(method)
    return None


def _steps(
    prefilled: Prefilled,
    caches: Sequence[LayeredCache],
    tokens: Sequence[int],
    visits: Sequence[Callable[[Tensor], None]],
    failed: dict[int, Exception],
) -> list[float]:
    """Read the tokens. Returns the seconds of every step. Failures are entered in ``failed`` by their place in
    ``caches``."""
    count = len(caches)
    ours = {n: JoinedLayer([cache.selective[n] for cache in caches], failed) for n in prefilled.layers}
    joined = prefilled.cache(ours)
    for n in prefilled.sliding:
        joined.layers[n].batch_repeat_interleave(count)
    source = Forced(tokens, prefilled.lengths.expand(count))
    with Steps(prefilled, joined, source, sequences=count) as steps:
        for step in steps:
            for i, visit in enumerate(visits):
                if i not in failed:
                    visit(step.logits[i])
    for i, cache in enumerate(caches):
        with blamed(failed, i):
            check_logits(steps.logits[i : i + 1])  # One check is enough: NaN in a token's keys stays in the window.
            check_cohorts(cache.cohorts)
    return steps.seconds([cohort for cache in caches for cohort in cache.cohorts])[1]
