"""What every test shares: no hub, own cache and home where files are written, and few threads on
small models."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# they share the cores, and so do the children of each
if n_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // n_workers)))

import pytest
import torch
import warm

warm.install()
# a shell starts what it puts into the background with Ctrl-C ignored, and tests press it
signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup: deaf still, but no child is
    signal.signal(signal.SIGHUP, lambda *_: None)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # with the longest files first no process is left alone with one at the end
    items.sort(key=lambda item: item.get_closest_marker("minutes") is None)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="module")
def imports_are_not_searched() -> Iterator[None]:
    """Every engine that closes collects garbage, which takes half a second where torch and
    transformers are among what is searched."""
    gc.collect()
    gc.freeze()
    yield


def pytest_sessionfinish() -> None:
    gc.unfreeze()


@pytest.fixture
def mounted(tmp_path) -> Iterator[Callable[[str], Path]]:
    """Makes a file system in memory of that size (`256k`), where that is allowed."""
    there = []

    def make(size: str) -> Path:
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"cannot mount a tmpfs here: {done.stderr.strip()}")
        there.append(folder)
        return folder

    yield make
    for folder in there:
        subprocess.run(["umount", str(folder)], check=True)
