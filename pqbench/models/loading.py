"""Loads a model from a folder or from the hub with transformers. Every problem is reported in one line.

Only safetensors files are read, and no code from a model repository is ever run.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from huggingface_hub import constants
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pqbench.errors import ModelError

# Tensors that old checkpoints hold although the model computes them by itself: rotary frequencies and their tables,
# causal masks, and position numbers. They may be missing or unexpected.
_COMPUTED = re.compile(
    r"(^|\.)(inv_freq|cos_cached|sin_cached|position_ids|masked_bias|(attn|attention|self_attn)\.bias)$"
)
_JSON = ("config.json", "generation_config.json", "tokenizer_config.json", "model.safetensors.index.json")
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken")  # file names; every tokenizer has at least one of them
_NO_TOKENIZER = "copy tokenizer.json and tokenizer_config.json of the model to its other files"
_SHOWN = 4  # number of tensors of a kind that a message names


def load_folder(
    path: str, dtype: torch.dtype, device_map: str | dict[str, Any] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model and the tokenizer of a folder or of a hub name.

    Raises:
        ModelError: the configuration, the tokenizer or the weights are missing or broken, or the weights do not fit the
            configuration. The message says in one line which of these is the case.
    """
    folder = Path(path).is_dir()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": folder or not hub_reachable()}
    if folder:
        check_files(Path(path))
    config = _configuration(path, folder, options)
    with one_line(f"cannot load the tokenizer of model {path!r}", _NO_TOKENIZER):
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    with one_line(f"cannot load the weights of model {path!r}", "copy its .safetensors files again"):
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names these tensors, and transformers' own error does not
            **options,
        )
    check_report(model, report, path)
    return model, tokenizer


def check_report(model: PreTrainedModel, report: Mapping[str, Any], path: str) -> None:
    """Compare the tensors of a checkpoint with those that its model needs. ``report`` is transformers' loading
    information.

    Transformers itself ignores tied weights and tensors that a model class declares to be harmless. Here, tensors that
    the model computes by itself are ignored too, and unexpected tensors of a part that the model does not have, such as
    the head of another task.

    Raises:
        ModelError: a tensor is missing, unexpected or of another shape. The model would otherwise run without it or
            with random numbers in its place.
    """
    parts = {name for name, _ in model.named_children()}
    missing = sorted(key for key in report["missing_keys"] if not _COMPUTED.search(key))
    unexpected = sorted(
        key for key in report["unexpected_keys"] if not _COMPUTED.search(key) and key.split(".")[0] in parts
    )
    misshapen = sorted(
        f"{key} ({_shape(held)} instead of {_shape(needed)})" for key, held, needed in report["mismatched_keys"]
    )
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen}
    faults = [f"{kind}: {_listed(keys)}" for kind, keys in kinds.items() if keys]
    if faults:
        raise ModelError(
            f"the weights of model {path!r} do not fit its configuration; {'; '.join(faults)}. Use the config.json and "
            "the weight files of one and the same model"
        )


def check_files(folder: Path) -> None:
    """Check the small files in a model folder, because transformers silently skips some of them when they are broken.

    Raises:
        ModelError: there is no tokenizer, or a settings file is not a JSON object.
    """
    for path in (folder / name for name in _JSON):
        if not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            raise ModelError(f"{path} is broken ({brief(error)}): copy this file of the model again") from error
        if not isinstance(found, dict):
            raise ModelError(f"{path} is not a JSON object: copy this file of the model again")
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        raise ModelError(f"there is no tokenizer in {folder}: {_NO_TOKENIZER}")


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Turn any error of transformers into a ModelError that says ``what`` failed and why, and gives the ``remedy``."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # broken files make transformers raise errors of any type
        raise ModelError(f"{what} ({brief(error)}): {remedy}") from error


def brief(error: BaseException) -> str:
    """The beginning of an error's message, on one line and without its full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= 200 else text[:200].rsplit(" ", 1)[0] + " ..."


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers. It is asked only once. If it does not answer, only local and cached files are used,
    because the hub's own client would retry for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # behind a proxy, a direct connection proves nothing
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout).close()
    except OSError:
        return False
    return True


def _configuration(path: str, folder: bool, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of a model. Raises ModelError when it is missing or transformers does not understand it."""
    if folder:
        with one_line(f"cannot use {path}/config.json", "copy this file of the model again"):
            return AutoConfig.from_pretrained(path, **options)
    what = f"cannot load model {path!r}, which is neither a local folder nor reachable on the hub"
    with one_line(what, "download it elsewhere and set model.path=/folder/of/the/model"):
        return AutoConfig.from_pretrained(path, **options)


def _listed(keys: list[str]) -> str:
    more = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _shape(sizes: Iterable[int]) -> str:
    return " x ".join(map(str, sizes))
