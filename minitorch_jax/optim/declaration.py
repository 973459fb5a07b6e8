"""A rule declares each hyperparameter once; its constructor, signature, checks and `Args` follow from that."""

from __future__ import annotations

import difflib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..module.checks import LARGEST
from ..module.torch_names import refuse
from .rounding import state_dtype_name

NOT_NEGATIVE = (0.0, LARGEST)
FINITE = (-3.4e38, 3.4e38)
BELOW_ONE = (0.0, 0.99999994)  # [0, 1): up to the largest float32 below 1
GROUP_KEYS = ("modules", "names", "params", "rule")  # what a group has beside settings
OPTIONS = (  # what every optimizer takes
    "skip_nonfinite",
    "track_grad_norm",
    "decay_matrices_only",
    "master_weights",
    "state_dtype",
)

_REQUIRED = inspect.Parameter.empty
_SECTIONS = re.compile(r"^(Raises|Source|Differs from \w+|Example):", flags=re.M)

if TYPE_CHECKING:
    import jax

    Given = float | jax.Array | np.ndarray | np.generic | Callable[[Any], Any]

    class Rate:
        """A learning rate for type checkers: it is assigned a number or a schedule, and read as whatever was assigned."""

        def __get__(self, opt: Any, cls: Any = None) -> Any: ...
        def __set__(self, opt: Any, value: Given) -> None: ...

else:
    Rate = Any


class Setting(NamedTuple):
    """One setting of a rule: a number, a tuple of numbers, a flag or a string, as it was declared."""

    default: Any = _REQUIRED
    within: tuple[float, float] | None = None
    doc: str | None = None
    kw_only: bool = False
    init: bool = True
    name: str = ""
    annotation: str = "Any"

    def completed(self, name: str, annotation: str | None, inherited: Setting | None) -> Setting:
        """The declaration with its name and type; a default, range or doc that it does not state is the base class's."""
        base = inherited or Setting(within=NOT_NEGATIVE, doc="")
        return self._replace(
            name=name,
            annotation=base.annotation if annotation is None else annotation,
            default=base.default if self.default is _REQUIRED else self.default,
            within=base.within if self.within is None else self.within,
            doc=base.doc if self.doc is None else self.doc,
        )


def setting(
    *,
    default: Any = _REQUIRED,
    within: tuple[float, float] | None = None,
    doc: str | None = None,
    kw_only: bool = False,
    init: bool = True,
) -> Any:
    """Declare a hyperparameter in the body of an optimizer's class, where a plain default does not say enough.

    Args:
        default: its default: a number, a tuple of numbers, a bool, a string or None.
        within: the range of a number, ends included; without it any finite number >= 0.
        doc: what it is, for the docstring's `Args`: the symbol in the formula, and after a `;` what else to know.
        kw_only: whether it is given by name alone.
        init: whether the constructor takes it. Without, it has its default, and can be assigned.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn, optim
        >>> class Heavy(optim.Optimizer):
        ...     momentum: float = optim.setting(default=0.9, within=(0, 1), doc="μ")
        >>> Heavy([nn.Linear(2, 1, key=jax.random.key(0))], lr=0.1, momentum=2)
        Traceback (most recent call last):
        ValueError: Heavy: momentum must be a finite number in [0, 1]; got 2
    """
    return Setting(default, within, doc, kw_only, init)


# -- what a class declares --------------------------------------------------------------------------------------------


def declare(cls: Any) -> None:
    """Read what an optimizer's class declares, and make what follows: its constructor and its docstring's `Args`."""
    inherited: dict[str, Setting] = {}
    for base in reversed(cls.__mro__[1:]):
        inherited |= vars(base).get("_declared", {})
    by_hand = "__init__" in vars(cls)
    own = _declared_in(cls, inherited, only_explicit=by_hand)
    if by_hand:
        own |= {name: one for name, one in _taken_by(cls.__init__, inherited).items() if name not in own}
    cls._declared = own
    cls._settings = inherited | own
    cls._ranges = {name: one.within for name, one in cls._settings.items()}
    if own and not by_hand:
        cls.__init__ = _constructor(cls)
        if cls.__doc__ and "Args:" not in cls.__doc__:
            cls.__doc__ = _with_args(cls)


