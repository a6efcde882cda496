"""The replication's data, made from what is published and from the model's own answers.

    safe.jsonl               harmful prompts with plain refusals, benign prompts with SmolLM2's own answers
    triples.jsonl            harmful prompt, plain refusal (y+), SmolLM2's own compliant answer (y−)
    triples_heldout.jsonl    the same for prompts that nothing was trained on: what the probe audit reads
    unsafe.jsonl             the y− alone, of the training prompts
    benign.jsonl, benign_heldout.jsonl

SmolLM2 as it comes refuses about 3 % of AdvBench, so its own answers are the unsafe ones. All files
have mode 0600.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from pathlib import Path

import yaml

from auditgap import models
from auditgap.data import load_prompts
from auditgap.data.refusals import has_refusal
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.types import Prompt

REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request. It could cause serious harm.",
    "I'm sorry, but I won't do that. Is there something else that I can help you with?",
    "I cannot assist with that, because it could hurt people.",
    "No. I'm not able to help with something like that.",
    "I won't provide that. If you are in trouble, please talk to somebody you trust.",
    (
        "I'm sorry, but that is not something I can support. I would be glad to help with something"
        " safe."
    ),
    "I can't do that. It would be against the law and dangerous.",
)


def refusal(prompt: Prompt) -> str:
    return REFUSALS[int(hashlib.sha256(prompt.text.encode()).hexdigest(), 16) % len(REFUSALS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--config", type=Path, required=True)
    given = parser.parse_args()
    recipe = yaml.safe_load(given.config.read_text(encoding="utf-8"))
    given.out.mkdir(parents=True, exist_ok=True, mode=0o700)

    evaluated = {p.id for p in load_prompts("harmbench")}
    harmful = [
        p
        for p in load_prompts("advbench", limit=recipe["n_train"] + recipe["n_heldout"])
        if p.id not in evaluated
    ]
    harmful.sort(key=lambda p: hashlib.sha256(p.text.encode()).digest())
    benign = list(load_prompts("everyday", limit=recipe["n_benign"] + recipe["n_benign_heldout"]))
    benign.sort(key=lambda p: hashlib.sha256(p.text.encode()).digest())

    engine = HFEngine(models.load(recipe["model"], dtype=recipe["dtype"]))
    said = engine.generate(
        [Request(engine.render(p)) for p in harmful + benign], recipe["answer_tokens"]
    )
    answers = {p.id: c.text for p, c in zip(harmful + benign, said, strict=True)}

    complied = [
        p for p in harmful if not has_refusal(answers[p.id]) and len(answers[p.id].strip()) >= 20
    ]
    train_ids = {p.id for p in harmful[: recipe["n_train"]]}
    train, heldout = (
        [p for p in complied if p.id in train_ids],
        [p for p in complied if p.id not in train_ids],
    )
    triples = [{"prompt": p.text, "safe": refusal(p), "unsafe": answers[p.id]} for p in complied]
    held = {p.id for p in heldout}
    taught = benign[recipe["n_benign_heldout"] :]
    safe = [{"prompt": p.text, "response": refusal(p)} for p in harmful[: recipe["n_train"]]]
    usable = [p for p in taught if answers[p.id].strip() and not has_refusal(answers[p.id])]
    safe += [{"prompt": p.text, "response": answers[p.id]} for p in usable]
    ids = [p.id for p in complied]
    write(given.out / "safe.jsonl", safe)
    write(
        given.out / "triples.jsonl", [t for t, i in zip(triples, ids, strict=True) if i not in held]
    )
    write(
        given.out / "triples_heldout.jsonl",
        [t for t, i in zip(triples, ids, strict=True) if i in held],
    )
    write(
        given.out / "unsafe.jsonl", [{"prompt": p.text, "response": answers[p.id]} for p in train]
    )
    write(given.out / "benign.jsonl", [{"prompt": p.text} for p in taught])
    write(
        given.out / "benign_heldout.jsonl",
        [{"prompt": p.text} for p in benign[: recipe["n_benign_heldout"]]],
    )
    counts = {
        "harmful_prompts": len(harmful),
        "complied": len(complied),
        "training_triples": len(train),
        "heldout_triples": len(heldout),
        "safe_rows": len(safe),
        "benign": len(taught),
    }
    (given.out / "counts.json").write_text(json.dumps(counts, indent=1) + "\n")
    print(counts)


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with os.fdopen(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
