"""The steps, a module each with ``run(result, options)``; :mod:`gpucheck.plan` lists them."""
