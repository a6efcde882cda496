"""Audits of subjects that lie over several devices: the table of one, whoever computes it and
whatever dies on the way.

Under the tensor-parallel plan sums are made in another order: in float32 activations and losses
agree to 1e-4, words and verdicts are equal. Here the ranks are processes on the CPU.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress

import pandas as pd
import psutil
import pytest
import tiny
import torch
import yaml
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap import models
from auditgap.audits import grid, latent
from auditgap.audits.audit import run as run_audit
from auditgap.audits.latent.audit import LATENT
from auditgap.audits.ranked import RankedEngine
from auditgap.cli import main
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.errors import AuditgapError, UsageError
from auditgap.interventions.pgd import PGD, Goal, attack
from auditgap.models import Rendered, Shard
from auditgap.types import Edit, Prompt, Site

pytestmark = pytest.mark.minutes

TWO = Shard.of("tensor:2")
RENDERED = [
    Rendered(Prompt(str(i)), ids, (True,) * len(ids))
    for i, ids in enumerate([(5, 9, 30, 14, 61, 22), (7, 8, 9), (44, 3, 17, 80)])
]
TARGET = (13, 9)
VALUES = {
    "judge": "keyword",
    "reward": "margin",
    "target": "Sure , here is",
    "max_new_tokens": 5,
    "steps": 3,
    "dtype": "float32",
    "device": "cpu",
    "untargeted_tokens": 2,
    "layers": "embedding,1",
    "eps": [0.05, 0.3],
    "distance": True,
    "distance_limit": 4.0,
    "bisections": 1,
}


def ranks_alive() -> list[int]:
    """Ranks that this process has started, itself or through others."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if (
                "auditgap.audits.rank" in " ".join(process.cmdline())
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path, monkeypatch):
    # the log of a rank that has failed stays where it was
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    assert not ranks_alive()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("sharded")
    tiny.save("llama", home / "model")
    words = ("red", "blue", "green sea", "sun moon star")
    (home / "prompts.txt").write_text(
        "\n".join(f"please tell the colour of the vault {w}" for w in words)
    )
    return home


def audit(home, out, **more):
    values = {
        **VALUES,
        "models": str(home / "model"),
        "prompts": str(home / "prompts.txt"),
        "out": str(out),
        **more,
    }
    return run_audit(LATENT, *LATENT.read(None, values))


@pytest.fixture(scope="module")
def plain(home, tmp_path_factory):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    store, outcome = audit(home, tmp_path_factory.mktemp("plain") / "run")
    torch.set_num_threads(before)
    assert not outcome.failed
    return store


def table(store) -> pd.DataFrame:
    return pd.read_parquet(store.path / "lvs.parquet")


