"""The decode steps after a prompt, one by one. Each step reads a token and gives logits and the state of the cache.

Generation, the probe, both kinds of fidelity and lm-eval all decode through :class:`Steps`. They differ in the tokens
that are read (given by :class:`Forced` or by a :class:`pqbench.engine.chooser.Chooser`), in the layers of the cache,
and in what they do with the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from pqbench.engine.attention import attached, forward
from pqbench.engine.cohort import Cohort
from pqbench.engine.graphs.steps import GraphedSteps
from pqbench.engine.layers import LayeredCache
from pqbench.engine.prefilled import Prefilled

# Gives the next token ``[B]`` to read after logits ``[B, V]``, or None when decoding ends.
Source = Callable[[Tensor], Tensor | None]


class Forced:
    """A :data:`Source` of given tokens, whatever the model would choose; all sequences read the same ones."""

    def __init__(self, tokens: Sequence[int], like: Tensor) -> None:
        """``like`` is any whole-number tensor ``[B]`` on the model's device."""
        self._tokens, self._like = iter(tokens), like

    def __call__(self, logits: Tensor) -> Tensor | None:
        token = next(self._tokens, None)
        return None if token is None else torch.full_like(self._like, token, dtype=torch.long)


@dataclass(frozen=True)
class Step:
    """One finished step.

    Attributes:
        number: counted from 0.
        token: ``[B]``, the token that was read.
        logits: ``[B, V]`` after the token. If steps are captured, the next step overwrites them.
        cache: the cache, whose layers hold stores, states and meters as they are after the step.
    """

    number: int
    token: Tensor
    logits: Tensor
    cache: LayeredCache


class Steps(Iterator[Step]):
    """Iterates over decode steps. Use it as ``with Steps(...) as steps: for step in steps: ...``, because the model
    uses our attention only inside the ``with`` block.

    Attributes:
        logits: ``[B, V]`` after the last token read; before the first step, the logits after the prompt.
        spans: the seconds of every step, except the steps that read given tokens.
        asked: the seconds of the steps that read given tokens.
    """

    def __init__(
        self,
        prefilled: Prefilled,
        cache: LayeredCache,
        source: Source,
        most: int = 0,
        given: int = 0,
        sequences: int | None = None,
        graphs: bool = False,
    ) -> None:
        """
        Args:
            prefilled: the prompt from which decoding continues.
            cache: what the model reads and writes; see :meth:`Prefilled.fork` and :meth:`Prefilled.cache`.
            source: gives the tokens.
            most: the largest possible number of steps; needed only with ``graphs``.
            given: the number of first tokens that belong to a question. Their steps are timed separately.
            sequences: number of sequences of the cache, when each of them is a copy of the only sequence of the prompt;
                None for the prompt's own sequences.
            graphs: capture one step and replay it, see :class:`pqbench.engine.setting.Setting`.
        """
        count = len(prefilled.lengths) if sequences is None else sequences
        self.logits = prefilled.logits
        self.asked = prefilled.clock.spans("question")
        self.spans = prefilled.clock.spans("step", listed=True)
        self._prefilled, self._cache, self._source, self._given = prefilled, cache, source, given
        self._position, self._count = prefilled.lengths[:, None].expand(count, 1), 0
        # Our own layers know the padding from their cohorts. Transformers' layers do not, so they need the mask in
        # every step.
        padded = prefilled.mask is not None and len(prefilled.sliding) > 0
        self._mask = prefilled.mask.expand(count, -1) if padded and prefilled.mask is not None else None
        self._graphed = GraphedSteps(cache, self._logits, most) if graphs else None
        self._open = ExitStack()

    def __enter__(self) -> Steps:
        self._open.enter_context(attached(self._prefilled.model))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def __next__(self) -> Step:
        token = self._source(self.logits)
        if token is None:
            raise StopIteration
        with self.asked if self._count < self._given else self.spans:
            self.logits = self._forward(token)
        self._count += 1
        return Step(self._count - 1, token, self.logits, self._cache)

    def run(self) -> None:
        """Do all steps, for a caller that does not look at single steps."""
        for _ in self:
            pass

    def seconds(self, cohorts: Sequence[Cohort]) -> tuple[float, list[float]]:
        """Seconds of all given tokens together, and of every other step, without the check of the first step. Waits for
        the device. ``cohorts`` are all cohorts that took part."""
        asked, each = self.asked.total, self.spans.each
        checking = sum(cohort.checking.total for cohort in cohorts)
        if self._given:
            return max(0.0, asked - checking), each
        return asked, [max(0.0, each[0] - checking), *each[1:]] if each else each

    @property
    def phased(self) -> frozenset[int]:
        """The steps of :attr:`spans` that were slowed because their phases were timed, see
        :class:`pqbench.engine.decode.Generation`."""
        clock = self._prefilled.clock
        if self._graphed is not None:
            return frozenset()
        steps = range(self._count - self._given) if clock.every > 1 else ()
        return frozenset(step for step in steps if clock.samples(self._given + step))

    @property
    def replays(self) -> frozenset[int] | None:
        """The steps of :attr:`spans` that replayed a captured step; None without ``graphs``."""
        if self._graphed is None:
            return None
        return frozenset(step - self._given for step in self._graphed.replays if step >= self._given)

    def _forward(self, token: Tensor) -> Tensor:
        if self._mask is not None:
            self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=True)
        if self._graphed is None:
            logits = self._logits(self._cache, token, self._position)
        else:
            logits = self._graphed.logits(token, self._position)
        self._position = self._position + 1
        return logits

    def _logits(self, cache: LayeredCache, token: Tensor, position: Tensor) -> Tensor:
        return forward(self._prefilled.model, token[:, None], cache, self._mask, position)
