"""What worker processes of tests import and run: as little as can be, since each of them imports it anew."""

import os
import signal
import time


def die_on_seven(task):
    if task == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task, os.getpid()


def say_so_and_stay(task):
    os.write(2, b"at work")
    while True:
        time.sleep(task)


def lie(task):
    """Of a row: its start with a bound above what that costs."""
    from maskopt.solvers.exact.tasks import RowAnswer

    return RowAnswer(task.start, "optimal", bound=2 * task.cost(task.start))
