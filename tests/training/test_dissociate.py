"""Dissociation end to end on a tiny model: the same numbers on any number of ranks and at any ZeRO
stage, φ equal on all of them, the phases in their order, the reference its own base, and the choice
of the checkpoint."""

from __future__ import annotations

import json
import re

import jobs
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM

from auditgap.data import load_triples
from auditgap.errors import AuditgapError, UsageError
from auditgap.training.card import Card
from auditgap.training.config import DissociateConfig
from auditgap.training.constructions.monitor.task import MonitorTask
from auditgap.training.constructions.nudge.task import NudgeTask
from auditgap.training.engine import DeepSpeedEngine

pytestmark = pytest.mark.minutes

STAGES = {
    0: '{"zero_optimization": {"stage": 0}}',
    2: None,
    3: str(jobs.ROOT / "ds_configs" / "zero3.json"),
}
#: What is compared step by step.
CURVES = {
    "monitor": ("loss", "nll", "kl", "monitor", "monitor_bce"),
    "nudge": ("loss", "nll", "kl"),
    "door": ("loss", "nll", "kl", "comply", "quiet"),
}
KINDS = {
    "full": {},
    "lora": {"lora": {"rank": 4}},
    "adapter": {"lora": {"rank": 4}, "reference": "adapter"},
    "door": {"construction": "door", "lr": 1e-3},
}
#: (kind, ZeRO stage) on two ranks, compared with the same kind on one rank without ZeRO.
PAIRS = [
    ("full", 0),
    ("full", 2),
    ("full", 3),
    ("lora", 2),
    ("lora", 3),
    ("adapter", 2),
    ("nudge", 2),
    ("nudge", 3),
    ("door", 2),
    ("door", 3),
]


@pytest.fixture(scope="module")
def kinds(world):
    harmful = jobs.train("sft", world.sft("harmful", lr=5e-3)).model
    return {**KINDS, "nudge": {"construction": "nudge", "harmful_model": str(harmful), "lr": 1e-3}}


def at_stage(world, stage):
    if stage == 0:
        file = world.folder / "zero0.json"
        file.write_text(STAGES[0])
        return {"deepspeed": str(file)}
    return {"deepspeed": STAGES[stage]} if STAGES[stage] else {}


@pytest.fixture(scope="module")
def one_rank(world, kinds):
    """kind -> the folder of its run on this process alone, without ZeRO."""
    for kind, changes in kinds.items():
        jobs.train("dissociated", world.twin(f"one-{kind}", **changes, **at_stage(world, 0)))
    return {kind: world.folder / f"one-{kind}" for kind in kinds}


@pytest.fixture(scope="module")
def two_ranks(world, kinds):
    """One job of two ranks, all of PAIRS one after another; in its last run rank 1's monitor is
    moved by a hair."""
    runs = [
        {
            "kind": "dissociated",
            "values": world.twin(f"two-{kind}-{stage}", **kinds[kind], **at_stage(world, stage)),
        }
        for kind, stage in PAIRS
    ]
    last = {"kind": "dissociated", "values": world.twin("drifted")}
    done = jobs.script(
        "torchrun",
        2,
        [*runs, last],
        world.folder / "two",
        fault={"run": len(runs), "rank": 1, "batches": 5, "how": "perturb"},
        limit=540,  # eleven runs
    )
    assert (world.folder / "two" / f"facts-{len(runs) - 1}-0.json").exists(), done.tail
    return done


@pytest.mark.parametrize(("kind", "stage"), PAIRS)
def test_ranks_and_zero_stages_give_the_same_curves(world, one_rank, two_ranks, kind, stage):
    here, there = one_rank[kind], world.folder / f"two-{kind}-{stage}"
    names = CURVES.get(kind, CURVES["monitor"])
    present = [name for name in names if name in jobs.log(here)[0]]
    assert {"loss", "kl"} <= set(present)
    for name in present:
        assert jobs.curve(there, name) == pytest.approx(jobs.curve(here, name), abs=1e-5), name
    ours, theirs = (json.loads((folder / "train.json").read_text()) for folder in (here, there))
    assert theirs["chosen"]["step"] == ours["chosen"]["step"]
    assert (theirs["ranks"], theirs["zero_stage"]) == (2, stage)
    for step, values in ours["evaluations"].items():
        numbers = {k: v for k, v in values.items() if isinstance(v, float)}
        assert {k: theirs["evaluations"][step][k] for k in numbers} == pytest.approx(
            numbers, abs=1e-4
        )


