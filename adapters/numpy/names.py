"""Names: `dW`, `W_grad`, `dL_dW` are gradients of `W`; `vW`, `W_prev`, `running_mean` are neither parameter nor gradient."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache

_WITH = "grad", "grads", "gradient", "gradients", "derivative"  # before or after the name of the parameter
_BEFORE = (
    "d",
    "g",
    "nabla",
    "gradof",
    "gradwrt",
    "gradientof",
    *(f"d{loss}d" for loss in ("l", "j", "e", "c")),
    *_WITH,
)
_BEFORE = (*_BEFORE, *(f"d{loss}d" for loss in ("loss", "cost", "err", "error")))
_LISTS = {"params": ("grads", "gradients", "grad"), "parameters": ("grads", "gradients", "grad")}
_STEMS = (
    ("weights", "weight", "ws", "w"),
    ("biases", "bias", "bs", "b"),
)  # used for each other, as in `weight` beside `dw`

# an object that holds one parameter: `.data` beside `.grad`. The second row counts only if there is none of the first.
_VALUES = (
    set("data value val w weight weights b bias array arr tensor param parameter theta".split()),
    set("v values x p a".split()),
)
_ALONE = {"grad", "grads", "gradient", "gradients", "g", "d", "derivative"}

# what optimizers keep beside a parameter or a gradient
_STATE = (
    r"velocity|velocities|vel|momentums?|momenta|(?:first|second)?moments?[12]?|caches?|prev(?:ious)?|old|last"
    r"|acc(?:um)?(?:ulat(?:ed|or))?|av(?:era)?g(?:ed?)?|ema|squared?|sq|sum|history|hist|best|saved|copy|backup|snapshot"
    r"|init(?:ial)?|updates?|deltas?|adam|adagrad|rms(?:prop)?|state"
)
_ARRAYS = "params|parameters|weights|biases|grads|gradients"
_HOLDS_STATE = re.compile(
    rf"(?:[mvsr][12t]?|ms|vs|{_STATE})(?:{_ARRAYS})?|(?:{_ARRAYS})(?:{_STATE})|opt|optim|optimizers?|solver|updater"
)
_STATE_BEFORE, _STATE_AFTER = re.compile(rf"(?:[mvs][12t]?|grad|{_STATE})+"), re.compile(rf"(?:grad|{_STATE})+")
_STATISTIC = re.compile(
    r".*(?:running|moving|ema|population|tracked)_?(?:mean|var|std|stat|avg).*|running.*|moving.*|mean|var(?:iance)?|std"
)
_LIKE_A_GRADIENT = re.compile(
    r"_*(?:d[A-Z_]|grad|nabla|delta).*|.*(?:_grads?|[gG]radients?|Grads?)"
    r"|_*d(?:[a-z]|out|outputs?|in|inputs?|values|scores|logits)_?\d*"
)


@lru_cache(maxsize=4096)
def plain(name: str) -> str:
    """A name without underscores and without the class of a private name: `_Layer__d_W` is `dW`."""
    return re.sub(r"^_[A-Za-z]\w*?__(?=.)", "", name).replace("_", "")


@lru_cache(maxsize=4096)
def _variants(name: str) -> list[str]:
    """A name in lower case without underscores, then its other forms: `weights1` is also `weight1` and `w1`."""
    found = [plain(name).lower()]
    for stems in _STEMS:
        for stem in stems:
            rest = re.fullmatch(rf"(?i:{stem})(|\d.*|[A-Z_].*)", name.lstrip("_"))
            if rest is not None:
                found += [other + plain(rest[1]).lower() for other in stems]
    return list(dict.fromkeys(found))


@lru_cache(maxsize=4096)
def _forms(name: str) -> dict[str, int]:
    """The names that a gradient of `name` may have, in lower case without underscores; 1 for those of a variant."""
    found: dict[str, int] = {}
    for i, bare in enumerate(_variants(name)):
        stem = bare.rstrip("0123456789")
        forms = [*(mark + bare for mark in _BEFORE), *(bare + mark for mark in _WITH)]
        forms += [stem + mark + bare[len(stem) :] for mark in _WITH if stem != bare]  # weights_grad1
        *_, tail = re.findall(r"[A-Z]+(?![a-z])\d*|[A-Za-z][a-z]*\d*|\d+|$", name.rstrip("_"))[:-1] or [bare]
        if i == 0 and len(tail) < len(bare):  # hidden_dW
            forms += [bare[: -len(tail)] + mark + tail.lower() for mark in ("d", "grad", "gradient")]
        forms = [form for form in forms if form not in _ALONE]  # `gradients` is not that of `s`
        found = dict.fromkeys([*forms, *_LISTS.get(bare, ())], int(i > 0)) | found
    return found


def gradients_among(parameters: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    """The names among `names` that may be the gradient of each parameter.

    A gradient goes to the parameter whose name it has most exactly: `dw` to `w`, and to `W` or `weight` only without a `w`.
    """
    by_form: dict[str, list[str]] = {}
    for name in names:
        by_form.setdefault(plain(name).lower(), []).append(name)
    claims: dict[str, list[tuple[int, str]]] = {}
    for parameter in parameters:
        for form, short in _forms(parameter).items():
            for name in by_form.get(form, ()):
                if name != parameter:
                    rank = 2 if short else int(plain(parameter) not in plain(name))
                    claims.setdefault(name, []).append((rank, parameter))
    found: dict[str, list[str]] = {}
    for name, claimed in claims.items():
        for rank, parameter in claimed:
            if rank == min(claimed)[0]:
                found.setdefault(parameter, []).append(name)
    return {
        parameter: [g for g in mine if g not in found] or mine if len(mine) > 1 else mine
        for parameter, mine in found.items()
    }


def is_gradient_of(name: str, parameter: str) -> bool:
    """True if this may be the name of the gradient of `parameter`."""
    return name != parameter and plain(name).lower() in _forms(parameter)


def of_one_parameter(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The names of the value and of the gradient in an object that holds one parameter: `data` and `grad`."""
    names = list(names)
    values = [[name for name in names if plain(name).lower() in row] for row in _VALUES]
    return values[0] or values[1], [name for name in names if plain(name).lower() in _ALONE]


