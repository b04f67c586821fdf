"""`plprune compare`: methods, sparsities, models, texts and recoveries under one protocol."""

from collections.abc import Sequence

from plprune.checkpoint.stored import Dtype
from plprune.commands.options import shared_help
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


@shared_help
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

    Processes of torchrun, and several runs with the same output, share the work, and compute nothing twice. Several
    machines must share the output folder.

    Args:
        models: Names on the hub, folders, `.gguf` files, or `package://PACKAGE/FILE.gguf`.
        methods: FLAP, FASP, CFSP, TwoSSP, LearnedGates, REAP, BestOf or dotted paths of other classes, each with its
            settings (`class_path`, `init_args`).
        output: Folder to write: `report.html`, `report.json`, and a cache of single results. Results that are there are
            used.
        text: Text that perplexity is measured on: a `.txt`, `.jsonl`, `.json` or `.parquet` file,
            `pydoc_data.topics`, or `ORG/NAME[:CONFIG[:SPLIT]]` on the hub. Or a list of texts, of which the first is
            plotted.
        sparsities: Fractions of the blocks' parameters to remove; every method is run at each.
        seeds: Random seeds of the calibration windows and of recovery; every pruning is run with each.
        calibration: Calibration text, named like `text`, and different from it. Or a list of `text`, `num_samples`,
            `seq_len` and `name`: every pruning is run with each.
        join: Separator that joins the rows of each measured or calibration text into one document. If not given, every
            row is a document.
        num_samples: Number of calibration windows, unless `calibration` gives it.
        calibration_seq_len: Tokens per calibration window, unless `calibration` gives it.
        seq_len: Tokens per window that perplexity is measured on.
        stride: Tokens between the starts of two such windows. If not given, they do not overlap.
        bos: Whether a BOS token precedes each window of every text and each prompt of a task, true or false. If not
            given, as the tokenizer does.
        max_windows: Number of windows that are measured, from the start of each text; all if not given.
        recover: Recovery of every pruned model: `text` to train on, `steps`, `seq_len`, `batch_size`,
            `learning_rate`, `lora`, `train`, `distill`, `rounds`. Or a list of these, each with a `name`: every pruning
            is recovered by each. If not given, nothing is recovered.
        tasks: Names of lm-eval tasks, groups and tags, separated by commas. The average is over the names given here.
        max_batch: Largest batch that speed is measured at; if not given, speed is not measured.
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
