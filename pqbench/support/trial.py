"""``python -m pqbench.support --all > docs/models.md``: which model types of the installed transformers are served.

A small random model of every type is compared with transformers' own ``generate``. Each comparison runs in a process of
its own with a time limit, so that a fault of one type, even a crash, becomes one row of the table. Without ``--all``
and without names of types, only a few common types are tried, which takes about a minute.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess

import torch
import transformers
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from pqbench.engine.decode import generate
from pqbench.engine.layers import layer_types
from pqbench.engine.rehearsal import check_config
from pqbench.errors import PqbenchError
from pqbench.method import Method
from pqbench.records.classes import conf_folder
from pqbench.support.miniature import VOCABULARY, causal_types, small_model
from pqbench.terminal import log_to_terminal

log = logging.getLogger("pqbench")

COMMON = (
    "deepseek_v3",
    "gemma2",
    "gemma3_text",
    "gpt2",
    "gpt_oss",
    "llama",
    "mistral",
    "opt",
    "phi3",
    "qwen3",
    "smollm3",
)
METHODS = ("full", "pqcache", "h2o", "snapkv", "streaming_llm")
LENGTHS = (1, 3, 20, 130)
_NEW, _CHUNK = 8, 16
_SECONDS = 120  # time limit for one type
_INTRODUCTION = """# Model types

Made by `python -m pqbench.support --all > docs/models.md` with transformers {version}: every causal model type, built
small and random, compared with transformers' own `generate`. *Exact* means the same tokens with
{methods} at a budget that holds everything, for prompts of {lengths} tokens, for a
left-padded batch of three, and prefilled in blocks of {chunk}. *Refused* means one line before anything runs. A model
that is loaded goes through the same comparison on a few tokens (`pqbench/engine/rehearsal.py`), so that options of its
configuration that no default has are noticed as well.

{counts}

| model type | outcome | reason, or what some methods refuse |
|---|---|---|"""


@dataclass(frozen=True)
class Outcome:
    """The result for one type: ``exact``, ``refused``, a fault (``wrong``, ``error`` or ``crash``), or ``not tried``
    where transformers itself cannot run the small model."""

    kind: str
    result: str
    note: str = ""

    @property
    def fault(self) -> bool:
        """Whether the result is a fault: the type is neither served exactly nor refused properly."""
        return self.result in ("wrong", "error", "crash")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the table to stdout. Returns the exit code, which is 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m pqbench.support", description=__doc__.partition("\n")[0])
    parser.add_argument("types", nargs="*", help="model types; a few common ones without")
    parser.add_argument("--all", action="store_true", help="every causal model type, some minutes on two cores")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    options = parser.parse_args(arguments)
    log_to_terminal()
    outcomes = []
    for outcome in tried(causal_types() if options.all else options.types or COMMON, options.jobs):
        log.info("%s: %s %s", outcome.kind, outcome.result, outcome.note)
        outcomes.append(outcome)
    sys.stdout.write(page(sorted(outcomes, key=lambda one: one.kind)))
    return int(any(outcome.fault for outcome in outcomes))


def page(outcomes: Sequence[Outcome]) -> str:
    """The table as markdown, with its counts."""
    results = [outcome.result for outcome in outcomes]
    counts = ", ".join(f"{results.count(result)} {result}" for result in dict.fromkeys(sorted(results)))
    head = _INTRODUCTION.format(
        version=transformers.__version__,
        methods=", ".join(METHODS),
        lengths=", ".join(map(str, LENGTHS)),
        chunk=_CHUNK,
        counts=f"{len(outcomes)} types: {counts}.",
    )
    rows = [f"| `{one.kind}` | {one.result} | {one.note.replace('|', '/')} |" for one in outcomes]
    return "\n".join([head, *rows]) + "\n"


def tried(
    kinds: Sequence[str], jobs: int = 1, seconds: float = _SECONDS, find: Callable[[str], Outcome] | None = None
) -> Iterator[Outcome]:
    """The outcome of each type, each from a process of its own, in the order in which they end. ``find`` is the
    function that finds an outcome; None for :func:`outcome`."""
    context = multiprocessing.get_context("forkserver")  # forks from a process that has computed nothing
    context.set_forkserver_preload([__name__])
    waiting, running = list(reversed(kinds)), list[tuple[str, float, Connection, BaseProcess]]()
    while waiting or running:
        while waiting and len(running) < jobs:
            kind = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process: BaseProcess = context.Process(
                target=_report, args=(kind, theirs, outcome if find is None else find)
            )
            process.start()
            theirs.close()
            running.append((kind, time.monotonic() + seconds, ours, process))
        for entry in list(running):
            kind, until, pipe, process = entry
            late = time.monotonic() > until
            if late:
                process.kill()
            if late or pipe.poll(0.05):
                running.remove(entry)
                yield _received(kind, pipe, process, late)


def _received(kind: str, pipe: Connection, process: BaseProcess, late: bool) -> Outcome:
    """The outcome that a process sent, or how the process ended without sending one."""
    try:
        if late:
            return Outcome(kind, "error", "it took too long")
        found: Outcome = pipe.recv()
    except EOFError:
        process.join()
        return Outcome(kind, "crash", f"the process ended with exit code {process.exitcode}")
    else:
        return found
    finally:
        pipe.close()
        process.join()


def _report(kind: str, pipe: Connection, find: Callable[[str], Outcome]) -> None:
    """Find the outcome of one type and send it. This runs in a process of its own."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # some models write to the terminal
    os.dup2(silent, 2)
    pipe.send(find(kind))