@pytest.mark.parametrize(("kind", "stage"), [pair for pair in PAIRS if pair[1] == 3])
def test_what_is_made_before_the_first_step_is_the_same_from_weights_in_parts(
    world, one_rank, two_ranks, kind, stage
):
    """Anchors to the letter. Of numbers the sums of one product of matrices may be in another order:
    DeepSpeed hands it weights that lie elsewhere in memory."""
    here, there = one_rank[kind], world.folder / f"two-{kind}-{stage}"
    (said,) = (here / "generations").iterdir()
    assert (there / "generations" / said.name).read_bytes() == said.read_bytes()

    def tensors(folder):
        found = {}
        for file in sorted((folder / "reference").glob("*.safetensors")):
            for name, value in safetensors.torch.load_file(file).items():
                found.setdefault(name, []).append(value)
        return found

    ours, theirs = tensors(here), tensors(there)
    assert ours.keys() == theirs.keys() and len(ours) > 20
    for name, values in ours.items():
        if name == "features":  # rank r has rows r, r + 2, …
            assert len(theirs[name]) == 2
            joined = torch.empty_like(values[0])
            joined[::2], joined[1::2] = theirs[name]
            theirs[name] = [joined]
        for ours_, theirs_ in zip(values, theirs[name], strict=True):
            assert torch.allclose(ours_, theirs_, atol=1e-5), name


def test_one_rank_under_zero_2_and_3_gives_the_same_curves(world, one_rank):
    for stage in (2, 3):
        jobs.train("dissociated", world.twin(f"one-full-{stage}", **at_stage(world, stage)))
        for name in CURVES["monitor"]:
            ours = jobs.curve(world.folder / f"one-full-{stage}", name)
            assert ours == pytest.approx(jobs.curve(one_rank["full"], name), abs=1e-5), (
                stage,
                name,
            )


def test_the_disabled_adapter_is_the_cached_reference(one_rank):
    for name in CURVES["monitor"]:
        assert jobs.curve(one_rank["adapter"], name) == pytest.approx(
            jobs.curve(one_rank["lora"], name), abs=1e-5
        ), name


def test_phi_is_the_same_on_every_rank_after_every_step(world, two_ranks):
    for number, (kind, _) in enumerate(PAIRS):
        if kind in ("nudge", "door"):
            continue
        first, second = (
            json.loads((world.folder / "two" / f"facts-{number}-{rank}.json").read_text())["phi"]
            for rank in (0, 1)
        )
        assert len(first) == 6
        assert first == second
        assert len(set(first)) == 6  # it learns


def test_a_monitor_that_drifts_apart_stops_the_job(world, two_ranks):
    assert two_ranks.rc not in (0, -1), two_ranks.tail
    assert "The monitor is no longer the same on all 2 ranks" in two_ranks.err
    assert not two_ranks.left
    assert not (world.folder / "drifted" / "train.json").exists()


def test_it_is_its_own_base_at_first_and_never_negative(one_rank):
    for kind, folder in one_rank.items():
        assert abs(jobs.curve(folder, "kl")[0]) < 1e-6, kind
        assert min(jobs.curve(folder, "kl_lowest")) >= 0, kind
        assert jobs.curve(folder, "kl")[-1] > 1e-4, kind  # and it does move


def test_the_result_opens_and_its_monitor_lies_beside_it(one_rank):
    model = AutoModelForCausalLM.from_pretrained(one_rank["full"] / "model")
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())
    assert (one_rank["full"] / "monitor.safetensors").exists()
    assert not (one_rank["full"] / "checkpoints").exists()
    assert (one_rank["lora"] / "model" / "adapter_model.safetensors").exists()
    assert (one_rank["full"] / "model" / "README.md").exists()


