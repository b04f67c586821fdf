"""Real processes that share work, against one process that does all of it."""

import dataclasses
import platform
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import Calibration, LearnedGates, prune
from plprune.architecture.modules import set_parameter
from plprune.checkpoint import sharing
from plprune.io import distributed
from plprune.pruning.plan import PruningPlan
from plprune.pruning.statistics import BlockInfluence, Gram, HoldoutGram, Moments, Norms
from tests.benchmarks.pruning import resident
from tests.builders import FAMILIES, METHODS, REPAIRED, logits, method, tiny, windows
from tests.ranks import in_ranks
from tests.zoo import build

pytestmark = pytest.mark.multi_process
SEVEN = list(range(7))
RUNS = [("llama", name) for name in (*METHODS, *REPAIRED)]
RUNS += [(family, "FASP kv_heads") for family in FAMILIES if family != "llama"]
RUNS += [("gpt_oss", name) for name in ("FLAP experts", "FASP none", "FLAP restore", "REAP")]
ONE = [windows(1, 64)]
STEPS = [(2, [windows(4), windows(3, seed=2)]), (3, [windows(2), windows(1, 9)])]  # windows per step of gates
SHORT = [torch.arange(3, 3 + length)[None] for length in (5, 5, 9)]  # windows of unlike lengths


def sample(i: int) -> Tensor:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(2, 5, 6, generator=generator) + torch.arange(6) * 3


def statistics(items: list[int]) -> dict[str, Any]:
    moments, norms, gram, influence = Moments(), Norms(), Gram(), BlockInfluence()
    parted = HoldoutGram(2 * items[0] if items else 0)
    for x in map(sample, items):
        for statistic in (moments, norms, gram, parted):
            statistic.update(x)
        influence.update(x, x.flip(-1))
    return {"moments": moments, "norms": norms, "gram": gram, "influence": influence, "parted": parted}


def values(all_of: dict[str, Any]) -> dict[str, Any]:
    moments, norms, gram, influence, parted = all_of.values()
    return {
        "parts": [parted.norm, parted.fitting.covariance(), parted.held_out.about(parted.fitting.mean)],
        "pool": [(pool := parted.pooled()).mean, pool.covariance()],
        "moments": [moments.mean, moments.variance, moments.running_variance, moments.norm],
        "norms": [norms.mean, norms.pooled],
        "gram": [gram.mean, gram.covariance(), gram.norm],
        "influence": [torch.tensor(influence.distance(name)) for name in ("angular", "cosine", "mse", "mae")],
        "counts": [torch.tensor(each.count) for each in (moments, gram, influence)] + [torch.tensor(norms.samples)],
    }


def merged(items: list[int]) -> dict[str, Any]:
    group = distributed.world()
    own = statistics(distributed.shard(items, group))
    for statistic in own.values():
        statistic.merge(group)
    return values(own)


def pruned(family: str, name: str, batches: list[Tensor]) -> tuple[PruningPlan, Tensor]:
    model = tiny(family)
    plan = prune(model, method(name, 0.3), Calibration(batches, group=distributed.world()), seed=0)
    return plan, logits(model)


def learned(windows_per_step: int, batches: list[Tensor]) -> tuple[PruningPlan, Tensor]:
    model, calibration = tiny(), Calibration(batches, group=distributed.world())
    plan = prune(model, LearnedGates(0.3, windows_per_step=windows_per_step, gain_rate=0.05), calibration, seed=0)
    return plan, logits(model)


def everything() -> dict[str, Any]:
    group = distributed.world()
    found: dict[str, Any] = {
        "merged": [merged(items) for items in (SEVEN, SEVEN[:1])],
        "pruned": {run: pruned(*run, [windows(4), windows(3, seed=2)]) for run in RUNS},
        "short": [pruned("llama", name, ONE) for name in ("FLAP AL-AM", "FASP kv_heads", "TwoSSP", "CFSP relative")],
        "steps": [learned(n, batches) for n, batches in STEPS],
        "ragged": pruned("llama", "FLAP AL-AM", SHORT),
        "same": distributed.broadcast_object(f"from {distributed.rank(group)}", group),
        "sent": distributed.broadcast(torch.tensor([distributed.rank(group)]), 1, group),
        "nothing": distributed.gather_rows(None, group),
    }
    empty, unlike = tiny(), tiny(intermediate_size=32 + 16 * distributed.rank(group))
    for model in (empty, unlike):
        to_meta(model)
    found["faults"] = [
        fault(distributed.check_agreement, "x", "a thing", group),
        fault(distributed.check_agreement, str(distributed.rank(group)), "a thing", group),
        fault(sharing.receive, empty, group),
        fault(sharing.receive, unlike, group),
        fault(pruned, "llama", "FLAP AL-AM", [windows(4, seed=distributed.rank(group))]),
    ]
    return found | {"received": received(group), "peak": peak_of_receiving(group)}


