"""Weights by the name of a model on the Hugging Face Hub, or from its cache on this machine.

    hub.load("openai-community/gpt2", model, names=names)  # downloads once; local_files_only=True reads only the cache

A model here is its safetensors files: one file, or an index and the files that it lists. Everything else of a repository
(configurations, tokenizers, code, pickles) is neither downloaded nor read. `huggingface_hub` does the downloads, and follows
its own settings, such as `HF_HOME` and `HF_HUB_OFFLINE=1`.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath

import minitorch_jax as mt
from minitorch_jax.module.state_dict import IncompatibleKeys

from ._extra import missing

try:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError
except ImportError as error:
    raise missing("hub", error) from error

from . import safetensors
from ._names import Keep, Names
from ._names import transposed as transposed

_FILES = ("model.safetensors", "model.safetensors.index.json")  # as transformers writes them


def load(
    repo: str,
    module: mt.Module,
    strict: bool = True,
    *,
    names: Names | None = None,
    keep: Keep = (),
    file: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> IncompatibleKeys:
    """Download a model's weights, if they are not in the cache, and load them into a module: all of them, or none.

    Args:
        repo: the name on the hub, `"organisation/model"`.
        module: the module to change.
        strict: as for `safetensors.load`, and so are `names` and `keep`.
        names: where repository and module have other names, a dict of its names and ours.
        keep: a name of `module`, or several, with globs: these arrays stay as they are.
        file: the file in the repository, a `.safetensors` or a `.safetensors.index.json`. None looks for
            `model.safetensors`, then for `model.safetensors.index.json`.
        revision: a branch, a tag or a commit; None is the main branch. Name a commit to load the same weights each time.
        cache_dir: where the files are kept; None is the hub's own place.
        local_files_only: True makes no connection, and reads what is in the cache.

    Returns:
        The missing and the unexpected names, as `safetensors.load` does.

    Raises:
        FileNotFoundError: if the repository, or with `local_files_only` the cache, has no such file.
        ValueError: if the files are damaged or do not fit the module; nothing is loaded then.
        TypeError: if `module` is not a Module.
        OSError: if the hub cannot be reached, or has no such repository: an error of `huggingface_hub`.

    Source: https://huggingface.co/docs/huggingface_hub/guides/download

    Example:
        >>> import pathlib, tempfile
        >>> from minitorch_jax import nn
        >>> from minitorch_jax.adapters import hub
        >>> cache = pathlib.Path(tempfile.mkdtemp())  # made here, in the layout that a download has
        >>> (cache / "models--org--tiny" / "refs").mkdir(parents=True)
        >>> (cache / "models--org--tiny" / "snapshots" / "0123abc").mkdir(parents=True)
        >>> _ = (cache / "models--org--tiny" / "refs" / "main").write_text("0123abc")
        >>> path = cache / "models--org--tiny" / "snapshots" / "0123abc" / "model.safetensors"
        >>> hub.safetensors.save(path, nn.Linear(3, 2))
        >>> hub.load("org/tiny", nn.Linear(3, 2), cache_dir=cache, local_files_only=True)
        IncompatibleKeys(missing_keys=[], unexpected_keys=[])
    """
    if not isinstance(module, mt.Module):
        raise TypeError(f"hub.load takes a repository and a Module to load into; got a {type(module).__name__}")
    path = download(repo, file, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    return safetensors.load(path, module, strict, names=names, keep=keep)


def download(
    repo: str,
    file: str | None = None,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Download a model's weights, if they are not in the cache, and return the path that `safetensors.read` and `load` take.

    All files of a model in several files are of one commit.

    Args:
        repo: as for `load`, and so are the others.
        file: the file in the repository; None looks for `model.safetensors`, then for `model.safetensors.index.json`.
        revision: a branch, a tag or a commit.
        cache_dir: where the files are kept.
        local_files_only: True makes no connection.

    Returns:
        The path of the file, or of the index, in the cache.

    Raises:
        FileNotFoundError: if there is no such file. Its message lists the files that were looked for.
        ValueError: if an index is none, or lists files outside its folder; they are not downloaded.
        OSError: as for `load`.

    Example:
        see `load`.
    """

    cache = None if cache_dir is None else Path(cache_dir)

    def fetch(name: str, commit: str | None) -> Path:
        found = hf_hub_download(
            repo,
            name,
            revision=commit,
            cache_dir=cache,
            local_files_only=local_files_only,
            library_name="minitorch_jax",
        )
        return Path(found)

    for name in _FILES if file is None else (file,):
        try:
            path = fetch(name, revision)
            break
        except EntryNotFoundError as error:
            reason = error
    else:
        raise _absent(repo, _FILES if file is None else (file,), revision, reason) from reason
    if path.suffix == ".json":
        commit = path.parts[
            len(path.parts) - path.parts[::-1].index("snapshots")
        ]  # the folder inside the last of this name
        for part in sorted(set(safetensors.files_of_index(path).values())):
            try:
                fetch(str(PurePosixPath(name).with_name(part)), commit)
            except EntryNotFoundError as error:
                raise _absent(repo, (part,), commit, error) from error
    return path


def _absent(repo: str, files: tuple[str, ...], revision: str | None, error: Exception) -> FileNotFoundError:
    said = str(error).strip().splitlines()
    return FileNotFoundError(
        f"{repo} at {revision or 'its main branch'} has no {' and no '.join(files)}: {said[0] if said else error!r} Pass the"
        " name of a safetensors file as `file`, or leave out local_files_only=True and HF_HUB_OFFLINE, so that it can be"
        " downloaded"
    )
