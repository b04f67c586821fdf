"""The help of options that several commands share."""

import inspect
from collections.abc import Callable
from typing import TypeVar

import docstring_parser

Command = TypeVar("Command", bound=Callable[..., None])
HELP = {
    "model": "A folder, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.",
    "method": "Pruning method: FLAP, FASP, CFSP, TwoSSP, LearnedGates, REAP, BestOf, or the dotted path of another "
    "class. `--method.help NAME` lists its settings.",
    "target": "Upper limits for the pruned model. If given, the sparsity is computed from them, and "
    "`method.sparsity` is ignored.",
    "serve_on": "Programs that must load the result: llama.cpp, vllm, decilm (mlx-lm, SGLang), transformers. "
    "Widths and heads are rounded to sizes that they accept; a model that they cannot load is refused.",
    "tensor_parallel": "Number of devices that will share the result: widths and heads become multiples of it.",
    "text": "Text to read: a `.txt`, `.jsonl`, `.json` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` on the hub, or "
    "`pydoc_data.topics`, which is part of Python.",
    "join": 'Separator that joins the rows of the text into one document, such as "\\n\\n" for WikiText. If not given, '
    "every row is a document.",
    "bos": "Whether a BOS token precedes each window, true or false. If not given, as the tokenizer does.",
    "max_dropped": "Largest share of the text's rows that may be dropped as unusable, from 0 to 1.",
    "dtype": "Data type of the weights. If not given, as stored, and float32 for a `.gguf` file.",
    "device": "Device that computes: cpu, cuda, cuda:1. If not given, a GPU if there is one. Under torchrun, `cuda` is "
    "each process's own GPU.",
    "task_data": "Folder with the data sets of tasks as ORG/NAME, and with your own tasks as YAML files. If not given, "
    "data sets come from the hub.",
    "limit": "Number of examples of each task; all if not given.",
    "trust_remote_code": "Run the Python files that come with the model, for a family that transformers lacks. Read "
    "them first.",
    "overwrite": "Replace the output if it exists.",
}


def shared_help(command: Command) -> Command:
    """Adds the help of shared options to a command's docstring, which ends with its `Args:` section."""
    text = inspect.cleandoc(command.__doc__ or "")
    described = {each.arg_name for each in docstring_parser.parse(text).params}
    shared = [name for name in inspect.signature(command).parameters if name not in described]
    command.__doc__ = "\n".join([text, *(f"    {name}: {HELP[name]}" for name in shared)])
    return command
