"""Rows of chats as people have them: none is learnt from less than it should be without a word."""

import copy
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from plprune.io.chats import Chat, Record, UnusableRow, to_chat
from plprune.io.text import IGNORED, encode, to_document, tokenised
from tests.builders import decode, jsonl, tokenizer

CHATML = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}<end>{% endif %}"
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "<call>{{ call.function | tojson }}{% endfor %}{% endif %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
FUNCTION = {"name": "weather", "description": "Of a town.", "parameters": {"type": "object", "properties": {}}}
CALLED = {"name": "weather", "arguments": {"town": "Ulm"}}
CALL = {"type": "function", "function": CALLED | {"arguments": json.dumps(CALLED["arguments"])}}


def words(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    own = copy.deepcopy(tokenizer())
    own.chat_template = template
    return own


def talk(*roles: str, role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: name, content: f"said {i}"} for i, name in enumerate(roles)]


def learnt(row: Record, template: str | None = CHATML) -> str:
    """What the loss counts of a row."""
    own = words(template)
    ids, labels = encode([to_document(row, own)], own)
    assert ((labels == ids) | (labels == IGNORED)).all()
    return decode(ids[labels != IGNORED])


def refused(row: Record, template: str | None = CHATML) -> str:
    with pytest.raises(UnusableRow) as raised:
        to_document(row, words(template))
    return str(raised.value)


# ---- names


@pytest.mark.parametrize("asks", ["user", "human", "Human", "prompter"])
@pytest.mark.parametrize("answers", ["assistant", "gpt", "model", "bot", "chatbot", "GPT "])
@pytest.mark.parametrize("column", ["messages", "conversations", "conversation"])
def test_whoever_answers_is_learnt_from(asks: str, answers: str, column: str) -> None:
    usual = talk("system", "user", "assistant", "user", "assistant")
    for keys in ({}, {"role": "from", "content": "value"}):
        row = {column: talk("system", asks, answers, asks, answers, **keys)}
        assert to_chat(row) == Chat(usual)
    assert learnt({column: talk(asks, answers, asks, answers)}) == "said 1<end>said 3<end>"


@pytest.mark.parametrize("role", ["tool", "function", "observation", "ipython", "function_response"])
def test_whatever_a_tool_answers_is_not_learnt(role: str) -> None:
    row = {"messages": talk("user", "assistant", role, "assistant")}
    assert to_chat(row) == Chat(talk("user", "assistant", "tool", "assistant"))
    assert learnt(row) == "said 1<end>said 3<end>"


def test_roles_that_nobody_knows_are_the_templates_to_know() -> None:
    assert learnt({"messages": talk("developer", "user", "assistant")}) == "said 2<end>"
    said = refused({"messages": talk("narrator", "hero")})
    assert said == "the assistant says nothing to learn from (roles: narrator, hero)"


def test_a_system_column_comes_first() -> None:
    row = {"system": "Be kind.", "conversations": talk("human", "gpt", role="from", content="value")}
    first = {"role": "system", "content": "Be kind."}
    assert to_chat(row) == Chat([first, *talk("user", "assistant")])
    assert to_chat({"system": "", "messages": talk("user", "assistant")}) == Chat(talk("user", "assistant"))
    own = talk("system", "user", "assistant")
    assert to_chat({"system": "Be kind.", "messages": own}) == Chat(own)
    asked = to_chat({"system": "Be kind.", "instruction": "Add.", "output": "2"})
    assert asked is not None
    assert asked.messages[0] == first


def test_what_was_said_before_an_instruction_is_learnt_too() -> None:
    row = {"instruction": "c", "input": "", "output": "d", "history": [["a", "b"]]}
    assert learnt(row) == "b<end>d<end>"
    assert learnt(row | {"history": []}) == learnt(row | {"history": None}) == "d<end>"
    assert (
        refused(row | {"history": ["a", "b"]}) == refused(row | {"history": 3}) == "its history is not a list of pairs"
    )


@pytest.mark.parametrize(
    "row",
    [
        {"input": "Add.", "output": "2"},
        {"instruction": "", "input": "Add.", "output": "2"},
        {"query": "Add.", "response": "2"},
    ],
)
def test_a_question_may_be_in_other_columns(row: Record) -> None:
    assert to_chat(row) == Chat([{"role": "user", "content": "Add."}, {"role": "assistant", "content": "2"}])


def test_of_a_prompt_of_messages_nothing_is_learnt() -> None:
    row = {"prompt": talk("user", "assistant", "user"), "completion": [{"role": "assistant", "content": "so"}]}
    assert learnt(row) == "so<end>"
    assert learnt(row | {"system": "Be kind."}) == "so<end>"
    assert learnt(row | {"completion": "so"}) == "so<end>"
    assert learnt(row, None) == "so</s>"


def test_messages_that_are_marked_so_are_not_learnt() -> None:
    marked: list[dict[str, Any]] = talk("user", "assistant", "user", "assistant")  # type: ignore[assignment]
    for mark in ({"weight": 0}, {"train": False}):
        assert learnt({"messages": [marked[0], marked[1] | mark, *marked[2:]]}) == "said 3<end>"
    assert refused({"messages": [marked[0], marked[1] | {"weight": 0}]}).startswith("the assistant says nothing")


# ---- contents


def test_contents_may_be_parts_of_text() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert learnt({"messages": [*talk("user"), {"role": "assistant", "content": parts}]}) == "abc<end>"
    image = [{"type": "image", "url": "a.png"}]
    said = refused({"messages": [{"role": "user", "content": image}, *talk("assistant")]})
    assert said == "a message has parts that are not text"


