"""Libraries that are called from a checkout of their repository.

Libraries for clusters import ray, deepspeed or megatron in the same files as their formulas. Of a
checkout, only the modules that an adapter names are executed. The standard library, torch and numpy
are there for them; everything else that they import is a stand-in, which can be named, subclassed
and used as a decorator while a module is executed, and raises `NotOffered` when it is called later.
"""

import builtins
import contextlib
import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import torch

from rl_conformance.library import Library, NotOffered

REAL = sys.stdlib_module_names | {"torch", "numpy"}
"""What modules of a checkout import as it is."""
UNKNOWN = "of an unknown commit"


class StandIn(type):
    """The type of what stands for something that is not loaded: a class without content, so that it
    can be a base class or an annotation."""

    _checkout: "Checkout"

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__") or not is_stand_in(cls):
            raise AttributeError(name)
        return cls._checkout.found(f"{cls.__name__}.{name}")

    def __getitem__(cls, _: Any) -> "StandIn":
        return cls

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if not is_stand_in(cls):  # a class of the library, with a stand-in as its base
            return super().__call__(*arguments, **named)
        return cls._checkout.called(cls.__name__, *arguments, **named)


def is_stand_in(cls: type) -> bool:
    """Return whether a class is a stand-in itself, not a class of the library that has one as its
    base."""
    return "_checkout" in vars(cls)


def not_compiled(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """Stand in for `torch.compile`: return the function as it is."""
    return not_compiled if function is None else function


class Checkout:
    """A library's source folder, of which some modules are executed.

    Args:
        folder: The checkout.
        modules: The dotted names of the modules that may be executed.
        root: Where packages begin in the folder.
        given: What is there in place of stand-ins, by dotted name.
        missing: Packages whose import raises ImportError, for modules that do without them.
    """

    def __init__(
        self,
        folder: Path,
        modules: Sequence[str],
        *,
        root: str = "",
        given: Mapping[str, Any] | None = None,
        missing: Sequence[str] = (),
    ) -> None:
        if not folder.is_dir():
            raise ImportError(f"{folder} is no folder")
        self.folder, self.root = folder, folder / root
        self.modules, self.missing = frozenset(modules), frozenset(missing)
        self._found: dict[str, Any] = dict(given or {})
        self._executing = 0

    def module(self, name: str) -> Any:
        """Return a module of the checkout; it is executed when it is first asked for."""
        if name not in self._found:
            file = self.root / f"{name.replace('.', '/')}.py"
            if not file.is_file():
                raise ImportError(f"{self.folder} has no {file.relative_to(self.folder)}")
            module = self._found[name] = ModuleType(name)
            module.__package__ = name.rpartition(".")[0]
            vars(module)["__builtins__"] = vars(builtins) | {"__import__": self._import}
            try:
                code = compile(file.read_text("utf-8"), str(file), "exec", dont_inherit=True)
                with self._execution():
                    exec(code, vars(module))
            except Exception as error:  # whatever the module raises
                del self._found[name]
                raise ImportError(f"{file}: {type(error).__name__}: {error}") from error
        return self._found[name]

    def found(self, name: str) -> Any:
        """Return what a dotted name is for the modules: one of them, what was given, or a
        stand-in."""
        if name in self.modules:
            return self.module(name)
        if name not in self._found:
            content = {"_checkout": self, "__init_subclass__": classmethod(lambda *_, **__: None)}
            self._found[name] = StandIn(name, (), content)
        return self._found[name]

    def called(self, name: str, *arguments: Any, **named: Any) -> Any:
        """Return what the call of a stand-in gives while a module is executed: the function that it
        decorates, or another stand-in. Raises `NotOffered` later."""
        if not self._executing:
            raise NotOffered(f"{name} is of a package that is not loaded")
        is_decorator = len(arguments) == 1 and not named and callable(arguments[0])
        return arguments[0] if is_decorator else self.found(f"{name}()")

    @contextlib.contextmanager
    def _execution(self) -> Iterator[None]:
        """Execute a module: stand-ins may be called, and torch compiles nothing."""
        compiled = torch.compile
        self._executing += 1
        torch.compile = not_compiled  # type: ignore[assignment]
        try:
            yield
        finally:
            torch.compile = compiled
            self._executing -= 1

    def _import(
        self,
        name: str,
        names: Mapping[str, Any] | None = None,
        local_names: Any = None,
        wanted: Sequence[str] | None = (),
        level: int = 0,
    ) -> Any:
        """Do what the statement `import` does, for the modules of the checkout."""
        if level:
            assert names is not None
            name = importlib.util.resolve_name("." * level + name, names["__package__"])
        top = name.partition(".")[0]
        if top in self.missing:
            raise ModuleNotFoundError(f"No module named {name!r}")
        if top in REAL:
            return builtins.__import__(name, names, local_names, wanted or ())
        return self.found(name if wanted else top)

    def commit(self) -> str:
        """Return the commit (12 hex digits) and its date: "0123456789ab of 2026-01-31", with a plus
        sign where Python files are changed; "of an unknown commit" where git does not know it."""
        if not (self.folder / ".git").exists():  # git would answer for a folder around it
            return UNKNOWN
        shown = self._git("log", "-1", "--abbrev=12", "--format=%h of %cs")
        changed = self._git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
        return f"{shown}{' +' if changed else ''}" if shown else UNKNOWN

    def _git(self, *words: str) -> str:
        """Return what git prints about the checkout; nothing where it fails or is not there."""
        command = ["git", "-C", str(self.folder), *words]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return done.stdout.strip()


class FromCheckout(Library):
    """A library that is called from a checkout. Adapters take its folder: `openrlhf=FOLDER`."""

    repository: ClassVar[str] = ""
    """Its owner and name on GitHub."""

    def __init__(self, folder: Path) -> None:
        self.checkout = self.opened(folder)
        self.version = self.checkout.commit()

    def opened(self, folder: Path) -> Checkout:
        """Return the checkout, with the modules that the adapter calls."""
        raise NotImplementedError
