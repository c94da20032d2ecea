"""Our methods inside lm-eval: ``lm_eval --model pqbench --model_args model=smollm2,method=pqcache --tasks ...``.

``python -m pqbench.lm_eval_model`` is the same command for installations in which the model is not registered (see
``lm_eval_plugin``). Prompts, truncation, chat templates and stop strings are those of lm-eval's own ``hf`` model. The
whole prompt is prefilled densely. The method then decodes the answer greedily, or reads the continuation that is
scored.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from lm_eval import __main__ as lm_eval_command
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from tqdm import tqdm

from pqbench.config.compose import explain, model_source, opened, own_budgets
from pqbench.config.shadow import check_import_path
from pqbench.engine.cohort import check_cohorts
from pqbench.engine.decode import decode
from pqbench.engine.prefill import prefill
from pqbench.engine.prefilled import Prefilled
from pqbench.engine.setting import Setting
from pqbench.engine.steps import Forced, Steps
from pqbench.errors import ConfigError, DataError, PqbenchError
from pqbench.integrations.lm_eval_plugin import register
from pqbench.integrations.transformers import stopping
from pqbench.method import compensated
from pqbench.records.classes import conf_folder
from pqbench.support.loading import rehearsed
from pqbench.terminal import log_to_terminal

log = logging.getLogger("pqbench")

_SYNONYMS = {"pretrained": "model.path", "dtype": "model.dtype", "max_length": "model.max_length"}
_OPTIONS = ("chunk", "threads", "budget", "model.", "methods.", "budget.")
_GREEDY = {"do_sample": (False, None), "num_beams": (1, None), "use_cache": (True, None)}
_UNUSED_BY_GREEDY = ("temperature", "top_k", "top_p", "typical_p", "min_p")

Request = tuple[tuple[str, str], list[int], list[int]]  # both texts, and the tokens of context and continuation


class PqbenchLM(HFLM):
    """lm-eval's ``hf`` model with pqbench's prefill and decode.

    Args:
        model: a name in conf/model. Instead, ``pretrained`` can name a local folder or a model on the hub.
        method: a name in conf/method.
        batch_size: number of prompts that ``generate_until`` decodes together. Log-likelihoods are computed one by one.
        device: where to run. ``cuda:0`` is the default of lm-eval's command, so on a machine without a GPU it means the
            device of the model's configuration.
        settings: overrides of the configuration, e.g. ``{"budget.ratio": 0.2, "methods.pqcache.m": 4}``. ``chunk``,
            ``threads`` and the group ``budget`` are allowed too. ``dtype`` and ``max_length`` set the model's fields.

    Raises:
        ConfigError: an unknown name or setting, or a value that cannot work.
        ModelError: the model cannot be loaded.
    """

    def __init__(
        self,
        model: str | None = None,
        method: str = "pqcache",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | int | None = None,
        enable_thinking: bool | None = None,
        chat_template_args: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        if device and (torch.cuda.is_available() or not device.startswith("cuda")):
            settings.setdefault("model.device", device)
        config = composed(model or ("hf" if "pretrained" in settings else "smollm2"), method, settings)
        if config.threads:
            torch.set_num_threads(config.threads)
        self.method = compensated(instantiate(config.methods[method]))
        source = model_source(config.model)
        source.check_answers("lm-eval")
        loaded = rehearsed(source)
        self.setting = Setting(max_length=loaded.max_length)
        self.chunk: int | None = config.chunk
        super().__init__(
            pretrained=loaded.model,
            tokenizer=loaded.tokenizer,
            backend="causal",
            max_length=loaded.max_length,
            batch_size=batch_size if str(batch_size).isdecimal() else 1,
            max_batch_size=max_batch_size,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            think_end_token=think_end_token,
            enable_thinking=enable_thinking,
            chat_template_args=chat_template_args,
        )

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval stores with its results."""
        return {"model_num_parameters": self.model.num_parameters(), "method": repr(self.method)}

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **options: Any) -> Tensor:
        """The prompts ``[B, S]`` followed by their greedy answers, ``[B, S + new]``. Called by ``generate_until``."""
        mask = options.pop("attention_mask", None)
        check_greedy(options)
        room = max_length - context.shape[1]
        criteria = stop_sequences_criteria(self.tokenizer, stop, 0, context.shape[0])
        with prefill(self.model, context, [self.method], mask, self.chunk, room, self.setting) as prefilled:
            generation = decode(prefilled, 0, room, finished=stopping(criteria, context[:, :0]))
            generation.settle()
        return torch.cat([context, generation.tokens], 1)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """The log-likelihood of every continuation, and whether greedy decoding would give it. One prefill serves all
        continuations of a context.

        Raises:
            DataError: a continuation has no tokens or exceeds the model's limit. lm-eval's ``hf`` model refuses these
                too.
        """
        check_continuations(requests, self.max_length)
        groups: dict[tuple[int, ...], list[int]] = {}
        for i, (_, context, continuation) in enumerate(requests):
            whole = (context + continuation)[
                -(self.max_length + 1) :
            ]  # as lm-eval truncates: the last token is scored but not read
            groups.setdefault(tuple(whole[: len(whole) - len(continuation)]), []).append(i)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests") as bar:
            for prompt, members in groups.items():
                longest = max(len(requests[i][2]) for i in members)
                ids = torch.tensor([prompt], device=self.device)
                with prefill(self.model, ids, [self.method], None, self.chunk, longest, self.setting) as prefilled:
                    for i in members:
                        texts, _, continuation = requests[i]
                        answers[i] = likelihood(prefilled, continuation)
                        if texts is not None:
                            self.cache_hook.add_partial("loglikelihood", texts, answers[i])
                        bar.update()
        return [answers[i] for i in range(len(requests))]


