"""A command that torchrun starts several times: `torchrun --nproc-per-node N -m maskopt prune …`.

Rank 0 prints; of an error, whoever met it first.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maskopt.models.blockwise.distributed import Ranks

#: that torchrun sets for every process
_RUN, _SIZE, _ON_THIS_MACHINE = "TORCHELASTIC_RUN_ID", "WORLD_SIZE", "LOCAL_WORLD_SIZE"

_ranks: Any = None
#: what ended the run is being reported
_ending = False


def ranks() -> Ranks:
    """Those of this run."""
    from maskopt.models.blockwise.distributed import ALONE

    return _ranks or ALONE


def several() -> bool:
    """Did torchrun start more than one process?"""
    return _RUN in os.environ and int(os.environ.get(_SIZE, "1")) > 1


@contextmanager
def launched() -> Iterator[None]:
    """Take one's place among the processes, where there are several."""
    global _ranks
    if not several():
        yield
        return
    from maskopt.models.blockwise.distributed import joined

    signal.signal(signal.SIGTERM, _interrupt)  # torchrun ends the others so when one ended
    with joined() as _ranks, open(os.devnull, "w") as nowhere:
        said = sys.stderr
        if not _ranks.leads:
            sys.stdout = sys.stderr = nowhere
        try:
            yield
        except Exception:
            if speaks():
                traceback.print_exc(file=said)
            raise SystemExit(1) from None
        finally:
            sys.stdout, sys.stderr = sys.__stdout__, said


def speaks() -> bool:
    """May this process say that, and why, the run ends? The first that asks may, and from then on no other;
    its words go to where they can be read."""
    global _ending
    _ending = True
    if _ranks is None or _ranks.size == 1:
        return True
    from torch.distributed import distributed_c10d

    me = str(_ranks.rank)
    try:
        store = distributed_c10d._get_default_store()
        first = store.compare_set("maskopt/speaks", "", me).decode() == me
    except RuntimeError:  # whoever keeps the store has ended, too
        first = _ranks.leads
    if first and sys.__stderr__ is not None:
        sys.stderr = sys.__stderr__
    return bool(first)


def again(*more: str) -> str:
    """The command line as it was typed, and some words."""
    typed = [word for word in sys.argv[1:] if word not in ("--resume", "--overwrite")]
    words = ["maskopt", *typed, *more]
    if several():
        here, all_of_them = os.environ.get(_ON_THIS_MACHINE), os.environ.get(_SIZE)
        launcher = (
            ["torchrun", "--nproc-per-node", here] if here == all_of_them else ["torchrun", "…"]
        )
        words = [*launcher, "-m", *words]
    return shlex.join(words)


def _interrupt(*_: object) -> None:
    # torchrun's signal may come while this process reports that another is gone: it ends by itself then
    if not _ending:
        raise KeyboardInterrupt
