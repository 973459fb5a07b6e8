"""Packs end in padding, which nothing sees: no norm, no check of gradients, no assignment, nothing that is saved."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from optimizers import GROUPED, OPTIMIZERS, stepped
from training import assert_same, everything

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.state.packed import PAD_TO, padded
from minitorch_jax.state.walk import walk_of

INPUT = jnp.linspace(-1.0, 1.0, 6).reshape(3, 2)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*no gradient accumulated|.*no loss has read")
        yield


def make_model(dtype: Any = jnp.float32) -> nn.Sequential:
    """Twelve numbers in three matrices, which every optimizer takes."""
    return nn.Sequential(*[nn.Linear(2, 2, bias=False, key=jax.random.key(i), dtype=dtype) for i in range(3)])


def twins(kind: Any, **options: Any) -> list[tuple[Any, Any]]:
    """Models with optimizers; the first is packed."""
    found = [(model, kind([model], **options)) for model in (make_model(), make_model())]
    mt.pack(found[0][0])
    return found


def numbers(*objects: Any) -> dict[str, Any]:
    return {name: value for name, value in everything(*objects).items() if not isinstance(value, str | None)}


def flats(model: Any, opt: Any) -> dict[str, Any]:
    """The flat arrays of a packed model's parameters, gradients and optimizer state."""
    params = walk_of(model).params
    cells = {cell.pack.cell for cell in params} | {cell.grad.pack.cell for cell in params}
    cells |= {cell.pack.cell for _, state in opt._state.values() for cell in state if cell.pack is not None}
    return {f"{cell.kind}{i}": cell.value for i, cell in enumerate(cells) if cell.value is not None}


def padding_of_gradients(model: Any) -> Any:
    packs = {cell.grad.pack for cell in walk_of(model).params} - {None}
    parts = [np.asarray(pack.cell.value[pack.size :]) for pack in packs if isinstance(pack.cell.value, jax.Array)]
    return np.concatenate([np.zeros(0), *parts])


# ---------------------------------------------------------------------------------------------------------------------
# How long a flat array is


