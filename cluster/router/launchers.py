"""How a rank comes to life: as a local process, or as a Ray actor in the Router's placement group.

Hop 6, at the start and the end of a group only: plans never pass here. A launcher starts one rank and gives a handle
that says how it ended and can end it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec

from cluster.config import is_loopback_host
from cluster.errors import EngineError
from cluster.orphan_guard import NODE_MARK
from cluster.router.gather import RankEnd
from workers.layout import ParallelLayout
from workers.logs import LogFormat
from workers.shard import GROUP_LOST, ShardActor, ShardConfig

log = logging.getLogger(__name__)


def worker_environment() -> dict[str, Any]:
    """Ray's runtime_env of a worker that is what the machine is for: by default Ray runs workers at nice 15.

    Ray of ours, where all run so, needs none: workers that it has started before they are asked for will do.
    """
    import ray

    is_ours = NODE_MARK in os.environ
    # One at another address may be joined by nodes that others start.
    is_alone = is_loopback_host(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]  # Ray has no types there
    return {} if is_ours and is_alone else {"env_vars": {"RAY_worker_niceness": "0"}}


class RankHandle(Protocol):
    """One started rank."""

    @property
    def rank(self) -> int: ...

    async def restart(self, config: ShardConfig) -> None:
        """Let it join another group with the weights it has. Does nothing when it has ended."""

    async def wait(self) -> RankEnd:
        """Returns when the rank has ended. May be called again."""

    def terminate(self) -> None:
        """Ask the operating system to end it. Does nothing when it has ended."""

    def kill(self) -> None:
        """End it. Does nothing when it has ended."""


class Launcher(Protocol):
    """Starts ranks somewhere."""

    @property
    def host(self) -> str | None:
        """The address at which ranks reach this process; None: they are its children on the same machine."""

    @property
    def settle_s(self) -> float:
        """How long after the first sign of a loss the others' signs may come: the right rank is blamed then."""

    async def launch(self, config: ShardConfig) -> RankHandle: ...


class ProcessLauncher:
    """Ranks as children of this process. Their stdout and stderr go to our stderr."""

    host: str | None = None
    settle_s = 0.2

    def __init__(self, command: Sequence[str] = (sys.executable, "-m", "workers.shard")) -> None:
        self._command = command

    async def launch(self, config: ShardConfig) -> ProcessHandle:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=2,
            env=_environment(config),
            start_new_session=True,  # the terminal's Ctrl-C is for the server, which then stops its ranks
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        return ProcessHandle(config.runner.rank, process)


class ProcessHandle:
    """A child process. Its stdin stays open as long as this lives: the rank ends when it closes."""

    def __init__(self, rank: int, process: asyncio.subprocess.Process) -> None:
        self.rank = rank
        self._process = process

    async def restart(self, config: ShardConfig) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(config) + b"\n")

    async def wait(self) -> RankEnd:
        return end_of(await self._process.wait())

    def terminate(self) -> None:
        if self._process.returncode is None:
            self._process.terminate()

    def kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()


def end_of(status: int) -> RankEnd:
    """What a process's exit status says; a signal's is negative."""
    if status >= 0:
        return RankEnd(f"exited with status {status}", was_killed=False)
    name = signal.Signals(-status).name
    return RankEnd(f"was killed by {name}", was_killed=name in ("SIGKILL", "SIGTERM"))


def _environment(config: ShardConfig) -> Mapping[str, str]:
    """Each local rank sees its own GPU. Raises EngineError where there are fewer than ranks."""
    environment = dict(os.environ)
    if config.runner.device == "cuda":
        visible = [device for device in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if device]
        rank, world = config.runner.rank, config.runner.layout.world_size
        if visible and len(visible) < world:
            raise EngineError(
                f"{world} ranks need a GPU each, CUDA_VISIBLE_DEVICES names {len(visible)}; lower tp or dp"
            )
        environment["CUDA_VISIBLE_DEVICES"] = visible[rank] if visible else str(rank)
    return environment


def ranks_per_bundle(layout: ParallelLayout) -> int:
    """Ranks that must share a node: those of an attention group, which meet twice in every layer, where there are
    several groups to be spread; a single group may be larger than a node."""
    return layout.tp if layout.dp > 1 else 1


class RayLauncher:
    """Ranks as actors in the placement group of the Serve replica that calls this: bundle 0 is the Router's own."""

    settle_s = 0.5  # Ray tells of a death on another node later than the other ranks do

    def __init__(self, log_format: LogFormat = "text") -> None:
        import ray

        self.host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray has no types there
        self._log_format = log_format

    async def launch(self, config: ShardConfig) -> ActorHandle:
        import ray
        from ray.util import get_current_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        group = get_current_placement_group()
        if group is None:
            raise EngineError("ranks start in the placement group of the Router's replica, and there is none")
        bundle = 1 + config.runner.rank // ranks_per_bundle(config.runner.layout)
        actor: Any = (
            ray.remote(ShardActor)
            .options(
                num_cpus=1,
                num_gpus=1 if config.runner.device == "cuda" else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
                runtime_env=worker_environment(),
            )
            .remote(self._log_format)
        )
        return ActorHandle(config.runner.rank, actor, actor.run.remote(config))


class ActorHandle:
    """An actor with one call for each group that it joins."""

    def __init__(self, rank: int, actor: Any, running: Any) -> None:
        self.rank = rank
        self._actor = actor
        self._running = running
        self._was_killed = asyncio.Event()

    async def restart(self, config: ShardConfig) -> None:
        # The actor makes one call after another: this one begins when the rank has left its old group.
        self._running = self._actor.run.remote(config)

    async def wait(self) -> RankEnd:
        from ray.exceptions import RayError

        try:
            status = await self._running
        except RayError as error:
            log.error("rank %d lost its actor: %s", self.rank, error)
            return RankEnd(f"lost its actor ({type(error).__name__}); Ray's log says why", was_killed=True)
        if status == GROUP_LOST:
            await self._was_killed.wait()
        return RankEnd(f"ended with status {status}", was_killed=False)

    def terminate(self) -> None:
        self.kill()

    def kill(self) -> None:
        import ray

        ray.kill(self._actor, no_restart=True)
        self._was_killed.set()
