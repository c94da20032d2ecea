"""What every benchmark is made of: samples to run, and scores computed from records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from pqbench.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One prompt and what is expected of it.

    Attributes:
        id: unique within the benchmark and stable between runs; a resumed run recognises the sample by it.
        task: the row of the official table this sample counts for.
        input_ids: the whole prompt, template included, exactly as the model sees it.
        references: accepted answers, as the official scorer takes them.
        max_new_tokens: official generation length.
        question_tokens: how many tokens at the end of the prompt follow the context (question, instruction, template).
        end_tokens: token ids that end the answer besides the model's own.
        min_new_tokens: no end token is accepted before so many tokens.
        metadata: facts that scores and plots need (length, depth, ...); must be JSON.
    """

    id: str
    task: str
    input_ids: list[int]
    references: list[str]
    max_new_tokens: int
    question_tokens: int = 0
    end_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    metadata: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.input_ids:
            raise DataError(f"sample {self.id} has an empty prompt: check the data of task {self.task}")


@dataclass(frozen=True)
class Prompter:
    """Turns prompt text into token ids for one model.

    Attributes:
        tokenizer: the model's tokenizer.
        max_length: longest context the model accepts, in tokens.
        chat: wrap prompts in the tokenizer's chat template when it has one.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    chat: bool = True

    _MARK: ClassVar[str] = "\u241e"

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def template(self, *, chat: bool = True) -> tuple[list[int], list[int]]:
        """Token ids that go before and after a user message; only the model's own leading special token without chat.

        A BOS token appears once: the chat template's own, or else the tokenizer's.
        """
        if chat and self.chat and self.tokenizer.chat_template:
            text = str(
                self.tokenizer.apply_chat_template(
                    [{"role": "user", "content": self._MARK}], tokenize=False, add_generation_prompt=True
                )
            )
            before, after = text.split(self._MARK)
            return self.encode(before), self.encode(after)
        plain = self.tokenizer("a", verbose=False).input_ids
        body = self.encode("a")
        start = plain.index(body[0])
        return list(plain[:start]), []

    def wrap(self, text: str, *, chat: bool = True, lead_in: str = "") -> list[int]:
        """Token ids of ``text`` as a user message, then ``lead_in`` as the beginning of the answer."""
        before, after = self.template(chat=chat)
        return before + self.encode(text) + after + (self.encode(lead_in) if lead_in else [])

    def truncate_middle(self, text: str, limit: int) -> str:
        """Official LongBench and InfiniteBench rule: keep ``limit // 2`` tokens from each end of the filled prompt, the
        tokenizer's leading special token counted."""
        ids = self.tokenizer(text, verbose=False).input_ids
        if len(ids) <= limit:
            return text
        half = limit // 2
        return self.decode(ids[:half]) + self.decode(ids[-half:])

    def cut_middle(self, text: str, limit: int, room: int) -> list[int] | None:
        """Token ids of ``text`` truncated to ``limit``, or to a little less where they would not fit into ``room``: the
        halves meet in new tokens, and a torn character may come back as several. None when nothing is left."""
        while limit >= 2:
            ids = self.encode(self.truncate_middle(text, limit))
            if len(ids) <= room:
                return ids
            limit -= len(ids) - room
        return None


class Benchmark(ABC):
    """A suite: yields samples for a model, scores records without one. Subclasses are dataclasses, one file each."""

    name: ClassVar[str]

    @abstractmethod
    def samples(self, prompter: Prompter) -> Iterable[Sample]:
        """Every sample of the configured grid or tasks, in a fixed order."""

    @abstractmethod
    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Scores in percent, 0 to 100, of one record (fields ``task``, ``prediction``, ``references``, ``metadata``).

        The key ``score`` holds the official metric; further keys are extra columns.
        """
