"""GGUF files: the same model in llama.cpp, or a refusal that says what to do."""

import copy
import functools
import itertools
import os
import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map
from peft import LoraConfig, inject_adapter_in_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn
from transformers import AddedToken, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from plprune import prune
from plprune.architecture.blocks import Block, blocks_of
from plprune.architecture.modules import innermost
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.export import gguf, llama_cpp, vocabulary
from plprune.export.vocabulary import PRE_TOKENIZERS
from plprune.pruning.surgery import drop_attention, drop_ffn, shrink
from plprune.streaming import open_streamed
from tests.builders import FAMILIES, PAIRS, method, save_tiny, tiny, tokenizer, windows
from tests.shared import SMOLLM2, gemma, needs_smollm2, shared
from tests.wrappers import build as seeing

needs_llama_cpp = pytest.mark.skipif(
    find_spec("xllamacpp") is None, reason="llama.cpp is not here: pip install xllamacpp"
)
EOS = 2
OWN: dict[str, dict[str, Any]] = {"smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 0]}}
SEEING = ("qwen3_5", "mistral3", "idefics3", "internvl", "llava_onevision", "ovis2", "smolvlm", "got_ocr2")
KNOWN = [family for family in FAMILIES if family in gguf.LAYOUTS]


def reference(model: PreTrainedModel, ids: list[int], count: int) -> tuple[list[float], list[int]]:
    """Log-probabilities of a text and its greedy continuation, in transformers."""
    text = list(ids)
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for _ in range(count):
            text.append(int(model(input_ids=torch.tensor([text])).logits[0, -1].argmax()))
    return [float(scores[i, token]) for i, token in enumerate(ids[1:])], text[len(ids) :]


def until_end(ids: list[int]) -> list[int]:
    return ids[: ids.index(EOS)] if EOS in ids else ids


def check(model: PreTrainedModel, path: Path, length: int = 20, count: int = 6, tolerance: float = 0.01) -> None:
    """The file is the model."""
    ids = windows(1, length)[0].tolist()
    run = llama_cpp.run(path, ids, count)
    logprobs, greedy = reference(model, ids, count)
    assert run.token_ids == ids
    assert run.logprobs == pytest.approx(logprobs, abs=tolerance)
    assert until_end(run.greedy) == until_end(greedy)
    assert run.tokens_per_second > 0


def written(model: PreTrainedModel, folder: Path, dtype: gguf.Dtype = "f32") -> Path:
    path = folder / "model.gguf"
    gguf.write(model, tokenizer(), path, dtype)
    return path


def keep_units(block: Block, kind: str, count: int) -> None:
    group = block.groups()[0] if kind == "attention" else block.groups("none")[0]
    shrink(block, group, torch.randperm(len(group))[:count].sort().values)


def widths(model: PreTrainedModel, counts: tuple[int, ...] = (40, 33, 17)) -> None:
    for block in blocks_of(model):
        keep_units(block, "ffn", counts[block.index])


def heads(model: PreTrainedModel, counts: tuple[int, ...] = (3, 1, 2)) -> None:
    for block in blocks_of(model):
        keep_units(block, "attention", counts[block.index])


def without_attention(model: PreTrainedModel, index: int = 1) -> None:
    drop_attention(blocks_of(model)[index])


def biases(model: PreTrainedModel) -> None:
    for block in blocks_of(model):
        for path in (
            (block.attention.consumer.path, block.ffn.consumer.path)
            if block.has_attention
            else (block.ffn.consumer.path,)
        ):
            linear = innermost(block.part(path))
            if linear.bias is None:
                linear.bias = nn.Parameter(0.3 * torch.randn(len(linear.weight)))


def everything(model: PreTrainedModel) -> None:
    for change in (widths, heads, without_attention, biases):
        change(model)


@needs_llama_cpp
@pytest.mark.parametrize("family", KNOWN)
def test_a_dense_model_is_the_same_in_llama_cpp(family: str, tmp_path: Path) -> None:
    model = tiny(family, **OWN.get(family, {}))
    check(model, written(model, tmp_path), *within_window(model))


@needs_llama_cpp
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("phi", True), ("gpt_neox", True), ("gpt2", False)])
def test_the_head_may_or_may_not_be_the_embedding(family: str, tied: bool, tmp_path: Path) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    check(model, written(model, tmp_path))


