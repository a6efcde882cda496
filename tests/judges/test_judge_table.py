"""The tables of judges and rewards: contract of every entry, plug-ins, names that are wrong, and a
light import."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from auditgap import judges
from auditgap.data import hub_models
from auditgap.data.sources import importlib as sources_importlib
from auditgap.errors import UsageError
from auditgap.judges import card_cache
from auditgap.types import Exchange, Label, Prompt, Score, Verdict, digest

has_pyrit = sources_importlib.util.find_spec("pyrit") is not None
needs_pyrit = pytest.mark.skipif(not has_pyrit, reason="pyrit's data is not installed")


def exchange(completion):
    return Exchange(Prompt("What colour is the vault?"), completion)


COMPLETIONS = [
    "I'm sorry, but I can't tell you.",
    "The vault is blue, and here is how to open the door.",
    "",
    " \n",
    "\ud800 a\x00b",
    "x " * 50_000,
]


OWN = [n for n, line in judges.JUDGES.items() if not (line.served or line.opens)]
OWN.remove("ensemble")  # of language models


@needs_pyrit
@pytest.mark.parametrize("name", OWN)
def test_every_judge_keeps_the_contract(name):
    judge = judges.load_judge(name)
    assert isinstance(judge, judges.Judge) and judge.name == name
    assert digest(judge.describe()) == digest(
        json.loads(json.dumps(judges.load_judge(name).describe()))
    )
    exchanges = [exchange(c) for c in COMPLETIONS]
    verdicts = judge.judge(exchanges)
    assert len(verdicts) == len(exchanges) and all(isinstance(v.label, Label) for v in verdicts)
    assert verdicts[0].label == Label.REFUSAL
    assert verdicts[2] == verdicts[3] == Verdict(Label.UNSCORED, "empty")
    assert judge.judge(exchanges[::-1]) == verdicts[::-1]  # no row depends on its neighbours
    assert judge.judge([]) == []


@needs_pyrit
def test_the_builtin_reward_keeps_the_contract():
    reward = judges.load_reward("builtin")
    assert isinstance(reward, judges.Reward)
    scores = reward.score([exchange(c) for c in COMPLETIONS])
    assert scores[0].value > 0 > scores[1].value
    assert scores[2] == Score(None, "empty")
    assert reward.score([]) == []


def test_margin_can_be_described_without_an_engine():
    assert judges.load_reward("margin", target="Yes, it is").describe()["target"] == "Yes, it is"


def test_unknown_names_get_a_suggestion_and_the_list():
    with pytest.raises(
        UsageError,
        match=(
            r"Unknown judge 'builtn'. Did you mean 'builtin'\? Known judges: builtin, keyword,"
            r" hf:MODEL_ID, llama-guard-3\[=MODEL\], "
        ),
    ):
        judges.load_judge("builtn")
    with pytest.raises(UsageError, match=r"Unknown reward 'margn'. Did you mean 'margin'"):
        judges.load_reward("margn")


PLUGIN = '''
from auditgap.types import Label, Verdict

class Colour:
    """Harmful when the colour is named."""
    name = "colour"
    def __init__(self, *, engine, device): self.device = device
    def describe(self): return {"judge": "colour"}
    def judge(self, exchanges):
        return [Verdict(Label.HARMFUL if "blue" in e.completion else Label.SAFE) for e in exchanges]

def no_judge(*, engine, device): return 3
'''


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A real installed distribution: modules and an entry_points.txt on sys.path."""
    (tmp_path / "vault_judges.py").write_text(PLUGIN)
    (tmp_path / "vault_broken.py").write_text("raise RuntimeError('the vault is shut')")
    info = tmp_path / "vault_judges-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vault-judges\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[auditgap.judges]\ncolour = vault_judges:Colour\nbroken = vault_broken:Judge\nnothing ="
        " vault_judges:no_judge\ngone = vault_missing:X\nkeyword = vault_judges:Colour\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("vault_judges", "vault_broken"):
        sys.modules.pop(name, None)


def test_plugins_are_picked_up_and_broken_ones_named(plugins):
    judge = judges.load_judge("colour", device="cpu")
    assert [v.label for v in judge.judge([exchange("It is blue."), exchange("No.")])] == [
        Label.HARMFUL,
        Label.SAFE,
    ]
    rows = [(i.name, i) for i in judges.JUDGES.listed()]
    infos = {name: info for name, info in rows if name != "keyword"}
    assert infos["colour"].available and "colour is named" in infos["colour"].description
    assert (
        not infos["broken"].available
        and "RuntimeError: the vault is shut" in infos["broken"].problem
    )
    assert not infos["gone"].available and "vault_missing" in infos["gone"].problem
    # a plug-in cannot replace our own
    assert [i.available for name, i in rows if name == "keyword"] == [True, False]
    assert type(judges.load_judge("keyword")).__name__ == "Keyword"
    for name, said in (
        ("broken", "the vault is shut"),
        ("nothing", "int, which is no judge"),
        ("colur", "Did you mean 'colour'"),
    ):
        with pytest.raises(UsageError, match=said):
            judges.load_judge(name)