def outcome(kind: str) -> Outcome:
    """Build a model of a type, run it in every way, and return the outcome."""
    try:
        model = small_model(kind)
        reason = refusal(model.config)
        if reason:
            return Outcome(kind, "refused", reason)
        ids, mask = batch()
        expected = {length: truth(model, ids_of(length)) for length in LENGTHS}, truth(model, ids, mask)
    except Exception as error:  # noqa: BLE001 - transformers' own faults, whatever they are
        return _without_model(kind, error)
    refusals: dict[str, list[str]] = {}
    try:
        for name, method in methods().items():
            try:
                wrong = differences(model, method, *expected)
            except PqbenchError as error:
                refusals.setdefault(str(error), []).append(name)
                continue
            if wrong:
                return Outcome(kind, "wrong", f"{name}: {', '.join(wrong)}")
    except Exception as error:  # noqa: BLE001 - any error is an outcome of the trial
        return Outcome(kind, "error", f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    notes = [(names, text.partition(" is not supported: ")[2] or text) for text, names in refusals.items()]
    if any(METHODS[0] in names for names, _ in notes):
        return Outcome(kind, "refused", notes[0][1])
    return Outcome(kind, "exact", "; ".join(f"not {', '.join(names)}: {text}" for names, text in notes))


def _without_model(kind: str, error: Exception) -> Outcome:
    """The outcome of a type whose small model transformers cannot run. The default configuration of the type may show
    why it is refused."""
    try:
        found = refusal(CONFIG_MAPPING[kind]())
    except Exception as worse:  # noqa: BLE001 - transformers' own faults, whatever they are
        found, error = None, worse
    if found:
        return Outcome(kind, "refused", found)
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return Outcome(kind, "not tried", f"transformers cannot run a small model of this type here ({reason})")


def refusal(config: PreTrainedConfig) -> str | None:
    """The reason why a model of this configuration is refused before it runs; None if it is not refused."""
    try:
        check_config(config)
        check_config(config.get_text_config(decoder=True))
        layer_types(config.get_text_config(decoder=True))
    except PqbenchError as error:
        return str(error)
    return None


def differences(model: PreTrainedModel, method: Method, alone: Mapping[int, Tensor], together: Tensor) -> list[str]:
    """The ways of running a method that give other tokens than transformers."""
    found = [
        f"prompt of {length}"
        for length, right in alone.items()
        if not torch.equal(generate(model, ids_of(length), method, max_new_tokens=_NEW), right)
    ]
    longest = max(alone)
    blocks = generate(model, ids_of(longest), method, max_new_tokens=_NEW, chunk=_CHUNK)
    found += [] if torch.equal(blocks, alone[longest]) else [f"blocks of {_CHUNK}"]
    ids, mask = batch()
    padded = generate(model, ids, method, mask, _NEW)
    return found + ([] if torch.equal(padded, together) else ["padded batch"])


def methods() -> dict[str, Method]:
    """The methods to try. Their budget holds the whole context."""
    settings = ["budget.ratio=1.0", "methods.pqcache.m=2", "methods.pqcache.b=3"]
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = compose("config", [f"method=[{','.join(METHODS)}]", *settings])
    return {name: instantiate(config.methods[name]) for name in METHODS}


def ids_of(length: int) -> Tensor:
    """A prompt ``[1, length]`` without special tokens."""
    return torch.randint(5, VOCABULARY, (1, length), generator=torch.Generator().manual_seed(length))


def batch() -> tuple[Tensor, Tensor]:
    """Three prompts of different lengths as a left-padded batch, and its mask."""
    prompts = [ids_of(length) for length in (3, 20, 47)]
    rows = [torch.nn.functional.pad(ids, (47 - ids.shape[1], 0)) for ids in prompts]
    masks = [torch.nn.functional.pad(torch.ones_like(ids), (47 - ids.shape[1], 0)) for ids in prompts]
    return torch.cat(rows), torch.cat(masks)


@torch.no_grad()
def truth(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """The tokens that transformers generates, ``[B, new]``."""
    mask = torch.ones_like(ids) if mask is None else mask
    tokens: Tensor = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=_NEW, pad_token_id=0)
    return tokens[:, ids.shape[1] :]
