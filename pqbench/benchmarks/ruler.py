"""RULER: 13 synthetic tasks at any length, with lm-eval's generators and the official scores."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pqbench.benchmarks import ruler_data
from pqbench.benchmarks.base import Benchmark, Prompter, Sample
from pqbench.benchmarks.grid import at_least_one, fits, named, whole
from pqbench.benchmarks.recall import string_recall, string_recall_any
from pqbench.benchmarks.ruler_tasks import DATA_TASKS, GROUPS, TASKS, Draft, Draw, Request, largest
from pqbench.errors import ConfigError

Data = tuple[list[dict[str, Any]], list[str]]


@dataclass(frozen=True)
class _Plan:
    """One sample whose length is known to fit, but which has not been drawn yet."""

    task: str
    length: int
    index: int
    request: Request

    @property
    def id(self) -> str:
        return f"{self.task}-{self.length}-{self.index}"

    @property
    def budget(self) -> int:
        """The tokens of the prompt: in the official code, prompt and answer together have the given length."""
        return self.length - TASKS[self.task].new_tokens


@dataclass
class Ruler(Benchmark):
    """RULER (NVIDIA/RULER, https://arxiv.org/abs/2404.06654) over public-domain prose.

    Prompts, generation lengths and scores are the official ones; module ``ruler_tasks`` lists the differences. The
    haystack has as many units (words, lines, documents) as fit, so prompts are slightly shorter than the given length.
    ``score`` is the share of the references that the prediction contains, ignoring case. For the QA tasks it is 100 if
    the prediction contains one of the accepted answers.

    Attributes:
        tasks: names as in RULER's table, or the groups ``all`` and ``offline`` (the 11 tasks that need no data).
        lengths: tokens of prompt and answer together, chat template included.
        per_cell: samples of each task and length; officially 500.
        seed: draws everything; the questions of the QA tasks come in the order of the file, as in the official code.
        data_dir: folder with the json files of SQuAD (qa_1) and HotpotQA (qa_2).
        chat: use the model's chat template, with the official lead-in as the beginning of the answer.

    Raises:
        ConfigError: a task is unknown, or a value cannot work; the message names the field.
    """

    name: ClassVar[str] = "ruler"

    tasks: Sequence[str] = ("offline",)
    lengths: Sequence[int] = (4096,)
    per_cell: int = 10
    seed: int = 0
    data_dir: str | None = None
    chat: bool = True

    def __post_init__(self) -> None:
        chosen, unknown = named(self.tasks, TASKS, GROUPS)
        if unknown or not chosen:
            raise ConfigError(
                f"benchmark.tasks has {', '.join(map(str, unknown)) or 'no task'}; "
                f"choose from {', '.join(TASKS)}, or a group: {', '.join(GROUPS)}"
            )
        self.tasks = chosen
        self.lengths = whole("lengths", self.lengths)
        at_least_one("per_cell", self.per_cell)

    def samples(self, prompter: Prompter) -> Iterator[Sample]:
        """The samples by task, then length, then number.

        Raises:
            ConfigError: a length is beyond the model or too short for a task, or the QA data has too few questions.
                Raised by the call itself, before the first sample.
            DataError: the data of a QA task are missing or damaged, or a package is not installed.
        """
        fits(self.lengths, prompter.max_length)
        data = {task: ruler_data.load(task, self.data_dir) for task in self.tasks if task in DATA_TASKS}
        plans = [
            self._plan(prompter, task, length, index, data.get(task, ([], [])))
            for task in self.tasks
            for length in self.lengths
            for index in range(self.per_cell)
        ]
        return (self._sample(prompter, plan) for plan in plans)

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The share of the references that the prediction contains, in percent; for QA tasks 100 if it contains one of
        them.

        Raises:
            DataError: the record has no references.
        """
        rule = string_recall_any if record["task"] in DATA_TASKS else string_recall
        return {"score": rule(record["prediction"], record["references"])}

    def _plan(self, prompter: Prompter, task: str, length: int, index: int, data: Data) -> _Plan:
        if task in DATA_TASKS and index >= len(data[0]):
            raise ConfigError(
                f"benchmark.per_cell={self.per_cell}, but the data of {task} has {len(data[0])} questions"
            )
        # Each sample has a seed of its own, so another grid or list of tasks does not change it.
        seed = random.Random(f"{self.seed}/{task}/{length}/{index}").getrandbits(32)
        plan = _Plan(task, length, index, Request(seed, index, length, lambda text: len(prompter.encode(text)), data))
        least = TASKS[task].least
        tokens = self._size(prompter, self._start(plan), least)
        if tokens > plan.budget:
            raise ConfigError(
                f"benchmark.lengths has {length}, too short for sample {index} of {task}: "
                f"it takes {tokens + TASKS[task].new_tokens} tokens at least"
            )
        return plan

    def _sample(self, prompter: Prompter, plan: _Plan) -> Sample:
        task, draw = TASKS[plan.task], self._start(plan)
        units = largest(lambda n: self._size(prompter, draw, n), task.least, plan.length, plan.budget)
        assert units is not None, "a plan fits with the fewest units"
        draft = draw(units)
        ids, question_tokens = self._prompt(prompter, draft)
        return Sample(
            id=plan.id,
            task=plan.task,
            input_ids=ids,
            references=draft.references,
            max_new_tokens=task.new_tokens,
            question_tokens=question_tokens,
            metadata={"length": plan.length, "units": units},
        )

    def _start(self, plan: _Plan) -> Draw:
        return TASKS[plan.task].start(plan.request)

    def _size(self, prompter: Prompter, draw: Draw, units: int) -> int:
        return len(self._prompt(prompter, draw(units))[0])

    def _prompt(self, prompter: Prompter, draft: Draft) -> tuple[list[int], int]:
        """The whole prompt, and how many of its tokens follow the context."""
        frame = prompter.frame(chat=self.chat)
        # Without a chat template the lead-in simply continues the text.
        lead_in = draft.lead_in if frame.after else f" {draft.lead_in}"
        tail = prompter.continued(draft.question + frame.after + lead_in)
        return prompter.framed(frame, draft.text, lead_in), len(tail)
