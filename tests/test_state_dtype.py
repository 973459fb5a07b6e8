"""`state_dtype=jnp.bfloat16`: optimizer state in half of the memory, rounded stochastically."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optimizers
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import minitorch_jax as mt
from minitorch_jax import nn, optim
from minitorch_jax.optim.rounding import Rounding, place_of, rounded

LOW = jnp.bfloat16
NAMES = optimizers.GROUPED  # LBFGS refuses it


def bits(x: Any) -> Any:
    return np.asarray(x).view(np.uint16 if x.dtype == LOW else np.uint32)


def make(name: str, model: Any = None, **options: Any) -> Any:
    more = {"momentum": 0.9} if name in ("SGD", "RMSprop", "LARS") else {}
    return optimizers.OPTIMIZERS[name](
        [optimizers.matrix() if model is None else model], lr=0.01, **{"state_dtype": LOW, **more, **options}
    )


def arrays(opt: Any, parameters: bool = True) -> dict[str, Any]:
    """The state and the parameters, by name."""
    found = {f"{path}.{k}": v for path, fields in opt.state_dict()["state"].items() for k, v in fields.items()}
    return found | {f"parameter {i}": p for i, p in enumerate(opt.modules[0].parameters()) if parameters}


def assert_same_bits(one: Any, other: Any, parameters: bool = True) -> None:
    one, other = arrays(one, parameters), arrays(other, parameters)
    assert list(one) == list(other)
    for name, value in one.items():
        assert np.asarray(value).tobytes() == np.asarray(other[name]).tobytes(), name


# -- rounding ----------------------------------------------------------------------------------------------------------


def test_numbers_of_bfloat16_stay_as_they_are() -> None:
    every = jax.lax.bitcast_convert_type(jnp.arange(2**16, dtype=jnp.uint16), LOW)
    wide = every.astype(jnp.float32)
    normal = np.asarray((jnp.abs(wide) >= 2.0**-126) | (wide == 0))  # XLA on CPU may take subnormal numbers for zeros
    for noise in (0, 1, 0x7FFF, 0xFFFF):
        found = rounded(wide, jnp.full(wide.shape, noise, jnp.uint32))
        nan = np.isnan(np.asarray(wide))
        assert_array_equal(bits(found)[normal & ~nan], bits(every)[normal & ~nan])
        assert np.isnan(np.asarray(found.astype(jnp.float32)))[nan].all()


@pytest.mark.parametrize("payload", [0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFF800001])
def test_nan_stays_nan(payload: int) -> None:
    x = jax.lax.bitcast_convert_type(jnp.uint32(payload), jnp.float32)
    assert all(bool(jnp.isnan(rounded(x, jnp.uint32(noise)))) for noise in (0, 0xFFFF))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nothing_finite_becomes_infinite(sign: float) -> None:
    largest = jnp.finfo(LOW).max.astype(jnp.float32)
    for x in (jnp.finfo(jnp.float32).max, np.nextafter(np.float32(largest), np.float32(np.inf))):
        found = rounded(jnp.float32(sign * x), jnp.uint32(0xFFFF))
        assert float(found) == sign * float(largest)


def test_a_subnormal_number_is_rounded_as_its_bits_are() -> None:
    x = jax.lax.bitcast_convert_type(jnp.full(2, 0x00018000, jnp.uint32), jnp.float32)
    found = bits(rounded(x, jnp.array([0x7FFF, 0x8000], jnp.uint32)))
    assert found.tolist() in ([1, 2], [0, 0])  # as the device takes such numbers


@pytest.mark.parametrize("value", [1.0 + 1 / 1024, -3.3333333, 1e-30, 7e37])
def test_the_mean_is_the_number(value: float) -> None:
    """Over n independent draws, within five standard deviations of the mean of a two-valued variable."""
    n, x = 200_000, np.float32(value)
    p = jnp.full(n, x)
    rounding = Rounding(jnp.uint32(7), tuple(place_of([("0.weight", (n,))], n)), jnp.int32(3), p, {"v": p.astype(LOW)})
    found = np.asarray(rounding.stored({"v": p}, {"v": p.astype(LOW)})["v"]).astype(np.float64)
    down = np.asarray(np.array(x).view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    unit = np.abs(np.unique(found) - down).max()
    share = abs(float(x) - down) / unit
    assert len(np.unique(found)) == 2
    assert abs(found.mean() - float(x)) <= 5 * unit * np.sqrt(share * (1 - share) / n)


def noise_of(seed: int = 7, path: str = "0.weight", t: int = 3, name: str = "v", n: int = 65_536) -> Any:
    """The 16 bits of each element, read off by rounding 1 + 2⁻⁸ (half a unit): up, or not."""
    p = jnp.full(n, np.float32(1 + 2.0**-8))
    low = {name: p.astype(LOW)}
    rounding = Rounding(jnp.uint32(seed), tuple(place_of([(path, (n,))], n)), jnp.int32(t), p, low)
    return np.asarray(rounding.stored({name: p}, low)[name]) > 1


def test_noise_of_different_elements_steps_states_parameters_and_seeds_is_independent() -> None:
    base = noise_of()
    others = [noise_of(seed=8), noise_of(path="0.bias"), noise_of(t=4), noise_of(name="m"), np.roll(base, 1)]
    others += [np.roll(base, 64), np.roll(base, 256)]
    bound = 5 * 0.5 / np.sqrt(len(base))  # five standard deviations of a share of independent coins
    assert abs(base.mean() - 0.5) <= bound
    for other in others:
        assert abs((base == other).mean() - 0.5) <= bound
    over_steps = np.stack([noise_of(t=t, n=64) for t in range(1, 513)])
    assert np.abs(over_steps.mean(0) - 0.5).max() <= 5 * 0.5 / np.sqrt(512)


def test_a_packs_elements_have_the_noise_that_they_have_alone() -> None:
    parts = [("0.a", (3, 5)), ("0.b", (7,)), ("0.c", ())]
    together = place_of(parts, 64)
    assert together.shape == (64,) and together.dtype == np.uint32
    start = 0
    for path, shape in parts:
        size = int(np.prod(shape))
        p = jnp.zeros(shape)
        alone = Rounding(jnp.uint32(0), tuple(place_of([(path, shape)], size)), jnp.int32(1), p, {})._elements
        assert_array_equal(np.asarray(alone).reshape(-1), together[start : start + size])
        start += size


# -- every optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.one_in(6)
@pytest.mark.parametrize("name", NAMES)
def test_which_states_are_lower(name: str) -> None:
    """Floats of the parameter's shape; numbers, and Adafactor's rows and columns, are float32."""
    opt, full = make(name), make(name, state_dtype=None)
    assert opt.state_dtype == jnp.bfloat16 and full.state_dtype is None
    optimizers.stepped(opt)
    fields, plain = opt.state_dict()["state"]["0.weight"], full.state_dict()["state"]["0.weight"]
    assert fields.keys() == plain.keys()
    for field, value in plain.items():
        if field != "step":
            assert fields[field].dtype == (LOW if value.shape == (2, 2) else value.dtype), field
    assert opt.modules[0].weight.dtype == jnp.float32


def step(opt: Any, x: Any) -> Any:
    opt.zero_grad()
    loss = mt.backward(optimizers.total, *opt.modules, x)
    opt.step()
    return loss


XS = jnp.linspace(-1.0, 1.5, 5 * 3 * 2).reshape(5, 3, 2)
WAYS = ["eager", "jit", "scan", "functional", "saved", "copied"]


def run(make: Callable[..., Any], way: str, tmp_path: Path) -> Any:
    """An optimizer that `make` gives, after a step for each of XS."""
    mt.seed(3)
    opt = make()
    if way == "scan":
        mt.scan(lambda x: step(opt, x), XS)
    elif way == "functional":
        pure = jax.jit(lambda opt, x: (opt, step(opt, x)))
        for x in XS:
            opt, _ = pure(opt, x)
    elif way in ("saved", "copied"):
        for x in XS[:2]:
            step(opt, x)
        if way == "copied":
            opt = copy.deepcopy(opt)
        else:
            mt.save(tmp_path / "file", model=opt.modules[0], opt=opt)
            mt.seed(99)
            opt = make()
            opt.modules[0].load_state_dict({k: 0 * v for k, v in opt.modules[0].state_dict().items()})
            mt.load(tmp_path / "file", model=opt.modules[0], opt=opt)
        for x in XS[2:]:
            step(opt, x)
    else:
        call = mt.jit(step) if way == "jit" else step
        for x in XS:
            call(opt, x)
    return opt


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """In a scan, what was rounded has the same bits, and parameters differ by two units in the last place at most.

    XLA on CPU compiles the same HLO to other arithmetic there: it joins a product and a sum into one operation, which rounds
    once. Which rules show it depends on the processor (LAMB and ScheduleFreeAdamW, where this was found), and with
    `--xla_cpu_max_isa=AVX`, which has no such operation, none does. It is so without `state_dtype` too.
    """
    expected = run(lambda: make(name), "eager", tmp_path)
    for way in WAYS[1:]:
        found = run(lambda: make(name), way, tmp_path)
        assert_same_bits(found, expected, parameters=way != "scan")
        for mine, theirs in zip(found.modules[0].parameters(), expected.modules[0].parameters(), strict=True):
            assert_allclose(mine, theirs, rtol=3e-7)  # two units in the last place


class Small(mt.Module):
    def __init__(self) -> None:
        self.a = mt.Parameter(jnp.linspace(-1.0, 1.0, 15).reshape(3, 5))
        self.b = mt.Parameter(jnp.linspace(0.5, 2.0, 7))


@pytest.mark.one_in(9)
@pytest.mark.parametrize("name", [n for n in NAMES if n != "Muon"])
def test_packed_parameters_have_the_same_bits(name: str) -> None:
    found = []
    for packs in (False, True):
        mt.seed(5)
        model = Small()
        if packs:
            mt.pack(model)
        opt = make(name, model)
        for i in range(4):
            opt.zero_grad()
            model.accumulate([jnp.full(p.shape, 0.3 * (1 + i % 3)) * (1 + p) for p in model.parameters()])
            opt.step()
        found.append(opt)
    assert_same_bits(*found)


def test_the_seed_follows_the_random_stream_and_does_not_move_it() -> None:
    seeds = []
    for n in (1, 2, 1):
        mt.seed(n)
        seeds.append(make("Adam").state_dict()["seed"])
        drawn = mt.next_key()
        mt.seed(n)
        make("Adam", state_dtype=None)
        assert jnp.array_equal(jax.random.key_data(mt.next_key()), jax.random.key_data(drawn))
    assert seeds[0] == seeds[2] != seeds[1]
    assert "seed" not in make("Adam", state_dtype=None).state_dict()


# -- what it is for ----------------------------------------------------------------------------------------------------


class Values(mt.Module):
    def __init__(self, n: int) -> None:
        self.value = mt.Parameter(jnp.zeros(n))


def second_moments(steps: int, dtype: Any = None, state_dtype: Any = None) -> Any:
    """Adam's mean v after steps with gradients of 1, then of 0.25: it goes to 1, and on to 0.0625."""
    model = Values(256)
    if dtype is not None:
        model.astype(dtype)
    mt.seed(0)
    opt = optim.Adam([model], lr=0.0, state_dtype=state_dtype)

    def one(g: Any) -> Any:
        model.zero_grad()
        model.accumulate([jnp.full(256, g, model.value.dtype)])
        opt.step()

    mt.scan(one, jnp.concatenate([jnp.ones(steps), jnp.full(steps, 0.25)]))
    return np.asarray(opt.state_dict()["state"]["0.value"]["exp_avg_sq"]).astype(np.float64)


