"""When two results of a kernel are equal up to rounding. Every bound is relative to the values themselves: attention of
one token among 131072 is about 1e-5, and a bound that does not shrink with it would accept anything."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST = 1e-36  # a GPU takes numbers below 1e-38 for zero


def same_kind(got: Tensor, expected: Tensor) -> None:
    """Of one shape and type, and finite."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert bool(got.isfinite().all())


def close(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to ``tolerance`` times the largest value there is.

    For sums in which positive and negative terms cancel (outputs of attention, means of clusters): they are rounded as
    their terms are, however small the sum. Half types add the rounding of the result.
    """
    same_kind(got, expected)
    if got.dtype != torch.float32:
        tolerance = max(tolerance, 4 * torch.finfo(got.dtype).eps)
    scale = float(expected.float().abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(got.float(), expected.float(), atol=tolerance * scale, rtol=0)


def close_each(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Equal up to ``tolerance`` times the value itself, for each value.

    For exponentials of logits, and sums of them (probabilities, what columns receive): nothing cancels, and an error of
    a logit changes all magnitudes by the same factor. 2e-4 allows logits of up to a thousand to be rounded as float32.
    """
    same_kind(got, expected)
    torch.testing.assert_close(got, expected, atol=_LEAST, rtol=tolerance)


def close_logs(got: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    """Logarithms of values that are equal up to ``tolerance`` each: an absolute bound on a logarithm is a relative one
    on what it is the logarithm of."""
    same_kind(got, expected)
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)
