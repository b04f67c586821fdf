"""What the files of a model hold: dtypes, FP8, MXFP4, refused formats, pickles, damage; the same for all readers."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config
from transformers.utils.quantization_config import Mxfp4Config

from plprune import CFSP, FASP, FLAP, load_pruned, prune, save_pruned
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer, stored_weights
from plprune.cli import main
from plprune.evaluation.measurement import saved_bytes
from plprune.pruning.model_state import model_state
from plprune.streaming import open_streamed
from tests.builders import save_tiny, tiny, tokenizer, windows
from tests.zoo import build

WEIGHTS, FP8 = "model.safetensors", torch.float8_e4m3fn
UP = "model.layers.1.mlp.up_proj.weight"  # [48, 32]
READERS: list[Callable[[str], Any]] = [load_model, open_streamed, load_skeleton]


def configure(folder: Path, **changes: Any) -> None:
    found = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def in_fp8(folder: Path, rows: int, columns: int, suffix: str = "_scale_inv") -> dict[str, Tensor]:
    """Puts the projections of a folder into FP8, a scale for each block; gives what that comes to."""
    state, wanted = load_file(folder / WEIGHTS), {}
    for name, value in list(state.items()):
        wanted[name] = value
        if "proj" in name:
            packed, scales, wanted[name] = value.to(FP8), [], torch.zeros_like(value)
            for i in range(0, value.shape[0], rows):
                scales.append([])
                for j in range(0, value.shape[1], columns):
                    part = slice(i, i + rows), slice(j, j + columns)
                    scale = value[part].abs().max() / 448
                    packed[part] = (value[part] / scale).to(FP8)
                    wanted[name][part] = packed[part].float() * scale
                    scales[-1].append(scale)
            state |= {name: packed, name + suffix: torch.tensor(scales)}
    save_file(state, folder / WEIGHTS, {"format": "pt"})
    return wanted


def fp8_folder(folder: Path, rows: int, columns: int, suffix: str = "_scale_inv", **quantization: Any) -> Any:
    save_tiny(folder)
    wanted = in_fp8(folder, rows, columns, suffix)
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [rows, columns]} | quantization)
    return wanted


@pytest.mark.parametrize(
    ("rows", "columns", "more"),
    [
        (20, 20, {}),  # the last blocks are smaller
        (64, 64, {"weight_block_size": None}),  # one scale for each matrix
        (1, 64, {"quant_method": "compressed-tensors", "format": "float-quantized", "weight_block_size": None}),
        (16, 16, {"weight_block_size": None, "config_groups": {"a": {"weights": {"block_structure": [16, 16]}}}}),
    ],
)
def test_fp8_is_multiplied_out_the_same_in_memory_and_streamed(
    rows: int, columns: int, more: Any, tmp_path: Path
) -> None:
    wanted = fp8_folder(tmp_path, rows, columns, "_scale" if more else "_scale_inv", **more)
    model, streamed = load_model(str(tmp_path)), open_streamed(str(tmp_path))
    assert sum(p.numel() for p in load_skeleton(str(tmp_path)).parameters()) == sum(map(torch.numel, wanted.values()))
    assert getattr(model.config, "quantization_config", None) is None
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
    for index, block in enumerate(blocks_of(streamed)):
        with block.present():
            for name, parameter in block.module.named_parameters():
                assert torch.equal(parameter, wanted[f"model.layers.{index}.{name}"]), name
    assert model_state(streamed).fingerprint


def test_fp8_is_what_transformers_makes_of_it_where_blocks_fit(tmp_path: Path) -> None:
    fp8_folder(tmp_path, 16, 16)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16
    )
    ours = load_model(str(tmp_path), "bfloat16").state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.state_dict().items())


FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]  # numbers of two bits of exponent and one of mantissa; the fourth bit is the sign


def in_mxfp4(folder: Path) -> dict[str, Tensor]:
    """A mixture whose experts are random numbers in MXFP4; the weights."""
    wanted = {}

    def pack(state: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(0)
        for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = state.pop(name).shape
            codes = torch.randint(16, (experts, rows, columns), generator=generator)
            scales = torch.randint(118, 124, (experts, rows, columns // 32), generator=generator)
            signs = 1 - 2 * (codes // 8)
            values = torch.tensor(FP4)[codes % 8] * signs * (2.0 ** (scales - 127)).repeat_interleave(32, 2)
            wanted[name] = values.mT
            pairs = codes.view(experts, rows, columns // 32, 16, 2)
            state[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
            state[f"{name}_scales"] = scales.to(torch.uint8)

    tiny("gpt_oss", hidden_size=64, intermediate_size=32).save_pretrained(folder)
    rewrite(folder, pack)
    configure(folder, quantization_config={"quant_method": "mxfp4"})
    return wanted


def test_mxfp4_is_multiplied_out_the_same_in_memory_and_streamed(tmp_path: Path) -> None:
    wanted = in_mxfp4(tmp_path)
    model, streamed = load_model(str(tmp_path)), open_streamed(str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    state, own = model.state_dict(), theirs.state_dict()
    assert len(wanted) == 2 * model.config.num_hidden_layers
    assert all(torch.equal(state[name], value) for name, value in wanted.items())
    assert all(torch.equal(value, own[name]) for name, value in state.items())
    for index, block in enumerate(blocks_of(streamed)):
        with block.present():
            for name, parameter in block.module.named_parameters():
                assert torch.equal(parameter, state[f"model.layers.{index}.{name}"]), name
    prune(model, CFSP(0.2), [windows()])
    save_pruned(model, tmp_path / "out")
    assert torch.equal(load_pruned(tmp_path / "out")(windows()).logits, model(windows()).logits)


def test_mxfp4_without_scales_is_refused(tmp_path: Path) -> None:
    in_mxfp4(tmp_path)
    rewrite(tmp_path, lambda state: state.pop("model.layers.0.mlp.experts.down_proj_scales"))
    with pytest.raises(ValueError, match=r"MXFP4 with scales that do not fit .*layers.0.mlp.experts.down_proj"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_a_model_in_fp8_is_saved_as_plain_numbers(more: tuple[str, ...], tmp_path: Path) -> None:
    fp8_folder(tmp_path / "in", 20, 20)
    tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text("a text that is long enough " * 40)
    ask = ["--method=CFSP", f"--text={tmp_path}/text.txt", "--num_samples=4", "--seq_len=16"]
    main(["prune", f"{tmp_path}/in", *ask, f"--output={tmp_path}/out", *more])
    assert "quantization_config" not in (tmp_path / "out/config.json").read_text()
    assert {p.dtype for p in load_pruned(tmp_path / "out").parameters()} == {torch.float32}


def without_scale(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({UP: state[UP].to(FP8)}))


def with_zero_points(folder: Path) -> None:
    scales = {f"{UP}_scale": torch.ones(1), f"{UP}_zero_point": torch.ones(1)}
    rewrite(folder, lambda state: state.update({UP: state[UP].to(FP8)} | scales))


def with_grid(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({UP: state[UP].to(FP8), f"{UP}_scale_inv": torch.ones(3, 2)}))


def in_int8(folder: Path) -> None:
    rewrite(folder, lambda state: state.update({UP: state[UP].to(torch.int8), "SCB": torch.ones(48)}))


def called(**quantization: Any) -> Callable[[Path], None]:
    return lambda folder: configure(folder, quantization_config=quantization)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_scale, rf"FP8 without one scale for {UP} \(there is none\)"),
        (with_zero_points, "FP8 without one scale for .*zero_point"),
        (with_grid, "FP8 with scales .* that fit neither its rows nor its blocks"),
        (in_int8, f"integers, {UP} for one"),
        (called(quant_method="gptq", bits=4), "stored as gptq, which cannot be pruned: take the repository"),
        (called(quant_method="awq", bits=4), "stored as awq,"),
        (called(quant_method="nvfp4"), "stored as nvfp4,"),
        (called(load_in_4bit=True, quant_method="bitsandbytes"), "stored as bitsandbytes,"),
        (called(quant_method="compressed-tensors", format="pack-quantized"), "compressed-tensors pack-quantized,"),
        (called(quant_method="fp8", transform_config={"config_groups": {}}), "stored as fp8,"),
        (called(bits=4), "stored as an unknown format"),
    ],
)
def test_what_is_no_plain_number_is_refused_by_all(
    read: Callable[[str], Any], change: Callable[[Path], None], said: str, tmp_path: Path
) -> None:
    save_tiny(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=said) as raised:
        read(str(tmp_path))
    assert "\n" not in str(raised.value)


def test_a_pruned_folder_that_was_quantised_since_is_refused(tmp_path: Path) -> None:
    prune(model := tiny(), FLAP(0.2), [windows()])
    save_pruned(model, tmp_path / "out")
    rewrite(tmp_path / "out", lambda state: state.update({UP: state[UP].to(FP8)}))
    for read in (load_pruned, *READERS):
        with pytest.raises(ValueError, match="FP8 without one scale"):
            read(str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
@pytest.mark.parametrize("said", [{}, {"dtype": None}, {"dtype": None, "torch_dtype": "float16"}, {"dtype": "float32"}])
def test_the_dtype_is_that_of_the_weights_whatever_the_configuration_says(
    name: str, said: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny().to(getattr(torch, name)).save_pretrained(tmp_path)  # type: ignore[arg-type]
    configure(tmp_path, **said)
    rewrite(tmp_path, lambda state: state.update({"model.norm.weight": state["model.norm.weight"].float()}))
    for read in READERS:
        with caplog.at_level(logging.INFO, "plprune"):
            assert {p.dtype for p in read(str(tmp_path)).parameters()} == {getattr(torch, name)}
    assert caplog.messages == [f"{tmp_path}: weights in {name}, as stored"] * 2
    assert load_model(str(tmp_path), "float32").dtype == torch.float32


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_without_weights_the_configuration_says_the_dtype(key: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    configure(tmp_path, **{"dtype": None, key: "bfloat16"})
    assert load_skeleton(str(tmp_path)).dtype == torch.bfloat16
    configure(tmp_path, **{key: None})
    assert load_skeleton(str(tmp_path)).dtype == torch.float32


@pytest.mark.parametrize("more", [(), ("--stream",)])
def test_what_is_pruned_has_the_dtype_that_it_had(more: tuple[str, ...], tmp_path: Path) -> None:
    tiny().bfloat16().save_pretrained(tmp_path / "in")
    tokenizer().save_pretrained(tmp_path / "in")
    (tmp_path / "text.txt").write_text("a text that is long enough " * 40)
    ask = ["--method=CFSP", f"--text={tmp_path}/text.txt", "--num_samples=4", "--seq_len=16"]
    main(["prune", f"{tmp_path}/in", *ask, f"--output={tmp_path}/out", *more])
    assert stored_weights(f"{tmp_path}/out").dtype == "bfloat16"
    assert {p.dtype for p in load_pruned(tmp_path / "out").parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("method", [FLAP(0.3), FASP(0.3)])
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_the_size_that_is_told_is_that_of_the_file(family: str, method: Any, tmp_path: Path) -> None:
    model: Any = tiny(family).bfloat16()
    prune(model, method, [windows()])
    save_pruned(model, tmp_path / "out")
    file = (tmp_path / "out" / WEIGHTS).read_bytes()
    assert saved_bytes(model) == len(file) - 8 - int.from_bytes(file[:8], "little")


def pickled(folder: Path, content: Any) -> str:
    (folder / WEIGHTS).unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return str(folder)


def test_a_state_in_a_pickle_is_read_and_nothing_else_of_it(tmp_path: Path) -> None:
    save_tiny(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    model = load_model(pickled(tmp_path, {name: value.bfloat16() for name, value in state.items()}))
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in model.named_parameters())


@pytest.mark.parametrize("content", [{"model": tiny()}, tiny(), [torch.ones(2)], {"a": 1}])
def test_pickled_objects_are_never_unpickled(content: Any, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    for read in (load_model, load_skeleton):
        with pytest.raises(ValueError, match=r"pytorch_model\.bin is not weights by name but pickled.*save") as raised:
            read(pickled(tmp_path, content) if (tmp_path / WEIGHTS).exists() else str(tmp_path))
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("harm", ["empty", "cut", "folder"])
@pytest.mark.parametrize("file", ["pytorch_model.bin", WEIGHTS, "config.json", "tokenizer.json"])
def test_damage_is_one_line(file: str, harm: str, tmp_path: Path) -> None:
    save_tiny(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    if file == "pytorch_model.bin":
        pickled(tmp_path, load_file(tmp_path / WEIGHTS))
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).unlink()
    if harm == "folder":
        (tmp_path / file).mkdir()
    else:
        (tmp_path / file).write_bytes(content[: len(content) // 2 if harm == "cut" else 0])
    with pytest.raises(ValueError, match=r".") as raised:
        (load_tokenizer if file == "tokenizer.json" else load_model)(str(tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"num_hidden_layers": [3]},
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"vocab_size": -1},
        {"rope_parameters": 3},
        {"rope_parameters": {"rope_type": "no"}},
        {"hidden_act": "no"},
        {"model_type": 7},
        {"quantization_config": 3},
        {"quantization_config": {"quant_method": "fp8", "config_groups": [1]}},
        {"dtype": "no"},
        {"layer_types": 1},
    ],
)
@pytest.mark.parametrize("read", READERS)
def test_a_configuration_of_wrong_types_is_one_line(
    read: Callable[[str], Any], change: dict[str, Any], tmp_path: Path
) -> None:
    save_tiny(tmp_path)
    configure(tmp_path, **change)
    with pytest.raises(ValueError, match=r"."):
        read(str(tmp_path))


def test_what_a_family_keeps_in_float32_stays_so_for_all_readers(tmp_path: Path) -> None:
    dense: Any = build("olmo_hybrid")
    dense.to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    expected = {name: p.dtype for name, p in load_model(str(tmp_path / "dense")).named_parameters()}
    assert set(expected.values()) == {torch.bfloat16, torch.float32}
    streamed = open_streamed(str(tmp_path / "dense"))
    for block in blocks_of(streamed):
        with block.present():
            found = {f"{block.path}.{name}": p.dtype for name, p in block.module.named_parameters()}
        assert found.items() <= expected.items()
    model = load_model(str(tmp_path / "dense"), "float32")
    prune(model, CFSP(0.2), [windows(2)])
    save_pruned(model, tmp_path / "out")
    again = load_pruned(tmp_path / "out", "bfloat16")
    assert {name: p.dtype for name, p in again.named_parameters()} == expected
