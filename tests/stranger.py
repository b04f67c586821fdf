"""A program that knows transformers and not plprune: loads folders and saves what they make of token ids.

Run as `python stranger.py JOBS OUTPUT`. JOBS is a JSON file: a list of a folder and a dtype each.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def read(folder: str, dtype: str) -> dict[str, Any]:
    """Logits, a greedy continuation, and the class that computed them."""
    custom = "auto_map" in json.loads((Path(folder) / "config.json").read_text())
    AutoTokenizer.from_pretrained(folder, trust_remote_code=custom)
    wanted: Any = getattr(torch, dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=custom, dtype=wanted).eval()
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(7))
    text = model.generate(ids[:, :5], max_new_tokens=12, do_sample=False)
    refused = False
    if custom:
        try:
            AutoConfig.from_pretrained(folder, trust_remote_code=False)
        except ValueError as error:
            refused = "trust_remote_code" in str(error)
    return {
        "logits": model(input_ids=ids).logits,
        "text": text,
        "class": type(model).__name__,
        "refused unasked": refused,
    }


if __name__ == "__main__":
    sys.modules["plprune"] = None  # type: ignore[assignment]  # an import of it fails from here on
    jobs, output = sys.argv[1:]
    torch.save([read(*job) for job in json.loads(Path(jobs).read_text())], output)
