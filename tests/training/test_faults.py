"""What happens to a job, and what is left of it: kills, torn files, other numbers of ranks,
exceptions, signals.

Real processes, few of them: a job makes several trainings one after another, and what one leaves
the next one resumes.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time

import jobs
import pytest
import safetensors.torch

from auditgap.errors import Interrupted, UsageError
from auditgap.training import checkpoints

pytestmark = pytest.mark.minutes

ZERO3 = {"deepspeed": str(jobs.ROOT / "ds_configs" / "zero3.json")}


def facts(folder, number, rank):
    return json.loads((folder / f"facts-{number}-{rank}.json").read_text())


def weights(folder):
    return safetensors.torch.load_file(folder / "model" / "model.safetensors")


def apart(one, other):
    """The largest difference of two runs' weights."""
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


def sft(world, out, **more):
    return {"kind": "sft", "values": world.sft(out, **more.pop("changes", {})), **more}


@pytest.fixture(scope="module")
def unbroken(world):
    """On one rank, in this process."""
    return jobs.train("sft", world.sft("unbroken")).path


@pytest.fixture(scope="module")
def job_a(world):
    """Two ranks: a refusal, two unbroken runs, one at ZeRO-3 that is interrupted, and one whose
    rank 1 is killed at step 3."""
    runs = [
        sft(world, "never", changes={"batch": 6}, fails=True),
        sft(world, "ref2"),
        {"kind": "dissociated", "values": world.twin("twin-ref2")},
        sft(world, "cut3", changes={**ZERO3, "eval_every": 5}, stop_at=5, fails=True),
        sft(world, "cut2"),
    ]
    folder = world.folder / "job-a"
    done = jobs.script(
        "deepspeed", 2, runs, folder, fault={"run": 4, "rank": 1, "batches": 6, "how": "kill"}
    )
    assert (folder / "facts-3-0.json").exists(), done.tail
    assert (folder / "fault-time").exists(), done.tail
    for name in ("cut2", "cut3"):
        shutil.copytree(world.folder / name, world.folder / f"{name}-copy")
    return done, folder


@pytest.fixture(scope="module")
def job_b(world, job_a):
    """Two ranks: what A's kill left is resumed; then rank 0 of a dissociation is killed at step
    3."""
    runs = [sft(world, "cut2"), {"kind": "dissociated", "values": world.twin("twin-cut")}]
    folder = world.folder / "job-b"
    done = jobs.script(
        "torchrun", 2, runs, folder, fault={"run": 1, "rank": 0, "batches": 6, "how": "kill"}
    )
    assert (folder / "facts-0-0.json").exists(), done.tail
    return done, folder


@pytest.fixture(scope="module")
def job_d(world):
    """One rank: a run at ZeRO-3 that is interrupted, and one that gets SIGTERM in its fourth
    step."""
    runs = [
        sft(world, "one3", changes={**ZERO3, "eval_every": 5}, stop_at=5, fails=True),
        sft(world, "one2"),
    ]
    folder = world.folder / "job-d"
    done = jobs.script(
        "python", 1, runs, folder, fault={"run": 1, "rank": 0, "batches": 3 * 4 + 1, "how": "term"}
    )
    for name in ("one2", "one3"):
        shutil.copytree(world.folder / name, world.folder / f"{name}-copy")
    return done, folder


@pytest.fixture(scope="module")
def job_c(world, job_b, job_d):
    """Two ranks: the dissociation resumed, two runs that one rank had begun, and one of which rank
    1 raises in its first step."""
    runs = [
        {"kind": "dissociated", "values": world.twin("twin-cut")},
        sft(world, "one2-copy"),
        sft(world, "one3-copy", changes={**ZERO3, "eval_every": 5}),
        sft(world, "raising"),
    ]
    folder = world.folder / "job-c"
    done = jobs.script(
        "torchrun", 2, runs, folder, fault={"run": 3, "rank": 1, "batches": 0, "how": "raise"}
    )
    assert (folder / "facts-2-0.json").exists(), done.tail
    return done, folder


# ------------------------------------------------------------------ kill -9


@pytest.mark.parametrize(("job", "launcher"), [("job_a", "deepspeed"), ("job_b", "torchrun")])
def test_a_killed_rank_ends_the_job_in_seconds_and_leaves_nothing_running(job, launcher, request):
    done, folder = request.getfixturevalue(job)
    assert done.rc not in (0, -1), done.tail
    assert done.ended - float((folder / "fault-time").read_text()) < 30
    assert not done.left


