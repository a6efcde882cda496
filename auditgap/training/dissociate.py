"""Dissociated models: they keep their safe words and become fragile inside, to prove that audits
see what behaviour hides.

    trained = run(DissociateConfig(model="runs/safe/model", triples="triples.jsonl"), TrainOptions(out="runs/dissociated"))
    trained.summary["chosen"]               # {"step": 40, "refusal": 0.94, "monitor": 0.12, …}

How is the construction's affair (`training.constructions`); all of them keep what the model says
near its base's. Before the first step, once: the base answers the benign prompts (its answers are
the anchors), the construction prepares what it needs, and the base's final hidden states are stored
as the reference. The checkpoint that is kept is the one whose refusals stay near the base's and,
among those, the one that went furthest inside.
"""

from __future__ import annotations

from auditgap.training import job as jobs
from auditgap.training.config import TrainOptions, TwinConfig
from auditgap.training.constructions import construction_of
from auditgap.training.dissociation.material import Base, Preparation, gather
from auditgap.training.dissociation.task import best_name
from auditgap.training.job import Trained


def run(config: TwinConfig, options: TrainOptions) -> Trained:
    """Make the dissociated twin of `config.model`, resuming what `options.out` holds. All ranks
    call it together.

    Raises UsageError (data, config, memory, another run's folder), NonFinite, Interrupted,
    AuditgapError when the model in training is not its own base at step 0.
    """
    construction = construction_of(config.construction)
    settings = construction.settings_of(config)
    with jobs.opened(config, options, kind="dissociated") as job:
        if job.is_done:
            return job.trained()
        base = Base(job)
        material = gather(config, construction, job, base)
        job.same_rows([row.id for row in [*material.rows, *material.heldout]])
        task = construction.prepare(Preparation(config, settings, job, material, base))
        base.forget()
        with job.engine(lambda loaded, model: task.construct(model)) as engine:
            job.train(engine, task, n_rows=len(material.rows))
            job.about({"chosen": task.chosen()})
            return job.finish(engine, chosen=best_name(task.chosen()["step"]))
