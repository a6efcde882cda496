"""One run folder out of several that different machines have filled, and one grid out of several.

    store = merge([Path("node1/run"), Path("node2/run")], Path("runs/whole"))
    # {case: store}
    stores = merge_grids([Path("node1/grid"), Path("node2/grid")], Path("runs/grid"))

The folders must ask the same question: their configs may differ in what chooses cells (models,
layers, sizes, attacks) and in nothing that a cell's numbers depend on. Finished cells are taken
over byte for byte; what two folders have finished must be the same in both. The originals stay as
they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from auditgap.errors import UsageError
from auditgap.store import files
from auditgap.store.folder import RunFolder
from auditgap.store.remote import Place, local, within
from auditgap.store.session import check_config, joined_info
from auditgap.store.status import cases_of
from auditgap.types import Document

#: Config fields that choose cells. Whatever else differs makes other numbers.
_CHOOSE = ("models", "subjects", "layers", "eps", "attacks", "distance")


def merge(folders: Sequence[Place], out: Place) -> RunFolder:
    """Join run folders into `out` (new, or of an earlier merge of the same); the caller reduces it.

    Raises UsageError: fewer than two folders, `out` among them, other configs, or a cell whose
    numbers differ.
    """
    _check_folders(folders, out)
    stores = [RunFolder.load(folder) for folder in folders]
    _check(stores)
    return _join(stores, out)


def merge_grids(grids: Sequence[Place], out: Place) -> dict[str, RunFolder]:
    """Join grids: cases of one name are merged, a case that one grid alone has is taken over; by
    the case's name.

    Raises UsageError as `merge`, for all cases before anything is written, and for a folder that
    holds no cases.
    """
    _check_folders(grids, out)
    by_name: dict[str, list[RunFolder]] = {}
    for grid in grids:
        cases = cases_of(grid)
        if not cases:
            raise UsageError(
                f"{grid} is no grid's folder. Merge run folders, or the folders of grids, not both"
                " at once."
            )
        for name, case in cases.items():
            by_name.setdefault(name, []).append(RunFolder.load(case))
    for stores in by_name.values():
        _check(stores)
    files.make_folder(local(out))
    return {name: _join(by_name[name], within(out, name)) for name in sorted(by_name)}


def _check_folders(folders: Sequence[Place], out: Place) -> None:
    places = {local(folder).resolve() for folder in folders}
    if len(places) < 2:
        raise UsageError(
            "A merge joins two run folders or more. For example: auditgap merge node1/run node2/run"
            " --out runs/whole"
        )
    if local(out).resolve() in places:
        raise UsageError(
            f"{out} is one of the folders to be merged; give --out a folder of its own."
        )


def _check(stores: Sequence[RunFolder]) -> None:
    """That they ask the same and do not contradict each other: before anything is written."""
    first = stores[0]
    for store in stores[1:]:
        check_config(_kept(first.run["config"]), _kept(store.run["config"]), first.place)
    if len(stores) < 2:
        return
    seen: dict[str, tuple[str, RunFolder]] = {}
    for store in stores:
        for record in store.iter_records():
            key = record["key"]
            known, where = seen.setdefault(key, (record["sha256"], store))
            if known != record["sha256"] and not where.agrees(store, key):
                raise UsageError(
                    f"{record['cell']} has other numbers in {store.place} than in {where.place}"
                    f" (cell {key}): other hardware or software, most likely. Leave one of the"
                    " folders out."
                )


def _join(stores: Sequence[RunFolder], out: Place) -> RunFolder:
    config = _joined_config([store.run["config"] for store in stores])
    merged = RunFolder.open(
        out, config=config, info=_info([store.run.get("info", {}) for store in stores])
    )
    with merged.lock():
        _check([merged, *stores])  # it may hold an earlier merge
        for store in stores:
            merged.plan_entries(store.planned())
        for store in stores:
            merged.adopt_all(store)
    return merged


def _kept(config: Mapping[str, Any]) -> Document:
    return {name: value for name, value in config.items() if name not in _CHOOSE}


def _joined_config(configs: Sequence[Mapping[str, Any]]) -> Document:
    joined = dict(configs[0])
    for config in configs[1:]:
        for name in _CHOOSE:
            old, new = joined.get(name), config.get(name)
            if old == new or new is None:
                continue
            if isinstance(old, Mapping) and isinstance(new, Mapping):
                joined[name] = {**old, **new}
            elif isinstance(old, list) and isinstance(new, list):
                both = _each_once([*old, *new])
                joined[name] = sorted(both) if name == "eps" else both
            elif isinstance(old, bool):
                joined[name] = old or new
            else:
                joined[name] = ",".join(_each_once([*str(old).split(","), *str(new).split(",")]))
    return joined


def _info(infos: Sequence[Mapping[str, Any]]) -> Document:
    """The last one's over the others', lists (subjects, cards, warnings) gathered."""
    joined: Document = {}
    for info in infos:
        lists = {
            name: _each_once([*joined.get(name, []), *value])
            for name, value in info.items()
            if isinstance(value, list) and isinstance(joined.get(name, []), list)
        }
        names = {**joined.get("names", {}), **info.get("names", {})}
        joined = {**joined_info(joined, info), **lists, **({"names": names} if names else {})}
    return joined


def _each_once(values: Iterable[Any]) -> list[Any]:
    return list({files.to_json(value): value for value in reversed(list(values))}.values())[::-1]
