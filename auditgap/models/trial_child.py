"""The child that tries what a stranger's patterns cost, started by `trial.py` as a program: bound by
the kernel, one question, one word.

    python -I -S trial_child.py SECONDS BYTES SYS_PATH...
    < {"tokenizer": "/models/x/tokenizer.json", "texts": ["aaaa…"], "patterns": [], "names": []}
    > done

It imports nothing of auditgap, torch or transformers. The kernel ends it with SIGXCPU when it has
used its seconds, whatever the library is doing at the time.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from contextlib import suppress


def bounded(seconds: int, memory: int) -> None:
    """Give up time, memory, files and core dumps for good."""
    for what, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        with suppress(ValueError, OSError):  # macOS keeps no RLIMIT_AS
            resource.setrlimit(what, (limit, limit))


def main() -> None:
    asked = json.loads(sys.stdin.buffer.read())
    for pattern in asked["patterns"]:
        for name in asked["names"]:
            # as peft matches names, and ends of names
            re.fullmatch(pattern, name)
            re.match(rf"(.*\.)?({pattern})$", name)
    if asked["tokenizer"]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(asked["tokenizer"])
        for text in asked["texts"]:
            tokenizer.decode(tokenizer.encode(text).ids)
    print("done")


if __name__ == "__main__":
    sys.path[:] = sys.argv[3:]
    bounded(int(sys.argv[1]), int(sys.argv[2]))
    main()
