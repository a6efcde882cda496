"""How much memory a training step needs, before anything is loaded: what fits where, and what to
change when it does not.

    need = estimate(MemoryInputs(…))
    check(need, free=80 * 2**30)

The model is counted, not measured; the tests hold it against the peaks of real training steps.
"""

from auditgap.training.memory.check import check, check_run
from auditgap.training.memory.model import GIB, Memory, MemoryInputs, estimate, lora_params

__all__ = ["GIB", "Memory", "MemoryInputs", "check", "check_run", "estimate", "lora_params"]
