"""Losses without all logits: what they and their gradients are, of every family, and how wide the tensors get."""

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from plprune import LoRA
from plprune.io.text import IGNORED
from plprune.pruning import losses
from plprune.pruning.forward import check_masking
from plprune.pruning.losses import (
    HeadInputs,
    counted_positions,
    divergence,
    head_inputs,
    next_token_criterion,
    next_token_loss,
    top_k_log_probs,
    weighted_loss,
)
from plprune.recovery.distillation import Distillation
from plprune.recovery.lora import inject
from tests.builders import FAMILIES, VOCABULARY, logits, tiny, windows

ROWS = 7


@pytest.fixture(autouse=True)
def few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "LEAST_ROWS", ROWS)
    monkeypatch.setattr(losses, "CHUNK_BYTES_ON_CPU", 0)


def adapted(family: str = "llama") -> PreTrainedModel:
    """With adapters that are not zero."""
    model = tiny(family)
    inject(model, LoRA(rank=2, by="uniform"), None)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def batch() -> tuple[Tensor, Tensor]:
    """Two windows, and labels of which some do not count."""
    ids = windows(2, 24)
    labels = ids.clone()
    labels[0, :5], labels[1, 7:9], labels[1, -1] = IGNORED, IGNORED, IGNORED
    return ids, labels


def gradients(model: PreTrainedModel, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_all_logits(family: str, whole: bool) -> None:
    model, (ids, labels) = adapted(family).double(), batch()  # so that only the loss itself is rounded
    expected = next_token_loss(model(input_ids=ids).logits, labels, "sum")
    positions = counted_positions(labels)
    found, sums = weighted_loss(
        head_inputs(model, {"input_ids": ids}, positions, whole), [next_token_criterion(labels, positions)], [1.0]
    )
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)
    torch.testing.assert_close(sums, expected[None], rtol=1e-6, atol=0.0)
    wanted, own = gradients(model, expected / 3), gradients(model, found / 3)
    largest = max(float(each.abs().max()) for each in wanted.values())
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6 * largest)


def test_documents_that_are_apart_have_the_losses_that_they_have_alone() -> None:
    model, ids, places = adapted(), windows(1, 24), torch.cat([torch.arange(9), torch.arange(15)])[None]
    labels = ids.masked_fill(places == 0, IGNORED)
    alone = [next_token_loss(model(input_ids=each).logits, each, "sum") for each in ids.split([9, 15], 1)]
    crossing = next_token_loss(model(ids).logits, labels, "sum")
    for given, expected in (({"position_ids": places}, sum(alone)), ({}, crossing)):
        own = head_inputs(model, {"input_ids": ids} | given, counted_positions(labels))
        found, _ = weighted_loss(own, [next_token_criterion(labels, counted_positions(labels))], [1.0])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_that_does_not_keep_documents_apart_is_refused(family: str) -> None:
    said = "OPTForCausalLM does not separate the documents of a window .*: leave out data.intra_document_masking"
    with pytest.raises(ValueError, match=said) if family == "opt" else contextlib.nullcontext():
        assert check_masking(tiny(family)) is None


@pytest.mark.parametrize("count", [0, 1, 20])
def test_several_losses_by_their_weights_and_a_head_that_is_trained(count: int) -> None:
    head, x = nn.Linear(5, VOCABULARY), torch.randn(count, 5, requires_grad=True)
    labels, answers = torch.randint(VOCABULARY, (count,)), top_k_log_probs(torch.randn(count, VOCABULARY), 3, 2.0)
    trained: list[Tensor] = [x, *head.parameters()]
    z = head(x)
    plain = nn.functional.cross_entropy(z, labels, reduction="sum"), divergence(z, *answers, 2.0)
    wanted = torch.autograd.grad(5 * (0.3 * plain[0] + 0.7 * plain[1]), trained)

    def taught(logits: Tensor, where: slice) -> Tensor:
        return divergence(logits, answers[0][where], answers[1][where], 2.0)

    own = next_token_criterion(torch.cat([labels[:1], labels])[None], torch.arange(count))
    found, sums = weighted_loss(HeadInputs(x, head, list(head.parameters()), ROWS), [own, taught], [0.3, 0.7])
    torch.testing.assert_close(sums, torch.stack(plain).detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(5 * found, trained), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [3, VOCABULARY])
@pytest.mark.parametrize("spread", [1.0, 40.0])  # 40: almost everything is one token's
def test_the_gradient_of_the_divergence_is_that_of_its_definition(
    top_k: int, temperature: float, spread: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs, ours = (spread * torch.randn(4, VOCABULARY, generator=generator, dtype=torch.float64) for _ in range(2))
    values, tokens = top_k_log_probs(theirs.float(), top_k, temperature)
    z = ours.float().requires_grad_()
    found = 0.3 * divergence(z, values, tokens, temperature)
    ours = ours.float().double().requires_grad_()
    logs = (ours / temperature).log_softmax(-1)
    events = logs.gather(-1, tokens)
    if top_k < VOCABULARY:
        rest = torch.ones_like(logs).scatter(-1, tokens, 0.0).log() + logs
        events = torch.cat([events, rest.logsumexp(-1, keepdim=True)], -1)
    wanted = 0.3 * temperature**2 * (values.double().exp() * (values.double() - events)).sum()
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    (own,), (gradient,) = torch.autograd.grad(found, z), torch.autograd.grad(wanted, ours)
    torch.testing.assert_close(own.double(), gradient, rtol=1e-4, atol=1e-6)


def test_a_teacher_is_compared_at_the_positions_that_count() -> None:
    (ids, labels), settings = batch(), Distillation(temperature=2.0, top_k=5)
    ours, (values, tokens) = logits(tiny(), ids), top_k_log_probs(logits(tiny(seed=1), ids)[:, :-1], 5, 2.0)
    counts = labels[:, 1:] != IGNORED
    expected = divergence(ours[:, :-1][counts], values[counts], tokens[counts], 2.0)
    positions = counted_positions(labels)
    loss = settings.criterion({"values": values, "tokens": tokens}, positions)
    torch.testing.assert_close(loss(ours.flatten(0, 1)[positions], slice(None)), expected)


class Widest(TorchDispatchMode):
    """The most values that a tensor had that was made, by dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[torch.dtype, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, tuple | list) else [made]:
            if isinstance(each, Tensor):
                self.found[each.dtype] = max(each.numel(), self.found.get(each.dtype, 0))
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_are_never_more_logits_than_a_few(dtype: torch.dtype) -> None:
    """And under autocast they are made in bfloat16, and their loss in float32."""
    model, (ids, labels) = adapted(), batch()
    made = []
    with Widest() as widest, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        positions = counted_positions(labels)
        own = head_inputs(model, {"input_ids": ids}, positions)
        noted = HeadInputs(own.values, lambda x: made.append(own.head(x)) or made[-1], [], own.rows)
        loss, _ = weighted_loss(noted, [next_token_criterion(labels, positions)], [1.0])
    loss.backward()
    assert loss.dtype == torch.float32
    assert {each.dtype for each in made} == {dtype}
    assert [each.shape for each in made] == [(ROWS, VOCABULARY)] * 5 + [(4, VOCABULARY)]
    assert max(widest.found.values()) < len(positions) * VOCABULARY
