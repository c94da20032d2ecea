"""Append-only records: one JSON object per line, and one folder per configuration, named by a hash of its settings.

Several processes may write to one folder, because every write holds the lock ``records.jsonl.lock``. Reading needs no
lock.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from pqbench.errors import DataError
from pqbench.records.environment import differences, environment
from pqbench.records.folders import RunFolder, environments, key_of, measured_again, read_folders, tell_of_older
from pqbench.records.identity import class_names, harness_code
from pqbench.records.stamp import NAME as STAMP
from pqbench.records.stamp import Stamp

log = logging.getLogger(__name__)

VERSION = 2  # version of the record format; part of every key, so that no file mixes formats
READABLE = (1, 2)  # formats that tables and plots understand
Record = dict[str, Any]
TAIL = 256  # bytes before the offset that are compared to see whether a file is still the same
FINISHED = ("ok", "refused")  # statuses that are not failures; refused: this machine cannot run what was to be measured


def run_key(settings: Mapping[str, Any]) -> str:
    """Twelve hex digits that identify a configuration. They depend neither on the order of the settings nor on the
    modules of classes."""
    text = json.dumps({"version": VERSION, **class_names(settings)}, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@dataclass
class RecordFile:
    """The records of one method on one benchmark and model, at ``root/<benchmark>/<model>/<method>-<key>/``.

    The folder also holds ``config.yaml``, the settings behind the key, written once, ``environment.json``, a list of
    all different environments in which the run was measured, oldest first, and ``run.json``, the :class:`Stamp` of the
    folder. ``planned`` is the number of samples that the present job wants here; None until it is known.
    """

    folder: Path
    planned: int | None = field(default=None, init=False, compare=False)
    _written: dict[str, tuple[str, Any]] = field(default_factory=dict, init=False, repr=False)
    _offset: int = field(default=0, init=False, repr=False)
    _inode: int = field(default=-1, init=False, repr=False)
    _tail: bytes = field(default=b"", init=False, repr=False)  # the last bytes of the file before the offset
    _token: str | None = field(default=None, init=False, repr=False)  # of the folder that create() prepared

    @classmethod
    def create(cls, root: Path, benchmark: str, model: str, method: str, settings: Mapping[str, Any]) -> RecordFile:
        """The file for these settings. Its folder is created if it is missing.

        Raises:
            DataError: the results folder cannot be written.
        """
        parts = (plain_name(benchmark), plain_name(model), f"{plain_name(method)}-{run_key(settings)}")
        file = cls(root.joinpath(*parts))
        try:
            file.folder.mkdir(parents=True, exist_ok=True)
            with file.lock():
                config = file.folder / "config.yaml"
                if not config.exists():
                    tell_of_older(file.folder, settings)
                    write_atomically(config, yaml.safe_dump(dict(settings), sort_keys=False).encode())
                file._note_environment()
                file.path.open("ab").close()  # fail now rather than after the first measurement
                stamp = Stamp.now(Stamp.of(file.folder))
                write_atomically(file.folder / STAMP, stamp.encode())
                file._token = stamp.token
        except OSError as error:
            raise unwritable(file.folder, error) from error
        return file

    @property
    def path(self) -> Path:
        """The jsonl file itself."""
        return self.folder / "records.jsonl"

    @property
    def key(self) -> str:
        """The key of the run, with which the folder's name ends."""
        return key_of(self.folder)

    def lock(self) -> FileLock:
        """The lock that a process must hold while it writes to this folder."""
        return FileLock(f"{self.path}.lock")

    def read(self) -> list[Record]:
        """The newest record of every sample, in the order samples first appeared.

        Broken lines and records of another format version are left out. A warning counts them.
        """
        newest, foreign = newest_of(read_lines(self.path))
        if foreign:
            log.warning("%s: left out %s", self.path, _other_version(foreign))
        return newest

    def count(self) -> int:
        """Number of samples that have a record. It does not warn of broken lines, as :meth:`read` does."""
        lines = self.path.read_bytes().split(b"\n") if self.path.exists() else []
        return len({found["sample_id"] for found in map(parse, lines) if found and found.get("version") == VERSION})

    def outcomes(self) -> dict[str, str | None]:
        """The error of each sample that has a record; None if the sample did not fail. Failures of other versions of
        the code are left out, so that these samples run again."""
        return {
            record["sample_id"]: None if record["status"] in FINISHED else str(record.get("error"))
            for record in self.read()
            if record["status"] in FINISHED or record.get("code") == harness_code()
        }

    def outcome(self, sample_id: str) -> tuple[bool, str | None]:
        """Whether a sample has a record now, also one of another process, and its error as in :meth:`outcomes`.

        Raises:
            DataError: the folder cannot be written, which is needed to take its lock; or records that this process has
                seen were deleted.
        """
        self._check_folder()
        try:
            with self.lock():
                self._catch_up(sample_id)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        status, (error_text, code) = self._written.get(sample_id, (None, (None, None)))
        finished = status in FINISHED
        return finished or (status is not None and code == harness_code()), None if finished else error_text

    def append(self, record: Record) -> bool:
        """Write one line durably. If the record says nothing new, nothing is written and the result is False. This is
        the case when another process has finished the sample since then, or when it failed again in the same way.

        Raises:
            DataError: the file cannot be written, the disk is full, or what this process has seen in the file was
                deleted.
        """
        record = record | {"version": VERSION}
        if record["status"] != "ok":
            record["code"] = harness_code()
        line = encode(record)
        self._check_folder()
        try:
            with self.lock():
                self._check_folder()  # again, since another process may have held the lock and changed it
                self._catch_up(record["sample_id"])
                known = self._written.get(record["sample_id"])
                if known and (known[0] == "ok" or known == _outcome(record)):
                    return False
                with self.path.open("ab") as file:
                    file.truncate(self._offset)  # remove a line that was cut by a kill
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
                    self._inode = os.fstat(file.fileno()).st_ino
                self._offset += len(line)
                self._tail = line[-TAIL:]
                self._written[record["sample_id"]] = _outcome(record)
        except OSError as error:
            raise unwritable(self.folder, error) from error
        return True

    def _check_folder(self) -> None:
        """Raises DataError when the folder was deleted or replaced after it was prepared. Earlier records are then
        gone, and a new record would lie in a folder without its configuration."""
        if self._token is None:
            return
        stamp = Stamp.of(self.folder)
        if stamp is None or stamp.token != self._token:
            raise _deleted(self.folder, len(self._written))

    def _catch_up(self, due: str) -> None:
        """Read the lines that were added to the file since the last call. The first call reads all lines, and so does a
        call after the file was rewritten. The caller must hold the lock.

        Args:
            due: the sample that the caller asks about. If its record is gone, the sample is measured again, so that
                nothing is lost.

        Raises:
            DataError: records of other samples are gone.
        """
        if not self.path.exists():
            self._check_lost(due, {})
            self._written, self._offset, self._inode, self._tail = {}, 0, -1, b""
            return
        with self.path.open("rb+") as file:
            inode = os.fstat(file.fileno()).st_ino
            file.seek(self._offset - len(self._tail))
            same = inode == self._inode and file.read(len(self._tail)) == self._tail
            start = self._offset if same else 0  # it was rewritten, or edited by hand
            file.seek(start)
            data = file.read()
            whole, newline, rest = data.rpartition(b"\n")
            if parse(rest):  # a whole record that lacks only its newline, which some editors remove
                file.write(b"\n")
                whole, newline = data, b"\n"
        records = [record for record in map(parse, whole.split(b"\n")) if record and record.get("version") == VERSION]
        found = {record["sample_id"]: _outcome(record) for record in records}
        if not same:
            self._check_lost(due, found)
            self._written, self._tail = {}, b""
        self._written |= found
        self._offset, self._inode = start + len(whole) + len(newline), inode
        self._tail = (self._tail + whole + newline)[-TAIL:]

    def _check_lost(self, due: str, found: Mapping[str, Any]) -> None:
        """Raises DataError when records that were written are not found any more, except that of the sample due."""
        lost = self._written.keys() - found.keys() - {due}
        if lost:
            raise _deleted(self.path, len(lost))

    def _note_environment(self) -> None:
        path, present = self.folder / "environment.json", environment()
        known = environments(path)
        if present in known:
            return
        if known:
            changes = "; ".join(differences(known[-1], present))
            log.warning("%s: this run continues in another environment: %s", path, changes)
        write_atomically(path, json.dumps([*known, present], indent=1).encode())


