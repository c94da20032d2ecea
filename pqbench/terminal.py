"""Makes text from models and files safe for a terminal, a markdown file or LaTeX, so that nothing in it acts as a
command."""

from __future__ import annotations

import logging
import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
}


def plain(text: object) -> str:
    """One line of text without control characters such as escape sequences and bidirectional overrides."""
    words = " ".join(str(text).split())
    if words.isprintable():  # true for nearly all text, and quick to check
        return words
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Co") else c for c in words)


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]], labels: int) -> str:
    """A markdown table with aligned columns: the first ``labels`` columns to the left, the others to the right."""
    cells = [[markdown(cell) for cell in row] for row in (headings, *rows)]
    widths = [max(3, *(len(row[i]) for row in cells)) for i in range(len(headings))]
    lines = [_markdown_row(row, widths, labels) for row in cells]
    rule = ["-" * width if i < labels else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])


def latex_table(headings: Sequence[str], rows: Sequence[Sequence[str]], labels: int, caption: str) -> str:
    """A LaTeX table (package booktabs)."""
    lines = [" & ".join(_latex(cell) for cell in row) + r" \\" for row in (headings, *rows)]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{_latex(caption)}}}",
            rf"\begin{{tabular}}{{{'l' * labels}{'r' * (len(headings) - labels)}}}",
            r"\toprule",
            lines[0],
            r"\midrule",
            *lines[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


class LineHandler(logging.Handler):
    """Writes each message as one plain line to the present standard error. Lines of warnings and errors say that they
    are such."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a message."""
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        stream: TextIO = sys.stderr
        try:
            stream.write(f"{level}{plain(record.getMessage())}\n")
            if record.exc_info:
                stream.write(f"{logging.Formatter().formatException(record.exc_info)}\n")
            stream.flush()
        except Exception:  # noqa: BLE001 - logging must not end a run; the standard rule of handlers
            self.handleError(record)


def log_to_terminal() -> None:
    """Send this process's log to standard error, one line per message, so that standard output holds only results."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    if not any(isinstance(handler, LineHandler) for handler in root.handlers):
        root.addHandler(LineHandler())
    for name in ("pqbench", "methods", "plots"):
        logging.getLogger(name).setLevel(logging.INFO)  # log messages of pqbench; libraries only warn
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # for names that the terminal cannot show


def markdown(text: str) -> str:
    """One line of text in which markdown and HTML are escaped."""
    text = plain(text).replace("\\", "\\\\").replace("|", "\\|").replace("`", "\\`").replace("<", "&lt;")
    return text.replace("](", "]\\(")  # prevents links; brackets alone are harmless


def _markdown_row(row: Sequence[str], widths: Sequence[int], labels: int) -> str:
    padded = [
        cell.ljust(width) if i < labels else cell.rjust(width)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    return f"| {' | '.join(padded)} |"


def _latex(cell: str) -> str:
    text = "".join(_LATEX.get(c, c) for c in plain(cell))
    return f"{{{text[0]}}}{text[1:]}" if text[:1] in ("[", "*") else text  # not an argument of \\