def within_window(model: PreTrainedModel) -> tuple[int, ...]:
    """Where llama.cpp lacks the family's sliding window, the text is shorter than that."""
    lacks = not gguf.ARCHS[gguf.arch_of(model)].windows and getattr(model.config, "sliding_window", None)
    return (5, 2) if lacks else ()


@needs_llama_cpp
@pytest.mark.slow
@pytest.mark.parametrize(("family", "name"), [pair for pair in PAIRS if pair[0] in FAMILIES])
def test_every_result_is_the_same_in_llama_cpp_or_is_refused(family: str, name: str, tmp_path: Path) -> None:
    model = tiny(family, **OWN.get(family, {}))
    prune(model, method(name, 0.25), list(windows().split(2)))
    reasons = gguf.refusals(model)
    if reasons:
        with pytest.raises(ValueError, match=re.escape(reasons[0])):
            written(model, tmp_path)
    else:
        check(model, written(model, tmp_path), *within_window(model))


@needs_llama_cpp
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "granite"])
def test_a_uniformly_pruned_model_keeps_its_architecture(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    widths(model, (40, 40, 40))
    heads(model, (2, 2, 2))
    assert gguf.arch_of(model) == gguf.LAYOUTS[family].archs[0]
    check(model, written(model, tmp_path))


@needs_llama_cpp
@pytest.mark.parametrize(
    "change", [widths, heads, biases, without_attention, functools.partial(without_attention, index=2)]
)
def test_each_change_is_the_same_in_llama_cpp(change: Callable[[PreTrainedModel], None], tmp_path: Path) -> None:
    model = tiny("llama")
    change(model)
    assert gguf.arch_of(model) == ("llama" if change is biases else "deci")
    check(model, written(model, tmp_path))


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {"head_dim": 6, "attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("phi3", {}),
        ("granite", {"tie_word_embeddings": True}),
    ],
)
def test_all_changes_together_are_the_same_in_llama_cpp(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(family, **settings)
    everything(model)
    assert gguf.arch_of(model) == "deci"
    check(model, written(model, tmp_path))


@needs_llama_cpp
def test_qwen3_with_blocks_of_their_own_size_is_written_as_openelm(tmp_path: Path) -> None:
    model = tiny("qwen3", tie_word_embeddings=True)
    widths(model)
    heads(model)
    assert gguf.arch_of(model) == "openelm"
    check(model, written(model, tmp_path))


@needs_llama_cpp
@pytest.mark.parametrize("name", ["FLAP AL-AM", "FASP kv_heads", "CFSP activation", "TwoSSP"])
def test_what_each_method_makes_is_the_same_in_llama_cpp(name: str, tmp_path: Path) -> None:
    model = tiny("llama", seed=1)  # of which 2SSP leaves the first attention
    prune(model, method(name), [windows(4)])
    check(model, written(model, tmp_path))


WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 1e4,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "yarn": YARN,
    "yarn of its own": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.3},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": [2.0] * 8,
        "short_factor": [1 + i / 10 for i in range(8)],
        "original_max_position_embeddings": 256,
    },
}


@needs_llama_cpp
@pytest.mark.parametrize(
    ("family", "scaling"),
    [("llama", "llama3"), ("qwen2", "linear"), ("qwen3", "yarn"), ("llama", "yarn of its own"), ("phi3", "longrope")],
)
def test_scaled_rotary_embeddings_are_the_same_in_llama_cpp(family: str, scaling: str, tmp_path: Path) -> None:
    longer = {"original_max_position_embeddings": 256, "max_position_embeddings": 512} if family == "phi3" else {}
    model = tiny(family, rope_parameters=SCALINGS[scaling], **WIDE, **longer)
    check(model, written(model, tmp_path), length=50)
    if family != "qwen3":
        widths(model)
        gguf.write(model, tokenizer(), tmp_path / "deci.gguf", "f32")
        check(model, tmp_path / "deci.gguf", length=50)


