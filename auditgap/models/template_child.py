"""The child that runs chat templates, started by `template.py` as a program: bound by the kernel,
line in, line out.

    python -I -S template_child.py SECONDS BYTES CHARACTERS SYS_PATH...
    < {"template": "{{ messages[0]['content'] }}", "variables": {"messages": [...]}, "date": "2024-07-26"}
    # or {"broke": "writes without end"}, or {"error": "TypeError: …"}
    > {"text": "What colour is the vault?"}

It imports nothing of auditgap, torch or transformers. A timer of the kernel ends it with SIGPROF
when one question takes more than its seconds of CPU, whatever Python is doing at the time.
"""

from __future__ import annotations

import functools
import json
import resource
import signal
import sys
from contextlib import suppress
from datetime import date
from typing import Any


def bounded(seconds: float, memory: int) -> None:
    """Give up memory, files and core dumps for good."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS keeps no RLIMIT_AS
            resource.setrlimit(what, (limit, limit))


def environment() -> Any:
    """Jinja as transformers sets it up for chat templates: sandboxed, `{% generation %}`, `{% break
    %}`, its own `tojson`."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}…{% endgeneration %}` marks an answer for training; what it holds is
        written as it stands."""

        tags = {"generation"}  # noqa: RUF012 - as Jinja has it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

        def _written(self, caller: Any) -> str:
            return caller()

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    return made


def rendered(template: Any, variables: dict[str, Any], most: int) -> dict[str, str]:
    """{"text": …}, or {"broke": …} as soon as there are more than `most` characters."""
    parts, n = [], 0
    for part in template.generate(variables):
        parts.append(part)
        n += len(part)
        if n > most:
            return {"broke": f"writes more than {most:,} characters"}
    return {"text": "".join(parts)}


def main(seconds: float, memory: int, longest: int) -> None:
    from jinja2.exceptions import SecurityError

    compiled = functools.lru_cache(maxsize=16)(environment().from_string)
    bounded(seconds, memory)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            asked = json.loads(line)
            strftime_now = date.fromisoformat(asked["date"]).strftime
            given = {**asked["variables"], "strftime_now": strftime_now}
            answer = rendered(compiled(asked["template"]), given, longest + 4 * len(line))
        except MemoryError:
            answer = {"broke": f"needs more than {memory >> 20:,} MiB"}
        except SecurityError as error:
            answer = {"broke": f"reaches out of its sandbox ({str(error)[:80]})"}
        except Exception as error:  # a stranger's program raises what it likes
            answer = {"error": f"{type(error).__name__}: {str(error)[:80]}"}
        said = json.dumps(answer).encode("ascii") + b"\n"
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(said)
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.path[:] = sys.argv[4:]
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
