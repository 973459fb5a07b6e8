"""Compute a convolution in the form that is fastest on CPUs for its shape.

XLA on CPUs computes a 1x1 convolution, one of many groups, one over three axes and their weight gradients 5 to 90 times
slower than an equal formula. Where its own is the fastest, it is so with channels last. A convolution, its input gradient
and its weight gradient are all convolutions for JAX, so one function chooses for the three (`form_of`). The choice is made
when JAX lowers a program to a CPU: traces, derivatives and `jax.vmap` see one operation, and GPUs and TPUs get the plain one.

Letters: B batch, F features, I features of a group, O output features, S the axes of the image, K those of the kernel. The
weight gradient of (N, C) images is the convolution with B = C, F = N and the output's gradient as its (large) kernel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...runtime.jax_private import computed_once, twin_of
from ...runtime.platforms import takes_plain

Axes = tuple[int, ...]


class Shape(NamedTuple):
    """What is known of a convolution before it is computed: sizes, and the settings of `lax.conv_general_dilated`."""

    batch: Any  # B, which may be symbolic
    outs: int  # O, of all groups
    group: int  # I
    image: Axes  # S, before the padding
    kernel: Axes
    positions: Axes  # of the kernel on the image: the output's axes
    stride: Axes
    pads: tuple[tuple[int, int], ...]
    spread: Axes  # the distance between the image's elements
    dilation: Axes  # the distance between the kernel's elements
    groups: int  # of the features
    batches: int  # groups of the batch. Each has its own output features
    is_weight_gradient: bool  # features lie before the batch in memory


Form = Callable[[Shape, jax.Array, jax.Array], jax.Array]

# -- the choice --------------------------------------------------------------------------------------------------------

_FEW = 4  # a product of so few channels is slower than a sum (and XLA computes some of them wrongly, see xla_faults.py)
_MANY_POSITIONS = 256  # from here on, one product for each image is faster than one for the batch
_TAPS = 64  # the most terms of a sum that are written out
_WIDE = 32  # features of a group from which it is best left alone
_GROUPS = 8  # the most groups that are computed one by one: each is an operation to compile


def form_of(s: Shape) -> Form:
    """Return the form for a convolution.

    Milliseconds by the clock of the form / of XLA's own with channels last, which uses all cores (`xla_faults.py`): 8 images
    (in three dimensions 2), float32, two cores, jaxlib 0.10.2.

        1x1, 64 to 256 channels, 32x32       2.1 / 3.9      weight gradient   2.3 / 4.8
        5x5, 1 to 6 channels, 28x28          0.27 / 1.7 (32 images)
        3x3, 3 to 64 channels, 32x32         0.50 / 0.69    stride 2          0.27 / 0.35 (16 images, to 32 channels)
        depthwise 3x3, 64 channels, 32x32    0.28 / 18      weight gradient   1.5 / 4.6
        transposed 4x4, 128 to 64, 16x16                    weight gradient   4.1 / 180
        3x3x3, 16 channels, 16x16x16         1.7 / 7.8      weight gradient   1.5 / 17
    """
    taps, positions = math.prod(s.kernel), math.prod(s.positions)
    if s.batches == 1 and s.group * taps <= _TAPS:
        if s.groups > 1 and (s.group == 1 or s.outs == s.groups):
            return shifted
        if s.group * taps <= _FEW and s.outs <= _FEW * s.groups:
            return shifted
        if taps > 1 and s.groups == 1 and s.outs > _FEW and all(n == 1 for n in s.spread):
            return shifted if all(n == 1 for n in s.stride) else columns
    if s.batches == 1 and taps == 1 and (s.groups > 1 or all(n == 1 for n in (*s.stride, *s.spread))):
        return pointwise
    if 1 < s.groups <= _GROUPS:
        return divided
    if s.groups > _GROUPS and s.batches == 1 and s.groups // _fewer(s) <= _WIDE:
        return merged
    if s.is_weight_gradient and fits_turned(s) and any(n > 1 for n in s.spread) and all(n == 1 for n in s.dilation):
        return turned
    if fits_planes(s) and min(s.kernel[0], s.positions[0]) <= _TAPS:
        return planes
    if s.is_weight_gradient and fits_positions(s) and positions <= _TAPS:
        if s.batches > 1 and s.batch == s.batches:
            return correlated
        if positions > 1 and 1 < s.batches <= _GROUPS:
            return divided
        if positions == 1 or s.batches > 1:
            return products
    return channels_last


def fits_taps(s: Shape) -> bool:
    """True if `shifted` can compute it. Also `merged`, and without groups `columns`."""
    return s.batches == 1


def fits_pointwise(s: Shape) -> bool:
    """True if `pointwise` can compute it."""
    return s.batches == 1 and math.prod(s.kernel) == 1


def fits_positions(s: Shape) -> bool:
    """True if `products` can compute it. Also `correlated`, with one image in each group."""
    return s.groups == 1 and all(n == 1 for n in s.spread)


def fits_planes(s: Shape) -> bool:
    """True if `planes` can compute it."""
    return s.batches == 1 and len(s.kernel) > 2


def fits_turned(s: Shape) -> bool:
    """True if `turned` can compute it."""
    return s.groups == 1


# -- XLA's own: x (B, F, *S), w (O, I, *K) -> (B, O, *positions) -------------------------------------------------------


def channels_last(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """XLA's own convolution, in the layout of its library: channels last, and a kernel of (*K, I, O).

    XLA drops the transposes between layers that compute so. Outside of loops it turns arrays into this layout by itself; in a
    loop, a convolution in another one takes 50 times as long.
    """
    last, first = (0, *range(2, x.ndim), 1), (0, x.ndim - 1, *range(1, x.ndim - 1))
    of_kernel = (*range(2, x.ndim), 1, 0)
    names = lax.ConvDimensionNumbers(first, (x.ndim - 1, x.ndim - 2, *range(x.ndim - 2)), first)
    settings = s.stride, s.pads, s.spread, s.dilation, names, s.groups, s.batches
    return lax.conv_general_dilated(x.transpose(last), w.transpose(of_kernel), *settings).transpose(first)


# -- forms for small kernels: x (B, F, *S), w (O, I, *K) -> (B, O, *positions) -----------------------------------------


def pointwise(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """A kernel of one element: a product of matrices for each image."""
    late = all(n == 1 for n in s.stride)  # zeros are set in after the product
    x = x if late else _at(s, _padded(s, x), (0,) * len(s.kernel))
    n, axes = x.shape[0], x.shape[2:]
    per, size = s.outs // s.groups, math.prod(axes)
    if s.groups > 1:
        w, x = w.reshape(s.groups, per, s.group), x.reshape(n, s.groups, s.group, size)
        y = lax.dot_general(jnp.broadcast_to(w, (n, *w.shape)), x, (((3,), (2,)), ((0, 1), (0, 1))))
    else:
        w, x = w.reshape(s.outs, s.group), x.reshape(n, s.group, size)
        if size < _MANY_POSITIONS:
            y = lax.dot_general(w, x, (((1,), (1,)), ((), ()))).swapaxes(0, 1)
        else:
            y = lax.dot_general(jnp.broadcast_to(w, (n, *w.shape)), x, (((2,), (1,)), ((0,), (0,))))
    y = y.reshape(n, s.outs, *axes)
    return _padded(s, y) if late else y


def shifted(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """A sum over the kernel's elements, each times a shifted image. Each reader would compute it again."""
    return computed_once(partial(_shifted, s), x, w)


