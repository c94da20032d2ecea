"""``python3 -m gpucheck.step NUMBER OPTIONS DEADLINE``: the process of one step."""

from __future__ import annotations

import sys
from importlib import import_module

from gpucheck.options import Options
from gpucheck.plan import STEPS
from gpucheck.result import Result, Skipped, one_line, read_json


def main(number: int, options: Options, deadline: float) -> None:
    """Run a step. The deadline is in seconds of ``time.monotonic``, which is the same in all processes of a machine."""
    step = next(step for step in STEPS if step.number == number)
    machine = read_json(options.folder / STEPS[0].file).get("machine", {})
    result = Result(step, options.folder, machine, deadline)
    result.write()
    try:
        import_module(f"gpucheck.steps.{step.name}").run(result, options)
    except Skipped as reason:
        result.close("skipped", str(reason))
    except Exception as error:
        result.close("failed", one_line(error))
        raise  # the traceback goes to the log
    else:
        result.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Options.from_text(sys.argv[2]), float(sys.argv[3]))
