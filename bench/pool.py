"""Jobs in processes of their own, several at a time: one bar, stopped by signals, failures told.

A folder of results is one pool's at a time. What a job has finished is its own to know: a pool that
is started again goes on with those that are not done.
"""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from tqdm import tqdm

from posenc.training.lock import hold
from posenc.training.signals import StopSignals


class Job(Protocol):
    """Something to be done, of so many steps; its `str` names it."""

    @property
    def log(self) -> Path:
        """Where its output goes."""

    @property
    def total(self) -> int:
        """Steps in all."""

    def steps(self) -> int:
        """Steps taken so far."""

    def done(self) -> bool:
        """Whether nothing is left to do."""

    def work(self) -> None:
        """Do it, in a process of its own. What is raised, or another exit code, is a failure."""


Any_job = TypeVar("Any_job", bound=Job)


def cores() -> int:
    """Of the processor, that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """One bar over the steps of all jobs; plain lines now and then where there is no terminal."""

    def __init__(self, total: int, done: int, every: float = 30.0) -> None:
        self._total, self._done, self._every = total, done, every
        self._start = self._last = time.perf_counter()
        self._bar = tqdm(
            total=total, initial=done, unit="step", smoothing=0, disable=not sys.stderr.isatty()
        )

    def show(self, steps: int, what: str) -> None:
        """So many steps are done, and this is going on."""
        now = time.perf_counter()
        if not self._bar.disable:
            self._bar.n = steps
            self._bar.set_postfix_str(what)
        elif now - self._last >= self._every:
            self._last = now
            sizes = {"n": steps, "total": self._total, "initial": self._done}
            elapsed = now - self._start
            line = tqdm.format_meter(elapsed=elapsed, unit="step", postfix=what, ncols=0, **sizes)
            print(line.strip(), file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line above the bar."""
        self._bar.write(line, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


class Stopped(Exception):
    """A signal, whose number it holds."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """A folder of results, made where it is new, and no other pool's meanwhile.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with hold(folder):
        yield


def run(jobs: Sequence[Any_job], *, at_once: int, threads: int) -> list[Any_job]:
    """Do what is not done; the jobs that failed.

    Args:
        threads: of each job.

    Raises:
        Stopped: by a signal; what was running was told to stop.
    """
    waiting = [job for job in jobs if not job.done()]
    running: dict[Any_job, BaseProcess] = {}
    begins: dict[Any_job, int] = {}  # where in its log
    failed: list[Any_job] = []
    settled = {job: job.total for job in jobs if job not in waiting}
    total = sum(job.total for job in jobs)
    process_of = process_type(type(job) for job in waiting)
    with StopSignals() as signals:
        bar = Progress(total, sum(settled.values()) + sum(job.steps() for job in waiting))
        try:
            while running or (waiting and not signals.received):
                while len(running) < at_once and waiting and not signals.received:
                    job = waiting.pop(0)
                    begins[job] = job.log.stat().st_size if job.log.exists() else 0
                    process = process_of(target=work, args=(job, threads))
                    process.start()
                    running[job] = process
                if signals.received:
                    for process in running.values():
                        process.terminate()
                wait([process.sentinel for process in running.values()], timeout=0.5)
                for job, process in list(running.items()):
                    if process.exitcode is not None:
                        del running[job]
                        settled[job] = job.steps()
                        if process.exitcode and not signals.received:
                            failed.append(job)
                            why = reason(job.log, begins[job], process.exitcode)
                            bar.say(f"{job} failed: {why}")
                now = sum(settled.values()) + sum(job.steps() for job in [*running, *waiting])
                done = len(jobs) - len(waiting) - len(running) - len(failed)
                bar.show(now, f"{done} of {len(jobs)} runs")
        finally:
            bar.close()
            for process in running.values():
                process.terminate()
                process.join()
        if signals.received and not all(job.done() for job in jobs):
            raise Stopped(signals.received)
    return failed


def process_type(kinds: Iterable[type]) -> Callable[..., BaseProcess]:
    """What makes the processes of jobs of these types.

    On Linux they are forks of one that has imported what the jobs need, which takes seconds, and
    computes nothing. Elsewhere, where libraries do not bear forks, each imports it anew.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn").Process
    context = multiprocessing.get_context("forkserver")
    # Not __main__: each process runs it anew, and where it had been imported under its own name,
    # Python would warn of that in every one. What takes long, torch and the trainer, is there.
    needed = {kind.__module__ for kind in kinds} - {"__main__"}
    context.set_forkserver_preload([f"{__package__}.deaf", "posenc.training.main", *needed])
    return context.Process


def work(job: Job, threads: int) -> None:
    """Do a job, with what it says in its log."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the pool, which hears it too, says when to stop
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(threads)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    job.work()


def reason(log: Path, begin: int, code: int) -> str:
    """Why a process ended whose log begins at a byte.

    That is its last error: a trainer that outlived its grid may still draw its bar there.
    """
    text = log.read_bytes()[begin:].decode(errors="replace") if log.exists() else ""
    lines = [line.strip() for line in re.split(r"[\r\n]", text)]
    lines = [line for line in lines if line and not re.match(r"\d+%\|", line)]
    errors = [line for line in lines if line.startswith("error: ")]
    why = (errors or lines or [f"exit code {code}"])[-1] if code > 0 else f"ended by signal {-code}"
    return f"{why} (all of it: {log})"
