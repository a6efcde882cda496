"""What `deepspeed`, `accelerate launch`, `torchrun` and plain `python` start: options to config,
errors to exit codes.

    # launchers/dissociate.py
    launch(__doc__, EXAMPLE, lambda file, flags: run(*read(file, flags, DissociateConfig)).path)

    deepspeed --num_gpus 2 launchers/dissociate.py --config twin.yaml --set lr=1e-5 --out runs/twin

An error that all ranks share is said once, by rank 0; one that a single rank meets is said by that
rank, which then ends at once so that the launcher can end the others. Exit codes are those of the
command line.
"""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from auditgap.config import build, merged, overrides
from auditgap.errors import AuditgapError, Interrupted
from auditgap.models import quiet
from auditgap.training import ranks
from auditgap.training.config import TrainConfig, TrainOptions
from auditgap.types import Document

ConfigT = TypeVar("ConfigT", bound=TrainConfig)


def read(
    config_file: Path | None, flags: Document, kind: type[ConfigT]
) -> tuple[ConfigT, TrainOptions]:
    """A config of this kind and the run's options, from the file with flags on top. Raises
    UsageError naming the key and what was wanted."""
    values = merged(config_file, {}, section=kind.section)
    for key, value in flags.items():
        if value is not None:
            both = isinstance(value, dict) and isinstance(values.get(key), dict)
            values[key] = {**values[key], **value} if both else value
    return build(values, kind.of(values), TrainOptions)


def launch(about: str | None, example: str, run: Callable[[Path | None, Document], object]) -> None:
    """The whole of a launcher: parse, `run(config file, flags)`, exit. `about` is its docstring,
    whose first line is shown."""
    parser = argparse.ArgumentParser(
        description=(about or example).strip().splitlines()[0], epilog=f"Example: {example}"
    )
    parser.add_argument("--config", type=Path, help="YAML with the recipe")
    parser.add_argument("--out", help="the run's folder; the same command on it resumes")
    parser.add_argument(
        "--deepspeed-config",
        dest="deepspeed",
        type=Path,
        help="a DeepSpeed JSON, e.g. ds_configs/zero3.json",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any key of the recipe, over the file's",
    )
    # the deepspeed launcher passes it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(given.local_rank))

    def go() -> None:
        quiet()
        flags = {"out": given.out, "deepspeed": given.deepspeed}
        made = run(
            given.config,
            {
                **overrides(given.set),
                **{key: value for key, value in flags.items() if value is not None},
            },
        )
        if ranks.is_main():
            print(f"Done: {made}")

    sys.exit(ended(go))


def ended(act: Callable[[], None]) -> int:
    """Run, and turn what comes out into an exit code. In a job of several ranks a lone failure ends
    its process at once."""
    alone = ranks.world() == 1
    try:
        act()
        return 0
    except AuditgapError as error:
        shared = getattr(error, "shared", False)
        if alone or ranks.is_main() or not shared:
            where = "" if alone or shared else f"Rank {ranks.rank()} of {ranks.world()}: "
            print(f"{where}{error}", file=sys.stderr, flush=True)
        code = error.exit_code
    except KeyboardInterrupt:
        print(
            "Interrupted; the same command goes on from the last checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        code = Interrupted.exit_code
    except BaseException as error:
        if isinstance(error, SystemExit):
            raise
        if not alone and ranks.has_lost_one(error):
            print(
                f"Rank {ranks.rank()} of {ranks.world()}: another rank ended, so this one cannot go"
                " on. What that one said stands above, if it could say anything; the same command"
                " goes on from the last checkpoint.",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)
        print(f"Rank {ranks.rank()} of {ranks.world()} failed:", file=sys.stderr)
        traceback.print_exc()
        sys.stderr.flush()
        code = 1
    if not alone:
        sys.stdout.flush()
        # the other ranks may be inside a collective: no farewell that would wait for them
        os._exit(code)
    return code