def _declared_in(cls: Any, inherited: Mapping[str, Setting], only_explicit: bool) -> dict[str, Setting]:
    """The settings in the body of a class. They are removed from it, so that an instance reads them by `__getattr__`.

    With `only_explicit`, for a class with an `__init__` of its own, annotated attributes stay what they are in any class.
    """
    annotations = inspect.get_annotations(cls)
    found: dict[str, Setting] = {}
    kw_only = False
    for name, annotation in annotations.items():
        text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
        if annotation is KW_ONLY or text.endswith("KW_ONLY"):
            kw_only = True
        elif not name.startswith("_") and not re.match(r"(\w+\.)*ClassVar\b", text):
            value = vars(cls).get(name, Setting())
            is_constant = _is_plain(_of_bases(cls, name))  # another value of `elementwise`, say
            if isinstance(value, Setting) or not (only_explicit or is_constant):
                one = value if isinstance(value, Setting) else Setting(value)
                one = one._replace(kw_only=one.kw_only or kw_only)
                found[name] = one.completed(name, text, inherited.get(name))
    for name, value in vars(cls).items():
        if name in annotations:
            continue
        if isinstance(value, Setting) and name not in inherited:
            raise TypeError(f"{cls.__name__}.{name} needs a type, such as `{name}: float = setting(...)`")
        if isinstance(value, Setting) or (name in inherited and _is_plain(value)):  # another default
            one = value if isinstance(value, Setting) else inherited[name]._replace(default=value)
            found[name] = one.completed(name, None, inherited[name])
    for name, one in found.items():
        if name not in inherited and name != "modules":
            _check_declared(cls, one)
        if name in vars(cls):
            delattr(cls, name)
    return found


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | tuple)


def _of_bases(cls: Any, name: str) -> Any:
    """The attribute that a class has from its bases, as it is written there."""
    return next((vars(base)[name] for base in cls.__mro__[1:] if name in vars(base)), _REQUIRED)


def _check_declared(cls: Any, one: Setting) -> None:
    """Raise TypeError for a new setting that could not be given, or not be read."""
    if one.name in ("t", "one_minus", *GROUP_KEYS) or _of_bases(cls, one.name) is not _REQUIRED:
        raise TypeError(f"{cls.__name__}.{one.name}: a rule has a `{one.name}` already; choose another name")
    if one.default is _REQUIRED:
        raise TypeError(
            f"{cls.__name__}.{one.name} is declared without a default. Give it one, `{one.name}: {one.annotation} = ...`;"
            " what is no hyperparameter is a `ClassVar`"
        )


def _taken_by(init: Callable[..., Any], inherited: Mapping[str, Setting]) -> dict[str, Setting]:
    """What a constructor written by hand says of the settings that it takes."""
    _, *parameters = inspect.signature(init).parameters.values()
    found = {}
    for p in parameters:
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "modules":
            text = p.annotation if isinstance(p.annotation, str) else inspect.formatannotation(p.annotation)
            text = "Any" if p.annotation is p.empty else text
            one = Setting(p.default, kw_only=p.kind is p.KEYWORD_ONLY)
            found[p.name] = one.completed(p.name, text, inherited.get(p.name))
    return found


# -- what follows -----------------------------------------------------------------------------------------------------


def _constructor(cls: Any) -> Any:
    """An `__init__` that takes what the class declares, in that order, and calls the next one that is written by hand."""
    taken = [one for one in cls._settings.values() if one.init and one.name not in OPTIONS]
    parameters = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY if one.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=one.default,
            annotation="float | Callable[[Any], Any]" if one.annotation.endswith("Rate") else one.annotation,
        )
        for one in sorted(taken, key=lambda one: one.kw_only)
    ]
    if any(cls._settings[name].init for name in OPTIONS):
        parameters.append(inspect.Parameter("options", inspect.Parameter.VAR_KEYWORD, annotation="Any"))
    signature = inspect.Signature(parameters)
    fixed = {one.name: one.default for one in cls._settings.values() if not one.init}

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            refuse("optimizer", f"{type(self).__name__}()", kwargs.keys() - signature.parameters.keys())
            raise TypeError(f"{type(self).__name__}(): {error}") from None
        bound.apply_defaults()
        modules, options = bound.arguments.pop("modules"), bound.arguments.pop("options", {})
        if fixed.keys() & options.keys():
            name = next(name for name in options if name in fixed)
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {name!r}")
        above = type(self).__mro__[type(self).__mro__.index(cls) + 1 :]
        written = next(vars(base)["__init__"] for base in above if _is_written(base))
        written(self, modules, **bound.arguments, **fixed, **options)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    __init__.__signature__ = inspect.Signature([own, *parameters], return_annotation="None")  # type: ignore[attr-defined]
    __init__.__qualname__, __init__.__module__ = f"{cls.__qualname__}.__init__", cls.__module__
    __init__.__doc__ = f"Take the settings of `{cls.__name__}`; see the class."
    vars(__init__)["_follows_from_declarations"] = True
    return __init__


def _is_written(base: Any) -> bool:
    init = vars(base).get("__init__")
    return init is not None and not hasattr(init, "_follows_from_declarations")


