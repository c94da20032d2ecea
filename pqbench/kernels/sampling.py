"""Uniform samples of the tokens that a selection leaves out, and what each of them stands for."""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from pqbench.kernels.backend import kernels
from pqbench.kernels.reference.noise import LEAST


def step_seed(seed: int, layer: int, length: int) -> int:
    """A seed that differs in every layer and at every length of the context, whatever ran before."""
    return ((seed * 1_000_003 + layer) * 1_000_003 + length) % 2**63


def draw_rest(selected: Tensor, tokens: int, count: int, seed: int) -> Tensor:
    """A uniform sample without replacement ``[B, H, n]`` of those of ``tokens`` tokens that are not ``selected``
    ``[B, H, k]``: ``count`` of them, or all there are, in random order, so that any first few are a sample too. The
    draw depends on ``seed`` and the head, not on the batch nor on the device, and is made where ``selected`` lies."""
    noise = kernels(selected.device).noise(selected.shape[1], tokens, seed, selected.device)
    noise = noise.expand(len(selected), -1, -1).scatter(2, selected, LEAST)
    return noise.topk(max(0, min(count, tokens - selected.shape[2])), dim=2).indices


def sample_log_weights(sample: Tensor, rest: int, before: int, after: int = 0, sizes: Tensor | None = None) -> Tensor:
    """Log-weights ``[B, H, 1, before + n + after]`` of a selection: 0 for the rows attended for themselves, and for the
    ``sample`` ``[B, H, n]`` between them log of the ``rest / size`` tokens that each stands for; the size is n, or less
    by ``sizes`` ``[B, H]``.

    Weighted so, numerator and denominator of attention are unbiased (vAttention, arXiv 2510.05688).
    """
    sizes = sample.new_full(sample.shape[:2], sample.shape[2]) if sizes is None else sizes
    share = (rest / sizes.float()).log()[:, :, None, None].expand(-1, -1, 1, sample.shape[2])
    return torch.nn.functional.pad(share, (before, after))


def sample_sizes(exact: Tensor, logits: Tensor, rest: int, epsilon: float, delta: float) -> Tensor:
    """Tokens ``[B, H]`` to sample so that the estimated denominator of attention is off by more than the factor
    1 +- ``epsilon`` with probability at most ``delta``, for every query head of the group.

    The normal bound of vAttention (arXiv 2510.05688): (z sigma N / (epsilon D))^2 with z the 1 - delta / 2 quantile, N
    the tokens sampled from, sigma the deviation of their exp(logit) and D the denominator, both as ``logits`` show.

    Args:
        exact: log-sum-exp ``[B, H, G]`` of the logits attended exactly.
        logits: ``[B, H, G, n]`` of a sample of the ``rest`` other tokens, n >= 2.
    """
    top = torch.maximum(exact, logits.amax(3))
    terms = (logits - top[..., None]).exp()
    denominator = (exact - top).exp() + rest * terms.mean(3)
    quantile = NormalDist().inv_cdf(1 - delta / 2)
    needed = (quantile * terms.std(3) * rest / (epsilon * denominator)).square().ceil()
    return needed.amax(2).clamp(max=rest).long()
