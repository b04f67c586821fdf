"""Text in, tokens and windows out. Texts are runs of numbers or letters: every window tells where it is from."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from plprune.io import chats, text
from plprune.io.chats import Record, to_chat
from plprune.io.readers import PYDOC, check_text, read_rows
from plprune.io.text import IGNORED, TokenStream, bos_token, draw, hold_out, pack, to_document, tokenised
from tests.builders import decode, jsonl, tokenizer

BOS, END = 1, "</s>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = (  # shows what the assistant thought in the last turn only
    "{% for m in messages %}<{{ m['role'] }}>{% if loop.last and m['role'] == 'assistant' %}<hm></hm>{% endif %}"
    "{{ m['content'] }}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
TALK = [
    {"role": "system", "content": "You count."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Two, of course.\n\nThen three."},
    {"role": "user", "content": "Four?"},
    {"role": "assistant", "content": "Five."},
]


def encode(rows: list[Record], words: PreTrainedTokenizerFast) -> TokenStream:
    return text.encode([to_document(row, words) for row in rows], words)


def with_template(template: str) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer())
    own.chat_template = template
    return own


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "json", "parquet"])
def test_all_kinds_of_files_give_the_same_text(tmp_path: Path, suffix: str) -> None:
    text, path = "Zwölf Boxkämpfer\njagen Viktor. ", tmp_path / f"text.{suffix}"
    if suffix == "txt":
        path.write_text(text, encoding="utf-8")
    elif suffix == "jsonl":
        path.write_text(json.dumps({"text": text}))
    elif suffix == "json":
        path.write_text(json.dumps([{"text": text}], indent=1))
    else:
        pq.write_table(pa.table({"text": [text]}), path)
    assert [row for _, row in read_rows(str(path))] == [{"text": text}]
    assert decode(tokenised(str(path), tokenizer())[0]) == text + END


def test_the_text_of_python_is_there_without_any_file() -> None:
    rows = list(read_rows(PYDOC, limit=3))
    assert len(rows) == 3
    assert all(len(row["text"]) > 100 for _, row in rows)


def test_what_separates_lines_elsewhere_may_stand_inside_a_json_string(tmp_path: Path) -> None:
    text = "a\u2028b\u0085c\x1cd"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert [row["text"] for _, row in read_rows(str(tmp_path / "rows.jsonl"))] == [text]


def test_files_from_windows_are_read(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert [row["text"] for _, row in read_rows(str(tmp_path / "rows.jsonl"))] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", b'{"text": "a"}\n\n{"text": "b\n{"text": "c"}\n', "line 3, is not JSON"),
        ("rows.jsonl", b'{"text": "a"}\n["b"]\n', "line 2, is not a JSON object"),
        ("rows.jsonl", b"\n\n", "is empty"),
        ("text.txt", b" \n", "is empty"),
        ("text.txt", "naïve".encode("latin-1"), r"is not UTF-8 \(byte 2\)"),
        ("text.txt", "text".encode("utf-16"), "is not UTF-8"),
        ("text.parquet", b"PAR1 and no more", "is not a Parquet file"),
        ("text.csv", b"a,b", "is of no known kind: give a .txt"),
    ],
)
def test_a_damaged_file_is_named_with_the_place(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said) as raised:
        list(read_rows(str(tmp_path / name)))
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("source", ["no.txt", "no", "a/b.jsonl", "/no/where", "./no/where", "a/b/c", "~/text.txt"])
def test_a_text_that_cannot_be_there_is_refused_before_anything_is_loaded(source: str) -> None:
    with pytest.raises(ValueError, match=r"does not exist: give a \.txt, \.jsonl, \.json, \.parquet file"):
        check_text(source)


@pytest.mark.parametrize("source", [None, PYDOC, "org/name", "org/name:config", "org/name:config:split", "."])
def test_a_text_that_may_be_there_is_not_refused(source: str | None) -> None:
    check_text(source)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Datasets as a hub would have them, in folders ORG/NAME below the current one; there is no network."""
    folder, plain = tmp_path / "org" / "name", tmp_path / "org" / "plain"
    folder.mkdir(parents=True)
    plain.mkdir()
    pq.write_table(pa.table({"text": [f"p{i}" for i in range(5)]}), plain / "train.parquet")
    for letter in "abc":
        jsonl(folder / f"{letter}.jsonl", [{"text": f"{letter}{i}"} for i in range(5)])
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: default, data_files: [{split: train, path: a.jsonl}]}\n"
        "- {config_name: other, data_files: [{split: train, path: b.jsonl}, {split: test, path: c.jsonl}]}\n---\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    return tmp_path


