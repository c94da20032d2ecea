"""``make gpu-check``: one command that checks on a GPU, in ten minutes, what can only be checked there.

It runs from a plain checkout with the Python of a bare image, without ``make setup`` and without a network. The nine
steps are listed in :mod:`gpucheck.plan`. Each is a process of its own with its own time limit, and writes every result
as soon as it is known.
"""
