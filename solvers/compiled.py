"""Compiled loops: how they are compiled, where the machine code is kept, and rows in threads of their own.

Numba keeps it next to the source, so that every installation compiles again, and looks at the one file that
holds the loop, so that it is blind to changes of what the loop calls. Here it is kept in the user's cache
folder (or NUMBA_CACHE_DIR) under the hash of the loop's file and of all files of maskopt.solvers that this
imports: it survives a reinstallation, serves several installations at once, and is never stale. Numba
itself sees to the rest: its version, Python's, and the processor are part of its own key. Where its
insides have changed, or the folder cannot be written to, Numba does what it does by itself.

The first compilation in a process is reported to the logger `maskopt.compile`, since it is worth some seconds
of waiting; loading what is kept is not.

A loop over rows takes its arrays, then the rows that it is to work on, and releases the interpreter's lock.
Rows share nothing but what is read, so that no bit depends on how many threads there are. (Numba's own
`prange` would share a threading runtime with torch, change torch's number of threads, and take several times
as long to compile.)
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba.core.registry import CPUDispatcher
from platformdirs import user_cache_path
from threadpoolctl import ThreadpoolController

from maskopt.core.limits import clock

_log = logging.getLogger("maskopt.compile")
#: the message for the logger
NOTICE = "compiling once …"
#: the release of Numba whose insides `_pipelines` knows; with any other it compiles as Numba does by itself
_KNOWN = (0, 68)
_ROOT = Path(__file__).parent
_IMPORT = re.compile(r"^\s*from maskopt\.solvers\.([\w.]+) import", re.MULTILINE)
#: rows of one piece at least, so that each tile of G that is brought in serves several
_LEAST = 4
#: pieces a thread at most: each costs the interpreter some time, and a slow row holds up little
_PIECES = 3


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """A loop that Python calls: numba.njit with those options, its machine code kept as described above."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = _njit("loop", options)(function)
        try:
            compiled._cache = _kept_by_source(function)
        except Exception as error:  # what Numba does inside is its own affair, and may change
            _log.debug("%s: kept by Numba itself (%s)", function.__qualname__, error)
            with suppress(
                RuntimeError
            ):  # no folder that can be written to: compile in every process
                compiled.enable_caching()
        compiled.__class__ = _Loop
        return compiled

    return decorate


