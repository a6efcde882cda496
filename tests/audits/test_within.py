"""What is left of an audit that has to fit into a time."""

import pytest

from auditgap.audits import within
from auditgap.cli import main
from auditgap.errors import UsageError


def cost(changes):
    """A hundred prompts, eight sites, six attacks and a search for the distance; 60 s to begin."""
    n = changes.get("limit", 100)
    sites = {"embedding,mid,last": 3, "mid": 1}.get(changes.get("layers"), 8)
    attacks = len(changes.get("attacks", range(6))) + 6 * changes.get("distance", True)
    return 60 + n * sites * attacks * (1 if changes.get("longer") is False else 2), n


@pytest.mark.parametrize(
    ("budget", "left"),
    [
        (40_000, set()),
        (6_000, {"attacks", "distance"}),
        (2_500, {"attacks", "distance", "limit"}),
        (900, {"attacks", "distance", "layers", "limit"}),
        (150, {"attacks", "distance", "layers", "longer", "limit"}),
    ],
)
def test_controls_go_first_then_sites_then_prompts(budget, left):
    fit = within.fitted(cost, budget, own=())
    assert set(fit.changes) == left
    assert fit.seconds <= budget and (fit.seconds, fit.n) == cost(fit.changes)
    assert {"random_matched", "benign"} < {
        *fit.changes.get("attacks", {"random_matched", "benign", 1})
    }


def test_what_was_asked_for_stays():
    fit = within.fitted(cost, 3_000, own={"layers", "attacks", "distance"})
    assert set(fit.changes) <= {"limit", "longer"} and fit.seconds <= 3_000
    with pytest.raises(UsageError, match="Nothing of this fits into 3 min"):
        within.fitted(cost, 180, own={"layers", "limit"})


def test_the_power_that_is_left_is_said():
    said = within.fitted(cost, 900, own=()).sentence(900)
    assert said.startswith("Within 15 min: ") and " of 100 prompts" in said
    assert "layers embedding,mid,last" in said and "points" in said
    assert "no excess gap can be shown" in within.Fit({}, 1.0, 1, 9).sentence(60)


def test_the_same_command_gets_the_same_choice(tmp_path):
    fit = within.fitted(cost, 900, own=())
    within.keep(tmp_path, 900, fit)
    assert within.kept(tmp_path, 900) == fit and within.kept(tmp_path, 901) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("1.5 h", 5400), ("45min", 2700)],
)
def test_times_as_people_write_them(text, seconds):
    assert within.seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "2", "two hours", "0h", "2h please"])
def test_no_time(text):
    with pytest.raises(UsageError, match="--time"):
        within.seconds_of(text)


LVS = ["lvs", "demo", "--prompts", "demo", "--device", "cpu"]


def test_a_run_of_many_hours_wants_a_yes(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*LVS, "--steps", "100000000"])
    assert ended.value.code == 2 and "add --yes" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists(), "asked before anything is written"


def test_a_dry_run_says_what_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*LVS, "--steps", "1000000", "--time", "1s", "--dry-run"])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Nothing of this fits into 1 s" in " ".join(said.split())
    with pytest.raises(SystemExit) as ended:
        main([*LVS, "--time", "2h", "--dry-run"])
    assert ended.value.code == 0 and "12 of 12 prompts" in " ".join(capsys.readouterr().err.split())
