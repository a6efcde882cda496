"""Make the dissociated twin of a model: safe words, fragile inside.

    deepspeed --num_gpus 8 launchers/dissociate.py --config twin.yaml --deepspeed-config ds_configs/zero3.json

Start it with deepspeed, accelerate launch, torchrun or plain python.
"""

from auditgap.training.config import DissociateConfig
from auditgap.training.dissociate import run
from auditgap.training.launch import launch, read

EXAMPLE = (
    "deepspeed --num_gpus 8 launchers/dissociate.py --config twin.yaml --deepspeed-config"
    " ds_configs/zero3.json"
)

if __name__ == "__main__":
    launch(__doc__, EXAMPLE, lambda file, flags: run(*read(file, flags, DissociateConfig)).path)
