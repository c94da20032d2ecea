"""Official benchmark files: they are found in a folder, a zip archive or the hub, and each row is checked against a
schema."""

from __future__ import annotations

import gzip
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

from pqbench.errors import ConfigError, DataError

Source: TypeAlias = Path | zipfile.Path

ARCHIVE = "data.zip"


@dataclass(frozen=True)
class Kind:
    """The kind of value that a field may hold.

    Attributes:
        says: the expected value in words, for the error message.
        accepts: whether a value is of this kind.
    """

    says: str
    accepts: Callable[[Any], bool]


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


TEXT = Kind("a string", lambda value: isinstance(value, str))
INTEGER = Kind("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool))
TEXTS = Kind("a list of strings", _is_texts)
ANSWERS = Kind("a list of at least one string", lambda value: _is_texts(value) and bool(value))
TEXTS_OR_NULL = Kind("a list of strings or null", lambda value: value is None or _is_texts(value))


def find(data_dir: str | Path, filename: str, *, remedy: str) -> Source:
    """The file ``filename`` in ``data_dir``: plain, gzipped, in a sub-folder ``data``, or in ``data.zip``.

    Args:
        data_dir: a folder, or a zip archive itself.
        filename: the official name, like ``qasper.jsonl``.
        remedy: what to download and which option to set, for the error message.

    Raises:
        ConfigError: ``data_dir`` does not exist.
        DataError: ``data_dir`` holds no such file, or its archive is damaged.
    """
    root = Path(data_dir).expanduser()
    if not root.exists():
        raise ConfigError(f"benchmark.data_dir={data_dir} does not exist: {remedy}")
    archive = root if root.is_file() else root / ARCHIVE
    if root.is_dir():
        for folder in (root, root / "data"):
            for path in (folder / filename, folder / f"{filename}.gz"):
                if path.is_file():
                    return path
    if archive.is_file():
        member = _member(archive, filename)
        if member is not None:
            return member
    raise DataError(f"{filename} is missing in {data_dir}: {remedy}")


def _member(archive: Path, filename: str) -> zipfile.Path | None:
    try:
        with zipfile.ZipFile(archive) as opened:
            names = [name for name in opened.namelist() if name.rpartition("/")[2] == filename]
    except zipfile.BadZipFile as error:
        raise DataError(f"{archive} is not a whole zip archive ({error}): download it again") from error
    # Archives made on a Mac hold a second entry for each file in a folder of this name.
    names = [name for name in names if not name.startswith("__MACOSX/")]
    return zipfile.Path(archive, names[0]) if names else None


def hub_file(repository: str, filename: str, *, remedy: str, revision: str | None = None) -> Path:
    """Local path of a file of a data set repository on the Hugging Face hub, downloaded on first use.

    Raises:
        DataError: the hub cannot be reached or refuses, and no earlier download is cached.
    """
    from huggingface_hub import hf_hub_download  # slow to import, and not needed with local data

    from pqbench.models.loading import hub_reachable  # likewise

    cached = not hub_reachable()  # the hub's own client would try again, with warnings, for half a minute
    try:
        found = hf_hub_download(repository, filename, repo_type="dataset", revision=revision, local_files_only=cached)
        return Path(found)
    except OSError as error:
        reason = "it cannot be reached, and nothing is cached" if cached else str(error).strip().partition("\n")[0]
        raise DataError(f"cannot download {filename} of {repository} from the hub ({reason}): {remedy}") from error


@contextmanager
def _open(source: Source) -> Iterator[IO[bytes]]:
    if isinstance(source, zipfile.Path):
        with source.open("rb") as handle:
            yield handle
    elif source.name.endswith(".gz"):
        with gzip.open(source, "rb") as handle:
            yield handle  # type: ignore[misc]
    else:
        with source.open("rb") as handle:
            yield handle


def read_rows(source: str | Source, fields: Mapping[str, Kind], *, limit: int | None = None) -> list[dict[str, Any]]:
    """The rows of a jsonl file, in order; blank lines are skipped.

    Args:
        source: a path (``.jsonl`` or ``.jsonl.gz``) or a member of an archive, as ``find`` returns it.
        fields: the schema; rows may hold more.
        limit: stop after this many rows.

    Raises:
        DataError: the file is missing, damaged, empty or not UTF-8, or a row is cut off, lacks a field or has a field
            of the wrong type. The message names the file and the line.
    """
    path = Path(source) if isinstance(source, str) else source
    if not path.is_file():
        raise DataError(f"{path} is missing")
    rows: list[dict[str, Any]] = []
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, start=1):
                if limit is not None and len(rows) >= limit:
                    break
                if line.strip():
                    rows.append(_row(line, fields, f"{path}, line {number}"))
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged after {len(rows)} rows ({error}): download it again") from error
    if not rows and limit != 0:
        raise DataError(f"{path} holds no rows: download it again")
    return rows


def _row(line: bytes, fields: Mapping[str, Kind], where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a whole JSON object ({error.msg}, character {error.pos + 1})") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
    for name, kind in fields.items():
        if name not in row:
            raise DataError(f"{where}: field {name!r} is missing (found {', '.join(map(repr, row))})")
        if not kind.accepts(row[name]):
            raise DataError(f"{where}: field {name!r} must be {kind.says}, found {_shorten(row[name])}")
    return row


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
