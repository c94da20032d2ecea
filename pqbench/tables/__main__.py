"""``python -m pqbench.tables``; see :mod:`pqbench.tables.command`."""

import sys

from pqbench.tables.command import main

sys.exit(main())
