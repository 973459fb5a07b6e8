"""What to write instead of names of torch that are not here: a table for `__getattr__` of modules, optimizers and packages.

A row is one or more names of torch, and what to write; `{name}` stands for the name. A name that exists here has no row.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

_MODULE = {
    "cuda xpu mtia ipu": '`model.to(jax.devices("gpu")[0])`; JAX puts new arrays on its default device, a GPU if it has one',
    "cpu": '`model.to(jax.devices("cpu")[0])`',
    "type": "`model.astype(dtype)`",
    "device": "`model.parameters()[0].devices()`; a module has no device of its own, `model.to(device)` moves it",
    "is_cuda": "`model.parameters()[0].devices()`",
    "dtype": "`model.parameters()[0].dtype`",
    "requires_grad": "`model.freeze()`, `model.unfreeze()` or `model.requires_grad_(False)`",
    "grad": "`model.grads()`, in the order of `model.parameters()`",
    "backward": "`mt.backward(loss_fn, model, x)`; JAX differentiates `forward`, so no layer writes a `backward`",
    "set_submodule": "an assignment, `model.encoder.head = module`",
    "_forward_hooks _forward_pre_hooks": "`handle.remove()`, of the handle that `register_forward_hook` returned",
    "register_backward_hook register_full_backward_hook register_full_backward_pre_hook": (
        "`mt.grad(loss_fn)(model, x)` or `model.grads()`, which hold the gradients; `jax.custom_vjp` changes them on the way"
    ),
    "register_state_dict_pre_hook register_state_dict_post_hook register_load_state_dict_pre_hook"
    " register_load_state_dict_post_hook": "plain Python on the dict, before `load_state_dict` or after `state_dict`",
    "reset_parameters": "a new layer, or new values: `layer.weight = nn.init.xavier_uniform(key, shape)`",
    "share_memory": "nothing, since arrays never change, so threads may read them while another trains",
    "to_empty": "`jax.eval_shape(make_model, key)`, a model without memory",
    "_parameters _buffers": "`model.state_dict()`, or `named_parameters()` and `named_buffers()`",
    "_modules": "`dict(model.named_children())`",
    "update_parameters": "`averaged.update(model)`",
    "n_averaged": "`averaged.num_averaged`",
    "no_sync": "nothing, since gradients add up over calls of `mt.backward` until `zero_grad()`",
}

_OPTIMIZER = {
    "defaults": "the settings, which are attributes: `opt.lr`",
    "state": "`opt.state_dict()`",
    "params": "`opt.modules`",
    "register_step_pre_hook register_step_post_hook": "the code in the loop, before or after `opt.step()`",
    "register_state_dict_pre_hook register_state_dict_post_hook register_load_state_dict_pre_hook"
    " register_load_state_dict_post_hook": "plain Python on the dict, before `load_state_dict` or after `state_dict`",
}

_SCHEDULERS = {
    "LRScheduler LambdaLR MultiplicativeLR": "a function of the step count: `optim.SGD([model], lr=lambda t: 0.1 / (t + 1))`",
    "StepLR": "`lr=optim.schedules.step(...)`",
    "MultiStepLR": "`lr=optim.schedules.multistep(...)`",
    "ConstantLR": "`lr=optim.schedules.constant(...)`",
    "LinearLR": "`lr=optim.schedules.linear(...)`",
    "ExponentialLR": "`lr=optim.schedules.exponential(...)`",
    "PolynomialLR": "`lr=optim.schedules.polynomial(...)`",
    "CosineAnnealingLR": "`lr=optim.schedules.cosine(...)`",
    "CosineAnnealingWarmRestarts": "`lr=optim.schedules.cosine_restarts(...)`",
    "OneCycleLR CyclicLR": "`lr=optim.schedules.one_cycle(...)`",
    "SequentialLR ChainedScheduler": "`lr=optim.schedules.join(...)`",
    "ReduceLROnPlateau": "`optim.ReduceOnPlateau`",
}

_OPTIM = {
    "lr_scheduler": "a schedule as `lr`: `optim.SGD([model], lr=optim.schedules.cosine(0.1, 1000))`; see `optim.schedules`",
    "swa_utils": "`optim.AveragedModel`",
    "SparseAdam": "`optim.Adam`; gradients are dense",
    "swap_in_optimizer_params_and_state": "`opt.load_state_dict(state)`",
    **_SCHEDULERS,
}

_NN = {
    "UninitializedParameter UninitializedBuffer": (
        "`mt.Parameter` and `mt.Buffer`, of known shape; a lazy layer has no arrays until its first call"
    ),
    "parameter": "`mt.Parameter` and `mt.Buffer`",
    "modules": (
        "`mt.Module` and the layers of `nn`; for hooks of every module, `for module in model.modules():"
        " module.register_forward_hook(hook)`"
    ),
    "DataParallel parallel": "`mt.shard(model, mesh)`, and a batch that lies on the same mesh",
    "SyncBatchNorm": "`nn.BatchNorm2d`: its statistics are those of the whole batch, on one device or many",
    "Container": "`nn.Sequential` or `nn.ModuleList`",
    "NLLLoss2d": "`nn.NLLLoss`",
    "CrossMapLRN2d": "`nn.LocalResponseNorm`",
    "RNNBase RNNCellBase": "`nn.LSTM`, `nn.GRU`, `nn.RNN`, or a subclass of `mt.Module`",
    "quantized qat quantizable intrinsic": "`model.astype(jnp.bfloat16)` for lower precision; there is no quantization",
    "grad": "`mt.grad(loss_fn)(model, x)`",
}

_UTILS = {
    "clip_grad_norm": "`nn.utils.clip_grad_norm_`, or `mt.clip_grad_norm`",
    "weight_norm spectral_norm": "`nn.utils.parametrizations.{name}(module)`",
    "remove_weight_norm remove_spectral_norm": '`nn.utils.parametrize.remove_parametrizations(module, "weight")`',
    "prune": "a `mt.Buffer` of zeros and ones, by which `forward` multiplies the weight",
    "stateless": "`jax.grad` and `jax.vmap` on the module itself, which is a pytree",
    "skip_init": "`jax.eval_shape(make_model, key)`, a model without memory",
    "convert_conv2d_weight_memory_format convert_conv3d_weight_memory_format memory_format": (
        "nothing, since XLA chooses the layout"
    ),
    "init": "`nn.init`",
}

_RNN = {
    "invert_permutation": "`jnp.argsort(permutation)`",
}

_PACKED_SEQUENCE = {
    "cuda cpu to": "`jax.device_put(packed, device)`",
    "float double half long int short char byte": "`packed.astype(dtype)`",
    "is_cuda": "`packed.padded.devices()`",
    "pin_memory is_pinned": "nothing, since JAX moves arrays in the background",
    "count index": "`pad_packed_sequence(packed)`, which returns the padded array and the lengths",
}

_FUNCTIONAL = {
    "upsample upsample_bilinear upsample_nearest": "`F.interpolate(x, scale_factor=2, mode=...)`",
    "multi_head_attention_forward": "`nn.MultiheadAttention` or `F.scaled_dot_product_attention`",
    "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices"
    " adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d_with_indices"
    " fractional_max_pool3d_with_indices": "the function without `_with_indices`, with `return_indices=True`",
    "relu_ elu_ selu_ celu_ leaky_relu_ rrelu_ hardtanh_ threshold_": "the function without `_`: arrays never change",
}

_PACKAGE = {
    # randomness
    "manual_seed": "`mt.seed(0)`",
    "initial_seed get_rng_state set_rng_state random default_generator": (
        "`mt.seed(0)`, `with mt.rng(key):` for a stream of its own; `mt.save` and `mt.load` keep the stream"
    ),
    "Generator": "a key, `jax.random.key(0)`, and `with mt.rng(key):`",
    "rand": "`jax.random.uniform(mt.next_key(), shape)`",
    "randn": "`jax.random.normal(mt.next_key(), shape)`",
    "rand_like": "`jax.random.uniform(mt.next_key(), x.shape)`",
    "randn_like": "`jax.random.normal(mt.next_key(), x.shape)`",
    "normal": "`mean + std * jax.random.normal(mt.next_key(), shape)`",
    "randint": "`jax.random.randint(mt.next_key(), shape, low, high)`",
    "randint_like": "`jax.random.randint(mt.next_key(), x.shape, low, high)`",
    "randperm": "`jax.random.permutation(mt.next_key(), n)`",
    "bernoulli": "`jax.random.bernoulli(mt.next_key(), p, shape)`",
    "poisson": "`jax.random.poisson(mt.next_key(), rate)`",
    "multinomial": "`jax.random.categorical(mt.next_key(), jnp.log(weights), shape=(n,))`, with replacement",
    "distributions": "`jax.random` draws, `jax.scipy.stats` has densities",
    # gradients
    "no_grad inference_mode enable_grad set_grad_enabled is_grad_enabled": (
        "nothing, since only `mt.backward`, `mt.grad` and `mt.value_and_grad` compute gradients, everything else costs none"
    ),
    "func": "`mt.grad` and `mt.value_and_grad` for models; `jax.grad`, `jax.jacrev`, `jax.jvp` for functions",
    "detach": "`jax.lax.stop_gradient(x)` in a loss; elsewhere nothing, since an array carries no graph",
    "vmap": "`jax.vmap`",
    "compile": "`mt.jit(train_step)` for a whole step; `model.compile()`, in place, for evaluation",
    "compiler": "`mt.jit`",
    "checkpoint": "`jax.checkpoint`, which recomputes a function's inner values; a file is `mt.save` and `mt.load`",
    "set_detect_anomaly set_anomaly_enabled is_anomaly_enabled": "`with mt.detect_anomaly():` around the call",
    "amp": "`with mt.autocast(jnp.bfloat16):`, and `mt.LossScaler` for float16",
    "GradScaler": "`mt.LossScaler`",
    # arrays
    "Tensor": "`jax.Array` in annotations; `jnp.array(data)` makes one",
    "FloatTensor HalfTensor BFloat16Tensor DoubleTensor LongTensor IntTensor ShortTensor ByteTensor CharTensor BoolTensor": (
        "`jnp.array(data, dtype)`, with jnp.float32, jnp.int32, …"
    ),
    "tensor as_tensor from_numpy scalar_tensor": "`jnp.array(data)`",
    "is_tensor": "`isinstance(x, jax.Array)`",
    "Size": "a tuple: `x.shape` is one",
    "numel": "`x.size`",
    "clone": "nothing, since arrays never change; `jnp.copy(x)` for memory of its own",
    "is_floating_point": "`jnp.issubdtype(x.dtype, jnp.floating)`",
    "is_complex": "`jnp.iscomplexobj(x)`",
    "float half double long int short cfloat chalf": "the dtype of jnp: jnp.float32, jnp.float16, jnp.int32, …",
    "cat": "`jnp.concatenate(arrays, axis)`",
    "split split_with_sizes": "`jnp.split(x, n, axis)`: n is the number of parts, in torch it is their size",
    "chunk": "`jnp.array_split(x, n, axis)`",
    "unbind": "`[x[i] for i in range(len(x))]`",
    "transpose": "`jnp.swapaxes(x, 0, 1)`: `jnp.transpose(x, axes)` takes the order of all axes, as torch's `permute`",
    "permute": "`jnp.transpose(x, axes)`",
    "t": "`x.T`",
    "movedim": "`jnp.moveaxis`",
    "swapdims": "`jnp.swapaxes`",
    "unsqueeze": "`jnp.expand_dims(x, axis)` or `x[:, None]`",
    "flatten": "`F.flatten(x, 1)`, or `nn.Flatten()`",
    "unflatten": "`x.reshape(...)`, or `nn.Unflatten`",
    "expand_copy broadcast_tensors": "`jnp.broadcast_to(x, shape)`",
    "repeat_interleave": "`jnp.repeat(x, n, axis)`",
    "narrow select index_select": "indexing, `x[:, start:end]`, or `jnp.take(x, indices, axis)`",
    "gather take_along_dim": "`jnp.take_along_axis(x, indices, axis)`",
    "scatter index_put index_copy index_fill masked_scatter": "`x.at[indices].set(values)`",
    "scatter_add index_add scatter_reduce": "`x.at[indices].add(values)`; also min, max and multiply",
    "masked_fill": "`jnp.where(mask, value, x)`",
    "masked_select": "`x[mask]`",
    "std": "`jnp.std(x, axis, ddof=1)`: without `ddof=1` it divides by N, torch by N - 1",
    "var": "`jnp.var(x, axis, ddof=1)`: without `ddof=1` it divides by N, torch by N - 1",
    "std_mean var_mean": "`jnp.std(x, axis, ddof=1), jnp.mean(x, axis)`",
    "max": "`jnp.max(x, axis)` for the values, `jnp.argmax(x, axis)` for their places",
    "min": "`jnp.min(x, axis)` for the values, `jnp.argmin(x, axis)` for their places",
    "median": "`jnp.median(x, axis)`: of an even number it is the mean of the two in the middle, torch's is the lower one",
    "mode": "`jax.scipy.stats.mode(x, axis)`",
    "sort": "`jnp.sort(x, axis)` for the values, `jnp.argsort(x, axis)` for their places",
    "msort": "`jnp.sort(x, axis=0)`",
    "topk kthvalue": "`jax.lax.top_k(x, k)`, along the last axis",
    "nonzero": "`jnp.argwhere(x)` for rows of indices; `jnp.nonzero` returns one array for each axis",
    "meshgrid": '`jnp.meshgrid(x, y, indexing="ij")`: its default is "xy", torch\'s "ij"',
    "norm": "`jnp.linalg.norm(x, axis=...)`",
    "dist": "`jnp.linalg.norm(x - y)`",
    "cdist": "`jnp.linalg.norm(x[:, None] - y[None], axis=-1)`",
    "mm bmm mv": "`x @ y`",
    "addmm addmv baddbmm": "`bias + x @ y`",
    "addcmul": "`x + value * a * b`",
    "addcdiv": "`x + value * a / b`",
    "lerp": "`x + weight * (y - x)`",
    "ger": "`jnp.outer(x, y)`",
    "clamp clamp_min clamp_max": "`jnp.clip(x, low, high)`",
    "mul": "`x * y`",
    "sub": "`x - y`",
    "div": "`x / y`",
    "neg": "`-x`",
    "eq ne lt le gt ge": "the operator: `x == y`, `x < y`, …",
    "rsqrt": "`jax.lax.rsqrt(x)`",
    "logsumexp": "`jax.nn.logsumexp(x, axis)`",
    "histc": "`jnp.histogram(x, bins)`",
    "cummax cummin": "`jax.lax.cummax(x, axis)` and `jax.lax.cummin(x, axis)`",
    "inverse": "`jnp.linalg.inv(x)`",
    "det slogdet svd qr cholesky eig pinverse lstsq lu matrix_power": "the function of `jnp.linalg`",
    "stft istft": "`jax.scipy.signal.stft` and `jax.scipy.signal.istft`",
    "to_dlpack": "`jnp.from_dlpack`, and `to_torch` of `minitorch_jax.adapters.torch`",
    "sparse sparse_coo_tensor": "`jax.experimental.sparse`",
    # devices and programs
    "device": "`jax.devices()[0]`; `model.to(device)` moves a model, `jax.device_put(x, device)` an array",
    "cuda mps xpu accelerator": '`jax.devices("gpu")`; JAX uses a GPU by default if it has one',
    "set_default_device get_default_device": '`jax.config.update("jax_default_device", device)`',
    "set_default_dtype get_default_dtype set_default_tensor_type": (
        'the argument `dtype` of the layers; float64 needs `jax.config.update("jax_enable_x64", True)`'
    ),
    "set_num_threads get_num_threads": "the number of CPUs of the process (`taskset` on Linux): XLA takes all",
    "backends": "`jax.devices()` lists the devices, `jax.config` has the options",
    "use_deterministic_algorithms": "nothing on a CPU, and on a GPU `XLA_FLAGS=--xla_gpu_deterministic_ops=true`",
    "set_float32_matmul_precision": '`jax.config.update("jax_default_matmul_precision", "highest")`',
    "channels_last channels_last_3d contiguous_format memory_format preserve_format": "nothing, since XLA chooses the layout",
    "distributed": "`jax.distributed.initialize()` and `mt.shard(model, mesh)`: the same program runs on all devices",
    "multiprocessing futures": "threads: arrays never change, and each thread may train a model of its own",
    "profiler": "`jax.profiler`",
    "onnx fx": "`mt.export(model, x)` for a program in a file, `mt.jit(fn).lower(x)` for its text",
    "hub": "`minitorch_jax.adapters.torch.load_from_torch(model, torch_model)` takes weights of a torch model",
    "utils": "any iterable of batches in place of a DataLoader; `jax.checkpoint` for torch.utils.checkpoint",
    "special": "`jax.scipy.special`",
    "quantization ao": "`model.astype(jnp.bfloat16)` for lower precision; there is no quantization",
    "set_printoptions": "`numpy.set_printoptions`",
    "cond while_loop": "`jax.lax.{name}`; Python code that branches on sizes needs nothing",
    "functional": "`nn.functional`",
    "init": "`nn.init`",
    "lr_scheduler": "`optim.schedules`",
    "DataLoader": "any iterable of batches, such as a torch DataLoader with NumPy arrays",
}

ROWS: dict[str, dict[str, str]] = {
    place: {name: text for names, text in rows.items() for name in names.split()}
    for place, rows in {
        "Module": _MODULE,
        "Optimizer": _OPTIMIZER,
        "mt": _PACKAGE,
        "nn": _NN,
        "nn.functional": _FUNCTIONAL,
        "nn.utils": _UTILS,
        "nn.utils.rnn": _RNN,
        "PackedSequence": _PACKED_SEQUENCE,
        "optim": _OPTIM,
        "optim.schedules": _SCHEDULERS,
    }.items()
}

ARGUMENTS = {
    "zero_grad": {"set_to_none": "gradients are zeros after `zero_grad()`, never None: leave it out"},
    "step": {"closure": "call `loss = mt.backward(loss_fn, model, x)` before `opt.step()`; only LBFGS takes a closure"},
    "layer": {
        "device": "leave it out, or write `{owner}(...).to(device)` with a device of `jax.devices()`",
        "factory_kwargs": "leave it out, or pass `dtype=`",
    },
    "optimizer": {
        "params": "an optimizer takes modules: `{owner}([model])`",
        "foreach fused capturable": "leave it out: a step is one compiled program",
        "differentiable": "leave it out, and differentiate a function that calls the rule, `{owner}.update`",
    },
    "to": {
        "device": "write `model.to(device)` with a device of `jax.devices()`",
        "dtype": "write `model.astype(dtype)`",
        "non_blocking copy memory_format": "leave it out: JAX moves arrays in the background",
    },
    "compile": {
        "fullgraph dynamic backend mode": "leave it out: XLA compiles the whole call, once for each shape",
        "options": "XLA's options are another argument: `model.compile(compiler_options=...)`",
    },
    "load_state_dict": {"assign": "leave it out: arrays never change, so loading always assigns"},
}


def answer(place: str, name: str, elsewhere: Mapping[str, Any] | None = None) -> str | None:
    """Return what to write instead of a name of torch, or None if it is none.

    Args:
        place: where the name was looked for, a key of `ROWS`.
        name: the name.
        elsewhere: packages of ours, by their names, that may have it.
    """
    found = ROWS[place].get(name)
    if found is not None:
        return found.format(name=name)
    if name.startswith("_"):
        return None
    libraries = dict(elsewhere or ())
    if place == "mt":
        libraries |= {"jnp": jnp, "jax.nn": jax.nn, "jax.scipy.special": jax.scipy.special}
    return next((f"`{where}.{name}`" for where, library in libraries.items() if name in dir(library)), None)


def refuse(place: str, owner: str, names: Collection[str]) -> None:
    """Raise TypeError if one of the arguments `names` is one of torch that is not taken here."""
    for row, text in ARGUMENTS[place].items():
        for name in row.split():
            if name in names:
                what = text.format(owner=owner.partition("(")[0])
                raise TypeError(f"{owner} got an unexpected keyword argument {name!r}, which torch takes: {what}")


def refuse_all(place: str, owner: str, names: Collection[str]) -> None:
    """Raise TypeError if there is an argument in `names`: it is taken neither here nor, perhaps, by torch."""
    refuse(place, owner, names)
    for name in names:
        raise TypeError(f"{owner} got an unexpected keyword argument {name!r}")


def refuse_of_layer(cls: type, names: Collection[str]) -> None:
    """`refuse` for a call of a module's class, unless its constructor takes these arguments."""
    init: Any = cls.__init__  # type: ignore[misc]
    parameters = inspect.signature(init).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        refuse("layer", f"{cls.__name__}()", set(names) - {p.name for p in parameters})


