"""`mt.detect_anomaly`: what is not finite first is named, nothing has changed, and finite steps are silent."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.module import anomaly, random

X = np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3)
BAD = np.where(X > 0.9, np.nan, X)


class Log(mt.Module):
    def forward(self, x: Any) -> Any:
        return jnp.log(x)


class Net(mt.Module):
    """With running statistics and dropout before the place where NaN arises: for negative `shift`, in `blocks.1.0`."""

    def __init__(self) -> None:
        self.first = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.blocks = [nn.Dropout(0.1), nn.Sequential(Log(), nn.Linear(3, 2))]

    def forward(self, x: Any, shift: Any) -> Any:
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(jnp.abs(x) + shift if block is self.blocks[1] else x)
        return x


class Trainer:
    def __init__(self) -> None:
        mt.seed(0)
        self.model = Net()
        self.opt = optim.SGD([self.model], lr=0.01, momentum=0.9)
        self.jitted = mt.jit(self.step, keep_grads=True)

    def loss(self, x: Any, shift: Any) -> Any:
        return (self.model(x, shift) ** 2).mean()

    def step(self, x: Any, shift: Any) -> Any:
        self.opt.zero_grad()
        loss = mt.backward(self.loss, x, shift)
        self.opt.step()
        return loss

    def state(self) -> list[np.ndarray]:
        stream = random.current().cell.value
        return [np.asarray(leaf) for leaf in jax.tree.leaves((self.model, self.opt, self.model.grads()[:], stream))]


WAYS: dict[str, Callable[[Trainer, float], Any]] = {
    "backward": lambda t, shift: mt.backward(t.loss, X, shift),
    "value_and_grad": lambda t, shift: mt.value_and_grad(t.loss)(X, shift),
    "jit": lambda t, shift: t.jitted(X, shift),
    "jit of backward": lambda t, shift: mt.jit(lambda x: mt.backward(t.loss, x, shift))(X),
    "scan": lambda t, shift: mt.scan(
        t.step, np.stack([X] * 3), np.array([1.0, 1.0, shift], np.float32), keep_grads=True
    ),
    "jit of scan": lambda t, shift: mt.jit(
        lambda xs: mt.scan(lambda x: t.step(x, shift), xs, keep_grads=True), keep_grads=True
    )(np.stack([X] * 2)),
}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("way", WAYS)
def test_the_module_is_named_and_nothing_has_changed(way: str) -> None:
    trainer = Trainer()
    trainer.step(X, 1.0)
    before = trainer.state()
    where = {"scan": "Step 2 of mt.scan, from 0: ", "jit of scan": "Step 0 of mt.scan, from 0: "}.get(way, "")
    message = (
        rf"(?m)^{where}The output of Net\.blocks\.1\.0 \(Log\) is not finite: 12 of 12 values of float32\[4, 3\]\. "
        r"Its input: float32\[4, 3\] from -(10|9\.\S+) to -8\.\S+, all finite\.$"
    )
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=message):
        WAYS[way](trainer, -10.0)
    for old, new in zip(before, trainer.state(), strict=True):
        np.testing.assert_array_equal(old, new)


@pytest.mark.one_in(6)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_silent_for_finite_values_and_computes_the_same(way: str) -> None:
    inside, outside = Trainer(), Trainer()
    with mt.detect_anomaly():
        found = WAYS[way](inside, 1.0)
    state = inside.state()
    mt.seed(0)
    outside = Trainer()
    expected = WAYS[way](outside, 1.0)
    for a, b in zip([*jax.tree.leaves(found), *state], [*jax.tree.leaves(expected), *outside.state()], strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=2e-4, atol=1e-5)


def test_eager_calls_name_the_path_from_the_called_module() -> None:
    model = Net()
    with mt.detect_anomaly():
        with pytest.raises(FloatingPointError, match=r"of Net\.blocks\.1\.0 \(Log\) is not finite: 12 of 12"):
            model(X, -10.0)
        with pytest.raises(
            FloatingPointError, match=r"of Sequential\.0 \(Log\) is not finite: 1 of 2 values .*from 0 to 1"
        ):
            model.blocks[1][:1](jnp.array([0.0, 1.0]))
        with pytest.raises(
            FloatingPointError, match=r"of Net\.first .* Its input: float32\[4, 3\] from .*, 1 of 12 not fin"
        ):
            model(BAD, 1.0)
    assert not np.isfinite(model(X, -10.0)).any()


def test_all_paths_of_a_tied_module_and_a_parameter_that_is_not_finite() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    layer.weight = layer.weight.at[0, 0].set(jnp.inf)
    message = r"(?m)output of Sequential\.0 and Sequential\.2 \(Linear\) is not finite: .* Its weight is not finite\.$"
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=message):
        model(X)


def test_the_call_of_a_module_that_is_called_several_times() -> None:
    class Halving(mt.Module):
        def __init__(self) -> None:
            self.log = Log()

        def forward(self, x: Any) -> Any:
            for _ in range(5):
                x = self.log(x)
            return x

    with (
        mt.detect_anomaly(),
        pytest.raises(FloatingPointError, match=r"Halving\.log .* not finite in its call number 3"),
    ):
        Halving()(jnp.array(2.0))


def test_the_path_is_that_of_the_whole_model_when_the_loss_calls_a_part() -> None:
    model = Net()
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=r"The output of Net\.blocks\.1\.0 \(Log\)"):
        mt.backward(lambda x: model.blocks[1](x).sum(), -X)


@pytest.mark.parametrize("way", ["backward", "value_and_grad", "jit", "scan"])
def test_the_parameter_whose_gradient_is_not_finite(way: str) -> None:
    layer = nn.Linear(3, 2)
    tied = nn.Sequential(layer, nn.Linear(2, 2), nn.Linear(3, 2))
    tied[2].tie("weight", layer, "weight")

    def loss(x: Any) -> Any:
        return jnp.sqrt((tied[:2](x) * 0).sum()) + 3 + 0 * tied[2](x).sum()

    calls: dict[str, Callable[[], Any]] = {
        "backward": lambda: mt.backward(loss, X),
        "value_and_grad": lambda: mt.value_and_grad(loss)(X),
        "jit": lambda: mt.jit(lambda x: mt.backward(loss, x))(X),
        "scan": lambda: mt.scan(lambda x: mt.backward(loss, x), X[None]),
    }
    message = (
        r"(?m)gradient of Sequential\.0\.weight and Sequential\.2\.weight is not finite: 6 of 6 .* The loss is 3\.$"
    )
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=message):
        calls[way]()
    assert not np.any(tied.grads()[0])


def test_the_argument_whose_gradient_is_not_finite() -> None:
    layer = nn.Linear(3, 2)
    gradients = mt.value_and_grad(lambda a, b: layer(a).sum() + jnp.sqrt((b * 0).sum()), argnums=(0, 1))
    message = r"The gradient of array 1 among the arguments is not finite: 12 of 12 .* The loss is"
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=message):
        gradients(X, X)


def test_a_loss_that_is_not_finite_after_finite_outputs() -> None:
    layer = nn.Linear(3, 2)
    with (
        mt.detect_anomaly(),
        pytest.raises(
            FloatingPointError, match=r"^The loss of <lambda> is not finite\. The loss is inf\. .* after the modules\."
        ),
    ):
        mt.backward(lambda x: layer(x).sum() + jnp.float32(jnp.inf), X)


@pytest.mark.parametrize("way", ["eager", "jit", "scan"])
def test_the_parameter_that_a_step_would_make_infinite(way: str) -> None:
    layer = nn.Linear(3, 2, bias=False)
    opt = optim.SGD([nn.Sequential(nn.Tanh(), layer)], lr=1e38)
    before = np.asarray(layer.weight)

    def step(x: Any) -> None:
        opt.zero_grad()
        mt.backward(lambda x: 1e4 * layer(x).sum(), x)
        opt.step()

    calls = {"eager": step, "jit": mt.jit(step), "scan": lambda x: mt.scan(step, x[None])}
    message = (
        r"SGD\.step\(\) would make \w*\.?\S*weight not finite: 6 of 6 .* Before: .* Its gradient: float32\[2, 3\] from"
    )
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=message):
        calls[way](jnp.abs(X) + 1)
    np.testing.assert_array_equal(layer.weight, before)
    assert opt.num_steps == 0


def test_the_part_of_a_pack_that_a_step_would_make_infinite() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    mt.pack(model)
    model[1].weight = jnp.zeros((2, 2))
    model.accumulate([jnp.zeros((2, 3)), jnp.zeros(2), jnp.full((2, 2), 1e3), jnp.zeros(2)])
    message = (
        r"would make Sequential\.1\.weight not finite: 4 of 4 .* Before: float32\[2, 2\] from 0 to 0, all finite\. "
    )
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=message):
        optim.SGD([model], lr=1e37).step()


def test_under_vmap_all_of_the_batch_is_looked_at() -> None:
    with mt.detect_anomaly(), pytest.raises(FloatingPointError, match=r"Log .*: 1 of 3 values of float32\[3\]"):
        jax.vmap(Log())(jnp.array([1.0, 0.0, 2.0]))


def test_it_nests_with_autocast_and_with_itself() -> None:
    layer = nn.Linear(3, 2)
    with mt.detect_anomaly(), mt.autocast(jnp.bfloat16), mt.detect_anomaly():
        assert layer(X).dtype == jnp.bfloat16
        with pytest.raises(FloatingPointError, match=r"of Linear is not finite: 8 of 8 values of bfloat16\[4, 2\]"):
            layer(X * np.float32(np.inf))
    assert not anomaly.local.on and set(anomaly.watchers) <= {"a hook"}
    assert np.isnan(Log()(jnp.array(-1.0)))


def test_as_a_decorator() -> None:
    @mt.detect_anomaly()
    def call(x: Any) -> Any:
        return Log()(x)

    assert call(jnp.array(1.0)) == 0
    for _ in range(2):
        with pytest.raises(FloatingPointError, match=r"Log"):
            call(jnp.array(-1.0))
    assert not anomaly.local.on


def test_switching_it_on_and_off_compiles_nothing() -> None:
    trainer = Trainer()
    trainer.jitted(X, np.float32(1))
    with jax.log_compiles(False), mt.detect_anomaly():
        trainer.jitted(X, np.float32(1))
    trainer.jitted(X, np.float32(1))
    assert trainer.jitted.num_compiles == 1


def test_inside_traced_code_it_is_refused() -> None:
    def step(x: Any) -> Any:
        with mt.detect_anomaly():
            return Log()(x)

    for call in (mt.jit(step), jax.jit(step)):
        with pytest.raises(RuntimeError, match=re.escape("with mt.detect_anomaly(): step(x)")):
            call(X)
    assert not anomaly.local.on


def test_the_name_is_offered_where_torch_users_look() -> None:
    with pytest.raises(AttributeError, match=r"mt\.detect_anomaly\(\)"):
        mt.set_detect_anomaly(True)
