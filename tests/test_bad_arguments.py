"""Bad arguments in Python: every entry point refuses values of wrong types and ranges with one line."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from methods.full import Full
from methods.h2o import H2O
from methods.pqcache import PQCache
from methods.sparq import SparQ
from pqbench import Budget, decode, generate, load_model, prefill
from pqbench.engine.setting import Setting
from pqbench.errors import ConfigError, PqbenchError
from pqbench.models.sources import PackagedGGUF, Pretrained, Random
from pqbench.store.tiers import HostTier
from pqbench.typed import allowed
from tests.support import prompt_of, tiny_model

IDS: Any = prompt_of(20)
LLAMA: Any = tiny_model("llama")
PYTHON: Any = SimpleNamespace(
    generate=generate,
    prefill=prefill,
    decode=decode,
    load_model=load_model,
    Budget=Budget,
    PQCache=PQCache,
    H2O=H2O,
    SparQ=SparQ,
    Setting=Setting,
    HostTier=HostTier,
    Random=Random,
    Pretrained=Pretrained,
    PackagedGGUF=PackagedGGUF,
)  # without types, since the calls below are wrong on purpose
CALLS: list[tuple[str, Callable[[], Any], str]] = [
    ("generate: a class", lambda: PYTHON.generate(LLAMA, IDS, PQCache), "pass an object of it, PQCache()"),
    ("generate: a name", lambda: PYTHON.generate(LLAMA, IDS, "pqcache"), "the method is the text 'pqcache'"),
    ("generate: no method", lambda: PYTHON.generate(LLAMA, IDS, None), "the method is None"),
    ("generate: one prompt", lambda: PYTHON.generate(LLAMA, IDS[0], Full()), "pass input_ids[None]"),
    ("generate: a list", lambda: PYTHON.generate(LLAMA, IDS.tolist(), Full()), "torch.tensor([ids])"),
    ("generate: a text", lambda: PYTHON.generate(LLAMA, "text", Full()), "input_ids must be a tensor"),
    ("generate: floats", lambda: PYTHON.generate(LLAMA, IDS.float(), Full()), "input_ids.long()"),
    ("generate: 3-D", lambda: PYTHON.generate(LLAMA, IDS[None], Full()), "expected [B, S]"),
    ("generate: unknown tokens", lambda: PYTHON.generate(LLAMA, IDS + 128, Full()), "knows 0 to 127"),
    ("generate: negative tokens", lambda: PYTHON.generate(LLAMA, IDS - 128, Full()), "knows 0 to 127"),
    ("generate: empty", lambda: PYTHON.generate(LLAMA, IDS[:, :0], Full()), "the prompt is empty"),
    (
        "generate: a mask list",
        lambda: PYTHON.generate(LLAMA, IDS, Full(), [[1] * 20]),
        "attention_mask is a list",
    ),
    ("generate: a short mask", lambda: PYTHON.generate(LLAMA, IDS, Full(), IDS[:, 1:]), "attention_mask is"),
    ("generate: a name of a model", lambda: PYTHON.generate("smollm2", IDS, Full()), "load_model(...).model"),
    (
        "generate: a loaded model",
        lambda: PYTHON.generate(PYTHON.load_model("tiny"), IDS, Full()),
        "load_model(...).model",
    ),
    ("generate: training", lambda: PYTHON.generate(_training(), IDS, Full()), "call model.eval() first"),
    ("generate: no tokens", lambda: PYTHON.generate(LLAMA, IDS, Full(), max_new_tokens=0), "at least 1"),
    (
        "generate: half a token",
        lambda: PYTHON.generate(LLAMA, IDS, Full(), max_new_tokens=1.5),
        "max_new_tokens is 1.5",
    ),
    ("generate: too long", lambda: PYTHON.generate(LLAMA, IDS, Full(), max_new_tokens=9999), "limit of 2048"),
    ("generate: chunk", lambda: PYTHON.generate(LLAMA, IDS, Full(), chunk=0), "chunk is 0"),
    ("generate: chunk of a text", lambda: PYTHON.generate(LLAMA, IDS, Full(), chunk="a"), "chunk is 'a'"),
    ("generate: setting", lambda: PYTHON.generate(LLAMA, IDS, Full(), setting="host"), "setting is 'host'"),
    ("prefill: no list", lambda: PYTHON.prefill(LLAMA, IDS, Full()), "a list with at least one method"),
    ("prefill: nothing", lambda: PYTHON.prefill(LLAMA, IDS, []), "a list with at least one method"),
    ("prefill: a class", lambda: PYTHON.prefill(LLAMA, IDS, [Full]), "pass an object of it, Full()"),
    ("decode: no such method", lambda: PYTHON.decode(prefill(LLAMA, IDS, [Full()]), 1, 2), "methods 0 to 0"),
    ("decode: a method", lambda: PYTHON.decode(prefill(LLAMA, IDS, [Full()]), Full(), 2), "method is Full()"),
    ("Budget: a text", lambda: PYTHON.Budget(ratio="0.1"), "budget.ratio is '0.1': use a number or None"),
    ("Budget: nan", lambda: PYTHON.Budget(ratio=float("nan")), "budget.ratio is nan"),
    ("Budget: above 1", lambda: PYTHON.Budget(ratio=2.0), "(0, 1]"),
    ("Budget: half tokens", lambda: PYTHON.Budget(tokens=64.5), "budget.tokens is 64.5"),
    ("Budget: a number first", lambda: PYTHON.Budget(0.1), "budget.sink is 0.1"),
    ("Budget: both", lambda: PYTHON.Budget(tokens=64, ratio=0.2), "exactly one of"),
    ("Budget: grow", lambda: PYTHON.Budget(grow="yes"), "budget.grow is 'yes': use True or False"),
    ("PQCache: a number", lambda: PYTHON.PQCache(0.2), "PQCache.budget is 0.2: use a Budget"),
    ("PQCache: a class", lambda: PYTHON.PQCache(Budget), "PQCache.budget is <class"),
    ("PQCache: m", lambda: PYTHON.PQCache(m="two"), "PQCache.m is 'two'"),
    ("PQCache: b", lambda: PYTHON.PQCache(b=2.5), "PQCache.b is 2.5"),
    ("H2O: a text", lambda: PYTHON.H2O("x"), "H2O.budget is 'x'"),
    ("SparQ: rank", lambda: PYTHON.SparQ(rank=None), "SparQ.rank is None"),
    ("Setting: a name", lambda: PYTHON.Setting("host"), "Setting.tier is 'host': use a Tier"),
    ("Setting: a class", lambda: PYTHON.Setting(HostTier), "Setting.tier is <class"),
    ("Setting: overlap", lambda: PYTHON.Setting(overlap=1), "Setting.overlap is 1"),
    ("Setting: correction", lambda: PYTHON.Setting(correction=3.0), "from -1 to 1"),
    ("HostTier: link", lambda: PYTHON.HostTier(3), "store.link is 3"),
    ("HostTier: cache", lambda: PYTHON.HostTier(cache_tokens="x"), "store.cache_tokens is 'x'"),
    ("Random: layers", lambda: PYTHON.Random("x", layers=0), "model.layers is 0"),
    ("Random: heads", lambda: PYTHON.Random("x", heads="4"), "model.heads is '4'"),
    ("Random: name", lambda: PYTHON.Random(""), "model.name is empty"),
    ("Random: device", lambda: PYTHON.Random("x", device="abacus").load(), "model.device is 'abacus'"),
    ("Random: dtype", lambda: PYTHON.Random("x", dtype="int8").load(), "model.dtype is 'int8'"),
    ("Pretrained: path", lambda: PYTHON.Pretrained("x", path=3), "model.path is 3"),
    ("PackagedGGUF: file", lambda: PYTHON.PackagedGGUF("x", package="torch", file=None), "model.file is None"),
    ("load_model: no name", lambda: PYTHON.load_model("nope"), "there is no model 'nope'"),
    ("load_model: a number", lambda: PYTHON.load_model(3), "there is no model 3"),
    ("load_model: field", lambda: PYTHON.load_model("tiny", colour="red"), "no field colour"),
    ("load_model: type", lambda: PYTHON.load_model("tiny", hidden="x"), "model.hidden is 'x'"),
    ("load_model: range", lambda: PYTHON.load_model("tiny", layers=-1), "model.layers is -1"),
]


def _training() -> Any:
    return tiny_model("llama").__class__(tiny_model("llama").config).train()


@pytest.mark.parametrize(("call", "words"), [case[1:] for case in CALLS], ids=[case[0] for case in CALLS])
def test_a_bad_argument_in_python_is_one_line(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(PqbenchError) as caught:
        call()
    line = str(caught.value)
    assert words in line
    assert "\n" not in line


def test_tokens_alone_are_a_budget() -> None:
    budget = Budget(tokens=4096)
    assert (budget.ratio, budget.resolve(10000, 10000).total) == (None, 4096)


def test_what_an_annotation_allows() -> None:
    """The rules of the type checks."""
    for value, hint in ((1, int), (1, float), (1.5, float), (True, bool), ("x", str), (None, int | None), ([1], list)):
        assert allowed(value, hint)
    for value, hint in ((True, int), (1, bool), (1.0, int), (float("inf"), float), (None, int), ("1", int), (1, str)):
        assert not allowed(value, hint)


def test_the_errors_are_those_of_wrong_values() -> None:
    assert issubclass(ConfigError, ValueError)
