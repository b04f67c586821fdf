"""Recovery: a pruned (or dense) causal language model trained back, as a LightningModule."""

import logging
import math
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, cast

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
from plprune.checkpoint.stored import Dtype
from plprune.io import distributed
from plprune.io.checks import check_non_negative
from plprune.io.progress import Progress
from plprune.io.text import IGNORED
from plprune.pruning.losses import (
    HeadInputs,
    counted_positions,
    head_inputs,
    model_inputs,
    next_token_criterion,
    weighted_loss,
)
from plprune.pruning.plan import fingerprint
from plprune.pruning.surgery import plan_of
from plprune.recovery import consumers
from plprune.recovery import lora as adapters
from plprune.recovery.distillation import (
    Distillation,
    Teacher,
    check_teacher,
    choose_teacher,
    hidden_distances,
    loss_denominators,
    recorded_outputs,
)
from plprune.recovery.lora import LoRA
from plprune.training import lightning_internals, random_states, resuming
from plprune.training.data import Ahead
from plprune.training.foreign_callbacks import check_callbacks
from plprune.training.optimisation import gradient_norms, warmup_cosine
from plprune.training.strategies import check_strategy, description, frozen_in_half, fusable, held, shards, split

log = logging.getLogger(__name__)

REMEDY = (
    ": training stops, and nothing is saved over what was good; lower model.learning_rate, or compute in more than "
    "float16 (trainer.precision bf16-mixed or 32-true)"
)
ENDLESS = "the learning rate needs an end of training: set trainer.max_steps or trainer.max_epochs"
LEAST = 1e-30  # that losses are divided by, where nothing counts


