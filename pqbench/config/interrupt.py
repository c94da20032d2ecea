"""Handles Ctrl-C while the command still imports its modules, which takes seconds: one line and exit code 130, no
traceback.

The command imports this module before all others. In any other program the import changes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn


def is_command(started_as: str) -> bool:
    """Whether a program of this name, ``sys.argv[0]``, is the command: the console script, or ``python -m pqbench``."""
    path = Path(started_as)
    return path.stem == "pqbench" or (path.name == "__main__.py" and path.parent.name == "pqbench")


def leave(*_: Any) -> NoReturn:
    """End the process at once. No work has begun at this point."""
    sys.stderr.write("error: interrupted before any work began\n")
    sys.stderr.flush()
    os._exit(130)


def begun() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again from now on. The command handles this exception."""
    if signal.getsignal(signal.SIGINT) is leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if is_command(sys.argv[0]):
    signal.signal(signal.SIGINT, leave)
