"""The LightningModule that recovers a pruned (or dense) causal language model."""

import functools
import logging
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.text import Perplexity
from typing_extensions import Self

from plprune.architecture import modules
from plprune.architecture.blocks import blocks_of
from plprune.checkpoint import sharing
from plprune.checkpoint.load import load_model, load_skeleton, load_tokenizer
from plprune.checkpoint.remote_code import allow_remote_code
from plprune.checkpoint.stored import Dtype
from plprune.io import distributed
from plprune.io.checks import check_non_negative
from plprune.io.text import IGNORED
from plprune.pruning.losses import counted_positions
from plprune.pruning.plan import fingerprint
from plprune.pruning.surgery import plan_of
from plprune.recovery import lora as adapters
from plprune.recovery import whole_weights
from plprune.recovery.distillation import Distillation, Teacher, check_teacher, choose_teacher
from plprune.recovery.lora import LoRA
from plprune.recovery.whole_weights import Train
from plprune.training import lightning_internals, random_states
from plprune.training.data import Lookahead
from plprune.training.foreign_callbacks import check_callbacks
from plprune.training.objective import Objective
from plprune.training.optimisation import gradient_norms, warmup_cosine
from plprune.training.run_identity import Run, check_parameters, check_same_run, check_written_by_recovery, identify
from plprune.training.strategies import (
    cast_frozen,
    check_strategy,
    description,
    fusable,
    local_part,
    shard,
    shard_frozen,
    shards,
)
from plprune.training.throughput import Throughput

log = logging.getLogger(__name__)

REMEDY = (
    ": training stops, and the model is not saved; lower model.learning_rate, or compute in more than float16 "
    "(trainer.precision bf16-mixed or 32-true)"
)
ENDLESS = "the learning rate needs an end of training: set trainer.max_steps or trainer.max_epochs"
SMALLEST_DENOMINATOR = 1e-30  # a divisor for steps in which no token counts


