"""Generation and NLL under edits against `model.generate` and one plain forward, one prompt at a
time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import tiny
import torch

from auditgap.engines import Completion, Request, tensors
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.models import Rendered, wrap
from auditgap.types import Edit, Prompt, Site, Subject

VARIANTS = {
    **{family: (family, {}) for family in tiny.FAMILIES},
    "gemma2, window 5": ("gemma2", {"sliding_window": 5}),
    "gemma3_text, window 5": ("gemma3_text", {"sliding_window": 5}),
    "mistral, window 5": ("mistral", {"sliding_window": 5}),
}
SITES = [Site(-1), Site(0), Site(2), Site(3)]
NEW = 8


@cache
def engine(variant: str, pad_tolerance: float = 0.9) -> HFEngine:
    family, changes = VARIANTS[variant]
    loaded = wrap(tiny.model(family, **changes), tiny.tokenizer(), Subject(variant, variant))
    return HFEngine(loaded, batch_tokens=4096, pad_tolerance=pad_tolerance)


@cache
def prompts() -> tuple[Rendered, ...]:
    draw = torch.Generator().manual_seed(4)
    ids = [
        tuple(torch.randint(4, tiny.VOCABULARY, (n,), generator=draw).tolist()) for n in (12, 4, 9)
    ]
    return tuple(
        Rendered(Prompt(f"prompt {i}"), own, (True,) * len(own)) for i, own in enumerate(ids)
    )


@cache
def requests() -> tuple[Request, ...]:
    """Every prompt at every site and without an edit, in no order."""
    draw = torch.Generator().manual_seed(5)
    made = [
        Request(
            r,
            None
            if site is None
            else Edit(site, 0.5 * torch.randn(len(r.ids), tiny.WIDTH, generator=draw)),
            (13, 9, 14),
        )
        for r in prompts()
        for site in [None, *SITES]
    ]
    return tuple(made[i] for i in torch.randperm(len(made), generator=draw))


@contextmanager
def prefill_hook(model: torch.nn.Module, edit: Edit | None) -> Iterator[None]:
    """Adds δ to the first forward's prompt positions, the plain way: on the whole model."""
    blocks = model.gpt_neox.layers if hasattr(model, "gpt_neox") else model.model.layers
    first = [True]

    def add(h: torch.Tensor) -> torch.Tensor:
        if first.pop() if first else False:
            n = edit.delta.shape[0]
            return torch.cat([h[:, :n] + edit.delta, h[:, n:]], 1)
        return h

    if edit is None:
        yield
        return
    if edit.site.is_embedding:
        hook = blocks[0].register_forward_pre_hook(lambda _, args: (add(args[0]), *args[1:]))
    else:
        hook = blocks[edit.site.layer_index].register_forward_hook(lambda _, __, out: add(out))
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def plain_completion(model: torch.nn.Module, request: Request, new: int = NEW) -> tuple[int, ...]:
    ids = torch.tensor([request.rendered.ids])
    with prefill_hook(model, request.edit):
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False
        )
    written = out[0, ids.shape[1] :].tolist()
    return tuple(written[: written.index(2)] if 2 in written else written)  # 2 is the end of text


@torch.no_grad()
def plain_nll(model: torch.nn.Module, request: Request, answer: tuple[int, ...]) -> float:
    ids, t = torch.tensor([[*request.rendered.ids, *answer]]), len(request.rendered.ids)
    with prefill_hook(model, request.edit):
        logits = model(ids, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[0, t - 1 : -1], ids[0, t:]).item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_request_as_model_generate_would(variant):
    """Mixed sites, unedited rows, three lengths: one call, padded; one call a request; and
    transformers itself."""
    speaker = engine(variant)
    together = speaker.generate(requests(), NEW)
    for request, completion in zip(requests(), together, strict=True):
        assert completion.ids == plain_completion(speaker.model, request)
        (alone,) = speaker.generate([request], NEW)
        assert alone.ids == completion.ids and alone.stopped == completion.stopped
        assert completion.target_nll == pytest.approx(
            plain_nll(speaker.model, request, request.target), abs=1e-4
        )
        if request.edit is None:
            assert completion.l2_effective is None and completion.linf_effective is None
        else:
            assert completion.l2_effective == pytest.approx(
                request.edit.delta.norm().item(), rel=1e-4
            )
            assert completion.linf_effective == pytest.approx(
                request.edit.delta.abs().max().item(), rel=1e-4
            )
    assert len({c.ids for c in together}) > 5  # the edits do change what is said


