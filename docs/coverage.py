"""Write docs/coverage.md: the names in torch.nn, its functional, init and utils, and which of them exist here.

    python docs/coverage.py          # writes the page
    python docs/coverage.py --check  # fails if the page is not what it would write

It needs torch: pip install -e ".[oracles]"
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import parametrizations, parametrize

from minitorch_jax import nn

PAGE = Path(__file__).with_name("coverage.md")

# Why something of torch's is left out. What is missing and not named here is listed as not built yet.
REASONS = {
    "Container": "deprecated in torch",
    "CrossMapLRN2d": "a legacy form of LocalResponseNorm",
    "DataParallel": "arrays are sharded instead: `mt.shard(model, mesh)`",
    "NLLLoss2d": "deprecated in torch: NLLLoss",
    "RNNBase": "a base class",
    "RNNCellBase": "a base class",
    "SyncBatchNorm": "BatchNorm: under `jit`, the statistics of a sharded batch are global",
    "UninitializedBuffer": "a lazy layer has no arrays until an input has shown their sizes",
    "UninitializedParameter": "a lazy layer has no arrays until an input has shown their sizes",
    "assert_int_or_pair": "private to torch",
    "boolean_dispatch": "private to torch",
    "clip_grad_norm": "deprecated in torch: `clip_grad_norm_`",
    "grouped_mm": "a product for CUDA; `jax.lax.ragged_dot`",
    "conv_tbc": "`conv1d`, with time as the last axis",
    "has_torch_function": "private to torch",
    "has_torch_function_unary": "private to torch",
    "has_torch_function_variadic": "private to torch",
    "invert_permutation": "`jnp.argsort`",
    "multi_head_attention_forward": "`MultiheadAttention` itself, or `scaled_dot_product_attention`",
    "native_channel_shuffle": "`channel_shuffle`",
    "scaled_grouped_mm": "a product of float8 for CUDA",
    "scaled_mm": "a product of float8 for CUDA; `jax.nn.scaled_matmul`",
    "skip_init": "`jax.eval_shape(make_model, key)`, a model without memory",
    "upsample": "deprecated in torch: `interpolate`",
    "upsample_bilinear": "deprecated in torch: `interpolate`",
    "upsample_nearest": "deprecated in torch: `interpolate`",
}
PATTERNS: dict[str, Callable[[str], bool]] = {
    "deprecated in torch: `parametrize.remove_parametrizations`": (
        lambda name: name in ("remove_weight_norm", "remove_spectral_norm")
    ),
    "deprecated in torch: the function of `nn.utils.parametrizations`": (
        lambda name: name in ("weight_norm", "spectral_norm")
    ),
    "XLA chooses the layout": lambda name: name.endswith("_memory_format"),
    "in place; arrays are immutable": lambda name: name.endswith("_"),
    "`return_indices=True` of the function without the suffix": lambda name: name.endswith("_with_indices"),
}


def reason(name: str) -> str:
    for why, applies in PATTERNS.items():
        if name not in REASONS and applies(name):
            return why
    return REASONS.get(name, "not built yet")


def layers() -> list[str]:
    """Public classes of torch.nn."""
    return sorted(n for n, v in vars(torch.nn).items() if inspect.isclass(v) and not n.startswith("_"))


def functions() -> list[str]:
    """Public functions of torch.nn.functional."""
    homes = ("torch.nn.functional", "torch._jit_internal")
    return sorted(
        name
        for name, value in vars(torch.nn.functional).items()
        if not name.startswith("_")
        and (inspect.isbuiltin(value) or (inspect.isfunction(value) and value.__module__ in homes))
    )


def initialisers() -> list[str]:
    """Public functions of torch.nn.init, with in-place functions under their own names and without deprecated aliases."""
    names = (n for n, v in vars(torch.nn.init).items() if inspect.isfunction(v) and not n.startswith("_"))
    return sorted(n for n in names if not hasattr(torch.nn.init, f"{n}_") and n != "skip_init")


def utilities(module: Any) -> list[str]:
    """Public functions and classes of torch.nn.utils or torch.nn.utils.rnn."""
    return sorted(n for n in module.__all__ if callable(getattr(module, n)))


def section(title: str, theirs: Iterable[str], ours: Any, has: Callable[[str], bool] | None = None) -> str:
    names = list(theirs)
    here = [name for name in names if (has(name) if has else hasattr(ours, name))]
    missing = [name for name in names if name not in here]
    lines = [f"## {title}", "", f"{len(here)} of {len(names)}.", "", ", ".join(f"`{name}`" for name in here), ""]
    if missing:
        lines += ["| left out | why, or what to use |", "|---|---|"]
        lines += [f"| `{name}` | {reason(name)} |" for name in missing]
        lines.append("")
    return "\n".join(lines)


def page() -> str:
    version = torch.__version__.partition("+")[0]
    head = (
        f"# Coverage of torch.nn\n\n`python docs/coverage.py` wrote this page from torch {version} and this package. A test"
        " fails if the page is out of date.\n"
    )
    parts = [
        section("torch.nn", layers(), nn),
        section("torch.nn.functional", functions(), nn.functional),
        section("torch.nn.init", initialisers(), nn.init),
        section("torch.nn.utils", utilities(torch.nn.utils), nn.utils),
        section("torch.nn.utils.rnn", utilities(torch.nn.utils.rnn), nn.utils.rnn),
        section("torch.nn.utils.parametrize", utilities(parametrize), nn.utils.parametrize),
        section("torch.nn.utils.parametrizations", utilities(parametrizations), nn.utils.parametrizations),
    ]
    return "\n".join([head, *parts])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is out of date")
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit("docs/coverage.md is out of date: python docs/coverage.py")
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
