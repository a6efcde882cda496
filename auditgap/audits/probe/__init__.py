"""The probe audit: a probe of safe and unsafe answers, fitted on a base's activations, read on what
was made of the base.

    folder, outcome = run(PROBE, *PROBE.read(None, {"base": "./base", "subjects": "./dissociated", "triples": "demo"}))

A model whose behaviour is the base's may still represent harm otherwise; the drop of the fixed
probe's AUROC and of its calibrated safe–unsafe gap says by how much (arXiv 2606.08044, section
4.1). `fit_monitor` makes the monitor that a construction starts from.
"""

from auditgap.audits.exports import exports

__getattr__ = exports(
    __name__,
    {
        "config": (
            "FitMonitorConfig",
            "ProbeConfig",
            "ProbeOptions",
            "read_monitor_config",
        ),
        "rows": ("ProbeRow",),
        "monitor": ("fit_monitor",),
        "plan": ("ProbePlan", "make_plan"),
    },
)
