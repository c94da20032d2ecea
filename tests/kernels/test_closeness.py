"""The comparisons of kernels notice an error of one percent in a single value, however large the values are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pqbench.kernels import reference
from tests.kernels.closeness import close, close_each, close_logs


def planted(values: Tensor, place: int, error: float = 0.01) -> Tensor:
    """The same values, with one of them larger by a share ``error``."""
    other = values.clone()
    other.view(-1)[place] *= 1 + error
    return other


def logits(scale: float) -> Tensor:
    """Logits ``[1, 2, 4, S]`` of the longest context."""
    return torch.randn(1, 2, 4, 131_072, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("scale", [0.0, 1.0, 10.0], ids=["flat", "usual", "peaked"])
def test_one_percent_of_one_probability_of_a_long_context_is_caught(scale: float) -> None:
    probabilities = reference.group_probabilities(logits(scale))
    assert float(probabilities.median()) < 1e-4  # 4 heads, 131072 tokens
    rounded = reference.group_probabilities(logits(scale).double()).float()
    close_each(rounded, probabilities)
    order = probabilities.view(-1).argsort()
    for place in (order[0], order[len(order) // 2], order[-1]):  # the least, a middle and the largest
        with pytest.raises(AssertionError):
            close_each(planted(probabilities, int(place)), probabilities)


def test_one_percent_of_a_mass_is_caught_in_its_logarithm() -> None:
    lse = logits(1.0).logsumexp(-1)
    close_logs(logits(1.0).double().logsumexp(-1).float(), lse)
    wrong = lse.clone()
    wrong[0, 1, 2] += 0.01
    with pytest.raises(AssertionError):
        close_logs(wrong, lse)


def test_one_percent_of_the_largest_output_is_caught_however_small_outputs_are() -> None:
    output = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(2)) * 1e-5
    close(output * (1 + 1e-5), output)
    with pytest.raises(AssertionError):
        close(planted(output, int(output.abs().argmax())), output)


@pytest.mark.parametrize("compare", [close, close_each, close_logs])
def test_other_shapes_types_and_numbers_that_are_none_are_caught(compare: Callable[[Tensor, Tensor], None]) -> None:
    values = torch.ones(3)
    for other in (torch.ones(4), torch.ones(3, dtype=torch.bfloat16), torch.tensor([1.0, 1.0, torch.nan])):
        with pytest.raises(AssertionError):
            compare(other, values)
