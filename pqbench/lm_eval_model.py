"""``python -m pqbench.lm_eval_model``: lm-eval's command with our model; see :mod:`pqbench.integrations.lm_eval`."""

import sys

from pqbench.integrations.lm_eval import main

if __name__ == "__main__":
    sys.exit(main())