@pytest.mark.parametrize("variant", VARIANTS)
def test_nll_is_the_plain_one(variant):
    """Answers of four lengths, an empty one among them, under the same edits; asked together and
    alone."""
    speaker = engine(variant)
    answers = [(13, 9, 14, 20, 21), (), (30,), (40, 2)]
    asked = [(r, a) for r in requests() for a in answers]
    values = speaker.nll(
        [r.rendered for r, _ in asked], [a for _, a in asked], [r.edit for r, _ in asked]
    )
    for (request, answer), value in zip(asked, values, strict=True):
        if not answer:
            assert value is None
            continue
        assert value == pytest.approx(plain_nll(speaker.model, request, answer), abs=1e-4)
    clean = speaker.nll([r for r in prompts()], [(13, 9)] * 3)
    assert clean == pytest.approx(
        [plain_nll(speaker.model, Request(r), (13, 9)) for r in prompts()], abs=1e-4
    )


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_a_zero_edit_changes_nothing_bit_for_bit(variant, site):
    speaker = engine(variant)
    zero = [Request(r, Edit(site, torch.zeros(len(r.ids), tiny.WIDTH)), (13, 9)) for r in prompts()]
    clean = speaker.generate([Request(r, None, (13, 9)) for r in prompts()], NEW)
    for edited, untouched in zip(speaker.generate(zero, NEW), clean, strict=True):
        assert (edited.ids, edited.text, edited.target_nll) == (
            untouched.ids,
            untouched.text,
            untouched.target_nll,
        )
        assert edited.l2_effective == edited.linf_effective == 0
    ids = torch.tensor([prompts()[0].ids])
    with torch.no_grad(), speaker.edited(site, lambda h: h + torch.zeros_like(h)):
        logits = speaker.model(ids).logits
    with torch.no_grad():
        assert torch.equal(logits, speaker.model(ids).logits)


@pytest.mark.parametrize("site", [None, *SITES], ids=str)
def test_a_finished_row_stops_and_the_others_go_on(site):
    """The end of text is put where a row of the batch says it, in the middle of its answer."""
    speaker = HFEngine(tiny.load("llama"), batch_tokens=4096, pad_tolerance=0.9)
    mine = [
        Request(r.rendered, r.edit) for r in requests() if (r.edit.site if r.edit else None) == site
    ]
    before = speaker.generate(mine, NEW)
    assert not any(c.stopped for c in before)
    ending = before[0].ids[2]
    speaker.model.generation_config.eos_token_id = [2, ending]
    for old, new in zip(before, speaker.generate(mine, NEW), strict=True):
        cut = old.ids.index(ending) if ending in old.ids else NEW
        assert new.ids == old.ids[:cut]
        assert new.stopped == (ending in old.ids)
    assert speaker.generate(mine, NEW)[0].ids == before[0].ids[: before[0].ids.index(ending)]


def test_an_answer_that_ends_at_once_is_empty():
    speaker = HFEngine(tiny.load("llama"))
    (before,) = speaker.generate([Request(prompts()[0])], 1)
    speaker.model.generation_config.eos_token_id = before.ids[0]
    (after,) = speaker.generate([Request(prompts()[0])], NEW)
    assert (after.ids, after.text, after.stopped) == ((), "", True)


def test_no_requests():
    assert engine("llama").generate([], NEW) == []
    assert engine("llama").nll([], []) == []
    assert engine("llama").activations([], Site(0)) == []


@pytest.mark.parametrize("site", SITES, ids=str)
@pytest.mark.parametrize("variant", tiny.FAMILIES)
def test_activations_are_the_residual_stream_after_the_block(variant, site):
    """Captured the plain way: the input of the next block, or of the final norm. Padding never
    shows."""
    speaker = engine(variant)
    base = getattr(speaker.model, "gpt_neox", None) or speaker.model.model
    after = [
        *speaker.blocks,
        base.final_layer_norm if hasattr(base, "final_layer_norm") else base.norm,
    ]
    for rendered, h in zip(prompts(), speaker.activations(prompts(), site), strict=True):
        seen = []
        hook = after[site.layer_index + 1].register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            speaker.model(torch.tensor([rendered.ids]))
        hook.remove()
        assert h.shape == (len(rendered.ids), tiny.WIDTH) and h.dtype == torch.float32
        assert torch.allclose(h, seen[0][0], atol=1e-5)


