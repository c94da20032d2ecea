"""Models and tokenizers: from the hub, a local folder, a GGUF file inside an installed package, or random weights.

Of model repositories, only safetensors files are read, and no code from them is ever run.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import PreTrainedTokenizerFast as FastTokenizer

from pqbench.errors import ModelError
from pqbench.models.devices import check_device, check_room
from pqbench.models.gguf import content_fingerprint, converted_folder, packaged_file
from pqbench.models.lengths import learned_positions, length_dependent, longest_context
from pqbench.models.loading import check_files, hub_reachable, load_folder
from pqbench.models.weights import folder_fingerprint, hub_fingerprint
from pqbench.typed import check_types

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with the longest context to use in tokens.

    ``weights`` says where the weights come from: ``pretrained`` or ``random``. ``stand_in`` is set if the model has
    random weights and only the shape of the model with its name. Then its times are meaningful and its answers are not.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    weights: str = "pretrained"
    stand_in: bool = False


@dataclass(frozen=True)
class ModelSource(ABC):
    """Base class of all sources of models. The files conf/model/*.yaml name its subclasses.

    Attributes:
        name: the name of the model in the results.
        dtype: float32, bfloat16 or float16.
        device: where the model runs: cpu, cuda, cuda:1, or auto, which spreads its layers over all GPUs.
        device_map: device by module name, as in transformers, for another distribution; replaces ``device``.
        max_length: longest context to use in tokens; None for the length that the model was made for, rotary scaling
            included. A greater length is used with a warning, unless the model has a table of positions that is
            shorter.
    """

    name: str
    dtype: str = "float32"
    device: str = "cpu"
    device_map: Mapping[str, Any] | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        check_types(self, "model", ModelError)
        if not self.name.strip():
            raise ModelError("model.name is empty: records are kept under it")
        check_least("model.max_length", self.max_length, 1, "null for what the model was made for")

    def check(self) -> None:
        """Check what can be checked without loading the model. Raises ModelError when the model cannot be loaded."""
        torch_dtype(self.dtype)

    def load(self) -> LoadedModel:
        """Load model and tokenizer.

        Raises:
            ModelError: the model cannot be loaded. The message is one line that says what is missing and what to do.
        """
        placement = self.placement
        if placement is None:
            check_device(self.device)
        model, tokenizer = self._load(torch_dtype(self.dtype))
        if placement is None:
            model = _moved(model, torch.device(self.device), self.name)
        check_placement(model)
        length = reach(model, self.max_length)
        return LoadedModel(self.name, model.eval(), tokenizer, length, self.origin, self.stand_in)

    @property
    def fingerprint(self) -> str | None:
        """Text that changes when the weights change although the fields of the source do not. It is part of the key of
        every run. None if the fields describe the weights completely."""
        return None

    @property
    def origin(self) -> str:
        """Where the weights come from: ``pretrained`` or ``random``."""
        return "pretrained"

    @property
    def stand_in(self) -> bool:
        """Whether the model has random weights and only the shape of the model with its name."""
        return False

    def check_answers(self, use: str) -> None:
        """Raises ModelError when the answers of this model are meaningless; ``use`` names the measurement that needs
        them."""
        if self.stand_in:
            raise ModelError(
                f"{use} needs the model's own weights, and model.weights=random has only the shape of "
                f"{self.name}: use benchmark=latency, or set model.weights=pretrained"
            )

    @property
    def placement(self) -> str | dict[str, Any] | None:
        """The argument ``device_map`` for transformers; None for a model on one device."""
        if self.device_map is not None:
            return dict(self.device_map)
        return "auto" if self.device == "auto" else None

    @abstractmethod
    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Load the model in ``dtype``, and its tokenizer."""


@dataclass(frozen=True)
class Pretrained(ModelSource):
    """A model from the hub or a local folder, or a model of the same shape with random weights.

    Attributes:
        path: hub name or folder.
        weights: pretrained or random. With random, nothing is downloaded, and the model is made in seconds on its
            device. This is enough for timings; the answers are meaningless and are not scored.
        shape: the fields of the model's config.json that concern its shape; used by ``weights=random``.
        seed: seed of the random weights.
    """

    path: str = ""
    weights: str = "pretrained"
    shape: Mapping[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights not in ("pretrained", "random"):
            raise ModelError(f"model.weights is {self.weights!r}: use pretrained or random")
        if self.stand_in and not self.shape:
            raise ModelError("model.weights=random needs model.shape, the fields of the model's config.json")

    @property
    def origin(self) -> str:
        return self.weights

    @property
    def stand_in(self) -> bool:
        return self.weights == "random"

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.stand_in:
            tokenizer = byte_tokenizer()
            return random_model(self, shape_config(self.shape or {}, tokenizer), dtype, self.seed), tokenizer
        self.check()
        local = Path(self.path).expanduser()
        return load_folder(str(local) if local.is_dir() else self.path, dtype, self.placement)

    def check(self) -> None:
        super().check()
        if self.stand_in:
            return
        if not self.path:
            raise ModelError(
                "model.path is empty: set it to a local folder or a hub name, e.g. model.path=/models/llama"
            )
        local = Path(self.path).expanduser()
        if local.is_dir() and not (local / "config.json").exists():
            raise ModelError(f"{local} holds no config.json: point model.path at a folder written by save_pretrained()")
        if local.is_dir():
            check_files(local)

    @property
    def fingerprint(self) -> str | None:
        local = Path(self.path).expanduser()
        if local.is_dir():
            return folder_fingerprint(local)
        return hub_fingerprint(self.path, hub_reachable()) if self.path else None


@dataclass(frozen=True)
class PackagedGGUF(ModelSource):
    """A GGUF file inside an installed package. It is dequantised once into a cache folder and loaded from there; see
    :mod:`pqbench.models.gguf`.

    Attributes:
        package: the name under which Python imports the package.
        file: the GGUF file inside the package.
        version: version of the package. Other versions are refused, because records identify models by the version.
    """

    package: str = ""
    file: str = ""
    version: str = ""

    def check(self) -> None:
        super().check()
        packaged_file(self.package, self.file, self.version)

    @property
    def fingerprint(self) -> str | None:
        return content_fingerprint(self.package, self.file, self.version)

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_folder(str(converted_folder(self.package, self.file, self.version)), dtype, self.placement)


@dataclass(frozen=True)
class Random(ModelSource):
    """A small Llama with random weights and a byte tokenizer. It runs every code path in seconds; its answers are
    meaningless.

    Attributes:
        intermediate: width of the feed-forward layers; None for twice the hidden size.
        vocab: size of the vocabulary; None for the bytes and the special tokens only.
    """

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 4096
    seed: int = 0
    intermediate: int | None = None
    vocab: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hidden", "layers", "heads", "kv_heads", "context", "intermediate"):
            check_least(f"model.{name}", getattr(self, name), 1)
        if self.hidden % (2 * self.heads):
            raise ModelError(
                f"model.hidden is {self.hidden} and model.heads {self.heads}: hidden must be a multiple of twice the "
                "heads, since every head has an even number of dimensions"
            )
        if self.heads % self.kv_heads:
            raise ModelError(
                f"model.kv_heads is {self.kv_heads} and model.heads {self.heads}: kv_heads must divide heads"
            )

    def check(self) -> None:
        super().check()
        if self.placement is not None:
            raise ModelError("random weights are made for one device: set model.device=cpu or cuda")

    @property
    def origin(self) -> str:
        return "random"

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        tokenizer = byte_tokenizer()
        shape = {
            "model_type": "llama",
            "vocab_size": len(tokenizer) if self.vocab is None else self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate or 2 * self.hidden,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "max_position_embeddings": self.context,
        }
        return random_model(self, shape_config(shape, tokenizer), dtype, self.seed), tokenizer


def shape_config(shape: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The configuration of a model of this shape with the end and padding tokens of the byte tokenizer. ``shape`` holds
    fields of a config.json. Raises ModelError when the vocabulary is smaller than that of the tokenizer."""
    if shape.get("vocab_size", 0) < len(tokenizer):
        raise ModelError(
            f"a vocabulary of {shape.get('vocab_size')} is too small: the byte tokenizer has {len(tokenizer)} tokens"
        )
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    fields = {**shape, **ends}
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def random_model(source: ModelSource, config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """A model with random weights. They are made on the device where the model will run, so that eight billion weights
    take only seconds.

    Transformers' own initialisation draws normal weights with the configuration's ``initializer_range``, with which
    activations stay small over any number of layers. The weights depend on the seed and on the kind of device. The
    state of the global generators is not changed.

    Raises:
        ModelError: the model should be spread over several devices, or it does not fit the device.
    """
    if source.placement is not None:
        raise ModelError("random weights are made for one device: set model.device=cpu or cuda")
    device = torch.device(source.device)
    with torch.device("meta"):
        needed = AutoModelForCausalLM.from_config(config, dtype=dtype).num_parameters() * dtype.itemsize
    check_room(needed, device, f"the weights of {source.name}", "use a smaller model.dtype or a smaller model")
    with torch.random.fork_rng([device] if device.type == "cuda" else []), device:
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def _moved(model: PreTrainedModel, device: torch.device, name: str) -> PreTrainedModel:
    """The model on its device. Raises ModelError when it does not fit there."""
    if model.device.type == device.type and device.index in (None, model.device.index):
        return model
    check_room(
        sum(p.nbytes for p in model.parameters()),
        device,
        f"the weights of {name}",
        "use a smaller model.dtype, a smaller model, or model.device=auto",
    )
    return model.to(device)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer with one token per byte, plus ``<|end|>`` and ``<|pad|>``. It needs no file and no network."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return FastTokenizer(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")


def check_least(name: str, value: int | None, least: int, otherwise: str = "") -> None:
    """Raises ModelError for a number below ``least``. None is allowed; ``otherwise`` says in the message what None
    means."""
    if value is not None and value < least:
        raise ModelError(f"{name} is {value}: use at least {least}{f', or {otherwise}' if otherwise else ''}")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype with this name. Raises ModelError when models cannot be run in it."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"model.dtype is {name!r}: use one of {', '.join(known)}")
    return known[name]


def reach(model: PreTrainedModel, wanted: int | None) -> int:
    """The longest context to use, in tokens: ``wanted``, or the length that the model was made for. Raises ModelError
    when ``wanted`` is beyond the model's learned positions, or beyond the length at which its rotary frequencies change
    with every token."""
    made_for = longest_context(model.config)
    if wanted is None or wanted <= made_for:
        return wanted or made_for
    if length_dependent(model.config) == "dynamic":
        raise ModelError(
            f"model.max_length is {wanted}, but the model's rotary frequencies change with every token beyond "
            f"{made_for} (dynamic), which keys in a cache cannot follow: use {made_for} at most"
        )
    table = learned_positions(model)
    if table is not None:
        raise ModelError(f"model.max_length is {wanted}, but the model only has learned positions for {table} tokens")
    log.warning(
        "model.max_length is %d, above the %d tokens that the model was made for: its answers may be worthless",
        wanted,
        made_for,
    )
    return wanted


def check_placement(model: PreTrainedModel) -> None:
    """Raises ModelError when some layers of a model on GPUs lie in host memory or on disk."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ModelError(
            "the model does not fit the GPUs here, some layers would lie on "
            f"{' and '.join(sorted(places & {'cpu', 'disk'}))}: use more GPUs or a smaller model"
        )
