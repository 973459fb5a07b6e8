"""Names and arguments of torch that are not here: each is answered with what to write instead. And what `dir` lists."""

from __future__ import annotations

import ast
import copy
import pickle
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest
from oracle import actual as torch

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.module.torch_arrays import METHODS
from minitorch_jax.module.torch_names import ARGUMENTS, ROWS, answer

X = jnp.ones((3, 2))
PLACES = {
    "Module": lambda: nn.Linear(2, 1),
    "Optimizer": lambda: optim.SGD([nn.Linear(2, 1)]),
    "mt": lambda: mt,
    "nn": lambda: nn,
    "nn.functional": lambda: nn.functional,
    "nn.utils": lambda: nn.utils,
    "nn.utils.rnn": lambda: nn.utils.rnn,
    "PackedSequence": lambda: nn.utils.rnn.pack_sequence([X]),
    "optim": lambda: optim,
    "optim.schedules": lambda: optim.schedules,
}


@pytest.mark.parametrize(("place", "name"), [(place, name) for place, rows in ROWS.items() for name in rows])
def test_a_name_of_torch_is_answered(place, name):
    """A name that exists here has no row: reading it would not raise."""
    owner = PLACES[place]()
    with pytest.raises(AttributeError, match=rf"has no attribute `{name}`, as torch has. Instead: .") as error:
        getattr(owner, name)
    assert "\n" not in str(error.value) and "{" not in str(error.value).replace('{"modules"', "")
    assert not hasattr(owner, name) and name not in dir(owner)
    assert getattr(owner, name, None) is None


def test_code_in_the_answers_is_code_and_names_what_exists():
    known = {"mt": "minitorch_jax", "jnp": "jax.numpy", "jax": "jax", "F": "minitorch_jax.nn.functional"}
    known |= {name: f"minitorch_jax.{name}" for name in ("nn", "optim")}
    count = 0
    for rows in (*ROWS.values(), METHODS):
        for name, row in rows.items():
            for code in re.findall("`([^`]+)`", row.format(name=name)):
                if code.startswith(("XLA_FLAGS", "minitorch_jax.", "to_torch", "_")) or code == "Lazy":
                    continue
                ast.parse(code + " pass" if code.endswith(":") else code)
                for path in re.findall(r"(?<![\w.\"'])(?:mt|nn|optim|jnp|jax|F)(?:\.\w+)+", code):
                    first, _, rest = path.partition(".")
                    assert pkgutil.resolve_name(f"{known[first]}.{rest}") is not None
                    count += 1
    assert count > 150


OTHER = {  # names that nobody types: of torch's own code, or of kinds of tensors that are not here
    "Module": {"T_destination", "call_super_init", "dump_patches"},
    "Optimizer": {"OptimizerPostHook", "OptimizerPreHook", "profile_hook_step"},
    "optim": set(),
    "nn": {"common_types", "factory_kwargs", "quantized_dynamic"},
    "nn.utils": set(),
    "nn.utils.rnn": {"Callable", "Iterable", "NamedTuple", "PackedSequence_", "Self", "Tensor", "TypeVar", "bind"}
    | {"Any", "copy_method_params", "torch", "warnings"},
}


@pytest.mark.one_in(3)
@pytest.mark.parametrize("place", OTHER)
def test_every_public_name_of_torch_is_here_or_answered(place):
    model = torch.nn.Linear(2, 1)
    theirs = {
        "Module": model,
        "Optimizer": torch.optim.SGD(model.parameters()),
        "optim": torch.optim,
        "nn": torch.nn,
        "nn.utils": torch.nn.utils,
        "nn.utils.rnn": torch.nn.utils.rnn,
    }[place]
    names = {name for name in dir(theirs) if not name.startswith("_")}
    ours = PLACES[place]()
    without = {name for name in names if not hasattr(ours, name) and answer(place, name) is None}
    assert len(names) > 4 and without <= OTHER[place]


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("zeros", "`jnp.zeros`"),
        ("einsum", "`jnp.einsum`"),
        ("linalg", "`jnp.linalg`"),
        ("relu", "`nn.functional.relu`"),
        ("Linear", "`nn.Linear`"),
        ("SGD", "`optim.SGD`"),
        ("digamma", "`jax.scipy.special.digamma`"),
    ],
)
def test_what_another_package_has_is_found_there(name, instead):
    with pytest.raises(AttributeError, match=f"Instead: {re.escape(instead)}$"):
        getattr(mt, name)


