"""Where to put the cut, before training: bytes, seconds and predicted gain of every cut, and a choice."""

from .choice import CutChoice, CutRow, LayerSignal, Regret, choose_cut, regret
from .integers import int8_step_bytes, plan_int8_step
from .memory import CutBytes, MemoryPlan, Parts, memory_plan
from .tally import paper_tally

__all__ = [
    "CutBytes",
    "CutChoice",
    "CutRow",
    "LayerSignal",
    "MemoryPlan",
    "Parts",
    "Regret",
    "choose_cut",
    "int8_step_bytes",
    "memory_plan",
    "paper_tally",
    "plan_int8_step",
    "regret",
]
