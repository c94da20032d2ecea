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
    """One sample that is known to fit but has not been drawn."""

    task: str
    length: int
    index: int
    request: Request

    @property
    def id(self) -> str:
        return f"{self.task}-{self.length}-{self.index}"

    @property
    def budget(self) -> int:
        """Tokens of the prompt: officially prompt and answer together have the length."""
        return self.length - TASKS[self.task].new_tokens


@dataclass
class Ruler(Benchmark):
    """RULER (NVIDIA/RULER, https://arxiv.org/abs/2404.06654) over public-domain prose.

    Official prompts, generation lengths and scores; module ``ruler_tasks`` lists what differs. The haystack has as many
    units (words, lines, documents) as fit, so prompts end a little below the length. ``score`` is the share of the
    references that the prediction contains, whatever the case; for the QA tasks the maximum over the answers.

    Attributes:
        tasks: names as in RULER's table, or the groups ``all`` and ``offline`` (the 11 that need no data).
        lengths: tokens of prompt and answer together, chat template included.
        per_cell: samples of each task and length; officially 500.
        seed: draws everything; the questions of the QA tasks come in file order, as officially.
        data_dir: folder with the json files of SQuAD (qa_1) and HotpotQA (qa_2).
        chat: use the model's chat template, with the official lead-in as the beginning of the answer.

    Raises:
        ConfigError: an unknown task, or a value that cannot work; the message names the field.
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
        """Samples by task, then length, then number.

        Raises:
            ConfigError: a length is beyond the model or too short for a task, or the QA data has too few questions.
                Raised by the call itself, before the first sample.
            DataError: data of a QA task is missing or damaged, or a package is not installed.
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
        """Share of references in the prediction, or for QA tasks whether one of them is, in percent.

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
        # A seed of its own for each sample: another grid or task list changes no sample.
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
        # A plain text is simply continued by the lead-in.
        lead_in = draft.lead_in if frame.after else f" {draft.lead_in}"
        tail = prompter.continued(draft.question + frame.after + lead_in)
        return prompter.framed(frame, draft.text, lead_in), len(tail)
