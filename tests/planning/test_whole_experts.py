"""How many experts stay beside other units, against rankings by hand."""

import pytest
import torch

from plprune.architecture.blocks import blocks_of
from plprune.planning.structures import standardised
from plprune.planning.whole_experts import experts_to_keep, least, mixtures, step
from tests.builders import tiny
from tests.zoo import build


def test_ranks_of_all_blocks_leave_together_and_the_router_keeps_what_it_needs() -> None:
    blocks = blocks_of(build("mixtral"))
    rows = [(block, group) for block in blocks for group in block.groups("none")]
    saliencies = [torch.arange(8.0).roll(i) for i in range(4)]
    each, cost = sum(block.cost(block.expert_units()) for block in blocks), rows[0][0].cost(rows[0][1])
    worst = [torch.full((96,), -9.0)] * 4  # all channels leave before any expert
    best = [torch.full((96,), 9.0)] * 4
    assert experts_to_keep(rows, best, blocks, saliencies, 3 * each) == 5
    assert experts_to_keep(rows, best, blocks, saliencies, 6 * each) == 2
    assert experts_to_keep(rows, best, blocks, saliencies, 7 * each) == 2  # experts per token
    assert experts_to_keep(rows, worst, blocks, saliencies, 95 * 4 * cost) == 8
    assert experts_to_keep(rows, worst, blocks, saliencies, 95 * 4 * cost + 2 * each) == 6


def test_an_expert_competes_by_its_place_in_its_block() -> None:
    blocks = blocks_of(build("mixtral"))
    rows = [(block, group) for block in blocks for group in block.groups("none")]
    saliency = torch.tensor([9.0, 1.0, 5.0, 4.0, 3.0, 6.0, 7.0, 8.0])
    score = standardised(saliency[:, None]).sort().values
    between = [torch.full((96,), float(score[2] + score[3]) / 2)] * 4  # three experts are worse than all channels
    each = sum(block.cost(block.expert_units()) for block in blocks)
    for scale in (1.0, 1000.0):  # saliencies of blocks are not of one size
        own = [saliency * scale**i for i in range(4)]
        assert experts_to_keep(rows, between, blocks, own, 3 * each) == 5
        assert experts_to_keep(rows, between, blocks, own, 4 * each) == 5


def test_groups_of_a_router_are_steps() -> None:
    own = mixtures(blocks_of(build("deepseek_v3")), "FLAP")
    assert (step(own), least(own), len(own)) == (2, 4, 1)


def test_a_dense_model_has_none() -> None:
    with pytest.raises(ValueError, match="FLAP prunes experts, and the model has none that can leave"):
        mixtures(blocks_of(tiny()), "FLAP")
