"""GGUF files are quantised by llama.cpp's quantiser; mostly by a program that answers in its place."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType, GGUFReader

from plprune import CFSP, load_pruned, prune
from plprune.architecture.blocks import blocks_of
from plprune.cli import main
from plprune.export import quantiser
from plprune.export.formats import Options, export
from plprune.export.parity import Row, parity_table
from tests.builders import tiny, tokenizer, windows

COPY = "#!/bin/sh\necho '2 of 9 tensor(s) required fallback quantization' >&2\ncp $1 $2\n"
HERE = find_spec("llama_cpp") is not None or "PLPRUNE_QUANTIZER" in os.environ
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


def program(folder: Path, text: str = COPY) -> str:
    path = folder / "llama-quantize"
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def exported(folder: Path, options: Options, formats: list[str] | None = None) -> dict[str, Row]:
    model = tiny("llama", **SIZES)
    prune(model, CFSP(0.3), [windows()])
    rows = export("it", lambda: model, tokenizer(), folder / "out", formats or ["gguf"], windows(2, 32), options)
    return {row.format: row for row in rows}


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    return {tensor.name: tuple(tensor.shape.tolist()) for tensor in GGUFReader(file).tensors}


# ---- the program


def test_the_program_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(quantiser, "find_spec", lambda name: True if name == "llama_cpp" else None)
    assert quantiser.command() == [sys.executable, quantiser.__file__]
    path = program(tmp_path)
    assert quantiser.command() == quantiser.command(path) == [path]
    with pytest.raises(ValueError, match=r"absent is no program: name the path of llama-quantize by --quantizer"):
        quantiser.command("absent")


def test_without_a_quantiser_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(quantiser, "find_spec", lambda name: None)
    tiny().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    out = ["--to", "gguf", "--quantize", "q4_k_m", "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "model"), *out])
    assert "put llama-quantize on the PATH" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pip install llama-cpp-python"):
        quantiser.command()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "#!/bin/sh\necho 'f: failed to quantize: no such type' >&2; echo bye >&2; exit 1\n",
            "f: failed to quantize: no",
        ),
        ("#!/bin/sh\nexit 3\n", "it ended with code 3"),
        ("#!/bin/sh\nexit 0\n", "it ended with code 0"),
    ],
)
def test_why_a_file_is_not_quantised(text: str, said: str, tmp_path: Path) -> None:
    rows = exported(tmp_path, Options(quantize=("q6_k",), quantizer=program(tmp_path, text)))
    (reason,) = rows["gguf q6_k"].refused
    assert reason.startswith(f"llama-quantize does not quantise to q6_k: {said}")
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == ["README.md", "it-f32.gguf", "parity.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": ("q4_0",)}, "unknown type 'q4_0' to quantise to: give some of q8_0, q6_k, q5_k_m, q4_k_m"),
        ({"quantize": ("q4_k_m",), "gguf": "q8_0"}, "a file in q8_0 is not quantised again"),
    ],
)
def test_what_cannot_be_quantised_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_only_gguf_is_quantised(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gguf is not among the formats: add it to --to"):
        exported(tmp_path, Options(quantize=("q4_k_m",), quantizer=program(tmp_path)), ["hf"])


# ---- the export


def test_widths_are_padded_for_the_type_and_for_gguf_alone(tmp_path: Path) -> None:
    how = Options(quantize=("q8_0", "q4_k_m"), quantizer=program(tmp_path))
    rows = exported(tmp_path, how, ["gguf", "hf"])
    assert list(rows) == ["gguf f32", "gguf q8_0", "gguf q4_k_m", "hf"]
    widths = {shape[0] for name, shape in shapes(tmp_path / "out/it-f32.gguf").items() if "ffn_down" in name}
    assert {width % 256 for width in widths} == {0}
    assert "padded with zeros to multiples of 256" in rows["gguf f32"].note
    assert "2 of 9 tensors have rows that are no multiple of 256" in parity_table([rows["gguf q4_k_m"]])
    assert "no multiple of 32" in rows["gguf q8_0"].note
    assert all(block.channels % 256 for block in blocks_of(load_pruned(tmp_path / "out/hf")))
    for name in ("gguf f32", "gguf q4_k_m"):
        assert rows[name].bytes == (tmp_path / "out/it-f32.gguf").stat().st_size
        if find_spec("xllamacpp"):
            assert rows[name].perplexity_ratio == pytest.approx(1, abs=1e-4)


def test_widths_that_cannot_be_padded_are_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise ValueError("channels take turns")

    monkeypatch.setattr("plprune.export.formats.surgery.pad", refuse)
    rows = exported(tmp_path, Options(quantize=("q4_k_m",), quantizer=program(tmp_path)), ["hf", "gguf"])
    assert rows["gguf f32"].refused == ["channels take turns: quantise as it is, by --pad_to 1"]
    assert list(rows) == ["hf", "gguf f32"]


@pytest.mark.parametrize(("pad_to", "multiple"), [(1, None), (32, 32)])
def test_padding_can_be_set(pad_to: int, multiple: int | None, tmp_path: Path) -> None:
    rows = exported(tmp_path, Options(quantize=("q4_k_m",), quantizer=program(tmp_path), pad_to=pad_to))
    widths = {shape[0] for name, shape in shapes(tmp_path / "out/it-f32.gguf").items() if "ffn_down" in name}
    assert "padded" not in rows["gguf f32"].note
    assert any(width % 32 for width in widths) == (multiple is None)


# ---- the quantiser itself


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="no quantiser: pip install llama-cpp-python, or PLPRUNE_QUANTIZER=llama-quantize")
def test_llama_cpp_quantises(tmp_path: Path) -> None:
    kinds = ("q8_0", "q6_k", "q5_k_m", "q4_k_m")
    rows = exported(tmp_path, Options(quantize=kinds, quantizer=os.environ.get("PLPRUNE_QUANTIZER")))
    assert not any(row.refused for row in rows.values())
    sizes = [row.bytes or 0 for row in rows.values()]
    assert sizes == sorted(sizes, reverse=True)
    for kind, most in zip(kinds, ("Q8_0", "Q6_K", "Q5_K", "Q4_K"), strict=True):
        types = [
            each.tensor_type for each in GGUFReader(tmp_path / f"out/it-{kind}.gguf").tensors if "ffn_" in each.name
        ]
        matrices = [each for each in types if each != GGMLQuantizationType.F32]
        assert matrices.count(GGMLQuantizationType[most]) > len(matrices) / 2
        if find_spec("xllamacpp"):
            ratio = rows[f"gguf {kind}"].perplexity_ratio
            assert ratio is not None
            assert 0.8 < ratio < 1.25
    if find_spec("xllamacpp"):
        differences = [row.difference or 0.0 for row in rows.values()]
        assert differences[0] < differences[1] < differences[-1]
