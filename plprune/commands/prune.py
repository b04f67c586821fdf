"""`plprune prune`: one model, one method, no training."""

import logging
from collections.abc import Sequence
from typing import Literal

from transformers import PreTrainedModel

from plprune import methods, streaming
from plprune.checkpoint import sharing
from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.save import save_pruned
from plprune.checkpoint.stored import Dtype
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
from plprune.training.callbacks import record

log = logging.getLogger(__name__)


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
    """Prunes a model without training, and saves a folder that loads again.

    Args:
        model: A name on the hub, a folder, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        method: How to prune: FLAP, FASP, CFSP, TwoSSP, LearnedGates or the dotted path of another; `--method.help
            NAME` lists its settings.
        output: Folder to write.
        target: What the result may be at most: `sparsity` is then found by it, and what is given for it does not count.
        serve_on: Where the result must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served
            there, and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share the result: widths and heads are divisible by their number.
        text: Calibration text: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub,
            or `pydoc_data.topics`, which is there without a hub, but about Python only: give text like what the model
            is for, or general text.
        join: Put between the rows of the text, which are then one document; every row is one if not given.
        num_samples: Calibration windows.
        seq_len: Tokens of a window.
        batch_size: Windows that are run at once; the result does not depend on it.
        dtype: Of the weights; as stored if not given, and float32 for a `.gguf` file.
        device: Where the current block is calibrated: cpu, cuda, cuda:1; under torchrun, `cuda` is each process's own.
            A GPU if not given and there is one, and the CPU otherwise.
        offload: Where hidden states wait, to save memory on the device: in the CPU's memory, or, with `stream`, on
            disk.
        seed: Of the choice of windows.
        bos: Whether the BOS token is put before each window: true or false; as the tokenizer does if not given.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used: in [0, 1].
        stream: Whether the model stays on disk, where it must be in safetensors, and one block at a time is loaded,
            pruned and written: for models that are larger than memory.
        resume: Whether to go on where an earlier streaming run of the same command was stopped, if there is one.
        overwrite: Whether to replace what is in the output folder, and to forget an unfinished run unless `resume`.
    """
    check_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    streaming.check_run_output(output, stream, resume, overwrite)
    _check_text(text, seed, max_dropped)
    place, tokenizer = resolve_device(device), load_tokenizer(model)
    ids, _ = tokenised(text, tokenizer, join, seed=seed, max_dropped=max_dropped)
    windows = draw(ids, num_samples, seq_len, seed, bos_token(tokenizer, bos))
    request = Request(method, target, serve_on, tensor_parallel)
    methods.preflight(request, lambda: load_skeleton(model, dtype))
    network = _open(model, dtype, stream)
    check_ids(network, [ids], tokenizer)
    distributed.log_device(place, network.dtype)
    with distributed.process_group(place) as group:
        calibration = Calibration(list(windows.split(batch_size)), place, offload, group)
        if not stream:
            sharing.receive(network, group)
        inputs = streaming.run_inputs(network, request, calibration, seed) if resume else {}
        finished, first = resume and streaming.finished_plan(output, inputs), distributed.rank(group) == 0
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
        print(f"{'this run is finished: ' if finished else ''}{record.summary(plan)}; saved to {output}")


def _open(name_or_path: str, dtype: Dtype | None, stream: bool) -> PreTrainedModel:
    """The model, with weights in the first process of each node only."""
    load = streaming.open_streamed if stream else load_skeleton if distributed.local_rank() else load_model
    return load(name_or_path, dtype)


def _check_text(text: str, seed: int, max_dropped: float) -> None:
    check_text(text)
    check_seed(seed)
    check_max_dropped(max_dropped)
    if text == PYDOC and not distributed.local_rank():
        log.warning("calibrating on %s, which is about Python only: give --text what the model is for", text)
