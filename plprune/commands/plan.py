"""`plprune plan`: predicts sizes, memory, time and export formats of a pruning, without weights."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from plprune.architecture.blocks import UNITS, blocks_of
from plprune.checkpoint.load import load_skeleton, resolve_dtype, stored_weights
from plprune.checkpoint.stock_config import stock_config
from plprune.checkpoint.stored import Dtype
from plprune.commands.options import shared_help
from plprune.export.formats import format_refusals, unknown_formats
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
from plprune.streaming import return_freed_memory

Record = dict[str, Any]


@shared_help
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
    """Predicts, without weights, the sizes, memory, time and export formats of a pruning.

    Args:
        model: A folder, in which `config.json` is enough, a name on the hub, a `.gguf` file, or
            `package://PACKAGE/FILE.gguf`.
        context: Tokens per sequence, for FLOPs and KV cache. If not given, that of `target`.
        device: Device to estimate for: T4, L4, A10, RTX-3090, RTX-4090, L40S, A100-40GB, A100-80GB, H100, H200, B200,
            MI300X; or this machine's cpu or cuda, whose speed is measured for two seconds. If not given, this machine's
            GPU, or its CPU without one.
        num_samples: Number of calibration windows.
        seq_len: Tokens per calibration window.
        batch_size: Calibration windows per forward pass.
        steps: Training steps of the recovery by LoRA.
        train_seq_len: Tokens per training window.
        train_batch_size: Training windows per step.
        rank: Mean rank of the LoRA adapters.
        gradient_checkpointing: Estimate a recovery that recomputes activations, to save memory.
        stream: Estimate `plprune prune --stream`, which keeps the model on disk.
        output: JSON file to write the same numbers to.
    """
    check_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size, context=context, steps=steps)
    check_sizes(train_seq_len=train_seq_len, train_batch_size=train_batch_size, rank=rank)
    if output is not None:
        check_output_file(output, overwrite)
    return_freed_memory(size=1 << 24, reserve=1 << 26)
    dtype = resolve_dtype(stored_weights(model, fetch=False), dtype)
    network, where = load_skeleton(model, dtype), hardware.machine(device or default_device())
    if stream:
        method.check_weights(network)
    request = Request(method, target, serve_on, tensor_parallel)
    resolved = request.resolve_target(network)
    record, rehearsed = predicted(network, request, resolved, context or target.context)
    record |= {"model": model, "dtype": dtype, "machine": dataclasses.asdict(where)}
    calibrating = (num_samples, seq_len, batch_size)
    work = resolved.work(network, num_samples, seq_len)
    ways = ("in_memory",) if method.unstreamable else ("in_memory", "streamed")
    record["calibration"] = {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size} | {
        way: dataclasses.asdict(needs.calibration_need(network, work, where, calibrating, way == "streamed"))
        for way in ways
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
    """Predicts the result of a pruning.

    Args:
        network: The model, on the meta device.
        request: The request as the user made it.
        resolved: The request with the sparsity that its target needs.
        context: Tokens per sequence.

    Returns:
        The record, in JSON's types, and the pruned models of all possible outcomes, on the meta device.
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
        "anatomy": _anatomy(network),
        "blocks": _blocks(network, cases),
        "dropped": _range([len(blocks_of(network)) - len(blocks_of(m)) for m in models]),
        "without_ffn": _range([sum(not block.has_ffn for block in blocks_of(m)) for m in models]),
        "export": _exports(models),
    }
    return record, models


def plan_text(record: Record, stream: bool = False, checkpointing: bool = False) -> str:
    """The text to print."""
    parts = [
        _head(record),
        _units(record),
        _sizes(record),
        _kept(record),
        _needs(record, stream, checkpointing),
        _formats(record),
    ]
    return "\n\n".join("\n".join(part) for part in parts)


def _range(values: Sequence[float]) -> Record:
    """The typical value, which is the first case's, and the extremes."""
    return {"typical": values[0], "least": min(values), "most": max(values)}


def _anatomy(network: PreTrainedModel) -> list[Record]:
    """For each kind of block its indices, for each kind of unit their number and the projections around them, and for
    those that it has none of the reason.
    """
    kinds: dict[str, Record] = {}
    for block in blocks_of(network):
        units = {
            group.kind: {
                "units": len(group),
                "producers": list(dict.fromkeys(part.path for part in group.producers)),
                "consumer": group.consumer.path,
            }
            for group in block.all_groups
        }
        whole = {**block.anatomy.whole, **block.anatomy.refused}
        kind = {"blocks": [], "units": units, "whole": whole}
        kinds.setdefault(json.dumps([units, whole]), kind)["blocks"].append(block.index)
    return list(kinds.values())


def _units(record: Record) -> list[str]:
    """One line for each kind of block."""
    lines = []
    for kind in record["anatomy"]:
        parts = [
            f"{found['units']} {UNITS[unit]} ({', '.join(found['producers'])} -> {found['consumer']})"
            for unit, found in kind["units"].items()
            if unit != "value"
        ]
        lines.append(f"{len(kind['blocks'])} blocks of: {'; '.join(parts) or 'no units'}")
        lines += [f"  {UNITS[unit]} stay at {why}" for unit, why in kind["whole"].items()]
    return lines


def _blocks(network: PreTrainedModel, cases: Sequence[Mapping[str, int]]) -> list[Record]:
    """For each block, the number of units of each kind, and the range of how many are kept."""
    found: list[Record] = [{} for _ in blocks_of(network)]
    for block in blocks_of(network):
        for group in block.all_groups:
            if any(group.name in case for case in cases):
                kept = [case.get(group.name, len(group)) for case in cases]
                found[block.index][group.kind] = {"units": len(group)} | _range(kept)
    return found


