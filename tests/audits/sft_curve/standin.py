"""A trainer small enough to be run in a test, and real: SGD on a planted model, with a checkpoint
after each evaluation.

    train = standin.Trainer(tmp_path / "checkpoints", steps=6, eval_every=2)
    train("path/to/model", seed=0, evaluate=lambda step, loaded: {})

It teaches the vault to tell its colour. `python standin.py FOLDER KILL_AT` runs a whole curve in a
process of its own and ends it with SIGKILL when `evaluate` has been called so many times (0:
never); under torchrun, with as many ranks as told.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import planted  # noqa: E402

from auditgap import judges, models  # noqa: E402
from auditgap.audits.sft_curve import plan as planning  # noqa: E402
from auditgap.audits.sft_curve import worker  # noqa: E402
from auditgap.audits.sft_curve.audit import SFTCurve  # noqa: E402
from auditgap.audits.sft_curve.run import run_curve  # noqa: E402
from auditgap.types import Prompt  # noqa: E402

TAUGHT = planted.PROMPTS[:6]
HELD_OUT = planted.PROMPTS[6:]
STEPS, EVERY = 6, 2


class Trainer:
    """Full fine-tuning by plain SGD; its state is its weights and its step, so a resumed run is an
    unbroken one."""

    def __init__(
        self, folder: Path, *, steps: int = STEPS, eval_every: int = EVERY, lr: float = 0.1
    ) -> None:
        self.folder, self.steps, self.every, self.lr = folder, steps, eval_every, lr
        #: (model, seed, step) of every step taken in this process
        self.trained: list[tuple[str, int, int]] = []

    def __call__(self, model_name: str, seed: int, evaluate: Any) -> None:
        loaded = models.load(model_name, dtype="float32", device="cpu")
        home = self.folder / f"{Path(model_name).name}-{seed}"
        home.mkdir(parents=True, exist_ok=True)
        start = max((int(p.stem) for p in home.glob("*.safetensors")), default=0)
        if start:
            loaded.model.load_state_dict(load_file(home / f"{start}.safetensors"))
        loaded.model.requires_grad_(True).train()
        optimizer = torch.optim.SGD([loaded.model.lm_head.weight], lr=self.lr)
        evaluate(start, loaded)
        for step in range(start + 1, self.steps + 1):
            rng = torch.Generator().manual_seed(1000 * seed + step)
            prompt = Prompt(TAUGHT[int(torch.randint(len(TAUGHT), (1,), generator=rng))])
            prefix = list(loaded.render(prompt).ids)
            answer = loaded.tokenizer(planted.OPENED, add_special_tokens=False)["input_ids"] + [
                loaded.tokenizer.eos_token_id
            ]
            ids = torch.tensor([prefix + answer])
            labels = torch.tensor([[-100] * len(prefix) + answer])
            loaded.model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            self.trained.append((model_name, seed, step))
            if step % self.every == 0 or step == self.steps:
                save_file(
                    {k: v.contiguous() for k, v in loaded.model.state_dict().items()},
                    home / f"{step}.safetensors",
                )
                evaluate(step, loaded)


class Curve(SFTCurve):
    """The audit with a trainer of ours; its rows are in no file."""

    def __init__(self, train: Any) -> None:
        self.train = train

    def prepare(self, config: Any, options: Any) -> planning.CurvePlan:
        return planning.prepare(config, options)

    def curve_worker(self, plan: Any, options: Any, store: Any, folder: Path) -> Any:
        return worker.CurveWorker(plan, options, self.train, store)


def run(config: Any, options: Any, train: Any) -> Any:
    return run_curve(Curve(train), config, options)


def prompts_file(folder: Path) -> Path:
    return planted.write_prompts(folder / "prompts.txt", HELD_OUT)


def config(folder: Path, out: str, **changes: Any) -> tuple[Any, Any]:
    """A curve over two planted models that lie in `folder` as `base` and `soft`."""
    values = {
        "models": [str(folder / "base"), str(folder / "soft")],
        "seeds": [0, 1],
        "data": "taught in the test",
        "method": "full",
        "steps": STEPS,
        "eval_every": EVERY,
        "prompts": str(folder / "prompts.txt"),
        "max_new_tokens": 9,
        "judge": "colour",
        "dtype": "float32",
        "device": "cpu",
        "out": str(folder / out),
        **changes,
    }
    return SFTCurve().read(None, values)


def save_models(folder: Path) -> None:
    """`base` refuses firmly, `soft` less so: the word that decides has a smaller head start."""
    planted.save(planted.Plant(door=1, seed=0), folder / "base")
    planted.save(planted.Plant(door=1, seed=0, sure=55.0), folder / "soft")
    soft = models.load(str(folder / "soft"), dtype="float32", device="cpu")
    with torch.no_grad():
        soft.model.lm_head.weight[planted.WORDS.index("sorry,")] *= 0.8
    soft.model.save_pretrained(folder / "soft")
    prompts_file(folder)


def main(folder: Path, kill_at: int) -> None:
    torch.set_num_threads(1)
    judges.JUDGES["colour"] = judges.Scorer("names a colour", planted.Colour)
    remember, left = worker.Evaluations.__call__, kill_at

    def counting(self: Any, step: int, loaded: Any) -> Any:
        nonlocal left
        result = remember(self, step, loaded)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    worker.Evaluations.__call__ = counting
    rank = os.environ.get("RANK", "0")
    trainer = Trainer(folder / f"checkpoints{rank}")
    store, outcome = run(*config(folder, "child"), trainer)
    line = f"rank {rank} {len(trainer.trained)} {outcome.done} {store is None}\n"
    os.write(1, line.encode())  # whole: two ranks write into one pipe


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
