"""Parts: a frozen dataclass whose fields are hyper-parameters, and whose call is a formula.

A *family* is what an algorithm has one of: `PolicyLoss`, `Advantage`, `KL`, … Its members are its
subclasses, each known by its `type`. A subclass registers itself, wherever it is written:

    class Squared(PolicyLoss):
        type = "squared"
        scale: float = 1.0

        def __call__(self, tokens):
            return self.scale * (tokens.ratio - 1) ** 2 - tokens.advantages * tokens.ratio

A field that is annotated with a family takes any member: an instance, or a table such as `{"type":
"squared", "scale": 2.0}`. `type = "mine.py:Squared"` (or `"package.module:Squared"`) loads the
member from a file (or a module) first.
"""

import dataclasses
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    dataclass_transform,
    get_origin,
)

from pydantic import AllowInfNan, ConfigDict, Field, GetCoreSchemaHandler
from pydantic.dataclasses import dataclass as checked_dataclass
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from quartet.errors import PartError

T = TypeVar("T")
OrInf = Annotated[float, AllowInfNan(True)]
"""A bound that may be infinite: no bound."""


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
def part(cls: type[T]) -> type[T]:
    """Make `cls` a frozen dataclass whose fields are checked when it is made: types, ranges, no
    unknown names.

    `Field(default, ge=..., description=...)` states a range and what the field means; the
    description becomes the second sentence of the error that a user reads.
    """
    decorate: Callable[..., Any] = checked_dataclass(
        frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False)
    )
    checked: type[T] = decorate(cls)
    return checked


@dataclass_transform(frozen_default=True, field_specifiers=(Field,))
class Family:
    """The base of families of parts. A direct subclass is a family; subclasses of that are its
    members, which become parts (see `part`) and are known by their `type`. A member without a
    `type` is known as `file.py:Name`, or by its class's name where it was not written in a file."""

    members: ClassVar[dict[str, Any]]
    """The classes of the family, by type."""
    internal: ClassVar[bool] = False
    """Whether the member is Quartet's own business, and not offered where a type is not known."""
    accepts_name: ClassVar[bool] = False
    """Whether a member may be given by its type alone, as text, where its settings are the
    defaults."""

    if TYPE_CHECKING:

        @property
        def type(self) -> str: ...

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if Family in cls.__bases__:
            cls.members = {}
            return
        if "__init__" in vars(cls):
            raise PartError(
                f"{cls.__name__}: has an __init__, which would never be called. Its settings are "
                "annotated fields, such as scale: float = 1.0; what follows from them, a property."
            )
        name = _declare_type(cls)
        part(cls)
        if name is not None:
            cls.members[name] = cls

    def coefficients(self) -> dict[str, float]:
        """Return what of this part adapts from step to step, by the name of its metric; by default
        nothing."""
        return {}

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if Family not in cls.__bases__:
            return handler(source)
        return core_schema.with_info_plain_validator_function(cls._member)

    @classmethod
    def _member(cls, value: Any, info: Any) -> Any:
        """Return the member that a value is or describes."""
        if isinstance(value, cls):
            return value
        if cls.accepts_name and isinstance(value, str):
            value = {"type": value}
        if not isinstance(value, dict):
            raise PydanticCustomError("dataclass_type", "a table is needed")
        if "type" not in value:
            raise PydanticCustomError(
                "union_tag_not_found", "a table needs a type", {"discriminator": "'type'"}
            )
        validator = cls.member(value["type"]).__pydantic_validator__
        if info.mode == "json":
            return validator.validate_json(json.dumps(value), strict=True)
        return validator.validate_python(value)

    @classmethod
    def member(cls, name: object) -> Any:
        """Return the member of this type; a reference `file.py:Name` or `package.module:Name` is
        loaded first."""
        if isinstance(name, str) and name not in cls.members and ":" in name:
            loaded = load_reference(name)
            if not (
                isinstance(loaded, type) and issubclass(loaded, cls)
            ) or "__pydantic_validator__" not in vars(loaded):
                raise PydanticCustomError("part_reference", f"{name} is no {cls.__name__}")
            cls.members[name] = loaded
        if not isinstance(name, str) or name not in cls.members:
            known = ", ".join(repr(n) for n, c in cls.members.items() if not c.internal)
            raise PydanticCustomError(
                "union_tag_invalid", "no such type", {"tag": name, "expected_tags": known}
            )
        return cls.members[name]


