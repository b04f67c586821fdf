"""What plprune takes on a GPU: a table, and FOLDER/gpu.json.

    python -m tests.benchmarks.gpu [SECTION ...] --output FOLDER

pruning   every method over one bare forward pass, in the shapes of OPT-125M, Llama-3-8B and LLaMA-30B
recovery  tokens per second and memory of Recovery over a plain loop with PEFT, in the shapes of 1B and 8B
quality   perplexity of SmolLM2-135M by LearnedGates' windows, and by the ways and the tokens of recovery
plan      what `plprune plan` foretells of the first two, beside what they took
decode    tokens per second, dense and pruned

All of them end within ten minutes: each runs in a process of its own, and is cut at its limit. What it has measured by
then is in the file, also what it has not; the same command goes on with that. The first cells tell most; the last of
pruning, all of LLaMA-30B, needs 80 GB and `--limit 400`. Texts are looked for in the folder PLPRUNE_SHARED.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.gpu.running import SECTIONS, measure, read, table, within
from tests.shared import SHARED, SMOLLM2, WIKITEXT

TEXTS = SHARED / "data/text"


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="all if none is given")
    parser.add_argument("--output", type=Path, required=True, help="a folder; what is there is gone on with")
    parser.add_argument("--limit", type=float, help="seconds of each section; at 0 there is none, nor a process")
    parser.add_argument("--windows", type=int, default=128, help="of calibration, and those that are judged")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a window; in quality a part of that")
    parser.add_argument("--steps", type=int, default=8, help="of training, of which two do not count")
    parser.add_argument("--small", type=json.loads, default={}, help="other sizes, as JSON: to try this out")
    parser.add_argument("--model", default=os.environ.get("PLPRUNE_GGUF", SMOLLM2), help="a real one")
    parser.add_argument("--train", default=str(TEXTS / "general_en/train.jsonl"))
    parser.add_argument("--wikitext", default=str(SHARED / WIKITEXT / "test.parquet"))
    parser.add_argument("--books", default=str(TEXTS / "redpajama_sample/book.jsonl"))
    parser.add_argument("--gates", type=int, nargs="+", default=[512, 2048, 4096], help="windows of LearnedGates")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5_000_000, 20_000_000], help="of recovery")
    args = parser.parse_args(given)
    if unknown := set(args.sections) - set(SECTIONS):
        parser.error(f"there is no section {', '.join(sorted(unknown))}: {', '.join(SECTIONS)}")
    for section in args.sections or SECTIONS:
        limit = SECTIONS[section][1] if args.limit is None else args.limit
        if limit:
            within(section, args, limit)
        else:
            measure(section, args)
    print(table(read(args.output)))


if __name__ == "__main__":
    main()
