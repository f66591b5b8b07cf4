"""Two real processes over gloo that wait for jobs: starting them costs seconds, a job costs what it does."""

from __future__ import annotations

import datetime
import multiprocessing
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

GRACE = 5.0  # seconds


class JobError(AssertionError):
    """A job failed on some rank; its traceback."""


def _serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=60),
    )
    while True:
        job, args = pipe.recv()
        torch.manual_seed(0)
        try:
            answer: tuple[bool, Any] = True, job(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send(answer)


class Ranks:
    """``size`` processes with a group, started when a job needs them and again after one that failed."""

    def __init__(self, size: int = 2) -> None:
        self.size = size
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def run(self, job: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
        """What ``job(*args)``, a function of a module, returns on each rank.

        Raises:
            JobError: it raised on a rank, ended its process, or took too long.
        """
        if not self.processes:
            self._start()
        for pipe in self.pipes:
            pipe.send((job, args))
        answers: dict[int, Any] = {}
        errors: dict[int, str] = {}
        while len(answers) < self.size:
            waiting = [pipe for i, pipe in enumerate(self.pipes) if i not in answers]
            ready = wait(
                waiting, GRACE if errors else timeout
            )  # behind an error the others may wait for what will not come
            if not ready and not errors:
                errors[self.pipes.index(waiting[0])] = f"{job.__name__} took longer than {timeout} s"
            if not ready:
                break
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    good, answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    good, answers[rank] = False, f"ended in {job.__name__}"
                if not good:
                    errors[rank] = answers[rank]
        if errors:
            self.close()  # what the ranks were about to send to each other must not reach the next job
            raise JobError("\n".join(f"rank {rank}: {said}" for rank, said in errors.items()))
        return [answers[rank] for rank in range(self.size)]

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self.pipes, self.processes = [], []
