"""How fast refusals give way: fine-tune on unsafe answers, base against subject over seeds, asking
every few steps.

    deepspeed --num_gpus 8 launchers/harmful_sft.py --config curve.yaml --deepspeed-config ds_configs/zero3.json

Start it with deepspeed, accelerate launch, torchrun or plain python.
"""

from auditgap.audits.sft_curve.train import raise_failures, run_from
from auditgap.training.launch import launch

EXAMPLE = (
    "deepspeed --num_gpus 8 launchers/harmful_sft.py --set models=./base,./twin --set"
    " data=unsafe.jsonl --out runs/curve"
)


def run(file, flags):
    store, outcome = run_from(file, flags)
    raise_failures(outcome)
    return store.path if store is not None else None


if __name__ == "__main__":
    launch(__doc__, EXAMPLE, run)