@pytest.mark.parametrize("calls", [[CALL], [CALL["function"]], [{"function": CALLED}], CALL])
def test_calls_of_tools_are_learnt(calls: Any) -> None:
    row = {"messages": [*talk("user"), {"role": "assistant", "content": None, "tool_calls": calls}, *talk("tool")]}
    assert learnt(row, TOOLS) == '<call>{"name": "weather", "arguments": {"town": "Ulm"}}<end>'
    assert refused(row) == "the chat template leaves tool calls out"
    assert refused(row, None) == "the chat template leaves tool calls out"


def test_calls_of_tools_as_sharegpt_has_them_are_learnt() -> None:
    called = {"from": "function_call", "value": json.dumps(CALLED)}
    turns = [{"from": "human", "value": "a"}, called, {"from": "observation", "value": "rain"}]
    turns += [{"from": "gpt", "value": "It rains."}]
    row = {"conversations": turns, "tools": json.dumps([FUNCTION])}
    said = learnt(row, TOOLS)
    assert said == '<call>{"name": "weather", "arguments": {"town": "Ulm"}}<end>It rains.<end>'
    assert to_document(row, words(TOOLS)).text.startswith('<tools>[{"type": "function", "function": {"name": "weather"')
    assert refused(row | {"conversations": turns[:1] + turns[3:]}) == "the chat template leaves tools out"
    called["value"] = "weather of Ulm"
    assert refused(row, TOOLS) == "a tool call has no name"


@pytest.mark.parametrize("tools", [None, "", [], "[]"])
def test_no_tools_are_no_tools(tools: Any) -> None:
    assert learnt({"messages": talk("user", "assistant"), "tools": tools}) == "said 1<end>"


def test_columns_that_parquet_fills_up_are_not_there(tmp_path: Path) -> None:
    rows = [{"role": "user", "content": "a", "tool_calls": None}, {"role": "assistant", "content": "b"}]
    pq.write_table(pa.table({"messages": [rows], "text": [None], "tools": [None]}), tmp_path / "rows.parquet")
    ids, _ = tokenised(str(tmp_path / "rows.parquet"), words(TOOLS))
    assert decode(ids) == "<user>a<end><assistant>b<end>"


# ---- a whole file


def test_half_of_the_rows_without_an_answer_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"messages": talk("user", "assistant")}] * 3 + [{"messages": talk("hero", "villain")}] * 3
    source = jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(ValueError, match=r"3 of its 6 rows cannot be used, .* the assistant says nothing .*line 4"):
        tokenised(source, words())
    ids, labels = tokenised(source, words(), max_dropped=0.5)
    assert "<villain>" not in decode(ids)
    counted = int((labels != IGNORED).sum())
    assert f"6 rows read, 3 used; {len(ids)} tokens, {counted} counted; 3 dropped, as" in caplog.text


class Slow(PreTrainedTokenizerFast):
    """Does not say where its tokens are in a text."""

    is_fast = property(lambda self: False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        assert not kwargs.get("return_offsets_mapping")
        return super().__call__(*args, **kwargs)


@pytest.mark.parametrize("template", [CHATML, None])
def test_a_tokenizer_that_gives_no_offsets_counts_the_same(tmp_path: Path, template: str | None) -> None:
    fast = words(template)
    slow = Slow(tokenizer_object=fast.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    slow.chat_template = template
    source = jsonl(tmp_path / "rows.jsonl", [{"messages": talk("user", "assistant", "user", "assistant")}] * 2)
    for mine, theirs in zip(tokenised(source, slow), tokenised(source, fast), strict=True):
        assert mine.equal(theirs)
    slow.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    pair = next(token for token in slow.get_vocab() if len(token) == 2 and token.isascii() and token.isalpha())
    with pytest.raises(UnusableRow, match="reach from one turn into another"):
        to_document({"prompt": pair[0], "completion": pair[1]}, slow)


LONG = "so it goes. " * 20
VALUES = [
    None,
    3,
    0.5,
    True,
    [],
    ["a"],
    [[]],
    [3],
    {},
    {"a": {"b": [1]}},
    "",
    " ",
    "a",
    "[",
    "[]",
    "{}",
    "\ud83d",
    LONG,
    [None],
]
ROWS: list[Record] = [
    {"text": "a"},
    {"messages": talk("user", "assistant")},
    {"conversations": talk("human", "gpt", role="from", content="value"), "system": "a", "tools": "[]"},
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["a", "b"]]},
    {"prompt": talk("user"), "completion": talk("assistant")},
    {"messages": [*talk("user"), {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [FUNCTION]},
]


def changed(value: Any, by: Any) -> list[Any]:
    """Something with each of its parts, however deep, in turn left out or replaced."""
    if isinstance(value, dict):
        out = [{k: v for k, v in value.items() if k != key} for key in value]
        return out + [value | {key: new} for key in value for new in [by, *changed(value[key], by)]]
    if isinstance(value, list):
        return [[*value[:i], new, *value[i + 1 :]] for i in range(len(value)) for new in [by, *changed(value[i], by)]]
    return []


@pytest.mark.parametrize("template", [TOOLS, None])
@pytest.mark.parametrize("row", ROWS, ids=lambda row: next(iter(row)))
def test_whatever_a_row_holds_it_is_used_or_named(row: Record, template: str | None) -> None:
    own, outcomes = words(template), []
    for value in VALUES:
        for other in changed(row, value):
            try:
                made = to_document(other, own)
            except UnusableRow as reason:
                outcomes.append(str(reason))
            else:
                ids, labels = encode([made], own)
                assert len(ids) == len(labels)
                assert made.answers is None or (labels != IGNORED).any()
    assert outcomes
    assert not any("\n" in reason for reason in outcomes)
