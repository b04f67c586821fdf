"""Prune a Hugging Face causal language model once, recover it with LoRA, in one `Trainer.fit`.

::

    Recovery loads the model            RecoveryData reads the text
      -> Prune: method.prune(model, calibration windows) -> PruningPlan     statistics -> scores -> keep -> shrink
      -> LoRA, ranks by the plan's block importance
      -> Trainer.fit                                                        sees only the final structure
      -> Evaluate: dense, pruned, recovered         Export: merged, saved, loads again with load_pruned
      -> plprune export: transformers, llama.cpp, DeciLM; each loaded again there, and compared

Below the Lightning line (`callbacks`, `checkpointing`, `recovery`, `data`, `strategies`, `watch`, `cli`) everything is
a plain library: `prune(model, method, batches)` is all of it.
"""

from transformers import AutoConfig

from plprune.calibration import Calibration
from plprune.callbacks import Evaluate, Export, Prune, Report
from plprune.checkpoint import load_pruned, save_pruned
from plprune.checkpointing import Checkpoint
from plprune.data import RecoveryData
from plprune.distillation import Distillation
from plprune.evaluation import perplexity
from plprune.lora import LoRA
from plprune.methods import CFSP, FASP, FLAP, LearnedGates, PruningMethod, TwoSSP, prune
from plprune.modeling_plprune import PrunedConfig
from plprune.plan import PruningPlan
from plprune.recovery import Recovery

__version__ = "0.1.0"

AutoConfig.register(PrunedConfig.model_type, PrunedConfig)  # transformers loads what plprune has saved

__all__ = [
    "CFSP",
    "FASP",
    "FLAP",
    "Calibration",
    "Checkpoint",
    "Distillation",
    "Evaluate",
    "Export",
    "LearnedGates",
    "LoRA",
    "Prune",
    "PruningMethod",
    "PruningPlan",
    "Recovery",
    "RecoveryData",
    "Report",
    "TwoSSP",
    "load_pruned",
    "perplexity",
    "prune",
    "save_pruned",
]
