"""Strategies for several processes: DeepSpeed's ZeRO and FSDP2, set up for adapters on a frozen model.

Lightning's strategies do most of the work. These subclasses save trained parameters only, keep DeepSpeed from dividing
accumulated gradients a second time, refuse a DeepSpeed config that contradicts the Trainer, and shard a model whose
weights only the first process has loaded.
"""

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.plugins.precision import DeepSpeedPrecision, Precision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from plprune.architecture.blocks import blocks_of
from plprune.io.units import format_value
from plprune.training.deepspeed_internals import skip_compilation
from plprune.training.lightning_internals import data_source, set_data_parallel_size

TAG = "checkpoint"  # the folder in a checkpoint that DeepSpeed writes to


class LoadedPrecision(DeepSpeedPrecision):
    """Keeps frozen weights in the dtype they were loaded in; Lightning's 32-true would convert them to float32."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class FrozenHalfPrecision(Precision):
    """Keeps trained parameters in float32; Lightning's bf16-true and 16-true would round them.

    Args:
        precision: bf16-true or 16-true.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with the settings that adapters on a frozen model need.

    Checkpoints hold trained parameters only. With `offload_optimizer`, torch's AdamW runs on the CPU, so that nothing
    has to be compiled. For the other arguments see Lightning's `DeepSpeedStrategy`.

    Args:
        exclude_frozen_parameters: Whether checkpoints leave out frozen parameters.
    """

    def __init__(self, *args: Any, exclude_frozen_parameters: bool = True, **kwargs: Any) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ImportError("the strategy DeepSpeed needs DeepSpeed: pip install 'plprune[deepspeed]'")
        super().__init__(*args, exclude_frozen_parameters=exclude_frozen_parameters, **kwargs)
        assert isinstance(self.config, dict)
        self.config.setdefault("zero_force_ds_cpu_optimizer", False)
        self.config.setdefault("zero_allow_untested_optimizer", True)

    def setup_environment(self) -> None:
        if not isinstance(self.accelerator, CUDAAccelerator):
            raise ValueError("DeepSpeed needs GPUs, and this run has none: use the strategy ddp or FSDP2 on CPUs")
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        self.precision_plugin = LoadedPrecision(cast(Any, self.precision_plugin).precision)
        super().setup(trainer)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        check_config(cast(dict[str, Any], self.config), cast(pl.LightningModule, self.lightning_module).trainer)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Leaves the division by `accumulate_grad_batches` to Lightning; DeepSpeed's engine would divide again."""
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if not self.load_full_weights:
            self._check_checkpoint(Path(checkpoint_path) / TAG)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _check_checkpoint(self, folder: Path) -> None:
        """Refuses in one line a checkpoint at which some ranks would fail deep inside of DeepSpeed."""
        rank = self.global_rank if self.zero_stage_3 else 0
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if self.zero_stage_3 else "mp_rank_00_model_states.pt"
        writers = len(list(folder.glob("*_optim_states.pt")))
        if not writers:
            return
        if writers != self.world_size:
            raise ValueError(
                f"{folder.parent} was written by {writers} processes and cannot be resumed by {self.world_size}, "
                "because DeepSpeed splits its states by the number of processes: start as many"
            )
        if not (folder / name).exists():
            raise ValueError(f"{folder.parent} was written with another ZeRO stage: resume it with the same")
        # DeepSpeed unpickles the file as well.
        _check(self.lightning_module, torch.load(folder / name, map_location="cpu", weights_only=False))


class CPUDeepSpeed(DeepSpeed):
    """DeepSpeed on CPU processes, for tests and rehearsals: slow, but without GPUs and without compiling anything.

    Start the ranks with torchrun, or from a script.

    Args:
        persist_below: At stage 3, weights with fewer elements stay whole on every rank. DeepSpeed's default of 100000
            would leave nothing of a small model to shard.
    """

    def __init__(self, *args: Any, persist_below: int = 0, **kwargs: Any) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(*args, **kwargs)
        if self.zero_stage_3:
            cast(Any, self.config)["zero_optimization"].setdefault("stage3_param_persistence_threshold", persist_below)

    @DeepSpeedStrategy.parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        # Lightning gives CPU devices no index, and DeepSpeed needs one.
        numbered = devices and [torch.device("cpu", i) for i in range(len(devices))]
        cast(Any, DeepSpeedStrategy.parallel_devices).fset(self, numbered)

    def setup_environment(self) -> None:
        skip_compilation()
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's does the same, and requires a GPU