class Recovery(pl.LightningModule):
    """Trains a causal language model by LoRA, with ranks that follow the importance of its blocks.

    The model is loaded at once; a `Prune` callback prunes it in its `setup`, and the adapters are added right after.
    Checkpoints hold trained parameters only. A checkpoint of another run is refused: of another base model, plan, text
    or setting, except those in `plprune.training.run_identity.FREE`. For a data module other than `RecoveryData`, the
    text is compared if it has `fingerprint()`.

    Of several processes on one node only the first loads the model; the others receive its weights, whole or, under
    ZeRO-3 and FSDP2, in shards.

    Args:
        name_or_path: A name on the hub, a folder (a pruned one too), a `.gguf` file, or `package://PACKAGE/FILE.gguf`
            for a file inside an installed Python package.
        dtype: The dtype of the frozen weights, unless `trainer.precision` is bf16-true or 16-true; if not given, the
            stored one, and float32 for a `.gguf` file. Trained parameters are float32.
        lora: The adapters.
        learning_rate: The peak of AdamW's learning rate.
        weight_decay: AdamW's weight decay.
        warmup: The fraction of all steps in which the learning rate rises; after that it falls as a cosine to 0.
        gradient_checkpointing: Whether to save memory by computing activations again in the backward pass.
        compile: Whether to compile the blocks for training batches, which takes minutes at the first step.
        train: What to train: adapters (lora), or, without adapters, the weights and biases of the projections whose
            inputs were pruned (consumers: `o_proj` and `down_proj` of llama), of all blocks if nothing was pruned,
            those of the routers of mixtures of experts (routers), or all parameters of the text decoder (all).
        distill: How to learn from the dense model; if not given, only the text is learnt.
        trust_remote_code: Whether to run the Python files that come with the model, for families that transformers
            lacks. Read them first.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: Dtype | None = None,
        lora: LoRA = LoRA(),
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
        compile: bool = False,
        train: Train = "lora",
        distill: Distillation | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_non_negative(learning_rate=learning_rate, weight_decay=weight_decay, warmup=warmup)
        if trust_remote_code:
            allow_remote_code(name_or_path)
        self.tokenizer = load_tokenizer(name_or_path)
        load = load_skeleton if distributed.local_rank() else load_model
        self.model = load(name_or_path, dtype)
        self.name_or_path = name_or_path
        self._loaded_in: Dtype = cast(Dtype, str(self.model.dtype).removeprefix("torch."))
        self.lora, self.distill = lora, distill
        self.trains: Train = train
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.gradient_checkpointing, self.compiles = gradient_checkpointing, compile
        self.val_perplexity = Perplexity(ignore_index=IGNORED)
        self.ranks: list[int] = []
        lacking = modules.lacks_weights(self.model)
        self._content = None if lacking else fingerprint(self.model.named_parameters())  # of the model as it was loaded
        self._base: dict[str, str | None] = {}  # hashes of the weights and the plan that are trained on
        self._run: Run = {}
        self._random_states: dict[str, Tensor] = {}  # of all processes, by kind of device
        self._denominators: list[Tensor] = []  # of the step, up to each of its batches that is still to come
        self._not_finite_step = torch.tensor(-1)  # the first step whose loss was not finite
        self._teacher: Teacher | None = None
        if distill is not None:
            check_teacher(distill, self.model, self.tokenizer)

    @property
    def is_prepared(self) -> bool:
        """Whether the parameters to train exist: adapters, or unfrozen weights."""
        return bool(self._base)

    @property
    def run(self) -> Run:
        """The options that identify this run, once it is set up."""
        return self._run

    def contents(self, data: Any) -> dict[str, str | None]:
        """Hashes of the model and of the texts of a data module, by option name."""
        texts = data.fingerprint() if hasattr(data, "fingerprint") else {}
        model = distributed.broadcast_object(self._content, distributed.world())
        return {"model.name_or_path": model} | {f"data.{part}": content for part, content in texts.items()}

    def configure_callbacks(self) -> list[pl.Callback]:
        """Refuses callbacks that cannot work, in the first hook that runs in all processes; adds none."""
        callbacks: list[pl.Callback] = cast(Any, self.trainer).callbacks
        check_callbacks(callbacks, self._metric_names() if type(self) is Recovery else None)
        return []

    def prepare_data(self) -> None:
        """Logs how the processes share the run, in its first hook."""
        if self.trainer.is_global_zero and self.trainer.state.fn == "fit":
            size = sum(p.numel() * p.element_size() for p in self.model.parameters())
            log.info("%s", description(self.trainer.strategy, self.trainer.world_size, size))

    def setup(self, stage: str) -> None:
        """Adds the adapters, or unfreezes weights, unless that is done."""
        dora = self.lora.dora and self.trains == "lora"
        check_strategy(self.trainer.strategy, {"model.lora.dora": dora, "model.compile": self.compiles})
        sharded = shards(self.trainer.strategy)
        if not sharded:
            sharing.receive(self.model, distributed.world())
        frozen = [p for p in self.model.parameters() if not (self._base and p.requires_grad)]
        cast_frozen(frozen, self.trainer.strategy)
        if not self._base:
            self._prepare()
            if sharded and any(block.expert_count for block in blocks_of(self.model)):
                self.model.enable_input_require_grads()  # or ZeRO-3 reduces gradients in a first mixture too early
        self.strict_loading = not (sharded or isinstance(self.trainer.strategy, DeepSpeedStrategy))
        if stage == "fit":
            self._choose_teacher()
            self.model.train()
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()
        self._run = self._identify(stage)
        self._objective = Objective(self.model, self._teacher, not sharded, self.compiles)

    def configure_model(self) -> None:
        """Splits the weights into shards, if the strategy needs it."""
        if shards(self.trainer.strategy):
            shard(self.model, self.trainer.strategy)

    def cpu(self) -> Self:
        """Skips a model without weights, for which Lightning's call after a failure would hide the failure."""
        return self if any(p.is_meta for p in self.parameters()) else super().cpu()

    def forward(self, input_ids: Tensor) -> Tensor:  # [b, s] -> [b, s, vocabulary]
        return self.model(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's share in the loss of the step: the mean over all tokens that count in it, in all processes."""
        progress, times = self.trainer.fit_loop.epoch_loop.batch_progress, self.trainer.accumulate_grad_batches
        done = progress.current.ready
        if not self._denominators or (done - 1) % times == 0:
            self._begin_step(batch, int(min(-done % times, self.trainer.num_training_batches - done)))
        so_far, losses = self._denominators.pop(0), self._objective.losses(batch, self._step_denominators)
        self._step_losses += torch.stack(list(losses.values())).detach()
        means = self.trainer.strategy.reduce(self._step_losses.clone(), reduce_op="sum")
        means = means * (self._step_denominators[0] / so_far[0])
        for name, value in zip(losses, means, strict=True):
            self.log(name, value, prog_bar=name == "train_loss")
        first = (self._not_finite_step < 0) & ~means[0].isfinite()
        self._not_finite_step = self._not_finite_step.masked_fill(first, self.trainer.global_step + 1)
        if self.device.type == "cpu":  # elsewhere reading the value would wait for the device
            self._check_losses()
        self._throughput.count(batch["input_ids"].numel() * self.trainer.world_size)
        # Lightning divides by the number of batches, and gradients are averaged over the processes.
        return losses["train_loss"] * (times * self.trainer.world_size)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "val_perplexity")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._evaluate(batch, "test_perplexity")

    def on_train_start(self) -> None:
        self._check_equal_counts(self.trainer.num_training_batches)
        self._not_finite_step = torch.tensor(-1, device=self.device)
        if self._teacher is not None:
            self._teacher.prepare(self._coming_windows(), quiet=not self.trainer.is_global_zero)
        random_states.set_random_states(self._random_states, self.device)
        self._log_ranks()
        self._by_block = [[p for p in b.module.parameters() if p.requires_grad] for b in blocks_of(self.model)]
        quiet = sys.stderr.isatty() or not self.trainer.is_global_zero  # a terminal shows Lightning's bar
        steps = int(self.trainer.estimated_stepping_batches)
        self._throughput = Throughput(self.trainer.global_step, steps, quiet)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs the norms of the accumulated gradients of all processes, before they are clipped."""
        if not lightning_internals.logs_are_due(self.trainer) or isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        norms = gradient_norms(self._by_block).cpu()  # one transfer instead of one for each value
        if not norms.isfinite().all() and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise ValueError(f"the gradient of step {self.trainer.global_step + 1} is not finite{REMEDY}")
        names = [f"grad_norm/block_{i:02}" for i in range(len(norms))]
        self.log_dict(dict(zip(names, norms.unbind(), strict=True)) | {"grad_norm/total": norms.norm()})

    def on_train_epoch_end(self) -> None:
        self._check_weights()
        if self._teacher is not None:
            self._teacher.free()

    def on_train_end(self) -> None:
        self._throughput.close()

    def on_validation_start(self) -> None:
        trainer = self.trainer
        self._check_equal_counts(trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches)

    def on_test_start(self) -> None:
        self._check_equal_counts(self.trainer.num_test_batches)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step % (getattr(self.trainer, "log_every_n_steps", 1) or 1) == 0:
            self._check_losses()
        tokens_per_second, minutes_left = self._throughput.measure(self.trainer.global_step)
        # Tensors on the CPU: Lightning would put numbers on the GPU, and wait for it.
        self.log("tokens_per_second", torch.tensor(tokens_per_second), prog_bar=True)
        if minutes_left is not None:
            self.log("minutes_left", torch.tensor(minutes_left), prog_bar=True, logger=False)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = fusable(self.trainer.strategy) or None  # False would also turn off torch's foreach implementation
        optimizer: Optimizer = AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay, fused=fused)
        if fused:
            lightning_internals.allow_clipping(optimizer)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(ENDLESS)
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, int(steps), self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_weights()
        trained = self._trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        entry = {"base": self._base, "trained": trained, "run": self._run}
        checkpoint["plprune"] = entry | {"random_states": random_states.gather_random_states(self.device)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self._random_states = checkpoint["plprune"]["random_states"]
        if "state_dict" in checkpoint:  # DeepSpeed and FSDP2 load it themselves
            trained = self._trained()
            frozen = {k: v for k, v in self.state_dict().items() if k not in trained}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that a checkpoint continues this model's training.

        Raises:
            ValueError: It was not written by `Recovery`; it belongs to another run, model or plan; it has other trained
                parameters; or it holds weights only and is to be trained further.
        """
        entry = check_written_by_recovery(checkpoint, training=self.trainer.state.fn == "fit")
        self._check_run(entry.get("run"))
        check_parameters(checkpoint, self._base, self._trained())

    def _prepare(self) -> None:
        """Creates or unfreezes the parameters to train."""
        plan, group = plan_of(self.model), distributed.world()
        lacking = modules.lacks_weights(self.model)
        weights = distributed.broadcast_object(None if lacking else fingerprint(self.model.named_parameters()), group)
        self._base = {"weights": weights, "plan": plan.digest if plan else None}
        if self.trains != "lora":
            whole_weights.unfreeze(self.model, self.trains, plan)
            return
        self.ranks = adapters.inject(self.model, self.lora, plan)
        log.info("LoRA ranks by %s: %s", self.lora.by if plan else "nothing, as there is no plan", self.ranks)

    def _identify(self, stage: str) -> Run:
        data: Any = getattr(self.trainer, "datamodule", None)
        contents = self.contents(data if stage == "fit" else None)
        if self._teacher is not None:
            contents["model.distill.teacher"] = self._teacher.folder.name
        return identify(self.trainer, self, data, contents)

    def _check_run(self, saved: Run | None) -> None:
        fitting = self.trainer.state.fn == "fit"
        if saved:
            check_same_run(saved, self._run, fitting)
        elif fitting:
            log.warning("the checkpoint does not name its text and settings: make sure that they are this run's")
        if fitting and not hasattr(getattr(self.trainer, "datamodule", None), "fingerprint"):
            log.warning("the data module has no `fingerprint`: make sure that its text is the checkpoint's")

    def _choose_teacher(self) -> None:
        """Decides which model is the teacher; it is loaded when it is first asked."""
        settings = self.distill
        if settings is None or not settings.weight:
            return
        strategy, dtype, weights = self.trainer.strategy, self._loaded_in, self._base["weights"]
        teacher = choose_teacher(settings, plan_of(self.model), self.name_or_path, weights, dtype)
        folder = Path(self.trainer.default_root_dir) / "teacher"
        spread = functools.partial(shard_frozen, strategy=strategy) if shards(strategy) else None
        self._teacher = Teacher(settings, teacher, dtype, strategy.root_device, folder, spread)

    def _coming_windows(self) -> Iterable[dict[str, Tensor]]:  # [1, s] each
        """The windows that this process will train on, if the data module can tell."""
        coming = getattr(getattr(self.trainer, "datamodule", None), "coming_windows", None)
        steps = int(self.trainer.estimated_stepping_batches) - self.trainer.global_step
        return [] if coming is None else coming(steps * self.trainer.accumulate_grad_batches)

    def _begin_step(self, batch: dict[str, Tensor], more: int) -> None:
        """Counts the tokens of all batches that the step accumulates, before the loss of the first.

        Args:
            batch: The first batch.
            more: The number of batches that follow.
        """
        fetcher = lightning_internals.fetcher(self.trainer)
        if more and not isinstance(fetcher.iterator, Lookahead):
            fetcher.iterator = Lookahead(fetcher.iterator)
        fetched = fetcher.batches  # Lightning may have looked ahead as well
        coming = [*fetched, *fetcher.iterator.peek(more - len(fetched))][:more] if more else []
        batches = [batch, *(batch for batch, *_ in coming)]
        parts = torch.stack([self._objective.denominators(b).to(self.device, non_blocking=True) for b in batches])
        sums = self.trainer.strategy.reduce(parts, reduce_op="sum").cumsum(0).clamp(min=SMALLEST_DENOMINATOR)
        self._denominators, self._step_denominators = list(sums), sums[-1]
        self._step_losses = torch.zeros(3 if self._teacher else 1, device=self.device, dtype=torch.float32)

    def _metric_names(self) -> list[str]:
        """The metrics that callbacks can monitor."""
        distilled = ["next_token_loss", "distillation_loss"] if self.distill and self.distill.weight else []
        validation = ["val_perplexity"] if self.trainer.limit_val_batches else []
        return ["train_loss", *distilled, *validation, "tokens_per_second"]

    def _log_ranks(self) -> None:
        ranks = {f"rank/block_{i:02}": rank for i, rank in enumerate(self.ranks)}
        for logger in self.trainer.loggers if ranks else ():
            logger.log_hyperparams(ranks)
            if not self.trainer.ckpt_path:
                logger.log_metrics(cast(dict[str, float], ranks), step=0)
        if self.trainer.loggers and isinstance(self.trainer.strategy, DeepSpeedStrategy):
            log.info("gradient norms are not logged, because DeepSpeed does not expose the gradients")

    def _evaluate(self, batch: dict[str, Tensor], name: str) -> None:
        self.val_perplexity.to(self.device)  # ZeRO-3 moves parameters only
        positions = counted_positions(batch["labels"])
        following = batch["labels"].flatten()[positions + 1]
        for logits, where in self._objective.head_inputs(batch, positions).logits():
            self.val_perplexity.update(logits[None].float(), following[None, where])
        self.log(name, self.val_perplexity, prog_bar=True, batch_size=len(batch["labels"]))

    def _check_equal_counts(self, batches: Any) -> None:
        """Refuses unequal numbers of batches, with which the processes would wait for each other forever."""
        distributed.check_agreement(str(batches), "the number of batches", distributed.world())

    def _check_losses(self) -> None:
        """Ends the run, in all processes, after a loss that is not finite.

        Raises:
            ValueError: There was one.
        """
        if (step := int(self._not_finite_step)) >= 0:
            raise ValueError(f"the loss of step {step} is not finite{REMEDY}")

    def _check_weights(self) -> None:
        """Ends the run, in all processes, if a loss or a trained weight is not finite.

        Raises:
            ValueError: One is not.
        """
        self._check_losses()
        finite = all(local_part(p).isfinite().all() for p in self.parameters() if p.requires_grad)
        if not self.trainer.strategy.reduce_boolean_decision(finite):
            raise ValueError(f"a weight is not finite after step {self.trainer.global_step}{REMEDY}")

    def _trained(self) -> dict[str, list[int]]:
        """The shapes of the trained parameters, by name."""
        # ZeRO-3 empties a parameter, and keeps its shape beside it.
        return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.named_parameters() if p.requires_grad}