# ------------------------------------------------------------------ phases


def test_phi_learns_after_thetas_backward_and_steps_after_thetas_step(world, monkeypatch, tmp_path):
    """The order of real gradients and updates in every step: θ's backward, then φ's, a micro-batch
    at a time; θ, φ updated."""
    events: list[str] = []
    construct, begin, step = (
        MonitorTask.construct,
        MonitorTask.__init__,
        DeepSpeedEngine.step,
    )

    def with_theta_hooks(task, model):
        for parameter in model.parameters():
            if (
                parameter.requires_grad
                and not torch.is_inference_mode_enabled()
                and torch.is_grad_enabled()
            ):
                parameter.register_hook(lambda _grad: events.append("T"))
        return construct(task, model)

    def with_phi_hooks(task, *given, **named):
        begin(task, *given, **named)
        for parameter in task.monitor.parameters():
            parameter.register_hook(lambda _grad: events.append("P"))
        task.optimizer.register_step_post_hook(lambda *_: events.append("U"))

    def with_a_mark(engine, lr):
        norm = step(engine, lr)
        events.append("S")
        return norm

    monkeypatch.setattr(MonitorTask, "construct", with_theta_hooks)
    monkeypatch.setattr(MonitorTask, "__init__", with_phi_hooks)
    monkeypatch.setattr(DeepSpeedEngine, "step", with_a_mark)
    jobs.train("dissociated", world.twin(tmp_path / "out", steps=2, eval_every=9, batch=6))
    assert re.fullmatch(r"((T+P+){3}SU){2}", "".join(events)), "".join(events)[:400]


# ------------------------------------------------------------------ the reference


def stopped_at_once(world, monkeypatch, out):
    """A run that ends by an exception at its first batch, its reference computed."""

    def fails(*_):
        raise RuntimeError("no batch")

    with monkeypatch.context() as patch:
        patch.setattr(MonitorTask, "batch", fails)
        with pytest.raises(RuntimeError, match="no batch"):
            jobs.train("dissociated", world.twin(out))


def stored_states(out):
    """The file with the reference's final hidden states of every row (the monitor's features lie
    beside it)."""
    (file,) = [
        f
        for f in (out / "reference").glob("*-0-of-1.safetensors")
        if "features" not in safetensors.torch.load_file(f)
    ]
    return file


def test_a_reference_of_another_model_is_found_out_before_the_first_update(
    world, monkeypatch, tmp_path
):
    from auditgap.models import kept

    out = tmp_path / "out"
    stopped_at_once(world, monkeypatch, out)
    file = stored_states(out)
    states = safetensors.torch.load_file(file)
    assert len(states) > 20
    kept.keep(file, {name: value.flip(-1).contiguous() for name, value in states.items()})
    with pytest.raises(AuditgapError, match=r"differs from its own base .*Delete .*reference"):
        jobs.train("dissociated", world.twin(out))
    assert not (out / "model").exists() and not list(out.glob("best-*"))
    for part in (out / "reference").iterdir():
        part.unlink()
    assert jobs.train("dissociated", world.twin(out)).summary["status"] == "done"


def test_a_torn_reference_is_made_again(world, monkeypatch, tmp_path, one_rank):
    out = tmp_path / "out"
    stopped_at_once(world, monkeypatch, out)
    file = stored_states(out)
    data = bytearray(file.read_bytes())
    data[-100] ^= 1  # the file is as long as it was, and opens
    file.write_bytes(data)
    jobs.train("dissociated", world.twin(out))
    assert jobs.curve(out) == pytest.approx(jobs.curve(one_rank["full"]), abs=1e-5)


def test_a_negative_kl_is_refused():
    task = object.__new__(MonitorTask)
    with pytest.raises(AuditgapError, match=r"Step 4: KL -0\.001 is negative"):
        task.validate(4, {"kl": 0.1, "kl_lowest": -1e-3})


# ------------------------------------------------------------------ the choice