@pytest.mark.parametrize("size", [2, PAD_TO - 1, PAD_TO, PAD_TO + 1, 3 * PAD_TO])
def test_flat_arrays_are_of_even_sizes(size: int) -> None:
    """What XLA on CPU vectorises; a size that is even already stays."""
    layer = nn.Linear(size - 1, 1, key=jax.random.key(0))  # and one bias
    opt = optim.Adam([layer])
    mt.pack(layer)
    for _ in range(2):
        layer.accumulate([jnp.ones_like(p) for p in layer.parameters()])
        opt.step()
    found = flats(layer, opt)
    assert len(found) == 4 and {array.shape for array in found.values()} == {(padded(size),)}
    assert padded(size) % PAD_TO == 0 and size <= padded(size) < size + PAD_TO
    (pack,) = {cell.pack for cell in walk_of(layer).params}
    assert pack.size == size and not pack.has_holes()


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_packs_of_other_dtypes_are_padded_too(dtype: Any) -> None:
    model = make_model(dtype)
    opt = optim.SGD([model], lr=0.5, momentum=0.5, master_weights=True)
    mt.pack(model)
    before = np.asarray(model[1].weight, np.float32)
    model.accumulate([jnp.ones_like(p) for p in model.parameters()])
    opt.step()
    assert {array.shape for array in flats(model, opt).values()} == {(PAD_TO,)}
    assert_allclose(np.asarray(model[1].weight, np.float32), before - 0.5, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------------
# All optimizers


@pytest.mark.one_in(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_does_what_it_does_to_the_unpacked_twin(name: str) -> None:
    """Rules element by element, and rules that use norms (LARS, LAMB, Muon); with checks, norms, clipping, decay."""
    options = {"track_grad_norm": True, "skip_nonfinite": True} if name in GROUPED else {}
    pair = twins(OPTIMIZERS[name], **options)
    found = []
    for model, opt in pair:
        seen: list[Any] = []
        for _ in range(2):
            stepped(opt, INPUT)
        if name in GROUPED:
            opt.zero_grad()
            mt.backward(lambda model: (model(INPUT) ** 2).mean(), model)
            seen.append(mt.clip_grad_norm(model, 0.1))
            opt.step()
            seen += [opt.grad_norm]
            model.grads()[1] = jnp.full((2, 2), np.nan)
            opt.step()
            seen += [opt.skipped, opt.num_steps]
            stepped(opt, INPUT)
            seen.append(opt.grad_norm)
        found.append(np.array(list(map(float, seen)), np.float32))
    assert_allclose(*found, rtol=2e-5)
    assert_same(numbers(*pair[0]), numbers(*pair[1]), rtol=2e-5)
    if name in GROUPED:
        assert found[0][2] == 1  # one step was skipped
    assert not padding_of_gradients(pair[0][0]).any()


@pytest.mark.parametrize("name", ["SGD", "Adam", "LAMB"])
def test_weight_decay_of_matrices_only(name: str) -> None:
    options = {"weight_decay": 0.3, "decay_matrices_only": True, "lr": 0.1}
    models = [nn.Linear(3, 5, key=jax.random.key(0)) for _ in range(2)]
    mt.pack(models[0])
    for model in models:
        opt = OPTIMIZERS[name]([model], **options)
        for _ in range(3):
            opt.zero_grad()
            mt.backward(lambda model: (model(jnp.ones((2, 3))) ** 2).mean(), model)
            opt.step()
    assert_same(everything(models[0]), everything(models[1]), rtol=2e-5)


# ---------------------------------------------------------------------------------------------------------------------
# Rules that make NaN of padding


class Ratio(mt.Optimizer):
    """Where gradient and state are zero, as in padding, it divides zero by zero."""

    elementwise = True

    @staticmethod
    def init_state(p: Any, h: Any) -> Any:
        return jnp.zeros_like(p)

    @staticmethod
    def update(p: Any, g: Any, s: Any, h: Any) -> Any:
        s = 0.5 * s + g * g
        return p - h.lr * g / jnp.sqrt(s), s


def accumulate(model: Any, value: float = 1.0) -> None:
    model.accumulate([jnp.full_like(p, value) for p in model.parameters()])


@pytest.mark.parametrize("jitted", [False, True])
def test_padding_of_nan_is_not_seen(jitted: bool) -> None:
    pair = twins(Ratio, skip_nonfinite=True, track_grad_norm=True)
    for model, opt in pair:
        step = mt.jit(opt.step) if jitted else opt.step
        for _ in range(3):
            opt.zero_grad()
            accumulate(model)
            norm = mt.clip_grad_norm(model, 100.0)
            step()
            model[1].weight = 2 * model[1].weight
            assert_allclose([norm, opt.grad_norm], np.sqrt(12), rtol=1e-6)
        assert opt.skipped == 0 and all(np.isfinite(p).all() for p in model.parameters())
    if not jitted:
        assert any(np.isnan(array).any() for array in flats(*pair[0]).values())  # else this test shows nothing
    assert_same(everything(*pair[0]), everything(*pair[1]), rtol=2e-5)


@pytest.mark.parametrize("disable_jit", [False, True])
def test_padding_of_nan_is_not_found_by_jaxs_own_check(disable_jit: bool) -> None:
    pair = twins(Ratio, skip_nonfinite=True)
    for model, opt in pair:
        accumulate(model)
        opt.step()  # leaves NaN in the padding
        with jax.debug_nans(True), jax.disable_jit(disable_jit):
            model[2].weight = 2 * model[2].weight
            for i in range(2):
                opt.zero_grad()
                accumulate(model)
                mt.clip_grad_norm(model, 1.0)
                opt.step()
                model[i].weight = 2 * model[i].weight
                model.grads()[i] = jnp.ones((2, 2))
            opt.step()
    assert_same(everything(*pair[0]), everything(*pair[1]), rtol=2e-5)


def test_a_nan_in_one_parameter_is_no_obstacle_to_reading_and_assigning_others() -> None:
    """Nothing is computed there that JAX's check could rightly complain of."""
    model = make_model()
    mt.pack(model)
    model[0].weight = jnp.full((2, 2), np.nan)
    with jax.debug_nans(True):
        assert np.isnan(model[0].weight).all() and np.isfinite(model[1].weight).all()
        model[1].weight = jnp.ones((2, 2))
        assert_array_equal(model[1].weight, np.ones((2, 2)))


# ---------------------------------------------------------------------------------------------------------------------
# Gradients: zeros, whatever is done to them

ACTIONS = {
    "backward": lambda model, opt: mt.backward(lambda model: (model(INPUT) ** 2).mean(), model),
    "accumulate": lambda model, opt: accumulate(model),
    "accumulate NaN": lambda model, opt: accumulate(model, np.nan),
    "assign one": lambda model, opt: model.grads().__setitem__(1, jnp.ones((2, 2))),
    "assign all": lambda model, opt: [
        model.grads().__setitem__(i, jnp.ones((2, 2))) for i in range(len(model.grads()))
    ],
    "scale": lambda model, opt: mt.scale_grads(model, 0.5),
    "clip values": lambda model, opt: mt.clip_grad_value(model, 0.75),
    "clip the norm": lambda model, opt: mt.clip_grad_norm(model, 0.5),
    "step": lambda model, opt: opt.step(),
    "zero": lambda model, opt: opt.zero_grad(),
    "freeze": lambda model, opt: model[2].freeze(),
    "unfreeze": lambda model, opt: model[2].unfreeze(),
}


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.sampled_from(sorted(ACTIONS)), min_size=1, max_size=8))
def test_gradients_end_in_zeros_whatever_was_done(actions: list[str]) -> None:
    pair = twins(optim.SGD, lr=0.01, track_grad_norm=True)
    for action in actions:
        for model, opt in pair:
            ACTIONS[action](model, opt)
        packed, plain = (model for model, _ in pair)
        assert not padding_of_gradients(packed).any()
        for mine, theirs in zip(packed.grads(), plain.grads(), strict=True):
            assert_allclose(mine, theirs, rtol=1e-4)
    assert_allclose(*(mt.clip_grad_norm(model, 1.0) for model, _ in pair), rtol=1e-4)
    for _, opt in pair:
        opt.step()
    assert_allclose(*(opt.grad_norm for _, opt in pair), rtol=1e-4)