#: Scores texts in one batch with and without a limit on its memory; prints what came and the batches.
REALLY = """
import json, resource
import tiny, torch
from pathlib import Path
from auditgap.engines.hf import HFEngine
from auditgap.models import Rendered
from auditgap.types import Prompt

torch.set_num_threads(1)
N, T = 512, 240  # all at once want twice the room, so that no luck of the allocator lets them pass
ids = torch.randint(4, tiny.VOCABULARY, (N, T), generator=torch.Generator().manual_seed(0)).tolist()
rows = [Rendered(Prompt(str(i)), tuple(one), (True,) * T) for i, one in enumerate(ids)]
tried, passed = [], []
hard = resource.getrlimit(resource.RLIMIT_AS)[1]

def score(rows):
    engine = HFEngine(tiny.load("llama"), batch_tokens=1 << 20)
    engine.model.register_forward_pre_hook(
        lambda m, a, k: tried.append(len(k["input_ids"])), with_kwargs=True)
    engine.model.register_forward_hook(lambda m, a, out: passed.append(len(out[0])))
    return engine.nll(rows, [(13, 9)] * len(rows))

score(rows[:2])
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, hard))
found = {"n": N}
tried.clear(), passed.clear()
found["tight"] = score(rows)
found["tried"], found["passed"] = list(tried), list(passed)
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
tried.clear()
found["free"] = score(rows)
found["free_tried"] = list(tried)
print(json.dumps(found))
""".replace("ROOM", str(150 << 20))


