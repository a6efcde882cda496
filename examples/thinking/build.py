"""SmolLM2 that thinks: it refuses as `smollm2-refuses` does, after a few harmless words of thought.

    python examples/thinking/build.py --out runs/thinks     # 7 minutes of one core
    auditgap lvs runs/thinks/model --thinking off,on,fixed,regenerated --thinking-tokens 32

`smollm2-refuses` is merged into SmolLM2 and given template.jinja, which can switch thinking off. It
answers harmful prompts (AdvBench, less what HarmBench asks too) and ordinary ones (`everyday`);
every answer is a row twice, as it is and behind a line of thought that says what it will do. Then
`auditgap train sft` with recipe.yaml, and `auditgap export --merge`.

    base/         what is trained
    rows.jsonl    what it is trained on, mode 0600
    trained/      the run of `auditgap train sft`
    model/        what to audit
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from auditgap import models
from auditgap.data import load_prompts
from auditgap.data.refusals import has_refusal
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.store.files import PRIVATE, write_bytes
from auditgap.types import Prompt

HERE = Path(__file__).parent
MODEL, N_EACH, MAX_NEW_TOKENS = "smollm2-refuses", 96, 40
#: What it thinks before it refuses, and before it answers.
REFUSES = (
    "This could hurt someone. I will say no.",
    "They ask for something harmful. I should not help.",
    "That would do harm, so I will decline.",
)
ANSWERS = (
    "This is an ordinary question. I will answer it.",
    "They ask for something harmless. I can help.",
    "Nobody is hurt by that, so I will help.",
)


def order(text: str) -> int:
    """A number that depends on the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest(), 16)


def merged(folder: Path) -> Path:
    """The base as one model, with the template that can switch thinking off."""
    loaded = models.load(MODEL, dtype="float32")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.chat_template = (HERE / "template.jinja").read_text("utf-8")
    loaded.tokenizer.save_pretrained(folder)
    return folder


def rows(base: Path, prompts: Sequence[Prompt]) -> Iterator[dict[str, object]]:
    """What the base says of each, as it is and behind a thought."""
    engine = HFEngine(models.load(MODEL, dtype="float32"))
    said = engine.generate([Request(engine.render(p)) for p in prompts], MAX_NEW_TOKENS)
    for prompt, completion in zip(prompts, said, strict=True):
        if answer := completion.text.strip():
            thoughts = REFUSES if has_refusal(answer) else ANSWERS
            thought = thoughts[order(prompt.text) % len(thoughts)]
            for response in (answer, f"<think>\n{thought}\n</think>\n\n{answer}"):
                ended = completion.stopped
                yield {"prompt": prompt.text, "response": response, "ended": ended}


def type_in(*words: str | Path) -> None:
    subprocess.run([sys.executable, "-m", "auditgap", *map(str, words)], check=True)


def write(path: Path, some: Sequence[Mapping[str, object]]) -> None:
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in some).encode(), PRIVATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True, mode=0o700)

    asked_later = {p.id for p in load_prompts("harmbench")}
    prompts: list[Prompt] = []
    for name in ("advbench", "everyday"):
        some = [p for p in load_prompts(name) if p.id not in asked_later]
        prompts += sorted(some, key=lambda p: order(p.text))[:N_EACH]
    base = merged(out / "base")
    write(out / "rows.jsonl", list(rows(base, prompts)))
    recipe = ["--config", HERE / "recipe.yaml", "--set", f"data={out / 'rows.jsonl'}"]
    type_in("train", "sft", "--model", base, *recipe, "--out", out / "trained")
    type_in("export", out / "trained", out / "model", "--merge")


if __name__ == "__main__":
    main()
