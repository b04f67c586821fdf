"""`plprune prune`: prunes a model without training."""

import logging
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from plprune import methods, streaming
from plprune.checkpoint import sharing
from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.save import save_pruned
from plprune.checkpoint.stored import Dtype
from plprune.commands.options import shared_help
from plprune.io import distributed
from plprune.io.atomic import check_output
from plprune.io.checks import check_max_dropped, check_seed, check_sizes
from plprune.io.distributed import resolve_device
from plprune.io.readers import PYDOC, check_text
from plprune.io.text import MAX_DROPPED, bos_token, draw, tokenised
from plprune.methods import PruningMethod, Request
from plprune.planning.serving import Runtime
from plprune.planning.targets import Target
from plprune.pruning.calibration import Calibration
from plprune.pruning.forward import check_ids
from plprune.pruning.plan_summary import plan_summary

log = logging.getLogger(__name__)


@shared_help
def prune(
    model: str,
    method: PruningMethod,
    output: str,
    target: Target = Target(),
    serve_on: Sequence[Runtime] = (),
    tensor_parallel: int = 1,
    text: str = PYDOC,
    join: str | None = None,
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 8,
    dtype: Dtype | None = None,
    device: str | None = None,
    offload: Literal["cpu", "disk"] | None = None,
    seed: int = 0,
    bos: bool | None = None,
    max_dropped: float = MAX_DROPPED,
    stream: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Prunes a model without training, and saves it in a folder that loads again.

    Args:
        output: Folder to write.
        text: Calibration text: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` on the hub,
            or `pydoc_data.topics`, which is part of Python and about Python only. Better is text for
            the model's purpose, or general text.
        num_samples: Number of calibration windows.
        seq_len: Tokens per window.
        batch_size: Windows per forward pass; it does not change the result.
        offload: Memory for hidden states between blocks, to save memory on the device: `cpu`, or `disk` with `stream`.
            If not given, they stay on the device.
        seed: Random seed that chooses the windows.
        stream: Keep the model on disk, in safetensors, and load, prune and write one block at a time. For models larger
            than memory.
        resume: Continue a stopped run of the same command with `stream`, if there is one.
        overwrite: Replace the output folder. Without `resume`, an unfinished run is deleted too.
    """
    check_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    streaming.check_run_output(output, stream, resume, overwrite)
    _check_text(text, seed, max_dropped)
    where, tokenizer = resolve_device(device), load_tokenizer(model)
    ids, _ = tokenised(text, tokenizer, join, seed=seed, max_dropped=max_dropped)
    windows = draw(ids, num_samples, seq_len, seed, bos_token(tokenizer, bos))
    request = Request(method, target, serve_on, tensor_parallel)
    methods.preflight(request, lambda: load_skeleton(model, dtype))
    network = _open(model, dtype, stream)
    check_ids(network, [ids], tokenizer)
    distributed.log_device(where, network.dtype)
    with distributed.process_group(where) as group:
        calibration = Calibration(list(windows.split(batch_size)), where, offload, group)
        if not stream:
            sharing.receive(network, group)
        first = distributed.rank(group) == 0
        finished = streaming.finished_plan(network, request, calibration, output, seed) if resume else None
        if finished:
            plan = finished
        elif stream:
            plan = streaming.prune_streamed(network, request, calibration, output, tokenizer, seed, resume, overwrite)
        else:
            check_output(output, overwrite)
            plan = request.prune(network, calibration, seed)
            if first:
                save_pruned(network, output, tokenizer, overwrite)
    if first:
        print(f"{'this run is finished: ' if finished else ''}{plan_summary(plan)}; saved to {output}")


def _open(name_or_path: str, dtype: Dtype | None, stream: bool) -> PreTrainedModel:
    """The model; of the processes of a node, only the first loads weights."""
    load = streaming.open_streamed if stream else load_skeleton if distributed.local_rank() else load_model
    return load(name_or_path, dtype)


def _check_text(text: str, seed: int, max_dropped: float) -> None:
    check_text(text)
    check_seed(seed)
    check_max_dropped(max_dropped)
    if text == PYDOC and not distributed.local_rank():
        log.warning(
            "calibrating on %s, which is about Python only: give text like what the model is for, by --text", text
        )
