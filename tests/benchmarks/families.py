"""Tries every causal language model of the installed transformers, and writes the list in the page on families.

    python -m tests.benchmarks.families [--types llama qwen3_moe] [--limit 300] [--processes 2] [--again]

Each type is a tiny random model in a process of its own: found, and by each method pruned, saved, loaded bit for bit,
and run with and without a cache. The results are kept in `families.json` beside this file, so a stopped run goes on,
and `--again` tries types anew. This takes half an hour on two cores.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from plprune import CFSP, FLAP, REAP, PruningMethod, TwoSSP
from plprune.architecture.blocks import Block, blocks_of
from plprune.io.atomic import staged
from tests.test_zoo import check, continuations
from tests.zoo import ENCODERS, build, decoders

RESULTS = Path(__file__).with_suffix(".json")
PAGE = Path(__file__).parents[2] / "plprune" / "architecture" / "README.md"
START, END = "<!-- families: written by tests/benchmarks/families.py -->", "<!-- end of families -->"
WHY = {  # in words, where an error says little
    "dbrx": "transformers cannot build it from its default config, which lacks `rope_theta`",
    "dory": "it runs some blocks several times",
    "dots3_note": "its adapters must be as wide as the decoder, and the tiny config does not make them so",
    "emu3": "transformers has no class that loads its text decoder alone",
    "gemma3n": "its tower that sees is in the library timm, which is not installed",
    "gemma4_assistant": "it drafts for another model, whose cache it reads",
    "gemma4_unified_assistant": "it drafts for another model, whose cache it reads",
    "hrm_text": "it runs two stacks of blocks several times",
    "inkling_text": "its router scores shared experts beside the others",
    "longcat_flash": "its experts are not on transformers' interface, and its blocks have two attentions each",
    "minimax": "steps of 8 channels miss the sparsity, and decays of its linear attention are buffers over heads",
    "mllama": "some of its blocks run with images only",
    "musicgen": "it is built of parts that have configs of their own",
    "musicgen_melody": "it is built of parts that have configs of their own",
    "prophetnet": "its attention reads several streams of hidden states at once",
    "zamba": "its blocks share one transformer block",
    "zamba2": "its blocks share one transformer block",
}
Result = dict[str, Any]
FORKING = multiprocessing.get_context("forkserver")  # from a process that has imported all
FORKING.set_forkserver_preload(["tests.test_zoo"])


def methods_for(blocks: Sequence[Block]) -> list[PruningMethod]:
    """The methods that the units of a model's blocks are for."""
    dropped = int(any(block.can_drop_attention for block in blocks))
    dense: list[PruningMethod] = [CFSP(0.2), FLAP(0.2), TwoSSP(0.2, drop_attentions=dropped)]
    return dense + [REAP(0.25, sparsity_of="experts")] * any(block.anatomy.experts for block in blocks)


def tried(kind: str) -> Result:
    """The kinds of units that a type's blocks have, and for each method why it fails; empty if it does not."""
    try:
        model = build(kind)
        blocks = blocks_of(model)
    except Exception as error:
        return {"units": [], "methods": {}, "why": reason(error)}
    found: Result = {"units": sorted({group.kind for block in blocks for group in block.all_groups}), "methods": {}}
    if not torch.equal(*continuations(model)):
        found["cache"] = "differs before pruning"
    for method in methods_for(blocks):
        with tempfile.TemporaryDirectory() as folder:
            try:
                check(kind, method, Path(folder) / "out")
                found["methods"][type(method).__name__] = ""
            except Exception as error:
                found["methods"][type(method).__name__] = reason(error)
    return found


def reason(error: Exception) -> str:
    """Why a type fails: the message of a refusal, or else where the fault is."""
    if isinstance(error, ValueError):
        return " ".join(str(error).split())[:200]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}"


def in_a_process(kind: str, limit: float) -> Result:
    """The result of a type; a reason if it takes too long."""
    receiving, sending = multiprocessing.Pipe(duplex=False)
    process = FORKING.Process(target=_send, args=(kind, sending))
    process.start()
    sending.close()
    try:
        if receiving.poll(limit):
            return receiving.recv()
        return {"units": [], "methods": {}, "why": f"takes more than {limit:.0f} s"}
    except EOFError:
        return {"units": [], "methods": {}, "why": "the process ended"}
    finally:
        process.kill()
        process.join()


def _send(kind: str, pipe: Connection) -> None:
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    pipe.send(tried(kind))


def page(results: dict[str, Result]) -> str:
    """The part of the page between its marks."""
    types = {kind: each for kind, each in results.items() if kind != "transformers"}
    failing = {kind: {name: why for name, why in each["methods"].items() if why} for kind, each in types.items()}
    good = [kind for kind, each in types.items() if each["methods"] and not failing[kind]]
    partly = [kind for kind, each in types.items() if failing[kind] and len(failing[kind]) < len(each["methods"])]
    experts = [kind for kind in good if "expert" in types[kind]["units"]]
    encoders = [kind for kind in good if kind in ENCODERS]
    dense = [kind for kind in good if kind not in (*experts, *encoders)]
    rows = [f"| {kind} | {name} | {WHY.get(kind, why)} |" for kind in partly for name, why in failing[kind].items()]
    rows += [
        f"| {k} | all | {WHY.get(k) or each.get('why') or min(failing[k].values())} |"
        for k, each in types.items()
        if k not in good + partly
    ]
    lines = [
        f"Of {len(types)} types of causal language models of transformers {results['transformers']}, {len(good)} are",
        "pruned by CFSP, FLAP and 2SSP, saved, loaded bit for bit, and run with and without a cache, as tiny random",
        "models:",
        "",
        f"- {len(dense)} without experts: {', '.join(dense)}.",
        f"- {len(experts)} mixtures of experts, by REAP as well: {', '.join(experts)}.",
        f"- {len(encoders)} encoders, and decoders of encoder-decoders, which decode: {', '.join(encoders)}.",
        "",
        f"With a cache, {', '.join(kind for kind in good if 'cache' in types[kind])} go on otherwise than without one,",
        "as they do before they are pruned.",
        "",
        f"By some of these methods: {', '.join(partly) or 'none'}. What fails:",
        "",
        "| type | method | why |",
        "|---|---|---|",
        *sorted(rows),
    ]
    return "\n".join([START, *lines, END])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", nargs="*", default=decoders(), help="types to try; all by default")
    parser.add_argument("--limit", type=float, default=300, help="seconds for a type")
    parser.add_argument("--processes", type=int, default=2, help="types at a time")
    parser.add_argument("--again", action="store_true", help="try types that have a result too")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results["transformers"] = version("transformers")
    with ThreadPoolExecutor(options.processes) as pool:
        kinds = [kind for kind in options.types if options.again or kind not in results]
        running = {pool.submit(in_a_process, kind, options.limit): kind for kind in kinds}
        for done in as_completed(running):
            kind, results[running[done]] = running[done], done.result()
            print(kind, json.dumps(results[kind]), flush=True)
            with staged(RESULTS, overwrite=True) as temporary:
                temporary.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    text = PAGE.read_text()
    before, after = text.split(START)[0], text.split(END)[1]
    with staged(PAGE, overwrite=True) as temporary:
        temporary.write_text(before + page(dict(sorted(results.items()))) + after)


if __name__ == "__main__":
    main()