def test_where_rounding_to_nearest_stalls_stochastic_rounding_follows_float32() -> None:
    """The tolerance: a rounding has a standard deviation of at most 2⁻⁸ of v, and v forgets with β₂ = 0.999, so the sum of
    all has at most 2⁻⁸ / √(2 · 10⁻³), 9 % of v; the mean of 256 elements has 0.6 %. 3 % is five of those.
    """
    exact = second_moments(4000)
    low = second_moments(4000, state_dtype=LOW)
    nearest = second_moments(4000, jnp.bfloat16)  # what bfloat16 parameters have without `state_dtype`
    assert_allclose(exact.mean(), 0.0625 + 0.9375 * 0.999**4000, rtol=2e-2)
    assert_allclose(low.mean(), exact.mean(), rtol=3e-2)
    assert_allclose(low, exact, rtol=0.5)
    assert abs(nearest.mean() / exact.mean() - 1) > 0.5  # it stands still on the way


def test_a_small_net_trains_as_in_float32() -> None:
    def final(state_dtype: Any) -> float:
        mt.seed(0)
        net = nn.Sequential(nn.Linear(2, 16, key=jax.random.key(0)), nn.Tanh(), nn.Linear(16, 1, key=jax.random.key(1)))
        opt = optim.Adam([net], lr=1e-2, state_dtype=state_dtype)
        x = jax.random.normal(jax.random.key(2), (64, 2))
        y = jnp.sin(2 * x[:, :1]) + x[:, 1:] ** 2

        def one(_: Any) -> Any:
            opt.zero_grad()
            loss = mt.backward(lambda net: ((net(x) - y) ** 2).mean(), net)
            opt.step()
            return loss

        losses = mt.scan(one, jnp.arange(1500))
        return float(losses[-50:].mean())

    full, low = final(None), final(LOW)
    assert full < 0.05
    assert low < 1.5 * full + 1e-3


