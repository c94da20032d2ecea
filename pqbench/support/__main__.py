"""The command ``python -m pqbench.support``; see :mod:`pqbench.support.trial`."""

import sys

from pqbench.support.trial import main

sys.exit(main())
