"""Times a model in llama.cpp or vLLM, run as a program in an environment that has it.

`python -I served.py llama.cpp FILE THREADS {}` or `python -I served.py vLLM FOLDER THREADS SETTINGS`, with settings of
`vllm.LLM` as JSON. It loads the model, says `READY`, and answers each line `{"prompts": [[ids]], "tokens": n}` with
`TIMES {"reading": s, "writing": s}`: the seconds until every prompt of the batch is read, and those in which n further
tokens are written for each. It imports nothing of plprune. But for caches of prompts, the programs' own settings hold.
"""

import importlib
import itertools
import json
import os
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

Ids = list[list[int]]
Times = Callable[[Ids, int], tuple[float, float]]
LENGTH, BATCH = 256, 8  # the longest sequence, and how many at once


def llama_cpp(path: str, threads: int) -> Times:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.n_ctx, params.n_parallel, params.cache_ram_mib = LENGTH * BATCH, BATCH, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    server = xllamacpp.Server(params)

    def asked(prompts: Ids, tokens: int, known: bool) -> float:
        body = {"prompt": prompts, "n_predict": tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": known}
        start = time.perf_counter()
        request = urllib.request.Request(
            f"{server.listening_address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as reply:
            told = json.load(reply)
        seconds = time.perf_counter() - start
        for each in told if isinstance(told, list) else [told]:
            read = 1 if known else len(prompts[0])  # the last token of a known prompt is read again
            assert (each["timings"]["prompt_n"], each["timings"]["predicted_n"]) == (read, tokens)
        return seconds

    def times(prompts: Ids, tokens: int) -> tuple[float, float]:
        return asked(prompts, 1, False), asked(prompts, tokens, True)

    return times


def vllm(folder: str, threads: int, settings: dict[str, Any]) -> Times:
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:threads])
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": cores, "OMP_NUM_THREADS": str(threads)}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    config = json.loads(Path(folder, "config.json").read_text())
    own: dict[str, Any] = {"dtype": config["dtype"], "trust_remote_code": "auto_map" in config}
    own |= {"max_model_len": LENGTH, "max_num_seqs": BATCH, "enable_prefix_caching": False, "async_scheduling": False}
    llm = LLM(folder, **(own | settings))
    engine, names = llm.llm_engine, itertools.count()

    def times(prompts: Ids, tokens: int) -> tuple[float, float]:
        sampling = SamplingParams(max_tokens=tokens + 1, temperature=0, ignore_eos=True)
        for ids in prompts:
            engine.add_request(str(next(names)), {"prompt_token_ids": ids}, sampling)
        start = time.perf_counter()
        first = engine.step()
        middle = time.perf_counter()
        assert [len(each.outputs[0].token_ids) for each in first] == [1] * len(prompts)  # read in one step
        while engine.has_unfinished_requests():
            last = engine.step()
        seconds = time.perf_counter() - middle
        assert [len(each.outputs[0].token_ids) for each in last] == [tokens + 1] * len(prompts)
        return middle - start, seconds

    return times


def main(program: str, path: str, threads: str, settings: str) -> None:
    times = llama_cpp(path, int(threads)) if program == "llama.cpp" else vllm(path, int(threads), json.loads(settings))
    print("\nREADY", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        reading, writing = times(asked["prompts"], asked["tokens"])
        print("\nTIMES", json.dumps({"reading": reading, "writing": writing}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
