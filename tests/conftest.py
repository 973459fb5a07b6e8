"""What all tests share: JAX in its strictest mode, and one small network with data."""

import jax
import jax.numpy as jnp
import pytest

import minitorch_jax as mt
from minitorch_jax import nn

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 2)  # a second device to move things to


@pytest.fixture(autouse=True)
def fixed_seed():
    """Layers made without a key are the same in every run, whatever ran before."""
    mt.seed(0)


@pytest.fixture
def mlp():
    """A network with two layers of parameters: "0.weight" (4, 3), "0.bias" (4,), "2.weight" (2, 4), "2.bias" (2,)."""
    return nn.Sequential(nn.Linear(3, 4, key=jax.random.key(1)), nn.Tanh(), nn.Linear(4, 2, key=jax.random.key(2)))


@pytest.fixture
def batch():
    """Inputs (5, 3) and targets (5, 2) for `mlp`."""
    return jax.random.normal(jax.random.key(3), (5, 3)), jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)


@pytest.fixture
def mse():
    """A loss function of a model, inputs and targets."""

    def loss_fn(model, x, y):
        return nn.functional.mse_loss(model(x), y)

    return loss_fn


# What the library does not do yet, and tests say that it should: each fails today, and is to leave this list once it passes.
KNOWN_GAPS = {
    "test_pack.py::test_a_step_still_takes_few_arrays[stepped while frozen]": "a pack whose parts have taken different steps",
    "test_pack.py::test_a_step_still_takes_few_arrays[tied]": "a part that was tied away stays in its pack for a while",
    "test_pack.py::test_a_step_still_takes_few_arrays[replaced]": "a pack whose parts have taken different steps",
    "test_pack.py::test_what_happens_to_one_part_leaves_the_others_alone[jit]": "a compiled function that covers a part of a"
    " pack gives out gradients that it would drop otherwise",
    "test_pack.py::test_what_happens_to_one_part_leaves_the_others_alone[jit, then backward of the other]": "the same",
    "test_pack.py::test_a_parameter_replaced_by_a_new_one[True]": "the same",
    "test_pack.py::test_a_parameter_that_no_loss_reads_is_named": "of a pack, only as a whole is known whether it was read",
    "test_pack.py::test_sharded_parameters_stay_out": "beside sharded arrays, those on one device are spread as well",
    "test_pack.py::test_gradients_that_were_used_up_say_so": "of a pack, once one is assigned the others are NaN, not errors",
    "test_pack.py::test_packing_where_some_gradients_were_used_up[some]": "the same",
    "test_pack.py::test_packing_where_some_gradients_were_used_up[none]": "the same",
    "test_pack.py::test_an_interrupt_while_packing[unpack]": "an exception raised inside unpack, which a Ctrl-C cannot be",
    "test_pack.py::test_a_layer_of_a_pack_that_is_dropped_is_forgotten": "a pack is made anew when a part has left",
    "test_jit_limits.py::test_shardings_stay": "beside sharded arrays, those on one device are spread as well",
    "test_functional.py::test_training_within_a_loss_that_uses_what_was_trained_loses_nothing": "it warns though all is well",
    "test_functional.py::test_a_returned_optimizer_with_frozen_parameters_is_not_told[mt.scan in jit]": "it warns though all"
    " is well",
    "test_random.py::test_data_on_different_devices": "the stream follows the model's device, not that of data alone",
}


def pytest_collection_modifyitems(items):
    for item in items:
        reason = KNOWN_GAPS.get(item.nodeid.rpartition("/")[2])
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
