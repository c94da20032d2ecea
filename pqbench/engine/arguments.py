"""Checks of the arguments that a caller passes from Python. They run before any work starts, and each problem is
reported in one line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from pqbench.errors import ConfigError
from pqbench.method import Method
from pqbench.typed import shown

Given = ParamSpec("Given")
Found = TypeVar("Found")

_IDS = "input_ids must be a tensor of token ids [B, S]"


def check_call(model: Any, input_ids: Any, methods: Any, attention_mask: Any = None) -> None:
    """Check the model, the prompts and the methods of a call.

    Raises:
        ConfigError: an argument has the wrong type, or the prompts lie on another device than the model. The message
            says what to pass instead.
    """
    check_model(model)
    check_ids(input_ids)
    device = getattr(model, "device", input_ids.device)
    if input_ids.device.type != device.type:
        raise ConfigError(
            f"input_ids lies on {input_ids.device}, the model on {device}: pass input_ids.to(model.device)"
        )
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ConfigError(f"attention_mask is a {type(attention_mask).__name__}: pass a tensor [B, S]")
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ConfigError(f"methods is {shown(methods)}: pass a list with at least one method, such as [PQCache()]")
    for method in methods:
        check_method(method)


def check_model(model: Any) -> None:
    """Raises ConfigError when the argument is not a PyTorch module, or when the model is in training mode."""
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"the model is a {type(model).__name__}: pass a transformers model, such as load_model(...).model"
        )
    if model.training:
        raise ConfigError("the model is in training mode, in which it may drop activations: call model.eval() first")


def check_ids(input_ids: Any) -> None:
    """Raises ConfigError for prompts that are not a tensor of whole numbers ``[B, S]``."""
    if not isinstance(input_ids, Tensor):
        raise ConfigError(f"{_IDS}, and it is a {type(input_ids).__name__}: pass torch.tensor([ids]) for one prompt")
    if input_ids.ndim == 1 and input_ids.numel():
        raise ConfigError(f"{_IDS}, and its shape is {tuple(input_ids.shape)}: pass input_ids[None] for one prompt")
    if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
        raise ConfigError(f"{_IDS}, and it holds {input_ids.dtype}: pass whole numbers, input_ids.long()")


def check_vocabulary(input_ids: Tensor, model: Any) -> None:
    """Raises ConfigError for token ids outside the model's vocabulary. Only tokens in host memory are checked, because
    the host would have to wait for a GPU to read its tokens."""
    if input_ids.device.type != "cpu" or not input_ids.numel():
        return
    known = model.get_input_embeddings().num_embeddings
    least, most = int(input_ids.min()), int(input_ids.max())
    if least < 0 or most >= known:
        raise ConfigError(
            f"input_ids holds the token {least if least < 0 else most}, and the model knows 0 to {known - 1}: use the "
            "tokenizer of this model"
        )


def check_method(method: Any) -> None:
    """Raises ConfigError when the argument is not a method. The message says what to pass instead, also for a method's
    class or name."""
    if isinstance(method, Method):
        return
    if isinstance(method, type) and issubclass(method, Method):
        raise ConfigError(f"the method is the class {method.__name__}: pass an object of it, {method.__name__}()")
    if isinstance(method, str):
        raise ConfigError(f"the method is the text {method!r}: pass an object, such as methods.pqcache.PQCache()")
    raise ConfigError(f"the method is {shown(method)}: pass an object of a method's class, such as PQCache()")


def outlives_exit(work: Callable[Given, Found]) -> Callable[Given, Found]:
    """Wrap ``work`` so that SystemExit becomes RuntimeError. A method that calls ``sys.exit`` then loses one sample and
    does not end the run. Every place where the harness enters a method's code is wrapped, in all measurements.

    Raises:
        RuntimeError: the work raised SystemExit; the message holds its code.
    """

    @wraps(work)
    def lasting(*given: Given.args, **named: Given.kwargs) -> Found:
        try:
            return work(*given, **named)
        except SystemExit as error:
            raise RuntimeError(f"a method would end the process: SystemExit({error.code})") from error

    return lasting


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises ConfigError when ``value`` is not a whole number of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name} is {shown(value)}: use a whole number from {least} up")
    if value < least:
        raise ConfigError(f"{name} is {value}: it must be at least {least}")
