"""Ends the processes of a mull that could not: run as a program of its own, which outlives it.

    python -I -S cluster/orphan_guard.py NAME=VALUE

After a `kill -9` of ours, ranks and replicas end within seconds, but Ray's agents try for a minute to report it. Reads
a pipe whose other end is ours alone: it closes when we end, however that happens. Then whoever has NAME=VALUE in its
environment is killed: all that we have started, and all that those have, whenever that was. Linux; stands on /proc.
"""

import os
import signal
import sys
import time
from pathlib import Path

ROUNDS = 5
"""Of looking for more: a process may have started another one while it was being killed."""
PAUSE_S = 0.2


def kill_marked(mark: bytes) -> int:
    """How many there were."""
    num_killed = 0
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (directory / "environ").read_bytes().split(b"\0"):
                os.kill(int(directory.name), signal.SIGKILL)
                num_killed += 1
        except (OSError, ValueError):
            continue  # it has ended, or is not ours
    return num_killed


if __name__ == "__main__":
    # Ctrl-C in a terminal is for the whole process group; it is not what we wait for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    for _ in range(ROUNDS):
        kill_marked(sys.argv[1].encode())
        time.sleep(PAUSE_S)
