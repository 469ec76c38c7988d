"""Compilation of loops by Numba, and where the machine code is stored.

The code is stored in NUMBA_CACHE_DIR, or in the user's cache folder, under a hash of the loop's file and of
every file of maskopt.solvers that this file imports. So it survives a reinstallation, serves several
installations, and is never stale (Numba's own cache looks at the loop's file only). The versions of Numba and
Python and the processor are part of Numba's own key. Where Numba's internals are not the known ones, or the
folder is not writable, Numba's own cache is used.

The first compilation in a process is logged to `maskopt.compile`, because it takes seconds.
"""

from __future__ import annotations

import gc
import hashlib
import logging
import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba.core import event
from numba.core.registry import CPUDispatcher
from platformdirs import user_cache_path

_log = logging.getLogger("maskopt.compile")
NOTICE = "compiling once …"
#: the release of Numba whose internals `part` uses; with any other release a part is compiled as usual
_KNOWN = (0, 68)
_ROOT = Path(__file__).parent
_IMPORT = re.compile(r"^\s*from maskopt\.solvers\.([\w.]+) import", re.MULTILINE)


def loop(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with these options, for a function that Python calls; its machine code is stored."""

    def decorate(function: Callable[..., Any]) -> Any:
        compiled: Any = numba.njit(**{"no_cfunc_wrapper": True, **options})(function)
        try:
            compiled._cache = _kept_by_source(function)
        except Exception as error:  # Numba's internals may change
            _log.debug("%s: stored by Numba itself (%s)", function.__qualname__, error)
            try:
                compiled.enable_caching()
            except RuntimeError as nowhere:  # no writable folder: compile in every process
                _log.debug("%s", nowhere)
        compiled.__class__ = _Loop
        return compiled

    return decorate


def part(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba.njit with these options, for a function that only loops call.

    It has no wrapper for Python, and is optimised (so that its loops become SIMD) but not translated to
    machine code by itself; it is stored as part of the loops. This saves a third of the time.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        without = {"no_cfunc_wrapper": True, "no_cpython_wrapper": True}
        if _part_compiler() is not None:
            without["pipeline_class"] = _part_compiler()
        compiled: Any = numba.njit(**{**without, **options})(function)
        compiled.__class__ = _Part
        return compiled

    return decorate


class _Loop(CPUDispatcher):
    """Compiles without the garbage collector, and raises KeyboardInterrupt where Numba hides it."""

    def compile(self, signature: Any) -> Any:
        """The collector would walk over all objects of torch again and again, for a tenth of the time."""
        paused = gc.isenabled()
        gc.disable()
        try:
            return super().compile(signature)
        finally:
            if paused:
                gc.enable()

    def __call__(self, *arguments: Any) -> Any:
        try:
            return super().__call__(*arguments)
        except SystemError as error:
            # "returned a result with an exception set", nested once or twice
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
def _part_compiler() -> Any:
    """A compiler that stops at LLVM's optimised code; None where Numba's internals are not the known ones."""
    if numba.version_info.short != _KNOWN:
        return None
    try:
        from numba.core.codegen import JITCodeLibrary
        from numba.core.compiler import Compiler

        finalize = JITCodeLibrary._finalize_dynamic_globals, JITCodeLibrary._ensure_finalized
    except (ImportError, AttributeError) as error:
        _log.debug("parts are translated too (%s)", error)
        return None

    class NoEngine:
        def set_env(self, name: str, environment: Any) -> None:
            pass

    class Library(JITCodeLibrary):
        codegen = NoEngine()

        def _finalize_final_module(self) -> None:
            finalize[0](self)
            self._finalized = True

        def get_pointer_to_function(self, name: str) -> int:
            finalize[1](self)
            return 0

    class PartCompiler(Compiler):
        def define_pipelines(self) -> Any:
            state = self.state
            state.library = Library(state.targetctx.codegen(), state.func_id.func_qualname)
            return super().define_pipelines()

    return PartCompiler


def _kept_by_source(function: Callable[..., Any]) -> Any:
    """A cache of Numba's in a folder that is named by the hash of the source.

    Raises:
        Exception: of any kind, where Numba's internals have changed or the folder is not writable.
    """
    from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

    class Locator(_CacheLocator):
        def __init__(self, function: Callable[..., Any], file: str) -> None:
            self._py_file = file
            self._lineno = function.__code__.co_firstlineno
            self._stamp = source_key(Path(file))

        def get_cache_path(self) -> str:
            return str(kernel_folder() / f"{Path(self._py_file).stem}-{self._stamp[:16]}")

        def get_source_stamp(self) -> str:
            return self._stamp

        def get_disambiguator(self) -> str:
            return str(self._lineno)

        @classmethod
        def from_function(cls, function: Callable[..., Any], file: str) -> Any:
            locator = cls(function, file)
            locator.ensure_cache_path()
            return locator

    class Impl(CompileResultCacheImpl):
        _locator_classes = [Locator]  # noqa: RUF012

    class Cache(FunctionCache):
        _impl_class = Impl

    return Cache(function)


def kernel_folder() -> Path:
    """The folder of the machine code: NUMBA_CACHE_DIR, or `kernels` in the user's cache folder of maskopt."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    return Path(given) if given else user_cache_path("maskopt", appauthor=False) / "kernels"


@cache
def source_key(file: Path) -> str:
    """SHA-256 of a file and of all files of maskopt.solvers that it imports, directly or not."""
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


class _Notice(event.Listener):
    """Logs the first compilation of a loop of this package in this process."""

    logged = False

    def on_start(self, happening: event.Event) -> None:
        module = happening.data["dispatcher"].py_func.__module__ or ""
        if not self.logged and module.startswith("maskopt.solvers."):
            self.logged = True
            _log.info(NOTICE)

    def on_end(self, happening: event.Event) -> None:
        pass


event.register("numba:compile", _Notice())
