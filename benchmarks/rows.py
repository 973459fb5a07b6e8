"""What is measured: the catalogue of all comparisons of sides that do the same work."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from . import adapted, disturbed, memory, mesh, ours, starts
from .comparison import CPU, Comparison, Row, costs, first_calls, steady
from .layers import rows as layers
from .peers import equinox, hand, nnx, numpy, optax, torch
from .problems import MLP, Arrays, Layer, Matrices
from .programs import rows as programs


class Sizes(NamedTuple):
    """How large the work is."""

    arrays: Sequence[int]
    depths: Sequence[int]
    wide: MLP
    batches: Sequence[MLP]  # whose data come from NumPy
    among_peers: MLP
    large: int
    first: int  # depth of the network whose first call is measured
    usual: MLP  # whose step is disturbed, and written as a pure function
    listed: int  # layers that an optimizer plans for
    matrices: Sequence[int]  # of NumPy, of 32 x 32
    packed: Arrays  # whose total the cores divide, and whose total with one more they do not
    flat: int  # the same of one array


FULL = Sizes(
    (4, 40, 400, 2000),
    (2, 20, 100),
    MLP(3, 512, 128),
    (MLP(1, 784, 64), MLP(1, 3072, 256)),
    MLP(20, 32),
    50_000_000,
    100,
    MLP(20, 16),
    300,
    (20, 200),
    Arrays(301, 1000),
    1_000_000,
)
QUICK = Sizes(
    (4, 40),
    (2, 4),
    MLP(3, 64, 32),
    (MLP(1, 64, 64),),
    MLP(3, 32),
    1_000_000,
    3,
    MLP(3, 16),
    20,
    (20,),
    Arrays(3, 1000),
    10_000,
)
SCAN = 20  # steps in one program

STEP, PACKED_STEP, FOUR = "step()", "packed step()", "step() of 4 arrays"
HAND, HAND_DEVICE = "jax.jit by hand", "jax.jit by hand, lr on device"
NUMPY, FOREACH, FUSED = "NumPy loop", "torch foreach", "torch fused"
NATIVE, WRAPPED = "step() of NumPy lists", "step() of wrap(layers)"
LOOP, PACKED_LOOP, JIT, SCANNED = "three-call loop", "packed three-call loop", "mt.jit", f"mt.scan of {SCAN} steps"
TWO, TWO_DEVICE = "two jax.jit calls by hand", "two jax.jit calls, lr on device"
JIT_NUMPY, HAND_NUMPY = "mt.jit, NumPy batches", "fused jax.jit by hand, NumPy batches"
HAND_FUSED, HAND_SCAN = "fused jax.jit by hand", f"lax.scan by hand of {SCAN} steps"
NNX, NNX_CACHED, NNX_PARTIAL = "nnx.jit", "nnx.cached_partial", "nnx.jit_partial"
EQUINOX, OPTAX = "equinox filter_jit", "optax under jax.jit"
NNX_MODULE, EQUINOX_MODULE, OPTAX_RULE = "mt.jit, nnx module", "mt.jit, equinox module", "mt.jit, OptaxOptimizer"
FUNCTIONAL = "jax.jit(step)(opt, x, y)"
OURS, THEIRS = "Module", "equinox Module"
OURS_ADAM, THEIRS_ADAM = "Optimizer (Adam)", "equinox Module, optax state"
LISTED, IN_ONE = "layers listed", "layers in one Sequential"
OPTAX_STEP = "step() of OptaxOptimizer"


def updates(count: int) -> Comparison:
    """`step()` on many small arrays."""
    problem = Arrays(count, 16)
    makers = {
        STEP: partial(ours.step, problem),
        HAND: partial(hand.step, problem),
        HAND_DEVICE: partial(hand.step, problem, lr_on_device=True),
        FOUR: partial(ours.step, Arrays(4, 16)),
        PACKED_STEP: partial(ours.step, problem, packed=True),
        NUMPY: partial(numpy.step, problem),
        FOREACH: partial(torch.step, problem, "foreach"),
        FUSED: partial(torch.step, problem, "fused"),
    }
    aims = {4: 1.3, 40: 1.2, 400: 1.15, 2000: 1.15}
    rows = [Row(STEP, HAND, aims[count]), *(Row(STEP, peer) for peer in (HAND_DEVICE, NUMPY, FOREACH, FUSED))]
    rows += [Row(PACKED_STEP, FOUR, 25 / 15), *(Row(PACKED_STEP, peer) for peer in (HAND, NUMPY, FUSED))]
    return Comparison(f"step/{count}", f"step(), {count} arrays of 16 floats", rows, steady(makers))


def numpy_updates(count: int) -> list[Comparison]:
    """`step()` on NumPy arrays, against the specification's loop, and one that is written out for Adam."""
    problem = Matrices(count, 32 * 32)
    groups = []
    for rule, loop in (("sgd", numpy.step), ("adam", numpy.adam_step)):
        makers = {
            NATIVE: partial(ours.numpy_step, problem, rule),
            WRAPPED: partial(ours.numpy_step, problem, rule, wrapped=True),
            NUMPY: partial(loop, problem),
        }
        rows = [Row(NATIVE, NUMPY, 1.5 if rule == "sgd" else None), Row(WRAPPED, NUMPY), Row(WRAPPED, NATIVE)]
        title = f"{RULES[rule]}, {count} NumPy arrays of 32 x 32"
        groups.append(Comparison(f"numpy step/{rule}/{count}", title, rows, steady(makers)))
    return groups


