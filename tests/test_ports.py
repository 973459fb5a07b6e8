"""Ten PyTorch programs and their translations, line by line (`tests/ports/`): from the same weights, the same 20 losses.

Each pair begins from our initial weights and draws the same random numbers: while torch's program runs, torch's functions
that draw take theirs from the stream of `mt.seed`, in the order in which the program calls them.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose
from oracle import says
from training import as_jax_comes

import minitorch_jax as mt
from minitorch_jax.nn import functional as F

FOLDER = Path(__file__).parent / "ports"
KINDS = [
    "image_classifier",
    "gan",
    "vae",
    "char_gpt",
    "word_lm",
    "siamese",
    "reinforce",
    "maml",
    "diffusion",
    "segmentation",
]


@contextmanager
def drawing_what_we_draw(torch: Any) -> Iterator[None]:
    """torch's functions that draw take their random numbers from the stream of `mt.seed`; all else in them is torch's."""

    def tensor(array: Any) -> Any:
        return torch.from_numpy(np.array(array))

    def normal(*shape: Any) -> Any:
        shape = shape if isinstance(shape[0], int) else shape[0]
        return tensor(jax.random.normal(mt.next_key(), tuple(shape)))

    def integers(low: int, high: int, shape: Any) -> Any:
        return tensor(jax.random.randint(mt.next_key(), shape, low, high)).long()

    def multinomial(probs: Any, number: int) -> Any:
        return tensor(jax.random.categorical(mt.next_key(), jnp.log(probs.detach().numpy()), shape=(number,)))

    def dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        return x * tensor(F.dropout(jnp.ones(x.shape), p) != 0) / (1 - p) if training and p else x

    def lstm(x: Any, state: Any, weights: Any, bias: bool, layers: int, p: float, training: bool, *rest: Any) -> Any:
        """torch's own, layer by layer, since its dropout between layers is not Python's."""
        states = []
        for layer in range(layers):
            x = dropout(x, p, training and layer > 0)
            hx = [part[layer : layer + 1] for part in state]
            x, *new = layer_of_torch(x, hx, weights[4 * layer : 4 * layer + 4], bias, 1, 0.0, training, *rest)
            states.append(new)
        return x, *map(torch.cat, zip(*states, strict=True))

    layer_of_torch = torch._VF.lstm
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", normal)
        patch.setattr(torch, "randn_like", lambda x: normal(x.shape))
        patch.setattr(torch, "randint", integers)
        patch.setattr(torch, "multinomial", multinomial)
        patch.setattr(torch.nn.functional, "dropout", dropout)
        patch.setattr(torch._VF, "lstm", lstm)
        yield


def trained(program: Any, networks: Any) -> tuple[np.ndarray, np.ndarray]:
    """The losses of a program, and what it evaluates, samples or generates after training, as one vector."""
    mt.seed(1)
    with as_jax_comes():
        losses, after = program.train(*networks)
    return np.array(losses, np.float64), np.concatenate([np.ravel(value) for value in jax.tree.leaves(after)])


def trained_by_torch(kind: str, start: list[dict[str, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """The same of torch's program, which begins from these weights: names and shapes are checked."""
    torch = importlib.import_module("torch")
    program = importlib.import_module(f"ports.{kind}_torch")
    networks = program.build()
    for network, weights in zip(networks, start, strict=True):
        network.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    with drawing_what_we_draw(torch):
        return trained(program, networks)


def built(program: Any) -> Any:
    """The program's networks, the same at each call."""
    mt.seed(0)
    return program.build()


# Rounding grows from step to step where BatchNorm divides by small deviations, and with a loss near zero. How much depends on
# the processor: it rounds convolutions in its own way.
ROUNDING = {"segmentation": 3e-4, "reinforce": 1e-4}


@pytest.mark.one_in(9)
@pytest.mark.parametrize("kind", KINDS)
def test_a_translation_gives_what_torch_gives(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 losses, and the evaluation after them, of the plain loop and of the compiled step."""
    here = importlib.import_module(f"ports.{kind}")
    start = [{name: np.array(a) for name, a in network.state_dict().items()} for network in built(here)]
    losses, after = says(trained_by_torch, kind, start)
    assert len(losses) == 20 and np.isfinite(losses).all()

    compiled = here.train_step
    before = compiled.num_compiles
    for step in (compiled, compiled.__wrapped__):
        monkeypatch.setattr(here, "train_step", step)
        our_losses, our_after = trained(here, built(here))
        assert_allclose(our_losses, losses, rtol=ROUNDING.get(kind, 1e-5))
        assert_allclose(our_after, after, rtol=1e-3, atol=1e-4)
    assert compiled.num_compiles == before + 1


@pytest.mark.one_in(9)
@pytest.mark.parametrize("kind", ["vae", "maml"])
def test_the_steps_as_one_call(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The 20 steps by `mt.scan`, with its own random numbers in each step."""
    here = importlib.import_module(f"ports.{kind}")
    networks = built(here)
    losses, _ = says(trained_by_torch, kind, [{name: np.array(a) for name, a in networks[0].state_dict().items()}])

    train_step, calls = here.train_step, []
    monkeypatch.setattr(here, "train_step", lambda *args: calls.append(args))
    trained(here, networks)
    (model, opt, *_), stacked = calls[0], [np.stack(part) for part in zip(*(call[2:] for call in calls), strict=True)]
    model.train()
    mt.seed(1)
    assert_allclose(mt.scan(lambda *batch: train_step(model, opt, *batch), *stacked), losses, rtol=1e-4)


def length(path: Path) -> int:
    """The number of lines, but for imports, empty ones and the docstring."""
    text = re.sub(r'\A""".*?"""', "", path.read_text(), flags=re.S)
    return sum(bool(line.strip()) and not re.match("import|from", line) for line in text.splitlines())


def test_the_translations_are_as_short() -> None:
    names = {path.stem for path in FOLDER.glob("*.py")} - {"data"}
    assert names == {f"{kind}{end}" for kind in KINDS for end in ("", "_torch")}
    longer = {kind for kind in KINDS if length(FOLDER / f"{kind}.py") > length(FOLDER / f"{kind}_torch.py")}
    assert longer == {"reinforce"}, "docs/migrating.md says which are longer"


def test_the_page_shows_the_programs() -> None:
    """Each block is a part of a program that runs above, and the table has each pair."""
    page = (FOLDER.parents[1] / "docs" / "migrating.md").read_text()
    section = page.split("\n## Ten programs")[1].split("\n## ")[0]
    programs = [re.sub("^ +", "", path.read_text(), flags=re.M) for path in FOLDER.glob("*.py")]
    shown = re.findall(r"^```python\n(.*?)^```$", section, flags=re.S | re.M)
    assert len(shown) == 5
    for block in shown:
        parts = re.split(r"\n\n\n", re.sub("^ +", "", block, flags=re.M))
        assert all(any(part in program for program in programs) for part in parts), block
    linked = re.findall(r"\]\(\.\./tests/ports/(\w+)\.py\)", section)
    assert linked == [f"{kind}{end}" for kind in KINDS for end in ("_torch", "")]