def is_state(name: str, beside: Iterable[str]) -> bool:
    """True if this is a name of what an optimizer keeps for one of the arrays beside it: `vW` or `dW_prev` beside `W`."""
    mine = plain(name).lower()
    for other in beside:
        for form in (*_variants(other), *_forms(other)):
            before, found, after = mine.partition(form)
            if (
                found
                and (before or after)
                and all(
                    not part or pattern.fullmatch(part)
                    for part, pattern in ((before, _STATE_BEFORE), (after, _STATE_AFTER))
                )
            ):
                return True
            if mine == form + name[-1:] and name[-2:] in ("_m", "_v", "_s"):
                return True
    return False


def holds_state(name: str) -> bool:
    """True if this is a name of a collection in which an optimizer keeps its state: `velocity`, `m`."""
    return bool(_HOLDS_STATE.fullmatch(plain(name).lower()))


def is_statistic(name: str) -> bool:
    """True for `running_mean` and its kind."""
    return bool(_STATISTIC.fullmatch(plain(name).lower()))


def is_of_a_call(name: str) -> bool:
    """True for `x`, `inputs`, `out` and their kind, which a layer keeps of its last call."""
    return bool(re.fullmatch(r"x\d*|in|inp|inputs?|lastinputs?|out|outputs?|logits", plain(name).lower()))


def is_like_a_gradient(name: str) -> bool:
    """True for a name such as `dz1` or `out_grad`, which a parameter never has."""
    return bool(_LIKE_A_GRADIENT.fullmatch(name))


def examples(name: str) -> str:
    """Some names under which the gradient of `name` is found."""
    return f"d{name}, grad_{name}, {name}_grad, dL_d{name}"
