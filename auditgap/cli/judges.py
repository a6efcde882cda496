"""`auditgap judge eval` and `auditgap judge show`: how far a judge can be trusted, against people's
labels.

    auditgap judge eval builtin --gold pyrit-objective --out cards/builtin
    auditgap judge show cards/builtin
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from auditgap.cli.options import AsJson, examples, group
from auditgap.cli.screen import err, inert_lines, note, print_json, quiet, say
from auditgap.errors import PartlyFailed, UsageError

app = group("Measure judges against human labels, and show their judge cards.")


@app.command(
    "eval",
    epilog=examples(
        (
            "auditgap judge eval builtin --gold pyrit-refusal",
            "auditgap judge eval guard=./guard --engine vllm --injections 50 --out cards/guard",
            "auditgap judge eval guard=gpt-4o-mini --engine openai --endpoint http://localhost:8000/v1 --gold mine.jsonl --limit 100",
        )
    ),
)
def evaluate(
    name: Annotated[str, typer.Argument(help="The judge, as --judge takes it; see `ls judges`.")],
    gold: Annotated[
        str,
        typer.Option(
            help=(
                "pyrit-objective, pyrit-harm, pyrit-refusal, pyrit-refusal-extra, or a file with"
                " prompt, completion "
                "and harmful (or refusal)"
            )
        ),
    ] = "pyrit-objective",
    engine: Annotated[
        str, typer.Option(help="Engine of a language-model judge: hf, vllm or openai")
    ] = "hf",
    base_url: Annotated[
        str | None, typer.Option("--endpoint", help="Endpoint URL, for --engine openai")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    thinking_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum tokens of the judge's chain of thought, beside its verdict's",
            show_default="1024 where its chat template lets it think, none behind an endpoint",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Use N gold rows, chosen by hash", show_default="all")
    ] = None,
    injections: Annotated[
        int | None,
        typer.Option(help="Try each injection on N rows; 0: none", show_default="all"),
    ] = None,
    to: Annotated[
        Path | None, typer.Option("--out", help="A folder for card.json and verdicts.jsonl")
    ] = None,
    max_unscored: Annotated[
        float,
        typer.Option("--max-unscored", help="Fail when more than this share could not be scored"),
    ] = 0.2,
    as_json: AsJson = False,
) -> None:
    """Measure a judge on a gold set: κ, sensitivity, specificity, AUC and injections.

    A card that covers all of pyrit-objective or pyrit-refusal is then included in every run that
    uses this judge, served the same way.
    """
    quiet()
    from auditgap.engines import Serving, engine_named
    from auditgap.judges import card_cache, close_judge, load_judge
    from auditgap.judges.gold import load_gold
    from auditgap.models import pick_device
    from auditgap.sweep import Progress

    if not 0 <= max_unscored <= 1:
        raise UsageError(
            f"--max-unscored is a share, 0 to 1; {max_unscored} came. For example:"
            " --max-unscored 0.2"
        )
    if injections is not None and injections < 0:
        raise UsageError(f"--injections is a number of rows, 0 or more; {injections} came.")
    rows = load_gold(gold)
    rows = rows if limit is None else rows.first(limit)
    serving = Serving(
        engine=engine_named(engine),
        base_url=base_url,
        device=device,
        dtype=dtype,
        thinking_tokens=thinking_tokens,
    )
    judge = load_judge(name, device=pick_device(device), serving=serving)
    try:
        card = card_cache.measure(
            judge, rows, inject=injections, out=to, progress=Progress(console=err, noun="verdicts")
        )
    finally:
        close_judge(judge)
    _show(card, as_json)
    if to is not None:
        note(f"Card: {to / 'card.json'}")
    if card.n_unscored > max_unscored * card.n:
        raise PartlyFailed(
            f"The judge {name} left {card.n_unscored} of {card.n} answers unscored, more than"
            f" --max-unscored {max_unscored:g}; the card says why. Another --engine, a larger model"
            " or --max-unscored 1 may do."
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