@pytest.mark.parametrize("limit", [None, 2])
def test_a_dataset_is_named_by_configuration_and_split(hub: Path, limit: int | None) -> None:
    sources = {"org/plain": "p", "org/name": "a", "org/name:other": "b", "org/name:other:test": "c"}
    for source, letter in sources.items():
        expected = [f"{letter}{i}" for i in range(5)][:limit]
        assert [row["text"] for _, row in read_rows(source, limit)] == expected
        assert [row["text"] for _, row in read_rows(f"{hub}/{source}", limit)] == expected


@pytest.mark.parametrize("source", ["org/name:no", "org/name:other:no", "org/other"])
def test_a_dataset_that_is_not_there_is_named(hub: Path, source: str) -> None:
    with pytest.raises(ValueError, match=f"cannot load {source} .*: check its name, configuration and split"):
        list(read_rows(source))


def test_a_damaged_dataset_is_named(hub: Path) -> None:
    (hub / "org" / "name" / "b.jsonl").write_text('{"text": \n')
    for limit in (None, 1):
        with pytest.raises(ValueError, match="cannot load org/name:other"):
            list(read_rows("org/name:other", limit))


# ---- tokenising


def test_every_document_ends_with_the_end_of_text_and_all_of_it_counts(tmp_path: Path) -> None:
    texts = ["one two", " three", "four\n"]
    ids, labels = encode([{"text": text} for text in texts], tokenizer())
    assert decode(ids) == "".join(text + END for text in texts)
    assert labels.equal(ids)


def test_joined_rows_are_one_document_in_their_order(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in ("a", "", "b", "c")])
    for join in ("\n\n", "\\n\\n"):  # a shell passes the second on
        ids, _ = tokenised(source, tokenizer(), join, seed=7)
        assert decode(ids) == "a\n\n\n\nb\n\nc" + END


def test_the_seed_orders_documents_and_the_limit_counts_rows(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [{"text": str(i)} for i in range(20)])

    def documents(**settings: Any) -> list[str]:
        return decode(tokenised(source, tokenizer(), **settings)[0]).split(END)[:-1]

    assert documents() == [str(i) for i in range(20)]
    assert documents(limit=4) == ["0", "1", "2", "3"]
    assert documents(seed=1) == documents(seed=1) != documents(seed=2)
    assert sorted(documents(seed=1, limit=4)) == ["0", "1", "2", "3"]
    assert sorted(documents(seed=1)) == sorted(documents())


@pytest.mark.parametrize(
    ("record", "question", "answer"),
    [
        ({"instruction": "Add.", "input": "1 1", "output": "2"}, "Add.\n\n1 1", "2"),
        ({"instruction": "Add 1 and 1.", "input": "", "output": "2", "text": "all of it"}, "Add 1 and 1.", "2"),
        ({"prompt": "Add.", "completion": "2"}, "Add.", "2"),
        ({"question": "1 + 1?", "answer": "2"}, "1 + 1?", "2"),
    ],
)
def test_instructions_are_conversations(record: Record, question: str, answer: str) -> None:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert to_chat(record) == chats.Chat(messages)
    ids, labels = encode([record], with_template(CHATML))
    start = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    assert decode(ids) == f"{start}{answer}<|im_end|>\n"
    assert decode(labels[labels != IGNORED]) == f"{answer}<|im_end|>"


