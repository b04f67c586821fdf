"""`plprune sensitivity`: how much each block's FFN and attention matter."""

import torch

from plprune import report
from plprune.checkpoint.load import load_model, load_tokenizer
from plprune.checkpoint.stored import Dtype
from plprune.commands.options import shared_help
from plprune.evaluation.sensitivity import as_record, check_fractions, sensitivity_table
from plprune.evaluation.sensitivity import sensitivity as found_by
from plprune.io.atomic import resolve_path
from plprune.io.cache import Cache
from plprune.io.checks import check_max_dropped, check_seed, check_sizes
from plprune.io.distributed import launched_rank, log_device, resolve_device
from plprune.io.readers import PYDOC, check_text
from plprune.io.text import MAX_DROPPED, bos_token, draw, pack, tokenised
from plprune.pruning.calibration import Calibration
from plprune.pruning.forward import check_ids


@shared_help
def sensitivity(
    model: str,
    output: str,
    text: str = PYDOC,
    join: str | None = None,
    seq_len: int = 512,
    max_windows: int = 8,
    num_samples: int = 32,
    fractions: str = "0.25,0.5,1",
    dtype: Dtype | None = None,
    device: str | None = None,
    seed: int = 0,
    bos: bool | None = None,
    max_dropped: float = MAX_DROPPED,
) -> None:
    """Measures how much each block's FFN and attention matter, by pruning it alone.

    Prints a table of those that matter most and least, and writes a heat map of all. Each result is saved at once, and
    the same command continues a stopped run. Processes of torchrun, and several runs with the same output, share the
    work; several machines must share the output folder.

    Args:
        output: Folder to write: `sensitivity.html`, `sensitivity.json`, and every single result under `cells`. Results
            that are there are used.
        seq_len: Tokens per window, a BOS token included. The first token is given, and not predicted.
        max_windows: Number of windows, from the start of the text, that perplexity is measured on.
        num_samples: Number of windows, from the rest of the text, that choose the channels and kv heads to prune.
        fractions: Fractions of a block's channels or kv heads to prune, separated by commas; 1 removes the whole FFN or
            attention.
        seed: Random seed that chooses these windows.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows, num_samples=num_samples)
    wanted = _numbers(fractions)
    check_text(text)
    check_seed(seed)
    check_max_dropped(max_dropped)
    place, page = resolve_device(device), resolve_path(output) / "sensitivity.html"
    report.check_replaceable(page)
    tokenizer = load_tokenizer(model)
    ids, first = tokenised(text, tokenizer, join, max_dropped=max_dropped)[0], bos_token(tokenizer, bos)
    read, rest = ids[: max_windows * seq_len], ids[max_windows * seq_len :]
    windows = pack((read, read), seq_len, "evaluation", first).tensors[0][:max_windows]
    chosen_by = draw(rest, num_samples, seq_len, seed, first)
    network = load_model(model, dtype).to(place)  # type: ignore[arg-type]
    check_ids(network, [ids], tokenizer)
    log_device(place, network.dtype)
    calibration = Calibration(list(chosen_by.split(1)))
    found = found_by(network, list(windows.split(1)), calibration, Cache(page.parent / "cells"), wanted)
    if launched_rank():
        return
    sizes = {"seq_len": seq_len, "stride": None, "max_windows": max_windows, "num_samples": num_samples}
    protocol = sizes | {"text": text, "join": join, "tokens": windows[:, 1:].numel(), "seed": seed}
    protocol |= {"bos": first is not None, "dtype": str(network.dtype).removeprefix("torch.")}
    record = as_record(found, model, wanted, protocol | {"torch": torch.__version__})
    report.write(record, page, overwrite=True)
    bos_too = "no BOS" if first is None else "BOS"
    print(
        f"{sensitivity_table(found)}\n\nperplexity over {len(windows)} windows of {seq_len} tokens of {text}, {bos_too}"
    )
    print(f"saved to {page} and {page.with_suffix('.json')}")


def _numbers(fractions: str) -> list[float]:
    try:
        wanted = [float(each) for each in fractions.split(",")]
    except ValueError as error:
        raise ValueError(f"fractions are numbers separated by commas, not {fractions!r}: 0.25,0.5,1") from error
    check_fractions(wanted)
    return wanted
