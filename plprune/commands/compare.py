"""`plprune compare`: methods, sparsities, models, texts and recoveries side by side, under one protocol."""

from collections.abc import Sequence

from plprune.checkpoint.stored import Dtype
from plprune.comparison import engine
from plprune.comparison.study import CalibrationText, Study, Training
from plprune.comparison.table import comparison_table
from plprune.evaluation.lm_eval import named
from plprune.evaluation.perplexity import Protocol
from plprune.io.distributed import launched_rank, resolve_device
from plprune.io.readers import PYDOC
from plprune.io.text import MAX_DROPPED
from plprune.methods import PruningMethod
from plprune.planning.serving import Runtime


def compare(
    models: list[str],
    methods: list[PruningMethod],
    output: str,
    text: list[str] | str,
    sparsities: Sequence[float] = (0.125, 0.25, 0.375, 0.5),
    seeds: Sequence[int] = (0,),
    serve_on: Sequence[Runtime] = (),
    tensor_parallel: int = 1,
    calibration: list[CalibrationText] | str = PYDOC,
    join: str | None = None,
    num_samples: int = 32,
    calibration_seq_len: int = 256,
    seq_len: int = 512,
    stride: int | None = None,
    bos: bool | None = None,
    max_windows: int | None = None,
    max_dropped: float = MAX_DROPPED,
    recover: list[Training] | Training | None = None,
    tasks: str = "",
    task_data: str | None = None,
    limit: int | None = None,
    max_batch: int | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> None:
    """Compares methods, sparsities, models, texts, recoveries and seeds under one protocol.

    Under torchrun, and in several runs with one output, each process takes what nobody is at, so that nothing is
    computed twice. Several machines must share the folder.

    Args:
        models: Names on the hub, folders, `.gguf` files, or `package://PACKAGE/FILE.gguf`.
        methods: FLAP, FASP, CFSP, TwoSSP, LearnedGates or dotted paths of others, each with its settings
            (`class_path`, `init_args`).
        output: Folder of the results: `report.html`, `report.json`, and what was computed, by its content; what is
            there is not computed again.
        text: What perplexity is measured on: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `pydoc_data.topics`, or
            `ORG/NAME[:CONFIG[:SPLIT]]` of the hub. Of a list, on each: the first is the one that is plotted.
        sparsities: Fractions of the blocks' parameters to remove, at which each method is taken.
        seeds: Of the choice of calibration windows and of recovery; every pruning is done with each.
        serve_on: Where every result must load: llama.cpp, vllm, transformers. What cannot be has no figures.
        tensor_parallel: Devices that will share every result: widths and heads are divisible by their number.
        calibration: Calibration text, likewise; not a text that is measured on. Or a list of `text`, `num_samples`,
            `seq_len` and `name`: every pruning is then done with each.
        join: Put between the rows of each text that is measured or calibrated on, which is then one document.
        num_samples: Calibration windows, unless `calibration` says.
        calibration_seq_len: Tokens of a calibration window, likewise.
        seq_len: Tokens of a window that perplexity is measured on.
        stride: Tokens from the start of one such window to that of the next; they do not overlap if not given.
        bos: Whether the BOS token is put before each window of every text and each prompt of a task; as the tokenizer
            does if not given.
        max_windows: At most this many such windows from the start of the text; all if not given.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used: in [0, 1].
        recover: How every pruned model is recovered: `text` to train on, `steps`, `seq_len`, `batch_size`,
            `learning_rate`, `lora`, `train`, `distill`, `rounds`; none is if not given. Of a list, each with a `name`,
            in all ways.
        tasks: lm-eval tasks, groups and tags, separated by commas; the average is over what is named here.
        task_data: Folder with the tasks' data sets as ORG/NAME; from the hub if not given.
        limit: At most this many examples of each task; all if not given.
        max_batch: The largest batch that speed is measured at; it is not measured if not given. Under torchrun the
            other processes compute meanwhile.
        dtype: Of the weights; as each model is stored if not given, and float32 for a `.gguf` file.
        device: Where to compute: cpu, cuda, cuda:1; under torchrun, `cuda` is each process's own. A GPU if not given
            and there is one, and the CPU otherwise.
    """
    study = Study(
        *(models, methods, sparsities, text, calibration, seeds),
        serve_on=serve_on,
        tensor_parallel=tensor_parallel,
        join=join,
        num_samples=num_samples,
        calibration_seq_len=calibration_seq_len,
        protocol=Protocol(seq_len, stride, bos, max_windows),
        max_dropped=max_dropped,
        recover=recover,
        tasks=named(tasks),
        task_data=task_data,
        limit=limit,
        max_batch=max_batch,
        dtype=dtype,
        device=resolve_device(device),
    )
    record = engine.compare(study, output)
    if not launched_rank():
        print(f"{comparison_table(record)}\n\nreport: {output}/report.html")
