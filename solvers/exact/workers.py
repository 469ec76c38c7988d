"""Worker processes that are replaced after some tasks, and whose crash costs one task alone.

A worker is a fresh Python interpreter: threads of torch and BLAS do not survive a fork, and the spawn of
`multiprocessing` would run the caller's `__main__` again. It reads pickled tasks from its stdin and writes
pickled answers to its stdout. Neither `concurrent.futures` nor joblib goes on after a crash with only one
task lost, replaces processes, and interrupts a task that then still answers.
"""

from __future__ import annotations

import math
import os
import pickle
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

from maskopt.core.limits import clock
from maskopt.errors import SolverError

#: until it can hand back an incumbent, an interrupt ends it at once and in silence
_MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "from maskopt.solvers.exact.workers import serve; serve()"
)
#: seconds that workers get to hand back their incumbents after an interrupt
_PATIENCE = 20.0
#: seconds between looks for a Ctrl-C that came just as this process fell asleep
_LOOK = 1.0


class WorkerCrash(Exception):
    """The process died while it worked on the task."""


def run_tasks(
    function: Callable[[Any], Any],
    tasks: Sequence[Any],
    *,
    workers: int,
    recycle: int = 512,
    deadline: float = math.inf,
) -> Iterator[tuple[int, Any]]:
    """Yield (index, answer) as tasks finish; an answer is a WorkerCrash where the process died.

    On KeyboardInterrupt the workers are interrupted too; their answers still come, then KeyboardInterrupt is
    raised.

    Args:
        function: importable by its qualified name, takes one task.
        workers: processes at a time, of one thread each.
        recycle: tasks after which a process is replaced (SCIP leaks memory: PySCIPOpt issue 1200).
        deadline: of `clock()`, after which no task is begun or yielded.
    """
    crew = _Crew(function, tasks, recycle, deadline)
    running, interrupted = min(workers, len(tasks)), False
    try:
        crew.start(running)
        while running:
            try:
                index, answer = crew.done.get(timeout=_PATIENCE if interrupted else _LOOK)
            except KeyboardInterrupt:
                interrupted = True
                crew.interrupt()
                continue
            except queue.Empty:
                if interrupted:
                    break
                continue
            if index < 0:
                running -= 1
            elif isinstance(answer, Exception) and not isinstance(answer, WorkerCrash):
                raise answer
            else:
                yield index, answer
    finally:
        crew.stop.set()
        if running:
            crew.kill()
    if interrupted:
        raise KeyboardInterrupt


class _Crew:
    """One thread for each worker process, which hands it tasks and waits for its answers. `done`: (index,
    answer) of finished tasks, and (−1, None) from each thread that ends; `stop`: when set, no further task is
    begun."""

    def __init__(
        self, function: Callable[[Any], Any], tasks: Sequence[Any], recycle: int, deadline: float
    ) -> None:
        self._function, self._tasks = function, tasks
        self._recycle, self._deadline = recycle, deadline
        self._todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in range(len(tasks)):
            self._todo.put(index)
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self.done: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
        self.stop = threading.Event()

    def start(self, count: int) -> None:
        for slot in range(count):
            threading.Thread(target=self._attend, args=(slot,), daemon=True).start()

    def interrupt(self) -> None:
        """Ctrl-C for every worker; what it answers still counts."""
        self.stop.set()
        for process in list(self._processes.values()):
            process.send_signal(signal.SIGINT)

    def kill(self) -> None:
        for process in list(self._processes.values()):
            process.kill()

    def _attend(self, slot: int) -> None:
        process: subprocess.Popen[bytes] | None = None
        served = 0
        while not self.stop.is_set() and clock() < self._deadline:
            try:
                index = self._todo.get_nowait()
            except queue.Empty:
                break
            if process is None or served >= self._recycle:
                _close(process)
                try:
                    process, served = _start(), 0
                except OSError as error:
                    process = None
                    message = (
                        f"a worker process cannot be started: {error.strerror}; free some memory, or run "
                        "fewer of them at a time (`workers`)"
                    )
                    self.done.put((index, SolverError(message)))
                    break
                self._processes[slot] = process
                if self.stop.is_set():  # while it was being started: nobody has interrupted it
                    break
            try:
                assert process.stdin is not None
                assert process.stdout is not None
                _send(process.stdin, (self._function, self._tasks[index]))
                answer = _receive(process.stdout)
                served += 1
            except (EOFError, OSError):
                code = process.wait()
                if self.stop.is_set():  # interrupted before it had begun
                    process = None
                    break
                answer = WorkerCrash(f"the worker process died with exit status {code}")
                process = None
            except Exception as error:  # what cannot be pickled, or read back
                answer = error
            self.done.put((index, answer))
        _close(process)
        self.done.put((-1, None))


def _start() -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        environment[f"{library}_NUM_THREADS"] = "1"  # rows are what runs side by side
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
    """The loop of a worker process: ends when its stdin closes, in the middle of a task too."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    source = sys.stdin.buffer
    # whatever a library prints must not end up among the answers
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            function, task = _receive(source)
            answer = function(task)
        except (EOFError, KeyboardInterrupt):
            return
        except Exception as error:
            answer = error
        _send(sink, answer)


def _end_with_parent() -> None:
    """End this process when its parent is gone, since a killed parent interrupts nothing."""
    if not hasattr(select, "poll"):  # Windows
        return
    stdin = select.poll()
    stdin.register(0, 0)  # of no event but the hang-up, which is always reported
    stdin.poll()
    os._exit(1)