def test_after_a_kill_the_same_command_makes_the_unbroken_runs_steps(world, job_a, job_b):
    assert "Resumed at step 2" in job_b[0].err
    for name in ("loss", "lr", "gradient_norm"):
        assert jobs.curve(world.folder / "cut2", name) == jobs.curve(world.folder / "ref2", name)
    assert apart(world.folder / "cut2", world.folder / "ref2") == 0
    assert not (world.folder / "cut2" / "checkpoints").exists()


def test_a_killed_dissociation_goes_on_with_its_monitor_and_its_optimizer(world, job_a, job_c):
    for name in ("loss", "kl", "monitor", "monitor_bce"):
        assert jobs.curve(world.folder / "twin-cut", name) == jobs.curve(
            world.folder / "twin-ref2", name
        ), name
    phi = facts(job_a[1], 2, 0)["phi"]
    assert len(phi) == 6
    # from the checkpoint of step 2
    assert facts(job_c[1], 0, 0)["phi"] == facts(job_c[1], 0, 1)["phi"] == phi[2:]
    assert apart(world.folder / "twin-cut", world.folder / "twin-ref2") == 0
    ours, theirs = (
        json.loads((world.folder / n / "train.json").read_text()) for n in ("twin-cut", "twin-ref2")
    )
    assert ours["chosen"] == theirs["chosen"]
    assert ours["evaluations"] == theirs["evaluations"]


def begun(folder, n, job):
    """Wait until a run has logged n steps."""
    patience = time.monotonic() + 300
    while time.monotonic() < patience and job.process.poll() is None:
        if (folder / "log.jsonl").exists() and len(jobs.log(folder)) >= n:
            return
        time.sleep(0.05)
    raise AssertionError(job.end(1).tail)


def test_a_rank_killed_from_outside_ends_the_job_in_a_sentence_and_the_job_goes_on(world):
    """At ZeRO-3, where no rank has the whole model."""
    recipe = {**ZERO3, "steps": 40, "save_every": 4, "eval_every": 20}
    cut = {"kind": "dissociated", "values": world.twin("outside", **recipe)}
    job = jobs.start_script("torchrun", 2, [cut], world.folder / "job-f")
    begun(world.folder / "outside", 6, job)
    (one,) = [p for p in job.processes() if p.environ().get("RANK") == "1"]
    one.kill()
    killed = time.time()
    done = job.end(60)
    assert done.rc not in (0, -1), done.tail
    assert done.ended - killed < 30 and not done.left
    assert "Rank 0 of 2: another rank ended" in done.err, done.err
    assert "failed:" not in done.err.split("another rank ended")[0], done.err
    left = jobs.log(world.folder / "outside")
    assert 6 <= len(left) < 40

    whole = {"kind": "dissociated", "values": world.twin("inside", **recipe)}
    again = jobs.script("torchrun", 2, [cut, whole], world.folder / "job-g")
    assert again.rc == 0, again.tail
    said = re.search(r"Resumed at step (\d+) ", again.err)
    assert said and 4 <= int(said[1]) <= len(left) and int(said[1]) % 4 == 0
    for name in ("loss", "kl", "monitor", "gradient_norm"):
        ours, theirs = (jobs.curve(world.folder / n, name) for n in ("outside", "inside"))
        assert ours == theirs, name
    assert apart(world.folder / "outside", world.folder / "inside") == 0


# ------------------------------------------------------------------ one rank's trouble, all ranks'
# trouble


def test_a_rank_that_raises_ends_the_job_and_says_which_and_why(world, job_c):
    done, folder = job_c
    assert done.rc not in (0, -1), done.tail
    assert done.ended - float((folder / "fault-time").read_text()) < 30
    assert "Rank 1 of 2 failed:" in done.err
    assert "RuntimeError: the batch of the fault cannot be made" in done.err
    assert not done.left
    assert not (world.folder / "raising" / "train.json").exists()


def test_what_all_ranks_refuse_is_one_error_that_they_share(world, job_a):
    for rank in (0, 1):
        assert "batch 6 does not divide" in facts(job_a[1], 0, rank)["error"]
        assert facts(job_a[1], 0, rank)["shared"]
    assert not (world.folder / "never" / "run.json").exists()


def test_a_stop_signal_finishes_the_step_writes_a_checkpoint_and_ends_with_130(
    world, job_d, unbroken
):
    done, _ = job_d
    assert done.rc == Interrupted.exit_code == 130, done.tail
    assert "Stopped at step 4 of 6; a checkpoint was written" in done.err
    assert "Traceback" not in done.err
    assert checkpoints.latest(world.folder / "one2" / "checkpoints").step == 4
    jobs.train("sft", world.sft("one2"))
    assert jobs.curve(world.folder / "one2") == jobs.curve(unbroken)
    assert apart(world.folder / "one2", unbroken) == 0


