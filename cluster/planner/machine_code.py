"""The simulation as machine code: mypyc makes it of the very modules that serve, once, until one of them changes.

A copy of our packages lies in the user's cache, with a library beside each module that is worth it; Python takes that
one where the copy comes first on its path. Installed packages are never touched: what serves is what is read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import cluster
import workers
from cluster.errors import ConfigError
from cluster.planner import sim_copy

MODULES = {
    "cluster/gateway": ("affinity", "choice"),
    "cluster/planner": (
        "ahead",
        "doors",
        "fast_forward",
        "fillers",
        "fleet",
        "flights",
        "roofline",
        "sim_copy",
        "step_shape",
    ),
    "cluster/router": (
        "admission",
        "blocks",
        "copy_scheduler",
        "drafter",
        "engine_core",
        "fetches",
        "host_tier",
        "in_flight",
        "pace",
        "quarantine",
        "scheduler",
        "sequence",
        "slots",
        "speculation",
        "step_builder",
        "waiting",
    ),
}
"""By the profile. Not those whose frozen objects travel between processes: mypyc's cannot be pickled."""

_TIMEOUT_S = 900.0
_UNFINISHED = "unfinished-"
_SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup

files = sys.argv.pop().split(",")
setup(name="mull-machine-code", packages=[], ext_modules=mypycify(["--ignore-missing-imports", *files], opt_level="3"))
"""


def is_in_use() -> bool:
    """This process simulates with it."""
    return Path(sim_copy.__file__).suffix != ".py"


def begin_again() -> NoReturn:
    """This command in the same process, with machine code. Raises ConfigError where it cannot be made."""
    environ = environment()
    first = environ["PYTHONPATH"].partition(os.pathsep)[0]
    if sys.path[0] == first:  # this process was begun with it: the next would be no other
        raise ConfigError(f"--compile: Python does not take what lies in {first}; delete it and try again")
    os.execve(sys.executable, [sys.executable, "-P", "-m", "cluster.cli", *sys.argv[1:]], environ)


def environment() -> dict[str, str]:
    """Of a process that shall simulate with it, to be started with `python -P`. Compiles where that was not done yet.

    Raises ConfigError where it cannot be made.
    """
    directory = _made()
    before = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": str(directory) if before is None else f"{directory}{os.pathsep}{before}"}


def _made() -> Path:
    packages = [Path(package.__path__[0]) for package in (cluster, workers)]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mull" / "machine-code"
    directory = cache / key_of(packages)
    if directory.is_dir():
        return directory
    print("mull plan: compiling the simulation, a minute, once …", file=sys.stderr)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        with tempfile.TemporaryDirectory(dir=cache, prefix=_UNFINISHED) as temporary:
            whole = Path(temporary) / "whole"
            for package in packages:
                shutil.copytree(package, whole / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            _compile(whole)
            _put(whole, directory)
    except OSError as error:
        raise ConfigError(f"--compile: {error}; set XDG_CACHE_HOME to a directory that can be written") from error
    return directory


def _sweep(cache: Path) -> None:
    """Remove what killed processes left; what is younger may be somebody's work still."""
    for left in cache.glob(f"{_UNFINISHED}*"):
        if time.time() - left.stat().st_mtime > _TIMEOUT_S:
            shutil.rmtree(left, ignore_errors=True)


def _put(whole: Path, directory: Path) -> None:
    """Under its name at once. Another process may have been faster: then that one's is taken."""
    try:
        whole.rename(directory)
    except OSError:
        if not directory.is_dir():
            raise


def key_of(packages: list[Path]) -> str:
    """Changes with every source, with Python, the processor's kind and the compiler."""
    suffix = EXTENSION_SUFFIXES[0]  # names Python's version, the system and the processor
    digest = hashlib.sha256(f"{sys.implementation.cache_tag} {suffix} {_mypyc_version()}".encode())
    for package in packages:
        for file in sorted(package.rglob("*.py")):
            digest.update(f"{package.name}/{file.relative_to(package)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def _mypyc_version() -> str:
    try:
        return version("mypy")
    except PackageNotFoundError as error:
        raise ConfigError("--compile: mypyc is not installed; pip install 'mull[compile]', or leave it out") from error


def _compile(whole: Path) -> None:
    """Libraries beside the modules of this copy."""
    files = [f"{package}/{name}.py" for package, names in MODULES.items() for name in names]
    command = [sys.executable, "-c", _SETUP, "build_ext", "--inplace", ",".join(files)]
    try:
        done = subprocess.run(command, cwd=whole, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"--compile: not done after {_TIMEOUT_S:.0f} s; leave it out") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ConfigError(
            f"--compile: {said[-1] if said else f'exit status {done.returncode}'}; it needs a C compiler and Python's "
            "headers (Debian: gcc, python3-dev): install them, or leave it out"
        )
    for what_was_needed in ("build", ".mypy_cache"):
        shutil.rmtree(whole / what_was_needed, ignore_errors=True)  # MYPY_CACHE_DIR may have put it elsewhere
