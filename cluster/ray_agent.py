"""Stands for an agent of Ray's that nobody here asks: a program of its own, which Ray's raylet starts.

    python -I -S cluster/ray_agent.py SESSION PORT_NAME...

The raylet takes no worker before its agents have written their ports, for which Ray's own import all of Ray, and ends
where one of them ends. This one writes that it has no ports, and ends with the raylet.
"""

import os
import sys
import time
from pathlib import Path

NO_PORT = "-1"
PAUSE_S = 1.0


def write_port(session: Path, name: str, node_id: str) -> None:
    """Ray reads the file as soon as it is there."""
    path = session / f"{name}_{node_id}"
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(NO_PORT)
    unfinished.rename(path)


if __name__ == "__main__":
    raylet = os.getppid()
    for name in sys.argv[2:]:
        write_port(Path(sys.argv[1]), name, os.environ["RAY_NODE_ID"])
    while os.getppid() == raylet:
        time.sleep(PAUSE_S)
