"""What Ray keeps in files is shown, each line once and in the form that was asked for."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.log_follower import LogFollower
from workers.logs import LogFormat


def followed(directory: Path, form: LogFormat) -> tuple[LogFollower, io.StringIO]:
    out = io.StringIO()
    return LogFollower(directory, form, out), out


def until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline_s, "waited 60 s"
        time.sleep(0.01)


def test_lines_of_all_processes_are_shown_and_rays_notes_are_not(tmp_path: Path) -> None:
    (tmp_path / "worker-a.err").write_text(":job_id:01\none\ntwo\n")
    (tmp_path / "worker-b.err").write_text("three\n:actor_name:Gateway\n")
    (tmp_path / "worker-b.out").write_text("not a log\n")
    follower, out = followed(tmp_path, "text")

    follower.start()
    follower.stop()

    assert out.getvalue() == "one\ntwo\nthree\n"


def test_lines_that_come_later_are_shown_once_and_only_whole(tmp_path: Path) -> None:
    file = tmp_path / "worker-a.err"
    file.write_text("one\nhal")
    follower, out = followed(tmp_path, "text")

    follower.start()
    until(out.getvalue)
    assert out.getvalue() == "one\n"
    with file.open("a") as more:
        more.write("f\ntwo\n")
    follower.stop()

    assert out.getvalue() == "one\nhalf\ntwo\n"


def test_a_file_that_goes_after_it_was_listed_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "worker-a.err").symlink_to(tmp_path / "gone")
    (tmp_path / "worker-b.err").write_text("one\n")
    follower, out = followed(tmp_path, "text")

    follower.start()
    follower.stop()

    assert out.getvalue() == "one\n"


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_it_ends_where_nobody_reads_it_any_more(tmp_path: Path) -> None:
    (tmp_path / "worker-a.err").write_text("one\n")
    follower, out = followed(tmp_path, "text")
    out.close()

    follower.start()

    until(lambda: "log follower" not in {thread.name for thread in threading.enumerate()})
    follower.stop()


def test_a_line_that_is_not_json_becomes_json(tmp_path: Path) -> None:
    ours = json.dumps({"message": "ours"})
    (tmp_path / "worker-a.err").write_text(f'{ours}\na library says "so"\n')
    follower, out = followed(tmp_path, "json")

    follower.start()
    follower.stop()

    first, second = map(json.loads, out.getvalue().splitlines())
    assert first == {"message": "ours"}
    assert (second["message"], second["process"]) == ('a library says "so"', "worker-a")
