"""Pooled features against a plain twin (one conversation at a time, a hook a block, fp64), and the
cache on disk."""

import threading
from dataclasses import replace

import pytest
import tiny
import torch

from auditgap.errors import AuditgapError, UsageError
from auditgap.probes.features import cached_features, extract, features_key, shard_rows
from auditgap.types import Prompt
from tests.one_thread import one_thread  # noqa: F401

WORDS = (
    "red blue green vault door key open shut bread water salt flour oven sun moon star sea".split()
)


def talks(loaded, n: int = 9):
    def said(i: int) -> str:
        return " ".join(WORDS[(i + k) % len(WORDS)] for k in range(1 + 3 * i))

    return [
        loaded.chat.converse(Prompt(f"what is the colour of {WORDS[i % 17]} ?"), said(i))
        for i in range(n)
    ]


def plain(loaded, conversations) -> torch.Tensor:
    """One conversation at a time, no padding, every block's whole output kept, mean in fp64."""
    rows, kept = [], []
    for talk in conversations:
        kept.clear()
        handles = [
            block.register_forward_hook(
                lambda _m, _a, out: kept.append(out[0] if isinstance(out, tuple) else out)
            )
            for block in loaded.blocks
        ]
        with torch.no_grad():
            loaded.model(input_ids=torch.tensor([talk.ids], device=loaded.device))
        for handle in handles:
            handle.remove()
        rows.append(torch.stack([h[0].double().mean(0) for h in kept]))
    return torch.stack(rows)


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_features_are_the_plain_ones_in_every_family(family):
    loaded = tiny.load(family)
    conversations = talks(loaded)
    found = extract(loaded, conversations, batch_tokens=200)
    assert found.shape == (9, tiny.N_BLOCKS, tiny.WIDTH) and found.dtype == torch.float32
    want = plain(loaded, conversations)
    assert torch.allclose(found.double(), want, atol=1e-5 * want.abs().max().item())


def test_in_fp64_batching_changes_nothing():
    loaded = tiny.load("llama", dtype=torch.float64)
    conversations = talks(loaded, 12)
    one = extract(loaded, conversations, batch_tokens=1)
    many = extract(loaded, conversations, batch_tokens=100_000)
    assert torch.allclose(one, many, atol=1e-6) and torch.allclose(
        one.double(), plain(loaded, conversations), atol=1e-5
    )


def test_padding_is_not_pooled(monkeypatch):
    """Rows of very different length in one pack, so that most of the batch is padding."""
    from auditgap.probes import features

    monkeypatch.setattr(features, "packs", lambda lengths, **_: [list(range(len(lengths)))])
    loaded = tiny.load()
    conversations = talks(loaded)
    assert torch.allclose(
        extract(loaded, conversations).double(), plain(loaded, conversations), atol=1e-5
    )


def test_the_model_is_left_as_it_was():
    loaded = tiny.load()
    loaded.model.train()
    extract(loaded, talks(loaded, 2))
    assert loaded.model.training and not any(block._forward_hooks for block in loaded.blocks)


def test_a_conversation_longer_than_the_model_reads_is_refused():
    loaded = tiny.load(max_position_embeddings=8)
    with pytest.raises(UsageError, match="--max-tokens 8"):
        extract(loaded, talks(loaded, 4))


# ----------------------------------------------------------------------------------------------------------
# the cache


def test_the_second_time_nothing_is_extracted(tmp_path, monkeypatch):
    from auditgap.probes import features

    loaded = tiny.load()
    conversations = talks(loaded)
    first = cached_features(loaded, conversations, folder=tmp_path)
    monkeypatch.setattr(features, "extract", None)
    assert torch.equal(cached_features(loaded, conversations, folder=tmp_path), first)
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("-0-of-1.safetensors") and path.stat().st_mode & 0o777 == 0o600


def test_the_key_is_of_model_tokens_and_dtype():
    loaded, conversations = tiny.load(), talks(tiny.load())
    keys = {
        features_key(loaded, conversations, "float32"),
        features_key(loaded, conversations, "bfloat16"),
        features_key(loaded, conversations[:-1], "float32"),
        features_key(tiny.load(seed=1), conversations, "float32"),
        features_key(
            replace(loaded, model=tiny.model(dtype=torch.bfloat16)), conversations, "float32"
        ),
    }
    assert len(keys) == 5 and features_key(tiny.load(), talks(tiny.load()), "float32") in keys


def test_ranks_share_the_work_and_read_the_same(tmp_path):
    loaded = tiny.load()
    conversations = talks(loaded)
    whole = extract(loaded, conversations)
    got = {}
    models = [tiny.load() for _ in range(3)]
    ranks = [
        threading.Thread(
            target=lambda r=r: got.update(
                {r: cached_features(models[r], conversations, folder=tmp_path, shard=(r, 3))}
            )
        )
        for r in range(3)
    ]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert len(list(tmp_path.glob("*-of-3.safetensors"))) == 3
    assert all(
        torch.allclose(got[r], whole, atol=1e-6) and torch.equal(got[r], got[0]) for r in range(3)
    )
    # one process reads what three wrote
    assert torch.equal(cached_features(loaded, conversations, folder=tmp_path), got[0])


def test_a_truncated_or_altered_file_is_set_aside_and_made_again(tmp_path):
    loaded = tiny.load()
    conversations = talks(loaded)
    first = cached_features(loaded, conversations, folder=tmp_path).clone()
    (path,) = tmp_path.iterdir()
    for damage in (
        lambda b: b[:-50],
        lambda b: b[:-3] + bytes([b[-3] ^ 1]) + b[-2:],
        lambda b: b"",
    ):
        data = path.read_bytes()
        path.unlink()  # the mapping of the first reader stays whole
        path.write_bytes(damage(data))
        assert torch.equal(cached_features(loaded, conversations, folder=tmp_path), first)
    assert len(list(tmp_path.glob("*.corrupt"))) == 3


def test_bfloat16_is_kept_as_bfloat16(tmp_path):
    loaded = tiny.load()
    conversations = talks(loaded)
    found = cached_features(loaded, conversations, folder=tmp_path, dtype="bfloat16")
    assert found.dtype == torch.bfloat16 and torch.equal(
        found, extract(loaded, conversations).bfloat16()
    )
    with pytest.raises(UsageError, match="float32 or bfloat16"):
        cached_features(loaded, conversations, folder=tmp_path, dtype="int8")


def test_a_rank_that_never_comes_is_named(tmp_path):
    loaded = tiny.load()
    with pytest.raises(AuditgapError, match="Rank 1 of 2"):
        cached_features(loaded, talks(loaded), folder=tmp_path, shard=(0, 2), patience=0.3)


def test_shards_part_the_rows():
    assert sorted(i for r in range(4) for i in shard_rows(10, (r, 4))) == list(range(10))
    with pytest.raises(UsageError, match="rank < world"):
        shard_rows(10, (4, 4))
