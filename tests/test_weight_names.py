"""Weights under other names: the published layouts of GPT-2 and ResNet against torch, and what is refused."""

import re
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from lazily import Lazily
from oracle import actual as torch
from training import as_jax_comes

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.adapters import safetensors
from minitorch_jax.adapters.safetensors import transposed

adapter = Lazily("minitorch_jax.adapters.torch")
PAGE = (Path(__file__).parents[1] / "docs" / "adapters.md").read_text()


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The names that the page's two programs define, and the folder in which they wrote their files."""
    section = PAGE.partition("### Weights under other names\n")[2].partition("\n## ")[0]
    names: dict[str, Any] = {"__name__": "__main__", "folder": tmp_path_factory.mktemp("page")}
    with pytest.MonkeyPatch.context() as patch, as_jax_comes():
        patch.chdir(names["folder"])
        for block in re.findall(r"^```python\n(.*?)^```$", section, flags=re.S | re.M):
            exec(block, names)
    return names


def given(shown: dict[str, Any], file: str) -> dict[str, Any]:
    arrays, _ = safetensors.read(shown["folder"] / file)
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}


# -- against torch -----------------------------------------------------------------------------------------------------


def gpt2_in_torch(tokens: Any, w: dict[str, Any], heads: int) -> Any:
    """GPT-2 as its paper and its published code have it: Conv1D stores (in, out)."""
    F = torch.nn.functional
    length = tokens.shape[1]
    x = w["wte.weight"][tokens] + w["wpe.weight"][:length]
    width = x.shape[-1]
    for i in range(len({name.split(".")[1] for name in w if name.startswith("h.")})):
        at = {name.removeprefix(f"h.{i}."): tensor for name, tensor in w.items()}
        qkv = F.layer_norm(x, (width,), at["ln_1.weight"], at["ln_1.bias"]) @ at["attn.c_attn.weight"]
        q, k, v = ((qkv + at["attn.c_attn.bias"]).split(width, -1))[:3]
        q, k, v = (t.reshape(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(x.shape)
        x = x + out @ at["attn.c_proj.weight"] + at["attn.c_proj.bias"]
        hidden = F.layer_norm(x, (width,), at["ln_2.weight"], at["ln_2.bias"]) @ at["mlp.c_fc.weight"]
        hidden = F.gelu(hidden + at["mlp.c_fc.bias"], approximate="tanh")
        x = x + hidden @ at["mlp.c_proj.weight"] + at["mlp.c_proj.bias"]
    return F.layer_norm(x, (width,), w["ln_f.weight"], w["ln_f.bias"]) @ w["wte.weight"].T


def test_gpt2_computes_what_torch_computes(shown: dict[str, Any]) -> None:
    weights = given(shown, "gpt2.safetensors")
    tokens = np.random.default_rng(1).integers(0, 11, (3, 6))
    want = gpt2_in_torch(torch.from_numpy(tokens), weights, heads=2)
    for source in ("file", "mapping", "prefixed"):
        model = shown["GPT2"](11, 6, 8, heads=2, depth=2).eval()
        if source == "file":
            safetensors.load(shown["folder"] / "gpt2.safetensors", model, names=shown["names"])
        elif source == "mapping":
            adapter.load_from_torch(model, weights, names=shown["names"])
        else:  # as GPT2LMHeadModel has it
            full = {f"transformer.{name}": tensor for name, tensor in weights.items()}
            full["lm_head.weight"] = full["transformer.wte.weight"]
            table = {f"transformer.{key}": value for key, value in shown["names"].items()}
            adapter.load_from_torch(model, full, names=table | {"lm_head.weight": None, "transformer.*": "*"})
        with as_jax_comes():
            np.testing.assert_allclose(model(jnp.asarray(tokens, jnp.int32)), want.numpy(), rtol=2e-4, atol=2e-4)


def test_resnet_computes_what_torch_computes(shown: dict[str, Any]) -> None:
    w, F = given(shown, "resnet.safetensors"), torch.nn.functional

    def norm(x: Any, at: str) -> Any:
        return F.batch_norm(
            x, w[f"{at}.running_mean"], w[f"{at}.running_var"], w[f"{at}.weight"], w[f"{at}.bias"], eps=1e-5
        )

    images = torch.from_numpy(np.random.default_rng(2).normal(size=(2, 3, 32, 32)).astype(np.float32))
    x = F.max_pool2d(F.relu(norm(F.conv2d(images, w["conv1.weight"], stride=2, padding=3), "bn1")), 3, 2, 1)
    for at, stride in (("layer1.0", 1), ("layer2.0", 2)):
        out = F.relu(norm(F.conv2d(x, w[f"{at}.conv1.weight"], stride=stride, padding=1), f"{at}.bn1"))
        out = norm(F.conv2d(out, w[f"{at}.conv2.weight"], padding=1), f"{at}.bn2")
        if stride == 2:
            x = norm(F.conv2d(x, w[f"{at}.downsample.0.weight"], stride=2), f"{at}.downsample.1")
        x = F.relu(out + x)
    want = F.linear(x.mean((2, 3)), w["fc.weight"], w["fc.bias"])
    model = shown["ResNet"](widths=(8, 16), num_classes=5).eval()
    safetensors.load(shown["folder"] / "resnet.safetensors", model, names=shown["resnet_names"])
    with as_jax_comes():
        np.testing.assert_allclose(model(jnp.asarray(images.numpy())), want.numpy(), rtol=1e-3)
    assert int(model.stem[1].num_batches_tracked) == 100


# -- in both adapters --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["safetensors", "torch"])
def load(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """A function that loads NumPy arrays: through a file, or as torch tensors."""

    def through_a_file(model: Any, arrays: Any, **options: Any) -> Any:
        safetensors.save(tmp_path / "a.safetensors", arrays)
        return safetensors.load(tmp_path / "a.safetensors", model, **options)

    def as_tensors(model: Any, arrays: Any, **options: Any) -> Any:
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}
        return adapter.load_from_torch(model, tensors, **options)

    return as_tensors if request.param == "torch" else through_a_file


def numbers(*shape: int) -> Any:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(np.float32)


def net() -> Any:
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def same(model: Any, arrays: dict[str, Any]) -> None:
    for name, array in arrays.items():
        np.testing.assert_array_equal(model.state_dict()[name], array, err_msg=name)


def test_prefixes_go_and_filters_leave_out(load: Any) -> None:
    arrays = {f"model.net.{name}": numbers(*a.shape) for name, a in net().state_dict().items()}
    model = net()
    found = load(model, arrays | {"optimizer.step": numbers(1)}, names={"model.net.*": "*", "*": None})
    assert found == ([], [])
    same(model, {name.removeprefix("model.net."): array for name, array in arrays.items()})


def test_the_first_key_that_matches_counts(load: Any) -> None:
    arrays = {"x.w": numbers(2, 3), "x.b": numbers(2), "x.other": numbers(5)}
    model = nn.Linear(3, 2)
    load(model, arrays, names={"x.w": "weight", "x.b": "bias", "x.*": None})
    same(model, {"weight": arrays["x.w"], "bias": arrays["x.b"]})
    with pytest.raises(ValueError, match=r"(?s)missing: bias, float32\[2\].*the key 'x\.b' of `names` matches no name"):
        load(model, arrays, names={"x.w": "weight", "x.*": None, "x.b": "bias"})


def test_each_star_stands_for_what_it_matched(load: Any) -> None:
    class Two(mt.Module):
        def __init__(self) -> None:
            self.layers = nn.ModuleList([net(), net()])

    theirs = {f"block{i}/{name}": numbers(*a.shape) + i for i in (0, 1) for name, a in net().state_dict().items()}
    model = Two()
    load(model, theirs, names={"block*/*.weight": "layers.*.*.weight", "block*/*.bias": "layers.*.*.bias"})
    same(model, {name.replace("block", "layers.").replace("/", "."): array for name, array in theirs.items()})


def test_arrays_are_transposed(load: Any) -> None:
    model, kernel = nn.Conv2d(3, 2, (4, 5)), numbers(4, 5, 3, 2)
    load(model, {"kernel": kernel, "bias": numbers(2)}, names={"kernel": transposed("weight", 3, 2, 0, 1)})
    same(model, {"weight": kernel.transpose(3, 2, 0, 1)})
    dense = nn.Linear(3, 2)
    load(dense, {"kernel": numbers(3, 2), "bias": numbers(2)}, names={"kernel": transposed("weight")})
    same(dense, {"weight": numbers(3, 2).T})


def test_arrays_are_joined_and_divided(load: Any) -> None:
    parts = {f"layer.0.{name}": numbers(4, 4) + i for i, name in enumerate(("query", "key", "value"))}
    rest = {
        "layer.0.in_proj_bias": numbers(12),
        "layer.0.out_proj.weight": numbers(4, 4),
        "layer.0.out_proj.bias": numbers(4),
    }
    model = nn.ModuleList([nn.MultiheadAttention(4, 2)])
    names = {("layer.*.query", "layer.*.key", "layer.*.value"): "*.in_proj_weight", "layer.*": "*"}
    load(model, parts | rest, names=names)
    same(model, {"0.in_proj_weight": np.concatenate(list(parts.values()))})

    heads = nn.ModuleDict({name: nn.Linear(3, 2) for name in "ab"})
    load(
        heads,
        {"weight": numbers(3, 4), "bias": numbers(4)},
        names={"weight": transposed(("a.weight", "b.weight")), "bias": ("a.bias", "b.bias")},
    )
    same(heads, {"a.weight": numbers(3, 4).T[:2], "b.weight": numbers(3, 4).T[2:], "b.bias": numbers(4)[2:]})


def test_what_keep_names_stays(load: Any) -> None:
    model = net()
    before = np.array(model[2].weight)
    arrays = {"0.weight": numbers(4, 3), "0.bias": numbers(4), "2.weight": numbers(9, 4)}  # of nine classes
    assert load(model, arrays, keep="2.*") == (["2.weight", "2.bias"], [])
    same(model, {"0.weight": arrays["0.weight"], "2.weight": before})
    assert load(model, arrays, keep=["2.weight", "2.bias"], strict=False).missing_keys == ["2.weight", "2.bias"]
    with pytest.raises(
        ValueError, match=r"keep lists names of this module that .* it has none that matches \['3\.\*'\]"
    ):
        load(model, arrays, keep=["2.*", "3.*"])
    with pytest.raises(ValueError, match=r"missing: 2\.bias, float32\[2\]"):
        load(model, arrays, keep="2.weight")


def test_lazy_layers_take_their_sizes_and_kept_ones_do_not(load: Any) -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(2))
    arrays = {f"net.{name}": numbers(*a.shape) for name, a in net().state_dict().items()}
    load(model, arrays, names={"net.*": "*"})
    assert repr(model) == repr(net())


# -- what is refused ---------------------------------------------------------------------------------------------------


def unchanged(load: Any, model: Any, arrays: Any, pattern: str, **options: Any) -> None:
    before = {name: np.array(array) for name, array in model.state_dict().items()}
    with pytest.raises(ValueError, match="(?s)nothing was loaded:.*" + pattern):
        load(model, arrays, **options)
    same(model, before)


def test_the_report_has_shapes_and_where_a_name_comes_from(load: Any) -> None:
    arrays = {"w": numbers(3, 2), "b": numbers(2), "extra": numbers(1)}
    lines = [
        r"weight[^\n]*\(?3, 2",
        "unexpected: extra, float32",
        "weight comes from w\n",
        r"weight has its axes the other way",
    ]
    for line in lines:
        unchanged(load, nn.Linear(3, 2), arrays, line, names={"w": "weight", "b": "bias"})
    unchanged(
        load, nn.Linear(3, 2), arrays, r"put transposed\('weight'\) into `names`", names={"w": "weight", "b": "bias"}
    )
    unchanged(load, nn.Linear(3, 2), {"weight": numbers(2, 3)}, r"missing: bias, float32\[2\]", names={})
    assert load(nn.Linear(3, 2), {"weight": numbers(2, 3), "x": numbers(1)}, strict=False, names={}) == (
        ["bias"],
        ["x"],
    )


@pytest.mark.parametrize(
    "names, pattern",
    [
        ({"a": "weight", "b": "weight"}, "weight is made twice: from a, and from b"),
        ({("a", "c"): "weight"}, "weight is joined from 2 arrays, without c"),
        (
            {("a", "bias"): "weight"},
            r"weight cannot be joined along the first axis: a float32\[2, 3\], bias float32\[2\]",
        ),
        ({"a": ("weight", "x", "y")}, r"a float32\[2, 3\] cannot be divided among weight, x, y"),
        ({"bias": transposed("bias")}, r"transposed\(bias\), with the axes \(1, 0\), does not fit bias float32\[2\]"),
        ({"a": transposed("weight", 0, 2)}, r"transposed\(weight\), with the axes \(0, 2\), does not fit"),
    ],
)
def test_names_that_do_not_fit_the_weights(load: Any, names: Any, pattern: str) -> None:
    arrays = {"a": numbers(2, 3), "b": numbers(2, 3), "bias": numbers(2)}
    unchanged(load, nn.Linear(3, 2), arrays, pattern, names=names)


@pytest.mark.parametrize(
    "names, error, pattern",
    [
        ([("a", "b")], TypeError, r"names is a dict of their names and ours; got \[\('a', 'b'\)\]"),
        ({"a": 1}, TypeError, "names has a name or a tuple of names as each key, .*; got 'a': 1"),
        ({1: "a"}, TypeError, "got 1: 'a'"),
        ({(): "a"}, TypeError, r"got \(\): 'a'"),
        ({"a": ()}, TypeError, r"got 'a': \(\)"),
        ({"a.*": "b"}, ValueError, r"names has 'a\.\*': 'b', with different numbers of `\*`"),
        ({"a?": "b"}, ValueError, r"the key 'a\?' of names has `\?` or `\[`"),
    ],
)
def test_names_that_are_none(load: Any, names: Any, error: type[Exception], pattern: str) -> None:
    with pytest.raises(error, match=pattern):
        load(nn.Linear(3, 2), {"a": numbers(2, 3)}, names=names)


# -- ties --------------------------------------------------------------------------------------------------------------


class Tied(mt.Module):
    def __init__(self, tied: bool = True) -> None:
        self.embedding, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        if tied:
            self.out.tie("weight", self.embedding, "weight")


def test_ties_of_a_file_under_other_names(tmp_path: Path) -> None:
    source = Tied()
    safetensors.save(tmp_path / "a", source)
    moved = nn.ModuleDict({"net": Tied()})
    assert safetensors.load(tmp_path / "a", moved, names={"*": "net.*"}) == ([], [])
    same(moved, {"net.out.weight": source.out.weight, "net.embedding.weight": source.embedding.weight})
    with pytest.raises(
        ValueError, match=r"net\.out\.weight and net\.embedding\.weight are tied in the file.*tie them here"
    ):
        safetensors.load(tmp_path / "a", nn.ModuleDict({"net": Tied(False)}), names={"*": "net.*"})
    alone = nn.Linear(4, 5, bias=False)  # takes the name that the file does not store
    safetensors.load(tmp_path / "a", alone, names={"embedding.weight": None, "out.*": "*"})
    same(alone, {"weight": source.out.weight})


def test_ties_of_torch_under_other_names() -> None:
    array = torch.from_numpy(numbers(5, 4))
    model = nn.ModuleDict({"net": Tied(False)})
    with pytest.raises(
        ValueError, match=r"net\.out\.weight and net\.embedding\.weight are one tensor in torch, and two"
    ):
        adapter.load_from_torch(model, {"embedding.weight": array, "out.weight": array}, names={"*": "net.*"})
    adapter.load_from_torch(model, {"embedding.weight": array, "out.weight": array}, names={"*": "net.*"}, tie=True)
    assert len(model.parameters()) == 1
    same(model, {"net.out.weight": array.numpy()})


def test_tensors_without_values_are_refused_only_where_they_are_used() -> None:
    tensors = {"weight": torch.ones(2, 3), "bias": torch.ones(2), "x": torch.ones(4, device="meta")}
    model = nn.Linear(3, 2)
    adapter.load_from_torch(model, tensors, names={"x": None})
    with pytest.raises(ValueError, match=r"x: torch has float32\[4\] on the meta device"):
        adapter.load_from_torch(model, tensors, names={"x": ("a", "b")})
    with pytest.raises(ValueError, match="unexpected: x, uninitialised, which exists in torch and not here"):
        adapter.load_from_torch(model, tensors | {"x": torch.nn.LazyLinear(1).weight})
