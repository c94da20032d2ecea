"""Prompts have the token ids of their whole text, even if the tokenizer treats the beginning of a text differently."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pqbench.benchmarks.base import Prompter
from pqbench.benchmarks.infinitebench import InfiniteBench
from pqbench.benchmarks.needle import Needle
from pqbench.benchmarks.ruler import Ruler
from pqbench.errors import ModelError

MISTRAL = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"
ZEPHYR = "{% for m in messages %}{{ '<|user|>\n' + m['content'] + eos_token }}\n{% endfor %}{{ '<|assistant|>\n' }}"
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|user|>\n\n' + m['content'] | trim + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
)
SYSTEM = (
    "{{ bos_token + bos_token }}You are helpful.\n{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}Answer:"
)
PARTS = "{% for m in messages %}U:{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}{{ '\nA:' }}"
THINKS = (
    "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}{{ '' if enable_thinking is false else '<think>' }}"
)
TEMPLATES = {"mistral": MISTRAL, "zephyr": ZEPHYR, "llama3": LLAMA3, "system": SYSTEM, "thinks": THINKS}
WORDS = "The secret number is hidden in the text below, [INST] find it [/INST] and remember one of 0123456789 words. "


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """Tokenizers as in Llama-2 and Mistral 0.2: ``legacy`` has a normaliser that puts a blank before every text,
    ``first`` and ``always`` do it with Metaspace. ``bytes`` is a byte tokenizer as in GPT-2."""
    return {scheme: trained(scheme) for scheme in ("legacy", "first", "always", "bytes")}


def trained(scheme: str) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    if scheme == "bytes":
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        alphabet = ["\n", "é", "\u2019", *map(chr, range(33, 127))]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False, initial_alphabet=alphabet
    )
    backend.train_from_iterator([WORDS] * 20, trainer)
    if scheme == "legacy":
        backend.pre_tokenizer = None
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif scheme != "bytes":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def prompter(tokenizer: PreTrainedTokenizerFast, template: str | None, **options: Any) -> Prompter:
    tokenizer.chat_template = template
    return Prompter(tokenizer, 4096, chat_options=options)


SCHEMES = ["legacy", "first", "always", "bytes"]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ["find the number", "  The text\n\nbelow 12 \n", "\n[INST] é"])
def test_a_message_has_the_ids_of_the_chat_template(
    tokenizers: dict[str, PreTrainedTokenizerFast], scheme: str, template: str, text: str
) -> None:
    asked = prompter(tokenizers[scheme], TEMPLATES[template])
    expected = tokenizers[scheme].apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    assert asked.wrap(text) == expected


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("template", ["mistral", None])
def test_a_prompt_of_parts_has_the_ids_of_its_text(
    tokenizers: dict[str, PreTrainedTokenizerFast], scheme: str, template: str | None
) -> None:
    """The needle benchmark joins encoded parts; encoding their whole text after the leading token gives the same
    ids."""
    tokenizer = tokenizers[scheme]
    asked = prompter(tokenizer, TEMPLATES[template] if template else None)
    for sample in Needle(lengths=[700], depths=[0, 50, 100]).samples(asked):
        lead, *ids = sample.input_ids
        assert lead == tokenizer.bos_token_id
        text = tokenizer.decode(ids).removeprefix(" ")
        assert [lead, *ids] == (asked.encode(f"<s>{text}") if template else [lead, *asked.encode(text)])
        tail = tokenizer.decode(ids[-sample.question_tokens :])
        assert tail.strip().startswith("What is the secret number")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("benchmark", ["ruler", "infinitebench"])
def test_question_tokens_hold_the_question_and_what_follows(
    tokenizers: dict[str, PreTrainedTokenizerFast], scheme: str, benchmark: str
) -> None:
    asked = prompter(tokenizers[scheme], ZEPHYR)
    suite = (
        Ruler(tasks=["vt"], lengths=[3000], per_cell=1)
        if benchmark == "ruler"
        else InfiniteBench(tasks=["passkey"], length=900, per_length=1, lead_in=True)
    )
    (sample,) = suite.samples(asked)
    tail = tokenizers[scheme].decode(sample.input_ids[-sample.question_tokens :]).strip()
    opening = {"ruler": "Question: Find all variables", "infinitebench": "What is the pass key?"}[benchmark]
    assert tail.startswith(opening)
    assert "<|assistant|>" in tail


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("template", ["mistral", "zephyr", None])
def test_needles_are_where_they_are_said_to_be_and_lengths_are_exact(
    tokenizers: dict[str, PreTrainedTokenizerFast], scheme: str, template: str | None
) -> None:
    asked = prompter(tokenizers[scheme], TEMPLATES[template] if template else None)
    for sample in Needle(lengths=[600, 900], depths=[0, 40, 100], variant="multi").samples(asked):
        assert len(sample.input_ids) == sample.metadata["length"]
        found = [asked.decode(sample.input_ids[a:b]).strip() for a, b in sample.metadata["needle_spans"]]
        assert " ".join(found) == sample.metadata["needle"]


def test_templates_that_want_parts_or_options(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["bytes"]
    parts = prompter(tokenizer, PARTS)
    assert tokenizer.decode(parts.wrap("find it")) == "U:find it\nA:"
    assert prompter(tokenizer, THINKS).frame().after == "\n<think>"
    assert prompter(tokenizer, THINKS, enable_thinking=False).frame().after == "\n"


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}", "writes the user's message 2 times"),
        ("nothing at all", "it leaves the message out"),
        ("{{ raise_exception('a system prompt comes first') }}", "a system prompt comes first"),
    ],
)
def test_templates_that_cannot_serve_are_refused_in_one_line(
    tokenizers: dict[str, PreTrainedTokenizerFast], template: str, words: str
) -> None:
    with pytest.raises(ModelError, match=words) as caught:
        prompter(tokenizers["bytes"], template).wrap("find it")
    assert "model.chat" in str(caught.value)
    assert "\n" not in str(caught.value)
