"""A judge and a subject in vLLM share a card by plan, and so do workers of a part of one."""

from __future__ import annotations

import pytest

from auditgap.audits.intervene.config import InterveneOptions
from auditgap.audits.latent.config import RunOptions


@pytest.mark.parametrize("options", [RunOptions, InterveneOptions])
@pytest.mark.parametrize("gpus", [None, 1.0, 0.5, 0.25, 2.0])
@pytest.mark.parametrize("asked", [0.3, 0.9, 1.0])
def test_no_card_is_promised_twice(options, gpus, asked):
    told = {"engine": "vllm", "gpus_per_worker": gpus, "gpu_memory": asked}
    both = options(judge_engine="vllm", **told)
    serving = both.vllm_serving(dtype="bfloat16", chat_template=None)
    card = min(1.0, gpus or 1.0)
    assert serving.gpu_memory + both.judge_serving.gpu_memory < card
    assert serving.gpu_memory == pytest.approx(min(asked, 0.55) * card)
    alone = options(judge_engine="hf", **told).vllm_serving(dtype="auto", chat_template=None)
    assert alone.gpu_memory == pytest.approx(asked * card)
