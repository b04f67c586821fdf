"""Peak memory and time of pruning a model that streams from disk, at several depths, and what a 70B model will need.

    python -m tests.benchmarks.streaming [--blocks 8 16 32] [--methods FLAP FASP CFSP TwoSSP] [--offload disk]

Every run is a process of its own, on a random llama. Memory is counted from the moment when the model is open and its
non-block part (embeddings, head, norm) has been read: `anonymous` is what the process needs, `resident` includes pages
of mapped files, which the kernel takes back when it wants them. On an accelerator (`--device cuda`) its own peak is
shown too; `--limit` is how much of it the process may use, in GB.
"""

import argparse
import json
import multiprocessing
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from plprune import CFSP, FASP, FLAP, Calibration, PruningMethod, TwoSSP
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint.weights import INDEX
from plprune.methods import Request
from plprune.streaming import open_streamed, prune_streamed

METHODS: dict[str, PruningMethod] = {
    "FLAP": FLAP(0.2),
    "FASP": FASP(0.2),
    "CFSP": CFSP(0.2),
    "TwoSSP": TwoSSP(0.2, drop_attentions=1),
    "TwoSSP without stage 2": TwoSSP(0.2, drop_attentions=0),
}
GB = 1e9


def write_model(folder: Path, args: argparse.Namespace, blocks: int) -> None:
    """A random llama, one shard a block, without the whole of it in memory."""
    config = LlamaConfig(
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        num_hidden_layers=blocks,
        vocab_size=args.vocabulary,
        max_position_embeddings=args.seq_len,
        dtype=args.dtype,
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    places: dict[str, str] = {}
    for name, shapes in shards(model):
        weights = {key: torch.randn(shape).mul_(0.02).to(getattr(torch, args.dtype)) for key, shape in shapes.items()}
        weights |= {key: torch.ones_like(weight) for key, weight in weights.items() if weight.ndim == 1}
        save_file(weights, folder / name, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config.save_pretrained(folder)


def shards(model: torch.nn.Module) -> Iterator[tuple[str, dict[str, torch.Size]]]:
    names: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        place = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        names.setdefault(f"{place}.safetensors", {})[name] = parameter.shape
    yield from names.items()


def status(pid: int | str = "self") -> dict[str, float]:
    """Gigabytes by the kernel's account (Linux)."""
    lines = (line.split() for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 / GB for line in lines if line[-1:] == ["kB"]}


def run(pipe: Connection, folder: Path, args: argparse.Namespace, method: PruningMethod) -> None:
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cuda" and args.limit:
        torch.cuda.set_per_process_memory_fraction(args.limit * GB / torch.cuda.get_device_properties(0).total_memory)
    ids = torch.randint(5, args.vocabulary, (args.samples, args.seq_len), generator=torch.Generator().manual_seed(0))
    text = Calibration(list(ids.split(args.batch_size)), device, args.offload)
    model = open_streamed(str(folder), args.dtype)
    rest = [p for p in model.parameters() if not p.is_meta]
    for parameter in rest:
        parameter.sum(dtype=torch.float32)
    block = sum(p.numel() * p.element_size() for p in blocks_of(model)[0].module.parameters())
    torch.nn.functional.linear(torch.ones(64, 64, device=device), torch.ones(64, 64, device=device))  # libraries are up
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before, start = status(), time.monotonic()
    pipe.send("start")
    pipe.recv()
    prune_streamed(model, Request(method), text, folder.parent / "out")
    peak = torch.cuda.max_memory_allocated() / GB if device.type == "cuda" else 0.0
    pipe.send(
        {
            "seconds": time.monotonic() - start,
            "resident": status()["VmHWM"] - before["VmRSS"],
            "before": before["RssAnon"],
            "device": peak,
            "block": block / GB,
            "rest": sum(p.numel() * p.element_size() for p in rest) / GB,
        }
    )


def measured(folder: Path, args: argparse.Namespace, method: PruningMethod) -> dict[str, float]:
    """One run in a process of its own, whose anonymous memory is watched from here."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=run, args=(theirs, folder, args, method))
    process.start()
    theirs.close()
    ours.recv()
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], status(process.pid or "self").get("RssAnon", 0.0))

    watcher = threading.Thread(target=watch)
    watcher.start()
    ours.send("go")
    try:
        result = ours.recv()
    finally:
        done.set()
        watcher.join()
        process.join()
    shutil.rmtree(folder.parent / "out")
    return result | {"anonymous": peak[0] - result["before"]}


def needs_of_70b(name: str, row: dict[str, float], plain: dict[str, float], args: argparse.Namespace) -> str:
    """What a model of 80 blocks of width 8192 and FFN width 28672 takes, bfloat16, 128 windows of 2048 one by one.

    What a run takes beyond the block and the hidden states goes with the tokens of a batch times the FFN's width; what
    FASP takes beyond that (`plain` is CFSP's run) with the FFN's width squared.
    """
    hidden, ffn, tokens = 8192, 28672, 2048
    block = 2 * (2 * hidden * hidden + 2 * hidden * 1024 + 3 * hidden * ffn) / GB
    states = 0 if args.offload == "disk" else 2 * tokens_of(args) * args.hidden * args.bytes / GB
    each = ((plain if name == "FASP" else row)["anonymous"] - row["block"] - states) * GB
    each /= args.batch_size * args.seq_len * args.ffn
    square = max(0.0, row["anonymous"] - plain["anonymous"]) * GB / args.ffn**2 if name == "FASP" else 0.0
    device = block + each * tokens * ffn / GB + square * ffn**2 / GB
    return (
        f"{name}: {block:.1f} GB block + {each:.0f} bytes * {tokens} tokens * {ffn} channels"
        f"{f' + {square:.0f} bytes * {ffn}^2' if square else ''} = {device:.1f} GB on the device"
    )


def tokens_of(args: argparse.Namespace) -> int:
    return args.samples * args.seq_len


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--methods", nargs="+", default=list(METHODS)[:4])
    for name, value in {"hidden": 768, "ffn": 2048, "heads": 12, "kv_heads": 4, "vocabulary": 8192}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in {"samples": 16, "seq_len": 256, "batch_size": 4, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--offload", choices=["cpu", "disk"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=float)
    parser.add_argument("--folder", help="where to write the models")
    args = parser.parse_args()
    args.bytes = getattr(torch, args.dtype).itemsize
    print(
        f"{tokens_of(args)} tokens, batches of {args.batch_size}, {args.dtype}, {args.device}, offload {args.offload}"
    )
    print(f"hidden states of one block: {tokens_of(args) * args.hidden * args.bytes / 1e6:.0f} MB")
    print(
        f"{'':<24}{'blocks':>8}{'a block':>12}{'rest':>11}{'anonymous':>13}{'resident':>12}"
        f"{'device':>12}{'s a block':>11}"
    )
    rows: dict[str, dict[str, float]] = {}
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory(dir=args.folder) as room:
            folder = Path(room) / "model"
            folder.mkdir()
            write_model(folder, args, blocks)
            for name in args.methods:
                row = rows[name] = measured(folder, args, METHODS[name])
                sizes = "".join(
                    f"{1000 * row[key]:>9.0f} MB" for key in ("block", "rest", "anonymous", "resident", "device")
                )
                print(f"{name:<24}{blocks:>8}{sizes}{row['seconds'] / blocks:>11.2f}", flush=True)
    if "CFSP" in rows and args.device == "cpu":
        print(
            "\na 70B model (80 blocks, width 8192, FFN 28672), bfloat16, 128 windows of 2048, batches of 1, "
            "by the last rows:"
        )
        for name, row in rows.items():
            print(needs_of_70b(name, row, rows["CFSP"], args))
        print("host: hidden states 2 * 4.3 GB (offload cpu) or none (disk), embeddings and head 4.2 GB, mapped")


if __name__ == "__main__":
    main()
