"""Makes ``lm_eval --model pqbench`` work. Every process that imports torch loads this module, so it imports nothing.

lm-eval 0.4.13 does not look for models of other packages. But its command imports torch before it looks up a model, and
on import torch calls every entry point of the group ``torch.backends``. pyproject.toml therefore lists :func:`register`
in this group. The function does nothing unless lm-eval is in use, and ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` turns it off.
Later releases of lm-eval read the group ``lm_eval.models``, which pyproject.toml fills too.
``python -m pqbench.lm_eval_model`` needs neither group.
"""

from __future__ import annotations

import sys
from contextlib import suppress

NAME = "pqbench"
TARGET = "pqbench.integrations.lm_eval:PqbenchLM"


def register() -> None:
    """Add the model to lm-eval's registry if this process has loaded lm-eval. It never raises, because an error would
    keep torch from loading."""
    if "lm_eval" not in sys.modules:
        return
    with suppress(ImportError, ValueError):
        import lm_eval.models  # noqa: F401 - first, because lm-eval does not fill a registry that has an entry
        from lm_eval.api.registry import model_registry

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
