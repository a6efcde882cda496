"""What a raylet starts in the place of a Python process of its own: it has that process forked from
one that has imported everything (warm.py), and lives as long.

    python -I -S warm_ray.py NAME PYTHON [-u] SCRIPT ARGUMENT...

NAME is the socket's, in Linux's abstract namespace. Where nobody answers, the process starts as
Ray meant it to.
"""

import contextlib
import json
import os
import select
import socket
import sys

name, args = sys.argv[1], sys.argv[2:]
with os.scandir("/proc/self/fd") as listed:
    kept = [int(one.name) for one in listed if os.get_inheritable(int(one.name))]
asked = {
    "args": args,
    "environment": dict(os.environ),
    "cwd": os.getcwd(),
    "streams": [0, 1, 2],
    "pass_fds": [fd for fd in kept if fd > 2],
    "new_session": False,
    "group": -1,
    "umask": -1,
}
companion = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
pid = b""
with contextlib.suppress(OSError):
    companion.connect(f"\0{name}")
    socket.send_fds(companion, [json.dumps(asked).encode()], [0, 1, 2, *asked["pass_fds"]])
    pid = companion.recv(32)
if not pid:
    os.execv(args[0], args)
with contextlib.suppress(ProcessLookupError):
    process = os.pidfd_open(int(pid))
    companion.send(pid)  # which ends that process when this one is killed
    os.closerange(0, 3)
    for fd in asked["pass_fds"]:
        os.close(fd)
    select.select([process], [], [])