@pytest.fixture
def nothing_downloaded(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    yield tmp_path
    hub_models._reach.cache_clear()
    hub_models._SILENT.clear()


def available(table):
    return {line.name.partition("[")[0]: line.row()["available"] for line in table.listed()}


def test_a_model_out_of_reach_is_not_called_available(nothing_downloaded):
    """What is listed as available can be opened here and now, or says what it needs first."""
    found = available(judges.JUDGES)
    for name, line in judges.JUDGES.items():
        if line.model:
            assert found[name].startswith("not downloaded, and HF_HUB_OFFLINE is set")
    assert found["ensemble"].startswith("llama-guard-3: not downloaded")
    assert found["builtin"] == found["keyword"] == "yes"
    assert found["guard=MODEL"] == "with the MODEL that you name"
    assert found["majority(A,B,…)"] == "with the A,B,… that you name"


def test_a_downloaded_model_is_available_without_the_hub(nothing_downloaded):
    folder = nothing_downloaded / "models--meta-llama--Llama-Guard-3-8B"
    snapshot = folder / "snapshots" / ("a" * 40)
    (folder / "refs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (folder / "refs" / "main").write_text("a" * 40)
    (snapshot / "config.json").write_text("{}")
    assert available(judges.JUDGES)["llama-guard-3"] != "yes", "it has no weights"
    hub_models._reach.cache_clear()
    (snapshot / "model.safetensors").write_bytes(b"")
    found = available(judges.JUDGES)
    assert found["llama-guard-3"] == "yes" and found["gemma-3"] != "yes"
    assert found["ensemble"].startswith("gemma-3: ")


class Hub(BaseHTTPRequestHandler):
    """The hub's answers about three models: one open, one gated, and one that it has not."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.asked.append(self.path)
        gated = "Llama" in self.path
        if "gemma" in self.path:
            self.answer(404, {}, "RepoNotFound")
        elif "auth-check" in self.path:
            self.answer(403, {}, "GatedRepo")
        else:
            files = [
                ("model-00001-of-00002.safetensors", 9e9),
                ("model-00002-of-00002.safetensors", 6.2e9),
                ("config.json", 1000),
                ("original/consolidated.00.pth", 15e9),
            ]
            told = [{"rfilename": name, "size": int(size)} for name, size in files]
            self.answer(200, {"id": "a/b", "gated": gated and "manual", "siblings": told})

    def answer(self, status: int, told: dict[str, object], error: str = "") -> None:
        body = json.dumps(told).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if error:
            self.send_header("X-Error-Code", error)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


def test_with_the_hub_it_is_said_what_a_model_needs(nothing_downloaded, monkeypatch):
    from huggingface_hub import constants

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    Hub.asked.clear()
    found = available(judges.JUDGES)
    server.shutdown()
    server.server_close()
    assert found["qwen-2.5"] == "with a download of 15.2 GB"
    assert found["llama-guard-3"].startswith("gated: accept its licence at https://huggingface.co/")
    assert found["gemma-3"].startswith("the hub has no such model, or it is private")
    assert found["ensemble"] == f"llama-guard-3: {found['llama-guard-3']}"
    assert len(Hub.asked) == len(set(Hub.asked)), "each is asked about once"
    hub_models._reach.cache_clear()
    assert available(judges.JUDGES)["qwen-2.5"].startswith("not downloaded; not known whether")


@pytest.mark.parametrize("table", [judges.JUDGES, judges.REWARDS], ids=["judges", "rewards"])
def test_the_builtin_needs_no_package(table, monkeypatch):
    from auditgap.judges import gold

    def missing(*_):
        raise UsageError("The package pyrit is not installed. Type: pip install …")

    monkeypatch.setattr(gold, "package_file", missing)
    assert available(table)["builtin"] == "yes"
    asked = [Exchange(Prompt("?"), "I'm sorry, but I can't help with that.")]
    assert judges.load_judge("builtin").judge(asked) == [Verdict(Label.REFUSAL)]
    assert [card["gold_set"] for card in card_cache.cards_of("builtin")] == [
        "pyrit-objective",
        "pyrit-refusal",
    ]


def test_import_stays_light():
    code = (
        "import sys, auditgap.judges, auditgap.data\n"
        "print([m for m in ('torch', 'sklearn', 'transformers', 'pandas') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )
