"""Memory decides how many rows run together: measured on a first small batch, remembered where it ran
out, and the numbers are those of whole packs. The device is simulated: so many bytes, so many a
token, as its allocator would refuse them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch

from auditgap.engines import Request, fitting, hf
from auditgap.engines.fitting import FIRST, Fitting, is_out_of_memory
from auditgap.engines.hf import HFEngine
from auditgap.interventions import universal
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.types import Edit, Prompt, Site

SITE = Site(0)
TEXTS = [f"Which colour is number {i}?" for i in range(12)]


class Device:
    """So much memory, of which a token of any work takes `a_token`; what is asked of it is kept."""

    def __init__(self, memory: int, a_token: int = 1, *, held: int = 0) -> None:
        self.memory, self.a_token, self.held = memory, a_token, held
        self.asked: list[int] = []
        self.peak = 0

    def take(self, tokens: int) -> None:
        self.asked.append(tokens)
        self.peak = max(self.peak, tokens * self.a_token)
        if self.held + tokens * self.a_token > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    # -- as a `Meter`

    def start(self) -> None:
        self.peak = 0

    def fit(self, tokens: int) -> int:
        return int(0.8 * (self.memory - self.held) * tokens / max(1, self.peak))


def worked(device: Device, fit: Fitting, lengths: list[int], kind: object = "work") -> list[int]:
    def run(rows):
        device.take(len(rows) * max(lengths[i] for i in rows))
        return [10 * i for i in rows]

    return fit.run(kind, run, range(len(lengths)), lengths)


@pytest.mark.parametrize("memory", [10, 1_000, 3_000, 10**9])
def test_a_measured_kind_meets_no_refusal(memory):
    device, lengths = Device(memory * 7, 7), [10] * 400
    fit = Fitting(device)
    assert worked(device, fit, lengths) == [10 * i for i in range(400)]
    # the first batch may itself be too large for a small device
    assert device.asked[0] == min(FIRST // 10 * 10, 4_000)
    n_out = fit.n_out
    assert n_out <= 8
    before = len(device.asked)
    for _ in range(5):
        worked(device, fit, lengths)
    assert fit.n_out == n_out, "met again"
    if memory >= 3_000:
        assert n_out == 0 and max(device.asked) <= memory
        assert len(device.asked) - before == 5 * -(-4_000 // (max(device.asked) or 1))


def test_where_nothing_is_measured_a_refusal_is_remembered_for_its_kind_alone():
    device, fit = Device(100), Fitting()
    for _ in range(4):
        assert worked(device, fit, [10] * 64) == [10 * i for i in range(64)]
    assert fit.n_out == 3 and device.asked[:4] == [640, 320, 160, 80]
    assert worked(device, fit, [10] * 64, "another") and fit.n_out == 6


def test_memory_that_others_took_since_is_one_refusal_more():
    device = Device(4_000)
    fit = Fitting(device)
    worked(device, fit, [10] * 400)
    device.held = 2_000
    worked(device, fit, [10] * 400)
    worked(device, fit, [10] * 400)
    assert fit.n_out == 1


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: out of memory\nCompile with `TORCH_USE_CUDA_DSA`"),
        RuntimeError("NCCL Error 1: unhandled cuda error: Failed to allocate memory of 8 bytes"),
        RuntimeError("HIP error: hipErrorOutOfMemory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes."),
        torch.OutOfMemoryError("Allocation on device 0"),
        MemoryError(),
    ],
    ids=["cublas", "cudnn", "cuda", "nccl", "hip", "cpu", "torch", "python"],
)
def test_every_allocators_words_are_understood(error):
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    assert not is_out_of_memory(ValueError("out of memory"))


# -- the real engine on such a device


@pytest.fixture(scope="module")
def loaded():
    return tiny.load("llama")


def _are_tokens(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.long


def engine_on(loaded, monkeypatch, device: Device | None, *, measured: bool = True) -> HFEngine:
    engine = HFEngine(loaded, batch_tokens=1024)
    engine.self_test(SITE)
    if device is not None:
        engine.fitting = Fitting(device if measured else None)
        for home, name in ((engine, "logits_from"), (hf, "prefill")):
            plain = getattr(home, name)

            def refused(*args, plain=plain, is_ours=home is engine, **kwargs):
                if is_ours or args[0] is engine:
                    device.take(next(a for a in args if _are_tokens(a)).numel())
                return plain(*args, **kwargs)

            monkeypatch.setattr(home, name, refused)
    return engine


@pytest.mark.parametrize("measured", [True, False], ids=["measured", "refused"])
def test_attack_universal_and_speech_are_those_of_whole_packs(loaded, monkeypatch, measured):
    monkeypatch.setattr(fitting, "FIRST", 120)

    def all_of(engine):
        rendered = [engine.render(Prompt(text)) for text in TEXTS]
        goals = [Goal(r, (5, 6), (0.02, 0.05)) for r in rendered]
        pgd = PGD(steps=2)
        found = [attack(engine, goals, SITE, pgd) for _ in range(3)][-1]
        vectors = universal.search(engine, rendered, (5, 6), SITE, [0.5], 2)
        edits = [Edit(SITE, row[1].delta) for row in found]
        requests = [Request(r, e, (5, 6)) for r, e in zip(rendered, edits, strict=True)]
        said = [engine.generate(requests, 4) for _ in range(3)][-1]
        return found, vectors, said

    whole = all_of(engine_on(loaded, monkeypatch, None))
    device = Device(200)
    engine = engine_on(loaded, monkeypatch, device, measured=measured)
    found, vectors, said = all_of(engine)
    assert max(device.asked) > 0 and len(device.asked) > 10
    # attack, universal and speech: a few refusals, not one a pack
    assert engine.fitting.n_out <= (2 if measured else 8), device.asked
    for a, b in zip(whole[0], found, strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.allclose(one.delta, other.delta, atol=1e-5)
            assert one.nll_edited == pytest.approx(other.nll_edited, rel=1e-4)
    assert torch.allclose(whole[1][0], vectors[0], atol=1e-5)
    assert [c.ids for c in whole[2]] == [c.ids for c in said]
    plain = [replace(c, target_nll=None).target_nll for c in said]
    assert plain == [None] * len(said)
    assert [c.target_nll for c in said] == pytest.approx([c.target_nll for c in whole[2]], rel=1e-4)


def test_the_nll_of_long_answers_is_in_chunks(loaded, monkeypatch):
    from auditgap.engines import hooked

    engine = HFEngine(loaded)
    rendered = [engine.render(Prompt(text)) for text in TEXTS[:4]]
    answers = [tuple(range(3, 3 + n)) for n in (1, 2, 9, 14)]
    whole = engine.nll(rendered, answers)
    largest, plain = [], engine.forward

    def seen(*args, **kwargs):
        out = plain(*args, **kwargs)
        largest.append(out.logits.numel())
        return out

    monkeypatch.setattr(engine, "forward", seen)
    monkeypatch.setattr(hooked, "_LOGITS", 4 * 3 * loaded.n_embeddings)
    assert engine.nll(rendered, answers) == pytest.approx(whole, rel=1e-5)
    assert max(largest) <= hooked._LOGITS and len(largest) > 4
