"""`wrap` and the names that people use: which array is a gradient, which is neither, and that nothing is a guess."""

import itertools
import types

import numpy as np
import pytest

import minitorch_jax as mt
from minitorch_jax.adapters.numpy import wrap

NAMES = {
    "W": "dW d_W grad_W W_grad gradW dLdW dL_dW dLoss_dW dJdW gW g_W W_gradient gradient_W W_gradients nabla_W dW_ grad_wrt_W"
    " weights_gradient gradient_weights weight_grad grad_weights gradWeights dweights dw _dW",
    "b": "db d_b grad_b b_grad gradB dLdb dL_db gb bias_grad gradient_bias dbias dbiases",
    "weights": "dweights weights_gradient gradient_weights weight_grad grad_weights weightsGradient dW dw gw d_weights dL_dW",
    "bias": "dbias bias_gradient gradBias biasGrad db d_b bias_grad biases_grad dLdb",
    "_kernel": "_dkernel dkernel _kernel_grad grad_kernel _grad_kernel d_kernel",
    "_Layer__W": "_Layer__dW _Layer__grad_W _Layer__W_grad dW",
    "hidden_W": "dhidden_W hidden_dW d_hidden_W grad_hidden_W hidden_W_grad hiddenWGrad",
    "W1": "dW1 W1_grad grad_W1 d_W1 dL_dW1 weights_grad1 grad_weights_1 dweights1",
    "W_ih": "dW_ih grad_W_ih W_ih_grad d_W_ih gradWih",
    "gamma": "dgamma grad_gamma gamma_grad dLdgamma gammaGrad",
    "inputWeights": "inputWeightsGrad gradInputWeights dInputWeights d_input_weights",
}
STATE = (
    "vW mW sW v_W m_W W_v W_m W_momentum momentum_W velocity_W W_velocity vel_W cache_W W_cache W_prev prev_W W_old old_W"
    " W_best W_init dW_prev prev_dW dW_old last_dW dW_momentum vdW sdW m_dW grad_squared_W dW_squared sq_grad_W avg_W W_ema"
    " accumulated_grad_W acc_dW W_copy weight_momentums weight_cache W_update delta_W dz d_out grad_output"
).split()
COLLECTIONS = (
    "v m s velocity velocities momentum momentums cache moments first_moment vel prev_params weights_old m_weights"
).split()


def arrays(**names):
    return types.SimpleNamespace(**names)


def one(value):
    return np.full((2, 3), float(value))


@pytest.mark.one_in(9)
@pytest.mark.parametrize("position", ["attribute", "item", "list"])
@pytest.mark.parametrize("name", NAMES)
def test_names_of_gradients(name, position):
    for gradient, early in itertools.product(NAMES[name].split(), [None, one(0), "absent"]):
        held = {name: one(1)} | ({} if isinstance(early, str) else {gradient: early})
        net = {"attribute": arrays(**held), "item": held, "list": [held]}[position]
        opt = mt.Optimizer([wrap(net)], lr=1.0)
        opt.step()  # before any gradient has come
        if position == "attribute":
            setattr(net, gradient, one(3))
        else:
            held[gradient] = one(3)
        opt.step()
        now = getattr(net, name) if position == "attribute" else held[name]
        np.testing.assert_array_equal(now, one(-2), err_msg=f"{gradient}, {early}")


@pytest.mark.one_in(4)
@pytest.mark.parametrize("early", [None, one(0), "absent"], ids=["None", "zeros", "absent"])
@pytest.mark.parametrize("gradient", ["dW", "grad_W", "weights_gradient"])
def test_what_an_optimizer_keeps_is_neither_parameter_nor_gradient(gradient, early):
    for state in STATE:
        net = arrays(W=one(1), **{state: one(7)}, **({} if isinstance(early, str) else {gradient: early}))
        network = wrap(net)
        opt = mt.Optimizer([network], lr=1.0)
        setattr(net, gradient, one(3))
        opt.step()
        assert [path for path, _ in network.named_parameters()] == ["W"], state
        np.testing.assert_array_equal(net.W, one(-2), err_msg=state)
        np.testing.assert_array_equal(getattr(net, state), one(7), err_msg=state)
        network.zero_grad()
        np.testing.assert_array_equal(getattr(net, state), one(7), err_msg=state)


