"""Shows on our stderr what the processes of our own Ray write to theirs, which Ray keeps in a file each.

The files stay the whole truth: this reads them, so that nobody who writes a line waits for who reads it here.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from threading import Event, Thread
from typing import TextIO

from workers.logs import LogFormat

POLL_S = 0.25
STOP_TIMEOUT_S = 5.0
_MARKS = (":job_id:", ":actor_name:", ":task_name:")
"""Ray's own notes in the files, each a line."""


class _Unshown(Exception):
    """Where lines are shown takes no more."""


class LogFollower:
    """Start it once Ray is there; `stop` when all of its processes have ended shows their last lines."""

    def __init__(self, directory: Path, form: LogFormat, out: TextIO | None = None) -> None:
        """`out`: stderr by default."""
        self._directory = directory
        self._form = form
        self._out = out or sys.stderr
        self._offsets: dict[Path, int] = {}
        self._is_stopping = Event()
        self._thread = Thread(target=self._run, name="log follower", daemon=True)

    def start(self) -> None:
        """Follow in the background."""
        self._thread.start()

    def stop(self) -> None:
        """Show what is left. A terminal that takes no more lines is not waited for."""
        self._is_stopping.set()
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            while not self._is_stopping.wait(POLL_S):
                self._show_new()
            self._show_new()
        except _Unshown:
            return  # nobody reads it any more, and there is nowhere left to say so; the files have it all

    def _show_new(self) -> None:
        shown = [line for file in sorted(self._directory.glob("worker-*.err")) for line in self._new_lines(file)]
        try:
            self._out.writelines(line + "\n" for line in shown)
            self._out.flush()
        except (OSError, ValueError) as error:  # ValueError: it is closed
            raise _Unshown from error

    def _new_lines(self, file: Path) -> Iterator[str]:
        offset = self._offsets.get(file, 0)
        try:
            with file.open("rb") as opened:
                if os.fstat(opened.fileno()).st_size < offset:
                    offset = 0  # Ray has begun a new file of this name
                opened.seek(offset)
                new, newline, _ = opened.read().rpartition(b"\n")
        except OSError:
            return  # gone since it was listed, or not to be read now; the next look is soon
        self._offsets[file] = offset + len(new) + len(newline)
        for line in new.decode("utf-8", "replace").splitlines():
            if line and not line.startswith(_MARKS):
                yield self._in_form(line, file)

    def _in_form(self, line: str, file: Path) -> str:
        """A line that is not ours, such as a library's last words, is JSON too where JSON was asked for."""
        if self._form == "text" or line.startswith("{"):
            return line
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"time": time, "level": "WARNING", "process": file.stem, "logger": "stderr", "message": line})
