"""`plprune plan`: what a pruning would come to, before any weight is there."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from plprune.architecture.blocks import UNITS, blocks_of
from plprune.checkpoint.load import load_skeleton, resolve_dtype, stored_weights
from plprune.checkpoint.stored import Dtype
from plprune.export.fits import exports, is_stock, unknown_formats
from plprune.io.atomic import check_output_file, staged
from plprune.io.checks import check_sizes
from plprune.io.distributed import default_device
from plprune.io.units import Form, format_duration, format_value
from plprune.methods import PruningMethod, Request
from plprune.planning import hardware, needs, sizes
from plprune.planning.hardware import Machine
from plprune.planning.needs import Need
from plprune.planning.serving import Runtime
from plprune.planning.targets import Target

Record = dict[str, Any]


def plan(
    model: str,
    method: PruningMethod,
    target: Target = Target(),
    serve_on: Sequence[Runtime] = (),
    tensor_parallel: int = 1,
    context: int | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 8,
    steps: int = 1000,
    train_seq_len: int = 512,
    train_batch_size: int = 8,
    rank: int = 16,
    gradient_checkpointing: bool = False,
    stream: bool = False,
    output: str | None = None,
    overwrite: bool = False,
) -> None:
    """Says, without weights, what a pruning would come to, need, and be served by.

    Args:
        model: A folder, in which `config.json` is enough, a name on the hub, a `.gguf` file, or
            `package://PACKAGE/FILE.gguf`.
        method: How to prune: FLAP, FASP, CFSP, TwoSSP, LearnedGates or the dotted path of another; `--method.help
            NAME` lists its settings.
        target: What the result may be at most: `sparsity` is then found by it, and what is given for it does not count.
        serve_on: Where the result must load: llama.cpp, vllm, transformers. Its sizes are then such as can be served
            there, and its sparsity as near to the one asked for as that allows; what cannot be is refused.
        tensor_parallel: Devices that will share the result: widths and heads are divisible by their number.
        context: Tokens of a sequence, for operations and cache; those of `target` if not given.
        dtype: Of the weights; as stored if not given, and float32 for a `.gguf` file.
        device: Where to calibrate and to recover: T4, L4, A10, RTX-3090, RTX-4090, L40S, A100-40GB, A100-80GB, H100,
            H200, B200 or MI300X; or cpu or cuda, this machine's, whose speed is measured for two seconds. If not
            given, a GPU that is there, and the CPU otherwise.
        num_samples: Calibration windows.
        seq_len: Tokens of a calibration window.
        batch_size: Calibration windows that are run at once.
        steps: Steps of the recovery by LoRA.
        train_seq_len: Tokens of a training window.
        train_batch_size: Windows of a step.
        rank: Mean rank of the adapters.
        gradient_checkpointing: Whether the recovery computes activations again, to save memory.
        stream: Whether the model stays on disk while it is pruned, as by `plprune prune --stream`.
        output: A JSON file to write the same to.
        overwrite: Whether to replace what is there.
    """
    check_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size, context=context, steps=steps)
    check_sizes(train_seq_len=train_seq_len, train_batch_size=train_batch_size, rank=rank)
    if output is not None:
        check_output_file(output, overwrite)
    dtype = resolve_dtype(stored_weights(model, fetch=False), dtype)
    network, where = load_skeleton(model, dtype), hardware.machine(device or default_device())
    request = Request(method, target, serve_on, tensor_parallel)
    resolved = request.resolve_target(network)
    record, rehearsed = predicted(network, request, resolved, context or target.context)
    record |= {"model": model, "dtype": dtype}
    record["machine"] = dataclasses.asdict(where)
    calibrating = (num_samples, seq_len, batch_size)
    work = resolved.work(network, num_samples, seq_len)
    record["calibration"] = {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size} | {
        way: dataclasses.asdict(needs.calibration_need(network, work, where, calibrating, way == "streamed"))
        for way in ("in_memory", "streamed")
    }
    training, largest = (steps, train_batch_size, train_seq_len), max(rehearsed, key=_parameters)
    record["recovery"] = {"steps": steps, "seq_len": train_seq_len, "batch_size": train_batch_size, "rank": rank} | {
        way: dataclasses.asdict(needs.recovery_need(largest, where, training, rank, way == "checkpointed"))
        for way in ("plain", "checkpointed")
    }
    if output:
        with staged(output, overwrite) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n")
    print(plan_text(record, stream, gradient_checkpointing) + (f"\n\nsaved to {output}" if output else ""))


def predicted(
    network: PreTrainedModel, request: Request, resolved: Request, context: int
) -> tuple[Record, list[PreTrainedModel]]:
    """What a pruning would make of a model, in JSON's types, and the models of all cases, without weights.

    Args:
        network: The model, its weights on meta.
        request: As it was asked for.
        resolved: With the sparsity that its target comes to.
        context: Tokens of a sequence.
    """
    cases, method = resolved.predict_sizes(network), resolved.method
    name, sparsity = type(method).__name__, method.sparsity
    models = [sizes.pruned_skeleton(network, case, method.biased, name, sparsity) for case in cases]
    before, after = sizes.structure(network, context), [sizes.structure(m, context) for m in models]
    reached = [request.reached(m).get("targets", {}) for m in models]
    record = {
        "version": 1,
        "kind": "plan",
        "method": name,
        "settings": request.settings,
        "sparsity": sparsity,
        "guess": type(method).predict_sizes is PruningMethod.predict_sizes,
        "context": context,
        "targets": {
            key: found | {"reached": max(r[key]["reached"] for r in reached)} for key, found in reached[0].items()
        },
        "before": dataclasses.asdict(before),
        "after": {key: _range([getattr(one, key) for one in after]) for key in dataclasses.asdict(before)},
        "removed": _range([1 - one.block_parameters / before.block_parameters for one in after]),
        "blocks": _blocks(network, cases),
        "export": _exports(models),
    }
    return record, models


def plan_text(record: Record, stream: bool = False, checkpointing: bool = False) -> str:
    """The record for people."""
    parts = [_head(record), _sizes(record), _kept(record), _needs(record, stream, checkpointing), _formats(record)]
    return "\n\n".join("\n".join(part) for part in parts)


def _range(values: Sequence[float]) -> Record:
    """Of the cases: the first, which is typical, and the ends."""
    return {"typical": values[0], "least": min(values), "most": max(values)}


def _blocks(network: PreTrainedModel, cases: Sequence[Mapping[str, int]]) -> list[Record]:
    """Of each block and kind of unit: how many there are, and how many would be kept."""
    found: list[Record] = [{} for _ in blocks_of(network)]
    for block in blocks_of(network):
        for group in (*block.groups("kv_heads"), *block.groups("value_channels")[:-1]):
            if any(group.name in case for case in cases):
                kept = [case.get(group.name, len(group)) for case in cases]
                found[block.index][group.kind] = {"units": len(group)} | _range(kept)
    return found


def _exports(models: Sequence[PreTrainedModel]) -> Record:
    """Of each format, whether no, some or all cases fit, and why not."""
    reasons = [exports(m) for m in models]
    found: Record = {}
    for name in reasons[0]:
        fitting = [not each[name] for each in reasons]
        why = next((each[name] for each in reasons if each[name]), [])
        unknown = name in unknown_formats()
        fits = "unknown" if unknown else "yes" if all(fitting) else "maybe" if any(fitting) else "no"
        found[name] = {"fits": fits, "reasons": why}
    stock = [is_stock(m) for m in models]
    found["hf"]["stock"] = "yes" if all(stock) else "maybe" if any(stock) else "no"
    return found


def _parameters(network: PreTrainedModel) -> int:
    return sum(p.numel() for p in network.parameters())


# ---- for people


def _head(record: Record) -> list[str]:
    lines = [f"{record['method']} on {record['model']} in {record['dtype']}, sparsity {record['sparsity']:.4g}"]
    for name, found in record["targets"].items():
        form = "bytes" if name == "memory" else "short"
        reached, asked = (format_value(found[key], form) for key in ("reached", "asked"))
        lines.append(f"target.{name}: at most {reached} ({asked} asked)")
    if record["guess"]:
        lines.append("a guess: the method does not say what sizes it will come to")
    return lines


def _sizes(record: Record) -> list[str]:
    before, after, context = record["before"], record["after"], record["context"]
    rows: list[tuple[str, str, Form, float]] = [
        ("parameters", "parameters", "short", 1),
        ("  in the blocks", "block_parameters", "short", 1),
        ("weights", "weight_bytes", "bytes", 1),
        (f"KV cache of {context} tokens", "cache_bytes", "bytes", 1),
        ("  of each", "cache_bytes", "bytes", context),
        ("FLOPs for a token, reading", "reading_flops", "short", 1),
        ("  generating", "generating_flops", "short", 1),
    ]
    if before["reading_flops"] == before["generating_flops"]:
        rows.pop()
    lines = [f"{'':<28}{'before':>12}   after"]
    for title, key, form, of in rows:
        later = _between(after[key], lambda x, f=form, n=of: format_value(x / n, f))
        lines.append(f"{title:<28}{format_value(before[key] / of, form):>12}   {later}")
    removed = _between(record["removed"], lambda x: f"{x:.1%}")
    return [*lines, f"{'removed of the blocks':<28}{'':>12}   {removed}"]


def _kept(record: Record) -> list[str]:
    """What all blocks together keep of each kind, and the blocks that keep least and most."""
    lines = []
    for kind, name in UNITS.items():
        own = [block[kind] for block in record["blocks"] if kind in block]
        if own:
            units = sorted({each["units"] for each in own})
            least, most = min(each["least"] for each in own), max(each["most"] for each in own)
            dense = "-".join(map(str, sorted({units[0], units[-1]})))
            usual = f"{statistics.mean(each['typical'] for each in own):.0f}"
            kept = usual if least == most else f"{usual} on average ({least} to {most})"
            lines.append(f"{f'{name} of a block':<28}{dense:>12}   {kept}")
    return lines


def _needs(record: Record, stream: bool, checkpointing: bool) -> list[str]:
    where = Machine(**record["machine"])
    calibration, recovery = record["calibration"], record["recovery"]
    at = where.rate(getattr(torch, record["dtype"]))
    source = f"{hardware.UTILISATION:.0%} of its peak assumed" if where.name in hardware.GPUS else "measured"
    memory = format_value(where.memory, "bytes")
    lines = [f"on {where.name}: {at / 1e12:.3g} TFLOPS in {record['dtype']} ({source}), {memory} to be had"]
    lines.append(
        f"calibration, {calibration['num_samples']} windows of {calibration['seq_len']} tokens, "
        f"{calibration['batch_size']} at once: {_need(calibration['streamed' if stream else 'in_memory'], where)}"
    )
    if not stream:
        lines.append(f"  with --stream: {_need(calibration['streamed'], where)}")
    lines.append(
        f"recovery, {recovery['steps']} steps of {recovery['batch_size']} windows of {recovery['seq_len']} tokens, "
        f"rank {recovery['rank']}: {_need(recovery['checkpointed' if checkpointing else 'plain'], where)}"
    )
    if not checkpointing:
        lines.append(f"  with gradient checkpointing: {_need(recovery['checkpointed'], where)}")
    return lines


def _need(values: Record, where: Machine) -> str:
    need = Need(**values)
    fits = "" if need.device_bytes <= where.memory else ", which does not fit"
    host = f", and {format_value(need.host_bytes, 'bytes')} of main memory" if where.separate else ""
    return f"about {format_duration(need.seconds)}, {format_value(need.device_bytes, 'bytes')}{fits}{host}"


def _formats(record: Record) -> list[str]:
    lines = ["plprune export:"]
    words = {"yes": "fits", "no": "does not fit", "maybe": "fits or not, as the data decide", "unknown": "not known"}
    own = "with its own modelling file, which trust_remote_code=True loads"
    kinds = {"yes": "a stock checkpoint", "no": own, "maybe": f"a stock checkpoint, or {own}"}
    for name, found in record["export"].items():
        if name == "hf":
            lines.append(f"  {name:<8}fits, {kinds[found['stock']]}")
        else:
            reasons = f": {'; '.join(found['reasons'])}" if found["reasons"] else ""
            lines.append(f"  {name:<8}{words[found['fits']]}{reasons}")
    return lines


def _between(found: Record, show: Callable[[float], str]) -> str:
    least, most = show(found["least"]), show(found["most"])
    return least if least == most else f"{least} to {most}"