def test_other_names_get_the_nearest():
    for owner, name, near in [(mt, "bakward", "backward"), (nn, "Liner", "Linear"), (optim, "AdamX", "Adam")]:
        with pytest.raises(AttributeError, match=f"has no attribute `{name}`; did you mean `{near}"):
            getattr(owner, name)
    with pytest.raises(AttributeError, match="module 'minitorch_jax' has no attribute `qqqq`$"):
        mt.qqqq
    with pytest.raises(
        AttributeError, match="optim' has no attribute `cosine`, as torch has. Instead: `optim.schedules.c"
    ):
        optim.cosine
    with pytest.raises(ImportError, match="manual_seed"):
        from minitorch_jax import manual_seed  # noqa: F401


@pytest.mark.parametrize(("name", "instead"), [("update_parameters", "update(model)"), ("n_averaged", "num_averaged")])
def test_an_average_answers_to_the_names_of_torchs(name, instead):
    averaged = optim.AveragedModel(nn.Linear(2, 1))
    with pytest.raises(AttributeError, match=rf"AveragedModel has .* Instead: `averaged\.{re.escape(instead)}`$"):
        getattr(averaged, name)


def test_protocols_find_what_they_found_before():
    layer = nn.Linear(2, 1)
    for owner in (layer, optim.SGD([layer]), mt, nn, optim):
        for name in ("__array__", "__jax_array__", "__getnewargs__", "__wrapped__", "__torch_function__", "_repr_png_"):
            assert not hasattr(owner, name)
    assert copy.deepcopy(layer).weight.shape == pickle.loads(pickle.dumps(layer)).weight.shape == (1, 2)
    assert copy.copy(mt.TraceError) is mt.TraceError


WAYS = {
    "module": lambda use: Using(use)(X),
    "jit": lambda use: mt.jit(lambda x: use(x))(X),
    "backward": lambda use: mt.backward(lambda m, x: use(m(x).sum()), nn.Linear(2, 1), X),
    "grad": lambda use: mt.grad(lambda m, x: use(m(x).sum()))(nn.Linear(2, 1), X),
    "scan": lambda use: mt.scan(lambda x: use(x), X),
    "module in jit": lambda use: mt.jit(lambda m, x: m(x))(Using(use), X),
}


class Using(mt.Module):
    def __init__(self, use):
        self.use = use

    def forward(self, x):
        return self.use(x)


USED = [*METHODS, "unsqueeze", "permute", "exp", "topk", "add_", "masked_fill", "detach"]


@pytest.mark.parametrize(
    ("way", "name"),
    [("jit", name) for name in USED] + [(way, name) for way in WAYS if way != "jit" for name in ("backward", "view")],
)
def test_a_method_of_a_tensor_gets_a_note(way, name):
    """The error is JAX's own; the note says what to write, once."""
    use = (lambda x: x.view(2, -1)) if name == "view" else lambda x: getattr(x, name)
    with pytest.raises((AttributeError, TypeError, NotImplementedError)) as error:
        WAYS[way](use)
    notes = [note for note in error.value.__notes__ if note.startswith(f"`{name}` is of torch's tensors. Instead: ")]
    assert len(notes) == 1 and "\n" not in notes[0]


def test_other_errors_get_no_note_on_tensors():
    for use in (lambda x: x.qqqq, lambda x: X.shape.qqqq, lambda x: len(3), lambda x: nn.qqqq):
        with pytest.raises((AttributeError, TypeError)) as error:
            WAYS["module"](use)
        assert not any("torch's tensors" in note for note in error.value.__notes__)


