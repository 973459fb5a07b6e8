"""What a notebook shows of a module: HTML that folds, and treescope's tree."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import pytest

import minitorch_jax as mt
from minitorch_jax import nn


class Net(mt.Module):
    def __init__(self, label="a<b"):
        self.emb, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.tie("weight", self.emb, "weight")
        self.blocks = [nn.Linear(2, 2).freeze(), nn.BatchNorm1d(2), nn.Dropout(0.1).eval()]
        self.again = self.blocks[0]
        self.scale = mt.Parameter(jnp.ones(2, jnp.bfloat16))
        self.label = label

    def extra_repr(self):
        return f"label={self.label}"


class Tags(HTMLParser):
    """Raises if a tag is closed that is not open."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.depth = [], [], 0

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.depth = max(self.depth, self.open.count("details"))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def shown(module):
    tags = Tags()
    tags.feed(module._repr_html_())
    assert not tags.open
    return "".join(tags.text), tags.depth


def test_the_tree_shows_counts_types_and_what_is_special():
    text, depth = shown(Net())
    for part in [
        "Net(label=a<b) 27 parameters, 6 frozen",
        "scale: bfloat16[2] 2",
        "(emb): Embedding(5, 3) 15 parameters",
        "weight: float32[5, 3] 15(head)",
        "weight: float32[5, 3] 15, shared with emb.weight",
        "(blocks.0): Linear(in_features=2, out_features=2, bias=True) 6 parameters, all frozen",
        "weight: float32[2, 2] 4, frozen",
        "running_mean: float32[2] buffer",
        "(blocks.2): Dropout(p=0.1, inplace=False) in evaluation mode",
        "(again): Linear is blocks.0",
    ]:
        assert part in text, part
    assert depth == 2


def test_it_is_shown_without_a_change_and_where_there_are_no_values():
    net = Net()
    mt.backward(lambda: (net.scale.astype(float) ** 2).sum())
    assert net._repr_html_() == net._repr_html_()
    key = jax.random.key(0)
    expected = "Linear(in_features=2, out_features=1, bias=True) 3 parameters"
    assert expected in shown(jax.eval_shape(lambda key: nn.Linear(2, 1, key=key), key))[0]
    texts = []
    jax.jit(lambda net: texts.append(shown(net)[0]) or net.scale)(net)
    assert texts == [shown(net)[0]]
    assert "1 parameter" in shown(nn.PReLU())[0] and shown(nn.ReLU())[0].startswith("ReLU")


def test_a_cycle_ends():
    outer = nn.Sequential(nn.Linear(1, 1))
    inner = nn.Sequential(nn.ReLU())
    outer.append(inner)
    inner.append(outer)
    assert "is the model itself" in shown(outer)[0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of treescope's, with new NumPy
def test_treescope_shows_arrays_and_submodules():
    treescope = pytest.importorskip("treescope")
    text = treescope.render_to_text(Net())
    assert re.search(r"(?s)^Net\(.*scale=.*emb=Embedding\(.*weight=.*blocks=.*Dropout\(.*p=0.1", text)
    assert "training=False" in text and "training=True" not in text
    packed = nn.Linear(2, 1)
    mt.pack(packed)
    assert "weight=" in treescope.render_to_text(packed)
