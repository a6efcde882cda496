"""The behavioural audit: what a subject says when it is asked, as rates of refusal and compliance
by source and kind.

    folder, outcome = run(*read_config(None, {"models": "base,tuned", "suite": "harmbench,everyday", "out": "runs/behaviour"}))
    measured = grade(speak(engine, prompts, max_new_tokens=48), prompts, judge, subject="s", kind="harmful")

Refusal on harmful prompts, over-refusal on benign ones, several subjects beside each other;
`audits.sft_curve` asks the same of a model between two training steps.
"""

from auditgap.audits.behaviour.config import BehaviourConfig, BehaviourOptions, read_config
from auditgap.audits.behaviour.measure import Answers, Measured, grade, speak
from auditgap.audits.behaviour.plan import ATTACK, prepare
from auditgap.audits.behaviour.rows import BehaviourRow, Rates, rates
from auditgap.audits.behaviour.run import lost, reduce, regrade, run, unscored_share

__all__ = [
    "ATTACK",
    "Answers",
    "BehaviourConfig",
    "BehaviourOptions",
    "BehaviourRow",
    "Measured",
    "Rates",
    "grade",
    "lost",
    "prepare",
    "rates",
    "read_config",
    "reduce",
    "regrade",
    "run",
    "speak",
    "unscored_share",
]