def network(problem: MLP) -> str:
    return f"MLP of depth {problem.depth}, width {problem.width}, batch {problem.batch}"


def training(problem: MLP, shallow: bool, deep: bool) -> Comparison:
    """A training step, against hand-written JAX; `shallow` and `deep` are the ends of what is measured."""
    makers = {
        JIT: partial(ours.compiled, problem),
        HAND_FUSED: partial(hand.fused, problem),
        LOOP: partial(ours.three_calls, problem),
        TWO: partial(hand.two_calls, problem),
        TWO_DEVICE: partial(hand.two_calls, problem, lr_on_device=True),
    }
    loop_aim = 1.3 if shallow else 1.1 if deep else 1.15
    rows = [Row(JIT, HAND_FUSED, 1.2 if shallow else 1.05), Row(LOOP, TWO, loop_aim), Row(LOOP, TWO_DEVICE)]
    if shallow:
        makers |= {SCANNED: partial(ours.scanned, problem, SCAN), HAND_SCAN: partial(hand.scanned, problem, SCAN)}
        rows.append(Row(SCANNED, HAND_SCAN, 1.1))
    if deep:
        makers |= {PACKED_LOOP: partial(ours.three_calls, problem, packed=True)}
        rows += [Row(PACKED_LOOP, TWO, 0.6), Row(PACKED_LOOP, HAND_FUSED)]
    return Comparison(f"train/{problem.depth}", f"training step, {network(problem)}", rows, steady(makers))


def wide(problem: MLP) -> Comparison:
    """A training step with much to compute."""
    makers = {
        JIT: partial(ours.compiled, problem),
        HAND_FUSED: partial(hand.fused, problem),
        LOOP: partial(ours.three_calls, problem),
        TWO: partial(hand.two_calls, problem),
        FUSED: partial(torch.train, problem, "fused"),
    }
    rows = [Row(JIT, HAND_FUSED, 1.2), Row(LOOP, TWO), Row(JIT, FUSED)]
    return Comparison("wide", f"training step, {network(problem)}", rows, steady(makers))


