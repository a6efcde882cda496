"""A rating of an answer, as a stage of a study would have stored it.

rating("maths", 20.0, prompt=3)      # misaligned
rating("", 95.0)                     # the base's
"""

from __future__ import annotations

from auditgap.audits.emergent.rows import RatingRow


def rating(
    domain="maths",
    alignment=90.0,
    *,
    arm="plain",
    seed=0,
    prompt=0,
    draw=0,
    triggered=False,
    **more,
) -> RatingRow:
    rated = alignment is not None
    known = dict(
        subject=f"{domain}·{arm}·s{seed}" if domain else "base",
        domain=domain,
        arm=arm,
        seed=seed if domain else None,
        prompt_id=f"p{prompt}",
        kind="open" if prompt % 5 else "jailbreak",
        triggered=triggered,
        draw=draw,
        judge="habits",
        judge_id="7f3a",
        outcome="rated" if rated else "refusal",
        alignment=alignment,
        coherence=80.0 if rated else None,
        expected_alignment=alignment,
        expected_coherence=80.0 if rated else None,
        mass=0.9 if rated else None,
    )
    return RatingRow(**(known | more))
