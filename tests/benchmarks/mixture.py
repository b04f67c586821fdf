"""Trains a small mixture of experts on stories, so that pruning has experts that have learned.

    python -m tests.benchmarks.mixture runs/mixture --teacher STORIES260K --text STORIES.jsonl [--steps 1600]

The teacher is a small model that was trained on TinyStories. Stories are drawn from it, and the mixture (four blocks of
16 experts, 4 for a token) learns the teacher's distributions on these and on the text. A stopped run goes on. The
folder gets the trained model in `model`, and what `configs/compare/mixtures.yaml` reads: `calibration.jsonl`, the
stories that were trained on, and `held-out.jsonl`, the others. This takes about half an hour on two cores.
"""

import argparse
import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from plprune import REAP
from plprune.io.atomic import staged
from plprune.pruning.expert_inputs import Saliency

LENGTH = 256  # tokens of a window
BATCH = 16  # windows of a step
REAL = 2  # of which from the text
DRAWN = 6144  # windows from the teacher
AUXILIARY = 0.01  # weight of the loss that balances experts
LEARNING_RATE = 3e-3
KEPT = 0.75  # of the stories, to train on

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class AtRandom(REAP):
    """Removes experts at random: what a score must beat."""

    seed: int = 0

    def _score(self, found: Saliency) -> Tensor:  # [experts]
        generator = torch.Generator().manual_seed(self.seed + int(found.tokens.sum()) + int(found.tokens[0]))
        return torch.rand(len(found.tokens), generator=generator)


def config(vocabulary: int) -> Qwen3MoeConfig:
    sizes: dict[str, Any] = {"head_dim": 16}
    return Qwen3MoeConfig(
        vocab_size=vocabulary,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        intermediate_size=256,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        **sizes,
    )


@torch.no_grad()
def drawn(teacher: Any, folder: Path) -> Tensor:  # [DRAWN, LENGTH]
    """Windows of stories from the teacher; kept in a file."""
    file = folder / "drawn.pt"
    if not file.exists():
        torch.manual_seed(0)
        start, parts = torch.ones(256, 1, dtype=torch.int64), []
        for done in range(0, DRAWN, len(start)):
            how: dict[str, Any] = {"do_sample": True, "top_k": 0, "attention_mask": torch.ones_like(start)}
            none = {"eos_token_id": None, "max_new_tokens": LENGTH - 1}  # windows hold several stories
            parts.append(teacher.generate(start, **how, **none))
            log.info("%d of %d windows drawn", done + len(start), DRAWN)
        with staged(file, overwrite=False) as temporary:
            torch.save(torch.cat(parts), temporary)
    return torch.load(file, weights_only=True)


def split(text: Path, folder: Path) -> list[str]:
    """Writes the stories to train on and the others to files; the former."""
    stories = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    first = int(KEPT * len(stories))
    for name, own in (("calibration", stories[:first]), ("held-out", stories[first:])):
        with staged(folder / f"{name}.jsonl", overwrite=True) as temporary:
            temporary.write_text("".join(json.dumps({"text": story}) + "\n" for story in own))
    return stories[:first]


def divergence(student: PreTrainedModel, teacher: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The cross entropy of the teacher's distributions, and the loss that balances experts."""
    with torch.no_grad():
        target = teacher(ids, use_cache=False).logits.softmax(-1)
    out = student(ids, use_cache=False, output_router_logits=True)
    return -(target * out.logits.log_softmax(-1)).sum(-1).mean(), out.aux_loss


def train(teacher: PreTrainedModel, real: Tensor, folder: Path, steps: int) -> Qwen3MoeForCausalLM:
    """Trains the mixture, from the last state in the folder.

    Args:
        teacher: The model to learn from.
        real: Windows of the text, [n, LENGTH].
        folder: For the states.
        steps: Optimizer steps in all.
    """
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config(teacher.config.vocab_size))
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01)
    state, windows, done = folder / "state.pt", drawn(teacher, folder), 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["steps"]
    for step in range(done, steps):
        generator = torch.Generator().manual_seed(step)
        own = windows[torch.randint(len(windows), (BATCH - REAL,), generator=generator)]
        ids = torch.cat([own, real[torch.randint(len(real), (REAL,), generator=generator)]])
        warm, cosine = min(1.0, (step + 1) / 100), 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * warm * (0.05 + 0.95 * cosine)
        loss, balance = divergence(model, teacher, ids)
        (loss + AUXILIARY * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 49:
            log.info("step %d: loss %.4f, balance %.3f", step + 1, loss.item(), balance.item())
        if step % 200 == 199 or step + 1 == steps:
            with staged(state, overwrite=True) as temporary:
                both = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save({**both, "steps": step + 1}, temporary)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--teacher", required=True, help="folder of a small model that was trained on TinyStories")
    parser.add_argument("--text", type=Path, required=True, help="stories, JSON lines with `text`")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    stories = split(options.text, options.folder)
    flat = torch.cat([torch.tensor([1, *tokenizer.encode(story, add_special_tokens=False)]) for story in stories])
    real = flat[: len(flat) // LENGTH * LENGTH].view(-1, LENGTH)
    model = train(teacher, real, options.folder, options.steps)
    model.set_experts_implementation("grouped_mm")
    model.save_pretrained(options.folder / "model")
    tokenizer.save_pretrained(options.folder / "model")


if __name__ == "__main__":
    main()
