"""Proof that an exported model is the one it was exported from: another program loads it and reads a text.

What the model itself makes of the text is compared with what the program makes of it, token by token.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from plprune.evaluation import alone
from plprune.export import llama_cpp
from plprune.io.tables import markdown_table
from plprune.io.units import format_value
from plprune.pruning.forward import evaluating


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a program makes of a text.

    Args:
        logprobs: Of each token of each window but the first, [n, s - 1].
        greedy: The tokens by which it continues the prompt, each the likeliest.
        program: Which program, and its version.
        tokens_per_second: How many it generates, one at a time.
    """

    logprobs: Tensor
    greedy: Tensor
    program: str
    tokens_per_second: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the parity table.

    Args:
        format: What was asked for.
        file: What was written; None if it was refused.
        refused: Why it was not written, and what to prune differently.
        program: Which program loaded it, and its version; None if none did.
        difference: The largest difference of log-probabilities over the text.
        same_text: Whether the greedy continuation is the same, token by token.
        bytes: Size of what was written.
        tokens_per_second: How many the program generates, one at a time.
        note: What else there is to say.
    """

    format: str
    file: str | None = None
    refused: list[str] = dataclasses.field(default_factory=list)
    program: str | None = None
    difference: float | None = None
    same_text: bool | None = None
    bytes: int | None = None
    tokens_per_second: float | None = None
    note: str = ""


@torch.no_grad()
def reading(model: PreTrainedModel, windows: Tensor) -> Reading:  # [n, s]
    """What the model itself makes of a text."""
    with evaluating(model):
        tokens, speed = alone.continuation(model, alone.prompt_of(windows))
        return Reading(alone.logprobs(model, windows), tokens, "plprune", speed)


def by_transformers(folder: Path, windows: Tensor) -> Reading:  # [n, s]
    """What transformers makes of a folder, in a process where plprune cannot be imported.

    Raises:
        ValueError: It does not load there.
    """
    with tempfile.TemporaryDirectory() as room:
        request, answer = Path(room, "request.safetensors"), Path(room, "answer.safetensors")
        save_file({"windows": windows.contiguous()}, request)
        command = [sys.executable, "-I", alone.__file__, str(folder), str(request), str(answer)]
        own = os.environ | {"HF_MODULES_CACHE": room, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=own, capture_output=True, text=True)
        if done.returncode:
            raise ValueError((done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1])
        with safe_open(answer, framework="pt") as file:
            told = file.metadata()
            found = file.get_tensor("logprobs"), file.get_tensor("greedy")
        return Reading(*found, told["program"], float(told["speed"]))


def by_llama_cpp(file: Path, windows: Tensor) -> Reading:  # [n, s]
    """What llama.cpp makes of a GGUF file.

    Raises:
        ValueError: It does not load it.
    """
    runs = [llama_cpp.run(file, window.tolist(), 0) for window in windows]
    continued = llama_cpp.run(file, alone.prompt_of(windows).tolist(), 32)
    logprobs = torch.tensor([run.logprobs for run in runs])
    return Reading(logprobs, torch.tensor(continued.greedy), continued.version, continued.tokens_per_second)


def compared(row: Row, read: Callable[[], Reading], own: Reading) -> Row:
    """The row with what another program made of the text; with the reason if it could not."""
    try:
        other = read()
    except ValueError as error:
        return dataclasses.replace(row, note=f"not loaded: {error}")
    length = min(len(own.greedy), len(other.greedy))  # one may go on after the end of the text
    return dataclasses.replace(
        row,
        program=other.program,
        difference=(own.logprobs - other.logprobs).abs().max().item(),
        same_text=torch.equal(own.greedy[:length], other.greedy[:length]),
        tokens_per_second=other.tokens_per_second,
    )


HEADER = (
    "format",
    "loaded again by",
    "largest difference of log-probabilities",
    "same text",
    "size",
    "tokens/s, generating",
)


def parity_table(rows: list[Row]) -> str:
    """The rows in Markdown, with what was refused, and why, below.

    Example:
        >>> print(parity_table([Row("decilm", refused=["block 0 has no attention"])]))
        | format | loaded again by | largest difference of log-probabilities | same text | size | tokens/s, generating |
        |---|---|---|---|---|---|
        | decilm | refused |  |  |  |  |
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
        same,
        "" if row.bytes is None else format_value(row.bytes, "bytes"),
        "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}",
    ]
