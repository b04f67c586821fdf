"""Compares an exported model, loaded by another program, with the model in memory.

Both compute the log-probabilities of a text and continue a prompt greedily.
"""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from plprune.evaluation import standalone
from plprune.export import llama_cpp, vllm_reading
from plprune.io.tables import markdown_table
from plprune.io.units import format_value
from plprune.pruning.forward import evaluating


@dataclasses.dataclass(frozen=True)
class Reading:
    """The output of a program on a text.

    Args:
        logprobs: Log-probabilities of every token of every window except the first, [n, s - 1].
        greedy: The greedy continuation of the prompt.
        program: Name and version of the program.
        tokens_per_second: Speed of generation, one token at a time.
    """

    logprobs: Tensor
    greedy: Tensor
    program: str
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the parity table.

    Args:
        format: The format, with its dtype.
        file: The file or folder that was written; None if the format was refused.
        refused: Reasons why it was not written, with the settings to change.
        program: Name and version of the program that loaded it; None if none did.
        difference: Largest difference of log-probabilities over the text.
        perplexity_ratio: Perplexity of the text over the model's own.
        same_text: Whether the greedy continuations are equal.
        bytes: Size of the file or folder.
        tokens_per_second: Speed of generation, one token at a time.
        note: A further remark.
    """

    format: str
    file: str | None = None
    refused: list[str] = dataclasses.field(default_factory=list)
    program: str | None = None
    difference: float | None = None
    perplexity_ratio: float | None = None
    same_text: bool | None = None
    bytes: int | None = None
    tokens_per_second: float | None = None
    note: str = ""

    def noted(self, remark: str) -> "Row":
        """The row with a further remark."""
        return dataclasses.replace(self, note="; ".join(filter(None, (self.note, remark))))


@torch.no_grad()
def read_model(model: PreTrainedModel, windows: Tensor) -> Reading:  # [n, s]
    """The output of the model in memory."""
    with evaluating(model):
        tokens, speed = standalone.continuation(model, standalone.prompt_of(windows))
        return Reading(standalone.logprobs(model, windows), tokens, "plprune", speed)


def by_transformers(folder: Path, windows: Tensor) -> Reading:  # [n, s]
    """The output of transformers on a folder, in a process that cannot import plprune.

    Raises:
        ValueError: The folder does not load there.
    """
    return _by_program([sys.executable, "-I", standalone.__file__], folder, windows, {})


def by_vllm(folder: Path, python: str, windows: Tensor, settings: Mapping[str, Any] = {}) -> Reading:  # [n, s]
    """The output of vLLM on a folder.

    Args:
        folder: The folder.
        python: The Python of an environment with vLLM.
        windows: Token ids.
        settings: Of `vllm.LLM`.

    Raises:
        ValueError: vLLM is not there, or does not load the folder.
    """
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ
    return _by_program([python, "-I", vllm_reading.__file__, json.dumps(settings)], folder, windows, own)


def _by_program(command: list[str], folder: Path, windows: Tensor, settings: Mapping[str, str]) -> Reading:
    """The output of a program that answers as :mod:`plprune.evaluation.standalone` does."""
    with tempfile.TemporaryDirectory() as room:
        request, answer = Path(room, "request.safetensors"), Path(room, "answer.safetensors")
        prompt = standalone.prompt_of(windows)
        save_file({"windows": windows.contiguous(), "prompt": prompt.clone()}, request)
        command = [*command, str(folder), str(request), str(answer)]
        own = {**os.environ, **settings, "HF_MODULES_CACHE": room, "HF_HUB_OFFLINE": "1"}
        try:
            done = subprocess.run(command, env=own, capture_output=True, text=True)
        except OSError as error:
            raise ValueError(f"{command[0]} does not run: {error.strerror}") from error
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"]
            raise ValueError(next((line for line in reversed(lines) if "Error: " in line), lines[-1]))
        with safe_open(answer, framework="pt") as file:
            told = file.metadata()
            found = file.get_tensor("logprobs"), file.get_tensor("greedy")
        return Reading(*found, told["program"], float(told["speed"]))


def by_llama_cpp(file: Path, windows: Tensor) -> Reading:  # [n, s]
    """The output of llama.cpp on a GGUF file.

    Raises:
        ValueError: llama.cpp does not load the file.
    """
    runs = [llama_cpp.run(file, window.tolist(), 0) for window in windows]
    continued = llama_cpp.run(file, standalone.prompt_of(windows).tolist(), 32)
    logprobs = torch.tensor([run.logprobs for run in runs])
    return Reading(logprobs, torch.tensor(continued.greedy), continued.version, continued.tokens_per_second)


def compare(row: Row, read: Callable[[], Reading], own: Reading) -> Row:
    """Completes a row with the output of another program, or with the reason why it failed."""
    try:
        other = read()
    except ValueError as error:
        return row.noted(f"not loaded: {error}")
    length = min(len(own.greedy), len(other.greedy))  # one program may go on after the end of the text
    change = own.logprobs - other.logprobs
    return dataclasses.replace(
        row,
        program=other.program,
        difference=change.abs().max().item(),
        perplexity_ratio=change.double().mean().exp().item(),
        same_text=torch.equal(own.greedy[:length], other.greedy[:length]),
        tokens_per_second=other.tokens_per_second,
    )


HEADER = (
    "format",
    "loaded again by",
    "largest difference of log-probabilities",
    "perplexity ratio",
    "same text",
    "size",
    "tokens/s, generating",
)


def parity_table(rows: list[Row]) -> str:
    r"""The rows as a Markdown table, followed by the reasons of refusals and other remarks.

    Example:
        >>> print(parity_table([Row("decilm", refused=["block 0 has no attention"])]).partition("\n")[2])
        |---|---|---|---|---|---|---|
        | decilm | refused |  |  |  |  |  |
        <BLANKLINE>
        - decilm: block 0 has no attention
    """
    remarks = [f"- {row.format}: {remark}" for row in rows for remark in (*row.refused, row.note) if remark]
    return "\n".join([markdown_table([HEADER, *map(_cells, rows)]), *([""] if remarks else []), *remarks])


def _cells(row: Row) -> list[str]:
    same = {True: "yes", False: "no", None: ""}[row.same_text]
    return [
        row.format,
        "refused" if row.refused else row.program or "not checked",
        "" if row.difference is None else f"{row.difference:.2g}",
        "" if row.perplexity_ratio is None else f"{row.perplexity_ratio:.4f}",
        same,
        "" if row.bytes is None else format_value(row.bytes, "bytes"),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
    ]