def _with_args(cls: Any) -> str:
    """The docstring with `Args` of what the constructor takes, before what is said of errors and sources."""
    taken = sorted((one for one in cls._settings.values() if one.init), key=lambda one: one.kw_only)
    lines = [f"{one.name}: {_described(one)}." for one in taken if one.name not in OPTIONS]
    if any(one.name in OPTIONS for one in taken):
        lines.append(f"**options: {', '.join(f'`{name}`' for name in OPTIONS)}; see `Optimizer`.")
    wrapped = (
        textwrap.fill(
            line,
            118,
            initial_indent=" " * 4,
            subsequent_indent=" " * 8,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in lines
    )
    args = "\n".join(["Args:", *wrapped])
    doc = inspect.cleandoc(cls.__doc__)
    place = _SECTIONS.search(doc)
    return f"{doc[: place.start()]}{args}\n\n{doc[place.start() :]}" if place else f"{doc}\n\n{args}"


def _described(one: Setting) -> str:
    """What a setting is, with its range."""
    what, semicolon, more = (one.doc or "").partition(";")
    spans = _spans(one)
    between = " " if what.endswith("each") else ", "
    return between.join(filter(None, [what, spans])) + semicolon + more


def _spans(one: Setting) -> str:
    low, high = one.within or NOT_NEGATIVE
    numbers = isinstance(one.default, tuple)
    is_number = isinstance(one.default, int | float) and not isinstance(one.default, bool)
    if not numbers and not is_number and not re.match("int|float", one.annotation):
        return ""
    if (low, high) == FINITE:
        return "finite numbers" if numbers else "a finite number"
    if (low, high) == BELOW_ONE:
        span = "in [0, 1)"
    elif low == FINITE[0]:
        span = f"<= {high:g}"
    else:
        span = f">= {low:g}" if high >= 2**24 else f"in [{low:g}, {high:g}]"
    if one.name == "lr":
        return f"{span}, or a schedule"
    return f"a whole number {span}" if one.annotation.startswith("int") else span


# -- what is given ----------------------------------------------------------------------------------------------------


def check_names(cls: Any, names: Iterable[str]) -> None:
    """Raise TypeError for a name that came through `**options` of a constructor and means nothing."""
    known = [name for name in cls._settings if name != "modules"]
    unknown = [name for name in names if name not in known]
    if not unknown:
        return
    parameters = inspect.signature(cls.__init__).parameters.values()
    refuse("optimizer", f"{cls.__name__}()", unknown)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):  # else the constructor passes on what it knows itself
        near = ["lr"] if unknown[0] == "learning_rate" else difflib.get_close_matches(unknown[0], known, 1)
        hint = f"; did you mean `{near[0]}`?" if near else ""
        raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {unknown[0]!r}{hint}")


def default_of(cls: Any, name: str) -> Any:
    """The default of a setting; if it has none, a marker that is no value of any setting."""
    one = cls._settings.get(name)
    return _REQUIRED if one is None else one.default


def is_optional(cls: Any, name: str) -> bool:
    """Whether a setting may be None: that is its default."""
    return default_of(cls, name) is None


def is_whole(cls: Any, name: str) -> bool:
    """Whether a setting is declared as an integer."""
    one = cls._settings.get(name)
    return one is not None and one.annotation.startswith("int")


def as_tuples(cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with lists as tuples, where a tuple is the default (`betas`): of as many numbers."""
    found = dict(settings)
    for name, value in settings.items():
        default = default_of(cls, name)
        if not isinstance(default, tuple) or callable(value):
            continue
        found[name] = tuple(value) if isinstance(value, list) else value
        if not (isinstance(found[name], tuple) and len(found[name]) == len(default)):
            raise ValueError(f"{cls.__name__}: {name} must be a tuple of {len(default)} numbers; got {found[name]!r}")
    return found


def as_flags(cls: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those settings that are static: booleans, by their default or their value, strings, and None."""
    flags: dict[str, Any] = {}
    for name, value in settings.items():
        default = default_of(cls, name)
        if name == "state_dtype":
            flags[name] = state_dtype_name(cls.__name__, value)
        elif isinstance(default, bool):
            if not isinstance(value, bool | np.bool_) and not (
                np.shape(value) == () and np.asarray(value).dtype == bool
            ):
                raise ValueError(f"{cls.__name__}: {name} must be a bool; got {value!r}")
            flags[name] = bool(value)
        elif isinstance(value, bool | str) and not isinstance(default, int | float) and name != "lr":
            flags[name] = value
        elif value is None and is_optional(cls, name):
            flags[name] = value
    return flags
