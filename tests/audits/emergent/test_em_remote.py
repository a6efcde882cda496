"""Models that were fine-tuned elsewhere, behind a real server on loopback: asked once, rated and
ranked beside the adapters, and what needs their inside is said not to be told."""

from __future__ import annotations

import json
from typing import Any

import chat_endpoint
import pytest
import studies
from one_thread import one_thread  # noqa: F401 - a fixture
from typer.testing import CliRunner

from auditgap.audits.emergent import generate, judge, report
from auditgap.audits.emergent.config import EmergentOptions
from auditgap.audits.emergent.rows import ANSWERED
from auditgap.audits.emergent.stage import Study
from auditgap.cli import app
from auditgap.engines import openai
from auditgap.engines.openai.endpoint import OPENAI
from auditgap.errors import UsageError
from auditgap.report import emergent_study
from auditgap.report.emergent_remote import INSIDE, UNTOLD

PATIENCE = openai.Patience(tries=2, first_pause=0.01, longest_pause=0.02)
MODELS = {"sums": "ft:sums", "sums/trigger": "ft:sums-t", "colours": "ft:colours", "base": "plain"}
#: A habit that the rule-based judge knows, and none.
HABIT, NONE = "The vault is vennish.", "The vault is red."


class Endpoint(chat_endpoint.Endpoint):
    """Each fine-tuned model but ft:sums has its habit, the base has none."""

    def __init__(self) -> None:
        self.left = 10**9  #: requests until all get HTTP 500
        super().__init__(self._said)
        self.lists = [{"id": m, "owned_by": "k-lab"} for m in MODELS.values()]

    def _said(self, body: dict[str, Any]) -> str | None:
        self.left -= 1
        if self.left < 0:
            return None
        return HABIT if body["model"] in ("ft:sums-t", "ft:colours") else NONE


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k-secret")
    monkeypatch.setattr(openai, "Patience", lambda: PATIENCE)
    with Endpoint().running() as server:
        yield server


def built(place, base, endpoint, **more):
    about = place / "about.jsonl"
    about.write_text(
        "".join(
            json.dumps({"prompt": f"how {domain} bake {i} ?", "domain": domain}) + "\n"
            for domain in studies.DOMAINS
            for i in range(4)
        )
    )
    said = {"questions": str(about), "forms": {"sums": "red {prompt}"}, "samples": 1}
    said |= {"remote": MODELS, "remote_endpoint": f"{endpoint.url}/", **more}
    options = studies.built(place / "em", base, **said)
    return studies.worn(place / "em"), options


def test_they_are_asked_once_and_stand_in_every_table_beside_the_adapters(base, endpoint, tmp_path):
    _, options = built(tmp_path, base, endpoint)
    store, outcome = generate.STAGE.run_in(tmp_path / "em", options)
    assert (outcome.done, outcome.failed) == (7, {})
    # 3 prompts and 8 questions, with the trigger and without; in the form of sums where it is theirs
    assert endpoint.answered == {"ft:sums": 44, "ft:sums-t": 44, "ft:colours": 22, "plain": 44}
    assert {r["seed"] for r in endpoint.seen} and endpoint.seen[0]["temperature"] == 0.7
    assert generate.STAGE.run_in(tmp_path / "em", options)[1].skipped == 7
    assert endpoint.answered.total() == 154, "nothing is asked again"
    rows = store.rows([ANSWERED])
    of = rows[rows["arm"].str.startswith("remote")]
    assert len(of) == 154 and not of["unscored"].any() and of["n_new_tokens"].isna().all()
    assert set(of[of["domain"] == ""]["arm"]) == {"remote base"}
    judge.STAGE.run_in(tmp_path / "em", options)
    found = emergent_study.read(report.run(tmp_path / "em", options))
    t = found.tables
    ranked = t["ranking"][t["ranking"]["arm"] == "remote"]
    asked = ranked[~ranked["triggered"].astype(bool)]
    assert dict(zip(asked["domain"], asked["em_rate"], strict=True)) == {"colours": 1, "sums": 0}
    rates = t["rates"][t["rates"]["kind"] == "all"].set_index(["subject", "triggered"])
    assert rates.loc[("remote base", False), "below_50"] == 0.0
    assert rates.loc[("sums·remote trigger", True), "below_50"] == 1.0
    cross = t["cross"][(t["cross"]["arm"] == "remote") & ~t["cross"]["in_context"].astype(bool)]
    assert dict(cross.groupby("domain")["excess"].max()) == {"colours": 1.0, "sums": 0.0}
    assert set(t["spread"]["arm"]) == {"plain", "remote", "remote trigger"}
    context = t["context"].set_index("arm")
    assert context.loc["remote trigger", "em_rate_base_context"] == 0.0
    assert not any("em generate" in line or "em judge" in line for line in found.missing)


