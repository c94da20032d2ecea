"""Questions and documents of RULER's two QA tasks, from the official json files of SQuAD and HotpotQA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pqbench.benchmarks.ruler_library import library
from pqbench.errors import ConfigError, DataError

_FILES = {
    "qa_1": ("dev-v2.0.json", "quad", "SQuAD 2.0: https://rajpurkar.github.io/SQuAD-explorer/dataset/dev-v2.0.json"),
    "qa_2": (
        "hotpot_dev_distractor_v1.json",
        "hotpot",
        "HotpotQA: https://huggingface.co/datasets/namlh2004/hotpotqa/resolve/main/hotpot_dev_distractor_v1.json",
    ),
}


def load(task: str, data_dir: str | None) -> tuple[list[dict[str, Any]], list[str]]:
    """Answerable questions and all documents for ``qa_1`` (SQuAD) or ``qa_2`` (HotpotQA), in RULER's order.

    The file must have its official name, or be the only json file with ``quad`` or ``hotpot`` in its name.

    Raises:
        ConfigError: ``data_dir`` is not a folder.
        DataError: the file is missing, cut off, not UTF-8 or of another schema, or has no answerable question.
    """
    path = _find(task, data_dir)
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8; download it again") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: not whole JSON ({error.msg}); download it again") from error
    try:
        if task == "qa_1":
            _mark_answerable(content)
        module = library("qa_utils")
        reader = module.read_squad if task == "qa_1" else module.read_hotpotqa
        # The readers take a URL and cache its content; here it is the URL of a file, which may change.
        vars(module)["download_json"] = lambda _: content
        questions, documents = reader.__wrapped__(str(path))
        _check_types(questions, documents)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        name = "SQuAD" if task == "qa_1" else "HotpotQA"
        raise DataError(f"{path} does not have {name}'s schema ({type(error).__name__}: {error})") from error
    questions = [question for question in questions if question["outputs"]]
    if not questions:
        raise DataError(f"{path} has no question with an answer")
    return questions, documents


def _find(task: str, data_dir: str | None) -> Path:
    official, part, source = _FILES[task]
    remedy = f"download {source} into a folder and set benchmark.data_dir to it"
    if not data_dir:
        raise DataError(f"RULER's {task} needs data: {remedy}, or choose benchmark.tasks=[offline]")
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"benchmark.data_dir={data_dir} is no folder: {remedy}")
    if (folder / official).is_file():
        return folder / official
    found = sorted(path for path in folder.glob("*.json") if part in path.name.lower())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise DataError(f"{data_dir} must have {official}, or one json file named *{part}* (has: {names}): {remedy}")
    return found[0]


def _mark_answerable(content: Any) -> None:
    """Add ``is_impossible`` where it is missing: SQuAD 1.1 and its translations lack it, and all their questions have
    answers."""
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                question.setdefault("is_impossible", False)


def _check_types(questions: list[dict[str, Any]], documents: list[str]) -> None:
    texts = [*documents, *(q["query"] for q in questions), *(a for q in questions for a in q["outputs"])]
    for text in texts:
        if not isinstance(text, str) or not text:
            raise TypeError(f"expected text, found {str(text)[:40]!r}")
