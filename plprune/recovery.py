"""Recovery: a pruned (or dense) causal language model trained by LoRA, as a LightningModule."""

import logging
import math
import time
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics.text import Perplexity

from plprune import lora as adapters
from plprune.checkpoint import Dtype, load_model, load_tokenizer
from plprune.evaluation import next_token_loss
from plprune.lora import LoRA
from plprune.plan import fingerprint
from plprune.surgery import plan_of
from plprune.text import IGNORED

log = logging.getLogger(__name__)


class Recovery(pl.LightningModule):
    """Trains a causal language model back by LoRA, with ranks that follow the importance of its blocks.

    The model is loaded at once; a `Prune` callback prunes it in its `setup`, and the adapters are added right after.
    Checkpoints hold the adapters only; one that belongs to another base model or plan is refused.

    Args:
        name_or_path: A name on the hub, a folder (a pruned one too), a `.gguf` file, or `package://PACKAGE/FILE.gguf`
            for a file inside an installed Python package.
        dtype: Of the frozen weights; adapters are float32.
        lora: The adapters.
        learning_rate: Peak of AdamW's learning rate.
        weight_decay: AdamW's.
        warmup: The fraction of all steps in which the learning rate rises; after that it falls as a cosine to 0.
        gradient_checkpointing: Whether activations are computed again in the backward pass, to save memory.
    """

    def __init__(
        self,
        name_or_path: str,
        dtype: Dtype = "float32",
        lora: LoRA = LoRA(),
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        warmup: float = 0.05,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer = load_tokenizer(name_or_path)
        self.model = load_model(name_or_path, dtype)
        self.lora = lora
        self.learning_rate, self.weight_decay, self.warmup = learning_rate, weight_decay, warmup
        self.gradient_checkpointing = gradient_checkpointing
        self.val_perplexity = Perplexity(ignore_index=IGNORED)
        self.ranks: list[int] = []
        self._base: dict[str, str | None] = {}  # what a checkpoint must have been trained on
        self._random_state: dict[str, Any] | None = None
        self._tokens, self._since = 0, 0.0

    def setup(self, stage: str) -> None:
        """Adds the adapters, unless they are there."""
        if not self.ranks:
            plan = plan_of(self.model)
            weights = fingerprint(self.model.named_parameters())
            self._base = {"weights": weights, "plan": plan.digest if plan else None}
            self.ranks = adapters.inject(self.model, self.lora, plan)
            log.info("LoRA ranks by %s: %s", self.lora.by if plan else "nothing, as there is no plan", self.ranks)
        if stage == "fit":
            self.model.train()
            if self.gradient_checkpointing:
                self.model.gradient_checkpointing_enable()

    def forward(self, input_ids: Tensor) -> Tensor:  # [b, s] -> [b, s, vocabulary]
        return self.model(input_ids=input_ids, use_cache=False).logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = next_token_loss(self(batch["input_ids"]), batch["labels"])
        self.log("train_loss", loss, prog_bar=True)
        self._tokens += batch["input_ids"].numel()
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_perplexity(self(batch["input_ids"])[:, :-1].float(), batch["labels"][:, 1:])
        self.log("val_perplexity", self.val_perplexity, prog_bar=True, batch_size=len(batch["labels"]))

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self.val_perplexity(self(batch["input_ids"])[:, :-1].float(), batch["labels"][:, 1:])
        self.log("test_perplexity", self.val_perplexity, batch_size=len(batch["labels"]))

    def on_train_start(self) -> None:
        if self._random_state is not None:
            _set_random_state(self._random_state)
        self._tokens, self._since = 0, time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        self.log("tokens_per_second", self._tokens / (now - self._since), prog_bar=True)
        self._tokens, self._since = 0, now

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer: Optimizer = AdamW(parameters, lr=self.learning_rate, weight_decay=self.weight_decay)
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError("the learning rate needs an end of training: set trainer.max_steps or trainer.max_epochs")
        schedule = LambdaLR(optimizer, lambda step: warmup_cosine(step, int(steps), self.warmup))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = self._trained()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["plprune"] = {"base": self._base, "random_state": _random_state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = checkpoint.get("plprune")
        if own is None:
            raise ValueError("the checkpoint was not written by plprune.Recovery: name another with --ckpt_path")
        if own["base"] != self._base:
            raise ValueError(
                f"the checkpoint was trained on another base model or plan ({own['base']}) than this run's "
                f"({self._base}): use the settings it was trained with, or start without it"
            )
        self._random_state = own["random_state"]
        trained = self._trained()
        frozen = {k: v for k, v in self.state_dict().items() if k not in trained}
        checkpoint["state_dict"] = frozen | checkpoint["state_dict"]

    def _trained(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """The learning rate at a step, as a fraction of its peak.

    Example:
        >>> [round(warmup_cosine(step, 10, 0.2), 3) for step in (0, 1, 2, 6, 10)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    rise = int(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - rise) / max(1, steps - rise))))


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"].cpu())
    if state["cuda"]:
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
