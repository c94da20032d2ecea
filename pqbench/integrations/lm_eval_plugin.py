"""Makes ``lm_eval --model pqbench`` work. Every process that imports torch loads this module, so it imports nothing.

lm-eval 0.4.13 looks for no third-party models. But its command imports torch before it looks a model up, and on import
torch calls every entry point of the group ``torch.backends``: pyproject.toml names :func:`register` there. It does
nothing unless lm-eval is in use; ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off. Later releases of lm-eval read the
group ``lm_eval.models``, which pyproject.toml fills too. ``python -m pqbench.lm_eval_model`` relies on neither.
"""

from __future__ import annotations

import sys
from contextlib import suppress

NAME = "pqbench"
TARGET = "pqbench.integrations.lm_eval:PqbenchLM"


def register() -> None:
    """Add the model to lm-eval's registry if this process has lm-eval loaded; never raises, or torch would not load."""
    if "lm_eval" not in sys.modules:
        return
    with suppress(ImportError, ValueError):
        import lm_eval.models  # noqa: F401 - first: a registry with one entry would not be filled with lm-eval's own
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
