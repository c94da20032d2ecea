"""The tables of the README: which method to use, chosen from the records by rule, and the results of each method."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from plots.pages import fidelity, quick
from plots.pages.packed import Measured
from plots.pages.source import WIDTH, good, mean
from pqbench.records.file import Record
from pqbench.tables.section import shown
from pqbench.terminal import markdown_table

DENSE, EXACT = "full", "oracle"  # the reference, and the method that attends to the exact top-k
FLOOR = ("random_tokens",)  # measured for comparison, never recommended
KEPT_WHEN_DROPPING = 0.5  # a method that holds a smaller share of full attention's bytes drops tokens
# The example of the README: Llama-3.1-8B in bfloat16 at 32K tokens.
LAYERS, KV_HEADS, HEAD_DIM, BYTES, CONTEXT = 32, 8, 128, 2, 32768


@dataclass(frozen=True)
class Choice:
    """The two sets of records between which a method is chosen."""

    suite: Sequence[Record]
    fidelity: Sequence[Record]

    @property
    def ratio(self) -> float:
        """The budget at which errors are compared."""
        return fidelity.reference_ratio(self.fidelity)

    def candidates(self, drops: bool) -> list[str]:
        """The methods that drop tokens for good, or the methods that keep all tokens and read an index smaller than
        half of the keys."""
        exact = self.bits(EXACT)
        found = [name for name in fidelity.methods_of(self.fidelity) if name not in (DENSE, EXACT, *FLOOR)]
        measured = [name for name in found if quick.needles(self.suite, name)]
        return [m for m in measured if self.drops(m) == drops and self.bits(m) < exact / 2]

    def drops(self, method: str) -> bool:
        """Whether a method held far fewer bytes of keys and values than full attention did on the same prompts."""
        held, dense = (mean(quick.needles(self.suite, name), "kv_bytes") or 0.0 for name in (method, DENSE))
        return held < KEPT_WHEN_DROPPING * dense

    def bits(self, method: str) -> float:
        """Bits of the index that a step reads, per token of the context and KV head."""
        return mean(fidelity.at(self.fidelity, method, self.ratio), "bits_per_key") or 0.0

    def error(self, method: str) -> float:
        """The relative error of the attention output."""
        return mean(fidelity.at(self.fidelity, method, self.ratio), "output_error") or 0.0

    def needle(self, method: str) -> float:
        """Needles found, in percent."""
        return quick.score_of(self.suite, method, "needle") or 0.0

    def best(self, drops: bool, rank: Callable[[str], float]) -> str:
        """The candidate with the lowest rank."""
        return min(self.candidates(drops), key=rank)

    def finder(self) -> str:
        """The method that keeps all tokens and has the highest score over the suite."""
        return self.best(False, lambda name: -quick.overall(self.suite, name))

    def faithful(self) -> str:
        """The method that keeps all tokens and has the smallest output error."""
        return self.best(False, self.error)

    def dropper(self) -> str:
        """The method that drops tokens and has the smallest output error."""
        return self.best(True, self.error)


def choice(suite: Measured, faith: Measured) -> Choice:
    """The records of the quick suite and of the fidelity benchmark."""
    return Choice(suite.records, faith.records)


def answer(found: Choice) -> str:
    """A row for each situation: the method to use, and the figures that support it."""
    finder, faithful, dropper = found.finder(), found.faithful(), found.dropper()
    percent = f"{100 * found.ratio:g} %"
    rows = [
        [
            "All keys and values fit on the card and can be read in every step",
            DENSE,
            "It is exact; all other methods are compared with it.",
        ],
        [
            "Keys and values do not fit, or reading them takes too long, and facts must be found in the context",
            f"{finder} with store=host",
            f"It finds {found.needle(finder):.0f} % of the needles (full: {found.needle(DENSE):.0f} %) with "
            f"{percent} of the tokens and {found.bits(finder):.0f} bits of index per key.",
        ],
        [
            "As above, but the output must stay as close to full attention as possible",
            f"{faithful} with store=host",
            f"Its error is {found.error(faithful):.3f}. The error of {finder} is {found.error(finder):.3f}, and that "
            f"of {EXACT}, which selects by exact scores, {found.error(EXACT):.3f}.",
        ],
        [
            "Even host memory is too small for all tokens, so most must be dropped",
            dropper,
            f"Its error of {found.error(dropper):.3f} is the smallest of the methods that drop tokens, but it finds "
            f"only {found.needle(dropper):.0f} % of the needles.",
        ],
    ]
    table = markdown_table(["your situation", "use", "why"], rows, 3)
    return "\n\n".join(
        [table, *(textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in (basis(found), example(found)))]
    )


def basis(found: Choice) -> str:
    """The basis of the table: the model and the number of samples."""
    prompts = quick.needles(found.suite, DENSE)
    lengths = sorted({int(record["prompt_tokens"]) for record in prompts})
    texts = {str(record["document"]) for record in good(found.fidelity)}
    [length] = {record["length"] for record in good(found.fidelity)}
    return (
        f"Every method but `full` attended to {100 * found.ratio:g} % of the tokens in each step. A needle is a number "
        "hidden in a long text that the model must repeat. The error is the relative error of the attention output "
        f"against full attention. All figures are from the small model `{prompts[0]['model']}`: needles in "
        f"{len(prompts)} prompts of {lengths[0]} to {lengths[-1]} tokens, errors on {len(texts)} texts of {length} "
        "tokens. The pages [quick suite](docs/results/quick_suite.md) and [fidelity](docs/results/fidelity.md) have "
        "more figures. With so few prompts a difference of one needle means nothing, so repeat the comparison on your "
        "own model and task."
    )


def example(found: Choice) -> str:
    """The recommendation in bytes, for 32K tokens on one card."""
    finder = found.finder()
    heads = LAYERS * KV_HEADS * CONTEXT
    everything, codes = heads * 2 * HEAD_DIM * BYTES, heads * found.bits(finder) / 8
    return (
        f"For example, {CONTEXT // 1024}K tokens of Llama-3.1-8B in bfloat16 take {everything / 1e9:.1f} GB of keys "
        "and values for each sequence. Use `full` if your card has room for them. Otherwise use "
        f"`{finder}` with `store=host`, which keeps keys and values in host memory: about {codes / 1e6:.0f} MB of "
        f"codes stay on the card, and each step fetches the selected {100 * found.ratio:g} % of the tokens. "
        "(Bytes are computed from the shape of that model.)"
    )


def overview(found: Choice) -> str:
    """A row for each method: its scores, its error, and how much it reads and holds."""
    dense = mean(quick.needles(found.suite, DENSE), "kv_bytes") or 0.0
    known = set(fidelity.methods_of(found.fidelity))
    rows = []
    for method in quick.methods_of(found.suite):
        held = mean(quick.needles(found.suite, method), "kv_bytes")
        scores = [quick.score_of(found.suite, method, name) for name in quick.NAMES]
        measured = method in known
        rows.append(
            [
                method,
                *(shown(score, 1, "{:.0f}") for score in scores),
                f"{found.error(method):.3f}" if measured else "-",
                f"{found.bits(method):.0f}" if measured else "-",
                "-" if held is None or not dense else f"{100 * held / dense:.0f} %",
            ]
        )
    headings = ["method", *quick.NAMES.values(), "output error", "index bits per key", "KV kept"]
    return markdown_table(headings, rows, 1)
