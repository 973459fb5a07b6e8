"""Loss scaling, so that gradients of float16 do not underflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any
from weakref import ref

import jax
import jax.numpy as jnp
import numpy as np

from ..engine.arguments import unfold
from ..module.checks import LARGEST, as_count, as_number
from ..module.torch_habits import check_function
from ..runtime.tracebacks import trimmed
from ..state import access, dropped_copies
from ..state import frame as frames
from ..state.cell import Cell
from ..state.concurrent_reads import lend, using
from ..state.pytree import Builder, Stateful
from ..state.static_values import shown
from ..state.structure import changed
from ..state.walk import Node, Walker, join
from .optimizer import Optimizer
from .scaled_gradients import SKIPPED, TRACKER, backward_scaled, step_all, unscale_all

_SETTINGS = ("growth_factor", "backoff_factor", "growth_interval")


class LossScaler(Stateful):
    """Multiplies losses by a number, for gradients that float16 can hold, and finds that number as training goes on.

    Call `backward` in place of `mt.backward` and `step(opt)` in place of `opt.step()`, in eager code, in `mt.jit` and
    `mt.scan`, or on copies in a plain JAX transform (a LossScaler is a pytree, to be returned like the optimizer). If
    all gradients are finite, `step` applies them, divided by the scale; after `growth_interval` such steps in a row
    the scale is multiplied by `growth_factor`. Otherwise it leaves parameters, state and step counts as they are, and
    multiplies the scale by `backoff_factor`. Nothing of this waits for the device.

    Several `backward` calls before one `step` accumulate, as ever. The gradient of a loss in float16 is the scale
    itself, which float16 holds up to 65504: compute losses in float32.

    Args:
        init_scale: the scale at first, finite and > 0.
        growth_factor: > 1.
        backoff_factor: in (0, 1).
        growth_interval: how many steps in a row, an integer >= 1.

    Raises:
        ValueError: if an argument is out of its range.

    Source: `torch.amp.GradScaler`.

    Differs from PyTorch: `step` includes `update`, so optimizers whose gradients are of the same losses go into one call,
    `step(a, b)`, and are skipped together. `step` leaves the gradients scaled. Parameters may be float16 themselves:
    their gradients are divided in float32, on their way into the optimizer.

    Example:
        >>> import jax, jax.numpy as jnp, minitorch_jax as mt
        >>> from minitorch_jax import nn
        >>> model = nn.Linear(2, 1, key=jax.random.key(0)).astype(jnp.float16)
        >>> opt, scaler = mt.Optimizer([model], lr=0.1), mt.LossScaler(init_scale=1024.0)
        >>> def loss_fn(x):
        ...     return (model(x).astype(jnp.float32) ** 2).mean()
        >>> for x in (jnp.ones((4, 2), jnp.float16), jnp.full((4, 2), jnp.inf, jnp.float16)):
        ...     opt.zero_grad()
        ...     loss = scaler.backward(loss_fn, x)
        ...     scaler.step(opt)
        >>> scaler.scale, scaler.skipped, opt.num_steps
        (512.0, 1, 1)
    """

    __slots__ = ("_scale", "_counts", "_settings", "_pending")
    _settings: tuple[float, float, int]  # in the order of _SETTINGS

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        settings = _checked((growth_factor, backoff_factor, growth_interval))
        scale = np.float32(_number("init_scale", init_scale, 0.0))
        birth = dropped_copies.birth_here()
        self._setup(
            Cell(jax.device_put(scale), "state", birth=birth),
            Cell(jax.device_put(np.zeros(4, np.int32), may_alias=False), "state", birth=birth),
            settings,
        )

    def _setup(self, scale: Cell, counts: Cell, settings: tuple[float, float, int]) -> None:
        self._scale, self._counts, self._settings = scale, counts, settings
        self._pending: tuple[Any, list[Any]] | None = None  # the counts that `unscale` stored, and for which optimizers

    # -- training -----------------------------------------------------------------------------------------------------

    @trimmed
    def backward(self, loss_fn: Callable[..., Any], /, *args: Any, has_aux: bool = False, **kwargs: Any) -> Any:
        """`mt.backward` of the loss times the scale.

        Returns:
            The loss as `loss_fn` gave it, not scaled; `(loss, aux)` with `has_aux`.

        Raises:
            TypeError, ValueError: as `mt.backward`.
        """
        check_function(loss_fn, "LossScaler.backward")
        loss_fn, args, kwargs = unfold(loss_fn, args, kwargs)
        out = backward_scaled(loss_fn, args, kwargs, bool(has_aux), self._read(self._scale))
        return out if has_aux else out[0]

    @trimmed
    def step(self, *opts: Any) -> None:
        """Step optimizers with their gradients divided by the scale, unless one is not finite; then update the scale.

        Args:
            *opts: one or more optimizers; all whose gradients are of the losses since the last step.

        Raises:
            TypeError: if something is no Optimizer, or one that cannot be skipped: with NumPy modules, or with a `step`
                of its own.
            ValueError: if there is none, or one twice.
            RuntimeError: if `unscale` was called with other optimizers.
        """
        _check_optimizers("step", opts)
        pending = self._unscaled_for()
        if pending is not None and {*map(id, pending)} != {*map(id, opts)}:
            raise RuntimeError(
                "LossScaler.step() was called with other optimizers than unscale() before it: give both the same ones"
            )
        step_all(*opts, self)

    def unscale(self, *opts: Any) -> None:
        """Divide the gradients of optimizers by the scale now, to clip or to look at them; `step` then does not again.

        Args:
            *opts: all optimizers that the next `step` is called with.

        Raises:
            TypeError, ValueError: as `step`; ValueError also for gradients of float16, which would underflow again.
            RuntimeError: if it was called already since the last `step`.

        Example:
            >>> import jax, jax.numpy as jnp, minitorch_jax as mt
            >>> from minitorch_jax import nn
            >>> model = nn.Linear(2, 1, key=jax.random.key(0))
            >>> opt, scaler = mt.Optimizer([model], lr=0.1), mt.LossScaler()
            >>> loss = scaler.backward(lambda x: model(x).sum(), jnp.ones((1, 2)))
            >>> scaler.unscale(opt)
            >>> model.grads()[1]
            Array([1.], dtype=float32)
            >>> norm = mt.clip_grad_norm(opt, 1.0)
            >>> scaler.step(opt)
        """
        _check_optimizers("unscale", opts)
        for opt in opts:
            plan = opt._plan_now()
            for path, param in zip(plan.paths, plan.params, strict=True):
                if param.value.dtype == jnp.float16:
                    raise ValueError(
                        f"LossScaler.unscale: the gradient of {path} is float16, in which it would underflow again; step()"
                        " divides it in float32. To clip, leave the gradients scaled:"
                        " `mt.clip_grad_norm(opt, max_norm * scaler.scale)`"
                    )
        if self._unscaled_for() is not None:
            raise RuntimeError(
                "LossScaler.unscale() was called twice before step(): call it once, with all optimizers of that step"
            )
        unscale_all(*opts, self)
        self._pending = ref(self._counts.value), [ref(opt) for opt in opts]

    def _unscaled_for(self) -> list[Any] | None:
        """The optimizers that gradients have been divided for, where that is known: nothing has changed the counts since."""
        if self._pending is None or self._pending[0]() is not self._counts.value:
            return None
        return [opt() for opt in self._pending[1]]

    def _check_writable(self) -> None:
        for cell in (self._scale, self._counts):
            access.check_writable(cell, "the scale of a LossScaler", self)

    def _write(self, scale: Any, *counts: Any) -> None:
        """Store the scale, and counts, of which the last are 0."""
        new = jnp.stack([*map(jnp.int32, counts), *[jnp.int32(0)] * (4 - len(counts))])
        access.write(self._scale, scale, "the scale of a LossScaler", self)
        access.write(self._counts, new, "the scale of a LossScaler", self)

    def _count_of(self, place: int) -> Any:
        def count(counts: Any) -> Any:
            return _plain((counts if isinstance(counts, jax.core.Tracer) else jax.device_get(counts))[..., place])

        return self._look(self._counts, count)

    def _read(self, cell: Cell) -> Any:
        if frames.local.frame is not None:
            frames.local.frame.touch(cell, self)
        return cell.value

    def _look(self, cell: Cell, function: Callable[[Any], Any]) -> Any:
        self._read(cell)
        return using(cell, function)

    # -- settings and state -------------------------------------------------------------------------------------------

    @property
    def scale(self) -> Any:
        """The scale: a float, in compiled code an array. Assign it to start from another one."""
        return self._look(self._scale, _plain)

    @scale.setter
    def scale(self, value: Any) -> None:
        if not isinstance(value, jax.core.Tracer):
            value = jax.device_put(np.float32(_number("scale", value, 0.0)))
        access.write(self._scale, value.astype(jnp.float32), "the scale of a LossScaler", self)

    @property
    def skipped(self) -> Any:
        """How many steps have been left out: an integer, in compiled code an array."""
        return self._count_of(SKIPPED)

    @property
    def growth_factor(self) -> float:
        """What the scale is multiplied by after `growth_interval` steps in a row."""
        return self._settings[0]

    @property
    def backoff_factor(self) -> float:
        """What the scale is multiplied by when a step is left out."""
        return self._settings[1]

    @property
    def growth_interval(self) -> int:
        """After how many steps in a row the scale grows."""
        return self._settings[2]

    def state_dict(self) -> dict[str, Any]:
        """Scale, settings and counts as plain numbers, by torch's names, and `skipped`."""
        tracker = self._count_of(TRACKER)
        settings = dict(zip(_SETTINGS, self._settings, strict=True))
        return {"scale": self.scale, **settings, "_growth_tracker": tracker, "skipped": self.skipped}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what another's `state_dict()` gave, or that of torch's GradScaler, which has no `skipped`.

        Raises:
            ValueError: if something is missing, unexpected or out of its range; nothing has changed then.
        """
        known = ("scale", *_SETTINGS, "_growth_tracker")
        wrong = [f"missing: {name}" for name in known if name not in state_dict]
        wrong += [f"unexpected: {name}" for name in state_dict if name not in (*known, "skipped")]
        if wrong:
            raise ValueError(f"state_dict does not fit LossScaler; nothing was loaded: {', '.join(wrong)}")
        settings = _checked(tuple(state_dict[name] for name in _SETTINGS))
        scale = np.float32(_number("scale", state_dict["scale"], 0.0))
        counts = [_count("_growth_tracker", state_dict["_growth_tracker"], 0)]
        counts.append(_count("skipped", state_dict.get("skipped", 0), 0))
        self._check_writable()
        if settings != self._settings:
            access.check_restructurable(self._birth, "LossScaler", "was given other settings")
            self._settings = settings
            changed(self)
        new = jax.device_put([scale, np.asarray([*counts, 0, 0], np.int32)], may_alias=False)
        for cell in (self._scale, self._counts):
            lend(cell)
        access.store_all([self._scale, self._counts], new)

    def __repr__(self) -> str:
        value = self._scale.value
        shown = "scale" if isinstance(value, jax.core.Tracer) else f"scale={_plain(value)}"
        settings = ", ".join(f"{name}={value}" for name, value in zip(_SETTINGS, self._settings, strict=True))
        return f"LossScaler({shown}, {settings})"

    def __getstate__(self) -> Any:
        return self._scale, self._counts, self._settings

    def __setstate__(self, state: Any) -> None:
        self._setup(*state)

    # -- pytree -------------------------------------------------------------------------------------------------------

    def _describe(self, walker: Walker, path: str) -> Node:
        held = walker.cell(self._scale, join(path, "scale")), walker.cell(self._counts, join(path, "counts"))
        return *held, self._settings

    @classmethod
    def _statics(cls, payload: Node, path: str) -> Iterator[tuple[str, Any]]:
        return ((join(path, n), ("static", type(v), v)) for n, v in zip(_SETTINGS, payload[2], strict=True))

    @classmethod
    def _rebuild(cls, payload: Node, builder: Builder) -> LossScaler:
        self = object.__new__(cls)
        builder.begin(self)
        self._setup(builder.cells[payload[0]], builder.cells[payload[1]], payload[2])
        return self


# -- checks ------------------------------------------------------------------------------------------------------------


def _check_optimizers(name: str, opts: tuple[Any, ...]) -> None:
    if not opts:
        raise ValueError(f"LossScaler.{name} takes one or more optimizers; it was given none")
    for opt in opts:
        if not isinstance(opt, Optimizer):
            raise TypeError(f"LossScaler.{name} takes optimizers; got {shown(opt)} ({type(opt).__name__})")
        if type(opt).step is not Optimizer.step:
            raise TypeError(
                f"LossScaler.{name}: {type(opt).__name__} has a step() of its own, which cannot be skipped; call"
                " `mt.backward` and that"
            )
        if opt._plan_now().foreign:
            raise TypeError(
                f"LossScaler.{name}: {type(opt).__name__} holds modules of NumPy arrays, whose gradients are their own;"
                " convert them with `minitorch_jax.adapters.numpy`"
            )
    if len({*map(id, opts)}) < len(opts):
        raise ValueError(f"LossScaler.{name} was given an optimizer twice")


def _checked(settings: tuple[Any, ...]) -> tuple[float, float, int]:
    """The settings as they are kept; ValueError if one is out of its range."""
    growth = _number("growth_factor", settings[0], 1.0)
    return growth, _number("backoff_factor", settings[1], 0.0, 1.0), _count("growth_interval", settings[2], 1)


def _number(name: str, value: Any, low: float, high: float = LARGEST) -> float:
    number = as_number("LossScaler", name, value, low, high, above=True, below=high < LARGEST)
    as_number("LossScaler", name, float(np.float32(number)), low, high, above=True)  # as which it is computed with
    return number


def _count(name: str, value: Any, low: int) -> int:
    return as_count("LossScaler", name, value, low)


def _plain(value: Any) -> Any:
    """A number, or an array of them for a traced or stacked scaler."""
    return value if isinstance(value, jax.core.Tracer) or np.ndim(value) else jax.device_get(value).item()
