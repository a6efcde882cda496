"""The presets: every one is a config that its commands take, every choice is named, every
difference has its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from auditgap import config
from auditgap.audits.behaviour import config as behaviour
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.latent import config as latent
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.probe import config as probe
from auditgap.audits.probe.audit import PROBE
from auditgap.audits.sft_curve import config as sft_curve
from auditgap.audits.sft_curve.audit import SFT_CURVE
from auditgap.cli import main
from auditgap.errors import UsageError
from auditgap.judges import load_judge, load_reward
from auditgap.report import presets
from auditgap.training.config import DissociateConfig
from auditgap.training.launch import read

NAMES = ("demo", "laptop", "paper-v1", "release", "smoke", "standard")
#: What a user names himself.
YOURS = {"models", "base", "subjects", "triples", "data"}
READERS = {
    "lvs": (LATENT.read, latent.LatentConfig, {"models": "./m"}),
    "evaluate": (BEHAVIOUR.read, behaviour.BehaviourConfig, {"models": "./m"}),
    "probe": (PROBE.read, probe.ProbeConfig, {"base": "./m", "triples": "demo"}),
    "sft-curve": (
        SFT_CURVE.read,
        sft_curve.SFTCurveConfig,
        {"models": "./m", "data": "rows.jsonl"},
    ),
}


def test_the_presets_are_there():
    assert tuple(config.presets()) == NAMES and [row["name"] for row in presets.listed()] == list(
        NAMES
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_section_is_a_config_of_its_command(name):
    found = config.preset(name)
    for section in set(found) & set(READERS):
        reader, _, yours = READERS[section]
        made, _ = reader(Path(f"preset:{name}"), yours)
        for key, value in found[section].items():
            came = getattr(made, key)
            assert (list(came) if isinstance(came, tuple) else came) == (yours.get(key, value)), (
                section,
                key,
            )
        judge = getattr(made, "judge", None)
        assert judge is None or load_judge(judge), (
            "a name that is known; its model may be on the hub"
        )
    reward = found["lvs"]["reward"]
    assert reward.startswith("hf:") or load_reward(reward)
    if "dissociate" in found:
        yours = {"model": "./m", "triples": "demo", "harmful_model": "./h"}
        made, _ = read(Path(f"preset:{name}"), yours, DissociateConfig)
        assert (
            made.lr == found["dissociate"]["lr"]
            and made.construction == found["dissociate"]["construction"]
        )


@pytest.mark.parametrize("name", ["paper-v1", "release"])
def test_every_choice_is_named_with_a_value(name):
    """A setting added to a config must be added to the presets too, or the paper's study would
    change unseen."""
    found = config.preset(name)
    for section, (_, kind, _) in READERS.items():
        assert set(kind.model_fields) - YOURS == set(found[section]), section
    assert set(config.preset("paper-v1")["fixed"]) == set(config.preset("release")["fixed"])


def test_every_choice_of_the_paper_has_a_source_or_is_called_open():
    reasons = config.preset("paper-v1")["why"]
    assert set(reasons) == set(presets.choices("paper-v1"))
    open_ones = [choice for choice, why in reasons.items() if why.startswith("open")]
    assert len(open_ones) > 30 and {"lvs.unit", "lvs.iterate", "fixed.mid", "sft-curve.lr"} <= set(
        open_ones
    )


@pytest.mark.parametrize("name", NAMES)
def test_no_reason_is_for_nothing(name):
    known = set(presets.choices(name)) | set(presets.choices("paper-v1"))
    assert set(config.preset(name)["why"]) <= known


@pytest.mark.parametrize(
    ("first", "second"), [("paper-v1", "release"), ("release", "paper-v1"), ("smoke", "standard")]
)
def test_every_difference_has_its_reason(first, second):
    rows = presets.differences(first, second)
    assert rows and all(row[first] != row[second] for row in rows)
    lacking = [row["choice"] for row in rows if not row["why"] and "." in row["choice"]]
    assert not lacking, lacking
    same = set(presets.choices(first)) & set(presets.choices(second)) - {
        row["choice"] for row in rows
    }
    assert all(presets.choices(first)[c] == presets.choices(second)[c] for c in same)


def test_what_paper_and_release_differ_in():
    rows = {row["choice"]: row for row in presets.differences("paper-v1", "release")}
    assert rows["lvs.judge" if "lvs.judge" in rows else "evaluate.judge"]
    assert (
        rows["dissociate.construction"]["paper-v1"],
        rows["dissociate.construction"]["release"],
    ) == ("monitor", "nudge")
    assert (rows["sft-curve.method"]["paper-v1"], rows["sft-curve.method"]["release"]) == (
        "lora",
        "full",
    )
    assert "lvs.unit" not in rows and "lvs.eps" not in rows


def test_the_page_is_what_the_presets_say():
    page = Path(__file__).parents[1] / "docs" / "presets.md"
    assert page.read_text("utf-8") == presets.document(), (
        "run: auditgap presets page > docs/presets.md"
    )


def test_flags_win_over_a_preset():
    made, _ = LATENT.read(Path("preset:paper-v1"), {"models": "./m", "limit": 3, "unit": None})
    assert (made.limit, made.unit, made.eps) == (3, "max", (0.0005, 0.001, 0.005))


def test_a_preset_that_is_none():
    with pytest.raises(UsageError, match=r"no preset 'paper'.*Did you mean 'paper-v1'"):
        LATENT.read(Path("preset:paper"), {"models": "./m"})
    with pytest.raises(
        UsageError,
        match="smoke has no settings for this command; it has some for lvs, evaluate, probe",
    ):
        SFT_CURVE.read(Path("preset:smoke"), {"models": "./m", "data": "d"})
    with pytest.raises(UsageError, match=r"no preset '\.\./secret'"):
        config.preset("../secret")


def test_the_commands(capsys):
    def said(*args: str) -> str:
        with pytest.raises(SystemExit) as done:
            main(list(args))
        assert done.value.code == 0
        return capsys.readouterr().out

    assert "paper-v1" in said("ls", "presets")
    assert json.loads(
        said("presets", "diff", "paper-v1", "release", "--json")
    ) == presets.differences("paper-v1", "release")
    assert "random_matched" in said("presets", "show", "standard")
    assert said("presets", "page") == presets.document()
