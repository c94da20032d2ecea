"""Errors that a person can act on: one clear line each, shown without a traceback unless ``debug=true``."""


class PqbenchError(Exception):
    """Base of every error the harness explains in one line; ``exit_code`` is what the command returns."""

    exit_code = 1


class ConfigError(PqbenchError, ValueError):
    """An option has a value that cannot work; the message says which and what to set instead."""


class BudgetError(ConfigError):
    """A token budget that no selection can satisfy."""


class RoomError(ConfigError, MemoryError):
    """This machine has too little memory for a prompt; found before any of it is taken."""


class DataError(PqbenchError):
    """Benchmark data or a record is missing, cut or malformed; the message names the file, the line and the remedy."""


class ModelError(PqbenchError):
    """A model cannot be loaded or its attention cannot be served exactly."""


class DeviceError(PqbenchError):
    """The accelerator reported an error after which it answers nothing more in this process."""


class LivenessError(PqbenchError):
    """A method never skipped a token although its budget said it must: its figures would be those of full attention."""


class SelectionError(PqbenchError):
    """A method selected tokens that it must not select, or attended to more tokens than its budget allows."""
