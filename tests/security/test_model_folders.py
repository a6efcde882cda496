"""A model folder is looked at before transformers opens it: lying safetensors, links out of it,
pipes and huge files.

What asks for code to run (pickles, `auto_map`, kernels of the hub) is in tests/test_models.py.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import transformers

from auditgap import models
from auditgap.errors import AuditgapError, Refused, UsageError


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "models" / "llama"))


@pytest.fixture(autouse=True)
def untouched(monkeypatch, request):
    """Fails when transformers is asked to open anything, unless the test says `opens`."""
    if "opens" in request.fixturenames:
        return

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("transformers was asked")

    for name in ("AutoConfig", "AutoTokenizer", "AutoModelForCausalLM"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", asked)


@pytest.fixture
def opens() -> None:
    """transformers may open the folder."""


def refused(folder: Path, kind: type[AuditgapError], said: str) -> None:
    started = time.monotonic()
    with pytest.raises(kind, match=said) as caught:
        models.outline(str(folder))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900
    assert time.monotonic() - started < 30


# -- safetensors
# -----------------------------------------------------------------------------------------------------------


def tensor(
    start: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def file(header: object, body: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file: length of the header (or a lie about it), header, data."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


LIES: dict[str, Callable[[], bytes]] = {
    "shorter than a length": lambda: b"abc",
    "a header of nothing": lambda: file(b""),
    "a header past the end": lambda: file(b"{}", length=1000),
    "a header of 4 EiB": lambda: file(b"{}", length=2**62),
    "a header of all there is": lambda: file(b"{}", length=2**64 - 1),
    "a header of a gigabyte": lambda: file(b"{}", length=10**9),
    "no JSON": lambda: file(b"{{{{"),
    "no UTF-8": lambda: file(b"\xff\xfe\xfd\xfc"),
    "a list": lambda: file([]),
    "JSON 100,000 deep": lambda: file(b"[" * 100_000),
    "the same bytes twice": lambda: file({"a": tensor(0, 4), "b": tensor(0, 4)}, b"\0" * 4),
    "overlapping": lambda: file({"a": tensor(0, 8, shape=(2,)), "b": tensor(4, 8)}, b"\0" * 8),
    "out of range": lambda: file({"a": tensor(0, 4000, shape=(1000,))}, b"\0" * 4),
    "backwards": lambda: file({"a": tensor(4, 0)}, b"\0" * 4),
    "before the beginning": lambda: file({"a": tensor(-4, 4)}, b"\0" * 8),
    "with a hole": lambda: file({"a": tensor(0, 4), "b": tensor(8, 12)}, b"\0" * 12),
    "with something behind": lambda: file({"a": tensor(0, 4)}, b"\0" * 400),
    "another dtype than its bytes": lambda: file({"a": tensor(0, 4, "F64")}, b"\0" * 4),
    "another shape than its bytes": lambda: file(
        {"a": tensor(0, 4, shape=(10**6, 10**6))}, b"\0" * 4
    ),
    "a shape that overflows": lambda: file({"a": tensor(0, 4, shape=(2**62, 2**62))}, b"\0" * 4),
    "a dtype that is none": lambda: file({"a": tensor(0, 4, "PICKLE")}, b"\0" * 4),
    "200,000 tensors": lambda: file(
        {f"t{i}": tensor(4 * i, 4 * i + 4) for i in range(200_000)}, b"\0" * 800_000
    ),
    "a pickle by another name": lambda: b"\x80\x04\x95" + b"a" * 200,
}


@pytest.mark.parametrize("case", LIES)
def test_safetensors_that_lie_about_themselves(model, case):
    (model / "model.safetensors").write_bytes(LIES[case]())
    refused(model, UsageError, r"model\.safetensors is not a readable safetensors file")


def test_a_second_file_that_lies_is_found_too(model):
    (model / "more.safetensors").write_bytes(LIES["overlapping"]())
    refused(model, UsageError, r"more\.safetensors")


def test_a_hundred_thousand_tensors_take_seconds(model, opens):
    """Nobody's weights: they are passed over, in bounded time."""
    (model / "more.safetensors").write_bytes(
        file({f"t{i}": tensor(4 * i, 4 * i + 4) for i in range(100_000)}, b"\0" * 400_000)
    )
    started = time.monotonic()
    assert models.outline(str(model)).n_blocks == tiny.N_BLOCKS
    assert time.monotonic() - started < 30