class FSDP2(ModelParallelStrategy):
    """Shards weights, gradients and optimizer states over all processes by torch's `fully_shard`.

    A checkpoint is a single file with the trained parameters only.

    Args:
        process_group_backend: nccl or gloo; if not given, chosen by the device.
        timeout: The time after which a process stops waiting for the others.
    """

    def __init__(self, process_group_backend: str | None = None, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(1, 1, False, process_group_backend, timeout)

    def setup_environment(self) -> None:
        set_data_parallel_size(self, self.num_nodes * self.num_processes)
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        return get_model_state_dict(cast(nn.Module, self.model), options=options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = self.broadcast(checkpoint_path)
        _check(self.lightning_module, torch.load(path, mmap=True, map_location="cpu", weights_only=weights_only))
        return super().load_checkpoint(path, weights_only)


def shards(strategy: Strategy) -> bool:
    """Whether a strategy splits the weights over the processes: ZeRO-3 and FSDP2 do."""
    return isinstance(strategy, ModelParallelStrategy) or bool(getattr(strategy, "zero_stage_3", False))


def fusable(strategy: Strategy) -> bool:
    """Whether fused AdamW can be used: on a GPU, with whole parameters, and without the gradient scaler of float16.

    The fused kernel would undo the scale by itself, after the gradients were clipped and logged.
    """
    scaled = getattr(strategy.precision_plugin, "scaler", None) is not None
    sharing = shards(strategy) or isinstance(strategy, DeepSpeedStrategy)
    return not scaled and not sharing and strategy.root_device.type == "cuda"


def check_strategy(strategy: Strategy, whole_weights: Mapping[str, bool] = {}) -> None:
    """Refuses the strategies of Lightning that would give wrong results here without an error.

    Args:
        strategy: The strategy.
        whole_weights: The options that need whole weights, and whether each is set.

    Raises:
        ValueError: It is one of them, or splits weights that must be whole.
    """
    for option in (name for name, is_set in whole_weights.items() if is_set and shards(strategy)):
        raise ValueError(f"{option} needs whole weights, which ZeRO-3 and FSDP2 split: leave it out, or use ddp")
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, DeepSpeed):
        raise ValueError(
            "Lightning's DeepSpeedStrategy divides accumulated gradients twice: use "
            "plprune.training.strategies.DeepSpeed, as configs/strategy/zero2.yaml does"
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise ValueError(
            "Lightning's ModelParallelStrategy gives all processes of a node the same data: use "
            "plprune.training.strategies.FSDP2, as configs/strategy/fsdp2.yaml does"
        )


def cast_frozen(parameters: Iterable[nn.Parameter], strategy: Strategy) -> None:
    """Casts frozen parameters to the dtype of bf16-true or 16-true; other precisions leave them as they are.

    Raises:
        ValueError: The strategy would round trained parameters.
    """
    plugin = strategy.precision_plugin
    if plugin.precision not in ("bf16-true", "16-true"):
        return
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"under DeepSpeed trainer.precision {plugin.precision} would round trained parameters: "
            "use bf16-mixed, or 32-true with model.dtype bfloat16"
        )
    strategy.precision_plugin = FrozenHalfPrecision(plugin.precision)
    dtype = torch.bfloat16 if plugin.precision == "bf16-true" else torch.float16
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def local_part(parameter: Tensor) -> Tensor:
    """The part of a parameter that this process holds: its shard, or all of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def gather(parameter: Tensor) -> Tensor:
    """Copies a parameter to the CPU, whole even if it is sharded; all processes must call this together."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach()).full_tensor().cpu()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True)


def description(strategy: Strategy, processes: int, size: int) -> str:
    """Describes in one line what each process of a run holds.

    Args:
        strategy: The strategy.
        processes: The number of processes.
        size: The size of the model's weights in bytes.

    Example:
        2 processes, ZeRO-2: each takes 1/2 of every batch, and holds the whole model (538 MB) and 1/2 of the gradients
        and optimizer states
    """
    weights, part = format_value(size, "bytes"), f"1/{processes} of"
    zero = _zero(strategy)
    stage = 3 if isinstance(strategy, ModelParallelStrategy) else zero.get("stage", 0)
    held = {
        0: f"the whole model ({weights})",
        1: f"the whole model ({weights}) and {part} the optimizer states",
        2: f"the whole model ({weights}) and {part} the gradients and optimizer states",
        3: f"{part} the model ({weights} in all), gradients and optimizer states",
    }[stage]
    if "offload_optimizer" in zero:
        held += f"; optimizer states{' and weights' * ('offload_param' in zero)} are in the CPU's memory"
    name = f"ZeRO-{stage}" if zero else type(strategy).__name__.removesuffix("Strategy")
    if processes == 1:
        return f"1 process{f', {name}' * (stage > 0)}: it holds {held}"
    return f"{processes} processes, {name}: each takes {part} every batch, and holds {held}"


def _zero(strategy: Strategy) -> dict[str, Any]:
    config = strategy.config if isinstance(strategy, DeepSpeedStrategy) else None
    return config.get("zero_optimization", {}) if isinstance(config, dict) else {}


def shard(model: PreTrainedModel, strategy: Strategy) -> None:
    """Distributes the parameters of the first process's model in shards over all processes, one at a time.

    Args:
        model: The model, whose weights only the first process needs to have.
        strategy: ZeRO-3 or FSDP2.
    """
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        return
    if isinstance(strategy, ModelParallelStrategy):
        _shard_fsdp2(model, strategy)
    else:
        _shard_zero3(model, cast(DeepSpeedStrategy, strategy))


def shard_frozen(model: PreTrainedModel, strategy: Strategy) -> tuple[nn.Module, Callable[[], None]]:
    """Shards a model that is not trained, as :func:`shard` does.

    Returns:
        The module whose forward pass runs it, and what frees its memory once nothing else holds it.
    """
    model.requires_grad_(False)
    shard(model, strategy)
    if isinstance(strategy, ModelParallelStrategy):
        return model, lambda: None
    import deepspeed

    zero = {name: value for name, value in _zero(strategy).items() if name != "offload_optimizer"}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()

    def free() -> None:
        engine.destroy()
        for parameter in model.parameters():  # DeepSpeed keeps the modules, and with them the shards
            for tensor in (cast(Any, parameter).ds_tensor, parameter):
                tensor.data = tensor.new_empty(0)

    return cast(nn.Module, engine), free


def check_config(config: dict[str, Any], trainer: pl.Trainer) -> None:
    """Refuses a DeepSpeed config that contradicts the Trainer, and removes the keys that only repeat it.

    Raises:
        ValueError: They contradict each other.
    """
    for key, (value, where) in _trainer_settings(trainer).items():
        block, _, name = key.rpartition(".")
        settings = config.get(block) if block else config
        if settings is None or value is None:
            continue
        given = settings.pop(name, "auto")
        if given not in ("auto", value):
            raise ValueError(
                f"the DeepSpeed config has {key}: {given}, but {where} is {value}: make them equal, or remove the key"
            )
        if block:
            settings[name] = value
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(f"the DeepSpeed config has {key}, but plprune.Recovery sets its own: remove the key")


def _trainer_settings(trainer: pl.Trainer) -> dict[str, tuple[Any, str]]:
    """The keys of a DeepSpeed config that repeat a setting of the run, each with its value and name there."""
    source = getattr(trainer, "datamodule", None) or data_source(trainer)
    batch, k = getattr(source, "batch_size", None), trainer.accumulate_grad_batches
    precision = str(trainer.precision)
    return {
        "train_micro_batch_size_per_gpu": (batch, "the data's batch_size"),
        "gradient_accumulation_steps": (k, "trainer.accumulate_grad_batches"),
        "train_batch_size": (
            batch and batch * k * trainer.world_size,
            "batch_size times trainer.accumulate_grad_batches times the number of processes",
        ),
        "gradient_clipping": (trainer.gradient_clip_val or 0.0, "trainer.gradient_clip_val"),
        "fp16.enabled": (precision.startswith("16"), f"the value for trainer.precision={precision}"),
        "bf16.enabled": (precision.startswith("bf16"), f"the value for trainer.precision={precision}"),
    }


def _shard_fsdp2(model: PreTrainedModel, strategy: ModelParallelStrategy) -> None:
    mesh = strategy.device_mesh["data_parallel"]
    state = model.state_dict() if strategy.is_global_zero else {}
    _empty(model, torch.device("meta"))
    for block in blocks_of(model):
        fully_shard(block.module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _empty(model, strategy.root_device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def _shard_zero3(model: PreTrainedModel, strategy: DeepSpeedStrategy) -> None:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()  # Lightning's context would shard every new tensor
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in reversed(list(model.modules())):  # children first: a module is converted with its submodules
        if any(p.is_meta for p in module.parameters(recurse=False)):
            _replace(module, torch.device("cpu"), made)
        if any(True for _ in module.parameters(recurse=False)):
            deepspeed.zero.Init(module=module, config_dict_or_path=strategy.config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(strategy.root_device)
    restore_init_context()


def _empty(model: nn.Module, device: torch.device) -> None:
    """Moves parameters to a device without their values; `to_empty` would take buffers too, and untie weights."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        _replace(module, device, made)


def _replace(module: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives a module empty parameters on a device, the same for tied weights."""
    for name, old in list(module.named_parameters(recurse=False)):
        if old not in made:
            made[old] = nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
        setattr(module, name, made[old])


def _check(module: pl.LightningModule | None, checkpoint: dict[str, Any]) -> None:
    """Lets a module refuse a checkpoint before it is loaded."""
    check = getattr(module, "check_checkpoint", None)
    if check is not None:
        check(checkpoint)