@pytest.mark.parametrize("record", [{"text": "a"}, {"prompt": "a"}, {"answer": "a"}, {"messages": None, "text": "a"}])
def test_what_has_no_question_and_answer_is_plain_text(record: Record) -> None:
    assert to_chat(record) is None


def counted(ids: Tensor, labels: Tensor) -> list[str]:
    """The stretches of a stream that the loss counts, as text."""
    assert ((labels == ids) | (labels == IGNORED)).all()
    runs = "".join("x" if label != IGNORED else " " for label in labels.tolist())
    stops = [i for i in range(1, len(runs) + 1) if runs[i - 1] == "x" and runs[i : i + 1] != "x"]
    return [decode(ids[len(runs[:stop].rstrip("x")) : stop]) for stop in stops]


def test_the_loss_counts_all_that_the_assistant_says_and_nothing_else() -> None:
    answers = [m["content"] for m in TALK if m["role"] == "assistant"]
    plain, chat = tokenizer(), with_template(CHATML)
    assert counted(*encode([{"messages": TALK}], chat)) == [f"{answer}<|im_end|>" for answer in answers]
    assert counted(*encode([{"messages": TALK}], plain)) == [answers[0], answers[1] + END]
    assert counted(*encode([{"messages": TALK[2:]}], chat)) == [f"{answer}<|im_end|>" for answer in answers]
    assert counted(*encode([{"messages": TALK[2:]}], plain)) == [answers[0], answers[1] + END]  # it speaks first
    assert decode(encode([{"messages": TALK}], plain)[0]) == "\n\n".join(m["content"] for m in TALK) + END


def test_a_prompt_is_tokenised_as_it_would_be_to_generate() -> None:
    chat = with_template(CHATML)
    ids, labels = encode([{"messages": TALK}], chat)
    first = int((labels != IGNORED).nonzero()[0])
    prompt = chat.apply_chat_template(TALK[:2], tokenize=False, add_generation_prompt=True)
    assert decode(ids[:first]) == prompt


def test_a_template_that_rewrites_earlier_turns_never_counts_a_prompt() -> None:
    spoken = counted(*encode([{"messages": TALK}], with_template(REASONING)))
    assert spoken[-1].endswith("Five.<end>")
    assert not any(m["content"] in "".join(spoken) for m in TALK if m["role"] != "assistant")


def test_chats_and_texts_keep_their_order() -> None:
    rows: list[Record] = [{"text": "a"}, {"messages": TALK[:3]}, {"text": "b"}, {"text": "c"}, {"messages": TALK[3:]}]
    ids, labels = encode(rows, tokenizer())
    each = [encode([row], tokenizer()) for row in rows]
    assert ids.equal(torch.cat([i for i, _ in each]))
    assert labels.equal(torch.cat([label for _, label in each]))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"title": "a", "body": "b"}, r"columns \['body', 'title'\] has no text"),
        ({"text": None}, "has no text"),
        ({"messages": [{"role": "user"}]}, "the content of a message is missing"),
        ({"messages": ["hello"]}, "neither role nor content"),
        ({"messages": TALK}, r"the chat template refuses it \(no system here\)"),
    ],
)
def test_a_row_without_text_is_named_with_its_source(tmp_path: Path, row: Record, said: str) -> None:
    source = jsonl(tmp_path / "rows.jsonl", [row])
    with pytest.raises(ValueError, match=said) as raised:
        tokenised(source, with_template(STRICT))
    assert source in str(raised.value)


# ---- what is not used


