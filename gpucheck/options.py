"""The options of a run, as they are given on the command line and to the processes of the steps."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from gpucheck.plan import LIMIT, STEPS

ROOT = Path(__file__).resolve().parent.parent
SIZES = ("full", "tiny")


class UsageError(Exception):
    """The check cannot start; the message is one line that says what to do."""


@dataclass(frozen=True)
class Options:
    """The options of one run.

    Attributes:
        device: cuda:N, or cpu, where Triton's interpreter and a link within host memory replace the GPU.
        size: ``full`` for the shapes whose figures count, ``tiny`` to run the same code in seconds.
        limit: seconds that the whole run may take; if time is short, the least important steps are skipped.
        steps: the numbers of the steps to run; step 0 always runs, since it describes the machine.
        results: folder of the results; empty for results/gpu, or for build/gpu-tiny if the size is tiny.
        wheels: folder with the packages that the image lacks.
    """

    device: str = "cuda:0"
    size: str = "full"
    limit: float = LIMIT
    steps: tuple[int, ...] = tuple(step.number for step in STEPS)
    results: str = ""
    wheels: str = "wheels"

    def __post_init__(self) -> None:
        kind, _, index = self.device.partition(":")
        if self.device != "cpu" and not (kind == "cuda" and index.isdigit()):
            raise UsageError(f"DEVICE is {self.device!r}: use cuda, cuda:N or cpu")
        if self.size not in SIZES:
            raise UsageError(f"SIZE is {self.size!r}: use {' or '.join(SIZES)}")
        if not self.limit > 0:
            raise UsageError(f"LIMIT is {self.limit:g}: use the seconds that the whole check may take, e.g. 525")

    @property
    def tiny(self) -> bool:
        """Whether shapes are so small that a CPU needs only seconds for them."""
        return self.size == "tiny"

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to check."""
        return self.device != "cpu"

    @property
    def folder(self) -> Path:
        """The folder of the results, as an absolute path."""
        return (ROOT / (self.results or ("build/gpu-tiny" if self.tiny else "results/gpu"))).resolve()

    def text(self) -> str:
        """The options as JSON, for the process of a step."""
        return json.dumps(asdict(self))

    @classmethod
    def from_text(cls, text: str) -> Options:
        """The options from the JSON of :meth:`text`."""
        fields = json.loads(text)
        return cls(**{**fields, "steps": tuple(fields["steps"])})


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line.

    Raises:
        UsageError: an option does not exist, or a value cannot work.
    """
    parser = _Parser(prog="gpucheck", description=sys.modules["gpucheck"].__doc__)
    parser.add_argument("--device", default=Options.device, help="cuda, cuda:N or cpu")
    parser.add_argument("--size", default=Options.size, help="full or tiny")
    parser.add_argument("--limit", default=Options.limit, type=float, help="seconds for everything")
    parser.add_argument("--steps", default="", help="numbers of steps, e.g. 4,5; empty for all")
    parser.add_argument("--results", default=Options.results, help="folder of the results")
    parser.add_argument("--wheels", default=Options.wheels, help="folder made by make gpu-wheels")
    given = parser.parse_args(arguments)
    device = "cuda:0" if given.device == "cuda" else given.device
    return Options(device, given.size, given.limit, numbers(given.steps), given.results, given.wheels)


def numbers(text: str) -> tuple[int, ...]:
    """The step numbers in a text such as ``4,5``; an empty text stands for all steps. Raises UsageError for an unknown
    step."""
    known = [step.number for step in STEPS]
    if not text.strip():
        return tuple(known)
    try:
        wanted = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"STEPS is {text!r}: use numbers such as 4,5") from error
    foreign = [number for number in wanted if number not in known]
    if foreign:
        raise UsageError(f"STEPS has {foreign[0]}: the steps are {known[0]} to {known[-1]}")
    return tuple(wanted)
