"""Worker processes that are replaced after so many tasks, and whose crash costs one task alone.

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
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO, Any

from maskopt.core.clock import clock
from maskopt.core.threads import end_with
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
        deadline: of `clock()`, after which no task is begun.
    """
    crew, interrupted, left = _Crew(function, recycle, deadline), False, len(tasks)
    done: queue.SimpleQueue[tuple[int, Future[Any]]] = queue.SimpleQueue()
    pool = ThreadPoolExecutor(max(1, min(workers, left)))
    try:
        for index, task in enumerate(tasks):
            future = pool.submit(crew.answer, task)
            future.add_done_callback(lambda future, index=index: done.put((index, future)))  # type: ignore[misc]
        while left:
            try:
                index, future = done.get(timeout=_PATIENCE if interrupted else _LOOK)
            except KeyboardInterrupt:
                interrupted = True
                crew.interrupt()
                continue
            except queue.Empty:
                if interrupted:
                    break
                continue
            left -= 1
            if (answer := future.result()) is not None:
                yield index, answer
    finally:
        crew.end()
        pool.shutdown(wait=False, cancel_futures=True)
    if interrupted:
        raise KeyboardInterrupt


class _Crew:
    """One process for each thread that asks for answers. `stop`: when set, no further task is begun."""

    def __init__(self, function: Callable[[Any], Any], recycle: int, deadline: float) -> None:
        self._function, self._recycle, self._deadline = function, recycle, deadline
        #: thread → its process, and the tasks that this has had
        self._running: dict[int, tuple[subprocess.Popen[bytes], int]] = {}
        self.stop = threading.Event()

    def interrupt(self) -> None:
        """Send Ctrl-C to every worker; its answer still counts."""
        self.stop.set()
        for process, _ in list(self._running.values()):
            process.send_signal(signal.SIGINT)

    def end(self) -> None:
        self.stop.set()
        for process, _ in list(self._running.values()):
            process.kill()
            process.wait()

    def answer(self, task: Any) -> Any:
        """Answer a task by the process of this thread; None where the task is not begun any more."""
        if self.stop.is_set() or clock() >= self._deadline:
            return None
        process = self._process()
        if self.stop.is_set():  # while it was being started: nobody has interrupted it
            process.kill()
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            _send(process.stdin, (self._function, task))
            answer = pickle.load(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError):
            code = process.wait()
            del self._running[threading.get_ident()]
            if self.stop.is_set():  # interrupted before it had begun
                return None
            return WorkerCrash(f"the worker process died with exit status {code}")
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _process(self) -> subprocess.Popen[bytes]:
        thread = threading.get_ident()
        process, served = self._running.get(thread, (None, 0))
        if process is not None and served >= self._recycle:
            process.communicate()  # closes its stdin, which ends it
            process, served = None, 0
        process = process or _start()
        self._running[thread] = process, served + 1
        return process


def _start() -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        environment[f"{library}_NUM_THREADS"] = "1"  # rows are what runs side by side
    try:
        return subprocess.Popen(
            [sys.executable, "-c", _MAIN, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches the worker once, through its parent
        )
    except OSError as error:
        raise SolverError(
            f"a worker process cannot be started: {error.strerror}; free some memory, or run fewer of them "
            "at a time (`workers`)"
        ) from error


def _send(stream: IO[bytes], message: Any) -> None:
    stream.write(pickle.dumps(message))
    stream.flush()


def serve() -> None:
    """Serve tasks in a worker process, until its stdin closes, or in a task its parent ends."""
    end_with(int(sys.argv[1]))
    source = sys.stdin.buffer
    # nothing that a library prints may end up among the answers
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            function, task = pickle.load(source)
            answer = function(task)
        except (EOFError, KeyboardInterrupt):
            return
        except Exception as error:
            answer = error
        _send(sink, answer)