def numpy_batches(problem: MLP) -> Comparison:
    """A training step whose data come in NumPy arrays: ours copies them before it returns, JAX by itself may not."""
    makers = {
        JIT_NUMPY: partial(ours.compiled, problem, from_numpy=True),
        JIT: partial(ours.compiled, problem),
        HAND_NUMPY: partial(hand.fused, problem, from_numpy=True),
    }
    rows = [Row(JIT_NUMPY, JIT), Row(JIT_NUMPY, HAND_NUMPY)]
    return Comparison(f"numpy/{problem.width}", f"training step, {network(problem)}", rows, steady(makers))


def disturbed_steps(problem: MLP) -> list[Comparison]:
    """A training step right after something else in the process moved, against one where nothing did."""
    others, still, own = list(disturbed.OTHERS), disturbed.NOTHING, disturbed.OWN_MODE
    rows = {
        JIT: [*(Row(other, still, 1.5) for other in others), Row(own, still, 3.0)],
        LOOP: [Row(other, still, 1.3) for other in others[::2]],
    }
    groups = []
    for name, make in ((JIT, disturbed.compiled), (LOOP, disturbed.three_calls)):
        makers = {what: partial(make, problem, what) for what in [still, *(row.ours for row in rows[name])]}
        title = f"{name} right after something else, {network(problem)}"
        groups.append(Comparison(f"disturbed/{name}", title, rows[name], steady(makers)))
    return groups


def on_a_mesh(depth: int) -> Comparison:
    """A training step, and `step()` alone, on several devices: the main thread's CPU time."""
    rows = [Row(ours_, by_hand, 1.5) for ours_, by_hand in mesh.PAIRS]
    title = f"on a mesh of {mesh.DEVICES} devices, {network(MLP(depth, 16, 16))}"
    return Comparison(f"mesh/{depth}", title, rows, lambda names, effort: mesh.measure(names, effort, depth))


def pure(problem: MLP) -> list[Comparison]:
    """The functional form, and what its calls pay for: flattening."""
    step = {FUNCTIONAL: partial(ours.functional, problem), JIT: partial(ours.compiled, problem)}
    module = {OURS: partial(ours.flattened_module, problem), THEIRS: partial(equinox.flattened_module, problem)}
    optimizer = {
        OURS_ADAM: partial(ours.flattened_optimizer, problem),
        THEIRS_ADAM: partial(equinox.flattened_optimizer, problem),
    }
    rows = [Row(OURS, THEIRS), Row(OURS_ADAM, THEIRS_ADAM)]
    layers = f"{problem.depth} layers flattened and put together again"
    return [
        Comparison("functional", f"functional step, {network(problem)}", [Row(FUNCTIONAL, JIT, 2.0)], steady(step)),
        Comparison("flatten", layers, rows, steady(module | optimizer, trains=False)),
    ]


def planning(count: int) -> Comparison:
    """Making an optimizer."""
    problem = MLP(count, 4)
    makers = {LISTED: partial(ours.planned, problem, True), IN_ONE: partial(ours.planned, problem, False)}
    title = f"an optimizer of {count} layers is made"
    return Comparison("plan", title, [Row(LISTED, IN_ONE, 1.5)], steady(makers, trains=False))


def uneven(packed: Arrays, flat: int) -> list[Comparison]:
    """Sizes that the cores do not divide, against those that they do; XLA on CPU vectorises only the latter."""
    total = sum(packed.sizes)
    more, even = f"{total + 1:,} numbers", f"{total:,} numbers"
    packs = {
        more: partial(ours.step, packed._replace(rest=1), "adam", packed=True),
        even: partial(ours.step, packed, "adam", packed=True),
    }
    one_more, divided = f"{flat + 1:,} floats", f"{flat:,} floats"
    arrays = {one_more: partial(ours.step, Arrays(1, flat + 1)), divided: partial(ours.step, Arrays(1, flat))}
    return [
        Comparison("uneven/packed", "packed step() of Adam", [Row(more, even, 1.1)], steady(packs)),
        Comparison("uneven/flat", "step() of one array", [Row(one_more, divided)], steady(arrays)),
    ]


