"""Whether two results of a kernel are equal up to rounding. Every bound is relative to the values: the attention of one
token among 131072 is about 1e-5, and an absolute bound would accept any value."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-36  # a GPU treats numbers below 1e-38 as zero


def same_kind(got: Tensor, expected: Tensor) -> None:
    """Check that two results have the same shape and type and are finite."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert bool(got.isfinite().all())


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Check that two results are equal up to ``tolerance`` times the largest value.

    This is for sums in which positive and negative terms cancel (outputs of attention, means of clusters). Their
    rounding error depends on the terms, even if the sum is small. Half precision adds the rounding of the result.
    """
    same_kind(got, expected)
    if got.dtype != torch.float32:
        tolerance = max(tolerance, 4 * torch.finfo(got.dtype).eps)
    scale = float(expected.float().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance * scale, rtol=0)


def close_each(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Check that each value is equal up to ``tolerance`` times the value itself.

    This is for exponentials of logits and their sums (probabilities, column sums). Nothing cancels, and an error of a
    logit changes all values by the same factor. 2e-4 allows float32 rounding of logits up to a thousand.
    """
    same_kind(got, expected)
    torch.testing.assert_close(got, expected, atol=_LEAST, rtol=tolerance)


def close_logs(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Check logarithms of values that may each differ by a share ``tolerance``: an absolute bound on a logarithm is a
    relative bound on the value itself."""
    same_kind(got, expected)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
