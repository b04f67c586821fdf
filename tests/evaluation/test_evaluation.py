"""Perplexity, bits per byte and counts against plain loops, and the command that prints them."""

import copy
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.checkpoint.save import save_pruned
from plprune.cli import main
from plprune.commands.evaluate import _origin
from plprune.evaluation.measurement import (
    Measurement,
    as_dict,
    measure,
    measurement_table,
    parameters,
    tokens_per_second,
)
from plprune.evaluation.perplexity import Protocol, byte_counts, judge, passage, perplexity
from plprune.io.text import pack, tokenised
from plprune.methods import prune
from plprune.pruning.losses import next_token_loss
from plprune.pruning.plan import PruningPlan
from tests.builders import FAMILIES, jsonl, method, save_tiny, tiny, tokenizer, windows
from tests.shared import SMOLLM2, WIKITEXT, needs_smollm2, shared


@torch.no_grad()
def slow_perplexity(model: PreTrainedModel, ids: list[Tensor]) -> float:
    """Token by token."""
    losses = []
    for window in [row for batch in ids for row in batch]:
        scores = model(input_ids=window[None]).logits[0].double().log_softmax(-1)
        losses += [-float(scores[t - 1, window[t]]) for t in range(1, len(window))]
    return math.exp(sum(losses) / len(losses))


def test_the_loss_is_that_of_transformers_and_leaves_out_what_is_masked() -> None:
    model, ids = tiny(), windows(3)
    labels = ids.clone()
    labels[0, 5:9] = labels[2, -1] = -100
    with torch.no_grad():
        output = model(input_ids=ids, labels=labels)
    torch.testing.assert_close(next_token_loss(output.logits, labels), output.loss)
    counted = int((labels[:, 1:] != -100).sum())
    torch.testing.assert_close(next_token_loss(output.logits, labels, "sum"), output.loss * counted)


def test_the_loss_of_half_precision_logits_is_taken_in_full() -> None:
    logits, ids = torch.randn(2, 5, 7).bfloat16(), torch.randint(7, (2, 5))
    loss = next_token_loss(logits, ids)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(logits.float(), ids), rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_perplexity_is_that_of_a_loop_over_tokens(family: str) -> None:
    model, ids = tiny(family), [windows(2), windows(1, 7), windows(3, 4)]
    assert perplexity(model, ids) == pytest.approx(slow_perplexity(model, ids), rel=1e-6)


def test_perplexity_does_not_depend_on_the_batches() -> None:
    model, ids = tiny(), windows(6)
    assert perplexity(model, ids.split(1)) == pytest.approx(perplexity(model, [ids]), rel=1e-6)


def test_perplexity_is_measured_without_dropout_and_leaves_the_mode() -> None:
    model = tiny("opt", dropout=0.5)
    expected = perplexity(model, [windows(2)])
    model.train()
    assert perplexity(model, [windows(2)]) == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("ids", [[], [windows(3, 1)]])
def test_nothing_to_predict_is_refused(ids: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="at least two tokens"):
        perplexity(tiny(), ids)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    model = tiny()
    model.lm_head.weight.data *= 1e6  # type: ignore[union-attr,operator]
    assert perplexity(model, [windows(1)]) == math.inf


# ---- passages

TEXTS = ["So it goes: naïve café, 東京 and 🙂 again.", "if x: print('ok')\n", "£ and € are not ¥"]
PROTOCOLS = [
    Protocol(8),
    Protocol(8, bos=True),
    Protocol(8, stride=8),
    Protocol(8, stride=3),
    Protocol(8, stride=3, bos=True),
    Protocol(8, stride=7, bos=True),
    Protocol(8, stride=1, max_windows=5),
    Protocol(8, bos=True, max_windows=3),
    Protocol(500, stride=10),
]


@pytest.fixture
def text(tmp_path: Path) -> str:
    return jsonl(tmp_path / "text.jsonl", [{"text": text} for text in TEXTS])


