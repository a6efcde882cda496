"""What a whole audit may be told by name; each goes to every part that knows the word.

    auditgap audit ./tuned --base ./base --limit 50

A part's own settings are a section of the file, `--set lvs.steps=20` or `lvs={"steps": 20}`, and any
other setting of a part is taken too. None means the profile's value. No torch here.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from auditgap.audits.options import AllowRaw, RetryFailed
from auditgap.config import Flag, Frozen, Topic

_PROFILE = "the profile's"


class WholeSettings(Frozen):
    """The model, its base, and the settings that the parts share."""

    model: Annotated[
        str, Flag("Model: hub id, id@revision, folder, adapter, or smollm2", positional=True)
    ] = Field(min_length=1)
    base: Annotated[str | None, Flag("Base model: for the probe and the fine-tuning curve")] = None
    profile: Annotated[
        str | None,
        Flag(
            "smoke, laptop, standard, paper or release; see `ls presets`",
            default="standard on a GPU, laptop without one",
        ),
    ] = None
    suite: Annotated[str | None, Flag("Prompt suite, as in `evaluate`", default=_PROFILE)] = None
    prompts: Annotated[str | None, Flag("Prompts to attack, as in `lvs`", default=_PROFILE)] = None
    limit: Annotated[
        int | None, Flag("Use N prompts of each set, chosen by hash", default=_PROFILE)
    ] = None
    triples: Annotated[
        str | None, Flag("Contrast triples for the probe: FILE, hub:ID or demo", default="no probe")
    ] = None
    sft_data: Annotated[
        str | None,
        Flag(
            "Rows for the fine-tuning curve, with the columns prompt and response",
            default="no curve",
        ),
    ] = None
    max_new_tokens: Annotated[
        int | None, Flag("Maximum new tokens, decoded greedily", default=_PROFILE)
    ] = None
    seed: Annotated[
        int | None, Flag("Seed for sampling, controls and intervals", default=_PROFILE)
    ] = None
    layers: Annotated[
        str | None, Flag("Where it is attacked, as in `lvs`", Topic.ATTACK, default=_PROFILE)
    ] = None
    judge: Annotated[
        str | None,
        Flag("Judge; see `ls judges`", Topic.JUDGING, default=_PROFILE),
    ] = None
    engine: Annotated[
        str | None, Flag("Engine that generates: hf or vllm", Topic.WHERE, default=_PROFILE)
    ] = None
    device: Annotated[
        str | None, Flag("auto, cpu, cuda or cuda:N", Topic.WHERE, default=_PROFILE)
    ] = None
    dtype: Annotated[
        str | None, Flag("auto, float32, bfloat16 or float16", Topic.WHERE, default=_PROFILE)
    ] = None
    executor: Annotated[
        str | None, Flag("local (this process) or ray", Topic.WHERE, default=_PROFILE)
    ] = None
    name: Annotated[
        str | None,
        Flag("What tables and reports call the model", Topic.OUTPUT, default="as it was typed"),
    ] = None
    out: Annotated[
        str | None,
        Flag(
            "The audit's folder; the same command resumes",
            Topic.OUTPUT,
            default="runs/audit-MODEL",
        ),
    ] = None
    allow_raw: AllowRaw = False
    public: Annotated[
        bool, Flag("Write a copy of the report with aggregates alone as well", Topic.OUTPUT)
    ] = False
    break_lock: Annotated[
        bool, Flag("Take over folders of processes that are no longer running", Topic.OUTPUT)
    ] = False
    retry_failed: RetryFailed = False
