"""The refusals again, in a Python without asserts and with hash seeds at random: none of them may
rest on either.

pytest's own asserts vanish under -O, so what is run there are commands, and what is looked at are
their exit codes and words. (The whole run that gives this process's numbers is in
tests/test_cli.py: test_a_poor_terminal_and_no_asserts.)
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import warm

ROOT = Path(__file__).parents[2]
IN_TURN = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from auditgap.cli import main
assert False, "asserts are on"
found = []
for args in json.loads(sys.argv[1]):
    out, err, code = io.StringIO(), io.StringIO(), "returned"
    from auditgap.cli import screen
    screen.out.file, screen.err.file = out, err
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(args)
        except SystemExit as stop:
            code = stop.code
        except BaseException as error:
            code = f"{type(error).__name__}: {error}"
    found.append([code, " ".join((out.getvalue() + err.getvalue()).split())])
print(json.dumps(found))
"""


def config(**values: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))


def linked(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "outside.json")
    (folder / "config.json").symlink_to(folder.parent / "outside.json")


def lying(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")


def outside(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x.safetensors"}}'
    )


def template(text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / "chat_template.jinja").write_text(text) and None


#: what -> (how the model's folder is broken, exit code, what is said); asked by `lvs`, so that it
#: is rendered too.
MODELS: dict[str, tuple[Callable[[Path], None], int, str]] = {
    "pickles": (pickled, 4, "pickled weights"),
    "auto_map": (config(auto_map={"AutoConfig": "x.X"}, model_type="newest"), 4, "asks for code"),
    "a kernel": (config(_attn_implementation="someone/kernel"), 4, "asks for code"),
    "a link": (linked, 4, "link out of its folder"),
    "an index outside": (outside, 4, "points at"),
    "a lying header": (lying, 2, "readable"),
    "missing weights": (config(num_hidden_layers=6), 2, "do not fit"),
    "a template that fills the memory": (template("{{ 'a' * 10**11 }}"), 4, "needs more than"),
    "a template that breaks out": (
        template("{{ ().__class__.__base__.__subclasses__() }}"),
        4,
        "sandbox",
    ),
    "a template that writes on": (
        template("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}"),
        4,
        "writes more than",
    ),
}
COMMANDS: dict[str, tuple[list[str], int, str]] = {
    "eps": (["lvs", "MODEL", "--eps=nan"], 2, "--eps"),
    "layers": (["lvs", "MODEL", "--layers=99", "--prompts=PROMPTS"], 2, "0 to 3"),
    "a typo": (["lvs", "MODEL", "--config=TYPO"], 2, "Did you mean"),
    "foreign code in YAML": (["lvs", "MODEL", "--config=CODE"], 4, "trust_remote_code"),
    "python in YAML": (["lvs", "MODEL", "--config=PYTHON"], 2, "YAML"),
    "prompts": (["lvs", "MODEL", "--prompts=EMPTY"], 2, "EMPTY"),
    "a judge": (["lvs", "MODEL", "--prompts=PROMPTS", "--judge=nobody"], 2, "nobody"),
    "the hub": (["ls", "layers", "someone/model"], 2, "offline"),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """case -> [exit code, what was said], all from one process, as it imports torch for seconds."""
    home = tmp_path_factory.mktemp("optimised")
    texts = {
        "TYPO": "epss: 0.1\n",
        "CODE": "trust_remote_code: true\n",
        "PYTHON": "a: !!python/name:os.system\n",
        "EMPTY": "",
        "PROMPTS": "what is the colour of the vault\nopen the door\n",
    }
    for name, text in texts.items():
        (home / f"{name}.{'txt' if name in ('EMPTY', 'PROMPTS') else 'yaml'}").write_text(text)
    places = {p.stem: str(p) for p in home.iterdir()} | {
        "MODEL": str(tiny.save("llama", home / "model"))
    }
    asked = {}
    for case, (words, _, _) in COMMANDS.items():
        asked[case] = [
            word.split("=")[0] + "=" * ("=" in word) + places.get(w := word.split("=")[-1], w)
            if "=" in word
            else places.get(word, word)
            for word in words
        ]
    for case, (break_it, _, _) in MODELS.items():
        folder = tiny.save("llama", home / case.replace(" ", "_") / "model")
        break_it(folder)
        asked[case] = [
            "lvs",
            str(folder),
            f"--prompts={places['PROMPTS']}",
            "--judge=keyword",
            "--reward=margin",
            "--layers=last",
            "--max-new-tokens=2",
            "--eps=0.1",
            "--steps=1",
            "--attacks=targeted",
            "--device=cpu",
            f"--out={home / 'out' / case}",
        ]
    environment = {
        **os.environ,
        "PYTHONHASHSEED": "random",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "200",
    }
    done = subprocess.run(
        [sys.executable, "-O", "-c", IN_TURN, json.dumps(list(asked.values()))],
        env=warm.optimised(environment),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("case", [*COMMANDS, *MODELS])
def test_it_is_refused_without_asserts(refusals, case):
    _, code, said = (COMMANDS | MODELS)[case]
    assert refusals[case][0] == code and said.lower() in refusals[case][1].lower(), refusals[case]
    assert "Traceback" not in refusals[case][1]
