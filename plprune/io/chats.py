"""Reads conversations and instructions from rows, and renders them by a tokenizer's chat template.

A row holds `messages`, or `conversations` as in ShareGPT; or `instruction`, `input` and `output`; or `prompt` and
`completion`, as text or as messages. `system`, `history` and `tools` may be added. If a part of the row would be lost,
or nothing could be learnt from it, the row raises :class:`UnusableRow` with the reason.
"""

import json
from dataclasses import dataclass
from typing import Any, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

Record = dict[str, Any]
Message = dict[str, Any]
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("instruction", "prompt", "question", "query")
ANSWERS = ("output", "completion", "response", "answer")
ASSISTANT, CALLS = "assistant", ("function_call", "tool_call")

ROLES = {  # other names of the roles
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatbot", "chatgpt", "ai"), ASSISTANT),
    **dict.fromkeys(("observation", "function", "function_response", "tool_response", "ipython"), "tool"),
}


class UnusableRow(ValueError):
    """The reason why a row cannot be used."""


@dataclass(frozen=True)
class Chat:
    """A conversation.

    Args:
        messages: Messages with `role`, `content`, and other keys that a template may read, such as `tool_calls`.
        tools: Descriptions of the tools that the assistant may call.
        prompt_length: The number of first messages that are a prompt: answers among them are not trained on.
    """

    messages: list[Message]
    tools: list[Any] | None = None
    prompt_length: int = 0


def to_chat(record: Record) -> Chat | None:
    """A row as a conversation; None for plain text.

    Example:
        >>> to_chat({"instruction": "Add.", "input": "1 1", "output": "2"}).messages
        [{'role': 'user', 'content': 'Add.\\n\\n1 1'}, {'role': 'assistant', 'content': '2'}]

    Raises:
        UnusableRow: A message has no role, or its content is not text.
    """
    turns = next((value for key in CONVERSATIONS if isinstance(value := _from_json(record.get(key)), list)), None)
    prompt_length = 0
    if turns is None:
        question, answer = (_first(record, keys) for keys in (QUESTIONS, ANSWERS))
        more = record.get("input") if isinstance(record.get("input"), str) else None
        if answer is None or (question is None and more is None):
            return None
        if isinstance(question, list):
            prompt_length = len(question)
        else:
            question = "\n\n".join(part for part in (question, more) if part)
        turns = _history(record.get("history")) + _turns("user", question) + _turns(ASSISTANT, answer)
    messages = [_message(turn) for turn in turns]
    system = record.get("system")
    if isinstance(system, str) and system and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
        prompt_length += bool(prompt_length)
    return Chat(messages, _tools(record.get("tools")), prompt_length)


def render_chat(chat: Chat, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[range]]:
    """The text of a conversation, and the ranges of characters that the assistant speaks, with each end of turn.

    Without a chat template, the messages are joined by empty lines. Some templates change a turn once others follow it,
    for example by removing its reasoning; only the unchanged beginning of such a turn is counted as an answer.

    Raises:
        UnusableRow: The template refuses the conversation or leaves a part of it out, or no answer can be trained on.
    """
    messages, text = chat.messages, _render(chat.messages, tokenizer, chat.tools)
    without_calls = [{key: value for key, value in message.items() if key != "tool_calls"} for message in messages]
    if without_calls != messages and text == _render(without_calls, tokenizer, chat.tools):
        raise UnusableRow("the chat template leaves tool calls out")
    if chat.tools and text == _render(messages, tokenizer, None):
        raise UnusableRow("the chat template leaves tools out")
    answers = []
    for i, message in enumerate(messages):
        trained = message.get("weight", True) and message.get("train", True)  # keys of OpenAI and of Axolotl
        if message["role"] == ASSISTANT and i >= chat.prompt_length and trained:
            before = _render(messages[:i], tokenizer, chat.tools, True) if i else text.partition(message["content"])[0]
            upto = text[: _common(text, _render(messages[: i + 1], tokenizer, chat.tools))]
            answers.append(range(_common(text, before), len(upto.rstrip())))
    if not any(answers):
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages)) or "none"
        raise UnusableRow(f"the assistant says nothing to learn from (roles: {roles})")
    return text, answers


def _render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, prompt: bool = False
) -> str:
    """The text of messages; a prompt also has the beginning of the assistant's turn."""
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
        name, calls, content = ASSISTANT, _from_json(content), None
        calls = calls if isinstance(calls, list) else [calls]
    if isinstance(content, list):
        content = "".join(map(_part, content))
    if not isinstance(content, str) and (content is not None or not calls):
        raise UnusableRow(f"the content of a message is {'missing' if content is None else 'not text'}")
    known = ("role", "from", "content", "value", "tool_calls")
    others = {key: value for key, value in turn.items() if value is not None and key not in known}
    if calls:
        others["tool_calls"] = [_call(each) for each in (calls if isinstance(calls, list) else [calls])]
    return {"role": ROLES.get(name, name), "content": content or "", **others}


def _part(part: Any) -> str:
    """The text of one part of a content that is a list."""
    text = part.get("text") if isinstance(part, dict) else part
    if not isinstance(text, str):
        raise UnusableRow("a message has parts that are not text")
    return text


def _call(call: Any) -> dict[str, Any]:
    """A tool call in the form that templates expect."""
    function = call.get("function") or call if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UnusableRow("a tool call has no name")
    function = {"name": function["name"], "arguments": _from_json(function.get("arguments"))}
    return {**{key: call[key] for key in ("id",) if key in call}, "type": "function", "function": function}


def _tools(tools: Any) -> list[Any] | None:
    """Tools in the form that templates expect; None if there are none."""
    tools = _from_json(tools) or None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise UnusableRow("its tools are not a list of functions")
    return tools and [tool if "name" not in tool else {"type": "function", "function": tool} for tool in tools]


def _first(record: Record, keys: tuple[str, ...]) -> str | list[Any] | None:
    """The first column that holds text or messages."""
    for key in keys:
        value = record.get(key)
        if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            return value
    return None


def _history(pairs: Any) -> list[Any]:
    """Earlier turns, given as pairs of question and answer."""
    pairs = pairs or []
    if not (isinstance(pairs, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)):
        raise UnusableRow("its history is not a list of pairs")
    return [turn for question, answer in pairs for turn in _turns("user", question) + _turns(ASSISTANT, answer)]


def _turns(role: str, value: str | list[Any]) -> list[Any]:
    return value if isinstance(value, list) else [{"role": role, "content": value}]


def _from_json(value: Any) -> Any:
    """The value of a string in JSON; any other value as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        return value


def _common(a: str, b: str) -> int:
    """The length of the common prefix of two texts."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
