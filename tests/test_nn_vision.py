"""Layers and functions that rearrange, resize or sample images, against torch's."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from layer_contract import Case, LayerContract, Refusal, close, compare_arguments, integers, numbers
from oracle import torch

from minitorch_jax import nn

F = nn.functional

LINE, IMAGE, VOLUME = (numbers(2, 2, 5),), (numbers(2, 2, 4, 5),), (numbers(1, 2, 3, 2, 4),)
GRID = np.float32(1.3) * np.tanh(numbers(2, 3, 4, 2, seed=1))  # some places lie outside
FLOW = np.float32(1.3) * np.tanh(numbers(1, 2, 3, 2, 3, seed=1))


def resized(inputs, *args, **kwargs):
    return Case("interpolate", args, kwargs, inputs=inputs)


def sampled(mode, padding_mode, align_corners, inputs=(*IMAGE, GRID)):
    return Case("grid_sample", (mode, padding_mode, align_corners), inputs=inputs)


CASES = [
    Case("PixelShuffle", (2,), inputs=(numbers(2, 8, 2, 3),)),
    Case("PixelShuffle", (3,), inputs=(numbers(9, 1, 2),)),
    Case("PixelShuffle", (2,), inputs=(numbers(1, 2, 4, 2, 2),)),
    Case("PixelUnshuffle", (2,), inputs=(numbers(2, 2, 4, 6),)),
    Case("PixelUnshuffle", (3,), inputs=(numbers(2, 3, 6),)),
    Case("ChannelShuffle", (2,), inputs=(numbers(2, 6, 3),)),
    Case("ChannelShuffle", (3,), inputs=(numbers(1, 6, 2, 3),)),
    Case("Upsample", (7,), inputs=LINE),
    Case("Upsample", ((3, 7),), inputs=IMAGE),
    Case("Upsample", (), {"scale_factor": (2, 1.5), "mode": "bilinear"}, inputs=IMAGE),
    Case("Upsample", (None, 1.7, "bicubic", True, True), inputs=IMAGE),
    Case("Upsample", (None, 2, "trilinear"), inputs=VOLUME),
    Case("UpsamplingNearest2d", ((8, 5),), inputs=IMAGE),
    Case("UpsamplingNearest2d", (None, 3), inputs=IMAGE),
    Case("UpsamplingBilinear2d", (6,), inputs=IMAGE),
    Case("UpsamplingBilinear2d", (None, (2.0, 3.0)), inputs=IMAGE),
    Case("Unfold", (2,), inputs=IMAGE),
    Case("Unfold", ((2, 3), (1, 2), (1, 2), (2, 1)), inputs=(numbers(2, 4, 5),)),
    Case("Fold", ((4, 5), 2), inputs=(numbers(2, 8, 12),)),
    Case("Fold", ((4, 5), (2, 3), (1, 2), (1, 2), (2, 1)), inputs=(numbers(12, 15),)),
    Case("unfold", (2, 1, 1, 2), inputs=IMAGE),
    Case("fold", (4, 2), {"stride": 2}, inputs=(numbers(1, 4, 4),)),
    Case("pixel_shuffle", (2,), inputs=(numbers(4, 1, 2),)),
    Case("pixel_unshuffle", (2,), inputs=(numbers(1, 2, 2),)),
    Case("channel_shuffle", (2,), inputs=(numbers(1, 4, 2),)),
    *(resized(inputs, size) for inputs, size in ((LINE, 3), (IMAGE, (9, 10)), (VOLUME, (5, 2, 6)))),
    *(resized(LINE, None, factor, mode) for factor in (0.3, 1.9, 2) for mode in ("nearest", "nearest-exact")),
    resized(IMAGE, None, (0.7, 2.6), "nearest-exact", recompute_scale_factor=True),
    resized(LINE, 3, mode="area"),
    resized(IMAGE, None, 0.6, "area"),
    *(resized(LINE, size, None, "linear", align) for size in (1, 3, 9) for align in (False, True)),
    *(resized(IMAGE, (3, 9), None, mode, align) for mode in ("bilinear", "bicubic") for align in (False, True)),
    *(
        resized(IMAGE, None, (0.7, 1.9), mode, False, again)
        for mode in ("bilinear", "bicubic")
        for again in (None, True)
    ),
    resized(IMAGE, (4, 5), None, "bicubic"),
    resized(VOLUME, (2, 5, 4), None, "trilinear", True),
    *(
        resized((numbers(1, 2, 9, 7),), (4, 9), None, mode, align, antialias=True)
        for mode, align in (("bilinear", False), ("bilinear", True), ("bicubic", False), ("lanczos", False))
    ),
    resized((numbers(1, 1, 9, 7),), None, (0.4, 0.7), "bicubic", antialias=True),
    *(sampled("bilinear", padding, align) for padding in ("zeros", "border", "reflection") for align in (False, True)),
    sampled("bicubic", "zeros", False),
    sampled("bicubic", "border", True),
    sampled("bicubic", "reflection", False),
    sampled("nearest", "zeros", False),
    sampled("nearest", "reflection", True),
    *(
        sampled(mode, padding, align, (*VOLUME, FLOW))
        for mode, padding, align in (
            ("bilinear", "zeros", False),
            ("bilinear", "reflection", False),
            ("nearest", "border", True),
        )
    ),
    sampled("bilinear", "reflection", True, (numbers(2, 2, 1, 5), GRID)),
    Case("affine_grid", ((2, 1, 3, 4), False), inputs=(numbers(2, 2, 3),)),
    Case("affine_grid", ((2, 1, 3, 4), True), inputs=(numbers(2, 2, 3),)),
    Case("affine_grid", ((1, 1, 2, 1, 3), False), inputs=(numbers(1, 3, 4),)),
]

REFUSALS = [
    Refusal("PixelShuffle", (2,), inputs=(numbers(1, 6, 2, 2),), match="C r\\^2"),
    Refusal("PixelShuffle", (0,), inputs=(numbers(1, 4, 2, 2),), match="positive upscale_factor"),
    Refusal("PixelUnshuffle", (2,), inputs=(numbers(1, 4, 3, 2),), match="H r, W r"),
    Refusal("ChannelShuffle", (4,), inputs=(numbers(1, 6, 2),), match="divide C"),
    Refusal("ChannelShuffle", (2,), inputs=(numbers(1, 6),), match="at least 3 dimensions"),
    Refusal("Unfold", (5,), inputs=IMAGE, match="does not fit an image"),
    Refusal("Unfold", (2,), inputs=(numbers(4, 5),), match=r"\(N, C, H, W\) or \(C, H, W\)"),
    Refusal("Unfold", ((1, 2, 3),), inputs=IMAGE, match="integer or a tuple of 2"),
    Refusal("Unfold", (2, 0), inputs=IMAGE, match="dilation must be at least 1"),
    Refusal("Fold", ((4, 5), 2), inputs=(numbers(2, 8, 11),), match="fold takes an input"),
    Refusal("Fold", ((4, 5), 2), inputs=(numbers(2, 7, 12),), match="fold takes an input"),
    Refusal("Fold", ((4, 5), 6), inputs=(numbers(2, 36, 1),), match="does not fit an image"),
    Refusal("fold", (2, 2), inputs=(integers(3, 1, 4, 1),), match="floating input", torch_too=False),
    Refusal("Upsample", inputs=IMAGE, match="either size or scale_factor"),
    Refusal("interpolate", (3, 2.0), inputs=IMAGE, match="either size or scale_factor"),
    Refusal("interpolate", (3,), {"mode": "cubic"}, inputs=IMAGE, match="mode must be one of"),
    Refusal("interpolate", (3,), {"mode": "linear"}, inputs=IMAGE, match="axes after N and C"),
    Refusal("interpolate", (3,), inputs=(numbers(2, 3),), match="axes after N and C"),
    Refusal("interpolate", (3,), {"align_corners": True}, inputs=IMAGE, match="for the linear and cubic modes"),
    Refusal("interpolate", (3,), {"antialias": True}, inputs=IMAGE, match="antialias is for"),
    Refusal("interpolate", (3,), {"mode": "lanczos"}, inputs=IMAGE, match="needs antialias=True"),
    Refusal("interpolate", (3,), {"recompute_scale_factor": True}, inputs=IMAGE, match="needs scale_factor; got size"),
    Refusal("interpolate", ((3, 4, 5),), inputs=IMAGE, match="integer or a tuple of 2"),
    Refusal("interpolate", (None, (1.0, 2.0, 3.0)), inputs=IMAGE, match="positive number, or 2"),
    Refusal("interpolate", (None, 0.1), inputs=IMAGE, match="needs positive sizes"),
    Refusal("interpolate", (0,), inputs=IMAGE, match="size must be at least 1"),
    Refusal(
        "interpolate", (3,), {"mode": "bilinear"}, inputs=(integers(3, 1, 1, 2, 2),), match="floating", torch_too=False
    ),
    Refusal("grid_sample", ("linear",), inputs=(*IMAGE, GRID), match="mode must be"),
    Refusal("grid_sample", ("nearest", "wrap"), inputs=(*IMAGE, GRID), match="padding_mode must be"),
    Refusal("grid_sample", ("bicubic",), inputs=(*VOLUME, FLOW), match="except for 'bicubic'"),
    Refusal("grid_sample", inputs=(*IMAGE, GRID[:1]), match=r"\(2, H', W', 2\)"),
    Refusal("grid_sample", inputs=(*IMAGE, GRID[..., :1]), match=r"\(2, H', W', 2\)"),
    Refusal("grid_sample", inputs=(*IMAGE, GRID.astype(np.float16)), match="input's dtype float32; got float16"),
    Refusal("grid_sample", inputs=(numbers(2, 1, 0, 3), GRID), match="not empty"),
    Refusal("affine_grid", ((2, 1, 3),), inputs=(numbers(2, 2, 3),), match="takes a size"),
    Refusal("affine_grid", ((3, 1, 3, 3),), inputs=(numbers(2, 2, 3),), match=r"shape \(3, 2, 3\)"),
    Refusal("affine_grid", ((2, 1, 0, 3),), inputs=(numbers(2, 2, 3),), match="positive"),
    Refusal("affine_grid", ((2, 1, 3, 3),), inputs=(integers(3, 2, 2, 3),), match="floating"),
]


class TestLayers(LayerContract):
    pass


def test_shuffles_take_torchs_arguments():
    """torch's own are written in C, without a signature."""
    for name, argument in (("pixel_shuffle", "upscale_factor"), ("pixel_unshuffle", "downscale_factor")):
        assert list(inspect.signature(getattr(F, name)).parameters) == ["input", argument]
    compare_arguments(F.channel_shuffle, lambda input, groups: None)


