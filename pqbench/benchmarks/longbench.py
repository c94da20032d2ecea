"""LongBench v1 and LongBench-E (https://github.com/THUDM/LongBench) as the official scripts run and score it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

from pqbench.benchmarks import longbench_metrics as metrics
from pqbench.benchmarks.averages import EXTENDED, GROUPS, PQCACHE_TABLE2, TASKS
from pqbench.benchmarks.base import Benchmark, Prompter, Sample
from pqbench.benchmarks.data import (
    ANSWERS,
    ARCHIVE,
    INTEGER,
    TEXT,
    TEXTS,
    TEXTS_OR_NULL,
    Kind,
    Source,
    find,
    hub_file,
    read_rows,
)
from pqbench.benchmarks.grid import named
from pqbench.benchmarks.templates import fill, load_task
from pqbench.errors import ConfigError, DataError

REPOSITORY = "THUDM/LongBench"
_REMEDY = (
    f"download {ARCHIVE} from https://huggingface.co/datasets/{REPOSITORY} "
    f"and set benchmark.data_dir to its folder, or leave benchmark.data_dir=null where the hub can be reached"
)

_FIELDS: dict[str, Kind] = {
    "_id": TEXT,
    "input": TEXT,
    "context": TEXT,
    "answers": ANSWERS,
    "length": INTEGER,
    "all_classes": TEXTS_OR_NULL,
}
_CLASSIFICATION = ("trec", "lsht")
_FIRST_LINE = GROUPS["few_shot"]
_NO_CHAT_TEMPLATE = GROUPS["few_shot"] + GROUPS["code"]
_METRICS: dict[str, metrics.Metric] = {
    "multifieldqa_zh": metrics.qa_f1_zh,
    "dureader": metrics.rouge_l_zh,
    "gov_report": metrics.rouge_l,
    "qmsum": metrics.rouge_l,
    "multi_news": metrics.rouge_l,
    "vcsum": metrics.rouge_l_zh,
    "samsum": metrics.rouge_l,
    "passage_count": metrics.count,
    "passage_retrieval_en": metrics.retrieval,
    "passage_retrieval_zh": metrics.retrieval_zh,
    "lcc": metrics.code_similarity,
    "repobench-p": metrics.code_similarity,
}  # all other sets but the classifications: qa_f1

_CONTEXT, _QUESTION = "\u241ec\u241e", "\u241eq\u241e"


@cache
def template(task: str) -> dict[str, Any]:
    """lm-eval's task file of a set, with its prompt corrected to the official one (six sets differ in whitespace).

    Raises:
        DataError: lm-eval is not installed, or lacks the file.
    """
    config = dict(load_task(f"longbench/{task}.yaml"))
    if task in ("triviaqa", "samsum"):
        config["doc_to_text"] = config["doc_to_text"].replace("}}\n{{", "}}\n\n{{")
    elif task in ("passage_count", "passage_retrieval_en"):
        config["doc_to_text"] += " "
    elif task in GROUPS["code"]:
        config["doc_to_text"] += "\n"
    return config


@dataclass(frozen=True)
class Prompt:
    """A filled prompt, before truncation and chat template: ``head``, context, ``tail``.

    Attributes:
        head: the text before the context.
        context: the row's context.
        tail: the text after the context.
        question_first: whether the question stands in ``head``.
    """

    head: str
    context: str
    tail: str
    question_first: bool = False

    @property
    def text(self) -> str:
        return self.head + self.context + self.tail


def fill_prompt(task: str, context: str, question: str, *, question_first: bool = False) -> Prompt:
    """The official prompt of a row. With ``question_first`` the text after the context moves before it, except the
    answer cue on the last line. Prompts without a question, or without such a cue, do not change.

    Raises:
        DataError: lm-eval is not installed, or lacks the set's template.
    """
    filled = fill(template(task), {"context": _CONTEXT, "question": _QUESTION})
    head, _, tail = filled.partition(_CONTEXT)
    before, _, after = tail.partition(_QUESTION)
    movable = after.startswith("\n") and after.strip()
    if not (question_first and movable):
        return Prompt(head, context, tail.replace(_QUESTION, question))
    rest, _, cue = after.rstrip().rpartition("\n")
    cue = after[len(rest.rstrip("\n")) :]
    moved = (before + question + rest).strip()
    return Prompt(f"{moved}\n\n{head}", context, cue, question_first=True)


@dataclass
class LongBench(Benchmark):
    """LongBench v1, and LongBench-E with ``extended``.

    Prompts come from lm-eval, corrected to the official ones; the data come from ``data.zip`` of the official
    repository. Each sample's ``metadata`` holds all that scoring needs, so records can be rescored without the data.

    Attributes:
        tasks: sets or groups of them (``single_doc``, ``multi_doc``, ``summarization``, ``few_shot``, ``synthetic``,
            ``code``, ``pqcache_table2``, ``all``).
        limit: samples per set; None for all.
        data_dir: folder with the official jsonl files or data.zip, or the archive itself; None downloads it.
        extended: the 13 sets of LongBench-E; their tasks end in ``_e`` and scores gain a column per length bucket.
        max_length: longest prompt in tokens, before the chat template is added; None for all that the model has room
            for.
        truncate: cut longer prompts in the middle; if off, they are an error.
        question_first: put the question before the context where the template allows it.

    Raises:
        ConfigError: a task is unknown or not part of LongBench-E, no task is named, or a limit is not positive.
    """

    name: ClassVar[str] = "longbench"

    tasks: Sequence[str] | str = ("all",)
    limit: int | None = None
    data_dir: str | None = None
    extended: bool = False
    max_length: int | None = None
    truncate: bool = True
    question_first: bool = False

    def __post_init__(self) -> None:
        for option in ("limit", "max_length"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise ConfigError(f"benchmark.{option}={value}: set a positive number, or null for no limit")
        self._selected = self._select()

    def _select(self) -> list[str]:
        available = EXTENDED if self.extended else TASKS
        groups = {**GROUPS, "pqcache_table2": PQCACHE_TABLE2, "all": available}
        selected, unknown = named(self.tasks, available, groups)
        if unknown:
            suite = "LongBench-E" if self.extended else "LongBench"
            known = f"sets: {', '.join(available)}; groups: {', '.join(groups)}"
            raise ConfigError(f"benchmark.tasks: {suite} has no {unknown[0]!r}; {known}")
        selected = [task for task in selected if task in available]
        if not selected:
            raise ConfigError("benchmark.tasks is empty: name sets or groups, or set benchmark.tasks=[all]")
        return selected

    def samples(self, prompter: Prompter) -> Iterator[Sample]:
        """The rows of the selected sets, in the order of ``tasks`` and of the files.

        Raises:
            ConfigError: ``data_dir`` does not exist, or ``max_length`` leaves the model no room for the answer.
            DataError: data is missing or malformed, or a prompt is too long and ``truncate`` is off.
        """
        suffix = "_e" if self.extended else ""
        root = self.data_dir or hub_file(REPOSITORY, ARCHIVE, remedy=_REMEDY)
        # All files are looked up first, so that a missing one does not stop a run half way.
        sources = {task: find(root, f"{task}{suffix}.jsonl", remedy=_REMEDY) for task in self._selected}
        for task, source in sources.items():
            yield from self._task_samples(task, suffix, source, prompter)

    def _task_samples(self, task: str, suffix: str, source: Source, prompter: Prompter) -> Iterator[Sample]:
        fields = _FIELDS | ({"all_classes": TEXTS} if task in _CLASSIFICATION else {})
        new_tokens = int(template(task)["generation_kwargs"]["max_gen_toks"])
        for index, row in enumerate(read_rows(source, fields, limit=self.limit)):
            identity = f"{task}{suffix}/{index}-{row['_id'][:8]}"
            prompt = fill_prompt(task, row["context"], row["input"], question_first=self.question_first)
            ids, question_tokens, cut = self._encode(task, identity, prompt, new_tokens, prompter)
            metadata = {"row": row["_id"], "length": row["length"], "truncated": cut}
            if self.question_first:
                metadata["question_first"] = prompt.question_first
            if task in _CLASSIFICATION:
                metadata["all_classes"] = row["all_classes"]
            if self.extended:
                metadata["bucket"] = bucket(row["length"])
            yield Sample(
                id=identity,
                task=task + suffix,
                input_ids=ids,
                references=row["answers"],
                max_new_tokens=new_tokens,
                question_tokens=question_tokens,
                end_tokens=(prompter.encode("\n")[-1],) if task == "samsum" else (),
                min_new_tokens=1 if task == "samsum" else 0,
                metadata=metadata,
            )

    def _encode(
        self, task: str, identity: str, prompt: Prompt, new_tokens: int, prompter: Prompter
    ) -> tuple[list[int], int, bool]:
        """Token ids, how many of them follow the context, and whether the prompt was cut."""
        chat = task not in _NO_CHAT_TEMPLATE
        frame = prompter.frame(chat=chat)
        around = len(prompter.framed(frame, ""))
        room = prompter.max_length - new_tokens - around
        limit = room if self.max_length is None else self.max_length
        if limit > room or room < 2:
            raise ConfigError(
                f"task {task}: the model's {prompter.max_length} tokens leave {room} for the prompt, after "
                f"{around} of the chat template and {new_tokens} of the answer: "
                f"lower benchmark.max_length or take a model with a longer context"
            )
        text, longest = prompt.text, prompter.max_length - new_tokens
        body = prompter.encode(text)
        cut = len(body) > limit
        if cut and not self.truncate:
            raise DataError(
                f"sample {identity} has {len(body)} prompt tokens, more than {limit}: set benchmark.truncate=true, "
                f"raise benchmark.max_length, or take a model with a longer context"
            )
        if cut:
            shorter = prompter.cut_middle(prompt.text, limit, lambda text: len(prompter.framed(frame, text)) - longest)
            if shorter is None:
                raise ConfigError(f"task {task}: {limit} tokens are too few for a prompt: raise benchmark.max_length")
            text = shorter
        after = len(prompter.continued(frame.after))
        tail = len(prompter.continued(prompt.tail + frame.after)) - after
        return prompter.framed(frame, text), min(tail, limit // 2 if cut else len(body)) + after, cut

    def score(self, record: Mapping[str, Any]) -> dict[str, float]:
        """The score in percent by the official metric of the set; for LongBench-E also under the name of the length
        bucket.

        Raises:
            DataError: the record lacks a field, or its task is not one of LongBench.
        """
        missing = [field for field in ("task", "prediction", "references", "metadata") if record.get(field) is None]
        if missing:
            raise DataError(f"a record of longbench lacks {', '.join(missing)}: run its sample again")
        metadata = record["metadata"]
        task = str(record["task"]).removesuffix("_e")
        if task not in TASKS:
            raise DataError(f"a record of longbench has the unknown task {record['task']!r}")
        metric = _METRICS.get(task, metrics.qa_f1)
        if task in _CLASSIFICATION:
            if "all_classes" not in metadata:
                raise DataError(f"a record of task {task} lacks metadata.all_classes: run its sample again")
            metric = partial(metrics.classification, classes=metadata["all_classes"])
        prediction, references = record["prediction"], record["references"]
        if not isinstance(prediction, str) or isinstance(references, str):
            raise DataError(f"a record of task {task} holds no text as prediction, or no list as references")
        if task in _FIRST_LINE:
            prediction = metrics.first_line(prediction)
        value = 100 * metrics.best(metric, prediction, references)
        return {"score": value} | ({metadata["bucket"]: value} if "bucket" in metadata else {})


def bucket(length: int) -> str:
    """LongBench-E's bucket of a context of ``length`` words."""
    return "0-4k" if length < 4000 else "4-8k" if length < 8000 else "8k+"
