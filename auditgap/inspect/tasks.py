"""auditgap's questions as inspect_ai tasks: any model that inspect can reach, asked our prompts,
judged by our judges.

    inspect eval auditgap/refusal --model hf/HuggingFaceTB/SmolLM2-135M-Instruct -T prompts=harmbench -T limit=20
    # a folder
    inspect eval auditgap/refusal --model hf/local -M model_path=./tuned -T judge=keyword
    inspect eval auditgap/over_refusal --model openai/gpt-4o-mini -T prompts=everyday

`refusal` puts harmful prompts to the model and `over_refusal` ordinary ones; on the latter a
refusal is the fault. Each gives the rates of compliance, refusal, broken text and unscored answers
with standard errors and Wilson's intervals.

inspect's own log of such a run holds prompts and completions and lies in `--log-dir`;
`--no-log-samples` leaves them out. The model is loaded by inspect, not by auditgap: what auditgap
looks at before it opens a folder is not looked at here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import numpy as np
from rich.markup import escape

from auditgap.audits.behaviour.answers import Answers
from auditgap.audits.behaviour.measure import grade
from auditgap.data import load_prompts
from auditgap.engines import UNFINISHED
from auditgap.errors import AuditgapError, UsageError
from auditgap.inspect import MISSING, VERDICT, values
from auditgap.judges import load_judge
from auditgap.models import pick_device
from auditgap.models.chains import split
from auditgap.stats import wilson
from auditgap.types import Label, Prompt

try:
    from inspect_ai import Task, task

    # the one error that `inspect` shows without a traceback
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.dataset import MemoryDataset, Sample
    from inspect_ai.model import GenerateConfig, Model, get_model
    from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, mean, metric, scorer
    from inspect_ai.solver import Generate, Solver, TaskState, solver, system_message
except ImportError as error:
    raise UsageError(MISSING) from error

#: What inspect calls an ending that was not the model's own, and what it means here: nothing can be
#: told of the model.
NOT_ITS_OWN = {"model_length": "too_long", "content_filter": "content_filter"}


@task
def refusal(
    prompts: str = "harmbench",
    column: str = "prompt",
    limit: int | None = None,
    seed: int = 0,
    judge: str = "builtin",
    max_new_tokens: int = 128,
    system: str | None = None,
) -> Task:
    """Does the model refuse what it should refuse?

    `prompts`: a named set (`auditgap ls prompts`) or a jsonl, csv, parquet or txt file; `limit` of
    it, chosen by hash with `seed`. `judge`: as in `auditgap ls judges`. `system`: a system message.
    Raises UsageError as auditgap's commands do.
    """
    return _asking(
        "refusal", "harmful", prompts, column, limit, seed, judge, max_new_tokens, system
    )


@task
def over_refusal(
    prompts: str = "everyday",
    column: str = "prompt",
    limit: int | None = None,
    seed: int = 0,
    judge: str = "builtin",
    max_new_tokens: int = 128,
    system: str | None = None,
) -> Task:
    """Does the model refuse what it should not? Parameters as in `refusal`."""
    return _asking(
        "over_refusal", "benign", prompts, column, limit, seed, judge, max_new_tokens, system
    )


def _asking(
    name: str,
    kind: str,
    prompts: str,
    column: str,
    limit: int | None,
    seed: int,
    judge: str,
    max_new_tokens: int,
    system: str | None,
) -> Task:
    with _in_a_sentence():
        found = load_prompts(str(prompts), limit=limit, seed=seed, column=column)
        scored_by, identity = (
            verdict(judge, kind),
            load_judge(judge, device=pick_device("auto")).describe(),
        )
    return Task(
        name=name,
        dataset=MemoryDataset(
            [Sample(input=p.text, id=p.id, metadata={"source": p.source}) for p in found],
            name=found.name,
        ),
        solver=[*([system_message(system)] if system else []), plainly()],
        scorer=scored_by,
        config=GenerateConfig(temperature=0.0, max_tokens=max_new_tokens),
        metadata={
            "prompts": {"name": found.name, "digest": found.digest, **found.provenance},
            "judge": identity,
        },
    )


@contextmanager
def _in_a_sentence() -> Iterator[None]:
    try:
        yield
    except AuditgapError as error:
        raise PrerequisiteError(escape(str(error))) from error


@solver
def plainly() -> Solver:
    """`generate()`; a model of inspect's `hf/` is spoken to as auditgap's own engine speaks to it
    (`settle`)."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        settle(get_model())
        return await generate(state)

    return solve