def _shifted(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    x, ones = _padded(s, x), (1,) * len(s.kernel)
    w = w.reshape(s.groups, s.outs // s.groups, s.group, *s.kernel)
    y: Any = None
    for tap in _indices(s.kernel):
        part = _at(s, x, tap)
        part = part.reshape(part.shape[0], s.groups, s.group, 1, *s.positions)
        for i in range(s.group):
            term = part[:, :, i] * w[:, :, i, *tap].reshape(1, *w.shape[:2], *ones)
            y = term if y is None else y + term
    return y.reshape(y.shape[0], s.outs, *s.positions)


def columns(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """Without groups: a product with the image under each element of the kernel, all in one array (im2col)."""
    x = _padded(s, x)
    under = jnp.concatenate([jnp.moveaxis(_at(s, x, tap), 1, -1) for tap in _indices(s.kernel)], -1)
    return jnp.moveaxis(under @ jnp.moveaxis(w, 1, -1).reshape(s.outs, -1).T, -1, 1)


# -- forms for few positions, as in weight gradients: x (F, B, *S), w (I, O, *K) -> (B, O, *positions) -----------------


def products(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """A product of matrices for each position of the kernel."""
    n, size, each = x.shape[0], math.prod(s.kernel), s.batch // s.batches
    x, w = _padded(s, x), w.reshape(n, s.batches, -1, size)
    parts = []
    for position in _indices(s.positions):
        part = _under(s, x, position).reshape(n, s.batches, each, size)
        if size < _MANY_POSITIONS:
            y = lax.dot_general(part, w, (((0, 3), (0, 3)), ((1,), (1,))))
        else:
            y = lax.dot_general(part, w, (((3,), (3,)), ((0, 1), (0, 1)))).sum(0)
        parts.append(y)  # (groups, B / groups, O / groups)
    return jnp.stack(parts, -1).swapaxes(0, 1).reshape(each, s.outs, *s.positions)


def correlated(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """For groups of one image (depthwise): the sum of the products of elements, for each position of the kernel.

    XLA's own sum of many numbers is slow. Sums of four rows and a product with ones are fast.
    """
    return computed_once(partial(_correlated, s), x, w)


def _correlated(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    n, rows, size = x.shape[0], s.kernel[0], math.prod(s.kernel)
    blocks = math.gcd(rows, 4)
    x, w = _padded(s, x), w.reshape(n, s.batches, -1, blocks, size // blocks)
    parts = []
    for position in _indices(s.positions):
        part = _under(s, x, position).reshape(n, s.batches, 1, blocks, size // blocks) * w
        summed: Any = part.sum(3) if blocks == 1 else sum(part[:, :, :, i] for i in range(blocks))
        parts.append((summed @ jnp.ones(size // blocks, part.dtype)).sum(0).reshape(s.outs))
    return jnp.stack(parts, -1).reshape(1, s.outs, *s.positions)


# -- forms that another form completes: x (B, F, *S), w (O, I, *K) -> (B, O, *positions) -------------------------------


def divided(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """Each group by itself, in the form for its shape."""
    count = s.groups * s.batches
    each = s._replace(batch=x.shape[0] // s.batches, outs=s.outs // count, groups=1, batches=1)
    parts = zip(jnp.split(x, count, int(s.groups > 1)), jnp.split(w, count, 0), strict=True)
    return jnp.concatenate([_computed(each, one, its) for one, its in parts], 1)


def merged(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """Some groups as one, where the kernel has zeros for the features of another group.

    XLA takes the longer, the more groups there are.
    """
    count = _fewer(s)
    many, ones = s.groups // count, [1] * len(s.kernel)
    w = w.reshape(count, many, -1, 1, s.group, *s.kernel)
    mine = jnp.eye(many, dtype=bool).reshape(1, many, 1, many, 1, *ones)
    w = jnp.where(mine, w, jnp.zeros((), w.dtype)).reshape(s.outs, many * s.group, *s.kernel)
    return _computed(s._replace(group=many * s.group, groups=count), x, w)


def _fewer(s: Shape) -> int:
    """Return the number of groups that `merged` computes: as many as are wide enough."""
    return max(n for n in range(1, _GROUPS + 1) if s.groups % n == 0 and (n == 1 or s.groups // n * s.group >= _WIDE))


def planes(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """A convolution over all axes but the first. Of the first, the positions are images, and the kernel's elements features.

    XLA takes three to eleven times as long over three axes (`form_of`). The image is copied for each element of the kernel
    on the first axis.
    """
    pads, spread = [(0, 0)] * len(s.kernel), [1] * len(s.kernel)
    pads[0], spread[0] = s.pads[0], s.spread[0]
    x = _padded(s._replace(pads=tuple(pads), spread=tuple(spread)), x)
    n, features, _, *image = x.shape
    taps, count, (step, apart) = s.kernel[0], s.positions[0], (s.stride[0], s.dilation[0])

    def rows(start: int, size: int, step: int) -> jax.Array:
        return lax.slice_in_dim(x, start, start + (size - 1) * step + 1, step, 2)

    if taps <= count:  # as few slices as can be: weight gradients have large kernels
        x = jnp.stack([rows(i * apart, count, step) for i in range(taps)], 2)
    else:
        x = jnp.stack([rows(i * step, taps, apart) for i in range(count)], 3)
    x = jnp.moveaxis(x, 3, 1).reshape(n * count, features * taps, *image)
    w = w.reshape(s.outs, s.group * taps, *s.kernel[1:])
    rest = s._replace(
        batch=n * count,
        group=s.group * taps,
        image=tuple(image),
        kernel=s.kernel[1:],
        positions=s.positions[1:],
        stride=s.stride[1:],
        pads=s.pads[1:],
        spread=s.spread[1:],
        dilation=s.dilation[1:],
    )
    return _computed(rest, x, w).reshape(n, count, s.outs, *rest.positions).swapaxes(1, 2)


def turned(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    """Without groups: the convolution of the kernel with the image, whose positions lie in the opposite order.

    A distance between the image's elements becomes one between the kernel's, which the forms for few positions can compute.
    """
    pads = []
    for size, k, count, step, (low, _), between, apart in zip(
        s.image, s.kernel, s.positions, s.stride, s.pads, s.spread, s.dilation, strict=True
    ):
        pads.append((step * (count - 1) - low, between * (size - 1) - apart * (k - 1) + low))
    swapped = s._replace(
        batch=s.outs,
        outs=x.shape[0],
        image=s.kernel,
        kernel=s.image,
        pads=tuple(pads),
        spread=s.dilation,
        dilation=s.spread,
    )
    y = _computed(swapped, w, x)  # (O / batches, B, *positions)
    y = y.reshape(s.outs // s.batches, s.batches, -1, *s.positions).swapaxes(0, 2)
    return lax.rev(y.reshape(-1, s.outs, *s.positions), range(2, 2 + len(s.positions)))


def _computed(s: Shape, x: jax.Array, w: jax.Array) -> jax.Array:
    form = form_of(s)
    if form in (products, correlated):
        x, w = x.swapaxes(0, 1), w.swapaxes(0, 1)
    return form(s, x, w)


def _indices(sizes: Sequence[int]) -> Iterator[Axes]:
    return itertools.product(*map(range, sizes))


def _padded(s: Shape, x: jax.Array) -> jax.Array:
    pads = [(*pad, n - 1) for pad, n in zip(s.pads, s.spread, strict=True)]
    if all(pad == (0, 0, 0) for pad in pads):
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * 2 + pads)


def _at(s: Shape, x: jax.Array, tap: Axes) -> jax.Array:
    """What one element of the kernel meets: an element for each position."""
    starts = [i * d for i, d in zip(tap, s.dilation, strict=True)]
    return _every(x, starts, s.positions, s.stride)


def _under(s: Shape, x: jax.Array, position: Axes) -> jax.Array:
    """What the kernel meets at one position: an element for each of its own."""
    starts = [i * n for i, n in zip(position, s.stride, strict=True)]
    return _every(x, starts, s.kernel, s.dilation)


def _every(x: jax.Array, starts: Sequence[int], counts: Sequence[int], steps: Sequence[int]) -> jax.Array:
    ends = [start + (count - 1) * step + 1 for start, count, step in zip(starts, counts, steps, strict=True)]
    return lax.slice(x, (0, 0, *starts), (*x.shape[:2], *ends), (1, 1, *steps))


# -- the operation -----------------------------------------------------------------------------------------------------


def _on_cpu(lhs: jax.Array, rhs: jax.Array, **settings: Any) -> jax.Array:
    s = _shape_of(lhs.shape, rhs.shape, **settings)
    if s is None or not jnp.issubdtype(lhs.dtype, jnp.floating):
        return lax.conv_general_dilated_p.bind(lhs, rhs, **settings)
    dtype = lhs.dtype
    if dtype.itemsize < 4 and form_of(s) is not channels_last:  # sums are in float32, as in XLA's own
        lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    of_lhs, of_rhs, of_out = settings["dimension_numbers"]
    y = _computed(s, lhs.transpose(of_lhs), rhs.transpose(of_rhs))
    return y.transpose([of_out.index(i) for i in range(y.ndim)]).astype(dtype)


def _shape_of(lhs: Sequence[Any], rhs: Sequence[Any], **settings: Any) -> Shape | None:
    """Return the sizes by their meaning. None if one that counts is not known, or the convolution is empty."""
    of_lhs, of_rhs, _ = settings["dimension_numbers"]
    (batch, features, *image), (outs, group, *kernel) = [lhs[i] for i in of_lhs], [rhs[i] for i in of_rhs]
    stride, spread, dilation = settings["window_strides"], settings["lhs_dilation"], settings["rhs_dilation"]
    batches = settings["batch_group_count"]
    numbers = [features, outs, group, *image, *kernel, *([] if batches == 1 else [batch])]
    if not all(isinstance(n, int) and n > 0 for n in numbers) or settings["preferred_element_type"] is not None:
        return None
    positions = []
    for n, k, step, between, apart, pad in zip(
        image, kernel, stride, spread, dilation, settings["padding"], strict=True
    ):
        positions.append(((n - 1) * between + 1 + sum(pad) - (k - 1) * apart - 1) // step + 1)
    if not positions or min(positions) < 1 or (isinstance(batch, int) and batch < 1):
        return None
    return Shape(
        batch,
        outs,
        group,
        tuple(image),
        tuple(kernel),
        tuple(positions),
        tuple(stride),
        tuple(map(tuple, settings["padding"])),
        tuple(spread),
        tuple(dilation),
        settings["feature_group_count"],
        batches,
        isinstance(batch, int) and of_lhs[0] > of_lhs[1],
    )


_SETTINGS = (
    *("window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers"),
    *("feature_group_count", "batch_group_count", "precision", "preferred_element_type"),
)
_config: Any = jax.config
_twin = twin_of(lax.conv_general_dilated_p, _on_cpu)


def convolution(
    x: jax.Array,
    weight: jax.Array,
    stride: Sequence[int],
    pads: Sequence[tuple[int, int]],
    spread: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> jax.Array:
    """`lax.conv_general_dilated` of (N, C, ...) images and an (O, C / groups, ...) weight, on CPUs in the form for its shape.

    Where JAX places arrays by their types (meshes with Explicit or Manual axes) and where the user asks for a precision of
    products, it is JAX's own.
    """
    plain = takes_plain() or _config.jax_default_matmul_precision is not None or jax.default_backend() != "cpu"
    if plain or _twin is None or not _is_automatic(x) or not _is_automatic(weight):
        return lax.conv_general_dilated(x, weight, stride, pads, spread, dilation, feature_group_count=groups)
    return _twin(
        x,
        weight,
        window_strides=tuple(stride),
        padding=tuple(map(tuple, pads)),
        lhs_dilation=tuple(spread),
        rhs_dilation=tuple(dilation),
        dimension_numbers=lax.conv_dimension_numbers(x.shape, weight.shape, None),
        feature_group_count=groups,
        batch_group_count=1,
        precision=None,
        preferred_element_type=None,
        **_newer_settings(),
    )


@cache
def _newer_settings() -> dict[str, Any]:
    """Return the settings that this JAX has besides those that are known here, with their defaults."""
    x = jax.ShapeDtypeStruct((1, 1, 1), jnp.float32)
    (eqn,) = jax.make_jaxpr(lambda x, w: lax.conv_general_dilated(x, w, (1,), [(0, 0)]))(x, x).eqns
    return {name: value for name, value in eqn.params.items() if name not in _SETTINGS}


def _is_automatic(x: jax.Array) -> bool:
    meshes = jax.sharding.get_abstract_mesh(), jax.typeof(x).sharding.mesh
    return all(mesh.empty or set(mesh.axis_types) == {jax.sharding.AxisType.Auto} for mesh in meshes)