def _exports(models: Sequence[PreTrainedModel]) -> Record:
    """For each format, whether all, some or no cases fit, and the reasons against it."""
    reasons = [format_refusals(m) for m in models]
    found: Record = {}
    for name in reasons[0]:
        fitting = [not each[name] for each in reasons]
        why = next((each[name] for each in reasons if each[name]), [])
        unknown = name in unknown_formats()
        fits = "unknown" if unknown else "yes" if all(fitting) else "maybe" if any(fitting) else "no"
        found[name] = {"fits": fits, "reasons": why}
    stock = [stock_config(m) is not None for m in models]
    found["hf"]["stock"] = "yes" if all(stock) else "maybe" if any(stock) else "no"
    return found


def _parameters(network: PreTrainedModel) -> int:
    return sum(p.numel() for p in network.parameters())


# ---- printing


def _head(record: Record) -> list[str]:
    lines = [f"{record['method']} on {record['model']} in {record['dtype']}, sparsity {record['sparsity']:.4g}"]
    for name, found in record["targets"].items():
        form = "bytes" if name == "memory" else "short"
        reached, asked = (format_value(found[key], form) for key in ("reached", "asked"))
        lines.append(f"target.{name}: at most {reached} ({asked} asked)")
    if record["guess"]:
        lines.append("a guess: the method does not predict its sizes")
    return lines


def _sizes(record: Record) -> list[str]:
    before, after, context = record["before"], record["after"], record["context"]
    rows: list[tuple[str, str, Form, float]] = [
        ("parameters", "parameters", "short", 1),
        ("  in the blocks", "block_parameters", "short", 1),
        ("  that a token reaches", "active_parameters", "short", 1),
        ("weights", "weight_bytes", "bytes", 1),
        (f"KV cache of {context} tokens", "cache_bytes", "bytes", 1),
        ("  per token", "cache_bytes", "bytes", context),
        ("FLOPs per token, prefill", "reading_flops", "short", 1),
        ("  decoding", "generating_flops", "short", 1),
    ]
    if before["reading_flops"] == before["generating_flops"]:
        rows.pop()
    if before["active_parameters"] == before["parameters"]:
        rows.remove(next(row for row in rows if row[1] == "active_parameters"))
    lines = [f"{'':<28}{'before':>12}   after"]
    for title, key, form, of in rows:
        later = _between(after[key], lambda x, f=form, n=of: format_value(x / n, f))
        lines.append(f"{title:<28}{format_value(before[key] / of, form):>12}   {later}")
    removed = _between(record["removed"], lambda x: f"{x:.1%}")
    return [*lines, f"{'removed from the blocks':<28}{'':>12}   {removed}"]


def _kept(record: Record) -> list[str]:
    """For each kind of unit, how many a block keeps on average, at least and at most."""
    lines = []
    if record["dropped"]["most"]:
        before = len(record["blocks"])
        lines.append(f"{'blocks':<28}{before:>12}   {_between(record['dropped'], lambda x: f'{before - x:.0f}')}")
    if record["without_ffn"]["most"]:
        lines.append(f"{'blocks without their FFN':<28}{0:>12}   {_between(record['without_ffn'], '{:.0f}'.format)}")
    for kind, name in UNITS.items():
        blocks = [block[kind] for block in record["blocks"] if kind in block]
        if blocks:
            units = sorted({each["units"] for each in blocks})
            least, most = min(each["least"] for each in blocks), max(each["most"] for each in blocks)
            dense = "-".join(map(str, sorted({units[0], units[-1]})))
            usual = f"{statistics.mean(each['typical'] for each in blocks):.0f}"
            kept = usual if least == most else f"{usual} on average ({least} to {most})"
            lines.append(f"{f'{name} of a block':<28}{dense:>12}   {kept}")
    return lines


def _needs(record: Record, stream: bool, checkpointing: bool) -> list[str]:
    where, calibration, recovery = Machine(**record["machine"]), record["calibration"], record["recovery"]
    rate = where.rate(getattr(torch, record["dtype"]))
    source = f"{hardware.UTILISATION:.0%} of its peak assumed" if where.name in hardware.GPUS else "measured"
    memory = format_value(where.memory, "bytes")
    windows = "{num_samples} windows of {seq_len} tokens, {batch_size} at once".format(**calibration)
    training = "{steps} steps of {batch_size} windows of {seq_len} tokens, rank {rank}".format(**recovery)
    needs = {f"calibration, {windows}": calibration["streamed" if stream else "in_memory"]}
    if not stream and "streamed" in calibration:
        needs["  with --stream"] = calibration["streamed"]
    needs[f"recovery, {training}"] = recovery["checkpointed" if checkpointing else "plain"]
    if not checkpointing:
        needs["  with gradient checkpointing"] = recovery["checkpointed"]
    head = f"on {where.name}: {rate / 1e12:.3g} TFLOPS in {record['dtype']} ({source}), {memory} of memory"
    return [head, *(f"{title}: {_need(values, where)}" for title, values in needs.items())]


def _need(values: Record, where: Machine) -> str:
    need = Need(**values)
    fits = "" if need.device_bytes <= where.memory else ", which does not fit"
    host = f", and {format_value(need.host_bytes, 'bytes')} of main memory" if where.separate else ""
    return f"about {format_duration(need.seconds)}, {format_value(need.device_bytes, 'bytes')}{fits}{host}"


def _formats(record: Record) -> list[str]:
    lines = ["plprune export:"]
    words = {"yes": "fits", "no": "does not fit", "maybe": "fits or not, depending on the data", "unknown": "not known"}
    custom = "with a modelling file, which trust_remote_code=True loads"
    kinds = {"yes": "a stock checkpoint", "no": custom, "maybe": f"a stock checkpoint, or {custom}"}
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
