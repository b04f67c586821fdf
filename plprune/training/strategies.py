"""How the processes of a training run share it: DeepSpeed's ZeRO and FSDP2, set up for adapters on a frozen model.

Lightning and DeepSpeed do the work. What is added: both save the adapters only, accumulated gradients are not divided
twice, a DeepSpeed config that contradicts the Trainer is refused, and a model of which only the first process has the
weights goes straight into shards.
"""

import importlib.util
import os
from collections.abc import Iterable
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
from plprune.training.deepspeed_internals import compile_nothing
from plprune.training.lightning_internals import data_source, set_data_parallel_size

TAG = "checkpoint"  # the folder that Lightning has DeepSpeed write to, inside of that of the checkpoint


class AsLoaded(DeepSpeedPrecision):
    """Leaves frozen weights in the dtype in which they were loaded, where Lightning would make 32-true of bfloat16."""

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module


class FrozenInHalf(Precision):
    """Leaves what is trained in float32, where Lightning's bf16-true and 16-true would round it.

    Args:
        precision: Which of the two.
    """

    def __init__(self, precision: Any) -> None:
        self.precision = precision


class DeepSpeed(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, with the settings that adapters on a frozen model need.

    Checkpoints hold what is trained only, and with `offload_optimizer` torch's AdamW runs on the CPU, so that nothing
    needs to be compiled. See Lightning's `DeepSpeedStrategy` for the arguments.

    Args:
        exclude_frozen_parameters: Whether checkpoints leave out what is not trained.
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
            raise ValueError("DeepSpeed needs GPUs, and this run has none: take the strategy ddp, or FSDP2, on CPUs")
        super().setup_environment()

    def setup(self, trainer: pl.Trainer) -> None:
        self.precision_plugin = AsLoaded(cast(Any, self.precision_plugin).precision)
        super().setup(trainer)

    def setup_distributed(self) -> None:
        super().setup_distributed()
        check_config(cast(dict[str, Any], self.config), cast(pl.LightningModule, self.lightning_module).trainer)

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """Leaves the division by `accumulate_grad_batches` to Lightning; DeepSpeed's engine would divide once more."""
        super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        if not self.load_full_weights:
            self._check_checkpoint(Path(checkpoint_path) / TAG)
        return super().load_checkpoint(checkpoint_path, weights_only)

    def _check_checkpoint(self, folder: Path) -> None:
        """Says in one line what would otherwise fail deep inside of DeepSpeed, on some ranks only."""
        rank = self.global_rank if self.zero_stage_3 else 0
        name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if self.zero_stage_3 else "mp_rank_00_model_states.pt"
        there = [path.name for path in folder.glob("*_optim_states.pt")]
        if there and len(there) != self.world_size:
            raise ValueError(
                f"{folder.parent} was written by {len(there)} processes and cannot be resumed by {self.world_size}, "
                "as DeepSpeed cuts its states by their number: start as many"
            )
        if there and not (folder / name).exists():
            raise ValueError(f"{folder.parent} was written with another ZeRO stage: resume it with the same")
        if there:
            # DeepSpeed, which reads it next, trusts the file as well.
            _check(self.lightning_module, torch.load(folder / name, map_location="cpu", weights_only=False))


class CPUDeepSpeed(DeepSpeed):
    """DeepSpeed on CPU processes: for tests, and to try a run out before GPUs are paid for. Slow.

    Nothing is compiled. Start the ranks with torchrun, or from a script.

    Args:
        persist_below: At stage 3, weights of fewer elements stay whole on every rank; DeepSpeed's 100000 would leave
            nothing of a small model to shard.
    """

    def __init__(self, *args: Any, persist_below: int = 0, **kwargs: Any) -> None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(*args, **kwargs)
        if self.zero_stage_3:
            cast(Any, self.config)["zero_optimization"].setdefault("stage3_param_persistence_threshold", persist_below)

    @DeepSpeedStrategy.parallel_devices.setter
    def parallel_devices(self, devices: list[torch.device] | None) -> None:
        # A CPU's index is None, where DeepSpeed wants those from 0 on.
        numbered = devices and [torch.device("cpu", i) for i in range(len(devices))]
        cast(Any, DeepSpeedStrategy.parallel_devices).fset(self, numbered)

    def setup_environment(self) -> None:
        compile_nothing()
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's is this, with a check that there is a GPU


class FSDP2(ModelParallelStrategy):
    """Weights, gradients and optimizer states in shards over all processes, by torch's `fully_shard`.

    Checkpoints are single files that hold what is trained only.

    Args:
        process_group_backend: nccl or gloo; by the device if not given.
        timeout: How long a process waits for the others.
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
    """Whether no process has whole weights while it trains: ZeRO-3, FSDP2."""
    return isinstance(strategy, ModelParallelStrategy) or bool(getattr(strategy, "zero_stage_3", False))


def fusable(strategy: Strategy) -> bool:
    """Whether AdamW takes its steps in one kernel: on a GPU, of whole parameters, and of gradients that are not scaled.

    The kernel would undo the scale of float16 by itself, after the gradients were clipped and logged.
    """
    scaled = getattr(strategy.precision_plugin, "scaler", None) is not None
    sharing = shards(strategy) or isinstance(strategy, DeepSpeedStrategy)
    return not scaled and not sharing and strategy.root_device.type == "cuda"


def check_strategy(strategy: Strategy) -> None:
    """Makes sure that a strategy is not one of Lightning's that is silently wrong here.

    Raises:
        ValueError: It is.
    """
    if isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, DeepSpeed):
        raise ValueError(
            "Lightning's DeepSpeedStrategy divides accumulated gradients twice: take "
            "plprune.training.strategies.DeepSpeed, "
            "as configs/strategy/zero2.yaml does"
        )
    if isinstance(strategy, ModelParallelStrategy) and not isinstance(strategy, FSDP2):
        raise ValueError(
            "Lightning's ModelParallelStrategy gives all processes of a node the same data: take "
            "plprune.training.strategies.FSDP2, as configs/strategy/fsdp2.yaml does"
        )


def frozen_in_half(parameters: Iterable[nn.Parameter], strategy: Strategy) -> None:
    """Gives weights the dtype that bf16-true and 16-true ask for, and leaves all others as they are.

    Raises:
        ValueError: The strategy would round what is trained.
    """
    plugin = strategy.precision_plugin
    if plugin.precision not in ("bf16-true", "16-true"):
        return
    if isinstance(strategy, DeepSpeedStrategy):
        raise ValueError(
            f"under DeepSpeed trainer.precision {plugin.precision} would round what is trained: "
            "take bf16-mixed, or 32-true with model.dtype bfloat16"
        )
    strategy.precision_plugin = FrozenInHalf(plugin.precision)
    dtype = torch.bfloat16 if plugin.precision == "bf16-true" else torch.float16
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def held(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, which may be in shards."""
    return parameter.to_local() if isinstance(parameter, DTensor) else getattr(parameter, "ds_tensor", parameter)


def whole(parameter: Tensor) -> Tensor:
    """The full value of a parameter on the CPU, wherever its shards are; all processes must ask for it together."""
    if isinstance(parameter, DTensor):
        return cast(DTensor, parameter.detach()).full_tensor().cpu()
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().to("cpu", copy=True)


def description(strategy: Strategy, processes: int, size: int) -> str:
    """One line on what each process of a run holds.

    Args:
        strategy: Of the run.
        processes: How many there are.
        size: Of the model's weights, in bytes.

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
        held += f"; optimizer states{' and weights' * ('offload_param' in zero)} wait in the CPU's memory"
    name = f"ZeRO-{stage}" if zero else type(strategy).__name__.removesuffix("Strategy")
    if processes == 1:
        return f"1 process{f', {name}' * (stage > 0)}: it holds {held}"
    return f"{processes} processes, {name}: each takes {part} every batch, and holds {held}"


def _zero(strategy: Strategy) -> dict[str, Any]:
    config = strategy.config if isinstance(strategy, DeepSpeedStrategy) else None
    return config.get("zero_optimization", {}) if isinstance(config, dict) else {}


def split(model: PreTrainedModel, strategy: Strategy) -> None:
    """Puts the parameters of the first process's model into shards on all processes, one parameter at a time.

    Args:
        model: The whole model on the first process; of the others' only the structure matters.
        strategy: One that shards.
    """
    if any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in model.parameters()):
        return
    if isinstance(strategy, ModelParallelStrategy):
        _into_fsdp2(model, strategy)
    else:
        _into_zero3(model, cast(DeepSpeedStrategy, strategy))


def check_config(config: dict[str, Any], trainer: pl.Trainer) -> None:
    """Makes sure that a DeepSpeed config says nothing else than the Trainer, and leaves what it repeats to that.

    Raises:
        ValueError: They contradict each other.
    """
    for key, (value, where) in _said_by_trainer(trainer).items():
        block, _, name = key.rpartition(".")
        holder = config.get(block) if block else config
        if holder is None or value is None:
            continue
        said = holder.pop(name, "auto")
        if said not in ("auto", value):
            raise ValueError(
                f"the DeepSpeed config has {key}: {said}, but {where} is {value}: make them equal, or remove the key"
            )
        if block:
            holder[name] = value
    for key in ("optimizer", "scheduler"):
        if key in config:
            raise ValueError(f"the DeepSpeed config has {key}, but the module brings its own: remove the key")


def _said_by_trainer(trainer: pl.Trainer) -> dict[str, tuple[Any, str]]:
    """Keys of a DeepSpeed config that repeat a setting of the run: its value, and what that is called there."""
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
        "fp16.enabled": (precision.startswith("16"), f"that of trainer.precision={precision}"),
        "bf16.enabled": (precision.startswith("bf16"), f"that of trainer.precision={precision}"),
    }


def _into_fsdp2(model: PreTrainedModel, strategy: ModelParallelStrategy) -> None:
    mesh = strategy.device_mesh["data_parallel"]
    state = model.state_dict() if strategy.is_global_zero else {}
    _empty(model, torch.device("meta"))
    for block in blocks_of(model):
        fully_shard(block.module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    _empty(model, strategy.root_device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, state, options=options)


def _into_zero3(model: PreTrainedModel, strategy: DeepSpeedStrategy) -> None:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context

    shutdown_init_context()  # Lightning's, in which whatever makes a tensor would make it in shards
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in reversed(list(model.modules())):  # children first, as a module is converted with those it contains
        if any(p.is_meta for p in module.parameters(recurse=False)):
            _replace(module, torch.device("cpu"), made)
        if any(True for _ in module.parameters(recurse=False)):
            deepspeed.zero.Init(module=module, config_dict_or_path=strategy.config)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(strategy.root_device)
    restore_init_context()


def _empty(model: nn.Module, device: torch.device) -> None:
    """Moves all parameters to a device, without their values; `to_empty` would take buffers too, and tear ties."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        _replace(module, device, made)


def _replace(module: nn.Module, device: torch.device, made: dict[nn.Parameter, nn.Parameter]) -> None:
    """Gives a module empty parameters on a device; those that were tied stay so."""
    for name, old in list(module.named_parameters(recurse=False)):
        if old not in made:
            made[old] = nn.Parameter(torch.empty_like(old, device=device), requires_grad=old.requires_grad)
        setattr(module, name, made[old])


def _check(module: pl.LightningModule | None, checkpoint: dict[str, Any]) -> None:
    """Has a module refuse a checkpoint before anything of it is loaded."""
    check = getattr(module, "check_checkpoint", None)
    if check is not None:
        check(checkpoint)