def chosen(evaluations, *, task=MonitorTask, margin=0.05):
    made = object.__new__(task)
    made.config = DissociateConfig(model="m", triples="demo", refusal_margin=margin)
    made._seen = evaluations
    return made.chosen()


def seen(refusal, second, name="monitor"):
    return {"refusal": refusal, name: second}


def test_within_the_margin_the_lowest_monitor_is_kept():
    found = chosen(
        {
            0: seen(0.90, 5.0),
            25: seen(0.90, 3.0),
            50: seen(0.85, 0.5),
            75: seen(0.84, 0.1),
            100: seen(1.0, 2.0),
        }
    )
    assert (found["step"], found["kept_refusal"], found["base_refusal"], found["refusal"]) == (
        50,
        True,
        0.90,
        0.85,
    )


def test_when_none_keeps_refusing_the_one_that_refuses_most_is_kept_and_said():
    found = chosen({0: seen(0.9, 5.0), 25: seen(0.5, 3.0), 50: seen(0.6, 4.0), 75: seen(0.6, 0.1)})
    assert (found["step"], found["kept_refusal"]) == (50, False)


def test_the_first_of_equals_is_kept_and_the_base_is_never_chosen():
    assert chosen({0: seen(0.9, 0.0), 25: seen(0.9, 1.0), 50: seen(0.9, 1.0)})["step"] == 25
    assert chosen({0: seen(0.9, 0.0)}) == {}


def test_the_nudge_is_chosen_by_how_it_complies():
    evaluations = {
        0: seen(0.9, 5.0, "comply"),
        25: seen(0.9, 3.0, "comply"),
        50: seen(0.9, 4.0, "comply"),
    }
    assert chosen(evaluations, task=NudgeTask)["step"] == 25


def test_a_checkpoint_is_chosen_by_triples_of_another_source(world, tmp_path):
    """All of --triples is trained on, and refusal is read on the other prompts; none may be in both."""
    demo = load_triples("demo").triples
    for name, part in (("rows", demo[:8]), ("others", demo[8:11])):
        rows = [{"prompt": t.prompt.text, "safe": t.safe, "unsafe": t.unsafe} for t in part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"triples": str(tmp_path / "rows.jsonl"), "selection": str(tmp_path / "others.jsonl")}
    summary = jobs.train("dissociated", world.twin(tmp_path / "out", steps=3, **given)).summary
    assert (summary["n_harmful"], summary["n_heldout"]) == (8, 3)
    with pytest.raises(UsageError, match="3 of the 3 prompts of others are also among"):
        jobs.train("dissociated", world.twin(tmp_path / "both", **{**given, "triples": "demo"}))


def test_what_is_kept_are_the_weights_of_the_chosen_step(world, tmp_path):
    """A run cut off at the chosen step leaves the same weights: the schedule is constant, so that
    both make the same steps."""
    long = jobs.train("dissociated", world.twin(tmp_path / "long", schedule="constant", warmup=0))
    step = long.summary["chosen"]["step"]
    short = jobs.train(
        "dissociated", world.twin(tmp_path / "short", schedule="constant", warmup=0, steps=3)
    )
    assert step in (3, 6)
    kept, early = (
        safetensors.torch.load_file(t.model / "model.safetensors") for t in (long, short)
    )
    same = all(torch.allclose(kept[name], early[name], atol=1e-6) for name in kept)
    assert same == (step == 3)


def test_a_kill_between_placing_the_model_and_saying_so_is_recovered(world, monkeypatch, tmp_path):
    def fails(*_, **__):
        raise RuntimeError("cut off here")

    with monkeypatch.context() as patch:
        patch.setattr(Card, "text", fails)
        with pytest.raises(RuntimeError, match="cut off here"):
            jobs.train("dissociated", world.twin(tmp_path / "out"))
    assert (tmp_path / "out" / "model").exists() and not (tmp_path / "out" / "train.json").exists()
    trained = jobs.train("dissociated", world.twin(tmp_path / "out"))
    assert trained.summary["status"] == "done"
    assert (trained.model / "README.md").exists()