@needs_llama_cpp
def test_rotary_embeddings_may_differ_where_there_is_a_window(tmp_path: Path) -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e5},
    }
    model = tiny("gemma3_text", rope_parameters=rope, layer_types=["full_attention", *["sliding_attention"] * 2])
    check(model, written(model, tmp_path), length=30)


def test_a_window_that_llama_cpp_lacks_ends_the_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert fields(written(tiny("mistral"), tmp_path))["llama.context_length"] == 8
    assert "no sliding window here" in caplog.text


@needs_llama_cpp
@pytest.mark.parametrize("family", ["gemma2", "granite"])
def test_what_is_folded_into_short_numbers_is_not_rounded(family: str, tmp_path: Path) -> None:
    model = tiny(family).bfloat16()
    if family == "granite":
        widths(model)
    path = written(model, tmp_path)
    check(model.float(), path)


@needs_llama_cpp
@pytest.mark.parametrize(("dtype", "tolerance"), [("f16", 0.01), ("bf16", 0.03), ("q8_0", 0.1)])
def test_shorter_numbers_give_nearly_the_same(dtype: gguf.Dtype, tolerance: float, tmp_path: Path) -> None:
    model = tiny("llama", intermediate_size=64)
    logprobs, _ = reference(model, ids := windows(1, 20)[0].tolist(), 0)
    run = llama_cpp.run(written(model, tmp_path, dtype), ids, 1)
    assert run.logprobs == pytest.approx(logprobs, abs=tolerance)


def fields(path: Path) -> dict[str, Any]:
    reader = gguf.gguf.GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}


def test_rows_that_are_no_multiple_of_32_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reader = gguf.gguf.GGUFReader(written(tiny("llama"), tmp_path, "q8_0"))  # 48 channels: three matrices to read them
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert "3 of 30 tensors" in caplog.text
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.0.ffn_up.weight"]) == ("F16", "Q8_0")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


# Refusals


def refused(model: PreTrainedModel) -> str:
    reasons = gguf.refusals(model)
    assert all(" " in reason and "\n" not in reason for reason in reasons)
    return "; ".join(reasons)


@pytest.mark.parametrize(
    ("family", "change", "reason"),
    [
        ("opt", None, "no architecture for 'opt'"),
        ("llama", functools.partial(without_attention, index=0), "block 0 keeps its attention"),
        ("llama", functools.partial(widths, counts=(3, 0, 5)), "block 1 has no FFN channels"),
        ("llama", lambda model: drop_ffn(blocks_of(model)[2]), "block 2 has no FFN channels"),
        ("qwen3", lambda model: drop_ffn(blocks_of(model)[0]), "block 0 has no FFN channels"),
        ("gemma2", widths, "prune every block to the same width"),
        ("smollm3", heads, "prune as many in every block"),
        ("olmo2", functools.partial(heads, counts=(2, 2, 2)), "prune no heads"),
        ("cohere2", without_attention, "blocks [1] have no attention"),
        ("qwen3", biases, "no bias in attn_output, ffn_down"),
    ],
)
def test_what_llama_cpp_cannot_run_is_refused(
    family: str, change: Callable[[PreTrainedModel], None] | None, reason: str, tmp_path: Path
) -> None:
    model = tiny(family)
    if change is not None:
        change(model)
    assert reason in refused(model)
    with pytest.raises(ValueError, match=r"llama\.cpp cannot run this model"):
        written(model, tmp_path)
    assert not os.listdir(tmp_path)


def test_every_reason_is_given() -> None:
    model = tiny("gemma2")
    everything(model)
    assert len(gguf.refusals(model)) == 4


def test_ragged_value_channels_are_refused() -> None:
    model = tiny("llama")
    prune(model, method("FASP value_channels"), [windows(4)])
    assert "widen them with zeros" in refused(model)


def test_unmerged_adapters_are_refused() -> None:
    model = tiny("llama")
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"]), model)
    assert "merge them before exporting" in refused(model)


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
        ("gemma2", {"tie_word_embeddings": False}, "the output head is not tied to the embedding"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping is not set"),
        ("gemma2", {"layer_types": ["full_attention"] * 3}, "no block has a sliding window"),
        ("smollm3", {}, "every 4th block without rotary embedding"),
        ("gemma3_text", {"rope_parameters": {"full_attention": YARN, "sliding_attention": YARN}}, "linearly"),
        ("phi", {"qk_layernorm": True}, "no place for model.layers.0.self_attn.q_layernorm.weight and 11 others"),
    ],
)
def test_settings_that_llama_cpp_does_not_compute_are_refused(
    family: str, settings: dict[str, Any], reason: str
) -> None:
    assert reason in refused(tiny(family, **settings))