def test_a_part_of_a_packed_model_that_has_no_gradients_is_clipped() -> None:
    """There is nothing to do; it was a TypeError."""
    model, _ = twins(optim.SGD)[0]
    assert float(mt.clip_grad_norm(model[0], 1.0)) == 0.0


def test_what_has_left_a_pack_is_not_clipped_any_more() -> None:
    """A frozen parameter's gradient was still in the flat array, and counted in the norm."""
    norms = []
    for model, _ in twins(optim.SGD):
        accumulate(model)
        model[0].freeze()
        norms.append(float(mt.clip_grad_norm(model, 0.5)))
        assert_allclose(model.grads()[0], np.full((2, 2), 0.5 / np.sqrt(8)), rtol=1e-5)
    assert norms == pytest.approx([np.sqrt(8)] * 2)


# ---------------------------------------------------------------------------------------------------------------------
# What is saved and copied


def test_what_is_saved_and_copied_has_no_padding(tmp_path: Path) -> None:
    (packed, opt), (plain, plain_opt) = twins(optim.Adam)
    for model, its_opt in ((packed, opt), (plain, plain_opt)):
        accumulate(model)
        its_opt.step()
        mt.save(tmp_path / f"{id(model)}", model=model, opt=its_opt)
    sizes = [(tmp_path / f"{id(model)}").stat().st_size for model in (packed, plain)]
    assert sizes[0] == sizes[1]
    shapes = [
        {name: np.shape(value) for name, value in everything(*both).items()}
        for both in ((packed, opt), (plain, plain_opt))
    ]
    assert shapes[0] == shapes[1]
    assert [leaf.shape for leaf in jax.tree.leaves(opt)] == [leaf.shape for leaf in jax.tree.leaves(plain_opt)]
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert_same(everything(other), everything(plain_opt), rtol=2e-5)
    mt.load(tmp_path / f"{id(plain)}", model=packed, opt=opt)
    assert_same(everything(packed, opt), everything(plain, plain_opt), rtol=0)
