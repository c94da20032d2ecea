"""The interface of a benchmark: it yields samples to run, and computes scores from records."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from pqbench.errors import DataError, ModelError

MARK = "\u241e"  # stands for the user's message; it occurs in no benchmark text


@dataclass(frozen=True)
class Sample:
    """One prompt and what is expected of it.

    Attributes:
        id: unique within the benchmark and the same in every run, since a resumed run recognises the sample by it.
        task: the row of the official table this sample counts for.
        input_ids: the whole prompt, template included, exactly as the model sees it.
        references: accepted answers, in the form that the official scorer takes.
        max_new_tokens: official generation length.
        question_tokens: how many tokens at the end of the prompt follow the context (question, instruction, template).
        end_tokens: token ids that end the answer besides the model's own.
        min_new_tokens: end tokens are ignored until this many tokens were generated.
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
class Frame:
    """The tokens and text that a model expects around a user message.

    Attributes:
        lead: special token ids before any text; empty if the chat template writes them itself.
        before, after: the text that the chat template writes around the message; empty without a chat template.
        strips: whether the chat template removes blanks at both ends of the message.
    """

    lead: tuple[int, ...] = ()
    before: str = ""
    after: str = ""
    strips: bool = False


@dataclass(frozen=True)
class Prompter:
    """Turns prompt text into token ids for one model.

    A prompt is put together as text and encoded once, because many tokenizers encode words at the beginning of a text
    differently from the same words later on (SentencePiece puts a blank before every text).

    Attributes:
        tokenizer: the model's tokenizer.
        max_length: longest context the model accepts, in tokens.
        chat: wrap prompts in the tokenizer's chat template when it has one.
        chat_options: variables that the chat template understands, such as ``enable_thinking``.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    chat: bool = True
    chat_options: Mapping[str, Any] = field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special tokens."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # type: ignore[no-any-return]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def frame(self, *, chat: bool = True) -> Frame:
        """The frame of a user message: the chat template or, without one, the tokenizer's own leading special token.

        Raises:
            ModelError: the chat template does not write the message exactly once, or refuses it.
        """
        if chat and self.chat and self.tokenizer.chat_template:
            return chat_frame(self.tokenizer, self.chat_options)
        plain = self.tokenizer("a", verbose=False).input_ids
        return Frame(lead=tuple(plain[: plain.index(self.encode("a")[0])]))

    def framed(self, frame: Frame, text: str, lead_in: str = "") -> list[int]:
        """Token ids of ``text`` as a user message, then ``lead_in`` as the beginning of the answer."""
        message = text.strip() if frame.strips else text
        return [*frame.lead, *self.encode(frame.before + message + frame.after + lead_in)]

    def wrap(self, text: str, *, chat: bool = True, lead_in: str = "") -> list[int]:
        """:meth:`framed` in the model's own frame; with a chat template the ids equal those of
        ``apply_chat_template``."""
        return self.framed(self.frame(chat=chat), text, lead_in)

    def continued(self, text: str) -> list[int]:
        """Token ids that ``text`` has when it follows other text within one longer text."""
        anchor, ids = self.encode("a"), self.encode(f"a{text}")
        return ids[len(anchor) :] if ids[: len(anchor)] == anchor else self.encode(text)

    def truncate_middle(self, text: str, limit: int) -> str:
        """Cut the middle by the official rule of LongBench and InfiniteBench: keep ``limit // 2`` tokens from each end
        of the filled prompt. The tokenizer's leading special token counts."""
        ids = self.tokenizer(text, verbose=False).input_ids
        if len(ids) <= limit:
            return text
        half = limit // 2
        return self.decode(ids[:half]) + self.decode(ids[-half:])

    def cut_middle(self, text: str, limit: int, excess: Callable[[str], int]) -> str | None:
        """Truncate ``text`` to ``limit`` tokens, or to fewer as long as ``excess`` says how many tokens the result is
        too long. The result can be too long because new tokens form where the halves meet, and because a character cut
        in two may be decoded as several. Returns None if nothing is left."""
        while limit >= 2:
            shorter = self.truncate_middle(text, limit)
            beyond = excess(shorter)
            if beyond <= 0:
                return shorter
            limit -= beyond
        return None


def chat_frame(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Frame:
    """The chat template of a tokenizer around one user message, up to the beginning of the answer.

    Raises:
        ModelError: the template does not write the message exactly once, or refuses it.
    """
    text, other = _rendered(tokenizer, options, MARK), _rendered(tokenizer, options, f" {MARK} ")
    parts = text.split(MARK)
    if len(parts) != 2:
        raise ModelError(
            f"the model's chat template writes the user's message {len(parts) - 1} times, so that a prompt would not "
            "hold it once: set model.chat=false"
        )
    return Frame(before=parts[0], after=parts[1], strips=other == text)


def _rendered(tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any], message: str) -> str:
    """The conversation as text. Chat templates of models that read images expect the message as a list of parts."""
    for content in (message, [{"type": "text", "text": message}]):
        try:
            text = str(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, **options
                )
            )
        except (TemplateError, TypeError, ValueError) as error:
            failure: Exception | None = error
        else:
            failure = None
            if message.strip() in text and str(content) not in text.replace(message, ""):
                return text
    reason = "it leaves the message out" if failure is None else " ".join(str(failure).split())[:200]
    raise ModelError(
        f"the model's chat template does not take a single user message ({reason}): set model.chat=false, or "
        "model.chat_options to what the template needs"
    )


class Benchmark(ABC):
    """A suite: it yields samples for a model, and scores records without a model. Each subclass is a dataclass in a
    file of its own."""

    name: ClassVar[str]

    @abstractmethod
    def samples(self, prompter: Prompter) -> Iterable[Sample]:
        """Every sample of the configured grid or tasks, in a fixed order."""

    @abstractmethod
    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """Scores in percent, 0 to 100, of one record (fields ``task``, ``prediction``, ``references``, ``metadata``).

        The key ``score`` holds the official metric; further keys are extra columns.
        """
