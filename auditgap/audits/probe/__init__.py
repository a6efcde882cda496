"""The probe audit: a probe of safe and unsafe answers, fitted on a base's activations, read on what
was made of the base.

    folder, outcome = run(*read_config(None, {"base": "./base", "subjects": "./dissociated", "triples": "demo"}))

A model whose behaviour is the base's may still represent harm otherwise; the drop of the fixed
probe's AUROC and of its calibrated safe–unsafe gap says by how much (arXiv 2606.08044, section
4.1). `fit_monitor` makes the monitor that a construction starts from.
"""

from auditgap.audits.probe.config import (
    FitMonitorConfig,
    ProbeConfig,
    ProbeOptions,
    read_config,
    read_monitor_config,
)
from auditgap.audits.probe.rows import ProbeRow
from auditgap.audits.probe.run import ProbePlan, fit_monitor, make_plan, prepare, reduce, run

__all__ = [
    "FitMonitorConfig",
    "ProbeConfig",
    "ProbeOptions",
    "ProbePlan",
    "ProbeRow",
    "fit_monitor",
    "make_plan",
    "prepare",
    "read_config",
    "read_monitor_config",
    "reduce",
    "run",
]