@pytest.mark.one_in(2)
@pytest.mark.parametrize("holder", [lambda held: held, lambda held: arrays(v=held)], ids=["collection", "optimizer"])
@pytest.mark.parametrize("keys", ["W", "dW", 0])
def test_collections_that_an_optimizer_keeps(keys, holder):
    for name in COLLECTIONS:
        kept = [one(7)] if keys == 0 else {keys: one(7)}
        if keys == 0:
            net = arrays(weights=[one(1)], grad_weights=[None], **{name: holder(kept)})
        else:
            net = arrays(params={"W": one(1)}, grads={}, **{name: holder(kept)})
        network = wrap(net)
        opt = mt.Optimizer([network], lr=1.0)
        if keys == 0:
            net.grad_weights = [one(3)]
        else:
            net.grads = {keys: one(3)}
        opt.step()
        assert len(network.parameters()) == 1, name
        np.testing.assert_array_equal(network.parameters()[0], one(-2), err_msg=name)
        np.testing.assert_array_equal(kept[keys], one(7), err_msg=name)


@pytest.mark.parametrize("early", [True, False])
def test_moments_in_the_object_of_one_parameter(early):
    net = arrays(p=arrays(value=one(1), m=one(7), v=one(7)))
    if early:
        net.p.grad = None
    network = wrap(net)
    opt = mt.Optimizer([network], lr=1.0)
    net.p.grad = one(3)
    opt.step()
    assert [path for path, _ in network.named_parameters()] == ["p.value"]
    for name, value in [("value", -2), ("m", 7), ("v", 7)]:
        np.testing.assert_array_equal(getattr(net.p, name), one(value))


def test_names_that_look_like_state_are_parameters_if_they_have_gradients():
    net = arrays(
        W=one(1), dW=one(1), vW=one(1), dvW=one(2), gW=one(1), dgW=one(3), m=one(1), dm=one(4), x=one(1), dx=one(5)
    )
    assert [grad[0, 0] for grad in wrap(net).grads()] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"W": one(1), "dW": None, "gradW": None}, "W has several possible gradients, dW and gradW: select one"),
        (
            {"params": {"W": one(1)}, "grads": {"W": one(1), "dW": one(1)}},
            r"params\.W has several possible .*, dW and W of",
        ),
        (
            {"weight": one(1), "weights": one(1), "dw": None},
            "dw may be the gradient of weight or of weights: select one",
        ),
        ({"value": one(1), "data": one(1), "grad": None}, "grad may be the gradient of value or of data: select one"),
        (
            {"W": one(1), "dW": np.ones((3, 2))},
            r"W is float64\[2, 3\], and dW beside it is float64\[3, 2\]: a gradient has",
        ),
        (
            {"W": one(1), "dW": None, "running_mean": one(1)},
            r"running_mean .* statistics .*, with frozen='running_mean'",
        ),
        ({"l": arrays(W=one(1), dW=None, moving_var=one(1), std=one(1))}, r"frozen=\['\*\.moving_var', '\*\.std'\]"),
    ],
)
def test_what_wrap_does_not_guess(held, message):
    with pytest.raises(ValueError, match=message):
        wrap(held)
    with pytest.raises(ValueError, match=message):
        wrap(arrays(**held))


# -- gradients that come at the first backward -------------------------------------------------------------------------


def step_with(net, gradients, **later):
    network = wrap(net, gradients=gradients)
    opt = mt.Optimizer([network], lr=1.0)
    opt.step()
    vars(net).update(later)
    before = network.state_dict()
    try:
        opt.step()
    finally:
        for path, array in network.state_dict().items():
            np.testing.assert_array_equal(array, before[path])


