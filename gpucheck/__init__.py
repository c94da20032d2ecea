"""``make gpu-check``: one command that settles on a GPU, in ten minutes, what can only be settled there.

Runs from a plain checkout with the Python of a bare image: no ``make setup``, no network. The nine steps are listed in
:mod:`gpucheck.plan`; each is a process of its own under its own time limit, and writes every result at once.
"""
