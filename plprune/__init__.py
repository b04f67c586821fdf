"""Prunes a Hugging Face causal language model once and recovers it with LoRA, in one `Trainer.fit`.

::

    Recovery loads the model            RecoveryData reads the text
      -> Prune: method.prune(model, calibration windows) -> PruningPlan     statistics -> scores -> keep -> shrink
      -> LoRA, ranks by the plan's block importance
      -> Trainer.fit                                                        sees only the final structure
      -> Evaluate: dense, pruned, recovered         Export: merged and saved; load_pruned loads it
      -> plprune export: files for transformers, llama.cpp and DeciLM, checked against the model

Only `cli`, `commands`, `comparison` and `training` import Lightning. All other packages are a plain library, whose main
function is `prune(model, method, batches)`.
"""

from transformers import AutoConfig

from plprune.architecture.modeling_plprune import PrunedConfig
from plprune.checkpoint.load import load_pruned
from plprune.checkpoint.remote_code import allow_remote_code
from plprune.checkpoint.save import save_pruned
from plprune.evaluation.perplexity import perplexity
from plprune.methods import CFSP, FASP, FLAP, REAP, BestOf, LearnedGates, PruningMethod, TwoSSP, prune
from plprune.planning.targets import Target
from plprune.pruning.calibration import Calibration
from plprune.pruning.plan import PruningPlan
from plprune.recovery.distillation import Distillation
from plprune.recovery.lora import LoRA
from plprune.training.callbacks.evaluate import Evaluate
from plprune.training.callbacks.export import Export
from plprune.training.callbacks.prune import Prune
from plprune.training.callbacks.report import Report
from plprune.training.checkpointing import Checkpoint
from plprune.training.data import RecoveryData
from plprune.training.module import Recovery

__version__ = "0.1.0"

AutoConfig.register(PrunedConfig.model_type, PrunedConfig)  # transformers loads what plprune has saved

__all__ = [
    "CFSP",
    "FASP",
    "FLAP",
    "REAP",
    "BestOf",
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
    "Target",
    "TwoSSP",
    "allow_remote_code",
    "load_pruned",
    "perplexity",
    "prune",
    "save_pruned",
]
