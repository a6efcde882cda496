"""Where a study's base is: folders are moved, and what counts of a model is its fingerprint.

    model_of(store)      # "/new/base": what run.json's config names, or where the same weights are now

A study that was moved together with its base finds it where it was beside the study; one whose base
lies somewhere else is told so by the command that made it, with the new name (`em run`, `em build`).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from auditgap.audits.emergent.config import OWN_BASE
from auditgap.errors import UsageError
from auditgap.store import RunFolder
from auditgap.store.remote import Place
from auditgap.types import Document

if TYPE_CHECKING:
    from auditgap.audits.emergent.build import EmergentPlan

#: In run.json's info: the base's folder by its path, and as it is seen from the study's folder.
BASE_AT = "base_at"


def base_at(plan: EmergentPlan, place: Place) -> Document:
    """What run.json's info says of a base that is a folder; nothing of one that has a name."""
    named, folder = Path(plan.outlines[0].subject.name).expanduser(), Path(str(place))
    if not named.is_dir():
        return {}
    return {
        BASE_AT: {
            "folder": str(named.absolute()),
            "from_study": os.path.relpath(named.absolute(), folder.absolute()),
        }
    }


def as_known(plan: EmergentPlan, place: Place) -> EmergentPlan:
    """The plan with the base's name as the folder at `place` has it, where the weights are the
    same, and with the reference that was found when it was made."""
    try:
        known = RunFolder.load(place).run["config"]
    except UsageError:  # a new folder, or none of ours: opening it says which
        return plan
    if known.get("base_fingerprint") != plan.outlines[0].subject.fingerprint:
        return plan
    same = {"model": known["model"]}
    if plan.reference_found:  # what is found of itself must not change under a study
        same["reference"] = known.get("reference", OWN_BASE)
    return replace(plan, config=plan.config.model_copy(update=same))


def model_of(store: RunFolder) -> str:
    """What to open as a study's base. Its fingerprint is the caller's to compare."""
    name, at = store.run["config"]["model"], store.run["info"].get(BASE_AT)
    if at is None or Path(name).expanduser().is_dir():
        return name
    places = (Path(at["folder"]), Path(os.path.normpath(store.path.absolute() / at["from_study"])))
    return next((str(place) for place in places if place.is_dir()), name)