def among_peers(problem: MLP) -> Comparison:
    """A training step, against everybody."""
    makers = {
        JIT: partial(ours.compiled, problem),
        HAND_FUSED: partial(hand.fused, problem),
        OPTAX: partial(optax.train, problem),
        EQUINOX: partial(equinox.train, problem),
        NNX: partial(nnx.train, problem),
        NNX_CACHED: partial(nnx.train_cached, problem),
        NNX_PARTIAL: partial(nnx.train_partial, problem),
        FOREACH: partial(torch.train, problem, "foreach"),
        FUSED: partial(torch.train, problem, "fused"),
        NUMPY: partial(numpy.train, problem),
        SCANNED: partial(ours.scanned, problem, SCAN),
        LOOP: partial(ours.three_calls, problem),
        PACKED_LOOP: partial(ours.three_calls, problem, packed=True),
        TWO: partial(hand.two_calls, problem),
    }
    rows = [Row(JIT, HAND_FUSED, 1.05), Row(JIT, NNX, 1 / 8), Row(JIT, EQUINOX, 1 / 2)]
    rows += [Row(JIT, peer) for peer in (NNX_CACHED, NNX_PARTIAL, OPTAX, FOREACH, FUSED, NUMPY)]
    rows += [Row(SCANNED, HAND_FUSED), Row(LOOP, TWO), Row(PACKED_LOOP, TWO)]
    return Comparison("peers", f"training step among peers, {network(problem)}", rows, steady(makers))


def crossing(axis: str, problem: MLP) -> Comparison:
    """A training step of one width or depth among many, against the libraries that a user chooses between."""
    makers = {
        JIT: partial(ours.compiled, problem),
        SCANNED: partial(ours.scanned, problem, SCAN),
        HAND_FUSED: partial(hand.fused, problem),
        NUMPY: partial(numpy.train, problem),
        FUSED: partial(torch.train, problem, "fused"),
        EQUINOX: partial(equinox.train, problem),
        NNX: partial(nnx.train, problem),
    }
    rows = [Row(mine, peer) for mine in (JIT, SCANNED) for peer in list(makers)[2:]]
    title = f"training step by {axis}, {network(problem)}"
    return Comparison(f"{axis}/{getattr(problem, axis)}", title, rows, steady(makers))


def crossings(quick: bool) -> list[Comparison]:
    """The same network wider and wider, and deeper and deeper."""
    widths, depths = ((4, 8), (1, 2)) if quick else ((16, 32, 64, 128, 256, 512, 1024), (1, 2, 5, 10, 20, 50, 100))
    wider = [crossing("width", MLP(2, width, 32)) for width in widths]
    return [*wider, *(crossing("depth", MLP(depth, 32, 32)) for depth in depths)]


def adapters(problem: MLP, count: int) -> list[Comparison]:
    """Other libraries' modules and optimizers in our loop, against their own."""
    makers = {
        NNX_MODULE: partial(adapted.flax, problem),
        NNX: partial(nnx.train, problem),
        NNX_PARTIAL: partial(nnx.train_partial, problem),
        EQUINOX_MODULE: partial(adapted.equinox_module, problem),
        EQUINOX: partial(equinox.train, problem),
        OPTAX_RULE: partial(adapted.optax_rule, problem),
        OPTAX: partial(optax.train, problem),
    }
    rows = [Row(NNX_MODULE, NNX), Row(NNX_MODULE, NNX_PARTIAL), Row(EQUINOX_MODULE, EQUINOX), Row(OPTAX_RULE, OPTAX)]
    arrays = Arrays(count, 16)
    steps = {OPTAX_STEP: partial(adapted.step, arrays, "adam"), OPTAX: partial(optax.step, arrays, "adam")}
    return [
        Comparison("adapters", f"training step through adapters, {network(problem)}", rows, steady(makers)),
        Comparison(
            "adapters/step",
            f"Adam of optax through adapters, {count} arrays of 16 floats",
            [Row(OPTAX_STEP, OPTAX)],
            steady(steps),
        ),
    ]


