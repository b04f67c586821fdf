"""Chats: rows of conversations and of instructions as messages, and the text that a tokenizer's template makes of them.

A row holds `messages`, or `conversations` as ShareGPT has them; or `instruction`, `input` and `output`; or `prompt` and
`completion`, as text or as messages. `system`, `history` and `tools` may stand beside. What would be lost on the way,
or not be learnt from, is not passed over: the row is :class:`UnusableRow`, with the reason.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
Message = dict[str, Any]
TALKS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "response", "answer")
ASSISTANT, CALLS = "assistant", ("function_call", "tool_call")

ROLES = {  # what others call them
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatbot", "chatgpt", "ai"), ASSISTANT),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}


class UnusableRow(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: With `role` and `content` each, and what else a template may want, such as `tool_calls`.
        tools: What the assistant may call.
        given: How many of the messages are part of a prompt, so that no answer among them is learnt.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    given: int = 0


def to_chat(record: Record) -> Chat | None:
    """A row as a conversation; None for plain text.

    Example:
        >>> to_chat({"instruction": "Add.", "input": "1 1", "output": "2"}).messages
        [{'role': 'user', 'content': 'Add.\\n\\n1 1'}, {'role': 'assistant', 'content': '2'}]

    Raises:
        UnusableRow: A message has no role, or its content is no text.
    """
    talk = next((found for key in TALKS if isinstance(found := _parsed(record.get(key)), list)), None)
    given = 0
    if talk is None:
        question, answer = (_first(record, keys) for keys in (QUESTIONS, ANSWERS))
        more = record.get("input") if isinstance(record.get("input"), str) else None
        if answer is None or (question is None and more is None):
            return None
        if isinstance(question, list):
            given = len(question)
        else:
            question = "\n\n".join(part for part in (question, more) if part)
        talk = _history(record.get("history")) + _spoken("user", question) + _spoken(ASSISTANT, answer)
    messages = [_message(turn) for turn in talk]
    system = record.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages, given = [{"role": "system", "content": system}, *messages], given + bool(given)
    return Chat(messages, _tools(record.get("tools")), given)


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[range]]:
    """The text of a conversation, and where in it the assistant speaks, the end of each turn included.

    Without a chat template the turns are put below each other. Of a turn that the template changes once others follow
    it (the reasoning of some models), only what stays as it was counts.

    Raises:
        UnusableRow: The template refuses the conversation, or leaves a part of it out; or the assistant says nothing.
    """
    messages, text = chat.messages, _render(chat.messages, tokenizer, chat.tools)
    silent = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    if silent != messages and text == _render(silent, tokenizer, chat.tools):
        raise UnusableRow("the chat template leaves tool calls out")
    if chat.tools and text == _render(messages, tokenizer, None):
        raise UnusableRow("the chat template leaves tools out")
    answers = []
    for i, message in enumerate(messages):
        learnt = message.get("weight", True) and message.get("train", True)  # as OpenAI and Axolotl have it
        if message["role"] == ASSISTANT and i >= chat.given and learnt:
            before = _render(messages[:i], tokenizer, chat.tools, True) if i else text.partition(message["content"])[0]
            upto = text[: _common(text, _render(messages[: i + 1], tokenizer, chat.tools))]
            answers.append(range(_common(text, before), len(upto.rstrip())))
    if not any(answers):
        said = ", ".join(dict.fromkeys(str(message["role"]) for message in messages)) or "nobody"
        raise UnusableRow(f"the assistant says nothing to learn from (there is {said})")
    return text, answers


def _render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, prompt: bool = False
) -> str:
    """The text of messages; as a prompt it goes up to where the assistant begins to speak."""
    if tokenizer.chat_template is None:
        return "\n\n".join(message["content"] for message in messages) + ("\n\n" if prompt else "")
    try:
        made = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompt)
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise UnusableRow(f"the chat template refuses it ({' '.join(str(error).split())})") from error
    return cast(str, made)


def _message(turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise UnusableRow("a message has neither role nor content")
    role = next((turn[key] for key in ("role", "from") if isinstance(turn.get(key), str)), None)
    content = next((turn[key] for key in ("content", "value") if turn.get(key) is not None), None)
    if role is None:
        raise UnusableRow("a message has no role")
    name, calls = role.strip().lower(), turn.get("tool_calls") or None
    if name in CALLS:
        name, calls, content = ASSISTANT, _parsed(content), None
        calls = calls if isinstance(calls, list) else [calls]
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if not isinstance(content, str) and (content is not None or not calls):
        raise UnusableRow(f"the content of a message is {'missing' if content is None else 'not text'}")
    known = ("role", "from", "content", "value", "tool_calls")
    others = {key: value for key, value in turn.items() if value is not None and key not in known}
    if calls:
        others["tool_calls"] = [_call(each) for each in calls] if isinstance(calls, list) else [_call(calls)]
    return {"role": ROLES.get(name, name), "content": content or "", **others}


def _part(part: Any) -> str:
    """One of several parts of a content."""
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise UnusableRow("a message has parts that are not text")
    return text


def _call(call: Any) -> dict[str, Any]:
    """A call of a tool as templates expect it."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRow("a tool call has no name")
    function = {"name": function["name"], "arguments": _parsed(function.get("arguments"))}
    return {**{key: call[key] for key in ("id",) if key in call}, "type": "function", "function": function}


def _tools(tools: Any) -> list[Any] | None:
    """Tools as templates expect them; None if there are none."""
    tools = _parsed(tools) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UnusableRow("its tools are no list of functions")
    return tools and [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]


def _first(record: Record, keys: tuple[str, ...]) -> str | list[Any] | None:
    """The first of some columns that holds text or messages."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            return value
    return None


def _history(pairs: Any) -> list[Any]:
    """What was said before, as pairs of question and answer."""
    pairs = pairs or []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise UnusableRow("its history is no list of pairs")
    return [turn for question, answer in pairs for turn in _spoken("user", question) + _spoken(ASSISTANT, answer)]


def _spoken(role: str, value: str | list[Any]) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _parsed(value: Any) -> Any:
    """What a text says in JSON; anything else as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _common(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