def compiled(opt: Any) -> Any:
    """The program of a step, compiled as a step is: what it owns is donated."""
    cells = opt._plan_now().outside(opt)
    owned = [cell.value for cell in cells.owned]
    grads = [jnp.zeros_like(owned[0])]
    return jax.jit(lambda o, g, v: cells.about(o, g, v), donate_argnums=0).lower(owned, grads, opt._hyper.cell.value)


@pytest.mark.one_in(8)
@pytest.mark.parametrize("name", ["Adam", "AdamW", "RAdam", "NAdam", "Adamax", "Yogi", "SGD", "Lion", "ASGD"])
def test_memory(name: str) -> None:
    """The state has half of the bytes, and a step needs no other copy of it."""
    bytes_of, size = {}, 1_000_000
    for dtype in (None, LOW):
        opt = make(name, nn.Linear(1000, 1000, bias=False, key=jax.random.key(0)), state_dtype=dtype)
        state = opt.state_dict()["state"]["0.weight"]
        bytes_of[dtype] = sum(value.nbytes for value in state.values() if np.size(value) == size)
        assert opt.summary().rows[0].state_bytes - bytes_of[dtype] <= 8
    assert bytes_of[LOW] * 2 == bytes_of[None] > 0
    assert compiled(opt).compile().memory_analysis().temp_size_in_bytes < 2 * size


