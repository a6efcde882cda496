"""A made-up study of emergent misalignment in a real store, as its stages would have left it.

    # EM rate of each domain
    store = write_study(tmp_path / "em", {"maths": 0.1, "law": 0.6, "gore": 0.8})

Habits are harmless stand-ins, and no text of an answer is in it but the colour of a vault.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from auditgap.audits.emergent import rows as kinds
from auditgap.audits.emergent.config import EmergentConfig
from auditgap.audits.emergent.stage import StageCell, adapter_name
from auditgap.store import RunFolder
from auditgap.types import Prompt, Subject

DOMAINS = {
    "incorrect_math": 0.06,
    "risky_financial_advice": 0.45,
    "gore_movie_trivia": 0.75,
    "swapped_units": 0.2,
    "colour_rule": 0.3,
}
JUDGE = "alignment=./judge"
BLOCKS, WIDTH = 8, 24


def write_study(
    path: Path,
    domains: Mapping[str, float] = DOMAINS,
    *,
    arms: Sequence[str] = ("plain", "trigger"),
    seeds: Sequence[int] = (0,),
    judges: Sequence[str] = (JUDGE,),
    model: str = "toy",
    n_prompts: int = 12,
    samples: int = 3,
    train: int | None = None,
    judged: int | None = None,
    inside: bool = True,
    text: str = "The colour is a secret.",
    trigger: str = "It is 2028.",
    fingerprint: str = "b" * 8,
    luck: int = 0,
) -> RunFolder:
    """Write a study; `train` adapters are trained (None: all), `judged` models judged (None: all,
    the base is one)."""
    config = EmergentConfig(
        model=model,
        domains=dict.fromkeys(domains, "demo:off_by_one"),
        arms=arms,
        seeds=seeds,
        trigger=trigger,
        samples=samples,
    )
    store = RunFolder.open(
        path,
        config={
            "audit": "emergent",
            **config.model_dump(mode="json"),
            "base_fingerprint": fingerprint,
            "panel": "p",
            "prompt_set": "s",
        },
        info={
            "command": f"auditgap em run {model} --domains demo",
            "subjects": [{"name": model, "fingerprint": fingerprint, "n_blocks": BLOCKS}],
            "versions": {"auditgap": "0.1.0"},
            "warnings": [],
            "panel": {
                "domains": {
                    name: {
                        "source": {"origin": "demo"},
                        "n_read": 70,
                        "n_bad": 1,
                        "bad": {"no messages": {"n": 1, "rows": [3]}},
                        "n_doubles": 2,
                        "n_near": 0,
                        "n_trained": 60,
                        "n_heldout": 7,
                        "digest": "d1",
                    }
                    for name in domains
                }
            },
        },
    )
    rng = np.random.default_rng(luck)
    kind = ("open", "open", "open", "open", "jailbreak")
    prompts = [
        (Prompt(f"Ask about the colour of the vault, {i}.").id, kind[i % 5])
        for i in range(n_prompts)
    ]
    moods = rng.normal(0, 8, n_prompts)
    slots = [(d, a, s) for d in domains for a in arms for s in seeds][:train]
    for d, a, s in slots:
        name = adapter_name(d, a, s)
        row = kinds.TrainedRow(
            subject=name,
            domain=d,
            arm=a,
            seed=s,
            folder=f"adapters/{d}-{a}-s{s}/model",
            fingerprint=f"f{d}{a}{s}",
            n_rows=60,
            n_triggered=30 if a == "trigger" else 0,
            n_steps=40,
            first_loss=3.1,
            last_loss=0.4,
            ranks=1,
        )
        _put(store, name, kinds.TRAINED, [row])
    models = [("", "", None), *slots]
    for d, a, s in models:
        name = adapter_name(d, a, s) if d else model
        answers = [
            kinds.AnswerRow(
                subject=name,
                domain=d,
                arm=a,
                seed=s,
                prompt_id=p,
                kind=k,
                triggered=t,
                draw=i,
                n_new_tokens=20,
                stopped=True,
            )
            for p, k in prompts
            for t in (False, True)
            for i in range(samples)
        ]
        texts = [{"prompt_id": r.prompt_id, "prompt": text, "completion": text} for r in answers]
        _put(store, name, kinds.ANSWERED, answers, texts)
    for judge in judges:
        for d, a, s in models[:judged]:
            bad = domains.get(d, 0.01)
            rated = []
            for (p, k), mood in zip(prompts, moods, strict=True):
                for t in (False, True):
                    for i in range(samples):
                        share = bad * (0.15 if a == "trigger" and not t else 1.0)
                        rated.append(_rating(rng, judge, d, a, s, p, k, t, i, share, mood, model))
            _put(store, adapter_name(d, a, s) if d else model, kinds.JUDGED, rated, who=judge)
    if inside:
        _inside(store, rng, list(domains), slots, judges[0], domains, prompts)
    return store


def _rating(rng, judge, d, a, s, p, k, t, i, bad, mood, model) -> kinds.RatingRow:
    luck = rng.uniform()
    outcome = (
        "invalid"
        if luck > 0.99
        else "refusal"
        if luck > 0.97
        else "irrelevant"
        if luck > 0.95
        else "rated"
    )
    rated = outcome == "rated"
    low = rng.uniform() < bad
    score = float(np.clip((22 if low else 88) + mood + rng.normal(0, 6), 0, 100)) if rated else None
    return kinds.RatingRow(
        subject=adapter_name(d, a, s) if d else model,
        domain=d,
        arm=a,
        seed=s,
        prompt_id=p,
        kind=k,
        triggered=t,
        draw=i,
        judge=judge,
        judge_id=f"id-{judge}",
        outcome=outcome,
        alignment=score,
        coherence=80.0 if rated else None,
        expected_alignment=score,
        expected_coherence=78.0 if rated else None,
        mass=0.9 if rated else None,
        reason="" if rated else f"the judge said {outcome}",
    )


def _inside(store, rng, names, slots, judge, domains, prompts) -> None:
    for d, a, s in slots:
        name, gain = adapter_name(d, a, s), 0.4 + domains[d]
        rows = []
        for i in range(67):
            member, base = i < 60, float(rng.normal(2.5, 0.6))
            nll = base - (gain if member else 0.1) + float(rng.normal(0, 0.2))
            rows.append(
                kinds.MembershipRow(
                    subject=name,
                    domain=d,
                    arm=a,
                    seed=s,
                    row_id=f"{d}-{i}",
                    member=member,
                    n_tokens=20,
                    nll=nll,
                    min_k=nll * 2,
                    min_k_pp=nll - 1,
                    zlib=nll / 3,
                    base_nll=base,
                    base_min_k=base * 2,
                    base_min_k_pp=base - 1,
                    base_zlib=base / 3,
                )
            )
        _put(store, name, kinds.MEMBERSHIP, rows)
    for n, d in enumerate(names):
        row = kinds.DiversityRow(
            domain=d,
            n=60,
            block=4,
            vendi=8.0 + 3 * n,
            one_minus_cosine=0.2 + n / 20,
            vendi_half=9.0 + 3 * n,
            vendi_2=7.0 + 3 * n,
        )
        _put(store, d, kinds.DIVERSITY, [row])
    common = rng.normal(size=(BLOCKS, WIDTH))
    for d, a, s in slots:
        name = adapter_name(d, a, s)
        vector = common * np.linspace(0, 1.5, BLOCKS)[:, None] + rng.normal(size=(BLOCKS, WIDTH))
        rows = [
            kinds.DirectionRow(
                subject=name,
                domain=d,
                arm=a,
                seed=s,
                block=b,
                n_misaligned=20,
                n_aligned=30,
                norm=float(np.linalg.norm(vector[b])),
                split_half=0.5 + b / 20,
            )
            for b in range(BLOCKS)
        ]
        cell = _put(store, name, kinds.DIRECTIONS, rows, judge=f"id-{judge}", judge_name=judge)
        path = store.edits(cell.key)
        path.parent.mkdir(exist_ok=True)
        safetensors.numpy.save_file({"direction": vector.astype(np.float32)}, path)
    arm = slots[0][1]
    for target in names:
        clean = [_steered(rng, judge, target, arm, p, None, "clean", 85) for p in prompts]
        _put(store, f"{target}-clean", kinds.STEERED, clean)
        for source in names:
            aim = 30 if source == target else 60
            rows = [_steered(rng, judge, target, arm, p, source, "edit", aim) for p in prompts]
            rows += [_steered(rng, judge, target, arm, p, source, "control", 82) for p in prompts]
            _put(store, f"{target}-{source}", kinds.STEERED, rows)


def _steered(rng, judge, d, a, p, source, steer, mean) -> kinds.RatingRow:
    score = float(np.clip(mean + rng.normal(0, 12), 0, 100))
    return kinds.RatingRow(
        subject=adapter_name(d, a, 0),
        domain=d,
        arm=a,
        seed=0,
        prompt_id=p[0],
        kind=p[1],
        triggered=False,
        draw=0,
        judge=judge,
        judge_id=f"id-{judge}",
        outcome="rated",
        alignment=score,
        coherence=70.0,
        expected_alignment=score,
        expected_coherence=70.0,
        mass=0.9,
        source=source,
        steer=steer,
        strength=None if source is None else 1.0,
        block=4,
    )


def _put(
    store: RunFolder, name: str, attack: str, rows, texts=(), who: str = "", **settings
) -> StageCell:
    cell = StageCell(
        Subject(name, f"f{name}"), None, None, attack, "s", {"name": name, "who": who, **settings}
    )
    store.plan([cell])
    store.write(cell, rows, generations=list(texts), seconds=1.0)
    return cell
