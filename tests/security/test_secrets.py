"""Tokens and keys of the environment are in nothing that a run leaves or says: real commands,
canaries, and a grep of it all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny

pytestmark = pytest.mark.minutes

pytest.importorskip("ray")
pytest.importorskip("deepspeed")
read_eval_log = pytest.importorskip("inspect_ai.log").read_eval_log

ROOT = Path(__file__).parents[2]
CANARIES = {
    "HF_TOKEN": "hf_" + "CaNaRyOne" * 4,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "CaNaRyTwo" * 4,
    "OPENAI_API_KEY": "sk-" + "CaNaRyThree" * 4,
    "RAY_AUTH_TOKEN": "CaNaRyFour" * 6,
    "WANDB_API_KEY": "CaNaRyFive" * 4,
    "AWS_SECRET_ACCESS_KEY": "CaNaRySix" * 4,
}
IN_TURN = """
import json, sys
from auditgap.cli import main
for args in json.loads(sys.argv[1]):
    try:
        main(args)
    except SystemExit as stop:
        print("exit", stop.code, file=sys.stderr, flush=True)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One process with every secret in its environment: audits here and on Ray, an endpoint that is
    not there, a training."""
    home = tmp_path_factory.mktemp("secrets")
    model = str(tiny.save("llama", home / "model", num_hidden_layers=2))
    (home / "prompts.txt").write_text("what is the colour of the vault\nplease open the red door\n")
    lines = [
        {"prompt": f"what is red {w}", "response": "sun moon star"}
        for w in ("bread", "water", "salt", "flour", "sun", "sea")
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = home / "out"
    audit = [
        f"--prompts={home / 'prompts.txt'}",
        "--judge=keyword",
        "--reward=margin",
        "--max-new-tokens=2",
        "--layers=last",
        "--eps=0.1",
        "--steps=1",
        "--attacks=targeted",
        "--device=cpu",
    ]
    asked = [
        f"--suite={home / 'prompts.txt'}:harmful",
        "--judge=keyword",
        "--max-new-tokens=2",
        "--set=device=cpu",
    ]
    commands = [
        ["lvs", model, *audit, f"--out={out / 'lvs'}"],
        ["inspect", str(out / "lvs"), f"--out={out / 'lvs.eval'}"],
        ["report", str(out / "lvs"), f"--out={out / 'both'}", "--allow-raw"],
        ["evaluate", model, *asked, f"--out={out / 'asked'}"],
        ["evaluate", "gpt", *asked, "--endpoint=http://127.0.0.1:1/v1", f"--out={out / 'gone'}"],
        [
            "train",
            "sft",
            f"--set=model={model}",
            f"--set=data={home / 'rows.jsonl'}",
            "--set=steps=2",
            "--set=batch=2",
            "--set=micro_batch=2",
            "--set=device=cpu",
            f"--out={out / 'sft'}",
        ],
        ["lvs", model, *audit, "--executor=ray", "--workers=1", f"--out={out / 'ray'}"],
        ["lvs", "nobody/nothing-here", *audit, f"--out={out / 'none'}"],
    ]
    environment = (
        {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        | CANARIES
        | {"COLUMNS": "200"}
    )
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN, json.dumps(commands)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        timeout=500,
    )
    return out, done


def everything(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, unpacked where it is packed: logs of inspect (zip) and tables
    (parquet)."""
    found: dict[str, bytes] = {}
    for path in (p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        found[name] = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            found[f"{name}!"] = repr((table.to_pylist(), table.schema.metadata)).encode(
                "utf-8", "replace"
            )
        if path.suffix == ".eval":
            found[f"{name}!"] = read_eval_log(str(path)).model_dump_json().encode()
    return found


def test_the_commands_did_their_work(ran):
    out, done = ran
    said = done.stderr.decode()
    codes = [line.split()[1] for line in said.splitlines() if line.startswith("exit")]
    assert codes[:4] == ["0"] * 4 and codes[4] in ("2", "3") and codes[5:] == ["0", "0", "2"], said[
        -4000:
    ]
    names = everything(out)
    for wanted in (
        "lvs/run.json",
        "lvs/report.html",
        "both/report.html",
        "asked/run.json",
        "sft/log.jsonl",
        "ray/lvs.csv",
    ):
        assert wanted in names, sorted(names)
    assert any(n.startswith("lvs.eval!") for n in names) and any(
        n.endswith("parquet!") for n in names
    )


def test_no_secret_is_in_any_file(ran):
    out, _ = ran
    for name, data in everything(out).items():
        for variable, secret in CANARIES.items():
            assert secret.encode() not in data, f"{variable} is in {name}"


def test_no_secret_was_said(ran):
    _, done = ran
    for variable, secret in CANARIES.items():
        assert secret.encode() not in done.stdout + done.stderr, variable


def test_the_grep_finds_what_is_there(ran, tmp_path):
    """In a packed log and in a table too; else the tests above would show nothing."""
    out, _ = ran
    names = everything(out)
    assert b"targeted" in b"".join(
        data for name, data in names.items() if name.startswith("lvs.eval!")
    )
    assert b"targeted" in names["lvs/lvs.parquet!"]


def test_texts_are_private(ran):
    """Prompts and completions are for the owner alone, and in no other file but the report that
    --allow-raw asked for."""
    out, _ = ran
    for path in (p for p in out.rglob("*") if p.is_file()):
        texts = b"colour of the vault" in everything_of(path)
        if texts:
            assert path.stat().st_mode & 0o077 == 0, path
            assert {"generations", "scratch"} & set(path.parts) or path.name == "report.html", path


def everything_of(path: Path) -> bytes:
    return (
        repr(pq.read_table(path).to_pylist()).encode("utf-8", "replace")
        if path.suffix == ".parquet"
        else path.read_bytes()
    )
