"""What `mt.summary` shows of a model on a mesh."""

import re

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import mesh

import minitorch_jax as mt
from minitorch_jax import nn


def tied() -> mt.Module:
    net = nn.Sequential(nn.Embedding(8, 4), nn.BatchNorm1d(4), nn.Linear(4, 8))
    net[2].tie("weight", net[0], "weight")
    return net


@pytest.mark.parametrize("abstract", [False, True], ids=["arrays", "shapes"])
def test_it_shows_shardings_and_bytes_on_a_device(abstract: bool) -> None:
    net = jax.eval_shape(lambda net: net, tied()) if abstract else tied()
    net = mt.shard(net, mesh(4, 2), {"*weight": P("model")}, fsdp="data")
    table = mt.summary(net)
    embedding, norm, linear = table.rows[1:]
    assert embedding.shardings == ("weight P('model', 'data')",)
    assert (embedding.num_bytes, embedding.bytes_per_device) == (128, 16)
    assert norm.shardings == (
        "weight P('model')",
        "bias P()",
        "running_mean P()",
        "running_var P()",
        "num_batches_tracked P()",
    )
    assert (norm.num_bytes, norm.bytes_per_device) == (68, 60)
    assert linear.shardings == ("bias P()",)
    assert (linear.num_bytes, linear.bytes_per_device) == (32, 32)
    assert (table.num_bytes, table.bytes_per_device) == (228, 108)
    lines = str(table).splitlines()
    assert lines[0].split() == ["module", "type", "parameters", "bytes", "per", "device", "sharding"]
    assert re.fullmatch(r"  0 +Embedding +32 +128 B +16 B  weight P\('model', 'data'\)", lines[3])
    assert lines[-1] == "48 parameters, 228 B with buffers, 108 B of them on each device"
    assert table._repr_html_().count("<th ") == 9  # with FLOPs
    assert "weight P(&#x27;model&#x27;, &#x27;data&#x27;)" in table._repr_html_()


def test_other_shardings_and_arrays_on_no_device() -> None:
    net = nn.Linear(4, 8)
    net.weight = jax.device_put(net.weight, NamedSharding(mesh(8, names=("all",)), P("all")))
    assert mt.summary(net).rows[0].shardings == ("weight P('all')", "bias on no device")
    net.bias = jax.device_put(net.bias, jax.devices()[1])
    assert mt.summary(net).rows[0].shardings[1] == "bias SingleDeviceSharding"


def test_on_one_device_there_is_nothing_to_show() -> None:
    table = mt.summary(tied().to(jax.devices()[3]))
    assert table.bytes_per_device == 0 and "per device" not in str(table) and "sharding" not in str(table)
    assert table._repr_html_().count("<th ") == 7
