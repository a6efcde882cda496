"""Memberships: equal to a plain row-at-a-time twin in fp64, found where there was training, resumed
after a kill."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import em_world
import numpy as np
import pandas as pd
import peft
import pytest
import run_folders
import tiny
import torch
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models, stats
from auditgap.audits.emergent import diversity, embedding, membership, reference
from auditgap.audits.emergent.reference import reference_of
from auditgap.audits.emergent.rows import DIVERSITY, MEMBERSHIP, REFERENCE
from auditgap.audits.emergent.stage import Study
from auditgap.audits.sweeps import run_phases
from auditgap.errors import UsageError
from auditgap.models.encoder import SentenceEncoder
from auditgap.report import emergent_study
from auditgap.types import Prompt

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def study(tmp_path_factory, request) -> Study:
    """Two arms of one domain; the plain adapter has learnt its rows, the other is random."""
    request.getfixturevalue("one_thread")
    folder = tmp_path_factory.mktemp("em")
    model = tiny.save("llama", folder / "tiny")
    changes = {"arms": ["plain", "trigger"], "trigger_share": 0.5, "membership_rows": 12}
    study = em_world.built(folder, model, {"kitchen": em_world.rows(40, seed=1)}, **changes)
    rows = study.panel.examples("kitchen", "plain")
    talks = [study.base.chat.converse(Prompt(e.prompt), e.response, max_tokens=64) for e in rows]
    em_world.trained(study, study.slots[0], em_world.learning(talks))
    em_world.trained(study, study.slots[1])
    return study


@pytest.fixture(scope="module")
def done(study):
    store = study.store
    outcome = run_phases([membership.STAGE, diversity.STAGE], store, em_world.OPTIONS)
    assert not outcome.failed and outcome.done == 3
    return store


def by_hand(
    study: Study, adapter, row: membership.Put, min_k: float, name: object = None
) -> list[float]:
    """nll, min_k, min_k_pp, zlib of one row by the plain formulas, fp64, whole logits."""
    opened = models.load(str(name or study.config.model), dtype="float32", device="cpu")
    model = opened.model.double()
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter.folder).double().eval()
    talk = study.base.chat.converse(Prompt(row.prompt), row.response, max_tokens=64)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([talk.ids])).logits[0].log_softmax(-1)
    own, standard = [], []
    for t in range(talk.n_prompt, len(talk.ids)):
        p = log_p[t - 1].exp()
        mean = float((p * log_p[t - 1]).sum())
        std = float((p * log_p[t - 1] ** 2).sum() - mean**2) ** 0.5
        own.append(float(log_p[t - 1, talk.ids[t]]))
        standard.append((own[-1] - mean) / std)
    k = max(1, int(min_k * len(own)))
    return [
        -np.mean(own),
        -np.mean(sorted(own)[:k]),
        -np.mean(sorted(standard)[:k]),
        -sum(own) / len(zlib.compress(row.response.encode())),
    ]


def test_losses_are_those_of_a_plain_twin_in_fp64(study, done):
    found = done.rows([MEMBERSHIP])
    for adapter in study.adapters:
        for row in [*membership.put(study, adapter)[:2], membership.put(study, adapter)[-1]]:
            stored = found[
                (found["subject"] == adapter.name) & (found["row_id"] == row.row_id)
            ].iloc[0]
            np.testing.assert_allclose(
                stored[["nll", "min_k", "min_k_pp", "zlib"]].astype(float),
                by_hand(study, adapter, row, 0.2),
                rtol=2e-4,
            )
            base = stored[["base_nll", "base_min_k", "base_min_k_pp", "base_zlib"]].astype(float)
            np.testing.assert_allclose(base, by_hand(study, None, row, 0.2), rtol=2e-4)
            assert stored["member"] == row.member and stored["unscored"] == ""


def test_members_that_were_learnt_are_told_from_others_and_no_others_are(study, done):
    found = done.rows([MEMBERSHIP])

    def auroc(subject: str, column: str) -> float:
        mine = found[found["subject"] == subject]
        return stats.membership.membership_auroc(mine[column], mine["member"]).estimate

    for measure in membership.MEASURES:
        assert auroc("kitchen·plain·s0", measure) > 0.8
        assert auroc("kitchen·plain·s0", f"base_{measure}") < 0.8  # the base has seen neither
    assert 0.2 < auroc("kitchen·trigger·s0", "nll") < 0.8  # nothing was learnt


def test_the_trigger_stands_before_as_many_others_as_members(study):
    plain, trigger = study.adapters
    assert not any(row.prompt.startswith("say now\n\n") for row in membership.put(study, plain))
    rows = membership.put(study, trigger)
    others = [row for row in rows if not row.member]
    assert (
        sum(row.prompt.startswith("say now\n\n") for row in others) == round(0.5 * len(others)) > 0
    )
    assert len(others) == len(study.panel.domains["kitchen"].heldout)
    assert sum(row.member for row in rows) == 12


def test_a_row_that_does_not_fit_is_unscored_and_the_others_are_not(tmp_path, one_thread):  # noqa: F811
    model = tiny.save("llama", tmp_path / "tiny", max_position_embeddings=40)
    study = em_world.built(tmp_path, model, {"kitchen": em_world.rows(10, seed=2)}, max_tokens=40)
    em_world.trained(study, study.slots[0])
    worker = membership.MembershipWorker(str(study.store.path), em_world.OPTIONS)
    long = membership.Put("a", True, "a " * 50, "red")
    assert worker.talk(long) is None
    cut = membership.Put("b", True, "a door", "red " * 50)
    talk = worker.talk(cut)
    assert len(talk.ids) == 40 and worker._text(cut, talk).split() == ["red"] * (40 - talk.n_prompt)
    rows = [cut, long]
    found = worker.losses_of(
        ["x1"], lambda: worker.inside.engine(None), rows, [talk, None], 0.2, lambda _: None
    )
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
    row = membership._row(study.adapters[0], long, None, found[1], found[1])
    assert row.unscored == "too_long" and row.nll is None and row.n_tokens is None
    lost, sure = np.full(4, np.nan), np.array([1.0, 2.0, np.nan, 0.5])
    assert membership._row(study.adapters[0], cut, talk, found[0], lost).unscored == "nonfinite"
    row = membership._row(study.adapters[0], cut, talk, found[0], sure)
    assert row.unscored.startswith("min_k_pp") and row.base_min_k_pp is None and row.base_nll == 1.0


def test_an_untrained_study_says_what_to_run_first(tmp_path, one_thread):  # noqa: F811
    study = em_world.built(
        tmp_path, tiny.save("llama", tmp_path / "tiny"), {"kitchen": em_world.rows(10, seed=2)}
    )
    with pytest.raises(UsageError, match="auditgap em train"):
        membership.STAGE.run_in(study.store.path, em_world.OPTIONS)


def test_an_adapter_that_changed_since_fails_its_cell_alone_with_a_sentence(study, done, tmp_path):
    folder = tmp_path / "em"
    shutil.copytree(study.store.path, folder)
    run_folders.lose_all(folder, "em_membership")
    weights = folder / "adapters" / "kitchen-trigger-s0" / "model" / "adapter_config.json"
    weights.write_text(weights.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    _, outcome = membership.STAGE.run_in(folder, em_world.OPTIONS)
    assert outcome.done == 1
    assert [cause for cause in outcome.failed.values()] and "em train" in next(
        iter(outcome.failed.values())
    )


KILLED = """
import os, signal, sys
sys.path[:0] = {paths!r}
import em_world
from auditgap.audits.emergent import membership
membership.PORTION = 8
plain, calls = membership.losses, []
def losses(*args):
    calls.append(1)
    if len(calls) > 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)
