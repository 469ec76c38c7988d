"""Worker processes that are recycled, and whose crash costs one task alone.

A worker is a fresh Python interpreter (no fork: torch's and BLAS' threads do not survive one; no
`multiprocessing` spawn: that would run the caller's `__main__` again). It reads pickled tasks from
its stdin and writes pickled answers to its stdout; both ends are this program.

Written by hand because neither `concurrent.futures` nor joblib does all three: go on after a crash with
only the crashed task lost, replace a process after so many tasks, and interrupt a task that then still
answers.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

_MAIN = "from maskopt.solvers.exact.workers import serve; serve()"
#: seconds that workers get to hand back their incumbents after an interrupt
_PATIENCE = 20.0


class WorkerCrash(Exception):
    """The process died while it worked on the task."""


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    workers: int,
    recycle: int = 32,
    threads: int = 1,
    deadline: float = math.inf,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, answer) as tasks finish; an answer is a WorkerCrash where the process died.

    Args:
        function: importable by its qualified name (pickle's rule), takes one task.
        workers: processes at a time.
        recycle: tasks after which a process is replaced (SCIP leaks memory: PySCIPOpt issue 1200).
        threads: what OMP_NUM_THREADS is set to in each process.
        deadline: of `time.monotonic()`, after which no task is begun; those are not yielded.

    On KeyboardInterrupt the workers are interrupted too; their answers still come, tasks that had
    not begun do not, and the generator ends by raising KeyboardInterrupt.
    """
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    for index in range(len(tasks)):
        todo.put(index)
    processes: dict[int, subprocess.Popen[bytes]] = {}
    stop = threading.Event()

    def attend(slot: int) -> None:
        process: subprocess.Popen[bytes] | None = None
        served = 0
        while not stop.is_set() and time.monotonic() < deadline:
            try:
                index = todo.get_nowait()
            except queue.Empty:
                break
            if process is None or served >= recycle:
                _close(process)
                process, served = _start(threads), 0
                processes[slot] = process
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                _send(process.stdin, (function, tasks[index]))
                answer = _receive(process.stdout)
                served += 1
            except (EOFError, OSError):
                code = process.wait()
                answer = WorkerCrash(f"the worker process died with exit status {code}")
                process = None
            except Exception as error:  # what cannot be pickled, or read back
                answer = error
            done.put((index, answer))
        _close(process)
        done.put((-1, None))

    count = min(workers, len(tasks))
    attendants = [threading.Thread(target=attend, args=(k,), daemon=True) for k in range(count)]
    for attendant in attendants:
        attendant.start()
    running, interrupted = count, False
    try:
        while running:
            try:
                index, answer = done.get(timeout=_PATIENCE if interrupted else None)
            except KeyboardInterrupt:
                interrupted = True
                stop.set()
                for process in list(processes.values()):
                    if process.poll() is None:
                        process.send_signal(signal.SIGINT)
                continue
            except queue.Empty:
                break
            if index < 0:
                running -= 1
            elif isinstance(answer, Exception) and not isinstance(answer, WorkerCrash):
                raise answer
            else:
                yield index, answer
    finally:
        stop.set()
        for process in list(processes.values()):
            if process.poll() is None and running:
                process.kill()
    if interrupted:
        raise KeyboardInterrupt


def _start(threads: int) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        environment[variable] = str(threads)
    environment["NUMBA_NUM_THREADS"] = str(threads)
    return subprocess.Popen(
        [sys.executable, "-c", _MAIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        start_new_session=True,  # Ctrl-C reaches the worker once, through its parent
    )


def _close(process: subprocess.Popen[bytes] | None) -> None:
    if process is not None:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _send(stream: IO[bytes], thing: Any) -> None:
    data = pickle.dumps(thing)
    stream.write(struct.pack("<Q", len(data)) + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    head = stream.read(8)
    if len(head) < 8:
        raise EOFError
    (size,) = struct.unpack("<Q", head)
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return pickle.loads(data)


def serve() -> None:
    """The loop of a worker process: ends when its stdin closes."""
    source = sys.stdin.buffer
    # whatever a library prints must not end up among the answers
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    while True:
        try:
            function, task = _receive(source)
            answer = function(task)
        except (EOFError, KeyboardInterrupt):
            return
        except Exception as error:
            answer = error
        _send(sink, answer)