def counted(length: int, how: Protocol) -> Iterator[tuple[int, int]]:
    """The tokens of a text that count, and where the first window that holds each begins."""
    room = how.seq_len - bool(how.bos)
    step = how.stride or room
    for token in range(length):
        k = max(0, -(-(token + 1 - room) // step))  # the first with k * step + room > token
        full = how.stride is not None or (k + 1) * room <= length
        if full and k < (how.max_windows or length) and (how.bos or token > k * step):
            yield token, k * step


@torch.no_grad()
def slow_cost(model: PreTrainedModel, ids: Tensor, how: Protocol) -> dict[int, float]:
    """Nats of each token that counts, each from a run of its own."""
    costs = {}
    for token, start in counted(len(ids), how):
        before = torch.cat([torch.tensor([1] * bool(how.bos), dtype=torch.long), ids[start:token]])
        costs[token] = -float(model(input_ids=before[None]).logits[0, -1].double().log_softmax(-1)[ids[token]])
    return costs


def spelled(ids: Tensor) -> list[bytes]:
    """What the tokens of a byte-level vocabulary stand for."""
    letters = {letter: byte for byte, letter in bytes_to_unicode().items()}
    pieces = tokenizer().convert_ids_to_tokens(ids.tolist())
    return [b"" if piece == "</s>" else bytes(letters[letter] for letter in piece) for piece in pieces]


@pytest.mark.parametrize("how", PROTOCOLS, ids=str)
def test_a_passage_is_judged_as_a_loop_over_its_tokens_does(text: str, how: Protocol) -> None:
    model, (ids, _) = tiny(), tokenised(text, tokenizer())
    costs, pieces = slow_cost(model, ids, how), spelled(ids)
    cut = passage(text, tokenizer(), how)
    quality = judge(model, cut)
    assert quality.tokens == cut.tokens == len(costs)
    assert quality.perplexity == pytest.approx(math.exp(sum(costs.values()) / len(costs)), rel=1e-6)
    size = sum(len(pieces[token]) for token in costs)
    bits = sum(cost for token, cost in costs.items() if pieces[token]) / math.log(2)
    assert cut.bytes == cut.as_dict()["bytes_of_text"] == size
    assert quality.bits_per_byte == pytest.approx(bits / size, rel=1e-6)
    assert all(window.shape[1] <= how.seq_len for window in cut.windows)
    assert cut.as_dict()["windows"] == len(cut.windows) <= (how.max_windows or 1000)


def test_with_bos_and_a_stride_every_byte_of_the_text_counts(text: str) -> None:
    cut = passage(text, tokenizer(), Protocol(8, stride=2, bos=True))
    assert cut.bytes == len("".join(TEXTS).encode())
    assert cut.tokens == len(tokenised(text, tokenizer())[0])


def test_windows_that_do_not_overlap_are_those_of_training(text: str) -> None:
    packed = pack(tokenised(text, tokenizer(), "\n\n"), 8, "test").tensors[0]
    assert torch.equal(torch.cat(passage(text, tokenizer(), Protocol(8), "\n\n").windows), packed)
    assert torch.equal(torch.cat(passage(text, tokenizer(), Protocol(8, max_windows=2), "\n\n").windows), packed[:2])
    assert judge(tiny(), passage(text, tokenizer(), Protocol(8), "\n\n")).perplexity == pytest.approx(
        perplexity(tiny(), [packed]), rel=1e-6
    )


@pytest.mark.parametrize("stride", [None, 5])
def test_a_bos_token_that_the_text_has_is_not_put_twice(tmp_path: Path, stride: int | None) -> None:
    own, rows = copy.deepcopy(tokenizer()), [{"prompt": f"Is it {i}?", "completion": "So it goes."} for i in range(5)]
    own.chat_template = "{% for m in messages %}{{ bos_token if loop.first }}{{ m['content'] }}{% endfor %}"
    source, how = jsonl(tmp_path / "chats.jsonl", rows), Protocol(12, stride, True)
    cut, (ids, _) = passage(source, own, how), tokenised(source, own)
    assert cut.windows[0][0].equal(ids[:12])
    assert all(window[0, 0] == 1 and window[0, 1] != 1 for window in cut.windows)
    if stride is None:
        assert torch.cat(cut.windows).equal(pack((ids, ids), 12, "test", 1).tensors[0])
    else:
        assert cut.tokens == len(ids) - 1  # all but the first are in a window that began before them


def test_chats_are_read_as_in_training(tmp_path: Path) -> None:
    chat = {"instruction": "Say it so that it is heard.", "output": "It goes as it goes, and so on and on."}
    source = jsonl(tmp_path / "chat.jsonl", [chat, {"text": TEXTS[0]}])
    ids, _ = tokenised(source, tokenizer())
    cut = passage(source, tokenizer(), Protocol(8))
    assert torch.equal(torch.cat(cut.windows).flatten(), ids[: len(ids) // 8 * 8])


def test_bits_are_left_out_where_the_tokenizer_does_not_tell(text: str) -> None:
    class Slow(PreTrainedTokenizerFast):
        is_fast = property(lambda self: False)

    slow = Slow(tokenizer_object=tokenizer().backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    cut, known = (passage(text, each, Protocol(8)) for each in (slow, tokenizer()))
    assert cut.bytes is None
    assert "bytes" not in str(cut)
    assert judge(tiny(), cut) == dataclasses.replace(judge(tiny(), known), bits_per_byte=None)


def byte_fallback() -> PreTrainedTokenizerFast:
    """Letters, and bytes for all else, behind a space that is put before every text, as Llama's has it."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "é"]
    bpe = Tokenizer(
        models.BPE({p: i for i, p in enumerate(pieces)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])  # type: ignore[assignment]
    bpe.decoder = decoders.ByteFallback()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>")


@pytest.mark.parametrize("given", [*TEXTS, "a é 東 a", "東京", "", " "])
def test_bytes_that_stand_in_for_characters_count_one_each(given: str) -> None:
    encoded: Any = byte_fallback()(given, return_offsets_mapping=True)
    pieces: Any = byte_fallback().convert_ids_to_tokens(encoded.input_ids)
    sizes = byte_counts(given, encoded.offset_mapping, pieces)
    expected = [1 if p.startswith("<0x") else len(p.replace("▁", " ").encode()) for p in pieces]
    if expected:
        expected[0] -= 1  # the space that the text does not have
    assert sizes == expected
    assert sum(sizes) == len(given.encode())


@torch.no_grad()
def test_a_token_without_bytes_is_paid_for_unless_it_ends_a_document(tmp_path: Path) -> None:
    source, fallback = jsonl(tmp_path / "text.jsonl", [{"text": "a b"}, {"text": "é b"}]), byte_fallback()
    fallback.eos_token = "<unk>"
    ids, _ = tokenised(source, fallback)
    pieces: Any = fallback.convert_ids_to_tokens(ids.tolist())
    assert pieces == ["▁a", "▁", "b", "<unk>", "▁", "é", "▁", "b", "<unk>"]  # the second space is in no text
    quality = judge(tiny(), passage(source, fallback, Protocol(len(ids))))
    costs = -tiny()(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)[range(8), ids[1:]] / math.log(2)
    assert quality.bits_per_byte == pytest.approx(costs[[0, 1, 3, 4, 5, 6]].sum().item() / 6, rel=1e-5)


@pytest.mark.parametrize("given", TEXTS)
def test_bytes_that_a_tokenizer_drops_are_those_of_the_token_behind(given: str) -> None:
    offsets = [match.span() for match in re.finditer(r"\S+", given)]
    sizes = byte_counts(given, offsets, ["?"] * len(offsets))
    assert sizes[0] == len(given.split()[0].encode())
    assert sum(sizes) == len(given.rstrip().encode())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"seq_len": 1}, "one to predict"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"stride": 0}, "stride is 0"),
        ({"seq_len": 8, "stride": 9}, "tokens would be missed"),
        ({"seq_len": 8, "stride": 8, "bos": True}, "a window has 7 tokens of text"),
    ],
)
def test_protocols_that_cannot_be(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Protocol(**settings)


def test_texts_and_tokenizers_that_do_not_suit_a_protocol(text: str) -> None:
    with pytest.raises(ValueError, match=r"tokens, but a window needs 500: give more text"):
        passage(text, tokenizer(), Protocol(500))
    with pytest.raises(ValueError, match="no BOS token"):
        passage(text, byte_fallback(), Protocol(8, bos=True))


def test_the_bos_rule_is_the_tokenizers_own_unless_said(text: str) -> None:
    assert passage(text, tokenizer(), Protocol(8, bos=None)).protocol.bos is False
    assert passage(text, byte_fallback(), Protocol(8, bos=None)).protocol.bos is False
    backend = Tokenizer.from_str(tokenizer().backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # type: ignore[assignment]
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")
    cut = passage(text, own, Protocol(8, bos=None))
    assert cut.protocol.bos is True
    assert all(window[0, 0] == 1 for window in cut.windows)
    assert passage(text, own, Protocol(8)).protocol.bos is True
    assert passage(text, own, Protocol(8, bos=False)).protocol.bos is False


def test_a_passage_says_what_it_is(text: str) -> None:
    assert str(passage(text, tokenizer(), Protocol(8, stride=4, bos=True, max_windows=2))) == (
        f"{text}: 2 windows of 8 tokens, a stride of 4, BOS; 11 tokens counted, 11 bytes"
    )


def test_a_measurement_on_a_passage_has_its_bits(text: str) -> None:
    cut = passage(text, tokenizer(), Protocol(8))
    row, quality = measure(tiny(), cut, speed=False), judge(tiny(), cut)
    assert (row.perplexity, row.bits_per_byte) == (quality.perplexity, quality.bits_per_byte)
    assert "bits/byte" in measurement_table({"dense": row}).splitlines()[0]
    assert measurement_table({"dense": row}).splitlines()[1].split()[2] == f"{quality.bits_per_byte:.4f}"


# ---- the command


@pytest.fixture
def pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a pruned model, beside the dense one."""
    monkeypatch.chdir(tmp_path)
    model = load_model(save_tiny(Path("dense")))
    prune(model, method("FASP value_channels"), [windows()])
    save_pruned(model, "pruned", tokenizer())
    return "pruned"


SMALL = ["--seq_len=8", "--max_windows=4"]


def test_the_command_prints_what_it_writes(pruned: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["evaluate", pruned, f"--text={text}", *SMALL, "--stride=4", "--bos=true", "--output=out.json"])
    out, record = capsys.readouterr().out, json.loads(Path("out.json").read_text())
    assert out.startswith("FASP removed ")
    assert f"{text}: 4 windows of 8 tokens, a stride of 4, BOS; 19 tokens counted" in out
    assert "dense: dense\n" in out
    for stage in ("dense", "pruned"):
        found = record["stages"][stage]
        cut = passage(text, tokenizer(), Protocol(8, 4, True, 4))
        assert found["perplexity"] == judge(load_model(stage), cut).perplexity
        row = next(line.split() for line in out.splitlines() if line.startswith(f"{stage} "))
        assert row[1:3] == [f"{found['perplexity']:.2f}", f"{found['bits_per_byte']:.4f}"]
        assert record["protocol"][stage] == cut.as_dict()
    assert record["reached"]["parameters"] == record["stages"]["pruned"]["parameters"]
    assert record["kind"] == "run"
    assert "tasks" not in record


def test_the_dense_model_is_judged_where_it_is_to_be_had(
    pruned: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for dense in ("none", "dense", "auto"):
        main(["evaluate", pruned, f"--text={text}", *SMALL, f"--dense={dense}"])
        rows.append("dense: dense" in capsys.readouterr().out)
    Path("dense").rename("elsewhere")
    save_tiny(Path("dense"), intermediate_size=32)  # another model in its place
    main(["evaluate", pruned, f"--text={text}", *SMALL])
    assert [*rows, "dense: dense" in capsys.readouterr().out] == [False, True, True, False]


@pytest.mark.parametrize("name", ["ORG/NAME", "package://antigravity/x.gguf", "../pruned", "", "pruned/config.json"])
def test_nothing_is_fetched_or_run_to_find_the_dense_model(
    pruned: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    plan = PruningPlan.load(pruned)
    assert _origin(dataclasses.replace(plan, origin=plan.origin | {"model": name})) == "none"
    assert "antigravity" not in sys.modules


def test_other_tokenizers_are_pointed_out(pruned: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_tiny(Path("other"))
    other = byte_fallback()
    other.eos_token = "<unk>"
    other.save_pretrained("other")
    main(["evaluate", pruned, f"--text={text}", *SMALL, "--dense=other"])
    assert "the tokenizers differ: compare the bits per byte, not the perplexities" in capsys.readouterr().out


def test_output_is_not_overwritten_unasked(pruned: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.json").write_text("mine")
    args = ["evaluate", pruned, f"--text={text}", *SMALL, "--output=out.json"]
    with pytest.raises(SystemExit):
        main(args)
    assert "pass --overwrite" in capsys.readouterr().err
    assert Path("out.json").read_text() == "mine"
    main([*args, "--overwrite"])
    assert json.loads(Path("out.json").read_text())["version"] == 1


@pytest.mark.slow
@needs_smollm2
def test_smollm2_has_its_known_perplexity() -> None:
    text = str(shared(f"{WIKITEXT}/test.parquet"))
    cut = passage(text, load_tokenizer(SMOLLM2), Protocol(1024, max_windows=6), "\\n\\n")
    quality = judge(load_model(SMOLLM2), cut)
    assert quality.perplexity == pytest.approx(26.982, rel=1e-4)  # as the authors' code of FLAP has it
    assert quality.tokens == 6 * 1023


# ---- counts and tables


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tied_parameters_count_once(family: str, tied: bool) -> None:
    model = tiny(family, tie_word_embeddings=tied)
    own = {p.data_ptr(): p.numel() for p in model.parameters()}
    in_blocks, in_all = parameters(model)
    assert in_all == sum(own.values())
    assert in_blocks == sum(p.numel() for block in blocks_of(model) for p in block.module.parameters())
    assert parameters(tiny(family, tie_word_embeddings=False))[1] - in_all == (300 * 32 if tied else 0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_measurement_is_of_the_model_as_it_stands(dtype: torch.dtype, size: int) -> None:
    model: Any = tiny().to(dtype)  # type: ignore[arg-type]
    row = measure(model, [windows(2), windows(1)])
    assert row.perplexity == perplexity(model, [windows(2), windows(1)])
    assert (row.block_parameters, row.parameters) == parameters(model)
    assert row.bytes == size * row.parameters
    assert row.tokens_per_second is not None
    assert row.tokens_per_second > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_speed_is_measured_on_every_family(family: str) -> None:
    assert tokens_per_second(tiny(family), windows(1), repeats=1) > 0


ROWS = {
    "dense": Measurement(26.984, 106_202_880, 134_515_008, 538_060_032, 1234.56),
    "recovered": Measurement(math.inf, 7, 12_345, 49_380, 2.0),
}


def test_the_table_has_a_row_for_each_model_under_its_heading() -> None:
    assert measurement_table(ROWS).splitlines() == [
        "model       perplexity   in blocks  parameters   on disk   tokens/s",
        "dense            26.98 106,202,880 134,515,008  538.1 MB     1234.6",
        "recovered          inf           7      12,345  49.38 KB        2.0",
    ]


def test_a_speed_that_was_not_measured_is_a_dash() -> None:
    row = measure(tiny(), [windows(1)], speed=False)
    assert row.tokens_per_second is None
    assert measurement_table({"pruned": row}).splitlines()[1].split()[-1] == "-"
    assert "tokens_per_second" not in as_dict({"pruned": row})["pruned"]


def test_measurements_are_json() -> None:
    values = json.loads(json.dumps(as_dict({"dense": ROWS["dense"]})))
    assert values["dense"]["perplexity"] == 26.984
    assert set(values["dense"]) == {"perplexity", "block_parameters", "parameters", "bytes", "tokens_per_second"}


def test_large_numbers_stay_apart() -> None:
    lines = measurement_table(
        {"dense": Measurement(12345678901.25, 6_476_271_616, 16_738_415_616, 133_476_831_232, 12.5)}
    )
    large = "dense 12345678901.25 6,476,271,616 16,738,415,616 133.5 GB 12.5"
    assert lines.splitlines()[1].split() == large.split()
    assert len({len(line) for line in lines.splitlines()}) == 1
