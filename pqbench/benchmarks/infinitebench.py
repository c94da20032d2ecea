"""InfiniteBench: twelve tasks of 100K tokens and more from the official files; six of them can be generated at any
length.

Source: https://github.com/OpenBMB/InfiniteBench (data: https://huggingface.co/datasets/xinrongzhang2022/InfiniteBench).
Prompts come from lm-eval, which has the official GPT-4 set; lm-eval lacks math_calc, so its wording is our own.
Scores follow the official script (``infinitebench_scores``), and generated rows the official recipes
(``infinitebench_generators``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar

from pqbench.benchmarks.base import Benchmark, Frame, Prompter, Sample
from pqbench.benchmarks.data import TEXT, Kind, Source, find, hub_file, read_rows
from pqbench.benchmarks.grid import named
from pqbench.benchmarks.infinitebench_generators import OFFICIAL, Place, Row, fit, generate, least_units
from pqbench.benchmarks.infinitebench_scores import score
from pqbench.benchmarks.templates import fill, load_task
from pqbench.errors import ConfigError, DataError

REPOSITORY = "xinrongzhang2022/InfiniteBench"
REVISION = "90f0394333616266d9fe85824ceaf505093cbaa5"

# A shorter prompt would be useless, and characters cut in two may become that many tokens.
_LEAST_ROOM = 64
_CONTEXT_MARK = "\u241e"
# Tasks whose depth can be read from the text: in official rows it is the place of the answer.
_PLACED = ("passkey", "number_string", "kv_retrieval")


@dataclass(frozen=True)
class Task:
    """The properties of one task.

    Attributes:
        template: name of lm-eval's task file without prefix and suffix; empty for our own wording.
        official: number of new tokens in the official runs.
        infllm: number of new tokens in InfLLM's runs, which PQCache's runs follow.
        lead_in: beginning of the answer for base and small models, in our own words; ``{key}`` is the key that the
            question quotes.
        question_first: the text after the context is a question that can stand before it.
        options: rows have four options, and the references are (answer text, letter).
    """

    template: str
    official: int
    infllm: int
    lead_in: str
    question_first: bool = True
    options: bool = False


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "passkey": Task("passkey", 6, 32, "The pass key is"),
        "number_string": Task("number_string", 12, 32, "The sequence of digits is"),
        "kv_retrieval": Task("kv_retrieval", 50, 100, '"{key}": "'),
        "longbook_sum_eng": Task("longbook_sum_en", 1200, 1536, "Summary:", question_first=False),
        "longbook_qa_eng": Task("longbook_qa_en", 40, 32, "Answer:"),
        "longbook_choice_eng": Task("longbook_choice_en", 40, 32, "The letter of the right option is", options=True),
        "longdialogue_qa_eng": Task("longdialogue_qa_en", 40, 32, "The masked name is", question_first=False),
        "longbook_qa_chn": Task("longbook_qa_chn", 40, 32, "答案\uff1a"),
        "code_debug": Task("code_debug", 5, 32, "The right option is:", options=True),
        "code_run": Task("code_run", 5, 32, "The returned value is"),
        "math_find": Task("math_find", 3, 32, "The number is"),
        "math_calc": Task("", 30000, 64000, "Values:", question_first=False),
    }
)
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType({"all": tuple(TASKS), "synthetic": tuple(OFFICIAL)})


def _is_answer(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(_is_answer(item) for item in value)
    return isinstance(value, str | int | float) and not isinstance(value, bool)


_ANSWER = Kind("a string, a number or a list of them", _is_answer)
_OPTIONS = Kind(
    "a list of four strings", lambda value: isinstance(value, list) and [type(item) for item in value] == [str] * 4
)


@dataclass
class InfiniteBench(Benchmark):
    """The suite of InfiniteBench.

    Attributes:
        tasks: names of ``TASKS`` or groups (all, synthetic).
        source: ``generated`` (synthetic tasks only, no data needed) or ``official``.
        length: prompt tokens of generated samples, template included; one number or several. A prompt is never longer,
            and shorter by less than one unit of the recipe.
        per_length: generated samples per task and length, spread evenly over the official sweep.
        limit: at most this many samples per task (and length), spread evenly. The official files are sorted by depth,
            question kind or layers, so the first rows alone would test only one of these.
        seed: seed of everything that is generated.
        data_dir: folder or archive with the official jsonl files; None downloads them from the hub.
        truncate: cut official prompts that are too long in the middle, by tokens, before the chat template is added
            (the official rule).
        max_length: prompt and answer together have at most this many tokens; None is the model's own limit.
        answer_length: number of new tokens, as in the ``official`` runs or as in InfLLM's (``infllm``). A tokenizer
            with one token per digit needs ``infllm`` or ``lead_in`` for passkey. Generated math_calc stops when its
            answer is complete.
        chat: use the chat template where the model has one.
        lead_in: begin the answer for the model, as the official prompts for base models do.
        question_first: ask before the context instead of after it, in the tasks whose ``Task.question_first`` allows
            it; ``metadata`` says for which samples this was done.

    Raises:
        ConfigError: an option has an impossible value, or a task or group is unknown.
    """

    name: ClassVar[str] = "infinitebench"

    tasks: str | Sequence[str] = ("passkey", "number_string", "kv_retrieval")
    source: str = "generated"
    length: int | Sequence[int] = 1024
    per_length: int = 4
    limit: int | None = None
    seed: int = 0
    data_dir: str | None = None
    truncate: bool = True
    max_length: int | None = None
    answer_length: str = "official"
    chat: bool = True
    lead_in: bool = False
    question_first: bool = False

    def __post_init__(self) -> None:
        _check_choice("source", self.source, ("generated", "official"))
        _check_choice("answer_length", self.answer_length, ("official", "infllm"))
        for option in ("per_length", "limit", "max_length"):
            _check_positive(option, getattr(self, option))
        if not self._lengths():
            raise ConfigError("benchmark.length is empty: give at least one length in tokens")
        for length in self._lengths():
            _check_positive("length", length)
        tasks = self._tasks()
        if self.source == "generated":
            real = [task for task in tasks if task not in OFFICIAL]
            if real:
                raise ConfigError(
                    f"{', '.join(real)} cannot be generated: set benchmark.source=official or "
                    f"benchmark.tasks to some of {', '.join(OFFICIAL)}"
                )
            if self.data_dir is not None:
                raise ConfigError(
                    "benchmark.data_dir is read with benchmark.source=official only: set it, or no data_dir"
                )

    def samples(self, prompter: Prompter) -> Iterator[Sample]:
        """The configured samples, task by task.

        Raises:
            ConfigError: a length is too short for one unit of a recipe.
            DataError: data are missing or malformed, lm-eval is missing, or a prompt and its answer exceed the limit.
        """
        for task in self._tasks():
            if self.source == "official":
                yield from self._official(task, prompter)
            else:
                for length in self._lengths():
                    yield from self._generated(task, length, prompter)

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The official metric of the record's task.

        Raises:
            DataError: the task is unknown or its references do not fit it.
        """
        return {"score": score(record["task"], record["prediction"], record["references"])}

    def _tasks(self) -> list[str]:
        chosen, unknown = named(self.tasks, TASKS, GROUPS)
        if unknown or not chosen:
            wanted = [self.tasks] if isinstance(self.tasks, str) else list(self.tasks)
            raise ConfigError(
                f"benchmark.tasks={wanted} names {', '.join(unknown) or 'nothing'}; tasks: {', '.join(TASKS)}; "
                f"groups: {', '.join(GROUPS)}"
            )
        return chosen

    def _lengths(self) -> list[int]:
        return [self.length] if isinstance(self.length, int) else list(self.length)

    def _chosen(self, count: int) -> list[int]:
        kept = count if self.limit is None else min(count, self.limit)
        return [i * count // kept for i in range(kept)]

    def _limit(self, prompter: Prompter) -> int:
        return prompter.max_length if self.max_length is None else min(self.max_length, prompter.max_length)

    def _generated(self, task: str, length: int, prompter: Prompter) -> Iterator[Sample]:
        def size(row: Row) -> int:
            frame, lead_in = self._frame(task, vars(row), prompter)
            return len(prompter.framed(frame, self._text(task, vars(row))[0], lead_in))

        units = 0
        for index in self._chosen(self.per_length):
            place = Place(index, self.per_length)
            make = partial(generate, task, place=place, seed=f"{self.seed}/{length}")
            try:
                row, units = fit(make, size, length, least_units(task, place), units)
            except ConfigError as error:
                raise ConfigError(f"InfiniteBench {task}: {error}") from error
            facts = {"length": length, "seed": self.seed, "units": units, **row.facts}
            # The name holds the place in the sweep, because sample 1 of 4 differs from sample 1 of 8.
            name = f"{task}-{length}-{index}of{self.per_length}"
            yield self._sample(prompter, name, task, vars(row), row.answer, facts)

    def _official(self, task: str, prompter: Prompter) -> Iterator[Sample]:
        path = self._file(task)
        fields = {"context": TEXT, "input": TEXT, "answer": _ANSWER}
        rows = read_rows(path, fields | {"options": _OPTIONS} if TASKS[task].options else fields)
        for index in self._chosen(len(rows)):
            row = rows[index]
            references = _references(task, row, f"{path}, row {index + 1}")
            facts: dict[str, Any] = {"row": row.get("id", index)}
            if task in _PLACED and references[0] in row["context"]:
                facts["depth"] = row["context"].index(references[0]) / len(row["context"])
            yield self._sample(prompter, f"{task}-{index}", task, row, references, facts)

    def _file(self, task: str) -> Source:
        remedy = (
            f"download {task}.jsonl from https://huggingface.co/datasets/{REPOSITORY} into a folder "
            "and set benchmark.data_dir=FOLDER"
        )
        if task in OFFICIAL:
            remedy += ", or set benchmark.source=generated"
        if self.data_dir is None:
            return hub_file(REPOSITORY, f"{task}.jsonl", remedy=remedy, revision=REVISION)
        return find(self.data_dir, f"{task}.jsonl", remedy=remedy)

    def _sample(
        self,
        prompter: Prompter,
        name: str,
        task: str,
        row: Mapping[str, Any],
        references: list[str],
        facts: Mapping[str, Any],
    ) -> Sample:
        text, question = self._text(task, row)
        frame, lead_in = self._frame(task, row, prompter)
        new_tokens = self._new_tokens(task, prompter, references)
        longest = self._limit(prompter) - new_tokens

        def excess(text: str) -> int:
            return len(prompter.framed(frame, text, lead_in)) - longest

        full = excess(text) + longest
        room = -excess("")
        cut = full > longest
        if cut:
            allowed = self.source == "official" and self.truncate and room >= _LEAST_ROOM
            shorter = prompter.cut_middle(text, room, excess) if allowed else None
            if shorter is None:
                raise DataError(self._too_long(name, full, new_tokens, prompter))
            text = shorter
        ids = prompter.framed(frame, text, lead_in)
        after = len(prompter.continued(frame.after + lead_in))
        tail = len(prompter.continued(question + frame.after + lead_in)) - after
        return Sample(
            id=name,
            task=task,
            input_ids=ids,
            references=references,
            max_new_tokens=new_tokens,
            # A cut in the middle keeps half of the tokens from the end, so at most that many follow the context.
            question_tokens=min(tail, (len(ids) - after) // 2) + after,
            metadata={
                "source": self.source,
                "prompt": "lm-eval" if TASKS[task].template else "own wording",
                "question_first": self.question_first and TASKS[task].question_first,
                "full_tokens": full,
                "truncated": cut,
                **facts,
            },
        )

    def _too_long(self, name: str, tokens: int, new_tokens: int, prompter: Prompter) -> str:
        if self.source == "generated":
            remedy = "lower benchmark.length"
        else:
            remedy = "leave the task out" if self.truncate else "set benchmark.truncate=true"
        return (
            f"InfiniteBench sample {name} has {tokens} prompt tokens and up to {new_tokens} new ones, but prompt and "
            f"answer may take {self._limit(prompter)} together: {remedy}, or use a longer benchmark.max_length or model"
        )

    def _new_tokens(self, task: str, prompter: Prompter, references: Sequence[str]) -> int:
        allowed = TASKS[task].official if self.answer_length == "official" else TASKS[task].infllm
        if task == "math_calc" and self.source == "generated":
            # The official 30000 tokens are for 30000 operands; the rest is for brackets and a space before the first
            # number.
            return min(allowed, len(prompter.encode(", ".join(references))) + 8)
        return allowed

    def _frame(self, task: str, row: Mapping[str, Any], prompter: Prompter) -> tuple[Frame, str]:
        """The frame of the prompt text: the chat template, and the beginning of the answer."""
        frame = prompter.frame(chat=self.chat)
        if not self.lead_in:
            return frame, ""
        lead_in = TASKS[task].lead_in.replace("{key}", "".join(row["input"].split('"')[1:2]))
        # Without a chat template nothing else separates the question from the answer.
        return frame, lead_in if frame.after else f"\n\n{lead_in}"

    def _text(self, task: str, row: Mapping[str, Any]) -> tuple[str, str]:
        """The prompt, and the part of it that follows the context."""
        head, tail = _around_context(task, row)
        if self.question_first and TASKS[task].question_first:
            return f"{head}{tail.strip()}\n\n{row['context']}", ""
        return head + row["context"] + tail, tail


def _around_context(task: str, row: Mapping[str, Any]) -> tuple[str, str]:
    """Prompt text before and after the context."""
    if not TASKS[task].template:
        # math_calc has our own wording, because its official prompt is a chat of several turns.
        head = (
            "Below is a long sum. After each + or - in it, write down the value reached so far: for 5 + 2 - 4 that is "
            "7, 3. Separate the values by commas and write nothing else.\n\n"
        )
        return head, "\n\nGo through the whole sum from left to right and write down the value after each operator."
    config = load_task(f"infinitebench/infinitebench_{TASKS[task].template}.yaml")
    head, _, tail = fill(config, {**row, "context": _CONTEXT_MARK}).partition(_CONTEXT_MARK)
    return head, tail


def _references(task: str, row: Mapping[str, Any], where: str) -> list[str]:
    """Accepted answers as strings; for tasks with options (answer text, letter), as in the official code."""
    answers = list(_flat(row["answer"]))
    if not TASKS[task].options or (len(answers) == 2 and answers[1] in tuple("ABCD")):
        return answers
    if len(answers) != 1 or answers[0] not in row["options"]:
        raise DataError(f"{where}: answer {answers!r} is none of the options {row['options']!r}")
    return [answers[0], "ABCD"[row["options"].index(answers[0])]]


def _flat(answer: Any) -> Iterator[str]:
    if isinstance(answer, list):
        for item in answer:
            yield from _flat(item)
    else:
        yield str(answer)


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"benchmark.{option}={value} is unknown: choose {' or '.join(choices)}")


def _check_positive(option: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ConfigError(f"benchmark.{option}={value} must be a whole number of at least 1")
