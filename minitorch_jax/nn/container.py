"""Containers of modules."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NoReturn

from ..module.module import Module
from ..state.static_values import module_of


def _check_module(value: Any, where: str) -> Module:
    if isinstance(value, Module):
        return value
    got, fix = f"a {type(value).__name__}", ""
    if isinstance(value, type) and issubclass(value, Module):
        got, fix = f"the class {value.__name__}", f": write `{value.__name__}(...)`, which makes a module of it"
    elif isinstance(value, Iterable) and not hasattr(value, "shape") and where == "Sequential":
        fix = ": write `Sequential(*modules)`, or `Sequential(a, b)`"
    elif module_of(value) is not value:
        got = f"the function that `mt.jit` made of a {type(module_of(value)).__name__}"
        fix = ": list the module itself, and write `module.compile()`, which compiles its calls"
    elif callable(value):
        got = f"the function {getattr(value, '__name__', value)}"
        fix = ": list its layer, such as `nn.ReLU()` for `relu`, or a module whose `forward` calls it"
    raise TypeError(f"{where} holds modules; got {got}{fix}")


def _refuse_call(container: Module, key: str) -> NoReturn:
    kind = type(container).__name__
    raise NotImplementedError(
        f"a {kind} only holds modules, and says not in which order they run: call them yourself, `layers[{key}](x)`, or"
        " use `nn.Sequential`"
    )


def check_name(key: Any, container: Module, kind: str) -> str:
    """`key`, if it can name an entry of the container. Raises KeyError if not."""
    if not isinstance(key, str) or not key or "." in key or key in {*dir(type(container)), "training"}:
        raise KeyError(
            f"{key!r} cannot be a {kind}'s name: a name must be a non-empty string without dots, and not an attribute"
            f" of {type(container).__name__}"
        )
    return key


class _Numbered(Module):
    """Modules under the names "0", "1", …, as in torch's state_dict."""

    def _modules(self) -> list[Module]:
        return [module for name, module in vars(self).items() if name.isdigit()]

    def _replace(self, modules: Iterable[Any]) -> None:
        """Hold exactly these modules, in this order."""
        new = [_check_module(module, type(self).__name__) for module in modules]
        with self._restructuring(type(self).__name__):
            for name in [name for name in vars(self) if name.isdigit()]:
                del vars(self)[name]
            vars(self).update({str(i): module for i, module in enumerate(new)})

    def __len__(self) -> int:
        return len(self._modules())

    def __iter__(self) -> Iterator[Module]:
        return iter(self._modules())

    def __add__(self, other: Any) -> Any:
        """A new container with the modules of both containers."""
        if not isinstance(other, _Numbered):
            return NotImplemented
        new = type(self)()
        new._replace([*self._modules(), *other._modules()])
        return new

    def __iadd__(self, other: Any) -> Any:
        return self.extend(other)

    def __setitem__(self, index: Any, module: Any) -> None:
        modules = self._modules()
        modules[index] = module
        self._replace(modules)

    def __delitem__(self, index: Any) -> None:
        modules = self._modules()
        del modules[index]
        self._replace(modules)

    def append(self, module: Module) -> Any:
        """Add a module at the end. Returns the container."""
        self._replace([*self._modules(), module])
        return self

    def insert(self, index: int, module: Module) -> Any:
        """Add a module before index `index`. Returns the container."""
        modules = self._modules()
        modules.insert(index, module)
        self._replace(modules)
        return self

    def extend(self, modules: Iterable[Module]) -> Any:
        """Add modules at the end. Returns the container."""
        self._replace([*self._modules(), *modules])
        return self

    def pop(self, index: int = -1) -> Module:
        """Remove a module and return it."""
        modules = self._modules()
        module = modules.pop(index)
        self._replace(modules)
        return module


