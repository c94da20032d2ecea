"""Errors that the user can act on. Each is shown as one line, without a traceback unless ``debug=true``."""


class PqbenchError(Exception):
    """Base of every error that the harness explains in one line; ``exit_code`` is what the command returns."""

    exit_code = 1


class ConfigError(PqbenchError, ValueError):
    """An option has a value that cannot work; the message names the option and says what to set instead."""


class BudgetError(ConfigError):
    """A budget is not valid, or no selection can satisfy it."""


class RoomError(ConfigError, MemoryError):
    """This machine has too little memory for a prompt; the error is raised before any memory is taken."""


class DataError(PqbenchError):
    """Benchmark data or a record is missing, truncated or malformed; the message names the file, line and remedy."""


class ModelError(PqbenchError):
    """A model cannot be loaded, or its attention cannot be computed exactly."""


class DeviceError(PqbenchError):
    """The accelerator reported an error after which this process cannot use it any more."""


class LivenessError(PqbenchError):
    """A method never skipped a token although its budget is smaller than the context: it measured full attention."""


class SelectionError(PqbenchError):
    """A method selected tokens that it must not select, or attended to more tokens than its budget allows."""
