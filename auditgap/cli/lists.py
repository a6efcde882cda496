"""`auditgap ls`, `schema` and `doctor`: what can be named, what a config may hold, and what this
machine can do.

    auditgap ls layers smollm2
    auditgap schema lvs > lvs.schema.json
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Annotated

import typer

from auditgap import __version__
from auditgap.cli.options import AsJson, examples
from auditgap.cli.screen import note, print_json, print_table, quiet
from auditgap.errors import UsageError, did_you_mean
from auditgap.types import ATTACKS, Document

PANEL = "Data, judges and this machine"


def add(app: typer.Typer) -> None:
    app.command(
        "ls",
        epilog=examples(
            ("auditgap ls prompts", "auditgap ls layers smollm2", "auditgap ls judges --json")
        ),
        rich_help_panel=PANEL,
    )(list_)
    app.command(
        "schema",
        epilog=examples(("auditgap schema lvs", "auditgap schema evaluate > evaluate.schema.json")),
        rich_help_panel=PANEL,
    )(schema)
    app.command("doctor", rich_help_panel=PANEL)(doctor)


def list_(
    what: Annotated[
        str,
        typer.Argument(
            help=(
                "judges, rewards, prompts, triples, attacks, interventions, constructions, presets,"
                " families or layers"
            )
        ),
    ],
    model: Annotated[
        str | None,
        typer.Argument(
            help="Model, for `ls layers`; a model type to prove here and now, for `ls families`."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List available judges, rewards, prompts, contrast triples, attacks, interventions,
    constructions (of dissociated models), presets or model families that can be audited, or a
    MODEL's layers."""
    kinds = {
        **{name: partial(_listed, *table) for name, table in _TABLES.items()},
        "attacks": _attacks,
        "presets": _presets,
        "families": lambda: _families(model),
        "layers": lambda: _layers(model),
    }
    if what not in kinds:
        raise UsageError(f"ls takes {', '.join(kinds)}; {what!r} came.{did_you_mean(what, kinds)}")
    rows = kinds[what]()
    print_json(rows) if as_json else print_table(rows)


def schema(
    command: Annotated[
        list[str],
        typer.Argument(help="A command that takes a config: lvs, evaluate, audit, train sft, …"),
    ],
) -> None:
    """Print the JSON schema of a command's YAML file: every key with its type, default and help.
    Editors use it to check and complete the file."""
    from auditgap.cli.configs import CONFIGS, json_schema

    name = " ".join(command)
    if name not in CONFIGS:
        raise UsageError(
            f"schema takes {', '.join(CONFIGS)}; {name!r} came.{did_you_mean(name, CONFIGS)}"
        )
    print_json(json_schema(name))


#: What can be listed, and the module and name of its table.
_TABLES = {
    "judges": ("auditgap.judges", "JUDGES"),
    "rewards": ("auditgap.judges", "REWARDS"),
    "prompts": ("auditgap.data", "SOURCES"),
    "triples": ("auditgap.data", "TRIPLES"),
    "interventions": ("auditgap.interventions", "INTERVENTIONS"),
    "constructions": ("auditgap.training.constructions", "CONSTRUCTIONS"),
}


def _listed(module: str, table: str) -> list[Document]:
    return [line.row() for line in getattr(importlib.import_module(module), table).listed()]


def _attacks() -> list[Document]:
    return [{"name": name, "what": what} for name, what in ATTACKS.items()]


def _presets() -> list[Document]:
    from auditgap.report.presets import listed

    return listed()


def _layers(model: str | None) -> list[Document]:
    if model is None:
        raise UsageError("Layers of which model? For example: auditgap ls layers smollm2")
    quiet()
    from auditgap.models import outline, parse_sites

    n = outline(model).n_blocks
    words = {str(parse_sites(w, n)[0]): w for w in ("embedding", "mid", "last")}
    return [
        {
            "site": str(s),
            "layer_index": s.layer_index,
            "also": words.get(str(s), "") if str(s) != "embedding" else "",
        }
        for s in parse_sites("all", n)
    ]


def _families(model_type: str | None) -> list[Document]:
    from auditgap.engines.families import table

    known = table.stored()
    if model_type is None:
        if known.versions != table.installed():
            note(
                f"Proven with {table.named(known.versions)}; here is {table.named(table.installed())}."
                " To prove one type here, as an example: auditgap ls families llama"
            )
        return [proof.row() for proof in known.proofs]
    quiet()
    from auditgap.engines.families.building import CAUSAL, WRAPPERS
    from auditgap.engines.families.proof import prove

    if model_type not in (*CAUSAL, *WRAPPERS):
        raise UsageError(
            f"ls families takes a model_type of transformers; {model_type!r} came."
            f"{did_you_mean(model_type, (*CAUSAL, *WRAPPERS))}"
        )
    return [prove(model_type, wrapper=model_type in WRAPPERS).row()]


def doctor(as_json: AsJson = False) -> None:
    """Show what this machine can run: versions, devices, speed, and which optional parts are
    installed."""
    import platform
    from importlib.metadata import version

    import psutil
    import torch

    from auditgap.audits.timing import matmul_rate
    from auditgap.data import SOURCES
    from auditgap.models import PACKAGED, pick_device

    device = pick_device("auto")
    rows = [
        {"check": "auditgap", "found": __version__},
        {"check": "python", "found": platform.python_version()},
        *(
            {"check": p, "found": version(p)}
            for p in ("torch", "transformers", "accelerate", "scikit-learn", "pyarrow")
        ),
        {
            "check": "device",
            "found": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        },
        {"check": "threads", "found": str(torch.get_num_threads())},
        {"check": "free memory", "found": f"{psutil.virtual_memory().available / 1e9:.1f} GB"},
        *(
            {
                "check": f"matmul {str(t).removeprefix('torch.')}",
                "found": f"{matmul_rate(t, device) / 1e9:,.0f} GFLOP/s",
            }
            for t in (torch.float32, torch.bfloat16)
        ),
        {"check": "browser, for PDFs", "found": _browser()},
        *({"check": extra, "found": _extra(extra, names)} for extra, names in _extras().items()),
        *(
            {"check": f"prompts {p.name}", "found": "yes" if p.available else p.problem}
            for p in SOURCES.listed()
        ),
        *({"check": f"model {n}", "found": m.problem or "yes"} for n, m in PACKAGED.items()),
    ]
    print_json({r["check"]: r["found"] for r in rows}) if as_json else print_table(rows)


def _browser() -> str:
    from auditgap.report import pdf

    try:
        return pdf.browser()
    except UsageError:
        return "none: install Chromium (on Debian and Ubuntu: apt-get install chromium)"


def _extras() -> dict[str, list[str]]:
    """The optional parts by their name in pyproject.toml, each with the packages that it wants."""
    import re
    from importlib.metadata import metadata, requires

    found: dict[str, list[str]] = {
        e: [] for e in metadata("auditgap").get_all("Provides-Extra", [])
    }
    for line in requires("auditgap") or ():
        if extra := re.search(r"extra == ['\"]([\w-]+)", line):
            found[extra[1]].append(re.split(r"[^\w.-]", line, maxsplit=1)[0])
    return {name: packages for name, packages in found.items() if name not in ("docs", "test")}


def _extra(name: str, packages: list[str]) -> str:
    """Whether an optional part is here, or what to type for it."""
    from importlib.metadata import PackageNotFoundError, version

    absent = []
    for package in packages:
        try:
            version(package)
        except PackageNotFoundError:
            absent.append(package)
    return (
        f"absent ({', '.join(absent)}); type: pip install 'auditgap[{name}]'" if absent else "yes"
    )