def test_ctrl_c_in_the_deepspeed_launcher_writes_a_checkpoint(world):
    """The terminal sends SIGINT to launcher and ranks alike, and the launcher its SIGTERMs on
    top."""
    recipe = world.sft("stopped", steps=10**6, save_every=10**6, eval_every=10**6)
    job = jobs.start_script(
        "deepspeed", 2, [{"kind": "sft", "values": recipe}], world.folder / "job-e"
    )
    patience = time.monotonic() + 300  # two ranks import for minutes where others want the cores
    while (
        not (world.folder / "stopped" / "log.jsonl").exists()
        and time.monotonic() < patience
        and job.process.poll() is None
    ):
        time.sleep(0.1)
    os.killpg(job.process.pid, signal.SIGINT)
    done = job.end(60)
    assert done.rc not in (0, -1), done.tail
    assert not done.left
    assert "a checkpoint was written" in done.err, done.tail
    assert "failed" not in done.err
    assert checkpoints.latest(world.folder / "stopped" / "checkpoints").step == len(
        jobs.log(world.folder / "stopped")
    )


# ------------------------------------------------------------------ other numbers of ranks, other
# stages


@pytest.mark.parametrize(
    ("name", "changes"), [("cut2-copy", {}), ("cut3-copy", {**ZERO3, "eval_every": 5})]
)
def test_what_two_ranks_began_one_rank_finishes(world, job_a, unbroken, name, changes, capsys):
    trained = jobs.train("sft", world.sft(name, **changes))
    assert "was written by 2 ranks; converting it for 1" in capsys.readouterr().err
    assert jobs.curve(trained.path) == pytest.approx(jobs.curve(unbroken), abs=1e-5)
    assert apart(trained.path, unbroken) < 1e-5


@pytest.mark.parametrize("name", ["one2-copy", "one3-copy"])
def test_what_one_rank_began_two_ranks_finish(world, job_c, unbroken, name):
    assert "was written by 1 rank; converting it for 2" in job_c[0].err
    assert jobs.curve(world.folder / name) == pytest.approx(jobs.curve(unbroken), abs=1e-5)
    assert apart(world.folder / name, unbroken) < 1e-5


@pytest.fixture
def cut(world, tmp_path):
    """A run on one rank at ZeRO-2, interrupted at step 5 with checkpoints of steps 2 and 4: its
    recipe."""
    recipe = world.sft(tmp_path / "cut", eval_every=5)
    with pytest.raises(Interrupted):
        jobs.train("sft", recipe, stop_at=5)
    assert checkpoints.steps(tmp_path / "cut" / "checkpoints") == [2, 4]
    return recipe


def test_another_zero_stage_is_refused_and_the_right_one_goes_on(world, cut, tmp_path, unbroken):
    other = tmp_path / "zero0.json"
    other.write_text('{"zero_optimization": {"stage": 0}}')
    with pytest.raises(UsageError, match="written at ZeRO stage 2, and this run is set to stage 0"):
        jobs.train("sft", {**cut, "deepspeed": str(other)})
    assert checkpoints.steps(tmp_path / "cut" / "checkpoints") == [2, 4]
    assert jobs.curve(jobs.train("sft", cut).path) == jobs.curve(unbroken)


# ------------------------------------------------------------------ torn checkpoints


def truncated(folder):
    shard = next(folder.glob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1000])


def flipped(folder):
    """A byte that changed its value: the size is the same."""
    shard = next(folder.glob("*model_states.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 0xFF
    shard.write_bytes(bytes(data))


def without_companion(folder):
    (folder / "companion.safetensors").unlink()


def unsealed(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "harm", [truncated, flipped, without_companion, unsealed], ids=lambda h: h.__name__
)
def test_a_torn_newest_checkpoint_falls_back_to_the_one_before_and_says_so(
    world, cut, unbroken, harm, capsys
):
    root = world.folder / cut["out"] / "checkpoints"
    harm(root / "step00000004")
    trained = jobs.train("sft", cut)
    said = capsys.readouterr().err
    assert "Checkpoint step00000004 was passed over" in said
    assert "Resumed at step 2" in said
    assert jobs.curve(trained.path) == jobs.curve(unbroken)
    assert [line["step"] for line in jobs.log(trained.path)] == list(range(6))
    assert apart(trained.path, unbroken) == 0


def test_when_no_checkpoint_is_whole_it_does_not_start_over_silently(world, cut):
    root = world.folder / cut["out"] / "checkpoints"
    for folder in root.glob("step*"):
        truncated(folder)
    with pytest.raises(UsageError, match="no whole checkpoint to go on from"):
        jobs.train("sft", cut)
    assert len(list(root.glob("step*"))) == 2
