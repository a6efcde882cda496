"""Fit the latent monitor that a construction starts from, its activations extracted by all ranks
together.

    deepspeed --num_gpus 8 launchers/fit_monitor.py --set base=./base --set triples=triples.jsonl --out runs/monitor

Start it with deepspeed, accelerate launch, torchrun or plain python.
"""

from auditgap.audits.probe.config import read_monitor_config
from auditgap.audits.probe.monitor import fit_monitor
from auditgap.training import ranks
from auditgap.training.launch import launch

EXAMPLE = (
    "deepspeed --num_gpus 8 launchers/fit_monitor.py --set base=./base --set triples=triples.jsonl"
    " --out runs/monitor"
)


def run(file, flags):
    flags.pop("deepspeed", None)
    with ranks.joined():
        config, options = read_monitor_config(file, flags)
        options = options.model_copy(update={"device": ranks.device(options.device)})
        path = fit_monitor(config, options, shard=(ranks.rank(), ranks.world()))
        ranks.wait()
        return path


if __name__ == "__main__":
    launch(__doc__, EXAMPLE, run)