class Recovery(pl.LightningModule):
    """Trains a causal language model back by LoRA, with ranks that follow the importance of its blocks.

    The model is loaded at once; a `Prune` callback prunes it in its `setup`, and the adapters are added right after.
    Checkpoints hold what is trained only; one that belongs to another run is refused: another base model, plan, text or
    setting, but for what `plprune.training.resuming.FREE` lists. Of another data module than `RecoveryData` the text
    counts if it has `fingerprint()`.

    Of several processes on one node only the first loads; the others get its weights, whole or, under ZeRO-3 and FSDP2,
    their shards of them.

    Args:
        name_or_path: A name on the hub, a folder (a pruned one too), a `.gguf` file, or `package://PACKAGE/FILE.gguf`
            for a file inside an installed Python package.
        dtype: Of the frozen weights, unless `trainer.precision` is bf16-true or 16-true; as stored if not given, and
            float32 for a `.gguf` file. What is trained is float32.
        lora: The adapters.
        learning_rate: Peak of AdamW's learning rate.
        weight_decay: AdamW's.
        warmup: The fraction of all steps in which the learning rate rises; after that it falls as a cosine to 0.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.
        train: What is trained: adapters (lora), or, without any, the weights and biases of the projections whose inputs
            were pruned (consumers: `o_proj` and `down_proj` of llama), of all blocks if nothing was pruned.
        distill: How the dense model is learnt from; not at all if not given.
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
        train: Literal["lora", "consumers"] = "lora",
        distill: Distillation | None = None,
    ) -> None:
        super().__init__()
        check_non_negative(learning_rate=learning_rate, weight_decay=weight_decay, warmup=warmup)
        self.tokenizer = load_tokenizer(name_or_path)
        load = load_skeleton if distributed.local_rank() else load_model
        self.model = load(name_or_path, dtype)
        self.name_or_path = name_or_path
        self._loaded_in: Dtype = cast(Dtype, str(self.model.dtype).removeprefix("torch."))
        self.lora, self.trains, self.distill = lora, train, distill
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.gradient_checkpointing = gradient_checkpointing
        self.val_perplexity = Perplexity(ignore_index=IGNORED)
        self.ranks: list[int] = []
        lacking = modules.lacks_weights(self.model)
        self._content = None if lacking else fingerprint(self.model.named_parameters())  # of the model as it was loaded
        self._base: dict[str, str | None] = {}  # what a checkpoint must have been trained on
        self._run: resuming.Run = {}  # which a checkpoint must be of
        self._random_states: dict[str, Tensor] = {}  # of each process, by device
        self._tokens, self._since = 0, 0.0
        self._sizes: list[Tensor] = []  # up to each batch of a step that is still to come
        self._fault = torch.tensor(-1)  # the first step whose loss was not finite
        self._teacher: Teacher | None = None
        if distill is not None:
            check_teacher(distill, self.model)

    @property
    def begun(self) -> bool:
        """Whether there is something to train: adapters, or freed consumers."""
        return bool(self._base)

    @property
    def run(self) -> resuming.Run:
        """Which run this is, once it is set up."""
        return self._run

    def contents(self, data: Any) -> dict[str, str | None]:
        """Hashes of what the model and the texts of a data module hold, by the names of their options."""
        texts = data.fingerprint() if hasattr(data, "fingerprint") else {}
        model = distributed.broadcast_object(self._content, distributed.world())
        return {"model.name_or_path": model} | {f"data.{part}": content for part, content in texts.items()}

    def configure_callbacks(self) -> list[pl.Callback]:
        """Adds none; it is the first hook that all processes have, and what cannot work is refused in it."""
        callbacks: list[pl.Callback] = cast(Any, self.trainer).callbacks
        check_callbacks(callbacks, self._logged() if type(self) is Recovery else None)
        return []

    def prepare_data(self) -> None:
        """Says how the processes share the run; this is the first hook of it."""
        if self.trainer.is_global_zero and self.trainer.state.fn == "fit":
            size = sum(p.numel() * p.element_size() for p in self.model.parameters())
            log.info("%s", description(self.trainer.strategy, self.trainer.world_size, size))

    def setup(self, stage: str) -> None:
        """Adds the adapters, or frees what is trained instead of them, unless that is done."""
        check_strategy(self.trainer.strategy)
        sharded = shards(self.trainer.strategy)
        if sharded and self.lora.dora and self.trains == "lora":
            raise ValueError(
                "DoRA needs whole weights, and ZeRO-3 and FSDP2 have none: leave out lora.dora, or take ddp"
            )
        if not sharded:
            sharing.receive(self.model, distributed.world())
        frozen = [p for p in self.model.parameters() if not (self._base and p.requires_grad)]
        frozen_in_half(frozen, self.trainer.strategy)
        if not self._base:
            self._begin()
        self.strict_loading = not (sharded or isinstance(self.trainer.strategy, DeepSpeedStrategy))
        if stage == "fit":
            self._find_teacher()
            self.model.train()
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()
        self._run = self._asked(stage)

    def configure_model(self) -> None:
        """Puts the weights into shards, where a strategy has such."""
        if shards(self.trainer.strategy):
            split(self.model, self.trainer.strategy)

    def cpu(self) -> Self:
        """Lightning calls it when a run fails; a model still without weights would then hide why."""
        return self if any(p.is_meta for p in self.parameters()) else super().cpu()

    def forward(self, input_ids: Tensor) -> Tensor:  # [b, s] -> [b, s, vocabulary]
        return self.model(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The batch's share in the loss of the step: the mean over all tokens that count in it, in all processes."""
        progress, times = self.trainer.fit_loop.epoch_loop.batch_progress, self.trainer.accumulate_grad_batches
        done = progress.current.ready
        if not self._sizes or (done - 1) % times == 0:
            self._begin_step(batch, int(min(-done % times, self.trainer.num_training_batches - done)))
        so_far, shares = self._sizes.pop(0), self._shares_of(batch)
        self._shares += torch.stack(list(shares.values())).detach()
        shown = self.trainer.strategy.reduce(self._shares.clone(), reduce_op="sum") * (self._step[0] / so_far[0])
        for name, value in zip(shares, shown, strict=True):
            self.log(name, value, prog_bar=name == "train_loss")
        first = (self._fault < 0) & ~shown[0].isfinite()
        self._fault = self._fault.masked_fill(first, self.trainer.global_step + 1)
        if self.device.type == "cpu":  # elsewhere a look would wait for the device
            self._check_losses()
        self._tokens += batch["input_ids"].numel() * self.trainer.world_size
        # Lightning divides by the one, and gradients are averaged over the other.
        return shares["train_loss"] * (times * self.trainer.world_size)

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._judge(batch, "val_perplexity")

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._judge(batch, "test_perplexity")

    def on_train_start(self) -> None:
        self._agree_on(self.trainer.num_training_batches)
        self._fault = torch.tensor(-1, device=self.device)
        if self._teacher is not None:
            self._teacher.prepare(self._coming_windows(), quiet=not self.trainer.is_global_zero)
        random_states.restore(self._random_states, self.device)
        self._log_ranks()
        self._by_block = [[p for p in b.module.parameters() if p.requires_grad] for b in blocks_of(self.model)]
        self._tokens, self._since = 0, time.perf_counter()
        self._first = self.trainer.global_step, self._since
        steps = int(self.trainer.estimated_stepping_batches)
        quiet = sys.stderr.isatty() or not self.trainer.is_global_zero  # on a terminal there is Lightning's bar
        self._progress = Progress(steps, "training", "step", self.trainer.global_step, quiet)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Logs how large the gradients are: all processes' and all accumulated batches', before they are clipped."""
        if not lightning_internals.logs_are_due(self.trainer) or isinstance(self.trainer.strategy, DeepSpeedStrategy):
            return
        norms = gradient_norms(self._by_block).cpu()  # once, where each value would be fetched by itself
        if not norms.isfinite().all() and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            raise ValueError(f"the gradient of step {self.trainer.global_step + 1} is not finite{REMEDY}")
        names = [f"grad_norm/block_{i:02}" for i in range(len(norms))]
        self.log_dict(dict(zip(names, norms.unbind(), strict=True)) | {"grad_norm/total": norms.norm()})

    def on_train_epoch_end(self) -> None:
        self._check_weights()
        if self._teacher is not None:
            self._teacher.free()

    def on_train_end(self) -> None:
        self._progress.close()

    def on_validation_start(self) -> None:
        self._agree_on(
            self.trainer.num_sanity_val_batches if self.trainer.sanity_checking else self.trainer.num_val_batches
        )

    def on_test_start(self) -> None:
        self._agree_on(self.trainer.num_test_batches)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.trainer.global_step % (getattr(self.trainer, "log_every_n_steps", 1) or 1) == 0:
            self._check_losses()
        now = time.perf_counter()
        # As tensors on the CPU: Lightning would put numbers on the GPU, and wait for it.
        self.log("tokens_per_second", torch.tensor(self._tokens / (now - self._since)), prog_bar=True)
        self._tokens, self._since = 0, now
        step, (first, start) = self.trainer.global_step, self._first
        if step > first:
            left = (self.trainer.estimated_stepping_batches - step) * (now - start) / (step - first) / 60
            self.log("minutes_left", torch.tensor(left), prog_bar=True, logger=False)
        self._progress.update(step - self._progress.n)

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        fused = fusable(self.trainer.strategy) or None  # False would also leave out what else torch makes faster
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
        own = {"base": self._base, "trained": trained, "run": self._run}
        checkpoint["plprune"] = own | {"random_states": random_states.gathered(self.device)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_checkpoint(checkpoint)
        self._random_states = checkpoint["plprune"]["random_states"]
        if "state_dict" in checkpoint:  # DeepSpeed and FSDP2 have loaded it already
            trained = self._trained()
            frozen = {k: v for k, v in self.state_dict().items() if k not in trained}
            checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes sure that a checkpoint continues this model's training.

        Raises:
            ValueError: It was not written by `Recovery`, or in another run, or for another model or plan, or what is
                trained is another, or it holds weights only and is to be trained on.
        """
        own = resuming.check_kind(checkpoint, training=self.trainer.state.fn == "fit")
        self._check_run(own.get("run"))
        resuming.check_trained(checkpoint, self._base, self._trained())

    def _begin(self) -> None:
        plan, group = plan_of(self.model), distributed.world()
        lacking = modules.lacks_weights(self.model)
        weights = distributed.broadcast_object(None if lacking else fingerprint(self.model.named_parameters()), group)
        self._base = {"weights": weights, "plan": plan.digest if plan else None}
        if self.trains == "consumers":
            log.info("%d consumers are trained, in float32", len(consumers.unfreeze(self.model, plan)))
            return
        self.ranks = adapters.inject(self.model, self.lora, plan)
        log.info("LoRA ranks by %s: %s", self.lora.by if plan else "nothing, as there is no plan", self.ranks)

    def _asked(self, stage: str) -> resuming.Run:
        """The run that is asked for."""
        data: Any = getattr(self.trainer, "datamodule", None)
        contents = self.contents(data if stage == "fit" else None)
        if self._teacher is not None:
            contents["model.distill.teacher"] = self._teacher.folder.name
        return resuming.asked(self.trainer, self, data, contents)

    def _check_run(self, there: resuming.Run | None) -> None:
        fitting = self.trainer.state.fn == "fit"
        if there:
            resuming.check(there, self._run, fitting)
        elif fitting:
            log.warning("the checkpoint does not say of which text and settings it is: make sure that they are these")
        if fitting and not hasattr(getattr(self.trainer, "datamodule", None), "fingerprint"):
            log.warning("the data has no `fingerprint`: make sure that it is what the checkpoint was trained on")

    def _find_teacher(self) -> None:
        """Says which model is learnt from; it is loaded when it is asked."""
        settings = self.distill
        if settings is None or not settings.weight:
            return
        if shards(self.trainer.strategy):
            raise ValueError("a teacher is a whole model, which ZeRO-3 and FSDP2 are to avoid: leave out model.distill")
        dtype, weights = self._loaded_in, self._base["weights"]
        teacher = choose_teacher(settings, plan_of(self.model), self.name_or_path, weights, dtype)
        folder = Path(self.trainer.default_root_dir) / "teacher"
        self._teacher = Teacher(settings, teacher, dtype, self.trainer.strategy.root_device, folder)

    def _coming_windows(self) -> Iterable[dict[str, Tensor]]:  # [1, s] each
        """What this process will be trained on, if the data module says it."""
        coming = getattr(getattr(self.trainer, "datamodule", None), "coming_windows", None)
        steps = int(self.trainer.estimated_stepping_batches) - self.trainer.global_step
        return [] if coming is None else coming(steps * self.trainer.accumulate_grad_batches)

    def _begin_step(self, batch: dict[str, Tensor], more: int) -> None:
        """Looks ahead to what is accumulated with this batch: all tokens are counted before there is a loss."""
        fetcher = lightning_internals.fetcher(self.trainer)
        if more and not isinstance(fetcher.iterator, Ahead):
            fetcher.iterator = Ahead(fetcher.iterator)
        fetched = fetcher.batches  # it may have looked ahead itself
        coming = [*fetched, *fetcher.iterator.coming(more - len(fetched))][:more] if more else []
        own = torch.stack(
            [self._size(each).to(self.device, non_blocking=True) for each in (batch, *(batch for batch, *_ in coming))]
        )
        of_all = self.trainer.strategy.reduce(own, reduce_op="sum").cumsum(0).clamp(min=LEAST)
        self._sizes, self._step = list(of_all), of_all[-1]
        self._shares = torch.zeros(3 if self._teacher else 1, device=self.device, dtype=torch.float32)

    def _size(self, batch: dict[str, Tensor]) -> Tensor:
        hidden = self._teacher is not None and self._teacher.settings.of != "logits"
        answers = self._teacher.answers(model_inputs(batch)) if self._teacher is not None and hidden else {}
        return loss_denominators(batch["labels"], answers)

    def _shares_of(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a batch adds to the losses of its step."""
        given, labels, settings = model_inputs(batch), batch["labels"], self.distill
        positions = counted_positions(labels)
        own, tokens = next_token_criterion(labels, positions), self._step[0]
        if self._teacher is None or settings is None:
            return {"train_loss": weighted_loss(self._states(given, positions), [own], [1.0])[0] / tokens}
        weight, answers = settings.weight, self._teacher.answers(given)
        losses = [own, settings.criterion(answers, positions)] if settings.uses_logits else [own]
        with recorded_outputs(self.model, settings.blocks(len(blocks_of(self.model)))) as hidden:
            loss, sums = weighted_loss(self._states(given, positions), losses, [1 - weight, weight][: len(losses)])
        loss, distilled = loss / tokens, sums[1:].sum() / tokens
        if hidden:
            apart = (hidden_distances(hidden, labels, answers["hidden"]) / self._step[1:]).mean()
            loss, distilled = loss + weight * apart, distilled + apart
        return {"train_loss": loss, "next_token_loss": sums[0] / tokens, "distillation_loss": distilled}

    def _states(self, given: dict[str, Tensor], positions: Tensor) -> HeadInputs:
        return head_inputs(self.model, given, positions, whole=not shards(self.trainer.strategy))

    def _logged(self) -> list[str]:
        """The metrics that a callback can monitor."""
        distilled = ["next_token_loss", "distillation_loss"] if self.distill and self.distill.weight else []
        judged = ["val_perplexity"] if self.trainer.limit_val_batches else []
        return ["train_loss", *distilled, *judged, "tokens_per_second"]

    def _log_ranks(self) -> None:
        ranks = {f"rank/block_{i:02}": rank for i, rank in enumerate(self.ranks)}
        for logger in self.trainer.loggers if ranks else ():
            logger.log_hyperparams(ranks)
            if not self.trainer.ckpt_path:
                logger.log_metrics(cast(dict[str, float], ranks), step=0)
        if self.trainer.loggers and isinstance(self.trainer.strategy, DeepSpeedStrategy):
            log.info("gradient norms are not logged, as DeepSpeed keeps the gradients to itself")

    def _judge(self, batch: dict[str, Tensor], name: str) -> None:
        self.val_perplexity.to(self.device)  # ZeRO-3 leaves what is no parameter on the CPU
        positions = counted_positions(batch["labels"])
        following = batch["labels"].flatten()[positions + 1]
        for logits, where in self._states(model_inputs(batch), positions).logits():
            self.val_perplexity.update(logits[None].float(), following[None, where])
        self.log(name, self.val_perplexity, prog_bar=True, batch_size=len(batch["labels"]))

    def _agree_on(self, batches: Any) -> None:
        """Refuses what would otherwise hang: a process that has run out of batches waits for nobody."""
        distributed.check_agreement(str(batches), "the number of batches", distributed.world())

    def _check_losses(self) -> None:
        """Ends the run, in all processes, once a loss was not finite.

        Raises:
            ValueError: One was not.
        """
        if (step := int(self._fault)) >= 0:
            raise ValueError(f"the loss of step {step} is not finite{REMEDY}")

    def _check_weights(self) -> None:
        """The same for what is trained, before it is saved or judged.

        Raises:
            ValueError: A loss or a weight is not finite.
        """
        self._check_losses()
        finite = all(held(p).isfinite().all() for p in self.parameters() if p.requires_grad)
        if not self.trainer.strategy.reduce_boolean_decision(finite):
            raise ValueError(f"a weight is not finite after step {self.trainer.global_step}{REMEDY}")

    def _trained(self) -> dict[str, list[int]]:
        """The shapes of all that is trained, by name."""
        # ZeRO-3 leaves a parameter empty, and knows better.
        return {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.named_parameters() if p.requires_grad}