def settle(model: Model) -> None:
    """Have inspect's `hf/` provider ask what auditgap asks, so that greedy answers agree; other
    providers stay as they are.

    Left alone it samples at every temperature (which transformers refuses at 0), adds a second BOS
    to that of the template, lets reasoning families think, and makes up a format where the
    tokenizer has no chat template. What the user said with `-M` (`do_sample` aside, which
    temperature 0 overrules) stays. Raises UsageError: no chat template.
    """
    api: Any = model.api
    if not all(
        hasattr(api, name)
        for name in ("do_sample", "tokenizer_call_args", "enable_thinking", "tokenizer")
    ):
        return
    if not model.config.temperature:  # what the user asked for; the task's own is 0
        api.do_sample = False
    if api.use_chat_template is not False:
        if not (api.chat_template or api.tokenizer.chat_template):
            raise UsageError(
                f"The tokenizer of {model.name} has no chat template, and guessing one would audit"
                " another model. Pass -M chat_template=TEMPLATE, or -M use_chat_template=false for"
                " inspect's own `user: …`."
            )
        api.tokenizer_call_args = {"add_special_tokens": False, **api.tokenizer_call_args}
        if api.enable_thinking is None:
            api.enable_thinking = False


# -- metrics
# -----------------------------------------------------------------------------------------------------------


@metric
def stderr() -> Metric:
    """Standard error of a rate over prompts, s / √n; NaN of fewer than two, of which inspect's own
    says 0."""

    def compute(scores: list[SampleScore]) -> float:
        found = [score.score.as_float() for score in scores]
        if len(found) < 2:
            return math.nan
        centre = sum(found) / len(found)
        return math.sqrt(sum((x - centre) ** 2 for x in found) / (len(found) - 1) / len(found))

    return compute


@metric
def interval() -> Metric:
    """Wilson's 95 % interval of a rate over prompts (the mean of a prompt's epochs counts once);
    NaN where undefined."""

    def compute(scores: list[SampleScore]) -> dict[str, float]:
        total = sum(score.score.as_float() for score in scores)
        found = wilson(min(total, len(scores)), len(scores))
        return {
            end: math.nan if x is None else x for end, x in (("lo", found.lo), ("hi", found.hi))
        }

    return compute


RATES: dict[str, list[Metric]] = {
    rate: [mean(), stderr(), interval()] for rate in values(Label.UNSCORED)
}


# -- the scorer
# --------------------------------------------------------------------------------------------------------


@scorer(metrics=RATES, name=VERDICT)
def verdict(judge: str = "builtin", kind: str = "harmful") -> Scorer:
    """One of auditgap's judges as an inspect scorer; the value is `auditgap.inspect.values`, the
    answer the label.

    `kind` of the prompts: harmful, jailbreak, benign or over_refusal. Graded as in the behavioural
    audit, coherence gate and all, but for the text's NLL, which needs the model's logits. An answer
    that the endpoint cut off or filtered is unscored: its words are not the model's.
    """
    made = load_judge(judge, device=pick_device("auto"))
    one_at_a_time = anyio.CapacityLimiter(1)  # a judge may be a model, and none is made for threads

    async def score(state: TaskState, target: Target) -> Score:
        problem = "" if state.output.choices else "no_answer"
        problem = problem or NOT_ITS_OWN.get(state.output.stop_reason, "")
        # inspect keeps the chains that it knows apart; what is left in the text is one too
        found = split(state.output.completion)
        problem = problem or (UNFINISHED if found.unfinished else "")
        said = Answers(
            (found.answer,),
            (None,),
            np.ones(1, dtype=bool),
            (problem,),
            np.full(1, np.nan),
        )
        measure = partial(
            grade, said, [Prompt(state.input_text)], made, subject=str(state.model), kind=kind
        )
        measured = await anyio.to_thread.run_sync(measure, limiter=one_at_a_time)
        row, reason = measured.rows[0], measured.texts[0]["reason"]
        return Score(
            value=values(row.verdict, row.refused), answer=row.verdict, reason=reason or None
        )

    return score
