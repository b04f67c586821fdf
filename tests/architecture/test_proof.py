"""Models that compute something from their number of heads are refused, with the module and the difference."""

from collections.abc import Callable
from typing import Any

import pytest
from torch import Tensor
from transformers.models.llama import modeling_llama

from plprune import CFSP, FLAP, prune
from plprune.architecture.blocks import anatomy_of, blocks_of
from plprune.commands.plan import predicted
from plprune.methods import Request
from tests.builders import tiny, windows
from tests.zoo import build

EAGER = modeling_llama.eager_attention_forward


def fixed(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention that is told its number of heads."""
    out, weights = EAGER(module, query, *args, **kwargs)
    return out.view(*query.shape[::2], 8, 4), weights


def scaled(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention that depends on how many heads there are."""
    out, weights = EAGER(module, query, *args, **kwargs)
    return out * query.shape[1], weights


def scaled_when_cached(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Attention that depends on how many heads there are where it reads a cache."""
    attention = EAGER if query.shape[2] == key.shape[2] else scaled
    return attention(module, query, key, *args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "positions", "said"),
    [
        (fixed, 301, r"without unit 2 of 4 the block fails \(RuntimeError: shape '\[1, 4, 8, 4\]' is invalid"),
        (scaled, 302, r"without unit 2 of 4 the inputs of self_attn.o_proj differ by 0.25 of the largest"),
        (scaled_when_cached, 303, r"without units .* inputs of next token at model.layers.0.self_attn.o_proj .* 0.5 "),
    ],
)
def test_heads_that_fail_their_proof_are_refused(
    attention: Callable[..., Any], positions: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", attention)
    model = tiny("llama", max_position_embeddings=positions)  # a config of its own, as what was found is kept
    refusal = rf"cannot prune the kv heads of model.layers.0.self_attn.o_proj, as {said}.*leaves attention alone"
    with pytest.raises(ValueError, match=refusal):
        Request(FLAP(sparsity=0.2)).predict_sizes(model)
    request = Request(CFSP(sparsity=0.2))
    (kind,) = predicted(model, request, request, 16)[0]["anatomy"]
    assert kind["whole"]["attention"].startswith("self_attn.o_proj, as without unit")
    assert prune(model, CFSP(sparsity=0.2), [windows(2)]).reached == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bloom", "self_attention.dense, as the model passes `alibi` for all 4 units"),
        ("mpt", "attn.out_proj, as the model passes `position_bias` for all 4 units"),
        ("doge", "self_attn.o_proj, as self_attn.dt_proj reads rows of self_attn.v_proj too"),
        ("diffllama", "self_attn.o_proj, as its 2 units have unequal numbers of rows of self_attn.k_proj"),
    ],
)
def test_it_is_known_why_heads_stay(kind: str, said: str) -> None:
    (found,) = {id(each): each for each in anatomy_of(build(kind)).anatomies}.values()
    assert found.attention is None
    assert found.whole == {"attention": said}


def test_a_model_that_reads_weights_itself_is_refused_with_the_place() -> None:
    with pytest.raises(ValueError, match=r"fails without its weights at modeling_mamba.py:\d+, .*\(RuntimeError: "):
        blocks_of(build("mamba"))


def test_a_model_whose_blocks_share_more_than_hidden_states_is_refused() -> None:
    two: dict[str, Any] = {
        "num_hidden_layers": 2,
        "mlp_layer_types": ["dense"] * 2,
        "layer_types": ["indexed_attention"] * 2,
    }
    assert len(blocks_of(build("hy_v4", indexer_types=["full"] * 2, **two))) == 2
    with pytest.raises(
        ValueError, match=r"more of each other than hidden states \(`prev_topk_indices` of model.layers.1\)"
    ):
        blocks_of(build("hy_v4", indexer_types=["full", "shared"], **two))


def test_a_norm_whose_values_are_not_for_its_inputs_runs_as_it_is() -> None:
    """ZAYA's norm of queries and keys has one value for each head; what is refused is what its router passes on."""
    with pytest.raises(ValueError, match=r"`prev_router_hidden_states` of model.layers.1"):
        blocks_of(build("zaya"))


def test_cached_states_of_all_kinds_are_proven() -> None:
    for kind in ("xglm", "qwen3_5_text"):
        assert all(each.attention and not each.refused for each in anatomy_of(build(kind)).anatomies)