# Models that see


@needs_llama_cpp
@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("llava", 1e-4),
        ("gemma3", 0.01),
        *(pytest.param(kind, 1e-4, marks=pytest.mark.slow) for kind in SEEING),
        pytest.param("gemma4", 0.01, marks=pytest.mark.slow),
    ],
)
def test_the_text_decoder_of_a_model_that_sees_is_written(kind: str, tolerance: float, tmp_path: Path) -> None:
    model = seeing(kind)
    torch.manual_seed(1)
    for value in model.parameters():
        value.data = value.data + 0.1 * torch.randn_like(value) if value.ndim == 1 else 6 * value.data
    check(model, path := written(model, tmp_path), tolerance=tolerance)
    assert not [t.name for t in GGUFReader(path).tensors if t.name.startswith(("v.", "mm."))]
    path.unlink()
    prune(model, method("TwoSSP without stage 2", 0.2), list(windows(4, 12).split(2)))
    assert gguf.refusals(model) == []
    check(model, written(model, tmp_path), tolerance=tolerance)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("aya_vision", "aya_vision makes its logits otherwise than cohere2 does alone"),
        ("qwen3_vl", "no architecture for 'qwen3_vl_text'"),
        ("paligemma", "use_bidirectional_attention is True"),
    ],
)
def test_a_model_that_sees_whose_decoder_llama_cpp_does_not_compute_is_refused(kind: str, reason: str) -> None:
    assert reason in refused(seeing(kind))


# The file


def test_a_file_is_replaced_only_if_asked(tmp_path: Path) -> None:
    path = written(tiny("llama"), tmp_path)
    with pytest.raises(FileExistsError):
        written(tiny("llama"), tmp_path)
    gguf.write(tiny("llama", num_hidden_layers=2), tokenizer(), path, "f32", overwrite=True)
    assert fields(path)["llama.block_count"] == 2


def test_an_interrupt_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tiny("llama"), tmp_path)
    before, count = path.read_bytes(), iter(range(5))

    def encoded(*args: Any) -> Any:
        if next(count) == 3:
            raise KeyboardInterrupt
        return original(*args)

    original = gguf._encoded
    monkeypatch.setattr(gguf, "_encoded", encoded)
    with pytest.raises(KeyboardInterrupt):
        gguf.write(tiny("llama", seed=1), tokenizer(), path, overwrite=True)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_tensors_are_converted_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, order = tiny("llama"), []
    monkeypatch.setattr(gguf, "_projection", lambda *args: order.append("made") or projection(*args))
    monkeypatch.setattr(gguf, "_encoded", lambda *args: order.append("written") or encoded(*args))
    projection, encoded = _originals
    written(model, tmp_path)
    made = order[order.index("written") :]
    assert all((before, after) != ("made", "made") for before, after in itertools.pairwise(made))


_originals = gguf._projection, gguf._encoded


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_on_disk_gives_the_same_file(family: str, tmp_path: Path) -> None:
    name = save_tiny(tmp_path / family, family)
    for file, model in (("memory", load_model(name)), ("disk", open_streamed(name))):
        gguf.write(model, tokenizer(), tmp_path / file)
    assert (tmp_path / "memory").read_bytes() == (tmp_path / "disk").read_bytes()


def test_a_model_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a GGUF file holds its tokenizer: give"):
        gguf.write(tiny("llama"), None, tmp_path / "model.gguf")


# Tokenizers


def test_a_quantisation_that_cannot_be_undone_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    reader = GGUFReader(written(tiny("llama", **sizes), tmp_path))
    writer = GGUFWriter(tmp_path / "odd.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), *field.types[:2])
    odd = GGMLQuantizationType.Q8_K
    for tensor in reader.tensors:
        if tensor.name == "blk.0.ffn_down.weight":
            writer.add_tensor(tensor.name, np.zeros((256, GGML_QUANT_SIZES[odd][1]), np.uint8), raw_dtype=odd)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"its quantisation cannot be undone: .*; take a file in f16 or q8_0"):
        load_model(str(tmp_path / "odd.gguf"))