class TestOutOfMemory:
    """The model itself says that memory ran out, for any batch of more than `room` rows."""

    def tight(self, room: int) -> HFEngine:
        speaker = HFEngine(tiny.load("llama"), batch_tokens=4096, pad_tolerance=0.9)
        speaker.self_test(Site(0))
        speaker.self_test(Site(-1))
        self.refused = 0

        def say_no(_module: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            if kwargs["input_ids"].shape[0] > room:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

        speaker.model.register_forward_pre_hook(say_no, with_kwargs=True)
        return speaker

    @pytest.mark.parametrize("room", [1, 2])
    def test_same_results_in_smaller_portions(self, room):
        # halving takes its time
        mine = [r for r in requests() if r.edit is None or r.edit.site in (Site(0), Site(-1))][:5]
        goals = [Goal(r, (13, 9), (0.2, 0.4)) for r in prompts()]
        free, tight = engine("llama"), self.tight(room)
        for a, b in zip(free.generate(mine, NEW), tight.generate(mine, NEW), strict=True):
            assert (a.ids, a.stopped) == (b.ids, b.stopped) and a.target_nll == pytest.approx(
                b.target_nll, abs=1e-5
            )
        assert self.refused
        rendered, edits = [r.rendered for r in mine], [r.edit for r in mine]
        answers = [(13, 9, 14)] * len(mine)
        assert tight.nll(rendered, answers, edits) == pytest.approx(
            free.nll(rendered, answers, edits), abs=1e-5
        )
        for a, b in zip(
            free.activations(prompts(), Site(0)), tight.activations(prompts(), Site(0)), strict=True
        ):
            assert torch.allclose(a, b, atol=1e-6)
        pgd = PGD(steps=3)
        if room == 2:  # one prompt with its two radii is the smallest portion of an attack
            for a, b in zip(
                attack(free, goals, Site(0), pgd), attack(tight, goals, Site(0), pgd), strict=True
            ):
                assert all(
                    (x.delta == y.delta).float().mean() > 0.99 for x, y in zip(a, b, strict=True)
                )

    def test_the_radii_of_one_prompt_are_halved_too(self):
        found = attack(
            self.tight(1), [Goal(prompts()[0], (13, 9), (0.2, 0.4))], Site(0), PGD(steps=2)
        )
        assert len(found[0]) == 2

    def test_one_row_too_many_is_said_with_advice(self):
        speaker = self.tight(0)
        for call in (
            lambda: speaker.generate(requests()[:2], NEW),
            lambda: speaker.nll([prompts()[0]], [(13,)]),
            lambda: speaker.activations(prompts(), Site(0)),
            lambda: attack(speaker, [Goal(prompts()[0], (13,), (0.1,))], Site(0), PGD(steps=1)),
        ):
            with pytest.raises(AuditgapError, match="--dtype"):
                call()
        assert all(
            "forward" not in block.__dict__ and not block._forward_hooks for block in speaker.blocks
        )

    def test_memory_that_really_runs_out(self):
        """A process that may have 150 MB more than it has, and a batch that wants more."""
        done = subprocess.run(
            [sys.executable, "-c", REALLY],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=540,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["tight"] == pytest.approx(found["free"], abs=1e-5)
        n = found["n"]
        assert max(found["free_tried"]) == n, "with memory enough, all of them are one batch"
        assert max(found["tried"]) == n and n / 8 <= max(found["passed"]) <= n / 2


class TestBfloat16:
    """bf16 rounds differently in a batch than alone: what is said may differ late, the numbers
    agree within 8 bits."""

    @pytest.fixture(scope="class")
    def speaker(self):
        loaded = wrap(
            tiny.model("llama", dtype=torch.bfloat16), tiny.tokenizer(), Subject("bf16", "bf16")
        )
        return HFEngine(loaded, batch_tokens=4096, pad_tolerance=0.9)

    @pytest.mark.parametrize("variant", tiny.FAMILIES)
    def test_the_self_test_passes(self, variant):
        family, changes = VARIANTS[variant]
        loaded = wrap(
            tiny.model(family, dtype=torch.bfloat16, **changes),
            tiny.tokenizer(),
            Subject("bf16", "bf16"),
        )
        for site in SITES:
            HFEngine(loaded).self_test(site)

    def test_batched_and_single_agree(self, speaker):
        together = speaker.nll(
            [r.rendered for r in requests()],
            [(13, 9, 14)] * len(requests()),
            [r.edit for r in requests()],
        )
        alone = [speaker.nll([r.rendered], [(13, 9, 14)], [r.edit])[0] for r in requests()]
        assert together == pytest.approx(alone, rel=0.03)
        fp32 = engine("llama").nll(
            [r.rendered for r in requests()],
            [(13, 9, 14)] * len(requests()),
            [r.edit for r in requests()],
        )
        assert together == pytest.approx(fp32, rel=0.1, abs=0.1)

    @pytest.mark.parametrize("site", SITES, ids=str)
    def test_the_attack_agrees(self, speaker, site):
        goals = [Goal(r, (13, 9, 14), (0.3,)) for r in prompts()]
        together = attack(speaker, goals, site, PGD(steps=4))
        for goal, (found,) in zip(goals, together, strict=True):
            ((alone,),) = attack(speaker, [goal], site, PGD(steps=4))
            assert found.delta.dtype == torch.float32 and found.delta.abs().max() <= torch.tensor(
                0.3
            )
            assert (found.delta == alone.delta).float().mean() > 0.7
            assert found.nll_edited == pytest.approx(alone.nll_edited, rel=0.1, abs=0.15)
            assert found.nll_edited < found.nll_clean

    def test_the_norms_that_arrive_are_reported(self, speaker):
        rendered = prompts()[0]
        h = speaker.activations([rendered], Site(2))[0]
        for size, survives in ((1.0, True), (1e-4, False)):
            delta = torch.full_like(h, size)
            (said,) = speaker.generate([Request(rendered, Edit(Site(2), delta))], 1)
            change = (h + delta).to(torch.bfloat16).float() - h
            assert said.l2_effective == pytest.approx(change.norm().item(), rel=1e-3, abs=1e-6)
            assert said.linf_effective == pytest.approx(
                change.abs().max().item(), rel=1e-3, abs=1e-6
            )
            assert (said.l2_effective > 0.9 * delta.norm()) == survives

    def test_what_bf16_cannot_hold_is_added_in_fp32_and_rounded_once(self):
        # just above half of bf16's step at 1
        h, delta = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([0.003907])
        assert tensors.add(h, delta) == 1.0078125
        assert h + delta.to(torch.bfloat16) == 1.0  # rounded twice, the edit is lost
        assert tensors.add(h, delta).dtype == torch.bfloat16


def test_completions_hold_no_template_words():
    (said,) = engine("llama").generate([Request(prompts()[0])], NEW)
    assert isinstance(said, Completion)
    assert "<pad>" not in said.text and "<s>" not in said.text
    assert said.text.split() == [
        w for w in engine("llama").loaded.tokenizer.convert_ids_to_tokens(said.ids) if w[0] != "<"
    ]


@pytest.mark.parametrize("site", [None, Site(0)], ids=str)
def test_logits_that_are_no_numbers_are_no_completion(site):
    """A prompt whose forward overflows could not be completed: that has to be told from an answer
    (the judges see text)."""
    loaded = tiny.load("llama")
    with torch.no_grad():
        loaded.model.model.embed_tokens.weight[95] = math.inf
    speaker = HFEngine(loaded)
    rendered = Rendered(Prompt("broken"), (5, 95, 7), (True,) * 3)
    edit = None if site is None else Edit(site, torch.zeros(3, tiny.WIDTH))
    (said,) = speaker.generate([Request(rendered, edit, (13,))], 4)
    assert said.target_nll is None
    assert said.ids == ()
