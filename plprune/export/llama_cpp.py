"""Runs a GGUF file in llama.cpp: log-probabilities of a text, greedy continuation, and tokenisation.

llama.cpp is the CPU build in the package `xllamacpp`. It aborts its process on an unexpected file, so it runs in a
subprocess. Keys and values are cached in float32 and flash attention is off, so that any difference from another
program comes from the file.

Log-probabilities of a text take one request per token. Each request generates one token, which a logit bias forces to
be the next token of the text; the server reports its probability without the bias.
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

FORCE = 1e6  # logit bias that leaves no other token a chance
EVERYTHING = 2**24  # more tokens than any vocabulary has
ERROR_PATTERNS = (  # the most specific first
    "^gguf_init",
    "error loading model: ",
    "GGML_ASSERT",
    r"^\w+(Error|Exception): ",
    "failed to ",
    "error",
)


@dataclass(frozen=True)
class Run:
    """The output of llama.cpp on a prompt.

    Args:
        token_ids: The prompt, as given or as llama.cpp tokenises it.
        logprobs: Natural log-probabilities of every token of the prompt except the first.
        greedy: The greedy continuation.
        text: The continuation as text.
        version: Name and version of the program.
        tokens_per_second: Speed of generation, one token at a time.
    """

    token_ids: list[int]
    logprobs: list[float]
    greedy: list[int]
    text: str
    version: str
    tokens_per_second: float


def run(path: str | os.PathLike[str], prompt: str | Sequence[int], continue_for: int = 16) -> Run:
    """Computes the log-probabilities of a prompt, and continues it greedily.

    Args:
        path: A GGUF file.
        prompt: A text, to which the file's tokenizer adds special tokens, or token ids, to which none are added.
        continue_for: Tokens to generate.

    Raises:
        ImportError: xllamacpp is not installed.
        ValueError: llama.cpp cannot load or run the file.
    """
    ids = prompt if isinstance(prompt, str) else [int(i) for i in prompt]
    answer = _ask({"path": os.fspath(path), "prompt": ids, "continue_for": continue_for})
    return Run(**answer, version=program())


def tokenise(path: str | os.PathLike[str], texts: Sequence[str], special: bool = False) -> list[list[int]]:
    """Tokenises texts in llama.cpp by the tokenizer of a GGUF file.

    Args:
        path: A GGUF file.
        texts: The texts.
        special: Whether to add the special tokens that the file names.

    Raises:
        ImportError: xllamacpp is not installed.
        ValueError: llama.cpp cannot load the file.
    """
    return _ask({"path": os.fspath(path), "texts": list(texts), "special": special})["tokens"]


def program() -> str:
    """Name and version of llama.cpp.

    Raises:
        ImportError: It is not installed.
    """
    if find_spec("xllamacpp") is None:
        raise ImportError("not checked: llama.cpp is not here to run the file; pip install xllamacpp")
    return f"llama.cpp (xllamacpp {version('xllamacpp')})"


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """Answers a request in a subprocess."""
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
    """The line of llama.cpp's log that explains an error best."""
    lines = [re.sub(r"^[\d.]+ [A-Z] ", "", line) for line in log.splitlines() if line.strip()]
    for pattern in ERROR_PATTERNS:
        if told := [line for line in lines if re.search(pattern, line)]:
            return told[-1]
    return f"it ended with code {code}"


def _main() -> None:
    sys.path.pop(0)  # this folder, whose gguf.py would shadow the package
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
    params.n_ctx = max(256, len(prompt) + continue_for + 8)  # a text has at most as many tokens as characters
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
    """The log-probability of a token after a prefix."""
    answer = _post(server, "completion", **_next(ids, 1), n_probs=1, logit_bias=[[token, FORCE]])
    if "completion_probabilities" in answer:
        return answer["completion_probabilities"][0]["logprob"]
    # The server withholds a token that ends within a character: look it up among the probabilities of all tokens.
    whole = _tokens(server, "a", False)[0]
    answer = _post(server, "completion", **_next(ids, 1), n_probs=EVERYTHING, logit_bias=[[whole, FORCE]])
    return next(t["logprob"] for t in answer["completion_probabilities"][0]["top_logprobs"] if t["id"] == token)


def _next(ids: list[int], count: int) -> dict[str, Any]:
    return {"prompt": ids, "n_predict": count, "temperature": 0.0, "cache_prompt": True}


if __name__ == "__main__":
    _main()
