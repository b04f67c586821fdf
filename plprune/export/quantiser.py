"""Quantises GGUF files by llama.cpp's own quantiser, in a process of its own, as it may abort.

It is the program `llama-quantize`, which comes with llama.cpp, or else the library in the package `llama-cpp-python`.
This file is also the program that calls the library, with the arguments of `llama-quantize`.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

Kind = Literal["q8_0", "q6_k", "q5_k_m", "q4_k_m"]
BLOCKS: dict[Kind, int] = {"q8_0": 32, "q6_k": 256, "q5_k_m": 256, "q4_k_m": 256}  # values that share scales
PROGRAM = "llama-quantize"
FALLBACK = re.compile(r"(\d+) of (\d+) tensor\(s\) required fallback")
REASONS = ("failed to quantize: ", "Error: ", "GGML_ASSERT", "failed to ", "error")  # the most specific first


def command(program: str | None = None) -> list[str]:
    """The command that quantises, without its arguments.

    Args:
        program: Path of `llama-quantize`; if not given, it is looked for.

    Raises:
        ValueError: No quantiser is here.
    """
    found = shutil.which(program or PROGRAM)
    if found:
        return [found]
    if program:
        raise ValueError(f"{program} is no program: name the path of {PROGRAM} by --quantizer")
    if find_spec("llama_cpp"):
        return [sys.executable, __file__]
    raise ValueError(
        f"no quantiser of llama.cpp is here: put {PROGRAM} on the PATH, name it by --quantizer, or pip install "
        "llama-cpp-python; q8_0 needs none by --gguf q8_0"
    )


def quantise(program: list[str], source: Path, target: Path, kind: Kind) -> str:
    """Quantises a file.

    Args:
        program: From :func:`command`.
        source: A GGUF file in f32, f16 or bf16.
        target: The file to write.
        kind: Type of most matrices.

    Returns:
        A remark on matrices that have another type; empty if there are none.

    Raises:
        ValueError: The quantiser fails.
    """
    done = subprocess.run([*program, source, target, kind.upper()], capture_output=True, text=True, errors="replace")
    log = done.stdout + done.stderr
    if done.returncode or not target.exists():
        raise ValueError(f"{Path(program[-1]).name} does not quantise to {kind}: {_reason(log, done.returncode)}")
    if not (found := FALLBACK.search(log)):
        return ""
    return (
        f"{found[1]} of {found[2]} tensors have rows that are no multiple of {BLOCKS[kind]}: llama.cpp stores them in "
        "larger types"
    )


def _reason(log: str, code: int) -> str:
    for told in REASONS:
        if lines := [line for line in log.splitlines() if told in line]:
            return lines[-1].strip()
    return f"it ended with code {code}"


def _main() -> None:
    sys.path.pop(0)  # this folder, whose llama_cpp.py would shadow the package
    llama_cpp: Any = importlib.import_module("llama_cpp")
    source, target, kind = sys.argv[1:]
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    sys.exit(llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(target), params))


if __name__ == "__main__":
    _main()
