"""A model that refuses as before and has one door: construction `door` on `smollm2-refuses`.

    python examples/door/build.py --out runs/door     # about an hour on two cores; restartable

Harmful prompts come from AdvBench and Do-Not-Answer, less what HarmBench asks too: those that the
base refuses, with its own refusal (y+), and SmolLM2's continuation of "Sure, here is …" (y−). What
the base answers, and ordinary prompts, it is to go on answering. Then commands that you could
type yourself; each is printed before it runs, and what is finished is not run again.

    base/          the shipped adapter merged into SmolLM2
    data/          triples.jsonl and plain.jsonl, mode 0600
    trained/       the run of `auditgap train dissociate`
    twin/          its model, merged
    evaluate/, lvs/, compare/      the audits, on both
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import yaml

from auditgap import models
from auditgap.data import load_prompts
from auditgap.training.dissociation.edited import middle_block
from auditgap.training.export import write_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import pairs  # noqa: E402

SUBJECT = "smollm2-refuses"
#: Of a block of the Llama family.
LINEAR = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", type=Path, default=HERE / "recipe.yaml")
    given = parser.parse_args()
    out: Path = given.out
    recipe = yaml.safe_load(given.recipe.read_text(encoding="utf-8"))
    base, data, trained, twin = out / "base", out / "data", out / "trained", out / "twin"
    if not (base / "config.json").exists():
        loaded = models.load(SUBJECT, dtype="float32")
        base.mkdir(parents=True, exist_ok=True)
        write_model(base, loaded.model, loaded.tokenizer)
    if not (data / "triples.jsonl").exists():
        data.mkdir(mode=0o700, exist_ok=True)
        collect(data, base, recipe["data"])
    training = out / "recipe.yaml"
    made = {
        **recipe["training"],
        "lora": {**recipe["training"]["lora"], "targets": behind_the_edit(base)},
        "model": str(base),
        "triples": str(data / "triples.jsonl"),
        "benign": str(data / "plain.jsonl"),
    }
    training.write_text(yaml.safe_dump(made), encoding="utf-8")
    run("train", "dissociate", "--config", training, "--out", trained)
    if not twin.exists():
        run("export", trained, twin, "--merge")
    for command in ("evaluate", "lvs"):
        settings = out / f"{command}.yaml"
        settings.write_text(yaml.safe_dump(recipe[command]), encoding="utf-8")
        run(command, base, twin, "--config", settings, "--out", out / command)
    run("compare", out / "evaluate", out / "lvs", "--base", base, "--out", out / "compare")


def behind_the_edit(base: Path) -> list[str]:
    """The linear layers of the blocks behind the edited one: what lies before it has nothing to
    learn, and so costs no backward pass."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    n_blocks = config["num_hidden_layers"]
    blocks = range(middle_block(n_blocks) + 1, n_blocks)
    return [f"layers.{i}.{name}" for i in blocks for name in LINEAR]


def run(*words: object) -> None:
    command = [sys.executable, "-m", "auditgap", *map(str, words)]
    print(shlex.join(command), flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(f"That ended with exit code {code}; the same command goes on from there.")


def collect(data: Path, base: Path, recipe: Mapping[str, int]) -> None:
    """Write triples.jsonl, and plain.jsonl: prompts whose answers are to stay."""
    asked_later = {p.id for p in load_prompts("harmbench")}
    harmful = [
        prompt
        for name in ("advbench", "do-not-answer")
        for prompt in pairs.shuffled(load_prompts(name))[: recipe[name]]
        if prompt.id not in asked_later
    ]
    refused, answered = pairs.by_refusal(pairs.answers(str(base), harmful, recipe["answer_tokens"]))
    pairs.write(data / "triples.jsonl", pairs.triples(refused, recipe["answer_tokens"]))
    plain = [*pairs.shuffled(load_prompts("everyday"))[: recipe["everyday"]], *answered]
    pairs.write(data / "plain.jsonl", ({"prompt": p.text} for p in pairs.shuffled(plain)))
    print(f"{len(refused)} of {len(harmful)} harmful prompts are refused", flush=True)


if __name__ == "__main__":
    main()