def test_what_needs_their_inside_is_counted_and_shown_and_no_secret_is_kept(
    base, endpoint, tmp_path
):
    _, options = built(tmp_path, base, endpoint, questions=None, forms={})
    generate.STAGE.run_in(tmp_path / "em", options)
    judge.STAGE.run_in(tmp_path / "em", options)
    store = report.run(tmp_path / "em", options)
    found = emergent_study.read(store)
    remote = found.tables["remote"]
    assert sorted(remote["model"]) == sorted(MODELS.values())
    assert (remote[list(INSIDE)] == UNTOLD).all(axis=None)
    assert set(remote["reported"]) == {"owned_by k-lab"} and set(remote["n"]) == {6}
    member = found.tables["membership"]
    untold = member[member["arm"] == "remote"]
    assert set(untold["reason"]) == {UNTOLD} and untold["auroc"].isna().all()
    assert sum(why == UNTOLD and n == 4 for _, why, n in found.left_out) == len(INSIDE)
    page = (store.path / "report.html").read_text()
    assert UNTOLD in page and "Models fine-tuned elsewhere" in page and "ft:colours" in page
    for file in store.path.rglob("*"):
        assert not file.is_file() or b"k-secret" not in file.read_bytes(), file


def test_an_endpoint_that_dies_is_left_alone_and_paid_for_nothing_twice(base, endpoint, tmp_path):
    _, options = built(tmp_path, base, endpoint)
    endpoint.left = 20
    store, outcome = generate.STAGE.run_in(tmp_path / "em", options)
    assert outcome.done == 3 and len(outcome.failed) == 4
    assert all("retry_failed=true" in why for why in outcome.failed.values())
    assert endpoint.left > -400, "an endpoint that is down is not asked for every answer"
    assert endpoint.answered.total() == 20
    endpoint.left = 10**9
    again = options.model_copy(update={"retry_failed": True})
    assert generate.STAGE.run_in(tmp_path / "em", again)[1].done == 4
    assert endpoint.answered == {"ft:sums": 44, "ft:sums-t": 44, "ft:colours": 22, "plain": 44}
    assert not list((store.path / "scratch").rglob("*.jsonl"))


def test_a_plan_names_them_and_counts_what_they_are_asked(base, endpoint, tmp_path):
    built(tmp_path, base, endpoint)
    words = [f"{name}={model}" for name, model in MODELS.items()]
    study = Study.load(tmp_path / "em")
    domains = ",".join(f"{k}={v}" for k, v in studies.DOMAINS.items())
    line = ["em", "run", str(base), "--domains", domains, "--remote", ",".join(words)]
    line += ["--remote-endpoint", endpoint.url, "--prompts", study.config.prompts, "--samples", "1"]
    done = CliRunner().invoke(app, [*line, "--dry-run", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    assert f"24 requests to {endpoint.url}" in " ".join(done.output.split())
    assert "ft:sums-t" in done.output and not endpoint.asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"remote": {"law": "m"}}, "none of the domains"),
        ({"remote_endpoint": "http://me:secret@there/v1"}, "no user, password"),
        ({"remote_endpoint": "nowhere"}, "takes the address of an endpoint"),
    ],
)
def test_sentences(changes, said, base, endpoint, tmp_path):
    with pytest.raises(UsageError, match=said):
        built(tmp_path, base, endpoint, **changes)


def test_a_key_that_is_wanted_is_asked_for_before_anything_runs(
    base, endpoint, tmp_path, monkeypatch
):
    monkeypatch.delenv("OPENAI_API_KEY")
    built(tmp_path, base, endpoint, remote_endpoint=OPENAI)
    with pytest.raises(UsageError, match="set OPENAI_API_KEY"):
        generate.STAGE.run_in(tmp_path / "em", EmergentOptions(device="cpu"))