def part(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """What only loops call, and is kept as part of them: without what Python would need to call it, and
    optimised but not translated by itself. It is a function in the machine code too, never inlined.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = _njit("part", {"no_cpython_wrapper": True, **options})(function)
        compiled.__class__ = _Part
        return compiled

    return decorate


def _njit(kind: str, options: dict[str, Any]) -> Any:
    return numba.njit(**{"no_cfunc_wrapper": True, **_pipelines().get(kind, {}), **options})


class _Loop(CPUDispatcher):
    """While a loop is compiled or loaded, the clock of solvers stands still, and there is no garbage
    collection, which takes a tenth of the time. A Ctrl-C while Numba makes Python objects of results arrives
    as KeyboardInterrupt."""

    def compile(self, sig: Any) -> Any:
        collects = gc.isenabled()
        gc.disable()
        try:
            with clock.stopped():
                return super().compile(sig)
        finally:
            if collects:
                gc.enable()

    def __call__(self, *arguments: Any) -> Any:
        try:
            return super().__call__(*arguments)
        except SystemError as error:
            # "returned a result with an exception set", once or twice over
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, KeyboardInterrupt):
                cause = cause.__cause__
            if cause is None:
                raise
            raise cause from None


class _Part(CPUDispatcher):
    def __call__(self, *arguments: Any) -> Any:
        raise TypeError(f"{self.py_func.__qualname__} is part of compiled loops: call those")


@cache
def _pipelines() -> dict[str, Any]:
    """Options under which a loop and a part are optimised once; none where Numba has other insides than is
    known here."""
    if numba.version_info.short != _KNOWN:
        return {}
    from numba.core.codegen import JITCodeLibrary
    from numba.core.compiler import Compiler

    class Library(JITCodeLibrary):
        """One run of LLVM's passes, and only over what is new: parts are linked in behind it."""

        def add_linking_library(self, library: Any) -> None:
            if not isinstance(library, PartLibrary):
                super().add_linking_library(library)
                return
            library._ensure_finalized()
            self._reload_init.update(library._reload_init)
            self.__dict__.setdefault("_parts", {})[library] = None

        def _optimize_functions(self, ll_module: Any) -> None:
            ll_module.data_layout = self._codegen._data_layout

        def _optimize_final_module(self) -> None:
            passes, builder = self._codegen._module_pass_manager()
            passes.run(self._final_module, builder)
            for library in self.__dict__.get("_parts", {}):
                self._final_module.link_in(library._get_module_for_linking(), preserve=True)

    class NoEngine:
        def set_env(self, name: str, environment: Any) -> None:
            pass

    class PartLibrary(Library):
        codegen = NoEngine()

        def _finalize_final_module(self) -> None:
            self._finalize_dynamic_globals()
            self._finalized = True

        def get_pointer_to_function(self, name: str) -> int:
            self._ensure_finalized()
            return 0

    def pipeline(kind: Any) -> Any:
        class Pipeline(Compiler):
            def define_pipelines(self) -> Any:
                state = self.state
                state.library = kind(state.targetctx.codegen(), state.func_id.func_qualname)
                state.library.enable_object_caching()
                return super().define_pipelines()

        return {"pipeline_class": Pipeline}

    return {"loop": pipeline(Library), "part": pipeline(PartLibrary)}


def _kept_by_source(function: Callable[..., Any]) -> Any:
    """A cache of Numba's whose place is the hash of the source.

    Raises:
        Exception: of any kind, where Numba is not what it was or the folder cannot be written to.
    """
    from numba.core import caching

    class Locator(caching._SourceFileBackedLocatorMixin, caching._CacheLocator):
        def __init__(self, function: Callable[..., Any], file: str) -> None:
            self._py_file, self._lineno = file, function.__code__.co_firstlineno

        def get_source_stamp(self) -> str:
            return source_key(Path(self._py_file))

        def get_cache_path(self) -> str:
            given = os.environ.get("NUMBA_CACHE_DIR")
            root = Path(given) if given else user_cache_path("maskopt", appauthor=False) / "kernels"
            return str(root / f"{Path(self._py_file).stem}-{self.get_source_stamp()[:16]}")

    class Impl(caching.CompileResultCacheImpl):
        _locator_classes = [Locator]  # noqa: RUF012

    class Cache(caching.FunctionCache):
        _impl_class = Impl

        def load_overload(self, sig: Any, target_context: Any) -> Any:
            found = super().load_overload(sig, target_context)
            if found is None:
                _report_once()
            return found

    return Cache(function)


@cache
def _report_once() -> None:
    _log.info(NOTICE)


@cache
def source_key(file: Path) -> str:
    """SHA-256 of a file and of all files of maskopt.solvers that it imports, themselves or through others."""
    known: dict[str, bytes] = {}
    waiting = [file]
    while waiting:
        source = waiting.pop()
        name = os.path.relpath(source, _ROOT)
        if name in known or not source.exists():
            continue
        known[name] = source.read_bytes()
        for module in _IMPORT.findall(known[name].decode()):
            place = _ROOT.joinpath(*module.split("."))
            waiting += [place.with_suffix(".py"), place / "__init__.py"]
    sha = hashlib.sha256()
    for name in sorted(known):
        sha.update(f"{name}\0{len(known[name])}\0".encode() + known[name])
    return sha.hexdigest()


_libraries = cache(ThreadpoolController)


def one_blas_thread() -> AbstractContextManager[object]:
    """The BLAS of NumPy and SciPy on one thread. On small matrices several spin and gain nothing, and their
    last bits depend on how many there are."""
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


class RowThreads:
    """Threads for several loops, as many as torch has by default; `least`: rows of one piece at least."""

    def __init__(self, threads: int | None = None, least: int = _LEAST) -> None:
        self.threads = threads or torch.get_num_threads()
        self._least = least
        self._pool = ThreadPoolExecutor(self.threads)

    def run(self, loop: Callable[..., None], rows: np.ndarray, *arguments: Any) -> None:
        """loop(*arguments, piece) for pieces of `rows` (int64), until all are done."""
        count = max(1, min(self.threads * _PIECES, -(-len(rows) // self._least)))
        pieces = iter(np.array_split(rows, count))

        def work() -> None:
            for piece in pieces:
                loop(*arguments, piece)

        helpers = [self._pool.submit(work) for _ in range(min(self.threads, count) - 1)]
        try:
            work()
        finally:
            wait(helpers)
        for helper in helpers:
            helper.result()