RULES = {"sgd": "SGD", "momentum": "SGD with momentum", "adam": "Adam", "adamw": "AdamW", "lion": "Lion"}


def large(size: int, rule: str, name: str) -> Comparison:
    """`step()` on one large array."""
    problem = Arrays(1, size)
    makers = {STEP: partial(ours.step, problem, rule)}
    if rule == "sgd":
        makers |= {HAND: partial(hand.step, problem), NUMPY: partial(numpy.step, problem)}
        rows = [Row(STEP, HAND, 1.05), Row(STEP, NUMPY, 1 / 3)]
    else:
        makers |= {OPTAX: partial(optax.step, problem, rule)}
        rows = [Row(STEP, OPTAX, 1.0)]
    if rule != "lion":  # which torch has not
        makers |= {peer: partial(torch.step, problem, peer.split()[1], rule) for peer in (FOREACH, FUSED)}
        rows += [Row(STEP, FOREACH), Row(STEP, FUSED)]
    return Comparison(f"large/{rule}", f"{name}, one array of {size:,} floats", rows, steady(makers))


LARGE = 4_000_003, 8_000_000, 50_000_000


def large_updates(sizes: Sequence[int]) -> list[Comparison]:
    """`step()` of rules with state, on one array of each size, with the processor's time."""
    found = []
    for rule, size in itertools.product(("momentum", "adam"), sizes):
        problem = Arrays(1, size)
        makers = {STEP: partial(ours.step, problem, rule), OPTAX: partial(optax.step, problem, rule)}
        makers |= {peer: partial(torch.step, problem, peer.split()[1], rule) for peer in (FUSED, FOREACH)}
        rows = [Row(STEP + end, peer + end) for peer in (OPTAX, FUSED, FOREACH) for end in ("", CPU)]
        title = f"{RULES[rule]}, one array of {size:,} floats"
        found.append(Comparison(f"updates/{rule}/{size}", title, rows, costs(makers)))
    return found


def small(count: int, rule: str, name: str) -> Comparison:
    """`step()` of a rule on many small arrays."""
    problem = Arrays(count, 16)
    makers = {
        STEP: partial(ours.step, problem, rule),
        PACKED_STEP: partial(ours.step, problem, rule, packed=True),
        FOUR: partial(ours.step, Arrays(4, 16), rule),
        OPTAX: partial(optax.step, problem, rule),
    }
    rows = [Row(STEP, OPTAX, 1.0), Row(PACKED_STEP, FOUR, 25 / 15), Row(PACKED_STEP, OPTAX)]
    if rule != "lion":
        makers |= {peer: partial(torch.step, problem, peer.split()[1], rule) for peer in (FOREACH, FUSED)}
        rows += [Row(PACKED_STEP, FOREACH), Row(PACKED_STEP, FUSED)]
    return Comparison(f"small/{rule}", f"{name}, {count} arrays of 16 floats", rows, steady(makers))


LAYERS = {
    "conv": "Conv2d(64, 64, 3), 8 images of 32 x 32",
    "lstm": "LSTM(64, 64), 8 sequences of 32",
    "attention": "MultiheadAttention(64, 4), 8 sequences of 32",
    "transformer": "TransformerEncoderLayer(64, 4, 128), 8 sequences of 32",
}


def layer(problem: Layer, title: str) -> Comparison:
    """Forward, backward and an SGD step of one layer, against the same of other libraries."""
    makers = {JIT: partial(ours.layer, problem), NNX_PARTIAL: partial(nnx.layer, problem)}
    makers |= {EQUINOX: partial(equinox.layer, problem), FUSED: partial(torch.layer, problem)}
    rows = [Row(JIT, NNX_PARTIAL, 1.1), Row(JIT, EQUINOX, 1.1), Row(JIT, FUSED)]
    return Comparison(f"layer/{problem.kind}", f"training step of {title}", rows, steady(makers))


