"""``python -m pqbench.progress``; see :mod:`pqbench.progress.command`."""

import sys

from pqbench.progress.command import main

sys.exit(main())
