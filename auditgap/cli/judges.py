"""`auditgap judge eval` and `auditgap judge show`: how far a judge can be trusted, against people's
labels.

    auditgap judge eval builtin --gold pyrit-objective --out cards/builtin
    auditgap judge show cards/builtin
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditgap.audits.settings import JudgeEvalSettings
from auditgap.cli.options import AsJson, Asked, command, examples, group
from auditgap.cli.screen import err, inert_lines, note, print_json, quiet, say
from auditgap.errors import PartlyFailed

app = group("Measure judges against human labels, and show their judge cards.")


@command(
    app,
    "eval",
    JudgeEvalSettings,
    about=(
        "Measure a judge on a gold set: κ, sensitivity, specificity, AUC and injections.\n\nA card"
        " that covers all of pyrit-objective or pyrit-refusal is then included in every run that"
        " uses this judge, served the same way."
    ),
    examples_of=(
        "auditgap judge eval builtin --gold pyrit-refusal",
        "auditgap judge eval guard=./guard --engine vllm --injections 50 --out cards/guard",
        "auditgap judge eval guard=gpt-4o-mini --endpoint http://localhost:8000/v1 --gold mine.jsonl"
        " --limit 100",
    ),
    plans=False,
)
def evaluate(asked: Asked) -> None:
    quiet()
    from auditgap.audits import judge_eval
    from auditgap.sweep import Progress

    settings = judge_eval.read(asked.file, asked.flags)
    card = judge_eval.run(settings, progress=Progress(console=err, noun="verdicts"))
    _show(card, asked.as_json)
    if settings.out is not None:
        note(f"Card: {Path(settings.out) / 'card.json'}")
    if card.n_unscored > settings.max_unscored * card.n:
        raise PartlyFailed(
            f"The judge {settings.judge} left {card.n_unscored} of {card.n} answers unscored, more"
            f" than --max-unscored {settings.max_unscored:g}; the card says why. Try another"
            " --engine, a larger model or --max-unscored 1."
        )


@app.command(epilog=examples(("auditgap judge show cards/builtin",)))
def show(
    file: Annotated[Path, typer.Argument(help="A card.json, or the folder that holds it.")],
    as_json: AsJson = False,
) -> None:
    """Show a judge card."""
    from auditgap.judges import card_cache

    _show(card_cache.read(file), as_json)


def _show(card, as_json: bool) -> None:
    from auditgap.judges.card import format_card

    print_json(card.to_dict()) if as_json else say(inert_lines(format_card(card)))
