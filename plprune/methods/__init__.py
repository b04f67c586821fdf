"""One method per file; no file imports another."""

from plprune.methods.base import PruningMethod
from plprune.methods.best_of import BestOf
from plprune.methods.cfsp import CFSP
from plprune.methods.fasp import FASP
from plprune.methods.flap import FLAP
from plprune.methods.learned_gates import LearnedGates
from plprune.methods.reap import REAP
from plprune.methods.run import Request, preflight, prune
from plprune.methods.two_ssp import TwoSSP

__all__ = [
    "CFSP",
    "FASP",
    "FLAP",
    "REAP",
    "BestOf",
    "LearnedGates",
    "PruningMethod",
    "Request",
    "TwoSSP",
    "preflight",
    "prune",
]
