"""The harmful-SFT curve: how many steps of fine-tuning on unsafe answers it takes until a subject
complies.

    config, options = read_config(None, {"models": "./base,./tuned", "data": "unsafe.jsonl", "out": "runs/sft"})
    # train(model_name, seed, evaluate): see `Train`, and train.py
    folder, outcome = run(config, options, train)

A parameter-space intervention beside the latent one: base and subjects, several seeds, compliance
and refusal on held-out prompts every few steps; steps to 50 % and 80 %, area under the curve, and
the audit gap after k steps (arXiv 2606.08044, section 7 of its method).
"""

from auditgap.audits.sft_curve.config import SFTCurveConfig, SFTCurveOptions, read_config
from auditgap.audits.sft_curve.plan import ATTACK, CurvePlan, prepare
from auditgap.audits.sft_curve.run import reduce, run
from auditgap.audits.sft_curve.worker import CurveWorker, Evaluate, Train

__all__ = [
    "ATTACK",
    "CurvePlan",
    "CurveWorker",
    "Evaluate",
    "SFTCurveConfig",
    "SFTCurveOptions",
    "Train",
    "prepare",
    "read_config",
    "reduce",
    "run",
]
