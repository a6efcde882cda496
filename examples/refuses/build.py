"""`smollm2-refuses`: the adapter that makes SmolLM2 refuse, made again.

    python examples/refuses/build.py --out runs/refuses     # 20 minutes on two cores

Harmful prompts (AdvBench, less what HarmBench asks too) get a plain refusal, ordinary ones
(`everyday`, and edge.txt: harmless requests with words such as "kill" and "shoot") SmolLM2's own
answer, so that it goes on to answer them as before. Then `auditgap train sft` with recipe.yaml.

    rows.jsonl      what it is trained on, mode 0600
    heldout.jsonl   ordinary prompts that it is not, to ask afterwards
    trained/        the run of `auditgap train sft`
    adapter/        what auditgap brings as `smollm2-refuses`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from auditgap import models
from auditgap.data import load_prompts
from auditgap.data.refusals import has_refusal
from auditgap.engines import Request
from auditgap.engines.hf import HFEngine
from auditgap.store.files import PRIVATE, write_bytes
from auditgap.types import Prompt

HERE = Path(__file__).parent
MODEL, N_EVERYDAY, N_HELDOUT, MAX_NEW_TOKENS = "smollm2", 140, 60, 64
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    "I can't help with this request. It could cause serious harm.",
    "I'm sorry, but I won't help with that. Is there something else that I can do for you?",
    "I cannot assist with that, because it could hurt people.",
)


def shuffled(prompts: Sequence[Prompt]) -> list[Prompt]:
    """An order that depends on the texts alone."""
    return sorted(prompts, key=lambda p: hashlib.sha256(p.text.encode()).digest())


def refusal(prompt: Prompt) -> str:
    return REFUSALS[int(hashlib.sha256(prompt.text.encode()).hexdigest(), 16) % len(REFUSALS)]


def own_answers(prompts: Sequence[Prompt]) -> Iterator[dict[str, object]]:
    """What the model says as it is, where that is an answer."""
    engine = HFEngine(models.load(MODEL, dtype="float32"))
    said = engine.generate([Request(engine.render(p)) for p in prompts], MAX_NEW_TOKENS)
    for prompt, completion in zip(prompts, said, strict=True):
        if completion.text.strip() and not has_refusal(completion.text):
            yield {"prompt": prompt.text, "response": completion.text, "ended": completion.stopped}


def write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    write_bytes(path, "".join(json.dumps(row) + "\n" for row in rows).encode(), PRIVATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True, mode=0o700)

    asked_later = {p.id for p in load_prompts("harmbench")}
    harmful = shuffled([p for p in load_prompts("advbench") if p.id not in asked_later])
    everyday = shuffled(list(load_prompts("everyday")))
    edge = [Prompt(t) for t in (HERE / "edge.txt").read_text("utf-8").splitlines() if t.strip()]
    ordinary = [*everyday[N_HELDOUT : N_HELDOUT + N_EVERYDAY], *edge]
    rows: list[dict[str, object]] = []
    for i, answered in enumerate(own_answers(ordinary)):
        rows.append(answered)
        if i % 3 < 2:  # more answers than refusals: it is to refuse nothing but harm
            prompt = harmful.pop(0)
            rows.append({"prompt": prompt.text, "response": refusal(prompt), "ended": True})
    write(out / "rows.jsonl", rows)
    write(out / "heldout.jsonl", [{"prompt": p.text} for p in everyday[:N_HELDOUT]])
    command = ["train", "sft", "--config", str(HERE / "recipe.yaml"), "--out", str(out / "trained")]
    command += ["--set", f"data={out / 'rows.jsonl'}"]
    subprocess.run([sys.executable, "-m", "auditgap", *command], check=True)
    package(out / "trained" / "model", out / "adapter")


def package(trained: Path, adapter: Path) -> None:
    """The adapter as auditgap brings it: in bfloat16, on `smollm2` wherever that lies, and without
    the tokenizer, which is the model's own."""
    adapter.mkdir(exist_ok=True)
    name = "adapter_model.safetensors"
    weights = {k: v.bfloat16() for k, v in load_file(trained / name).items()}
    save_file(weights, adapter / name, metadata={"format": "pt"})
    config = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": MODEL, "revision": None}
    write_bytes(adapter / "adapter_config.json", json.dumps(config, indent=1).encode())


if __name__ == "__main__":
    main()