def check_continuations(requests: Sequence[Request], longest: int) -> None:
    """Raises DataError when a request cannot be scored. Either its continuation has no tokens of its own, because it is
    empty or merges with the last token of the context; or it has no context; or it exceeds the model's limit."""
    for texts, context, continuation in requests:
        shown = "" if texts is None else f" {texts[1][:60]!r}"
        if not continuation:
            raise DataError(
                f"the continuation{shown} has no tokens of its own behind its context: it is empty, or the "
                "tokenizer merges it with the end of the context; put a blank before it in the task"
            )
        if not context:
            raise DataError(f"the continuation{shown} has no context, not even a token that begins a text")
        if len(continuation) > longest:
            raise DataError(
                f"the continuation{shown} has {len(continuation)} tokens, but the model takes {longest}: "
                "use a model with a longer context, or a task with shorter answers"
            )


@torch.inference_mode()
def likelihood(prefilled: Prefilled, continuation: Sequence[int]) -> tuple[float, bool]:
    """The log-probability of the tokens after a prompt, which the prompt's first method reads one by one, and whether
    greedy decoding would have chosen all of them.

    Raises:
        SelectionError: the method selected invalid rows, or attended to more tokens than its budget allows.
    """
    cache = prefilled.fork(0)
    told: list[Tensor] = []  # log-probability, and whether the token is the likeliest; read once, at the end

    def tell(logits: Tensor) -> None:
        token = continuation[len(told)]
        told.append(torch.stack([torch.log_softmax(logits[0].float(), -1)[token], logits[0].argmax() == token]))

    if continuation:
        tell(prefilled.logits)
    with Steps(prefilled, cache, Forced(continuation[:-1], prefilled.lengths)) as steps:
        for step in steps:
            tell(step.logits)
    check_cohorts(cache.cohorts)
    for cohort in cache.cohorts:
        cohort.store.settle()
    rows = torch.stack(told).tolist() if told else []
    return sum((row[0] for row in rows), 0.0), all(row[1] for row in rows)


def composed(model: str, method: str, settings: Mapping[str, Any]) -> DictConfig:
    """The composed configuration of a model and a method with these settings. Raises ConfigError with one line."""
    values = {_SYNONYMS.get(name, name): None if value == "null" else value for name, value in settings.items()}
    unknown = [name for name in values if not name.startswith(_OPTIONS)]
    if unknown:
        known = "model, method, chunk, threads, budget, budget.*, methods.*, model.*, " + ", ".join(_SYNONYMS)
        raise ConfigError(f"model_args: there is no {unknown[0]!r}: use one of {known}")
    groups = {
        "model": model,
        "method": f"[{method}]",
        **({"budget": values.pop("budget")} if "budget" in values else {}),
    }
    try:
        GlobalHydra.instance().clear()
        check_import_path()
        with initialize_config_dir(str(conf_folder()), version_base="1.3"):
            config = compose("config", [f"{group}={choice}" for group, choice in groups.items()])
        for name, value in values.items():
            given = opened([f"{name}="])[0].rstrip("=")
            OmegaConf.update(config, given.lstrip("+"), value, force_add=given.startswith("+"))
        own_budgets(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"model_args: {explain(error)}") from error
    return config


def check_greedy(options: Mapping[str, Any]) -> None:
    """Raises ConfigError when the generation options ask for something else than greedy decoding."""
    for name, value in options.items():
        if name not in _UNUSED_BY_GREEDY and value not in _GREEDY.get(name, ()):
            raise ConfigError(f"generation option {name}={value!r}: pqbench decodes greedily; take it out of the task")


def main() -> int:
    """lm-eval's command with our model registered. Returns the exit code."""
    try:
        lm_eval_command.cli_evaluate()
    except PqbenchError as error:
        log_to_terminal()
        log.error(error)
        return error.exit_code
    return 0


register()
