"""Registries of named classes: imported lazily, and extensible by other packages.

A registry holds frozen dataclasses of one kind under the default of their field `name`. Names of this library are
strings in a table, so that listing them imports nothing. Another package extends a registry with an entry point of its
group (`name = "package.module:Class"`), running code with `register`; a command line may name a class directly, as
`package.module:Class`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Registered = TypeVar("Registered", bound=type)


class Registry(Generic[T]):
    """The classes of one kind, by name.

    Args:
        kind: Name of the kind in messages, such as `task`.
        base: Function that returns the base class of all classes; called late, since its import may be slow.
        group: Entry-point group for other packages.
        package: Package of the built-in modules.
        built_in: Built-in classes as `module:Class`, by name.
    """

    def __init__(
        self, *, kind: str, base: Callable[[], type[T]], group: str, package: str, built_in: Mapping[str, str]
    ) -> None:
        self.kind = kind
        self.group = group
        self._base = base
        self._built_in = {name: f"{package}.{path}" for name, path in built_in.items()}
        self._registered: dict[str, type[T]] = {}

    def names(self) -> tuple[str, ...]:
        """All names: built-in ones, then those of other packages, then those registered in this process."""
        return tuple(dict.fromkeys((*self._built_in, *sorted(self._entry_points()), *self._registered)))

    def built_in_names(self) -> tuple[str, ...]:
        """The built-in names."""
        return tuple(self._built_in)

    def register(self, cls: Registered) -> Registered:
        """Add a class under the default of its field `name`; usable as a decorator.

        Args:
            cls: Subclass of the registry's base whose fields all have defaults.

        Raises:
            TypeError: If it is no such class.
            ValueError: If its name is registered already.
        """
        path = _path(cls)
        name: str = getattr(self._instance(cls, path), "name")  # noqa: B009  # the base class is not known here
        points = self._entry_points()
        taken = self._built_in.get(name) or (points[name].value if name in points else None)
        if taken is None and name in self._registered:
            taken = _path(self._registered[name])
        # A reloaded module, or the module of an entry point, registers its class again.
        if taken not in (None, path):
            raise ValueError(f"the {self.kind} name {name!r} is taken by {taken}; give {cls.__qualname__} another name")
        self._registered[name] = cls
        return cls

    def get(self, requested: str | T) -> T:
        """Look up by name.

        Args:
            requested: Registered name, `package.module:Class`, or an instance, which is returned as it is.

        Returns:
            The instance; by name, with default fields.

        Raises:
            ValueError: If the name is unknown, or there is no such module or class.
            TypeError: If the name leads to something of another kind.
        """
        if not isinstance(requested, str):
            return self._checked(requested)
        if requested in self._registered:
            return self._instance(self._registered[requested], requested)
        if requested in self._built_in:
            return self._instance(self._loaded(self._built_in[requested]), requested)
        if (point := self._entry_points().get(requested)) is not None:
            return self._instance(point.load(), requested)
        self.check_name(requested)
        return self._instance(self._loaded(requested), requested)

    def check_name(self, requested: str) -> None:
        """Check a name without importing what it names.

        Args:
            requested: Registered name, or `package.module:Class`, of which only the form is checked.

        Raises:
            ValueError: If the name is unknown.
        """
        names = self.names()
        if requested in names or ":" in requested:
            return
        close = difflib.get_close_matches(requested, names, n=1)
        hint = f", did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"unknown {self.kind} {requested!r}{hint}; there are {', '.join(names)}, and `package.module:Class` names "
            "any other"
        )

    def _loaded(self, path: str) -> Any:
        module, _, attribute = path.partition(":")
        try:
            imported = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is not None and module != error.name and not module.startswith(f"{error.name}."):
                raise  # the module exists, and something that it imports does not
            raise ValueError(f"the {self.kind} {path!r} names a module that cannot be imported: {error}") from error
        if not hasattr(imported, attribute):
            raise ValueError(f"the module {module!r} has no {attribute!r}; the {self.kind} {path!r} cannot be loaded")
        return getattr(imported, attribute)

    def _instance(self, cls: Any, name: str) -> T:
        if not isinstance(cls, type):
            return self._checked(cls)
        try:
            instance = cls()
        except TypeError as error:
            raise TypeError(
                f"the {self.kind} {name!r} ({cls.__qualname__}) cannot be created without arguments: {error}"
            ) from error
        return self._checked(instance)

    def _checked(self, instance: Any) -> T:
        base = self._base()
        if not isinstance(instance, base):
            raise TypeError(f"a {self.kind} is a name or an instance of {_path(base)}, got {instance!r}")
        return instance

    def _entry_points(self) -> dict[str, EntryPoint]:
        """Entry points of other packages by name.

        Raises:
            ValueError: If two packages use the same name, or one uses a built-in name.
        """
        points: dict[str, EntryPoint] = {}
        for point in entry_points(group=self.group):
            if point.name in self._built_in or (point.name in points and points[point.name].value != point.value):
                raise ValueError(
                    f"the entry point {point.name!r} ({point.value}) of the group {self.group} takes the name of "
                    f"another {self.kind}; one of the two packages has to rename its {self.kind}"
                )
            points[point.name] = point
        return points


def _path(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"