@pytest.mark.parametrize(
    ("held", "gradients", "later", "message"),
    [
        ({"W": one(1)}, None, {"sens": one(3)}, r"W is float64\[2, 3\]; sens, .*: gradients=\{'W': 'sens'\}"),
        (
            {"W": one(1)},
            {"W": "gradW"},
            {"dW": one(3)},
            r"its gradient is 'gradW', which backward\(\) does not set; dW, of its",
        ),
        ({"W": one(1), "b": np.ones(3)}, {"W": "gradW"}, {"db": np.ones(3)}, r"W is .* its gradient is 'gradW', which"),
        (
            {"W": one(1), "dW": None},
            None,
            {"grad_of_it": one(3)},
            r"gradient is 'dW', .* not set; grad_of_it, of its shape",
        ),
        (
            {"W": one(1), "dW": one(0)},
            None,
            {"W_sens_grad": one(3)},
            r"gradient is 'dW', .* not set; W_sens_grad, of its",
        ),
        (
            {"W": one(1), "U": one(1)},
            None,
            {"dW": one(3)},
            r"U is float64\[2, 3\]; there is no dU, grad_U, .*frozen='U'",
        ),
        ({"params": {"W": one(1)}}, None, {"sens": {"W": one(3)}}, r"params\.W is .* gradients=\{'params': 'sens'\}"),
        ({"W": one(1), "dW": None}, None, {"dW": one(3), "gW": one(3)}, "W has several possible gradients, dW and gW"),
    ],
)
def test_a_step_that_would_train_nothing_is_an_error(held, gradients, later, message):
    with pytest.raises(ValueError, match=message):
        step_with(arrays(**held), gradients, **later)


def test_the_proposals_work():
    for held, gradients, later in [
        ({"W": one(1)}, {"W": "sens"}, {"sens": one(3)}),
        ({"params": {"W": one(1)}}, {"params": "sens"}, {"sens": {"W": one(3)}}),
    ]:
        net = arrays(**held)
        network = wrap(net, gradients=gradients)
        opt = mt.Optimizer([network], lr=1.0)
        vars(net).update(later)
        opt.step()
        np.testing.assert_array_equal(network.parameters()[0], one(-2))


class UpdatesItself:
    def __init__(self):
        self.W, self.b = one(1), np.ones(3)

    def forward(self, x):
        self.x = x
        return x @ self.W + self.b

    def backward(self, g, learning_rate):
        self.W -= learning_rate * self.x.T @ g
        return g @ self.W.T


def test_a_layer_that_updates_itself():
    with pytest.raises(
        ValueError,
        match=r"1: backward\(g, learning_rate\) updates W itself\. Take the update out of it and keep",
    ):
        wrap([arrays(W=one(1), dW=None), UpdatesItself()])


class KeepsUnseen:
    """Keeps what it needs by `setattr`, which its code does not show."""

    def __init__(self):
        self.W, self.dW = one(1), None

    def forward(self, x):
        for name in ("x", "inputs"):
            setattr(self, name, x)
        return x @ self.W

    def backward(self, g):
        self.dW = self.x.T @ g
        self.dx = self.dinputs = g @ self.W.T


def test_what_a_layer_keeps_of_a_call_is_not_taken():
    layer = KeepsUnseen()
    network = wrap([layer])
    layer.forward(np.ones((4, 2)))
    layer.backward(np.ones((4, 3)))
    with pytest.raises(ValueError, match=r"0\.x is new"):
        network.parameters()
    with pytest.raises(
        ValueError, match=r"0\.x beside dx looks like what .*ignored='0\.x'\. .*gradients=\{'x': 'dx'\}\n  0\.in"
    ):
        wrap([layer])
    assert [path for path, _ in wrap([layer], ignored=["0.x", "0.inputs"]).named_parameters()] == ["0.W"]
    assert len(wrap([layer], ignored="0.inputs", gradients={"x": "dx"}).parameters()) == 2


class Lazy:
    """Makes its parameters at the first forward."""

    W = b = None

    def forward(self, x):
        if self.W is None:
            self.W, self.b = np.ones((x.shape[1], 2)), np.zeros(2)
        self.x = x
        return x @ self.W + self.b

    def backward(self, g):
        self.dW, self.db = self.x.T @ g, g.sum(0)


def test_parameters_that_the_first_forward_makes():
    layer = Lazy()
    with pytest.raises(ValueError, match=r"found no parameters.*run forward\(\) once before wrap\(\)"):
        wrap([layer])
    late = wrap([layer, arrays(U=one(1), dU=None)])
    layer.forward(np.ones((4, 3)))
    layer.backward(np.ones((4, 2)))
    with pytest.raises(ValueError, match=r"forward\(\) and backward\(\) once before.*\n  0\.W is new\n  0\.b is new"):
        late.parameters()
    assert [path for path, _ in wrap([layer]).named_parameters()] == ["0.W", "0.b"]
