"""Removing rows and columns."""

import torch

from plprune.architecture.cutting import complement


def test_complement_is_the_rest() -> None:
    assert complement(torch.tensor([0, 2, 3, 6]), 8).tolist() == [1, 4, 5, 7]
    assert complement(torch.tensor([], dtype=torch.long), 3).tolist() == [0, 1, 2]
