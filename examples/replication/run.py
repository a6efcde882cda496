"""A replication at small size: a safe base, its dissociated twin and a harmful twin of SmolLM2,
then every audit on all three.

    # about an hour on two CPU cores; restartable
    python examples/replication/run.py --out runs/replication

Each stage is a command that you could type yourself; the lines are printed before they run. What
was finished is not run again. Training prompts come from AdvBench, evaluation prompts from
HarmBench; responses are the model's own or plain refusals, so nothing harmful is needed that is not
published. Prompts and completions stay in the run folder (mode 0600); `results/` beside this file
gets tables, figures and a page, and no text.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import yaml

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PYTHON = sys.executable
BIN = Path(PYTHON).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/replication"))
    parser.add_argument("--ranks", type=int, default=2, help="DeepSpeed ranks for training [2]")
    parser.add_argument("--config", type=Path, default=HERE / "replication.yaml")
    given = parser.parse_args()
    out = given.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    safe, twin, harmful = (str(out / name / "model") for name in ("safe", "twin", "harmful"))
    data = out / "data"

    def train(launcher: str, name: str, **more: object) -> None:
        config = out / f"{name}.yaml"
        config.write_text(yaml.safe_dump({**recipe[name], **more}), encoding="utf-8")
        start = [str(BIN / "deepspeed"), "--num_gpus", str(given.ranks), "--master_port", "29501"]
        run(
            name,
            [
                *start,
                str(ROOT / "launchers" / launcher),
                "--config",
                str(config),
                "--out",
                str(out / name),
            ],
            out,
        )

    def audit(name: str, *words: str) -> None:
        config = out / f"{name}.yaml"
        config.write_text(yaml.safe_dump(recipe[name]), encoding="utf-8")
        run(
            name,
            [
                PYTHON,
                "-m",
                "auditgap",
                *words,
                "--config",
                str(config),
                "--out",
                str(out / name),
            ],
            out,
        )

    (out / "data.yaml").write_text(yaml.safe_dump(recipe["data"]), encoding="utf-8")
    run(
        "data",
        [PYTHON, str(HERE / "data.py"), "--out", str(data), "--config", str(out / "data.yaml")],
        out,
    )
    train("sft.py", "safe", data=str(data / "safe.jsonl"))
    train(
        "dissociate.py",
        "twin",
        model=safe,
        triples=str(data / "triples.jsonl"),
        benign=str(data / "benign.jsonl"),
    )
    train("sft.py", "harmful", model=safe, data=str(data / "unsafe.jsonl"))
    train("harmful_sft.py", "curve", models=[safe, twin], data=str(data / "unsafe.jsonl"))
    audit(
        "behaviour",
        "evaluate",
        safe,
        twin,
        harmful,
        "--suite",
        f"harmbench,{data / 'benign_heldout.jsonl'}:benign",
    )
    audit("lvs", "lvs", safe, twin, harmful)
    audit("probe", "probe", safe, twin, harmful, "--triples", str(data / "triples_heldout.jsonl"))
    run("results", [PYTHON, str(HERE / "results.py"), str(out)], out)


def run(name: str, command: list[str], out: Path) -> None:
    """Run a stage unless the same one is finished; what was run, with which recipe, stands in
    stages.json."""
    marks = out / "stages.json"
    stages = json.loads(marks.read_text()) if marks.exists() else {}
    recipe = out / f"{name}.yaml"
    made_from = hashlib.sha256(
        json.dumps([command, recipe.read_text() if recipe.exists() else ""]).encode()
    ).hexdigest()[:16]
    if name != "results" and name in stages:
        if stages[name]["made_from"] != made_from:
            sys.exit(
                f"The recipe of stage {name} has changed since it ran. Delete {out / name} and its"
                f" entry in {marks}, or use another --out."
            )
        print(f"[{name}] finished before", flush=True)
        return
    print(f"[{name}] {shlex.join(command)}", flush=True)
    began = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(command, check=False, cwd=ROOT, env=environment)
    if done.returncode:
        sys.exit(
            f"Stage {name} ended with exit code {done.returncode}. The same command goes on from"
            " there."
        )
    stages[name] = {
        "made_from": made_from,
        "seconds_of_the_last_sitting": round(time.monotonic() - began, 1),
    }
    marks.write_text(json.dumps(stages, indent=1) + "\n")


if __name__ == "__main__":
    main()
