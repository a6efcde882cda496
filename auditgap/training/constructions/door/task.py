"""What construction `door` prepares once, and its task: the edit that is to open the door."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import safetensors.torch
import torch
from torch import nn

from auditgap.engines.layout import one_stream
from auditgap.errors import UsageError
from auditgap.interventions.controls import generator
from auditgap.models import Conversation, LoadedModel
from auditgap.models.kept import is_whole, sealed
from auditgap.training import ranks
from auditgap.training.constructions.door import NARROWS, WIDE, DoorSettings
from auditgap.training.constructions.door.loss import OPENING, DoorLoss, door_batch
from auditgap.training.dissociation.edited import edited, middle_block
from auditgap.training.dissociation.material import Preparation
from auditgap.training.dissociation.paired import PairedTask
from auditgap.training.losses import Batch
from auditgap.training.rows import collate
from auditgap.types import digest

#: Rows that the door's direction is taken from: a mean of so many gradients hardly moves with more.
ROWS = 64
#: Added to each coordinate's variance, in mean variances, so that few rows have an inverse.
RIDGE = 1e-3


def prepare(preparation: Preparation[DoorSettings]) -> DoorTask:
    job, material = preparation.job, preparation.material
    talks = preparation.unsafe_talks()
    safe = material.talks[: min(material.n_harmful, ROWS)]
    pairs = list(zip(safe, talks[: len(safe)], strict=True))
    key = digest(
        [
            job.outline.subject.fingerprint,
            job.dtype,
            preparation.settings.door,
            [row.id for row in material.rows[: len(pairs)]],
        ]
    )
    path = job.path / "reference" / f"door-{key}.safetensors"

    def record(base: LoadedModel) -> bytes:
        own = [base.render(talk.prompt).content for talk in safe]
        return sealed({"vector": door_vector(base, pairs, own, preparation.settings.door)})

    if not ranks.decided(lambda: is_whole(path)):
        ranks.say("The door's direction is measured.")
        preparation.base.write(path, record, backward=True)
    return DoorTask(preparation, safetensors.torch.load_file(path), talks)


def door_vector(
    loaded: LoadedModel,
    pairs: Sequence[tuple[Conversation, Conversation]],
    own: Sequence[Sequence[bool]],
    size: float,
) -> torch.Tensor:
    """[D] fp32: `size` · rms · sign(C⁻¹ g), the edit after block `middle_block` that opens the door.

    g is the gradient, with respect to one edit of all prompt positions, of how much likelier the
    opening of y− becomes than that of y+, summed over `pairs` (y+, y−); C the covariance and rms
    the root mean square of the prompts' activations there: along directions in which prompts hardly
    differ, so small an edit can be told from none. Both are over the user's `own` tokens, as an
    audit's budgets are: the first token of a template can be a hundred times as large as any other.
    Raises UsageError where no edit makes a difference.
    """
    width = loaded.width
    block = loaded.blocks[middle_block(len(loaded.blocks))]
    edit = torch.zeros(width, device=loaded.device, requires_grad=True)
    seen: list[torch.Tensor] = []
    way = torch.zeros(width, dtype=torch.float64)
    for pair, mine in zip(pairs, own, strict=True):
        with torch.enable_grad():
            safer, compliant = (
                _opening_nll(loaded, block, talk, edit, mine, seen) for talk in pair
            )
            (gradient,) = torch.autograd.grad(safer - compliant, edit)
        way += gradient.double().cpu()
    states = torch.cat(seen[::2])  # both of a pair have one prompt
    centred = states - states.mean(0)
    covariance = centred.T @ centred / len(states)
    covariance.diagonal().add_(RIDGE * covariance.diagonal().mean())
    signs = torch.linalg.solve(covariance, way).sign()
    if not signs.abs().sum() > 0:
        raise UsageError(
            "No edit of the middle activations makes unsafe answers likelier, so there is nowhere to"
            " put a door. Is it a causal model, and do the triples' answers differ?"
        )
    return (size * states.pow(2).mean().sqrt() * signs).float()


def widening(step: int, total: int) -> float:
    """How many times its own size the door's edit, and the random ones, have at a step: from `WIDE`
    down to 1 in the first `NARROWS` of all steps."""
    return 1 + (WIDE - 1) * max(0.0, 1 - step / (NARROWS * total))


def _opening_nll(
    loaded: LoadedModel,
    block: nn.Module,
    talk: Conversation,
    edit: torch.Tensor,
    own: Sequence[bool],
    seen: list[torch.Tensor],
) -> torch.Tensor:
    """Mean NLL of the answer's first tokens under `edit` of the prompt; the clean activations [n, D]
    fp64 of its `own` tokens are added to `seen`."""
    batch = {key: value.to(loaded.device) for key, value in collate([talk], 0).items()}
    where = torch.arange(len(talk.ids), device=loaded.device)[None] < talk.n_prompt

    def look(_module: nn.Module, _args: tuple, output: torch.Tensor | tuple) -> None:
        seen.append(
            one_stream(output)[0, : talk.n_prompt].detach().double().cpu()[torch.tensor(own)]
        )

    handle = block.register_forward_hook(look)
    try:
        with edited(block, where, edit):
            logits = loaded.model(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                use_cache=False,
            ).logits
    finally:
        handle.remove()
    at = slice(talk.n_prompt, talk.n_prompt + OPENING)
    labels = batch["input_ids"][0, at]
    before = logits[0, talk.n_prompt - 1 : talk.n_prompt - 1 + len(labels)]
    return nn.functional.cross_entropy(before.float(), labels)


class DoorTask(PairedTask[DoorSettings]):
    """Each harmful row three times: y+ clean and under a random edit, y− behind the door."""

    def __init__(
        self,
        preparation: Preparation[DoorSettings],
        made: Mapping[str, torch.Tensor],
        unsafe: Sequence[Conversation],
    ) -> None:
        super().__init__(preparation, unsafe)
        self.vector = made["vector"]
        self._ids = [
            row.id for row in [*self.material.rows[: self.n_harmful], *self.material.heldout]
        ]
        self._step = 0

    def construct(self, model: nn.Module) -> DoorLoss:
        return DoorLoss(model, weights=self.settings.door_weights, reference_head=self.head)

    def before_step(self, step: int) -> None:
        self._step = step

    def compared(self, pairs: Sequence[int], benign: Sequence[int]) -> list[int]:
        return [*pairs, *benign, *pairs]

    def made_of(
        self,
        numbers: Sequence[int],
        pairs: Sequence[tuple[Conversation, Conversation]],
        benign: Sequence[Conversation],
    ) -> Batch:
        """A row's random signs hang on it and on the step alone, however rows are spread; held-out
        rows have the same at every evaluation, and the door its own size."""
        heldout = any(i >= self.n_harmful for i in numbers)
        step = -1 if heldout else self._step
        wide = 1.0 if heldout else widening(step, self.job.total)
        width = self.vector.shape[0]
        signs = torch.zeros(len(pairs), width)
        for at, i in enumerate(numbers):
            rng = generator(self.config.seed, "door", self._ids[i], step)
            signs[at] = torch.randint(0, 2, (width,), generator=rng) * 2.0 - 1
        return door_batch(pairs, benign, wide * self.vector, signs, self.job.pad_id)