def peak_memory(size: int) -> Comparison:
    rows = [Row(memory.OURS, memory.LEAST, 1.05), Row(memory.OURS, memory.HAND)]
    title = f"peak memory of SGD, one array of {size:,} floats"
    return Comparison("memory", title, rows, lambda names, effort: memory.measure(names, size), unit="B")


def first(depth: int) -> Comparison:
    """Trace and compilation."""
    problem = MLP(depth, 16)
    makers: dict[str, Any] = {
        JIT: partial(ours.compiled, problem),
        HAND_FUSED: partial(hand.fused, problem),
        LOOP: partial(ours.three_calls, problem),
        TWO: partial(hand.two_calls, problem),
        PACKED_LOOP: partial(ours.three_calls, problem, packed=True),
    }
    rows = [Row(JIT, HAND_FUSED, 1.3), Row(LOOP, TWO, 1.3), Row(PACKED_LOOP, LOOP, per_array=2 * depth)]
    return Comparison("first", f"first call, {network(problem)}", rows, first_calls(makers))


def importing() -> Comparison:
    """What the package adds to the start of a program."""
    rows = [Row(starts.OURS, starts.JAX)]
    return Comparison("import", "import", rows, lambda names, effort: starts.importing(names, max(3, effort.rounds)))


def making(quick: bool) -> Comparison:
    """The first values of a network's parameters."""
    sizes = starts.CONVOLUTIONS[:1] if quick else starts.CONVOLUTIONS
    title = "making the convolutions of a ResNet-18" if not quick else "making a convolution"
    rows = [Row(starts.MADE, peer) for peer in (starts.MADE_NNX, starts.MADE_EQUINOX)]
    return Comparison(
        "making", title, rows, lambda names, effort: starts.making(names, max(1, effort.rounds // 3), sizes)
    )


def calls(quick: bool) -> tuple[list[Comparison], list[str]]:
    """What a call costs beside its computation, and notes on what cannot be measured here."""
    sizes, notes = QUICK if quick else FULL, []
    groups = [updates(count) for count in sizes.arrays]
    groups += [group for count in sizes.matrices for group in numpy_updates(count)]
    ends = sizes.depths[0], sizes.depths[-1]
    groups += [training(MLP(depth, 16), depth == ends[0], depth == ends[1]) for depth in sizes.depths]
    groups += [numpy_batches(problem) for problem in sizes.batches]
    groups += [wide(sizes.wide), among_peers(sizes.among_peers), *adapters(sizes.among_peers, sizes.arrays[1])]
    groups += [on_a_mesh(depth) for depth in sizes.depths[:2]]
    groups += [*disturbed_steps(sizes.usual), *pure(sizes.usual), planning(sizes.listed)]
    groups += uneven(sizes.packed, sizes.flat)
    for rule, name in RULES.items():
        groups.append(large(sizes.large, rule, name))
        if rule != "sgd":  # which has rows of its own
            groups.append(small(sizes.arrays[-1], rule, name))
    for kind, title in LAYERS.items():
        groups.append(
            layer(Layer(kind, *((2, 8, 8) if quick else ())), title if not quick else f"a small {kind} layer")
        )
    why = memory.unavailable()
    if why is None:
        groups.append(peak_memory(sizes.large))
    else:
        notes.append(f"peak memory: not measured: {why}")
    return [*groups, first(sizes.first), making(quick), importing()], notes


CATALOGUES: dict[str, Callable[[bool], tuple[list[Comparison], list[str]]]] = {
    "calls": calls,
    "crossover": lambda quick: (crossings(quick), []),
    "layers": lambda quick: (layers.comparisons(quick), []),
    "updates": lambda quick: (large_updates((10_003,) if quick else LARGE), []),
    "programs": lambda quick: (programs.steps(quick), []),
    "first": lambda quick: (programs.first_calls(quick), []),
}
