"""Uniform samples of the tokens that are not selected, and the weights of the sampled tokens."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from pqbench.kernels.backend import kernels
from pqbench.kernels.reference.noise import LEAST


def step_seed(seed: int, layer: int, length: int) -> int:
    """A seed for one layer and one length of the context; it depends on nothing else."""
    return ((seed * 1_000_003 + layer) * 1_000_003 + length) % 2**63


def draw_rest(selected: Tensor, tokens: int, count: int, seed: int) -> Tensor:
    """A uniform sample ``[B, H, n]`` without replacement of ``count`` tokens that are not ``selected`` ``[B, H, k]``,
    or of all of them if there are fewer; the context has ``tokens`` tokens. The sample is in random order, so that its
    first tokens are a uniform sample too. It depends only on ``seed``, the head and ``selected``, not on the batch or
    the device, and is drawn on the device of ``selected``."""
    noise = kernels(selected.device).noise(selected.shape[1], tokens, seed, selected.device)
    noise = noise.expand(len(selected), -1, -1).scatter(2, selected, LEAST)
    return noise.topk(max(0, min(count, tokens - selected.shape[2])), dim=2).indices


def sample_log_weights(sample: Tensor, rest: int, before: int, after: int = 0, sizes: Tensor | None = None) -> Tensor:
    """Log-weights ``[B, H, 1, before + n + after]`` of a selection that has ``before`` exact rows, then the ``sample``
    ``[B, H, n]``, then ``after`` exact rows. Exact rows have log-weight 0. A sampled row represents ``rest / size``
    tokens and gets the log of this number, where ``rest`` is the number of tokens that were not selected and the size
    is n, or that of ``sizes`` ``[B, H]``.

    With these weights, numerator and denominator of attention are unbiased (vAttention, arXiv 2510.05688).
    """
    sizes = sample.new_full(sample.shape[:2], sample.shape[2]) if sizes is None else sizes
    share = (rest / sizes.float()).log()[:, :, None, None].expand(-1, -1, 1, sample.shape[2])
    return torch.nn.functional.pad(share, (before, after))


def sample_sizes(exact: Tensor, logits: Tensor, rest: int, epsilon: float, delta: float) -> Tensor:
    """Number of tokens ``[B, H]`` to sample so that, for every query head of the group, the relative error of the
    estimated denominator of attention exceeds ``epsilon`` with probability at most ``delta``.

    This is the normal bound of vAttention (arXiv 2510.05688), (z sigma N / (epsilon D))^2. Here z is the 1 - delta / 2
    quantile, N the number of tokens to sample from, sigma the standard deviation of their exp(logit), and D the
    denominator; sigma and D are estimated from ``logits``.

    Args:
        exact: log-sum-exp ``[B, H, G]`` of the logits of the exact tokens.
        logits: ``[B, H, G, n]`` of a sample of the other tokens, n >= 2.
        rest: number of these other tokens.
        epsilon: tolerated relative error of the denominator.
        delta: probability of a larger error.
    """
    top = torch.maximum(exact, logits.amax(3))
    terms = (logits - top[..., None]).exp()
    denominator = (exact - top).exp() + rest * terms.mean(3)
    quantile = NormalDist().inv_cdf(1 - delta / 2)
    needed = (quantile * terms.std(3) * rest / (epsilon * denominator)).square().ceil()
    return needed.amax(2).clamp(max=rest).long()