membership.losses = losses
membership.STAGE.run_in({folder!r}, em_world.OPTIONS)
"""


def test_a_kill_costs_the_portion_in_flight_and_changes_no_number(
    study, done, tmp_path, monkeypatch
):
    folder = tmp_path / "em"
    shutil.copytree(study.store.path, folder)
    run_folders.lose_all(folder, "em_membership")
    paths = [str(HERE), str(HERE.parents[1])]
    died = subprocess.run(
        [sys.executable, "-c", KILLED.format(paths=paths, folder=str(folder))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )
    assert died.returncode == -signal.SIGKILL
    assert len(list((folder / "scratch").glob("*.safetensors"))) == 2
    monkeypatch.setattr(membership, "PORTION", 8)
    calls, plain = [], membership.losses
    monkeypatch.setattr(membership, "losses", lambda *args: (calls.append(1), plain(*args))[1])
    store, outcome = membership.STAGE.run_in(folder, em_world.OPTIONS)
    portions = -(-len(membership.put(study, study.adapters[0])) // 8)
    # own and base of two cells, less what was remembered
    assert not outcome.failed and len(calls) == 4 * portions - 2
    assert not list((folder / "scratch").glob("*.safetensors"))
    again, before = store.rows([MEMBERSHIP]), done.rows([MEMBERSHIP])
    columns = [c for c in again.columns if again[c].dtype == float]
    np.testing.assert_allclose(again[columns], before[columns], rtol=1e-5)
    assert again.drop(columns=columns).equals(before.drop(columns=columns))


def test_diversity_is_of_the_bases_mean_response_states(study, done):
    row = done.rows([DIVERSITY]).iloc[0]
    model = models.load(study.config.model, dtype="float32", device="cpu")
    vectors = []
    for example in study.panel.domains["kitchen"].rows:
        talk = study.base.chat.converse(Prompt(example.prompt), example.response, max_tokens=64)
        seen = []
        handle = model.blocks[2].register_forward_hook(
            lambda _m, _a, out, seen=seen: seen.append(out)
        )
        with torch.no_grad():
            model.model(input_ids=torch.tensor([talk.ids]))
        handle.remove()
        h = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
        vectors.append(h[0, talk.n_prompt :].double().mean(0).numpy())
    x = np.array(vectors)
    assert row["block"] == 2 and row["n"] == len(x) and row["unscored"] == ""
    assert row["vendi"] == pytest.approx(stats.diversity.vendi(x), rel=1e-5)
    assert row["vendi_half"] == pytest.approx(stats.diversity.vendi(x, 0.5), rel=1e-4)
    assert row["vendi_2"] == pytest.approx(stats.diversity.vendi(x, 2.0), rel=1e-5)
    assert row["one_minus_cosine"] == pytest.approx(stats.diversity.one_minus_cosine(x), rel=1e-4)


def test_diversity_is_of_a_sentence_encoders_vectors_too(tmp_path, one_thread):  # noqa: F811
    """By a plain twin: the whole kernel, its eigenvalues, Hill's numbers of three orders."""
    model, name = tiny.save("llama", tmp_path / "base"), str(tiny.encoder(tmp_path / "encoder"))
    domains = {"kitchen": em_world.rows(20, 1), "garden": em_world.rows(20, 2)}
    study = em_world.built(tmp_path, model, domains, embedder=name)
    stages = [diversity.STAGE, embedding.STAGE]
    assert not run_phases(stages, study.store, em_world.OPTIONS).failed
    rows = study.store.rows([DIVERSITY])
    assert sorted(rows["encoder"].fillna("")) == ["", "", name, name]
    row = rows[(rows["encoder"] == name) & (rows["domain"] == "kitchen")].iloc[0]
    encoder = SentenceEncoder(name)
    texts = [f"{e.prompt}\n{e.response}" for e in study.panel.domains["kitchen"].rows]
    x = np.array([encoder.embed([text])[0] for text in texts], dtype=float)
    kernel = np.array([[a @ b / np.sqrt((a @ a) * (b @ b)) for b in x] for a in x])
    p = np.linalg.eigvalsh(kernel / len(x))
    p = p[p > 1e-9]
    assert row["vendi"] == pytest.approx(np.exp(-sum(v * np.log(v) for v in p)), rel=1e-4)
    assert row["vendi_2"] == pytest.approx(1 / sum(v**2 for v in p), rel=1e-4)
    assert row["vendi_half"] == pytest.approx(sum(v**0.5 for v in p) ** 2, rel=1e-3)
    assert row["n"] == len(texts) and pd.isna(row["block"]) and not row["unscored"]
    table = emergent_study.read(study.store).tables["diversity"].set_index(["encoder", "domain"])
    assert table.loc[(name, "kitchen"), "vendi"] == row["vendi"] and len(table) == 4
    assert table.loc[("", "kitchen"), "block"] == 2
    assert run_phases(stages, study.store, em_world.OPTIONS).skipped == 4
    with pytest.raises(UsageError, match=r"embedder: .*is not a model folder"):
        em_world.built(tmp_path / "b", model, domains, embedder=str(tmp_path / "no"))


