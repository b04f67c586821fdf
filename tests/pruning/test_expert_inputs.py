"""What experts see, by our implementation of them, against transformers' own."""

from typing import Any

import pytest
import torch
from torch import Tensor

from plprune.architecture.blocks import blocks_of
from plprune.pruning.expert_inputs import PerExpert, Saliency, watched
from plprune.pruning.statistics import Moments
from tests.builders import logits
from tests.zoo import build


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])  # plain; transposed, with biases; without gates
def test_watched_experts_compute_what_others_do(kind: str) -> None:
    model = build(kind)
    before, seen = logits(model), []
    block = next(block for block in blocks_of(model) if block.expert_count)
    experts: Any = block.part(block.experts.path)
    usual = experts.config._experts_implementation

    def see(expert: int, tokens: Tensor, weights: Tensor, inner: Tensor, outputs: Tensor) -> None:
        assert len(tokens) == len(weights) == len(inner) == len(outputs)
        assert inner.shape[1] == len(block.experts.channels)
        seen.append(len(tokens))

    with watched(experts, see):
        x = torch.randn(10, experts.down_proj.shape[1 + experts.is_transposed])
        index = torch.stack([torch.randperm(8)[:2] for _ in range(10)])
        mine = experts(x, index, torch.rand(10, 2, generator=torch.Generator().manual_seed(0)))
    assert sum(seen) == 20
    assert experts.config._experts_implementation == usual
    torch.testing.assert_close(mine, experts(x, index, torch.rand(10, 2, generator=torch.Generator().manual_seed(0))))
    assert torch.equal(logits(model), before)


def test_the_implementation_is_put_back_after_an_error() -> None:
    model = build("mixtral")
    experts: Any = blocks_of(model)[0].part("mlp.experts")
    usual = experts.config._experts_implementation
    with pytest.raises(RuntimeError, match="stop"), watched(experts, lambda *_: None):
        raise RuntimeError("stop")
    assert experts.config._experts_implementation == usual
    assert logits(model).isfinite().all()


def test_saliency_is_a_mean_over_tokens_of_all_batches() -> None:
    weights, outputs = torch.rand(7), torch.randn(7, 5)
    parts, whole = Saliency(3), Saliency(3)
    for own in (slice(0, 4), slice(4, 7)):
        parts.update(2, torch.arange(7)[own], weights[own], outputs[own], outputs[own])
    whole.update(2, torch.arange(7), weights, outputs, outputs)
    expected = (
        sum(float(w) * float(o.double().square().sum().sqrt()) for w, o in zip(weights, outputs, strict=True)) / 7
    )
    assert parts.mean.tolist() == pytest.approx([0, 0, expected], rel=1e-6)
    torch.testing.assert_close(parts.mean, whole.mean)
    assert parts.tokens.tolist() == [0, 0, 7]


def test_statistics_of_experts_are_of_their_own_tokens_and_samples() -> None:
    x = torch.randn(2, 12, 3)  # of two samples
    own = torch.stack([torch.arange(12) % 3 != 0, torch.arange(12) % 4 != 0])
    seen = PerExpert(3, 3, Moments)
    seen.length = 12
    tokens = own.flatten().nonzero().flatten()
    seen.update(1, tokens, torch.ones(len(tokens)), x.flatten(0, 1)[tokens], x.flatten(0, 1)[tokens])
    seen.update(2, torch.arange(3), torch.ones(3), x[0, :3], x[0, :3])
    rows = x[own].double()
    variance = seen.stacked(lambda m: m.variance)
    torch.testing.assert_close(variance[1], rows.var(0))
    torch.testing.assert_close(seen.stacked(lambda m: m.running_variance)[1], expected_running(x, own))
    assert seen.few == [0, 2]
    assert torch.equal(variance[0], variance[1].mean().expand(3))
    assert torch.equal(variance[2], variance[0])
    weighed = PerExpert(3, 3, Moments, torch.tensor([[1.0, 2.0, 3.0]] * 3).double())
    weighed.parts, weighed.saliency = seen.parts, seen.saliency
    torch.testing.assert_close(
        weighed.stacked(lambda m: m.variance)[0], variance[0] * torch.tensor([1.0, 2.0, 3.0]).double()
    )


def expected_running(x: Tensor, own: Tensor) -> Tensor:
    """FLAP's estimate for two samples: that of the second about the mean of both, halved."""
    first, second = (each[mask].double() for each, mask in zip(x, own, strict=True))
    return (second - torch.cat([first, second]).mean(0)).square().mean(0) / 2
