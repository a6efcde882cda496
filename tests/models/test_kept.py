"""Tensors that are kept carry their own checksum: what changed of them is not read as if it had not."""

from __future__ import annotations

import random

import safetensors.torch
import torch

from auditgap.models.kept import is_whole, keep

TENSORS = {
    "vector": torch.arange(24, dtype=torch.float32).view(4, 6),
    "states": torch.linspace(-1, 1, 9).bfloat16(),
    "none": torch.empty(0, 3),
}


def test_a_changed_byte_is_not_read_as_what_was_written(tmp_path):
    path = tmp_path / "kept.safetensors"
    assert not is_whole(path)
    keep(path, TENSORS)
    assert is_whole(path) and path.stat().st_mode & 0o777 == 0o600
    data, draw, seen = path.read_bytes(), random.Random(3), 0
    for _ in range(300):
        changed = bytearray(data)
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        if not is_whole(path):
            seen += 1
            continue
        found = safetensors.torch.load_file(path)
        assert found.keys() == TENSORS.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert seen > 250
    path.write_bytes(data[:-7])
    assert not is_whole(path)
    safetensors.torch.save_file(TENSORS, path)  # by an earlier release: nothing to go by
    assert not is_whole(path)