def test_rows_that_cannot_be_used_are_counted_with_the_first_place(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "one"}, {"text": ""}, {"body": "a"}, {"text": None}, {"text": "two"}, {"text": " \n"}]
    rows += [{"text": "so \ud83d it goes"}, {"body": "b"}]
    source = jsonl(tmp_path / "rows.jsonl", rows)
    for seed in (None, 0):
        caplog.clear()
        with caplog.at_level("INFO"):
            ids, _ = tokenised(source, tokenizer(), seed=seed, max_dropped=0.5)
        assert sorted(decode(ids).split(END)) == ["", "one", "two"]
        said = caplog.messages[0]
        assert f"{source}: 8 rows read, 2 used; {len(ids)} tokens, {len(ids)} counted; 2 empty" in said
        assert "2 dropped, as a row with the columns ['body'] has no text" in said
        assert "1 dropped, as its text has half of a surrogate pair (first at line 7)" in said
    assert "(first at line 3)" in said or "(first at line 8)" in said
    with pytest.raises(ValueError, match=r"4 of its 8 rows cannot be used, and max_dropped is 0.1: 2 empty; 2 dropped"):
        tokenised(source, tokenizer())


@pytest.mark.parametrize("rows", [[{"text": ""}, {"text": " "}], [{"body": ""}], [{"text": ""}, {}]])
def test_a_text_of_which_nothing_is_left_is_refused(tmp_path: Path, rows: list[Record]) -> None:
    source = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=f"rows.jsonl: none of its {len(rows)} rows can be used: "):
        tokenised(source, tokenizer(), max_dropped=1.0)


def test_a_tokenizer_that_does_not_end_documents_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, endless = jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b"}]), copy.deepcopy(tokenizer())
    endless.eos_token = None
    with caplog.at_level("INFO"):
        assert decode(tokenised(source, endless)[0]) == "ab"
        assert "documents run together, as the tokenizer has no end-of-text token" in caplog.text
        caplog.clear()
        tokenised(source, tokenizer())
        tokenised(source, endless, join="\n")
        assert "run together" not in caplog.text


# ---- windows


def test_windows_tile_the_text() -> None:
    ids = torch.arange(3, 53)
    windows, labels = pack((ids, ids), 8, "training").tensors
    assert windows.shape == labels.shape == (6, 8)
    assert windows.flatten().equal(ids[:48])


def test_windows_without_an_answer_are_dropped() -> None:
    ids = torch.arange(24)
    labels = ids.clone()
    labels[1:8] = IGNORED  # the first token of a window is never predicted
    labels[8:15] = IGNORED
    windows, labels = pack((ids, labels), 8, "training").tensors
    assert windows[:, 0].tolist() == [8, 16]
    assert (labels[:, 1:] != IGNORED).any(1).all()
    with pytest.raises(ValueError, match="no window of the training text has an answer"):
        pack((ids, torch.full_like(ids, IGNORED)), 8, "training")


def test_a_text_shorter_than_one_window_is_refused() -> None:
    with pytest.raises(ValueError, match="the test text has 7 tokens, but a window needs 8: give more text"):
        pack((torch.arange(7), torch.arange(7)), 8, "test")


@pytest.mark.parametrize("held_out", [0.1, 0.25, 0.5])
def test_a_split_takes_the_last_part(held_out: float) -> None:
    ids = torch.arange(1000)
    (front, front_labels), (tail, tail_labels) = hold_out((ids, -ids), held_out)
    assert torch.cat([front, tail]).equal(ids)
    assert torch.cat([front_labels, tail_labels]).equal(-ids)
    assert len(tail) == pytest.approx(1000 * held_out, abs=1)


def test_calibration_windows_are_drawn_without_replacement() -> None:
    ids = torch.arange(107)
    drawn = draw(ids, 6, 10, seed=0)
    starts = drawn[:, 0]
    assert drawn.equal(starts[:, None] + torch.arange(10))
    assert len(set(starts.tolist())) == 6
    assert (starts % 10 == 0).all()
    assert drawn.equal(draw(ids, 6, 10, seed=0))
    assert not drawn.equal(draw(ids, 6, 10, seed=1))
    with pytest.raises(ValueError, match="has 10 windows of 10 tokens, but num_samples is 11"):
        draw(ids, 11, 10, seed=0)


