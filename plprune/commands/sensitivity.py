"""`plprune sensitivity`: what each block's FFN and attention are worth."""

from pathlib import Path

import torch

from plprune import report
from plprune.cache import Cache
from plprune.calibration import Calibration
from plprune.checkpoint import Dtype, load_model, load_tokenizer
from plprune.processes import device_called
from plprune.sensitivity import as_record, check_fractions, table
from plprune.sensitivity import sensitivity as found_by
from plprune.text import PYDOC, check_sizes, check_source, draw, pack, tokenised


def sensitivity(
    model: str,
    output: str,
    text: str = PYDOC,
    join: str | None = None,
    seq_len: int = 512,
    max_windows: int = 8,
    num_samples: int = 32,
    fractions: str = "0.25,0.5,1",
    dtype: Dtype = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Measures what each block's FFN and attention are worth, by pruning it alone.

    It prints a table of those that matter most and least, and writes a heat map of all. Each result is kept as soon as
    it is there, and the same command goes on where it was stopped.

    Args:
        model: A folder, pruned or dense, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        output: Folder to write: `sensitivity.html`, `sensitivity.json`, and every single result under `cells`; what is
            there is gone on with.
        text: What to read: a `.txt`, `.jsonl` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, or
            `pydoc_data.topics`.
        join: Put between the rows of the text, which are then one document: "\\n\\n" is usual for WikiText.
        seq_len: Tokens of a window; the first of each is given, and no token is put before it.
        max_windows: How many windows, from the start of the text, are measured on.
        num_samples: Windows of the rest of the text that choose the channels and kv heads that go.
        fractions: Of a part's channels or kv heads, separated by commas; 1 is the whole part.
        dtype: Of the weights.
        device: Where to compute: cpu, cuda, cuda:1.
        seed: Of the choice of windows.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows, num_samples=num_samples)
    wanted = _numbers(fractions)
    check_source(text)
    place, page = device_called(device), Path(output) / "sensitivity.html"
    report.check_ours(page)
    stream = tokenised(text, load_tokenizer(model), join)
    windows = pack(stream, seq_len, "evaluation").tensors[0][:max_windows]
    chosen_by = draw(stream[0][windows.numel() :], num_samples, seq_len, seed)
    network = load_model(model, dtype).to(place)  # type: ignore[arg-type]
    calibration = Calibration(list(chosen_by.split(1)))
    found = found_by(network, list(windows.split(1)), calibration, Cache(page.parent / "cells"), wanted)
    sizes = {"seq_len": seq_len, "stride": None, "bos": False, "max_windows": max_windows, "num_samples": num_samples}
    protocol = sizes | {"text": text, "join": join, "tokens": windows[:, 1:].numel(), "dtype": dtype, "seed": seed}
    record = as_record(found, model, wanted, protocol | {"torch": torch.__version__})
    report.write(record, page, overwrite=True)
    print(f"{table(found)}\n\nperplexity over {len(windows)} windows of {seq_len} tokens of {text}, no BOS")
    print(f"saved to {page} and {page.with_suffix('.json')}")


def _numbers(fractions: str) -> list[float]:
    try:
        wanted = [float(each) for each in fractions.split(",")]
    except ValueError as error:
        raise ValueError(f"fractions are numbers separated by commas, not {fractions!r}: 0.25,0.5,1") from error
    check_fractions(wanted)
    return wanted
