"""How many experts stay beside other units, against rankings by hand."""

import pytest
import torch

from plprune.architecture.blocks import blocks_of
from plprune.planning.structures import standardised
from plprune.planning.whole_experts import (
    experts_to_keep,
    least,
    mixtures,
    nearest,
    possible,
    sizes,
    step,
    to_keep,
    with_leaving,
)
from plprune.pruning.allocation import Budget
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


def test_the_number_of_experts_is_the_nearest_that_leaves_something_to_remove() -> None:
    blocks, asked = blocks_of(build("mixtral")), []

    def settle(left: int) -> tuple[float, Budget]:
        asked.append(left)
        if left > 6:
            raise ValueError("out of reach")
        return 0.5 - 0.1 * left, Budget(blocks, 0.5, left=left)

    assert nearest(blocks, None, settle, "FLAP")[1].left == 5
    assert asked == [8, 7, 6, 5]
    assert nearest(blocks, 3, settle, "FLAP")[0] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="out of reach"):
        nearest(blocks, 8, lambda left: settle(left + 8), "FLAP")
    assert possible(blocks, 0.3, "FLAP") == [6, 2, 8]
    assert possible(blocks, 0.0, "FLAP") == [8]


def test_experts_leave_before_the_channels_of_the_others() -> None:
    blocks = blocks_of(build("qwen2_moe"))
    rows = [(block, group, torch.arange(len(group))) for block in blocks for group in block.groups("none")]
    budget = Budget(blocks, 0.5, left=3)
    kept = to_keep(blocks, [torch.arange(8.0)] * 4, budget)
    assert [keep.tolist() for keep in kept.values()] == [[5, 6, 7]] * 4
    assert [group.kind for _, group, _ in with_leaving(rows, kept)] == ["ffn", "expert", "expert_channel"] * 4
    assert sizes(budget) == {f"blocks.{i}.expert": 3 for i in range(4)}
    assert with_leaving(rows, to_keep(blocks, [torch.arange(8.0)] * 4, Budget(blocks, 0.5, left=8))) == rows


def test_a_dense_model_has_none() -> None:
    with pytest.raises(ValueError, match="FLAP prunes experts, and the model has none that can leave"):
        mixtures(blocks_of(tiny()), "FLAP")
