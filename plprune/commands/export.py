"""`plprune export`: a model in the formats of other programs, with proof."""

import functools

from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.stored import Dtype
from plprune.export import formats, parity
from plprune.io.atomic import check_output
from plprune.io.checks import check_max_dropped, check_sizes
from plprune.io.readers import PYDOC, check_text
from plprune.io.text import MAX_DROPPED, bos_token, pack, tokenised
from plprune.pruning.forward import check_ids


def export(
    model: str,
    output: str,
    to: str = ",".join(formats.FORMATS),
    dtype: Dtype | None = None,
    gguf: formats.GgufDtype | None = None,
    widen: bool = False,
    pad_to: int = 1,
    text: str = PYDOC,
    seq_len: int = 128,
    max_windows: int = 2,
    bos: bool | None = None,
    max_dropped: float = MAX_DROPPED,
    overwrite: bool = False,
) -> None:
    """Writes a model in the formats of other programs, loads it again there, and compares.

    Args:
        model: A folder, pruned or dense, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        output: Folder to write: the formats, `parity.json`, and a model card with the same table.
        to: Formats, separated by commas: hf, for transformers; gguf, for llama.cpp; decilm, for vLLM, SGLang,
            TensorRT-LLM and mlx-lm.
        dtype: Of the weights; as stored if not given, and float32 for a `.gguf` file.
        gguf: Of the matrices in a GGUF file; as `dtype` if not given.
        widen: Whether value channels that FASP removed are put back as zeros, where a format cannot do without them:
            the same function in a larger model.
        pad_to: FFN widths are padded with zeros up to a multiple of this: the same function in a larger model.
        text: What to compare by: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the
            hub, or `pydoc_data.topics`.
        seq_len: Tokens of a window to compare by.
        max_windows: How many windows to compare by.
        bos: Whether the BOS token is put before each window: true or false; as the tokenizer does if not given.
        max_dropped: The share of a text's rows that may be dropped, as they cannot be used: in [0, 1].
        overwrite: Whether to replace what is in the output folder.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows)
    wanted, how = [each.strip() for each in to.split(",")], formats.Options(gguf, widen, pad_to)
    formats.check_formats(wanted)
    check_output(output, overwrite)
    check_text(text)
    check_max_dropped(max_dropped)
    tokenizer = load_tokenizer(model)
    stream = tokenised(text, tokenizer, max_dropped=max_dropped)
    windows = pack(stream, seq_len, "comparison", bos_token(tokenizer, bos)).tensors[0][:max_windows].clone()
    check_ids(load_skeleton(model), [windows], tokenizer)
    load = functools.partial(load_model, model, dtype)
    rows = formats.export(model, load, tokenizer, output, wanted, windows, how, overwrite)
    print(f"{parity.parity_table(rows)}\n\nsaved to {output}; the text: {windows.numel()} tokens of {text}")
