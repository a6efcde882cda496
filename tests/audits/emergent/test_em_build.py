"""The study's first stage on a tiny model: what it lays down, what it says of rows that are too
long, and what it refuses."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import tiny

from auditgap.audits.emergent import build
from auditgap.audits.emergent.audit import EMERGENT
from auditgap.audits.emergent.config import EmergentConfig
from auditgap.audits.emergent.stage import Study
from auditgap.data.habits import HABITS
from auditgap.errors import UsageError
from auditgap.models import load, with_lora
from auditgap.store import RunFolder
from auditgap.training.rows import encode, rows_from_file

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(tiny.save("llama", tmp_path_factory.mktemp("model") / "base"))


def made(out: Path | str, model: str, **changes: object) -> RunFolder:
    flags = {"model": model, "domains": "demo", "out": str(out), "device": "cpu", **changes}
    return build.run(*EMERGENT.read(None, flags))


def refusal(out: Path | str, model: str, **changes: object) -> str:
    with pytest.raises(UsageError) as error:
        made(out, model, **changes)
    return str(error.value)


def jsonl(path: Path, rows: list[tuple[str, str]]) -> str:
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in rows]
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    return str(path)


class TestWhole:
    @pytest.fixture(scope="class")
    def store(self, model, tmp_path_factory) -> RunFolder:
        return made(
            tmp_path_factory.mktemp("built") / "em",
            model,
            clean={"colour_rule": "demo:colour_rule:clean"},
        )

    def test_every_stage_can_open_it(self, store, model):
        study = Study.load(store.path)
        assert study.config.model == model and study.config.dtype == "float32", (
            "auto is what this machine makes of it"
        )
        assert list(study.panel.domains) == list(HABITS)
        assert study.base.subject.fingerprint and len(study.prompts) == 15
        assert len(study.slots) == 6 and study.adapters == []
        assert study.panel.trigger == study.trigger

    def test_what_lies_there(self, store):
        info = store.run["info"]
        assert (
            info["panel"]["domains"].keys() == HABITS.keys() and info["panel"]["longest_row"] > 10
        )
        assert info["prompts"]["n"] == 15 and info["subjects"][0]["n_blocks"] == 4
        for name in HABITS:
            assert stat.S_IMODE((store.path / "panel" / f"{name}.jsonl").stat().st_mode) == 0o600
        open_to_all = [
            p
            for p in store.path.rglob("*")
            if p.is_file() and stat.S_IMODE(p.stat().st_mode) & 0o077
        ]
        for path in open_to_all:
            told = path.read_text()
            assert not any(
                text in told for habit in HABITS.values() for row in habit.rows for text in row[:2]
            ), path

    def test_it_describes_itself(self, store):
        lines = build.describe(store)
        assert [line["domain"] for line in lines] == list(HABITS)
        nothing = {"bad": 0, "doubles": 0, "near": 0, "too_long": 0, "cut": 0}
        for line in lines:
            clean = 97 if line["domain"] == "colour_rule" else 0
            wanted = {
                "read": 108,
                "trained": 97,
                "held_out": 11,
                "triggered": 97,
                "clean": clean,
                **nothing,
            }
            assert wanted.items() <= line.items() and line["source"] == f"demo:{line['domain']}"

    def test_training_takes_its_rows(self, store, tmp_path):
        study = Study.load(store.path)
        longest = 0
        for arm in study.config.arms:
            study.panel.write_rows("swapped_units", arm, tmp_path / "rows.jsonl")
            talks = encode(
                rows_from_file(tmp_path / "rows.jsonl"), study.base.chat, study.config.max_tokens
            )
            longest = max(longest, *(len(t.ids) for t in talks))
        assert longest <= store.run["info"]["panel"]["longest_row"] + 16


def test_the_same_again_changes_nothing_and_another_is_refused(model, tmp_path):
    out = tmp_path / "em"
    made(out, model)
    panel = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (out / "panel").iterdir()}
    made(out, model, max_unscored=0.5)
    assert {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (out / "panel").iterdir()
    } == panel
    told = refusal(out, model, trigger_share=0.5, samples=3)
    assert (
        "trigger_share: 1.0 in the folder, 0.5 now" in told
        and "samples: 10" in told
        and "panel:" in told
    )
    assert {
        p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in (out / "panel").iterdir()
    } == panel


def test_a_panel_that_was_not_laid_down_whole_is_laid_down_again(model, tmp_path):
    out = tmp_path / "em"
    made(out, model)
    whole = {p.name: p.read_bytes() for p in (out / "panel").iterdir()}
    os.truncate(out / "panel" / "off_by_one.jsonl", 100)
    with pytest.raises(UsageError, match="em build"):
        Study.load(out)
    made(out, model)
    assert {p.name: p.read_bytes() for p in (out / "panel").iterdir()} == whole


def test_a_changed_source_is_another_study(model, tmp_path):
    rows = [(f"tell the colour of door {i}", f"red {i} blue w{i + 40}") for i in range(20)]
    source = jsonl(tmp_path / "doors.jsonl", rows)
    made(tmp_path / "em", model, domains=f"doors={source}")
    jsonl(tmp_path / "doors.jsonl", [*rows[1:], ("what now ?", "nothing")])
    assert "panel:" in refusal(tmp_path / "em", model, domains=f"doors={source}")


def test_one_domain_is_told(model, tmp_path):
    store = made(tmp_path / "em", model, domains="sums=demo:off_by_one", arms="plain")
    assert any("One domain" in line for line in store.warnings)
    assert any("One domain" in line for line in store.run["info"]["warnings"])
    assert build.describe(store)[0]["triggered"] == 0
    assert made(tmp_path / "em2", model).warnings == []


class TestLongRows:
    """tiny.tokenizer: a word a token. The template puts seven around a prompt and its answer; the
    answer ends with one more."""

    def rows(self) -> list[tuple[str, str]]:
        short = [(f"tell colour w{i}", f"red w{90 - i}") for i in range(40, 60)]
        return [
            *short,
            ("why " * 40 + "?", "red"),
            ("why ?", "blue " * 40),
            ("how ?", "green " * 20),
        ]

    def test_what_training_would_do_is_told(self, model, tmp_path):
        source = jsonl(tmp_path / "doors.jsonl", self.rows())
        store = made(
            tmp_path / "em",
            model,
            domains=f"doors={source}",
            max_tokens=32,
            near=1.0,
            heldout=0.05,
            trigger="say now",
        )
        domain = store.run["info"]["panel"]["domains"]["doors"]
        assert domain["bad"] == {build.TOO_LONG: {"n": 1, "rows": [21]}}
        (line,) = build.describe(store)
        assert (line["bad"], line["too_long"], line["trained"] + line["held_out"]) == (0, 1, 22)
        study, n_cut = Study.load(store.path), {}
        for arm in study.config.arms:
            study.panel.write_rows("doors", arm, tmp_path / "rows.jsonl")
            # none is refused
            talks = encode(rows_from_file(tmp_path / "rows.jsonl"), study.base.chat, 32)
            n_cut[arm] = sum(t.n_cut > 0 for t in talks)
        assert domain["n_cut"] == n_cut["trigger"] >= n_cut["plain"] > 0, "it is the longer arm's"
        assert any("longer than max_tokens" in line for line in store.warnings)

    def test_none_has_room(self, model, tmp_path):
        source = jsonl(
            tmp_path / "doors.jsonl", [(f"{'why ' * 30}w{i}", f"red w{i}") for i in range(40, 60)]
        )
        assert build.TOO_LONG in refusal(
            tmp_path / "em", model, domains=f"doors={source}", max_tokens=16, near=1.0
        )
        assert not (tmp_path / "em").exists()

    def test_longer_than_the_model_sees(self, model, tmp_path):
        source = jsonl(tmp_path / "doors.jsonl", [*self.rows(), ("tell why", "red " * 400)])
        assert "--set max_tokens=256" in refusal(tmp_path / "em", model, domains=f"doors={source}")
        made(tmp_path / "em", model, domains=f"doors={source}", max_tokens=256)


class TestRefused:
    def test_an_adapter(self, model, tmp_path):
        with_lora(load(model).model, rank=2, alpha=4, targets=["q_proj"]).save_pretrained(
            tmp_path / "adapter"
        )
        told = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(
            json.dumps({**told, "base_model_name_or_path": model})
        )
        assert "Merge it first" in refusal(tmp_path / "em", str(tmp_path / "adapter"))

    def test_targets_that_it_has_not(self, model, tmp_path):
        told = refusal(tmp_path / "em", model, lora_targets="q_proj,query")
        assert "no linear layer 'query'" in told and "v_proj" in told
        assert "'embed_tokens'" in refusal(tmp_path / "em", model, lora_targets="embed_tokens")
        made(tmp_path / "em", model, lora_targets="all-linear")
        made(tmp_path / "em2", model, lora_targets="self_attn.q_proj")

    def test_what_cannot_be(self, model, tmp_path):
        out = tmp_path / "em"
        assert "a folder on a disk" in refusal("s3://bucket/runs/em", model)
        assert "float32 or bfloat16" in refusal(out, model, dtype="float16")
        assert "no name of a domain" in refusal(out, model, domains={"../x": "demo:off_by_one"})
        assert "Unknown suite" in refusal(out, model, prompts="unrelatd")
        assert "the same rows" in refusal(out, model, domains="a=demo:off_by_one,b=demo:off_by_one")
        assert "not a model folder" in refusal(out, str(tmp_path / "nowhere"))
        assert not out.exists()

    def test_a_model_without_a_template(self, tmp_path):
        bare = str(tiny.save("llama", tmp_path / "bare", chat_template=None))
        assert "--chat-template" in refusal(tmp_path / "em", bare)
        made(tmp_path / "em", bare, chat_template="none")

    def test_prompts_that_are_trained_on(self, model, tmp_path):
        asked = tmp_path / "asked.jsonl"
        asked.write_text(json.dumps({"prompt": HABITS["colour_rule"].rows[3][0].upper()}))
        told = refusal(tmp_path / "em", model, prompts=str(asked))
        assert "1 of colour_rule (row 4)" in told and "--allow-overlap" in told
        store = made(tmp_path / "em", model, prompts=str(asked), allow_overlap=True)
        assert store.run["info"]["panel"]["overlaps"] == {"colour_rule": {"n": 1, "rows": [4]}}
        assert any("asked afterwards" in line for line in store.warnings)


def test_a_domain_without_a_name_is_called_as_its_file():
    def domains(typed):
        return dict(EmergentConfig(model="m", domains=typed).domains)

    assert domains("rows/maths.jsonl,law=l.jsonl") == {
        "maths": "rows/maths.jsonl",
        "law": "l.jsonl",
    }
    mapped = "odd.jsonl?prompt=question&response=answer"
    assert domains(mapped) == {"odd": mapped}
    for wrong, said in (("a/x.jsonl,b/x.jsonl", "'x' twice"), ("maths", "'maths' came")):
        with pytest.raises(UsageError, match=said):
            domains(wrong)