class Sequential(_Numbered):
    """Calls modules one after another.

    Args:
        *modules: the modules, or one dict of names and modules.

    Raises:
        TypeError: if something is not a module.

    Example:
        >>> import jax.numpy as jnp, jax
        >>> from minitorch_jax import nn
        >>> net = nn.Sequential(nn.Linear(2, 3, key=jax.random.key(0)), nn.ReLU())
        >>> net(jnp.ones((1, 2))).shape
        (1, 3)
        >>> net[0]
        Linear(in_features=2, out_features=3, bias=True)
    """

    def __init__(self, *modules: Any) -> None:
        if len(modules) == 1 and isinstance(modules[0], Mapping):
            for name, module in modules[0].items():
                setattr(self, name, _check_module(module, "Sequential"))
        else:
            self._replace(modules)

    def _modules(self) -> list[Module]:
        return [module for module in vars(self).values() if isinstance(module, Module)]

    def _replace(self, modules: Iterable[Any]) -> None:
        if any(not name.isdigit() for name, module in vars(self).items() if isinstance(module, Module)):
            raise TypeError(
                "a Sequential with named modules has no list operations; assign by name: `net.name = module`"
            )
        super()._replace(modules)

    def __getitem__(self, index: Any) -> Any:
        """The module at an index. For a slice, a Sequential of the same modules with their names."""
        if not isinstance(index, slice):
            return self._modules()[index]
        named = [(name, module) for name, module in vars(self).items() if isinstance(module, Module)]
        return Sequential(dict(named[index]))

    def forward(self, input: Any) -> Any:
        for module in self._modules():
            input = module(input)
        return input


class ModuleList(_Numbered):
    """A list of modules. It is a module itself.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn
        >>> layers = nn.ModuleList([nn.Linear(2, 2, key=jax.random.key(i)) for i in range(3)])
        >>> len(layers), layers.num_parameters()
        (3, 18)
    """

    def __init__(self, modules: Iterable[Module] | None = None) -> None:
        self._replace(modules or ())

    def __getitem__(self, index: Any) -> Any:
        """The module at an index. For a slice, a ModuleList of the same modules."""
        found = self._modules()[index]
        return ModuleList(found) if isinstance(index, slice) else found

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: a list says not in which order its modules run."""
        _refuse_call(self, "i")


class ModuleDict(Module):
    """A dict of names and modules. It is a module itself.

    Example:
        >>> import jax
        >>> from minitorch_jax import nn
        >>> heads = nn.ModuleDict({"a": nn.Linear(2, 2, key=jax.random.key(0)), "b": nn.Identity()})
        >>> list(heads.keys()), "a" in heads
        (['a', 'b'], True)
    """

    def __init__(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]] | None = None) -> None:
        self.update(modules or ())

    def _modules(self) -> dict[str, Module]:
        return {name: module for name, module in vars(self).items() if isinstance(module, Module)}

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise NotImplementedError: a dict says not in which order its modules run."""
        _refuse_call(self, "name")

    def __getitem__(self, key: str) -> Module:
        return self._modules()[key]

    def __setitem__(self, key: str, module: Module) -> None:
        setattr(self, check_name(key, self, "module"), _check_module(module, "ModuleDict"))

    def __delitem__(self, key: str) -> None:
        self.pop(key)

    def __len__(self) -> int:
        return len(self._modules())

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules())

    def __contains__(self, key: object) -> bool:
        return key in self._modules()

    def keys(self) -> Iterable[str]:
        """The names."""
        return self._modules().keys()

    def values(self) -> Iterable[Module]:
        """The modules."""
        return self._modules().values()

    def items(self) -> Iterable[tuple[str, Module]]:
        """Names and modules."""
        return self._modules().items()

    def update(self, modules: Mapping[str, Module] | Iterable[tuple[str, Module]]) -> None:
        """Add or replace modules."""
        for name, module in dict(modules).items():
            self[name] = module

    def clear(self) -> None:
        """Remove all modules."""
        for key in self._modules():
            delattr(self, key)

    def pop(self, key: str) -> Module:
        """Remove a module and return it."""
        module = self._modules()[key]
        delattr(self, key)
        return module
