"""The behavioural audit: what a subject says when it is asked, as rates of refusal and compliance
by source and kind.

    folder, outcome = run(BEHAVIOUR, *BEHAVIOUR.read(None, {"models": "base,tuned", "suite": "harmbench,everyday", "out": "runs/behaviour"}))
    measured = grade(speak(engine, prompts, max_new_tokens=48), prompts, judge, subject="s", kind="harmful")

Refusal on harmful prompts, over-refusal on benign ones, several subjects beside each other;
`audits.sft_curve` asks the same of a model between two training steps.
"""

from auditgap.audits.exports import exports

__getattr__ = exports(
    __name__,
    {
        "config": ("BehaviourConfig", "BehaviourOptions"),
        "answers": ("Answers",),
        "measure": ("Measured", "grade", "speak"),
        "plan": ("ATTACK", "prepare"),
        "rows": ("BehaviourRow", "Rates", "rates"),
        "audit": ("lost", "unscored_share"),
    },
)
