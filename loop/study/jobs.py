"""The processes of one search on one machine: started, replaced where they die, ended with who started them."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import threading
import time
import traceback
from typing import Any

import torch

from .worker import Job, study_of, trials_of, work

log = logging.getLogger("hookloop")


def spread(job: Job, study: Any, jobs: int, cores: int) -> None:
    """Run trials in so many processes; one that dies is replaced, an error of the program's own ends all."""
    try:
        pickle.dumps(job)
    except Exception as error:
        raise TypeError(f"jobs={jobs} starts processes, which need train, and what it holds, to be found by name in a module "
                        f"({error}); move it there, or start this program several times with one storage") from error  # fmt: skip
    context = multiprocessing.get_context("spawn")
    running: dict[Any, tuple[Any, Any]] = {}

    def start() -> None:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(job, max(1, cores // jobs), theirs), daemon=False)
        process.start()
        theirs.close()
        running[process.sentinel] = process, ours

    try:
        for _ in range(jobs):
            start()
        while running:
            for sentinel in multiprocessing.connection.wait(list(running)):
                process, pipe = running.pop(sentinel)
                process.join()
                if (word := last_word(pipe)) is not None:
                    raise word
                if process.exitcode and process.exitcode > 0:
                    raise RuntimeError(f"a process of the search ended with {process.exitcode}")
                if process.exitcode or trials_of(job, study).open():
                    log.warning("a process of the search ended (%s) before its work; another takes its place", process.exitcode)
                    start()
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join(job.interval)  # it gives its trial back
            process.kill()
            process.join()


def last_word(pipe: Any) -> Any:
    """Return the error with which a process ended, None where it said nothing."""
    try:
        return pipe.recv() if pipe.poll() else None
    except EOFError:
        return None


def child(job: Job, threads: int, pipe: Any) -> None:
    """Work in a process of its own, which ends with the one that started it; a trial that it has then is given back."""
    torch.set_num_threads(threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    threading.Thread(target=outlived, args=(job.interval,), daemon=True).start()
    try:
        work(job, study_of(job))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (Exception, SystemExit) as error:
        traceback.clear_frames(error.__traceback__)
        told: Exception = RuntimeError(f"{type(error).__name__}: {error!s:.4000}")
        with contextlib.suppress(Exception):
            whole = pickle.dumps(error)
            pickle.loads(whole)
            if isinstance(error, Exception) and len(whole) < 2**15:  # a longer one would wait for who reads it
                told = error
        pipe.send(told)
        raise SystemExit(1) from None


def stop(number: int, frame: Any) -> None:
    """End the trial, once: a second signal must not cut off that it is given back."""
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def outlived(seconds: float) -> None:
    """Stop when the process that started this one is gone, however it ended; what does not heed that is ended later."""
    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(seconds)
        os._exit(1)
