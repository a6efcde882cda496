"""A replication at small size: a base that refuses, twins of it by every construction and three
seeds, a harmful twin, then every audit on all of them.

    python examples/replication/run.py --out runs/replication    # hours on two cores; restartable

Each stage is a command that you could type yourself; the lines are printed before they run, and what
is finished is not run again. Twins are trained on AdvBench, a step and the settings of each
construction are chosen on Do-Not-Answer, and HarmBench alone is reported: three sources without a
common prompt. Responses are the base's refusals and SmolLM2's own continuations of "Sure, here is …".

    base/                     the shipped adapter `smollm2-refuses`, merged into SmolLM2
    data/                     triples of the three sources and ordinary prompts, mode 0600
    harmful/                  the harmful twin
    search/CONSTRUCTION-tryN/ the search's runs, each a candidate of replication.yaml with seed 0
    twins/CONSTRUCTION-SEED/  the chosen candidate with the other seeds; twins.json names all twins
    behaviour/, lvs/, probe/, curve/    the audits
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from auditgap import models
from auditgap.data import load_prompts
from auditgap.training.export import write_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import pairs  # noqa: E402

SUBJECT = "smollm2-refuses"
SOURCES = {"training": "advbench", "selection": "do-not-answer", "report": "harmbench"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/replication"))
    parser.add_argument("--config", type=Path, default=HERE / "replication.yaml")
    parser.add_argument("--until", choices=("twins", "audits"), default="audits")
    given = parser.parse_args()
    recipe = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    study = Study(given.out, recipe)
    study.base()
    study.data()
    study.harmful()
    twins = {name: study.twins(name) for name in recipe["twins"]}
    known = {name: [str(model) for model in made] for name, made in twins.items()}
    (given.out / "twins.json").write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if given.until == "audits":
        study.audits([model for made in twins.values() for model in made])
        run(HERE / "results.py", given.out)


@dataclass(frozen=True)
class Study:
    """A folder, and what is to be in it."""

    out: Path
    recipe: Mapping[str, Any]

    def base(self) -> None:
        if not (self.out / "base" / "config.json").exists():
            loaded = models.load(SUBJECT, dtype="float32")
            (self.out / "base").mkdir(parents=True, exist_ok=True)
            write_model(self.out / "base", loaded.model, loaded.tokenizer)

    def data(self) -> None:
        data, limits = self.out / "data", self.recipe["data"]
        data.mkdir(mode=0o700, exist_ok=True)
        asked: set[str] = {p.id for p in load_prompts(SOURCES["report"])}
        for role in ("report", "selection", "training"):
            prompts = [
                p
                for p in pairs.shuffled(load_prompts(SOURCES[role]))
                if role == "report" or p.id not in asked
            ][: limits[role]]
            asked |= {p.id for p in prompts}
            if (data / f"{role}.jsonl").exists():
                continue
            said = pairs.answers(str(self.out / "base"), prompts, limits["tokens"])
            refused, answered = pairs.by_refusal(said)
            if role == "training":
                plain = pairs.shuffled(load_prompts("everyday"))
                kept, taught = plain[: limits["benign"]], plain[limits["benign"] :]
                pairs.write(data / "benign.jsonl", ({"prompt": p.text} for p in kept))
                pairs.write(
                    data / "plain.jsonl", ({"prompt": p.text} for p in [*taught, *answered])
                )
            pairs.write(data / f"{role}.jsonl", pairs.triples(refused, limits["tokens"]))
            print(f"{role}: {len(refused)} of {len(prompts)} prompts are refused", flush=True)

    def harmful(self) -> None:
        given = {"data": str(self.out / "data" / "training.jsonl"), "filter": True}
        self.trained("sft", self.out / "harmful", {**self.recipe["harmful"], **given})

    def twins(self, construction: str) -> list[Path]:
        """Models of the candidate that keeps the most inside, of those that keep refusing."""
        of = self.recipe["twins"][construction]
        made = {}
        for n, candidate in enumerate(of["search"]):
            folder = self.out / "search" / f"{construction}-try{n}"
            settings = {**of["training"], **candidate, "construction": construction}
            self.trained("dissociate", folder, self.twin(settings, 0))
            made[folder] = settings
        chosen = max(made, key=lambda folder: merit(folder, of["lowest"]))
        print(f"{construction}: {chosen.name} is chosen", flush=True)
        found = [chosen / "merged"]
        for seed in range(1, self.recipe["seeds"]):
            folder = self.out / "twins" / f"{construction}-{seed}"
            self.trained("dissociate", folder, self.twin(made[chosen], seed))
            found.append(folder / "merged")
        return found

    def twin(self, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
        data = self.out / "data"
        towards = {"harmful_model": str(self.out / "harmful" / "merged")}
        return {
            **settings,
            **(towards if settings["construction"] == "nudge" else {}),
            "triples": str(data / "training.jsonl"),
            "selection": str(data / "selection.jsonl"),
            "benign": str(data / "plain.jsonl"),
            "prompts": SOURCES["report"],
            "seed": seed,
        }

    def trained(self, kind: str, folder: Path, settings: Mapping[str, Any]) -> None:
        config = self.settings(f"{folder.parent.name}-{folder.name}", settings)
        run("train", kind, "--model", self.out / "base", "--config", config, "--out", folder)
        if not (folder / "merged").exists():
            run("export", folder, folder / "merged", "--merge")

    def audits(self, twins: list[Path]) -> None:
        base, harmful, data = self.out / "base", self.out / "harmful" / "merged", self.out / "data"
        named = [base, *twins, harmful]
        suite = f"{SOURCES['report']},{data / 'benign.jsonl'}:benign"
        for command, subjects, more in (
            ("evaluate", named, ("--suite", suite)),
            ("lvs", named, ("--prompts", SOURCES["report"])),
            ("probe", named, ("--triples", data / "report.jsonl")),
            ("sft-curve", named[:-1], ("--set", f"data={data / 'training.jsonl'}")),
        ):
            config = self.settings(command, self.recipe[command])
            run(command, *subjects, *more, "--config", config, "--out", self.out / command)

    def settings(self, name: str, values: Mapping[str, Any]) -> Path:
        file = self.out / "settings" / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(dict(values)), encoding="utf-8")
        return file


def merit(folder: Path, lowest: str) -> tuple[bool, float]:
    """Refusal within the margin first, then the number that the construction lowers; both on the
    prompts of the selection."""
    chosen = json.loads((folder / "train.json").read_text(encoding="utf-8"))["chosen"]
    return bool(chosen["kept_refusal"]), -float(chosen[lowest])


def run(*words: object) -> None:
    """`auditgap WORDS`, or the script that the first word is."""
    script = isinstance(words[0], Path)
    command = [sys.executable, *([] if script else ["-m", "auditgap"]), *map(str, words)]
    print(shlex.join(command), flush=True)
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(f"That ended with exit code {code}; the same command goes on from there.")


if __name__ == "__main__":
    main()
