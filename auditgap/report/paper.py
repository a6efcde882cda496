"""Reference figures: Table 1 of arXiv 2606.08044v1 (CC BY 4.0), the layer-wise LVS of eight 7–8B
models at ε = 0.001.

They stand beside our own numbers for orientation. LVS is not scale-free, so they are comparable
only when unit, budget, reward and prompts agree; `differences` says what does not:

    differences(unit="rms", eps=0.03, reward="screening", prompts="advbench")
    -> ['unit rms, not max', 'ε = 0.03, not 0.001', 'reward screening, not …harmless-reward_model', …]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reference:
    """One row of the paper's Table 1: mean LVS at the embedding, the middle block and the last
    block."""

    model: str
    family: str
    change: str
    embedding: float
    mid: float
    last: float


SOURCE = "arXiv 2606.08044v1, Table 1"
EPS = 0.001
#: The paper prints ε without a unit; its values fit only ε relative to the largest |h| (unit
#: `max`).
UNIT = "max"
REWARD = "Ray2333/gpt2-large-harmless-reward_model"
PROMPTS = "harmbench"

TABLE_1: tuple[Reference, ...] = (
    Reference("Meta-Llama-3-8B-Instruct", "Llama 3", "baseline", 4.914, 3.483, 0.000),
    Reference("Llama-3-8B-Instruct-RR", "Llama 3", "safety up", 9.182, 2.160, 0.000),
    Reference(
        "Llama-3-8B-Instruct-abliterated", "Llama 3", "safety down, weights", 5.207, 1.102, 55.665
    ),
    Reference("dolphin-2.9-llama3-8b", "Llama 3", "safety down, data", 17.875, 0.345, 201.190),
    Reference("alpaca-7b-reproduced", "Alpaca", "baseline", 121.957, 2.025, 0.000),
    Reference("SACPO", "Alpaca", "harmless and helpful", 62.757, 2.339, 7.448),
    Reference("P-SACPO", "Alpaca", "harmless and helpful", 152.400, 3.832, 10.362),
    Reference("Beaver-7B-v3.0", "Alpaca", "harmless and helpful", 115.538, 3.131, 0.000),
)


def differences(
    unit: str | None, eps: Sequence[float], reward: str | None, prompts: str | None
) -> list[str]:
    """Why our numbers cannot be set against the paper's: one phrase a difference, [] when none is
    known."""
    found = []
    if unit != UNIT:
        found.append(f"the unit is {unit or 'not recorded'}, the paper's values fit {UNIT}")
    if not any(abs(size - EPS) <= 1e-9 for size in eps):
        sizes = ", ".join(f"{size:g}" for size in eps) or "not recorded"
        found.append(f"the budget is {sizes}, the paper's {EPS:g}")
    if reward is None or REWARD.lower() not in reward.lower():
        found.append(f"the reward is {reward or 'not recorded'}, the paper's {REWARD}")
    if prompts is None or PROMPTS not in prompts.lower():
        found.append(f"the prompts are {prompts or 'not recorded'}, the paper's HarmBench")
    return found