def fault(function: Callable[..., Any], *args: Any) -> str:
    try:
        function(*args)
    except ValueError as error:
        return str(error)
    return ""


def peak_of_receiving(group: distributed.ProcessGroup) -> float:
    """Memory that it takes to get a model of 100 MB, over the model's."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "vocab_size": 2000}
    model = tiny("llama", **sizes)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if distributed.rank(group):
        to_meta(model)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    sharing.receive(model, group)
    return (resident("VmHWM") - before) * 2**20 / size


def to_meta(model: PreTrainedModel) -> None:
    for name, parameter in list(model.named_parameters()):
        set_parameter(model, name, parameter.to("meta"))


def received(group: distributed.ProcessGroup) -> Tensor:
    model = tiny("llama", tie_word_embeddings=True)
    expected = logits(model)
    if distributed.rank(group):
        to_meta(model)
    sharing.receive(model, group)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(logits(model), expected)
    own_head = tiny("llama", tie_word_embeddings=distributed.rank(group) > 0)  # the weights say otherwise
    if distributed.rank(group):
        to_meta(own_head)
        own_head.tie_weights()
    sharing.receive(own_head, group)
    assert torch.equal(logits(own_head), logits(tiny("llama", tie_word_embeddings=False)))
    assert not own_head.config.tie_word_embeddings
    scaled = build("gemma4_text")
    for index, block in enumerate(scaled.model.layers if distributed.rank(group) == 0 else ()):  # type: ignore[arg-type]
        block.layer_scalar.fill_(0.5 + index)
    if distributed.rank(group):
        to_meta(scaled)
    sharing.receive(scaled, group)
    assert [float(block.layer_scalar) for block in scaled.model.layers] == [0.5, 1.5, 2.5, 3.5]  # type: ignore[union-attr]
    return expected


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return in_ranks(everything)


def test_statistics_merge_to_those_of_one_process(ranks: list[dict[str, Any]]) -> None:
    for i, items in enumerate((SEVEN, SEVEN[:1])):  # shares of 3 and 4, and of 0 and 1
        expected = values(statistics(items))
        for rank in ranks:
            for kind, tensors in expected.items():
                for mine, theirs in zip(rank["merged"][i][kind], tensors, strict=True):
                    digits = 1e-6 if kind in ("gram", "parts", "pool") else 1e-12  # its products are taken in float32
                    torch.testing.assert_close(mine, theirs, rtol=digits, atol=digits)


def test_moments_merge_without_a_bit_of_difference(ranks: list[dict[str, Any]]) -> None:
    expected = values(statistics(SEVEN))["moments"]
    for rank in ranks:
        assert all(map(torch.equal, rank["merged"][0]["moments"], expected))


@pytest.mark.parametrize("run", RUNS, ids=" ".join)
def test_two_processes_give_the_plan_of_one(ranks: list[dict[str, Any]], run: tuple[str, str]) -> None:
    plan, expected = pruned(*run, [windows(4), windows(3, seed=2)])
    for rank in ranks:
        theirs, found = rank["pruned"][run]
        # A sum over tokens, whose order differs; FASP's come out of weights that it has restored, in float32.
        digits = 1e-6 if "FASP" in run[1] else 1e-12
        torch.testing.assert_close(theirs.importance, plan.importance, rtol=digits, atol=0)
        assert dataclasses.replace(theirs, importance=plan.importance).digest == plan.digest
        torch.testing.assert_close(found, expected)
    assert ranks[0]["pruned"][run][0].digest == ranks[1]["pruned"][run][0].digest


def test_fewer_windows_than_processes(ranks: list[dict[str, Any]]) -> None:
    names = ("FLAP AL-AM", "FASP kv_heads", "TwoSSP", "CFSP relative")
    for name, *found in zip(names, *(rank["short"] for rank in ranks), strict=True):
        plan, expected = pruned("llama", name, ONE)
        for theirs, logits_there in found:
            assert {n: k.tolist() for n, k in theirs.keep.items()} == {n: k.tolist() for n, k in plan.keep.items()}
            torch.testing.assert_close(logits_there, expected)


def test_processes_share_the_windows_of_a_step_of_gates_and_gains(ranks: list[dict[str, Any]]) -> None:
    for i, (n, batches) in enumerate(STEPS):
        plan, expected = learned(n, batches)
        for rank in ranks:
            theirs, found = rank["steps"][i]
            assert all(torch.equal(theirs.keep[name], keep) for name, keep in plan.keep.items())
            torch.testing.assert_close(found, expected)
        assert torch.equal(ranks[0]["steps"][i][1], ranks[1]["steps"][i][1])
    assert not torch.allclose(learned(1, STEPS[0][1])[1], learned(2, STEPS[0][1])[1])


def test_windows_of_unlike_lengths(ranks: list[dict[str, Any]]) -> None:
    plan, _ = pruned("llama", "FLAP AL-AM", SHORT)
    for rank in ranks:
        assert all(torch.equal(rank["ragged"][0].keep[name], keep) for name, keep in plan.keep.items())


def test_values_go_from_one_to_all(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["same"] == "from 0"
        assert rank["sent"].tolist() == [1]
        assert rank["nothing"] is None
        assert torch.equal(rank["received"], ranks[0]["received"])


def test_whoever_receives_a_model_holds_it_once(ranks: list[dict[str, Any]]) -> None:
    sender, receiver = (rank["peak"] for rank in ranks)
    assert sender < 0.2
    assert 0.8 < receiver < 1.2


def test_a_disagreement_names_the_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        equal, unlike, *_ = rank["faults"]
        assert equal == ""
        assert unlike.startswith("processes disagree on a thing: rank 0 has 0, rank 1 has 1")


def test_a_model_that_nobody_has_or_not_everybody_has_alike(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        _, _, nobody, otherwise, _ = rank["faults"]
        assert nobody.startswith("no process has the model's weights")
        assert "rank 1 has another model.layers.0.mlp.gate_proj.weight (torch.float32 (48, 32))" in otherwise


def test_other_text_in_one_process_stops_all(ranks: list[dict[str, Any]]) -> None:
    assert all(rank["faults"][-1].startswith("processes disagree on the plan") for rank in ranks)


def test_the_device_is_a_gpu_if_there_is_one_and_each_process_has_its_own(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.resolve_device(None) == torch.device("cpu")
    current: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch, "empty", lambda *_, device: SimpleNamespace(device=device))
    assert distributed.resolve_device(None) == "cuda"
    assert current == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.resolve_device(None) == "cuda:1"
    assert current == ["cuda:1"]


def test_the_log_says_where_and_in_what_is_computed(monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "H100")
    for place in ("cpu", "cuda:0"):
        distributed.log_device(torch.device(place), torch.bfloat16)
    assert caplog.messages == ["computing on the CPU in bfloat16", "computing on H100 in bfloat16"]


def test_a_process_apart_is_alone(monkeypatch) -> None:
    for name in distributed.LAUNCHED:
        monkeypatch.setenv(name, "3")
    with distributed.without_launcher() as rank:
        assert rank == 3
        assert (distributed.launched_count(), distributed.launched_rank(), distributed.local_rank()) == (1, 0, 0)
    assert (distributed.launched_count(), distributed.launched_rank(), distributed.local_rank()) == (3, 3, 3)


def test_alone() -> None:
    assert distributed.world() is None
    assert distributed.shard(SEVEN, None) == SEVEN
    assert merged(SEVEN)["counts"] == values(statistics(SEVEN))["counts"]
    assert distributed.broadcast_object("x", None) == "x"
    distributed.check_agreement("x", "a thing", None)
    model = tiny()
    sharing.receive(model, None)
    assert not any(p.is_meta for p in model.parameters())


def test_one_process_of_each_node_sends(monkeypatch) -> None:
    nodes = ["a", "a", "b", "b"]
    monkeypatch.setattr(distributed.dist, "new_group", lambda ranks: ranks)
    monkeypatch.setattr(sharing, "gather_objects", lambda value, group: nodes)
    monkeypatch.setattr(platform, "node", lambda: "b")
    assert sharing._senders([False, True, False, True], None) == ([2, 3], 0)
    assert sharing._senders([True, False, True, False], None) == ([2, 3], 1)
    assert sharing._senders([False, True, True, True], None) == (None, 0)  # node b has nobody: all receive from one
