"""`--thinking` where models are asked and not attacked, and judges that think: one door, one
refusal."""

from __future__ import annotations

import json
from types import SimpleNamespace

import planted
import planted_thinking
import pytest
import tiny

from auditgap.audits.audit import run as run_audit
from auditgap.audits.behaviour.audit import BEHAVIOUR
from auditgap.audits.emergent import build, generate
from auditgap.audits.emergent.audit import EMERGENT
from auditgap.audits.emergent.stage import Study
from auditgap.audits.intervene.audit import INTERVENE
from auditgap.engines import Serving
from auditgap.errors import UsageError
from auditgap.judges import load_judge
from auditgap.types import Exchange, Label, Prompt

#: The template of the planted thinker, that nothing can tell not to think.
ALWAYS = planted_thinking.TEMPLATE.partition("{% if enable_thinking")[0] + "{% endif %}"
COMMON = {"dtype": "float32", "device": "cpu", "judge": "colour"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asked")
    planted_thinking.save(folder / "thinks")
    planted.save(planted.Plant(door=1), folder / "plain")
    (folder / "always.jinja").write_text(ALWAYS, "utf-8")
    for name, prompts in (("asked", planted.PROMPTS[:4]), ("easy", planted.PROMPTS[8:])):
        planted.write_prompts(folder / f"{name}.txt", prompts)
    with pytest.MonkeyPatch.context() as patch:
        planted.register(patch)
        yield folder


def evaluate(home, out, model="thinks", **changes):
    values = {
        **COMMON,
        "models": str(home / model),
        "suite": f"{home / 'asked.txt'}:harmful",
        "max_new_tokens": 9,
        "out": str(out),
    }
    store, outcome = run_audit(BEHAVIOUR, *BEHAVIOUR.read(None, {**values, **changes}))
    assert not outcome.failed, outcome.failed
    return store


def texts(store):
    return [t for key in list(store.keys()) for t in store.generations(key).to_dict("records")]


def test_a_model_is_asked_to_think_or_not_to(home, tmp_path):
    on = evaluate(home, tmp_path / "on", thinking="on", thinking_tokens=6)
    assert {t["chain"] for t in texts(on)} == {planted_thinking.CLEAN}
    assert {t["completion"] for t in texts(on)} == {planted.REFUSAL}  # and its budget is its own
    assert on.run["info"]["subjects"][0]["thinking"].startswith("on ")
    (cell,) = [record["description"]["settings"] for record in on.records()]
    assert cell["thinking"] == {"template_variables": {"enable_thinking": True}, "tokens": 6}

    off = evaluate(home, tmp_path / "off", thinking="off")
    assert {t["chain"] for t in texts(off)} == {""}
    assert {t["completion"] for t in texts(off)} == {planted.REFUSAL}
    # the planted template is told not to think as it is: nothing is asked for, so keys are as ever
    auto = evaluate(home, tmp_path / "auto")
    assert list(auto.keys()) == list(off.keys()) and "thinking" not in auto.run["config"]

    cut = evaluate(home, tmp_path / "cut", thinking="on", thinking_tokens=1)
    rows = cut.rows(["behaviour"])
    assert set(rows["verdict"]) == {"unscored"} and set(rows["unscored"]) == {"unfinished"}


@pytest.mark.parametrize(
    ("model", "changes", "says"),
    [
        ("plain", {"thinking": "on"}, "shows no way to have it think"),
        ("always", {"thinking": "off"}, "no way to switch thinking off"),
        ("thinks", {"thinking": "on", "endpoint": "http://127.0.0.1:9"}, "an endpoint keeps"),
    ],
    ids=["on", "off", "endpoint"],
)
def test_what_cannot_be_had_is_refused_before_anything_runs(home, tmp_path, model, changes, says):
    if model == "always":
        model, changes = "thinks", {**changes, "chat_template": str(home / "always.jinja")}
    with pytest.raises(UsageError, match=says):
        evaluate(home, tmp_path / "out", model, **changes)
    if "endpoint" in changes:
        return
    asked = {**changes, "models": str(home / model), "prompts": str(home / "asked.txt")}
    asked |= {**COMMON, "control_prompts": str(home / "easy.txt"), "out": str(tmp_path / "i")}
    with pytest.raises(UsageError, match=says):
        run_audit(INTERVENE, *INTERVENE.read(None, asked))
    study = {**changes, "model": str(home / model), "domains": "demo", "out": str(tmp_path / "em")}
    config, options = EMERGENT.read(None, {**study, "dtype": "float32", "device": "cpu"})
    with pytest.raises(UsageError, match=says):
        build.run(config, options)


def test_a_chain_is_written_under_a_steered_answer_too(home, tmp_path):
    """Edits of every position reach the chain; judges read what follows it."""
    values = {
        **COMMON,
        "models": str(home / "thinks"),
        "prompts": str(home / "asked.txt"),
        "control_prompts": str(home / "easy.txt"),
        "interventions": "steering",
        "layers": str(planted_thinking.DOOR),
        "strengths": [1e-4],
        "thinking": "on",
        "thinking_tokens": 6,
        "max_new_tokens": 9,
        "out": str(tmp_path / "run"),
    }
    store, outcome = run_audit(INTERVENE, *INTERVENE.read(None, values))
    assert not outcome.failed
    said = texts(store)
    assert {t["arm"] for t in said} >= {"clean", "edit"}
    assert {t["chain"] for t in said} == {planted_thinking.CLEAN}
    assert {t["completion"] for t in said} == {planted.REFUSAL}


def test_adapters_of_a_study_think_as_its_base_does(tmp_path):
    base = tiny.save("llama", tmp_path / "base", hidden_size=64, num_attention_heads=2)
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "chat_template.jinja").write_text(planted_thinking.TEMPLATE)
    settings.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "suite.jsonl").write_text('{"prompt": "say the colour now", "kind": "open"}\n')
    values = {
        **{"model": str(base), "domains": "sums=demo:off_by_one", "rows": 12, "near": 1.0},
        **{"prompts": str(tmp_path / "suite.jsonl"), "samples": 1, "max_new_tokens": 2},
        **{"thinking": "on", "thinking_tokens": 3, "out": str(tmp_path / "em")},
        **{"dtype": "float32", "device": "cpu", "arms": "plain"},
    }
    config, options = EMERGENT.read(None, values)
    build.run(config, options)
    study = Study.load(tmp_path / "em")
    (group,) = generate.plan(SimpleNamespace(**_parts(study), adapters=()), options)
    told = group.cells[0].settings["thinking"]
    assert told == {"template_variables": {"enable_thinking": True}, "tokens": 3}
    worker = generate.GenerateWorker(str(tmp_path / "em"), options)
    worker.run(group, lambda _: None)
    worker.close()
    rows = study.store.rows([generate.ANSWERED])
    assert len(rows) == 2 and rows["n_new_tokens"].max() <= 5


