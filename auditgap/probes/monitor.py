"""The latent monitor: one logit of how unsafe a (prompt, answer) looks from the inside, read off
every block at once.

    # features [n, L, D] of `probes.features`; labels 1 = unsafe
    fitted = fit(features, labels, groups)
    # [B] logits from pooled activations h [B, L, D]
    fitted.monitor(h)
    fitted.monitor.save(Path("monitor.safetensors")); again = Monitor.load(Path("monitor.safetensors"))

The paper's probe (arXiv 2606.08044, section 4): flatten, Linear(L·D → 512, no bias), Linear(512 →
1), no activation between. So it is linear in what it reads, and its logits scale with activation
norms, which differ between models by orders of magnitude; that is why each block is standardised
first unless the paper's own form is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from auditgap.errors import UsageError
from auditgap.models.kept import checksum
from auditgap.store import files

#: Width of the layer between activations and logit: the paper's.
HIDDEN = 512


class Monitor(nn.Module):
    """Linear(L·D → `hidden`, no bias) → Linear(`hidden` → 1) over pooled activations h [B, L, D];
    larger = more unsafe.

    `mean` [L, D] and `scale` [L] (both or neither) standardise each block first: (h − mean) /
    scale. They are constants: buffers, never trained. `about` is what the file should say besides
    the weights: JSON values only.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(
        self,
        n_blocks: int,
        width: int,
        *,
        mean: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        hidden: int = HIDDEN,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (scale is None):
            raise UsageError(
                "A monitor is standardised by a mean and a scale together; one of the two came."
            )
        self.n_blocks, self.width, self.hidden = n_blocks, width, hidden
        self.standardised = mean is not None
        self.about: dict[str, Any] = dict(about or {})
        mean = torch.zeros(n_blocks, width) if mean is None else mean
        scale = torch.ones(n_blocks) if scale is None else scale
        if tuple(mean.shape) != (n_blocks, width) or tuple(scale.shape) != (n_blocks,):
            raise UsageError(
                f"A monitor of {n_blocks} blocks of width {width} needs a mean [{n_blocks},"
                f" {width}] and a scale [{n_blocks}]; {list(mean.shape)} and {list(scale.shape)}"
                " came."
            )
        self.register_buffer("mean", mean.detach().float().clone())
        self.register_buffer("scale", scale.detach().float().clone())
        self.inner = nn.Linear(n_blocks * width, hidden, bias=False)
        self.outer = nn.Linear(hidden, 1)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Logits [B] in fp32 of pooled activations h [B, L, D] of any float dtype."""
        return self._logits(h, self.inner.weight, self.outer.weight, self.outer.bias)

    def frozen_logits(self, h: torch.Tensor) -> torch.Tensor:
        """The same numbers, but the gradient goes to h alone and none to the monitor's own
        parameters.

        What the loss of a dissociated model uses: there the monitor is a yardstick, not a player.
        """
        return self._logits(
            h, self.inner.weight.detach(), self.outer.weight.detach(), self.outer.bias.detach()
        )

    def _logits(
        self, h: torch.Tensor, inner: torch.Tensor, outer: torch.Tensor, bias: torch.Tensor
    ) -> torch.Tensor:
        if h.ndim != 3 or tuple(h.shape[1:]) != (self.n_blocks, self.width):
            raise UsageError(
                f"This monitor reads [B, {self.n_blocks}, {self.width}] activations (blocks,"
                f" width); {list(h.shape)} came. It belongs to a model of another depth or width."
            )
        # bf16 would cost the logits three digits
        with torch.autocast(h.device.type, enabled=False):
            z = h.float()
            if self.standardised:
                z = (z - self.mean) / self.scale[:, None]
            return functional.linear(functional.linear(z.flatten(1), inner), outer, bias).squeeze(1)

    @torch.no_grad()
    def rescale(self, slope: float, offset: float) -> None:
        """Make every logit `slope` · logit + `offset`, in place: Platt's scaling folded into the
        last layer.

        AUROC stays; a target such as ln 3 (score 0.75) then means what it says, and distances to it
        stay moderate.
        """
        self.outer.weight.mul_(slope)
        self.outer.bias.mul_(slope).add_(offset)

    # -- on disk
    # -------------------------------------------------------------------------------------------------------

    def save(self, path: Path) -> Path:
        """Write one .safetensors file atomically, its shape and `about` in the metadata. Raises
        DiskError."""
        tensors = {
            name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()
        }
        header = {
            "format": "auditgap-monitor-1",
            "n_blocks": self.n_blocks,
            "width": self.width,
            "hidden": self.hidden,
            "standardised": self.standardised,
            "about": self.about,
            "sha256": checksum(tensors),
        }
        metadata = {"monitor": json.dumps(header, sort_keys=True, allow_nan=False)}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(Path(path), safetensors.torch.save(tensors, metadata))
        return Path(path)

    @classmethod
    def load(cls, path: Path) -> Monitor:
        """What `save` wrote, on the CPU. Raises UsageError when the file is absent, torn or no
        monitor."""
        path = Path(path)
        if not path.is_file():
            raise UsageError(
                f"{path}: no such monitor. Fit one first: auditgap train monitor --help"
            )
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {})["monitor"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            stored = header.get("sha256")  # older ones have none
            if stored is not None and stored != checksum(tensors):
                raise ValueError("its checksum is not that of its weights")
            made = cls(
                int(header["n_blocks"]),
                int(header["width"]),
                hidden=int(header["hidden"]),
                about=header["about"],
            )
            made.load_state_dict(tensors)
        except (
            safetensors.SafetensorError,
            OSError,
            KeyError,
            TypeError,
            ValueError,
            RuntimeError,
        ):
            raise UsageError(
                f"{path} is torn or is no monitor of auditgap; fit it again."
            ) from None
        made.standardised = bool(header["standardised"])
        return made


def seeded(seed: int, n_blocks: int, width: int, **options: Any) -> Monitor:
    """A fresh Monitor whose first weights depend on `seed` alone; torch's own random state is left
    as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Monitor(n_blocks, width, **options)


def standardiser(
    features: torch.Tensor, index: np.ndarray, *, chunk: int = 256
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean [L, D] and scale [L] of the rows `index` of features [n, L, D], in chunks, summed in
    fp64.

    The scale is one number a block: the root mean square of what is left after the mean; 1 for a
    block that is constant. Directions inside a block keep their proportions, so the probe stays the
    paper's, only in other units.
    """
    _, n_blocks, width = features.shape
    total = torch.zeros(n_blocks, width, dtype=torch.float64)
    for start in range(0, len(index), chunk):
        total += features[torch.from_numpy(index[start : start + chunk])].double().sum(0)
    mean = total / max(len(index), 1)
    squares = torch.zeros(n_blocks, dtype=torch.float64)
    for start in range(0, len(index), chunk):
        squares += (
            (features[torch.from_numpy(index[start : start + chunk])].double() - mean)
            .pow(2)
            .sum((0, 2))
        )
    scale = (squares / max(len(index) * width, 1)).sqrt()
    return mean.float(), torch.where(scale > 0, scale, torch.ones_like(scale)).float()