def calls():
    layer = nn.Linear(2, 1)
    opt = optim.Adam([layer])
    return {
        "zero_grad": [layer.zero_grad, opt.zero_grad],
        "step": [opt.step],
        "layer": [lambda **given: nn.Linear(2, 1, **given), lambda **given: nn.LSTM(2, 1, **given)],
        "optimizer": [
            lambda **given: optim.Adam([layer], **given),
            lambda **given: optim.SGD(**({"modules": [layer]} if "params" not in given else {}), **given),
            lambda **given: mt.Optimizer([layer], **given),
        ],
        "to": [layer.to, lambda **given: layer.to(jax.devices()[0], **given)],
        "compile": [layer.compile],
        "load_state_dict": [lambda **given: layer.load_state_dict(layer.state_dict(), **given)],
    }


@pytest.mark.parametrize(
    ("place", "name"), [(place, name) for place, rows in ARGUMENTS.items() for row in rows for name in row.split()]
)
def test_an_argument_of_torch_is_answered(place, name):
    text = next(text for row, text in ARGUMENTS[place].items() if name in row.split())
    for call in calls()[place]:
        with pytest.raises(
            TypeError, match=f"got an unexpected keyword argument '{name}', which torch takes: "
        ) as error:
            call(**{name: "cuda"})
        assert "{" not in str(error.value) and text.partition("{")[0] in str(error.value)


def test_arguments_that_mean_the_same_here_are_taken():
    layer = nn.Linear(2, 1)
    mt.backward(lambda: layer(X).sum())
    layer.zero_grad(set_to_none=False)
    assert not layer.grads()[0].any()
    optim.SGD([layer]).zero_grad(set_to_none=False)
    with pytest.raises(TypeError, match=r"to\(\) got an unexpected keyword argument 'devise'$"):
        layer.to(devise="cpu")

    class Placed(mt.Module):
        def __init__(self, device):
            self.device = device

    class Any_(mt.Module):
        def __init__(self, **options):
            self.options = tuple(options)

    assert Placed(device="cpu").device == "cpu" and Any_(device="cpu").options == ("device",)
    with pytest.raises(TypeError, match=r"step\(\) got an unexpected keyword argument 'closure'.*only LBFGS"):
        optim.SGD([layer]).step(lambda: 1.0)


# -- dir --------------------------------------------------------------------------------------------------------------


def test_dir_lists_what_a_module_holds():
    class Net(mt.Module):
        def __init__(self):
            self.scale, self.count = mt.Parameter(jnp.ones(2)), mt.Buffer(0)
            self.head, self.blocks, self.size = nn.Linear(2, 1), [nn.ReLU()], 3

    net = Net()
    assert {"scale", "count", "head", "blocks", "size", "forward", "parameters"} <= set(dir(net))
    assert {"weight", "bias", "in_features"} <= set(dir(net.head))
    del net.scale
    assert "scale" not in dir(net)
    assert all(hasattr(net, name) for name in dir(net))


def test_dir_lists_the_settings_of_an_optimizer_and_of_its_groups():
    opt = optim.Adam([{"modules": [nn.Linear(2, 1)], "lr": 0.1}])
    settings = {"lr", "betas", "eps", "weight_decay", "amsgrad", "master_weights"}
    assert settings <= set(dir(opt)) and {"modules", *settings} <= set(dir(opt.groups[0]))


def test_dir_of_the_package_is_its_public_names():
    import minitorch_jax.adapters.numpy  # noqa: F401  # then an attribute of the package

    for package in (mt, nn, optim, nn.functional, nn.utils, nn.utils.rnn, optim.schedules):
        names = dir(package)
        assert names == sorted(set(names)) and all(hasattr(package, name) for name in names)
        assert not any(name.startswith("_") for name in names)
    assert {"backward", "jit", "Module", "nn", "optim", "adapters"} <= set(dir(mt))
    for name in ("autograd", "engine", "state", "module", "runtime", "saving", "annotations", "TYPE_CHECKING"):
        assert name not in dir(mt)
    assert {"Linear", "Module", "functional", "init", "utils"} <= set(dir(nn)) and {"linear", "conv", "Any"}.isdisjoint(
        dir(nn)
    )
    assert {"SGD", "schedules", "setting"} <= set(dir(optim)) and {"plan", "rules", "lbfgs"}.isdisjoint(dir(optim))
    assert "cosine" in dir(optim.schedules) and "stepped" not in dir(optim.schedules)
    assert "relu" in dir(nn.functional) and "vision" not in dir(nn.functional)