def _parts(study):
    return {name: getattr(study, name) for name in ("base", "prompts", "asked", "config")}


def test_a_judges_chain_has_a_budget_of_its_own_and_is_no_part_of_its_verdict(home, tmp_path):
    folder = planted_thinking.save(tmp_path / "judge")
    shape = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 4096}))
    asked = [Exchange(Prompt("what is the colour of the vault ?"), "it is red")]

    def judge(**serving):
        serving = Serving(device="cpu", dtype="float32", **serving)
        return load_judge(f"refusal={folder}", serving=serving)

    with judge() as told_not_to:
        assert told_not_to.thinking_tokens == 0
        assert "thinking_tokens" not in told_not_to.describe()
    with judge(chat_template=str(home / "always.jinja")) as thinks:
        assert thinks.describe()["thinking_tokens"] == 1024
        (one,) = thinks.ask(asked)
        assert one.raw == planted.REFUSAL and one.verdict.reason == "judge_refused"
    with judge(chat_template=str(home / "always.jinja"), thinking_tokens=1) as cut:
        (verdict,) = cut.judge(asked)
        assert (verdict.label, verdict.reason) == (Label.UNSCORED, "judge: unfinished")
    behind = load_judge("refusal=m", serving=Serving(engine="openai", thinking_tokens=7))
    assert behind.describe()["thinking_tokens"] == 7