def agree(plain, other) -> None:
    """Equal words and verdicts, and numbers to 1e-3 (a score is a difference over a small norm)."""
    assert {r["key"] for r in plain.records()} == {r["key"] for r in other.records()}, (
        "the shard is no part of the question"
    )
    for record in plain.records():
        if record["generations"]:
            one, two = (
                s.generations(record["key"]).set_index(["prompt_id", "draw"])
                for s in (plain, other)
            )
            assert one["completion"].equals(two["completion"].loc[one.index]), record["cell"]
    pd.testing.assert_frame_equal(table(plain), table(other), rtol=1e-3, atol=1e-4)
    distances = [s.rows(["distance"]) for s in (plain, other)]
    pd.testing.assert_frame_equal(*distances, rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------
# engines


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen2", "gpt_neox"])
def test_two_ranks_give_the_numbers_of_one(family, tmp_path):
    folder = str(tiny.save(family, tmp_path / family))
    outline = models.outline(folder)
    one = HFEngine(models.load(outline, dtype="float32", device="cpu"))
    with RankedEngine(outline, TWO, dtype="float32", device="cpu") as two:
        for site in (Site(-1), Site(1), Site(3)):
            two.self_test(site)
            for a, b in zip(
                one.activations(RENDERED, site), two.activations(RENDERED, site), strict=True
            ):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            goals = [Goal(r, TARGET, (0.1, 0.4)) for r in RENDERED]
            pgd = PGD(steps=4, restarts=2)
            here, there = (attack(engine, goals, site, pgd) for engine in (one, two))
            for a, b in zip(
                (f for row in here for f in row), (f for row in there for f in row), strict=True
            ):
                assert (a.delta.sign() == b.delta.sign()).float().mean() > 0.98
                assert a.nll_clean == pytest.approx(b.nll_clean, rel=1e-4)
                assert a.nll_edited == pytest.approx(b.nll_edited, rel=1e-2)
            edits = [Edit(site, row[1].delta) for row in here]
            asked = [Request(r, e, TARGET) for r, e in zip(RENDERED, edits, strict=True)] + [
                Request(RENDERED[0])
            ]
            for a, b in zip(one.generate(asked, 5), two.generate(asked, 5), strict=True):
                assert (a.ids, a.text, a.stopped, a.finite) == (b.ids, b.text, b.stopped, b.finite)
                if a.target_nll is not None:
                    assert (a.target_nll, a.l2_effective) == pytest.approx(
                        (b.target_nll, b.l2_effective), rel=1e-4
                    )
            for under in (edits, None):
                (a, none, b), (c, nothing, d) = (
                    e.nll(RENDERED, [(1, 2, 3), (), TARGET], under) for e in (one, two)
                )
                assert none is nothing is None and (a, b) == pytest.approx((c, d), rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_ranks_on_two_gpus_give_the_words_of_one(home):
    outline = models.outline(str(home / "model"))
    one = HFEngine(models.load(outline, dtype="float32", device="cuda"))
    with RankedEngine(outline, TWO, dtype="float32", device="cuda") as two:
        goals = [Goal(r, TARGET, (0.4,)) for r in RENDERED]
        here, there = (attack(engine, goals, Site(1), PGD(steps=4)) for engine in (one, two))
        for (a,), (b,) in zip(here, there, strict=True):
            assert (a.delta.sign() == b.delta.sign()).float().mean() > 0.98
        asked = [
            Request(r, Edit(Site(1), row[0].delta)) for r, row in zip(RENDERED, here, strict=True)
        ]
        assert [c.ids for c in one.generate(asked, 5)] == [c.ids for c in two.generate(asked, 5)]


class TestWhenARankFails:
    @pytest.fixture
    def engine(self, home):
        with RankedEngine(
            models.outline(str(home / "model")), TWO, dtype="float32", device="cpu"
        ) as engine:
            yield engine

    @pytest.mark.parametrize("rank", [0, 1])
    def test_killed_amid_an_attack(self, engine, rank):
        """The others wait in a collective for it; all end at once, and the sentence names the one
        that was killed."""
        goals = [Goal(r, TARGET, (0.1, 0.4)) for r in RENDERED]
        pids = engine.pids
        threading.Timer(1.0, os.kill, (pids[rank], signal.SIGKILL)).start()
        started = time.monotonic()
        with pytest.raises(AuditgapError, match=f"Rank {rank} of 2 .*SIGKILL"):
            attack(engine, goals, Site(-1), PGD(steps=100_000))
        assert time.monotonic() - started < 40 and engine.closed
        assert not [pid for pid in pids if psutil.pid_exists(pid)]
        with pytest.raises(AuditgapError, match="closed"):
            engine.self_test(Site(0))

    def test_one_that_raises_ends_all(self, engine):
        """A prompt of token ids that are none: every rank says so, and no more than one sentence
        comes of it."""
        with pytest.raises(
            AuditgapError, match=r"Rank \d of 2 .*failed \(IndexError\).*Its log is"
        ) as caught:
            engine.activations([Rendered(Prompt("strange"), (5, 100_000), (True, True))], Site(0))
        assert "\n" not in str(caught.value) and engine.closed

    def test_one_whose_memory_runs_out_has_all_agree_on_half(self, home):
        """Rank 1 may have 30 MB more than it has, and the batch wants more: both are started again,
        with batches of half as many tokens."""
        outline = models.outline(str(home / "model"))
        drawn = torch.randint(4, tiny.VOCABULARY, (512, 240), generator=torch.manual_seed(0))
        rows = [
            Rendered(Prompt(str(i)), tuple(ids), (True,) * 240)
            for i, ids in enumerate(drawn.tolist())
        ]
        answers = [(13, 9)] * len(rows)
        alone = HFEngine(models.load(outline, dtype="float32", device="cpu")).nll(rows, answers)
        with RankedEngine(
            outline, TWO, dtype="float32", device="cpu", batch_tokens=1 << 20
        ) as engine:
            engine.nll(rows[:2], answers[:2])
            pids = engine.pids
            short = psutil.Process(pids[1])
            most = short.memory_info().vms + (30 << 20)
            short.rlimit(psutil.RLIMIT_AS, (most, most))
            assert engine.nll(rows, answers) == pytest.approx(alone, abs=1e-4)
            assert set(engine.pids).isdisjoint(pids) and engine._most is not None
            assert 512 * 240 / 32 < engine._most <= 512 * 242 / 2

    def test_interrupted(self, engine):
        goals = [Goal(r, TARGET, (0.1, 0.4)) for r in RENDERED]
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        started = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            attack(engine, goals, Site(-1), PGD(steps=100_000))
        assert time.monotonic() - started < 40 and engine.closed


def test_ranks_die_with_their_parent(home):
    code = (
        "import sys, time; from auditgap import models; from auditgap.audits.ranked import"
        " RankedEngine; engine = RankedEngine(models.outline(sys.argv[1]),"
        " models.Shard.of('tensor:2'), dtype='float32', device='cpu'); print(*engine.pids,"
        " flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(home / "model")], stdout=subprocess.PIPE, text=True
    )
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and all(psutil.pid_exists(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    until = time.monotonic() + 15
    while any(psutil.pid_exists(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.2)
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


# --------------------------------------------------------------------------------------------------------------
# audits


def test_a_dispatched_audit_gives_the_same_table(home, plain, tmp_path):
    store, outcome = audit(home, tmp_path / "run", shard="layers:2")
    assert not outcome.failed
    agree(plain, store)
    pd.testing.assert_frame_equal(table(plain), table(store))  # to the last digit
    assert {r["info"]["shard"] for r in store.records()} == {"layers:2"}


def test_an_audit_on_two_ranks_gives_the_table_of_one(home, plain, tmp_path):
    store, outcome = audit(home, tmp_path / "run", shard="tensor:2")
    assert not outcome.failed
    agree(plain, store)
    assert {r["info"]["shard"] for r in store.records()} == {"tensor:2"}


def test_a_rank_that_is_killed_costs_its_site_and_the_same_command_heals_it(
    home, plain, tmp_path, monkeypatch
):
    """The other sites are computed on new ranks; what was remembered is not computed again."""
    generate, killed = RankedEngine.generate, []

    def once(self, requests, new):
        if not killed and requests[0].edit is not None:
            killed.append(self.pids[1])
            os.kill(killed[0], signal.SIGKILL)
        return generate(self, requests, new)

    monkeypatch.setattr(RankedEngine, "generate", once)
    store, outcome = audit(home, tmp_path / "run", shard="tensor:2")
    causes = set(outcome.failed.values())
    assert killed and len(causes) == 1 and "SIGKILL" in causes.pop()
    assert 0 < len(outcome.failed) < len(store.planned()) - 1, "one site"
    store, outcome = audit(home, tmp_path / "run", shard="tensor:2", retry_failed=True)
    assert not outcome.failed
    agree(plain, store)


def test_a_grid_on_ray_with_a_shard_a_model(home, tmp_path):
    """One model on two ranks and one dispatched, in actors; against the same grid in this process,
    both whole."""
    tiny.save("qwen2", tmp_path / "other")
    values = {
        **VALUES,
        "distance": False,
        "attacks": "targeted,random_matched",
        "layers": "1",
        "prompts": [str(home / "prompts.txt")],
    }
    shards = {"here": (None, None), "there": ("tensor:2", "layers:2")}
    tables = {}
    for name, (first, second) in shards.items():
        named = [
            {"name": str(home / "model"), "shard": first},
            {"name": str(tmp_path / "other"), "shard": second},
        ]
        entries = [{k: v for k, v in entry.items() if v is not None} for entry in named]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**values, "models": entries}))
        flags = {
            "out": str(tmp_path / name),
            "executor": "ray" if first else "local",
            "workers": 1 if first else None,
        }
        planned = grid.make_grid(grid.read_grid(tmp_path / f"{name}.yaml", flags))
        outcome = grid.run(planned)
        assert not outcome.failed and outcome.done == len(planned.cells)
        tables[name] = pd.read_parquet(tmp_path / name / "lvs.parquet")
    pd.testing.assert_frame_equal(tables["here"], tables["there"], rtol=1e-3, atol=1e-4)


# -------------------------------------------------------------------------------------------------------------
# asking


def test_a_model_s_own_shard_and_what_is_said_for_all(tmp_path):
    (tmp_path / "grid.yaml").write_text(
        yaml.safe_dump(
            {
                "models": [
                    "a",
                    {"name": "b", "shard": "tensor:2"},
                    {"name": "c", "shard": "whole"},
                ],
                "shard": "layers:4",
            }
        )
    )
    options = grid.read_grid(tmp_path / "grid.yaml", {}).options
    assert [str(options.shard_of(name)) for name in "abc"] == ["layers:4", "tensor:2", "whole"]
    assert [options.gpus_of(name, "cuda") for name in "abc"] == [4.0, 2.0, 1.0] and options.gpus_of(
        "a", "cpu"
    ) == 0.0
    assert options.model_copy(update={"gpus_per_worker": 8.0}).gpus_of("b", "cuda") == 8.0


def test_every_model_of_a_run_may_have_its_own(home):
    values = {"models": ["a", "b"], "shard": {"b": "tensor:2"}}
    _, options = LATENT.read(None, values)
    assert [str(options.shard_of(name)) for name in "ab"] == ["whole", "tensor:2"]
    with pytest.raises(UsageError, match=r"'c', which is none of the models"):
        LATENT.read(None, {**values, "shard": {"c": "tensor:2"}})
    for wrong in ("rows:2", {"b": "two"}):
        with pytest.raises(UsageError, match="--shard takes"):
            LATENT.read(None, {**values, "shard": wrong})


def test_what_cannot_be_is_said_before_anything_runs(home, tmp_path, capsys):
    asked = [
        "lvs",
        str(home / "model"),
        "--prompts",
        str(home / "prompts.txt"),
        "--out",
        str(tmp_path / "run"),
        "--dry-run",
    ]
    for more, wanted in (
        (["--shard", "tensor:4"], "2 key/value heads"),
        (["--shard", "layers:9"], "has 4 blocks"),
        (["--shard", "wide:2"], "layers:N"),
        (["--shard", "layers:2", "--compile"], "--compile is for whole models"),
    ):
        with pytest.raises(SystemExit) as ended:
            main([*asked, *more])
        said = capsys.readouterr().err
        assert (
            ended.value.code == 2 and wanted in " ".join(said.split()) and "Traceback" not in said
        )
    with pytest.raises(SystemExit) as ended:
        main([*asked, "--shard", "tensor:2"])
    assert not ended.value.code
    assert not (tmp_path / "run").exists()


def test_memory_is_said_of_a_device(home, monkeypatch):
    monkeypatch.setattr("auditgap.audits.latent.timing.matmul_rate", lambda *_: 1e12)
    asked = {**VALUES, "models": str(home / "model"), "prompts": str(home / "prompts.txt")}
    config, options = LATENT.read(None, asked)
    plan = latent.prepare(config, options)
    two = options.model_copy(update={"shard": "layers:2"})
    on_cpu, on_gpus = (
        [latent.estimate(plan, device, o).memory_bytes for o in (options, two)]
        for device in ("cpu", "cuda")
    )
    assert on_cpu[0] == on_cpu[1], "a CPU is one device"
    assert on_gpus[0] - on_gpus[1] == pytest.approx(plan.outlines[0].n_params * 4 * 1.6 / 2)
