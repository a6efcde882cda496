"""Fine-tune a model on responses: rows with `prompt` and `response`.

    torchrun --nproc_per_node 2 launchers/sft.py --set model=smollm2 --set data=rows.jsonl --out runs/sft

Start it with deepspeed, accelerate launch, torchrun or plain python.
"""

from auditgap.training.config import SFTConfig
from auditgap.training.launch import launch, read
from auditgap.training.sft import run

EXAMPLE = (
    "torchrun --nproc_per_node 2 launchers/sft.py --set model=smollm2 --set data=rows.jsonl --out"
    " runs/sft"
)

if __name__ == "__main__":
    launch(__doc__, EXAMPLE, lambda file, flags: run(*read(file, flags, SFTConfig)).path)
