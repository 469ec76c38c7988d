"""Backends by name: what distributions register under an entry-point group, loaded when asked for."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from maskopt.core.fields import build
from maskopt.core.limits import KEYWORDS
from maskopt.errors import (
    OptionError,
    SolverError,
    SolverUnavailableError,
    UnknownSolverError,
    near,
)


class Registry:
    """The classes of one entry-point group, whose instances satisfy a protocol; messages call them `what`."""

    def __init__(self, group: str, what: str, protocol: type) -> None:
        self.group, self.what, self.protocol = group, what, protocol
        self._loaded: dict[EntryPoint, type[Any]] = {}

    def names(self) -> list[str]:
        return sorted(_points(self.group))

    def find(self, name: str) -> type[Any]:
        """The class of that name; UnknownSolverError, or SolverUnavailableError where it cannot be used."""
        points = _points(self.group)
        if name not in points:
            raise UnknownSolverError(f"unknown {self.what} {name!r}{near(name, points)}")
        point = points[name]
        if point not in self._loaded:
            self._loaded[point] = self._load(point)
        return self._loaded[point]

    def make(self, member: Any, options: Mapping[str, Any]) -> Any:
        """A member ready to run, by name with options, or a value unchanged; errors as of `find`,
        OptionError for an option that it does not have or a value that the option cannot take."""
        if isinstance(member, str):
            kind = self._available(self.find(member))
            # a callback is nothing that anybody mistypes
            return build(kind, member, options, self.what, KEYWORDS.keys() - {"on_progress"})
        if not isinstance(member, self.protocol):
            raise OptionError(
                f"{member!r} is no {self.what}; give a name or a value such as Swap()"
            )
        if options:
            first, name = next(iter(options)), getattr(member, "name", "")
            raise OptionError(
                f"{self.what} {name!r} is given as a value: {first!r} belongs among its fields"
            )
        return self._available(member)

    def _available(self, member: Any) -> Any:
        reason = member.unavailable()
        if reason:
            raise SolverUnavailableError(f"{self.what} {member.name!r} is unavailable: {reason}")
        return member

    def reasons(self) -> dict[str, tuple[type[Any] | None, str | None]]:
        """Per name its class, and why it cannot run here or be loaded, or None."""
        found: dict[str, tuple[type[Any] | None, str | None]] = {}
        for name in self.names():
            try:
                kind = self.find(name)
            except SolverError as error:
                found[name] = None, str(error)
                continue
            try:
                found[name] = kind, kind.unavailable()
            except Exception as error:  # a third party's backend may fail in any way
                found[name] = kind, f"{type(error).__name__}: {error}"
        return found

    def _load(self, point: EntryPoint) -> type[Any]:
        try:
            kind = point.load()
            sound = isinstance(kind(), self.protocol)
        except Exception as error:  # a third party's backend may fail in any way
            raise SolverUnavailableError(
                f"{self.what} {point.name!r} ({point.value}) could not be loaded: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not sound:
            raise SolverUnavailableError(
                f"{self.what} {point.name!r} ({point.value}) is not a {self.protocol.__name__}"
            )
        loaded: type[Any] = kind
        return loaded


def missing_package(package: str) -> str | None:
    """For `unavailable`: that a package is not installed, and what installs it; None: it is."""
    if importlib.util.find_spec(package) is None:
        return f"the package {package} is not installed; pip install {package}"
    return None


@cache
def _points(group: str) -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=group)}