@pytest.mark.slow
def test_nearest_neighbours_of_integers_and_of_any_factor_are_torchs():
    for n in (1, 3, 7):
        x = np.arange(n, dtype=np.uint8).reshape(1, 1, n)
        for factor in np.arange(0.35, 4, 0.05):
            for mode in ("nearest", "nearest-exact") if n * factor >= 1 else ():
                got = F.interpolate(jnp.asarray(x), scale_factor=float(factor), mode=mode)
                expected = torch.nn.functional.interpolate(torch.from_numpy(x), scale_factor=float(factor), mode=mode)
                np.testing.assert_array_equal(got, expected.numpy(), err_msg=f"{n} x {factor}, {mode}")


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest"])
def test_half_precision_is_computed_in_float32(mode):
    x, grid = jnp.asarray(IMAGE[0], jnp.bfloat16), jnp.asarray(GRID, jnp.bfloat16)
    for function in (lambda x, g: F.interpolate(x, (7, 3), mode=mode), lambda x, g: F.grid_sample(x, g, mode)):
        got = function(x, grid)
        assert got.dtype == jnp.bfloat16
        exact = function(x.astype(jnp.float32), grid.astype(jnp.float32))
        np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


@pytest.mark.slow
def test_a_place_that_is_nan_or_infinite_gives_no_nan_gradient():
    grid = jnp.array([[[[jnp.nan, 0.0], [jnp.inf, 0.0], [0.1, -jnp.inf]]]])
    for padding_mode in ("zeros", "border"):
        gradient = jax.grad(lambda x, p=padding_mode: F.grid_sample(x, grid, "bilinear", p).sum())(
            jnp.ones((1, 1, 3, 3))
        )
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("padding_mode", ["border", "reflection"])
def test_the_edge_itself_has_torchs_gradient(padding_mode):
    theta = np.float32([[[1, 0, 0], [0, 1, 0]]])
    x = numbers(1, 2, 3, 4)
    there = torch.nn.functional.affine_grid(torch.from_numpy(theta), (1, 2, 3, 4), align_corners=True)
    there.requires_grad_(True)
    torch.nn.functional.grid_sample(torch.from_numpy(x), there, "bilinear", padding_mode, True).sum().backward()
    loss = lambda grid: F.grid_sample(jnp.asarray(x), grid, "bilinear", padding_mode, True).sum()
    close(jax.grad(loss)(jnp.asarray(there.detach().numpy())), there.grad.numpy(), CASES[0], "gradient of the grid")


@pytest.mark.slow
def test_functions_run_under_vmap():
    images, grids = jnp.asarray(numbers(3, 1, 2, 4, 5)), jnp.asarray(numbers(3, 1, 2, 2, 2, seed=1))
    for function in (F.grid_sample, lambda x, g: F.fold(F.unfold(x, 2), (4, 5), 2), lambda x, g: F.interpolate(x, 3)):
        for got, *pair in zip(jax.vmap(function)(images, grids), images, grids, strict=True):
            np.testing.assert_allclose(got, function(*pair), rtol=1e-5, atol=1e-6)