# -- what the folder's names lead to
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja", "notes.txt"],
)
def test_a_link_out_of_the_folder(model, tmp_path, name):
    outside = tmp_path / "outside"
    outside.mkdir()
    if (model / name).exists():
        shutil.move(model / name, outside / name)
    else:
        (outside / name).write_text("mine")
    (model / name).symlink_to(outside / name)
    refused(model, Refused, "link out of its folder")


@pytest.mark.parametrize("folder", ["additional_chat_templates", "original/deeper"])
def test_a_link_or_a_pipe_at_any_depth(model, tmp_path, folder):
    (tmp_path / "outside.jinja").write_text("mine")
    (model / folder).mkdir(parents=True)
    link = model / folder / "default.jinja"
    link.symlink_to(tmp_path / "outside.jinja")
    refused(model, Refused, "link out of its folder")
    link.unlink()
    os.mkfifo(link)
    refused(model, Refused, "no regular file")


def test_a_folder_that_is_a_link(model, tmp_path):
    (tmp_path / "templates").mkdir()
    (model / "additional_chat_templates").symlink_to(tmp_path / "templates")
    refused(model, Refused, "link out of its folder")


@pytest.mark.parametrize(
    "target", ["/etc/passwd", "../../../../../../../../etc/passwd", "/proc/self/environ"]
)
def test_a_link_to_the_machines_own_files(model, target):
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer_config.json").symlink_to(target)
    refused(model, Refused, "link out of its folder")


def test_links_to_nothing_and_in_a_ring(model):
    (model / "notes.txt").symlink_to("nowhere.txt")
    refused(model, UsageError, "leads nowhere")
    (model / "notes.txt").unlink()
    (model / "notes.txt").symlink_to("notes.txt")
    refused(model, UsageError, "leads nowhere")


def test_a_pipe_does_not_hold_it_up(model):
    (model / "chat_template.jinja").unlink(missing_ok=True)
    os.mkfifo(model / "chat_template.jinja")
    refused(model, Refused, "pipe or a device")


def test_an_endless_device(model):
    (model / "config.json").unlink()
    (model / "config.json").symlink_to("/dev/zero")
    refused(model, Refused, "link out of its folder")


def test_a_text_of_a_gigabyte_is_not_read(model):
    with (model / "tokenizer.json").open("ab") as handle:
        handle.truncate(10**9)  # sparse: nothing is written
    refused(model, UsageError, "1,000,000,000 bytes")


def test_a_link_inside_the_folder_and_a_linked_folder_are_fine(model, tmp_path, opens):
    (model / "model.safetensors").rename(model / "weights")
    (model / "model.safetensors").symlink_to("weights")
    (tmp_path / "alias").symlink_to(model)
    assert models.outline(str(tmp_path / "alias")).n_blocks == tiny.N_BLOCKS


def test_the_hubs_cache_is_links_and_is_fine(saved, tmp_path, opens):
    """models--x--y/snapshots/REVISION/config.json -> ../../blobs/HASH, as huggingface_hub lays it
    out."""
    repo = tmp_path / "models--someone--model"
    snapshot = repo / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for i, path in enumerate(sorted(saved.iterdir())):
        shutil.copy(path, repo / "blobs" / f"hash{i}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{i}")
    assert models.outline(str(snapshot)).n_blocks == tiny.N_BLOCKS
    (tmp_path / "stray").write_text("{}")
    (snapshot / "notes.json").symlink_to("../../../stray")
    with pytest.raises(Refused, match="link out"):
        models.outline(str(snapshot))


def test_kernels_are_found_at_every_depth(model):
    config = json.loads((model / "config.json").read_text())
    config["text_config"] = {"layers": [{"_attn_implementation": "someone/kernel"}]}
    (model / "config.json").write_text(json.dumps(config))
    refused(model, Refused, r"config\.json asks for code")


def test_json_as_deep_as_the_parser_goes(model):
    deep = '{"a":' * 900 + '{"auto_map": {"x": "y.Z"}}' + "}" * 900
    (model / "generation_config.json").write_text(deep)
    with pytest.raises((Refused, UsageError)):
        models.outline(str(model))


def test_the_checks_are_what_refuses(model, monkeypatch, opens):
    """Without them the folder with a link out of it is opened: else the tests above would show
    nothing."""
    outside = model.parent / "elsewhere.json"
    shutil.move(model / "config.json", outside)
    (model / "config.json").symlink_to(outside)
    monkeypatch.setattr("auditgap.models.vetting.check_files", lambda folder: None)
    assert models.outline(str(model)).n_blocks == tiny.N_BLOCKS