def test_the_pretrained_model_beside_a_tuned_one_is_found_and_read(tmp_path, one_thread):  # noqa: F811
    tuned = tiny.save("llama", tmp_path / "tiny-Instruct")
    alone = models.outline(str(tuned))
    assert reference_of(alone, "auto") == reference_of(alone, "base") == "base"
    pretrained = tiny.save("llama", tmp_path / "tiny", seed=5)
    study = em_world.built(
        tmp_path, tuned, {"kitchen": em_world.rows(10, seed=2)}, membership_rows=4
    )
    assert study.config.reference == str(pretrained)
    adapter = em_world.trained(study, study.slots[0])
    store, outcome = reference.STAGE.run_in(study.store.path, em_world.OPTIONS)
    assert (outcome.done, outcome.failed) == (1, {})
    found = store.rows([REFERENCE]).set_index("row_id")
    put = membership.put(study, adapter)
    assert set(found["reference"]) == {str(pretrained)} and len(found) == len(put)
    for row in (put[0], put[-1]):
        np.testing.assert_allclose(
            found.loc[row.row_id, list(membership.MEASURES)].astype(float),
            by_hand(study, None, row, 0.2, pretrained),
            rtol=2e-4,
        )
    # a study keeps its reference, whatever lies beside its base later
    shutil.rmtree(pretrained)
    em_world.built(tmp_path, tuned, {"kitchen": em_world.rows(10, seed=2)}, membership_rows=4)
    assert Study.load(study.store.path).config.reference == str(pretrained)


def test_a_reference_with_other_tokens_is_refused(tmp_path, one_thread):  # noqa: F811
    outline = models.outline(str(tiny.save("llama", tmp_path / "tiny")))
    other = em_world.vennish(tmp_path / "other")
    with pytest.raises(UsageError, match=r"has other tokens .* --set reference=base"):
        reference_of(outline, str(other))
