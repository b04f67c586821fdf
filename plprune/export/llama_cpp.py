"""Runs a GGUF file in llama.cpp, to show that it is the model it was written from.

llama.cpp is the CPU build that the package `xllamacpp` carries. It ends its process when it meets a file that it does
not expect, so it works in one of its own. Keys and values are cached in float32 and flash attention is off: what is
left of the difference to another program is the file's.

Log-probabilities of a given text come from one request per token, each of which reads one token more than the one
before. What is asked for is a single new token that a bias forces to be the text's next one; its probability is
reported as it was before the bias.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

FORCE = 1e6  # added to a logit: no other token is left a chance
EVERYTHING = 2**24  # more tokens than any vocabulary has
MARKS = (  # the telling ones first
    "^gguf_init",
    "error loading model: ",
    "GGML_ASSERT",
    r"^\w+(Error|Exception): ",
    "failed to ",
    "error",
)


@dataclass(frozen=True)
class Run:
    """What llama.cpp made of a file.

    Args:
        token_ids: The text, as given or as llama.cpp's tokenizer divides it.
        logprobs: The natural logarithm of the probability of each token of the text but the first.
        greedy: The tokens that follow the text, each the likeliest.
        text: These as text.
        version: The program that ran.
        tokens_per_second: Of generation, a token at a time.
    """

    token_ids: list[int]
    logprobs: list[float]
    greedy: list[int]
    text: str
    version: str
    tokens_per_second: float


def run(path: str | os.PathLike[str], prompt: str | Sequence[int], continue_for: int = 16) -> Run:
    """Reads a text in llama.cpp, and continues it.

    Args:
        path: A GGUF file.
        prompt: The text, or its token ids. Special tokens are as the file's tokenizer adds them; to ids none is added.
        continue_for: Tokens to generate.

    Raises:
        ImportError: xllamacpp is not installed, so that nothing was checked.
        ValueError: llama.cpp cannot load or run the file.
    """
    ids = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
    answer = _ask({"path": os.fspath(path), "prompt": ids, "continue_for": continue_for})
    return Run(**answer, version=program())


def tokenise(path: str | os.PathLike[str], texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Divides texts into tokens as the tokenizer in a GGUF file does in llama.cpp.

    Args:
        path: A GGUF file.
        texts: The texts.
        special: Whether the special tokens are added that the file asks for.

    Raises:
        ImportError: xllamacpp is not installed.
        ValueError: llama.cpp cannot load the file.
    """
    return _ask({"path": os.fspath(path), "texts": list(texts), "special": special})["tokens"]


def program() -> str:
    """The name and the version of the program, for a report.

    Raises:
        ImportError: It is not installed.
    """
    if find_spec("xllamacpp") is None:
        raise ImportError("not checked: llama.cpp is not here to run the file; pip install xllamacpp")
    return f"llama.cpp (xllamacpp {version('xllamacpp')})"


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Has a process of its own do what a request says."""
    program()
    with tempfile.TemporaryDirectory() as folder:
        request |= {"answer": os.path.join(folder, "answer.json")}
        done = subprocess.run(
            [sys.executable, __file__], input=json.dumps(request), capture_output=True, text=True, errors="replace"
        )
        if not os.path.exists(request["answer"]):
            raise ValueError(f"llama.cpp does not run {request['path']}: {_reason(done.stderr, done.returncode)}")
        with open(request["answer"], encoding="utf-8") as file:
            return json.load(file)


def _reason(log: str, code: int) -> str:
    """What is wrong, in the words of llama.cpp's log."""
    lines = [re.sub(r"^[\d.]+ [A-Z] ", "", line) for line in log.splitlines() if line.strip()]
    for mark in MARKS:
        if told := [line for line in lines if re.search(mark, line)]:
            return told[-1]
    return f"it ended with code {code}"


def _main() -> None:
    sys.path.pop(0)  # this folder, whose gguf.py would hide the package
    request = json.load(sys.stdin)
    server = _server(request["path"], request.get("prompt", ""), request.get("continue_for", 0))
    if "texts" in request:
        answer = {"tokens": [_tokens(server, text, request["special"]) for text in request["texts"]]}
    else:
        answer = _read(server, request["prompt"], request["continue_for"])
    with open(request["answer"], "w", encoding="utf-8") as file:
        json.dump(answer, file)


def _server(path: str, prompt: str | list[int], continue_for: int) -> Any:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx = max(256, len(prompt) + continue_for + 8)  # of a text, there are no more tokens than bytes
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.swa_full, params.warmup, params.fit_params = True, False, False
    params.cpuparams.n_threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    return xllamacpp.Server(params)


def _tokens(server: Any, text: str, special: bool) -> list[int]:
    return _post(server, "tokenize", content=text, add_special=special, parse_special=False)["tokens"]


def _post(server: Any, path: str, **body: Any) -> dict[str, Any]:
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{server.listening_address}/{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ValueError(json.load(error)["error"]["message"]) from None


def _read(server: Any, prompt: str | list[int], continue_for: int) -> dict[str, Any]:
    ids = _tokens(server, prompt, True) if isinstance(prompt, str) else prompt
    logprobs = [_logprob(server, ids[:i], ids[i]) for i in range(1, len(ids))]
    start = time.perf_counter()
    answer = _post(server, "completion", **_next(ids, continue_for), return_tokens=True) if continue_for else {}
    speed = continue_for / (time.perf_counter() - start)
    greedy, text = answer.get("tokens", []), answer.get("content", "")
    return {"token_ids": ids, "logprobs": logprobs, "greedy": greedy, "text": text, "tokens_per_second": speed}


def _logprob(server: Any, ids: list[int], token: int) -> float:
    """The log-probability that a token follows."""
    answer = _post(server, "completion", **_next(ids, 1), n_probs=1, logit_bias=[[token, FORCE]])
    if "completion_probabilities" in answer:
        return answer["completion_probabilities"][0]["logprob"]
    # The server keeps to itself a token that ends within a character: seek it among all that might follow.
    whole = _tokens(server, "a", False)[0]
    answer = _post(server, "completion", **_next(ids, 1), n_probs=EVERYTHING, logit_bias=[[whole, FORCE]])
    return next(t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"] if t["id"] == token)


def _next(ids: list[int], count: int) -> dict[str, Any]:
    return {"prompt": ids, "n_predict": count, "temperature": 0.0, "cache_prompt": True}


if __name__ == "__main__":
    _main()