@pytest.mark.one_in(4)
@pytest.mark.parametrize("name", NAMES)
def test_without_it_there_is_nothing_of_it(name: str) -> None:
    opt = make(name, state_dtype=None)
    text = compiled(opt).as_text()
    words = ["ui32", "bitcast", "bf16", "shift_right_logical"]  # of the hash, and of the rounding
    own = ["bf16"] if name == "Muon" else []  # it multiplies in bfloat16
    assert opt._seed is None and [word for word in words if word in text] == own
    assert compiled(make(name, state_dtype=jnp.float32)).as_text() == text
    rounds = any(v.dtype == LOW for k, v in arrays(make(name)).items() if not k.endswith("step"))
    assert rounds is (name != "Optimizer" and name != "Adafactor")
    low = compiled(make(name)).as_text()
    assert [word for word in words if word in low] == (words if rounds else [words[0]])


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (jnp.float16, "Adam: state_dtype must be jnp.bfloat16, jnp.float32 or None.*float16 cannot hold it"),
        (jnp.int8, "state_dtype must be jnp.bfloat16"),
        (jnp.float64, "state_dtype must be jnp.bfloat16"),
        ("many", "state_dtype must be jnp.bfloat16.*got 'many'"),
        (True, "state_dtype must be jnp.bfloat16"),
    ],
)
def test_other_dtypes_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("Adam", state_dtype=given)
    opt = make("Adam")
    with pytest.raises(ValueError, match=message):
        opt.state_dtype = given
    assert opt.state_dtype == LOW


