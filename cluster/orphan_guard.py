"""Ends the processes of a mull that could not: run as a program of its own, which outlives it.

    python -I -S cluster/orphan_guard.py NAME=VALUE

After a `kill -9` of ours, ranks and replicas end within seconds, but Ray's agents try for a minute to report it. Reads
a pipe whose other end is ours alone: it closes when we end, however that happens. Then whoever has NAME=VALUE in its
environment is killed: all that we have started, and all that those have, whenever that was. Some of Ray's agents show
another environment: they are known by the files that they have open in the folder of Ray's session, which we have
written into the pipe. Linux; stands on /proc.
"""

import os
import signal
import sys
import time
from pathlib import Path

NODE_MARK = "MULL_NODE"
"""The variable in the environment of all processes of a Ray of ours."""
ROUNDS = 5
"""Of looking for more: a process may have started another one while it was being killed."""
PAUSE_S = 0.2


def has_open(process: Path, folder: bytes) -> bool:
    """Whether the process has a file open in the folder."""
    return any(os.readlink(bytes(link)).startswith(folder) for link in (process / "fd").iterdir())


def kill_ours(mark: bytes, folder: bytes) -> int:
    """How many there were; without a folder only those with the mark."""
    num_killed = 0
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            is_marked = mark in (directory / "environ").read_bytes().split(b"\0")
            if is_marked or (folder and has_open(directory, folder)):
                os.kill(int(directory.name), signal.SIGKILL)
                num_killed += 1
        except (OSError, ValueError):
            continue  # it has ended, or is not ours
    return num_killed


if __name__ == "__main__":
    # Ctrl-C in a terminal is for the whole process group; it is not what we wait for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    session = sys.stdin.buffer.read()
    for _ in range(ROUNDS):
        kill_ours(sys.argv[1].encode(), session)
        time.sleep(PAUSE_S)