def missing(
    owner: str, place: str, name: str, known: Collection[str], elsewhere: Mapping[str, Any] | None = None
) -> str:
    """Return the message for an attribute that is not there: what to write instead, or the nearest of the `known` names."""
    instead = answer(place, name, elsewhere)
    if instead is not None:
        return f"{owner} has no attribute `{name}`, as torch has. Instead: {instead}"
    near = difflib.get_close_matches(name, known, 1)
    return f"{owner} has no attribute `{name}`" + (f"; did you mean `{near[0]}`?" if near else "")


def hooks(
    namespace: Mapping[str, Any], place: str, public: Collection[str] = (), elsewhere: Mapping[str, Any] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package: the second lists its public names.

    Args:
        namespace: the package's `globals()`.
        place: its rows, a key of `ROWS`.
        public: the Python modules among its public names. Others are files that hold the code.
        elsewhere: as in `answer`.
    """

    def __dir__() -> list[str]:
        shown = [
            name for name in namespace if not name.startswith("_") and name not in ("annotations", "TYPE_CHECKING")
        ]
        return sorted(n for n in shown if n in public or not isinstance(namespace[n], ModuleType))

    def __getattr__(name: str) -> Any:
        raise AttributeError(missing(f"module '{namespace['__name__']}'", place, name, __dir__(), elsewhere))

    return __getattr__, __dir__