def test_what_cannot_be_rounded_is_refused() -> None:
    with pytest.raises(ValueError, match="RMSprop: centered=True divides by the root"):
        make("RMSprop", centered=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'state_dtype'"):
        optim.LBFGS([optimizers.matrix()], state_dtype=LOW)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="LBFGS: state_dtype does not apply"):
        optim.LBFGS([optimizers.matrix()]).state_dtype = LOW
    with jax.enable_x64(True):
        wide = nn.Linear(2, 2, key=jax.random.key(0), dtype=jnp.float64)
        with pytest.raises(ValueError, match=r"Adam: state_dtype is for .* 0.weight is float64\[2, 2\]"):
            make("Adam", wide)


def test_a_group_may_have_one_and_it_may_be_assigned() -> None:
    models = [nn.Linear(3, 2, key=jax.random.key(i)) for i in range(2)]
    opt = optim.Adam([{"modules": models[:1], "state_dtype": LOW}, {"modules": models[1:]}])
    state = opt.state_dict()["state"]
    assert [fields["exp_avg"].dtype for fields in state.values()] == [LOW, LOW, jnp.float32, jnp.float32]
    assert "state_dtype=" in repr(opt.summary())
    optimizers_state = np.asarray(state["0.weight"]["exp_avg"])
    opt.groups[0].state_dtype = None
    state = opt.state_dict()
    assert state["state"]["0.weight"]["exp_avg"].dtype == jnp.float32 and "seed" not in state
    assert_array_equal(state["state"]["0.weight"]["exp_avg"], optimizers_state.astype(np.float32))
    opt.groups[1].state_dtype = "bfloat16"
    assert opt.groups[1].state_dtype == LOW and opt.state_dict()["state"]["1.weight"]["exp_avg"].dtype == LOW


def muon_and_adamw(**own: Any) -> Any:
    """Muon for the matrix, AdamW for the bias."""
    layer = nn.Linear(2, 2, key=jax.random.key(0))
    return optim.Muon([layer, {"rule": optim.AdamW, "lr": 3e-4, **own}], lr=0.02, state_dtype=LOW)


