"""On a GPU the engine finds the CPU's edits and says the CPU's words."""

from __future__ import annotations

import pytest
import tiny
import torch

from auditgap.engines import Request, Serving
from auditgap.engines.hf import HFEngine
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.models import Rendered, wrap
from auditgap.types import Edit, Prompt, Site, Subject

RENDERED = [
    Rendered(Prompt("a"), (5, 6, 7, 8, 9), (True,) * 5),
    Rendered(Prompt("b"), (10, 11, 12), (True,) * 3),
]


def engine(device: str, dtype: torch.dtype = torch.float32) -> HFEngine:
    model = tiny.model("llama", dtype=dtype).to(device)
    return HFEngine(wrap(model, tiny.tokenizer(), Subject("tiny", "tiny")), pad_tolerance=0.9)


@pytest.mark.gpu
@pytest.mark.parametrize("site", [Site(-1), Site(1), Site(3)], ids=str)
def test_a_gpu_agrees_with_the_cpu(site: Site) -> None:
    goals = [Goal(r, (13, 9), (0.1, 0.3)) for r in RENDERED]
    here, there = (attack(engine(device), goals, site, PGD(steps=4)) for device in ("cpu", "cuda"))
    for a, b in zip(
        (f for row in here for f in row), (f for row in there for f in row), strict=True
    ):
        assert (a.delta.sign() == b.delta.sign()).float().mean() > 0.98
    requests = [Request(r, Edit(site, row[0].delta)) for r, row in zip(RENDERED, here, strict=True)]
    assert [c.ids for c in engine("cuda").generate(requests, 6)] == [
        c.ids for c in engine("cpu").generate(requests, 6)
    ]


@pytest.mark.gpu
def test_bf16_on_a_gpu_passes_its_self_test() -> None:
    for site in (Site(-1), Site(0), Site(3)):
        engine("cuda", torch.bfloat16).self_test(site)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_edits_in_vllm_on_a_gpu(tmp_path, dtype: str) -> None:
    """The self-test passes in both dtypes; in float32 the text is that of transformers."""
    pytest.importorskip("vllm", reason="vLLM is not installed: pip install vllm")
    folder = str(
        tiny.save(
            "llama", tmp_path / "m", hidden_size=128, num_attention_heads=2, num_key_value_heads=1
        )
    )
    draw = torch.Generator().manual_seed(0)
    edits = [
        Edit(Site(i), 0.5 * torch.randn(len(r.ids), 128, generator=draw))
        for i, r in zip((-1, 2), RENDERED, strict=True)
    ]
    requests = [Request(r, edit) for r, edit in zip(RENDERED, edits, strict=True)] + [
        Request(RENDERED[0])
    ]
    serving = Serving(
        engine="vllm", dtype=dtype, device="cuda", gpu_memory=0.2, chat_template="none"
    )
    with serving.open(folder) as spoken:
        said = spoken.generate(requests, 6)
    if dtype == "float32":
        with serving.model_copy(update={"engine": "hf"}).open(folder) as plain:
            assert [c.ids for c in plain.generate(requests, 6)] == [c.ids for c in said]