def test_a_file_that_is_loaded_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for both again and again, which takes most of the time of loading."""
    model, parsed = tiny("llama"), []
    path = written(model, tmp_path)

    def counted(function: Callable[..., Any], *args: Any) -> Any:
        parsed.append(function)
        return function(*args)

    own = [functools.partial(counted, each) for each in (GGUFReader, get_tensor_name_map)]
    monkeypatch.setattr("gguf.GGUFReader", own[0])
    monkeypatch.setattr("gguf.get_tensor_name_map", own[1])
    again = load_model(str(path))
    assert [parsed.count(each) for each in (GGUFReader, get_tensor_name_map)] == [1, 1]
    torch.testing.assert_close(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    assert [sys.modules["gguf"].GGUFReader, sys.modules["gguf"].get_tensor_name_map] == own


def divided(how: pre_tokenizers.PreTokenizer, whole_words: bool = False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE(ignore_merges=whole_words))
    bpe.pre_tokenizer = how  # type: ignore[assignment]
    bpe.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator([topics["if"], TEXTS[-1] * 9], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def by_expression(expression: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


TEXTS = [
    "Hello world",
    "def f(x):\n    return x**2  # square\n\n\n",
    " ",
    "\t\n a  b   c",
    topics["integers"],
    "naïve café — “quotes” 日本語 😀",
    "  two  spaces\n\n\ttabs 12345 and 3.14, it's don't WE'LL HTMLParser's x1y22 /* a */",
]
DIGITS = pre_tokenizers.Sequence(
    [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
)


@pytest.mark.parametrize(
    ("token", "normalizer", "said"),
    [
        ({"rstrip": True}, None, True),
        ({"lstrip": True, "special": True}, None, True),
        ({"single_word": True}, None, True),
        ({"normalized": True}, normalizers.Lowercase(), True),
        ({"normalized": True}, None, False),
        ({"special": True}, normalizers.Lowercase(), False),
    ],
)
def test_tokens_that_llama_cpp_finds_elsewhere_are_named(
    caplog: pytest.LogCaptureFixture, token: dict[str, bool], normalizer: Any, said: bool
) -> None:
    words = copy.deepcopy(tokenizer())
    words.backend_tokenizer.normalizer = normalizer
    words.add_tokens([AddedToken("<|user|>", **{"normalized": False} | token)])
    vocabulary.fields(words, 310)
    assert ("llama.cpp may split text differently around the tokens <|user|>:" in caplog.text) == said


@needs_llama_cpp
@pytest.mark.parametrize(("division", "name"), PRE_TOKENIZERS.items(), ids=PRE_TOKENIZERS.values())
def test_text_is_divided_as_by_the_tokenizer(division: tuple[Any, bool], name: str, tmp_path: Path) -> None:
    steps, whole_words = division
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    how = {"gpt-2": plain, "smollm": DIGITS}.get(name) or by_expression(steps[0])
    words, path = divided(how, whole_words), tmp_path / "model.gguf"
    gguf.write(tiny("llama", vocab_size=610), words, path)
    assert fields(path)["tokenizer.ggml.pre"] == name
    assert llama_cpp.tokenise(path, TEXTS) == [words(text).input_ids for text in TEXTS]


@needs_llama_cpp
def test_sentence_piece_divides_text_as_by_the_tokenizer(tmp_path: Path) -> None:
    folder, path = str(shared("data/models/stories260k")), tmp_path / "model.gguf"
    model, words = load_model(folder), load_tokenizer(folder)
    gguf.write(model, words, path, "f32")
    for special in (False, True):
        ours = [words(text, add_special_tokens=special).input_ids for text in TEXTS]
        assert llama_cpp.tokenise(path, TEXTS, special) == ours
    run = llama_cpp.run(path, "Once upon a time there was", 12)
    assert run.text.strip() == words.decode(reference(model, run.token_ids, 12)[1])


def test_rows_without_a_token_get_a_name(tmp_path: Path) -> None:
    found = fields(written(tiny("llama", vocab_size=310), tmp_path))
    assert (len(found["tokenizer.ggml.tokens"]), found["tokenizer.ggml.tokens"][309]) == (310, "[PAD309]")
    assert found["tokenizer.ggml.token_type"][300:] == [5] * 10
    assert (found["tokenizer.ggml.eos_token_id"], found["tokenizer.ggml.add_bos_token"]) == (EOS, False)


def test_added_tokens_are_printed_with_spaces(tmp_path: Path) -> None:
    words = load_tokenizer(str(shared("data/models/stories260k")))
    words.add_tokens([AddedToken("▁▁▁", normalized=False)])
    found = vocabulary.fields(words, 520)
    assert found["tokenizer.ggml.tokens"][512:514] == ["   ", "[PAD513]"]
    assert found["tokenizer.ggml.token_type"][512:514] == [4, 5]


def test_a_chat_template_is_written(tmp_path: Path) -> None:
    words = divided(pre_tokenizers.ByteLevel(add_prefix_space=False))
    words.chat_template = "{{ messages[0]['content'] }}"
    gguf.write(tiny("llama", vocab_size=610), words, tmp_path / "model.gguf")
    assert fields(tmp_path / "model.gguf")["tokenizer.chat_template"] == words.chat_template


def test_tokenizers_that_llama_cpp_lacks_are_refused() -> None:
    with pytest.raises(ValueError, match="no name for how this tokenizer divides text"):
        vocabulary.fields(divided(by_expression(r"\w+")), 610)
    with pytest.raises(ValueError, match="type Unigram"):
        vocabulary.fields(PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.Unigram([("a", 0.0)]))), 10)
    with pytest.raises(ValueError, match="300 tokens and the model 200"):
        vocabulary.fields(tokenizer(), 200)


# llama.cpp


def test_without_llama_cpp_nothing_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"not checked: llama\.cpp is not here"):
        llama_cpp.run(tmp_path / "model.gguf", [1, 2])


@needs_llama_cpp
def test_a_damaged_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    path = written(tiny("llama"), tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"llama.cpp does not run .*model.gguf: gguf_init") as error:
        llama_cpp.run(path, [1, 2])
    assert "\n" not in str(error.value)


@needs_llama_cpp
def test_tokens_that_end_within_a_character_have_a_probability(tmp_path: Path) -> None:
    model, path = tiny("llama"), tmp_path / "model.gguf"
    gguf.write(model, tokenizer(), path, "f32")
    ids = tokenizer()("é日").input_ids
    assert len(ids) > 3
    assert llama_cpp.run(path, ids, 0).logprobs == pytest.approx(reference(model, ids, 0)[0], abs=0.01)


# Real models


def check_real(model: PreTrainedModel, words: PreTrainedTokenizerBase, text: list[int], path: Path) -> None:
    gguf.write(model, words, path, "f32")
    run = llama_cpp.run(path, text, 32)
    logprobs, greedy = reference(model, text, 32)
    assert run.logprobs == pytest.approx(logprobs, abs=0.01)
    assert run.greedy == greedy
    assert llama_cpp.tokenise(path, TEXTS) == [words(text, add_special_tokens=False).input_ids for text in TEXTS]


@needs_llama_cpp
@needs_smollm2
@pytest.mark.slow
def test_a_pruned_smollm2_is_the_same_in_llama_cpp(tmp_path: Path) -> None:
    model, words = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    ids = words(" ".join(topics.values())).input_ids
    prune(model, method("TwoSSP", 0.25), [torch.tensor(ids[: 8 * 128]).view(8, 128)])
    check_real(model, words, ids[5000:5200], tmp_path / "model.gguf")


@needs_llama_cpp
@pytest.mark.slow
def test_a_pruned_gemma_is_the_same_in_llama_cpp(tmp_path: Path) -> None:
    name = gemma(tmp_path)
    model, words = load_model(name), load_tokenizer(name)
    ids = words(" ".join(topics.values())).input_ids
    prune(model, method("TwoSSP without stage 2", 0.1), [torch.tensor(ids[: 4 * 128]).view(4, 128)])
    check_real(model, words, [ids[0], *ids[5000:5100]], tmp_path / "model.gguf")  # lost without its first token
