"""Documents are speeches or parts of a file with exactly the requested length, and each text has a name of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from pqbench.benchmarks.base import Frame, Prompter
from pqbench.benchmarks.prose import speeches
from pqbench.errors import DataError
from pqbench.measure.fidelity.documents import file_documents, speech_documents
from pqbench.models.sources import LoadedModel


@pytest.fixture(scope="module")
def prompter(loaded: LoadedModel) -> Prompter:
    return Prompter(loaded.tokenizer, loaded.max_length)


def test_speeches_are_read_from_their_beginning(prompter: Prompter) -> None:
    documents = speech_documents(prompter, 3, 500, seed=0)
    lead = list(prompter.frame(chat=False).lead)
    for document in documents:
        corpus, number = document.name.split("-")
        text = " ".join(speeches()[int(number)].split())
        assert (corpus, len(document.ids)) == ("sotu", 500)
        assert document.ids == [*lead, *prompter.encode(text)][:500]
    assert len({document.name for document in documents}) == 3


def test_the_seed_decides_which(prompter: Prompter) -> None:
    names = [[d.name for d in speech_documents(prompter, 4, 300, seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    assert names[0][:2] == [d.name for d in speech_documents(prompter, 2, 300, 0)]


def test_too_short_speeches_are_passed_over(prompter: Prompter, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ("word " * 20, "long words here " * 200, "word " * 30, "other words there " * 200)
    monkeypatch.setattr("pqbench.measure.fidelity.documents.speeches", lambda: texts)
    assert {d.name for d in speech_documents(prompter, 2, 400, 0)} == {"sotu-001", "sotu-003"}
    with pytest.raises(DataError, match=r"benchmark.documents is 3, but only 2 of 4 speeches hold 400 tokens"):
        speech_documents(prompter, 3, 400, 0)


def test_a_file_is_cut_into_pieces_that_follow_each_other(prompter: Prompter, book: Path) -> None:
    pieces = file_documents(prompter, book, 3, 1000)
    lead = list(prompter.frame(chat=False).lead)
    own = 1000 - len(lead)
    whole = prompter.encode(book.read_text(encoding="utf-8"))
    for i, piece in enumerate(pieces):
        assert piece.ids == [*lead, *whole[i * own : (i + 1) * own]]
    assert [piece.name[-4:] for piece in pieces] == ["-000", "-001", "-002"]


def test_a_changed_file_has_other_names(prompter: Prompter, tmp_path: Path) -> None:
    path, names = tmp_path / "a.txt", []
    for text in ("some words " * 100, "other words " * 100, "some words " * 100):
        path.write_text(text, encoding="utf-8")
        names.append(file_documents(prompter, path, 1, 50)[0].name)
    assert names[0] == names[2] != names[1]


def test_a_byte_order_mark_is_no_text(prompter: Prompter, tmp_path: Path) -> None:
    plain, marked = tmp_path / "a.txt", tmp_path / "b.txt"
    plain.write_bytes(b"some words " * 100)
    marked.write_bytes(b"\xef\xbb\xbf" + b"some words " * 100)
    assert file_documents(prompter, plain, 1, 50)[0].ids == file_documents(prompter, marked, 1, 50)[0].ids


class Words(Prompter):
    """A tokenizer whose tokens are whole lines, which are unusually long."""

    def encode(self, text: str) -> list[int]:
        return [int(line.split()[1]) for line in text.splitlines() if len(line.split()) > 5]

    def frame(self, *, chat: bool = True) -> Frame:
        return Frame(lead=(7,))


def test_long_tokens_do_not_make_a_file_too_short(loaded: LoadedModel, book: Path) -> None:
    prompter = Words(loaded.tokenizer, loaded.max_length)
    first, second = file_documents(prompter, book, 2, 2001)
    assert (first.ids, second.ids) == ([7, *range(2000)], [7, *range(2000, 4000)])
    with pytest.raises(DataError, match="holds 6000 tokens, but 4 document"):
        file_documents(prompter, book, 4, 2001)


def test_unusable_files_are_one_line(prompter: Prompter, tmp_path: Path) -> None:
    short, binary = tmp_path / "short.txt", tmp_path / "binary.txt"
    short.write_text("three short words", encoding="utf-8")
    binary.write_bytes(b"abc\xff\xfe\x00")
    for path, words in (
        (tmp_path / "none.txt", "No such file"),
        (tmp_path, "Is a directory"),
        (short, "document(s) of 100 need"),
        (binary, "is not UTF-8 text (byte 3)"),
    ):
        with pytest.raises(DataError) as caught:
            file_documents(prompter, path, 1, 100)
        assert words in str(caught.value)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)
