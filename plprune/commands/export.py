"""`plprune export`: writes a model in other programs' formats, and compares their output with the model's."""

import functools
from typing import Any

from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.stored import Dtype
from plprune.commands.options import shared_help
from plprune.export import formats, parity
from plprune.io.atomic import check_output
from plprune.io.checks import check_max_dropped, check_sizes
from plprune.io.readers import PYDOC, check_text
from plprune.io.text import MAX_DROPPED, bos_token, pack, tokenised
from plprune.pruning.forward import check_ids


@shared_help
def export(
    model: str,
    output: str,
    to: str = "hf,gguf,decilm",
    dtype: Dtype | None = None,
    gguf: formats.GgufDtype | None = None,
    quantize: str | None = None,
    quantizer: str | None = None,
    widen: bool = False,
    pad_to: int | None = None,
    vllm: str | None = None,
    tensor_parallel: int = 1,
    text: str = PYDOC,
    seq_len: int = 128,
    max_windows: int = 2,
    bos: bool | None = None,
    max_dropped: float = MAX_DROPPED,
    overwrite: bool = False,
) -> None:
    """Writes a model in other programs' formats, loads it there, and compares the outputs.

    Args:
        output: Folder to write: the formats, `parity.json`, and a model card with the printed table.
        to: Formats, separated by commas: hf, for transformers; vllm, the same folder, read by vLLM too; gguf, for
            llama.cpp; decilm, for mlx-lm, SGLang, TensorRT-LLM and older vLLM.
        gguf: Data type of the matrices in a GGUF file. If not given, `dtype`.
        quantize: Types of further GGUF files, separated by commas, which llama.cpp's own quantiser makes of the first:
            q8_0, q6_k, q5_k_m, q4_k_m.
        quantizer: Path of the program `llama-quantize`. If not given, it is looked for on the PATH, and then in the
            package llama-cpp-python.
        widen: Restore value channels that FASP removed, as zeros, where a format needs them. The model is larger, and
            computes the same.
        pad_to: Pad FFN widths with zeros to a multiple of this. The model is larger, and computes the same. If not
            given, GGUF files that are quantised are padded to the blocks of their types, 32 or 256.
        vllm: Python of an environment with vLLM, to read the folder there. If not given, this one.
        tensor_parallel: Number of devices that share the model in vLLM. A model whose widths and heads they cannot
            share is refused.
        seq_len: Tokens per window of the comparison.
        max_windows: Number of windows of the comparison.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows)
    kinds: Any = tuple(each.strip() for each in quantize.split(",")) if quantize else ()
    how = formats.Options(gguf, kinds, quantizer, widen, pad_to, vllm, tensor_parallel)
    wanted = [each.strip() for each in to.split(",")]
    formats.check_formats(wanted, how)
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