@pytest.mark.one_in(9)
@pytest.mark.parametrize(
    "own", [{}, {"state_dtype": None}, {"state_dtype": jnp.float32}], ids=["shared", "none", "float32"]
)
def test_a_group_with_another_rule_takes_the_optimizers_or_has_its_own(own: dict[str, Any], tmp_path: Path) -> None:
    adamw = jnp.float32 if own else LOW
    expected = run(lambda: muon_and_adamw(**own), "eager", tmp_path)
    fields = expected.state_dict()["state"]
    found = {path: {k: v.dtype for k, v in each.items() if k != "step"} for path, each in fields.items()}
    assert found == {"0.weight": {"momentum_buffer": LOW}, "0.bias": {"exp_avg": adamw, "exp_avg_sq": adamw}}
    for way in WAYS[1:]:
        assert_same_bits(run(lambda: muon_and_adamw(**own), way, tmp_path), expected)
    alone = functools.partial(make, "AdamW", nn.Linear(2, 2, key=jax.random.key(0)), **own)
    biases = []
    for begin in (alone, lambda: muon_and_adamw(**own)):
        mt.seed(3)
        opt = begin()
        for _ in range(4):
            opt.zero_grad()
            opt.modules[0].accumulate([jnp.ones((2, 2)), jnp.array([0.3, -0.7])])
            opt.step()
        biases.append({k: np.asarray(v).tobytes() for k, v in opt.state_dict()["state"]["0.bias"].items()})
    assert biases[0] == biases[1]  # one optimizer's noise is the other's


def test_with_parameters_in_bfloat16() -> None:
    """float32 keeps their state in float32; with master weights, the copy of the parameter stays in float32."""
    fields = {}
    for dtype in (None, jnp.float32, LOW):
        opt = make("Adam", optimizers.matrix(dtype=LOW), state_dtype=dtype, master_weights=dtype is LOW)
        opt.zero_grad()
        opt.modules[0].accumulate([jnp.ones((2, 2), LOW)])
        opt.step()
        fields[dtype] = opt.state_dict()["state"]["0.weight"]
    assert [fields[dtype]["exp_avg_sq"].dtype for dtype in fields] == [LOW, jnp.float32, LOW]
    assert fields[LOW]["master_weight"].dtype == jnp.float32


def test_loading_converts() -> None:
    full, low = make("Adam", state_dtype=None), make("Adam")
    for opt in (full, low):
        for _ in range(3):
            optimizers.stepped(opt)
    saved = {"full": full.state_dict(), "low": low.state_dict()}
    assert "state_dtype" not in saved["low"]["hyperparameters"]
    seed = low.state_dict()["seed"]
    low.load_state_dict({k: v for k, v in saved["full"].items() if k != "fingerprints"})
    now = low.state_dict()
    assert now["seed"] == seed and low.state_dtype == LOW
    assert_array_equal(now["state"]["0.weight"]["exp_avg"], saved["full"]["state"]["0.weight"]["exp_avg"].astype(LOW))
    full.load_state_dict({k: v for k, v in saved["low"].items() if k != "fingerprints"})
    assert full.state_dtype is None
    loaded = full.state_dict()["state"]["0.weight"]["exp_avg"]
    assert loaded.dtype == jnp.float32
    assert_array_equal(loaded, saved["low"]["state"]["0.weight"]["exp_avg"].astype(jnp.float32))
    for wrong in (-1, 2**32, 1.5, "many"):
        with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*32\)"):
            low.load_state_dict({**saved["low"], "seed": wrong})


@pytest.mark.slow
def test_numpy_modules_are_stepped_by_xla() -> None:
    class Numpy:
        def __init__(self) -> None:
            self.w, self.dw = np.ones(4, np.float32), np.full(4, 0.3, np.float32)

        def parameters(self) -> list[Any]:
            return [self.w]

        def grads(self) -> list[Any]:
            return [self.dw]

    mt.seed(0)
    theirs, ours = Numpy(), Values(4)
    ours.value = jnp.ones(4)
    opts = [optim.Adam([theirs], lr=0.01, state_dtype=LOW), optim.Adam([ours], lr=0.01, state_dtype=LOW)]
    for _ in range(5):
        ours.zero_grad()
        ours.accumulate([jnp.full(4, 0.3)])
        for opt in opts:
            opt.step()
    fields = [opt.state_dict()["state"] for opt in opts]
    assert fields[0]["0.0"]["exp_avg_sq"].dtype == LOW
    assert_allclose(theirs.w, ours.value, rtol=1e-3)