def _declare_type(cls: type[Any]) -> str | None:
    """Give a member its field `type`, and return its default: what it is registered as. None where
    the class inherits the field and adds nothing, as an abstract class does."""
    annotations = inspect.get_annotations(cls)
    if get_origin(annotations.get("type")) is Literal:
        name: str = cls.__dict__["type"]
        return name
    if cls.__dict__.get("abstract", False):
        return None
    name = cls.__dict__.get("type") or own_reference(cls)
    cls.__annotations__ = annotations | {"type": str}
    cls.type = dataclasses.field(default=name, kw_only=True)
    return name


def own_reference(cls: type[Any]) -> str:
    """Return `file.py:Name` of a class that is written in a file, else the class's name."""
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return (
        f"{file}:{cls.__qualname__}" if file and cls.__qualname__.isidentifier() else cls.__name__
    )


def load_reference(reference: str) -> Any:
    """Return the object that `file.py:Name` or `package.module:Name` names. The file is run, as an
    import runs it.

    Raises `PydanticCustomError`, a `ValueError`, with one sentence where there is no such file,
    module or name, or where it fails when it is run.
    """
    place, _, name = reference.rpartition(":")
    module = _loaded(place)
    if not hasattr(module, name):
        raise PydanticCustomError("part_reference", f"{place}: has no {name}")
    return getattr(module, name)


def parts_in(file: str) -> list[tuple[str, Any]]:
    """Return the parts that a file defines, each with the name of its family. The file is run, as
    an import runs it. Raises as `load_reference` does."""
    module = _loaded(file)
    return [
        (family.__name__, member)
        for family in Family.__subclasses__()
        for member in family.members.values()
        if member.__module__ == module.__name__
    ]


def _loaded(place: str) -> Any:
    """Import a file or a module. Raises `PydanticCustomError` if that is not possible."""
    try:
        return _module_of(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except FileNotFoundError:
        raise PydanticCustomError("part_reference", f"{place}: no such file") from None
    except ImportError as error:
        raise PydanticCustomError(
            "part_reference", f"{place}: cannot be imported: {error}"
        ) from None
    except Exception as error:
        raise PydanticCustomError(
            "part_reference", f"{place}: failed when it was imported: {error!r}"
        ) from error


def _module_of(path: Path) -> Any:
    """Import a file once, whatever path it is named by; a file that runs as the program itself is
    not run again."""
    resolved = path.resolve(strict=True)
    for module in list(sys.modules.values()):
        file = getattr(module, "__file__", None)
        if file and inspect.ismodule(module) and Path(file).resolve() == resolved:
            return module
    name = f"quartet_user_{resolved.stem}_{abs(hash(resolved)):x}"
    spec = importlib.util.spec_from_file_location(name, resolved)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def of_shape(part: Any, result: Any, shape: Sequence[int]) -> Any:
    """Return what calling a part has returned. Raises `PartError` if it is no tensor of this
    shape: torch would broadcast another one without an error, to wrong numbers."""
    if hasattr(result, "shape") and list(result.shape) == list(shape):
        return result
    name = type(result).__name__
    kind = f"a {name} of shape {list(result.shape)}" if hasattr(result, "shape") else f"a {name}"
    raise PartError(f"{part.type}: returned {kind}, not a Tensor of shape {list(shape)}.")


__all__ = [
    "Family",
    "Field",
    "OrInf",
    "load_reference",
    "of_shape",
    "own_reference",
    "part",
    "parts_in",
]