def encode(record: Record) -> bytes:
    """The line of a record: strict JSON in ASCII. NaN and infinities become null, which every reader understands."""
    return json.dumps(plain_json(record), ensure_ascii=True, allow_nan=False).encode() + b"\n"


def parse(line: bytes) -> Record | None:
    """The record on a line; None if the line is not a record."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(record, dict):
        return None
    return record if all(isinstance(record.get(name), str) for name in ("sample_id", "status")) else None


def read_lines(path: Path) -> Iterator[Record]:
    """Records of a jsonl file. Broken lines are skipped, and one warning counts them.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    broken = []
    for number, line in enumerate(data.split(b"\n"), 1):
        record = parse(line)
        if record:
            yield record
        elif line.strip():
            broken.append(number)
    if broken:
        shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
        log.warning("%s: skipped %d broken line(s) (%s); a run measures their samples again", path, len(broken), shown)


def read_all(root: Path, all_code: bool = False, folders: Sequence[RunFolder] | None = None) -> list[Record]:
    """Every record under a results folder. Records of another format version are left out with one warning. So are
    records of older code whose sample was measured again: see :func:`measured_again`.

    Args:
        root: the results folder.
        all_code: keep the records of older code, and mark their method as such.
        folders: the run folders under ``root``, if the caller has already read them.

    Raises:
        DataError: the folder does not exist, or a file in it cannot be read.
    """
    known = read_folders(root) if folders is None else folders
    read = [newest_of(read_lines(RecordFile(folder.path).path)) for folder in known]
    older = measured_again(known, [newest for newest, _ in read])
    records: list[Record] = []
    for (newest, _), hidden in zip(read, older, strict=True):
        for record in newest:
            if record["sample_id"] not in hidden:
                records.append(record)
            elif all_code:
                records.append(record | {"method": f"{record.get('method')} (older code)"})
    count, foreign = sum(map(len, older)), [version for _, others in read for version in others]
    if count and not all_code:
        how = "`python -m pqbench.tables --all-code` shows them"
        log.warning("%s: left out %d record(s) of older code, measured again since: %s", root, count, how)
    if foreign:
        log.warning("%s: left out %s", root, _other_version(foreign))
    return records


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content in one step, so that a reader never sees half of it, not even after a kill."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def plain_json(value: Any) -> Any:
    """``value`` in JSON's types. Non-finite numbers become null, numpy and torch scalars become numbers, and other
    objects become text."""
    if isinstance(value, Mapping):
        return {str(name): plain_json(member) for name, member in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain_json(member) for member in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    return plain_json(value.item()) if hasattr(value, "item") else str(value)


def plain_name(text: str) -> str:
    """A name that is safe as one path component."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in text).lstrip(".")
    return safe or "_"


def unwritable(folder: Path, error: OSError) -> DataError:
    """The error for a results folder that cannot be written."""
    return DataError(
        f"cannot write results to {folder}: {error.strerror or error}; set results=FOLDER to one you may write"
    )


def _deleted(place: Path, count: int) -> DataError:
    """The error of records that were deleted while a run wrote beside them."""
    return DataError(
        f"{place} was deleted or replaced while this run wrote to it; {count} record(s) of it are gone: the same "
        "command measures them again"
    )


def _outcome(record: Record) -> tuple[str, Any]:
    return record["status"], (record.get("error"), record.get("code"))


def newest_of(lines: Iterable[Record]) -> tuple[list[Record], list[Any]]:
    """The newest record of every sample, and the format versions of the records that have another format."""
    newest: dict[str, Record] = {}
    foreign = []
    for record in lines:
        if record.get("version") in READABLE:
            newest[record["sample_id"]] = record
        else:
            foreign.append(record.get("version", "unknown"))
    return list(newest.values()), foreign


def _other_version(found: list[Any]) -> str:
    versions = ", ".join(sorted({str(version)[:20] for version in found}))
    known = ", ".join(map(str, READABLE))
    return (
        f"{len(found)} record(s) of format version {versions}; this pqbench reads {known}: use the one that "
        "wrote them, or measure again (new records go to folders of their own)"
    )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