@pytest.fixture
def with_bos() -> PreTrainedTokenizerFast:
    """A tokenizer that begins texts with a BOS token, with a template that does so too, like Gemma's."""
    backend = copy.deepcopy(tokenizer().backend_tokenizer)
    backend.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)])
    own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    own.chat_template = "{{ bos_token }}" + CHATML
    return own


def test_the_bos_token_is_the_tokenizers_own_unless_said(with_bos: PreTrainedTokenizerFast) -> None:
    assert [bos_token(tokenizer(), bos) for bos in (None, False, True)] == [None, None, BOS]
    assert [bos_token(with_bos, bos) for bos in (None, False, True)] == [BOS, None, BOS]
    ending = copy.deepcopy(with_bos)  # its own rule is to end texts, by the token that others begin them with
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="$A <s>", special_tokens=[("<s>", BOS)])
    assert bos_token(ending) is None


def test_every_window_begins_with_the_bos_token_and_no_token_is_lost() -> None:
    ids = torch.arange(3, 53)
    windows, labels = pack((ids, ids), 8, "training", BOS).tensors
    assert windows.shape == labels.shape == (7, 8)
    assert (windows[:, 0] == BOS).all()
    assert windows[:, 1:].flatten().equal(ids[:49])
    assert labels[:, 1:].equal(windows[:, 1:])
    drawn = draw(ids, 7, 8, 0, BOS)
    assert drawn[drawn[:, 1].argsort()].equal(windows)


@pytest.mark.parametrize("begin", [[], [BOS]])
def test_documents_that_are_read_by_themselves_start_anew(with_bos: PreTrainedTokenizerFast, begin: list[int]) -> None:
    rows: list[Record] = [{"text": "One, two."}, {"messages": TALK[1:3]}, {"text": "Three."}]
    ids, labels, starts = text.encode([to_document(row, with_bos) for row in rows], with_bos, begin)
    plain, counted = encode(rows, with_bos)
    put = starts & (ids == BOS) & (starts.cumsum(0) != 2)  # a template has put its own
    assert int(starts.sum()) == 3
    assert int(put.sum()) == 2 * len(begin)
    assert ids[~put].equal(plain)
    assert labels[~put].equal(torch.where(starts[~put], IGNORED, counted))
    assert (labels[starts] == IGNORED).all()
    windows, _, positions = pack((ids, labels, starts), 16, "training", *begin).tensors
    inner = (windows == BOS) & (torch.arange(16) > 0)
    assert inner.any()
    assert (positions[inner] == 0).all()
    assert (positions[:, 0] == 0).all()
    assert ((positions.diff() == 1) | (positions[:, 1:] == 0)).all()


@pytest.mark.parametrize(("name", "row"), [("a.txt", "So\nit\n"), ("a.jsonl", '{"text": "So\\nit\\n"}')])
def test_a_byte_order_mark_and_carriage_returns_are_no_text(tmp_path: Path, name: str, row: str) -> None:
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + row.replace("\n", "\r\n").encode() + b"\r\n" * (name != "a.txt"))
    assert list(read_rows(str(tmp_path / name))) == [("line 1", {"text": "So\nit\n"})]


def test_a_bos_token_that_is_there_is_not_put_twice(with_bos: PreTrainedTokenizerFast) -> None:
    ids, _ = encode([{"messages": TALK[1:3]}] * 5, with_bos)
    stream = ids, ids
    assert int((ids == BOS).sum()) == 5
    windows = pack(stream, 16, "training", BOS).tensors[0]
    assert (windows[:, 0] == BOS).all()
    assert not (windows[:, 1] == BOS).any()
    assert windows[0].equal(ids[:16])
    assert windows[1, 1:].equal(ids[16:31])
    each = len(ids) // 5
    assert pack(stream, each, "training", BOS).tensors[0].equal(ids.view(5, each))
