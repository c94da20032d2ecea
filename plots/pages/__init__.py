"""The results pages in ``docs/results/`` and the tables of the README, made from ``results/measured/``."""
