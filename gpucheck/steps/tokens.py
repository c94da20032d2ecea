"""Step 3: a random model of four layers generates the same tokens over every tier, with and without overlap, and the
Triton backend computes the same as the reference.

Tokens over different tiers must be equal, since the same kernel attends to the same rows in the same order. Two
backends round differently, so their logits are compared on the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from gpucheck.options import Options
from gpucheck.result import Result, Skipped
from methods.pqcache import PQCache
from pqbench.engine.decode import generate
from pqbench.engine.prefill import prefill
from pqbench.engine.setting import Setting
from pqbench.engine.steps import Forced, Steps
from pqbench.errors import ConfigError
from pqbench.method import Budget, Method
from pqbench.store.tiers import DeviceTier, HostTier
from tests.engine.test_generation import methods

CACHE: dict[str, Any] = {"cache_tokens": 64, "cache_block": 16, "cache_admit": 2}
FIRST = (
    "full",
    "pqcache",
    "pqcache, codes on host",
    "pqcache_plus",
)  # compared in every setting; the other methods in few
CAPTURED = ("full", "pqcache")  # methods that support captured steps
NEAR_HALF = 10  # first tokens that must agree in half precision, where kernels round differently for other strides
NEW = 40  # more than half the ring's margin, so that tokens leave for the host
AGREEING = 0.9  # share of steps in which two backends choose the same token
NEAR = {"full": 0.02, "pqcache": 0.1}  # median error of logits in standard deviations; codes and selections differ


def run(result: Result, options: Options) -> None:
    """Compare tiers and backends; the most important comparisons come first, in case time runs out."""
    device = torch.device(options.device)
    model = made(options, torch.float32)
    prompt = torch.randint(1, 128, (1, 280 if options.tiny else 3_000), generator=torch.Generator().manual_seed(2))
    ids = prompt.to(device)
    budget = Budget(sink=8, tokens=96, ratio=None) if options.tiny else Budget(sink=16, tokens=512, ratio=None)
    chosen = several(budget, options)
    for name in ("full", "pqcache"):
        with result.guarded(f"{name}: kernels gpu against reference"):
            _bodies(result, model, ids, name, chosen[name], 4 if options.tiny else 24)
    for name, method in chosen.items():
        if result.left < 4:
            result.row("methods left out", skipped=f"no time for {name} and those after it")
            return
        _tiers(result, model, ids, name, method, name in FIRST)
    if options.on_gpu:
        half = made(options, torch.bfloat16)
        for name in FIRST:
            _tiers(result, half, ids, name, chosen[name], result.left > 10, ", bfloat16")


def several(budget: Budget, options: Options) -> dict[str, Method]:
    """Every method; if time is short, only those that use the stores in a way of their own."""
    known = methods(budget)
    known["pqcache, codes on host"] = PQCache(budget, m=2, b=4, codes_on="host")
    names = [*FIRST, "sparq", "tova"] if options.tiny else [*FIRST, *(name for name in known if name not in FIRST)]
    return {name: known[name] for name in names}


def made(options: Options, kind: torch.dtype) -> PreTrainedModel:
    """A model whose greedy continuations vary from token to token."""
    hidden, heads, kv_heads = (64, 4, 2) if options.tiny else (1_024, 8, 2)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden // heads,
        max_position_embeddings=8_192,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, 0.0, 1.6 * hidden**-0.5)
    return model.to(options.device, kind).eval()


def settings(everything: bool) -> dict[str, Setting]:
    """Settings that must give the same tokens as the device tier without overlap."""
    found = {"device": Setting(), "host": Setting(HostTier()), "host, cache": Setting(HostTier(**CACHE))}
    if everything:
        found |= {
            "host, overlap off": Setting(HostTier(background=False), overlap=False),
            "host, cache per head, small ring": Setting(HostTier(**CACHE, cache_per_head=True, margin=4)),
            "host, poisoned": Setting(HostTier(**CACHE, debug=True, margin=4)),
        }
    return found


def captured(name: str) -> dict[str, Setting]:
    """Settings with CUDA graphs, and with selection ahead that is always corrected, for the methods that support
    them."""
    if name not in CAPTURED:
        return {}
    found = {"device, graphs": Setting(graphs=True)}
    if name == "pqcache":
        found |= {
            "host, graphs": Setting(HostTier(), graphs=True),
            "host, cache, graphs": Setting(HostTier(**CACHE), graphs=True),
            "host, selected ahead": Setting(HostTier(), select_ahead=True, correction=1.0),
            "host, graphs, selected ahead": Setting(HostTier(), graphs=True, select_ahead=True, correction=1.0),
        }
    return found


def _tiers(
    result: Result, model: PreTrainedModel, ids: Tensor, name: str, method: Method, everything: bool, note: str = ""
) -> None:
    """Compare one method over every tier with the device tier without overlap."""
    with result.guarded(f"{name}{note}"):
        expected = generate(model, ids, method, max_new_tokens=NEW, setting=Setting(DeviceTier(), overlap=False))
        for label, setting in {**settings(everything), **(captured(name) if everything else {})}.items():
            row = f"{name} over {label}{note}"
            with result.guarded(row):
                try:
                    got = generate(model, ids, method, max_new_tokens=NEW, setting=setting)
                except ConfigError as reason:
                    raise Skipped(str(reason)) from reason
                same = int((got == expected).long().cumprod(1).sum())
                enough = NEW if model.dtype == torch.float32 else NEAR_HALF
                result.row(row, same >= enough, same_tokens=same, tokens=expected.numel())


def _bodies(result: Result, model: PreTrainedModel, ids: Tensor, name: str, method: Method, steps: int) -> None:
    """Compare the logits of one method by the Triton backend with the reference, on the same tokens. The results of
    K-Means differ between two backends, so PQCache keeps its initial centroids."""
    if isinstance(method, PQCache):
        method = PQCache(method.budget, m=method.m, b=method.b, iterations=0)
    tokens = generate(model, ids, method, max_new_tokens=steps, setting=Setting(backend="reference", overlap=False))
    expected, got = (forced(model, ids, method, Setting(backend=body), tokens) for body in ("reference", "gpu"))
    errors = (got - expected).abs().amax(-1) / expected.std(-1)
    agreeing = float((got.argmax(-1) == expected.argmax(-1)).float().mean())
    near = float(errors.median())
    result.row(
        f"{name}: kernels gpu against reference",
        agreeing >= AGREEING and near <= NEAR[name],
        same_choice=agreeing,
        median_error=near,
        worst_error=float(errors.max()),
    )


@torch.inference_mode()
def forced(model: PreTrainedModel, ids: Tensor, method: Method, setting: Setting, tokens: Tensor) -> Tensor:
    """Logits ``[n, V]`` after each of the given tokens ``[1, n]``, decoded by a method."""
    with prefill(model, ids, [method], reserve=tokens.shape[1], setting=setting) as prefilled:
        prefilled.build(0)
        cache = prefilled.fork(0, spend=True)
        with Steps(prefilled, cache, Forced(tokens[0].tolist(), prefilled.lengths)) as steps:
            found = [step.logits[0].float() for step in steps]
        for cohort in cache.cohorts:
            cohort.store.settle()
    return torch.stack(found)
