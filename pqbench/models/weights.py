"""Fingerprints, which distinguish different weights under the same path."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

_DIGITS = 16
_HEADER = struct.Struct("<Q")  # a safetensors file begins with the length of its header


def folder_fingerprint(folder: Path) -> str:
    """Hexadecimal digits that change when a model folder changes. They depend on the content of the configuration,
    tokenizer and template files. The safetensors files are too large to read, so only their headers, sizes and times of
    the last change are used. A copy that keeps these times keeps the fingerprint."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix == ".safetensors":
            stat = path.stat()
            with path.open("rb") as file:
                length = file.read(_HEADER.size)
                header = file.read(min(_HEADER.unpack(length)[0], stat.st_size)) if len(length) == _HEADER.size else b""
            digest.update(f"{path.name} {stat.st_size} {stat.st_mtime_ns} ".encode() + header)
        elif path.suffix in (".json", ".jinja", ".model", ".txt"):
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:_DIGITS]


def hub_fingerprint(name: str, reachable: bool) -> str | None:
    """The commit of the hub model that would be loaded: the newest commit on the hub or, without a network, the commit
    in the cache. None if neither is known."""
    if reachable:
        try:
            commit = HfApi().model_info(name, timeout=10).sha
        except (HfHubHTTPError, HFValidationError, OSError):
            commit = None
        if commit:
            return commit[:_DIGITS]
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # not a valid name of a model; loading reports this
        return None
    return Path(cached).parent.name[:_DIGITS] if isinstance(cached, str) else None
