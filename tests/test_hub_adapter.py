"""`adapters.hub`: models by name, from a cache in the hub's layout. No test makes a connection."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lazily import Lazily, needs

import minitorch_jax as mt
from minitorch_jax import nn
from minitorch_jax.adapters import safetensors

needs("huggingface_hub")
hub = Lazily("minitorch_jax.adapters.hub")

MAIN, TAGGED = "a" * 40, "b" * 40


def net(value: float) -> mt.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model.load_state_dict({name: np.full(a.shape, value, np.float32) for name, a in model.state_dict().items()})
    return model


def repository(cache: Path, name: str, refs: dict[str, str] | None = None) -> Path:
    """Make a repository's folder in a cache, as a download does; returns the folder of its main commit."""
    folder = cache / f"models--{name.replace('/', '--')}"
    for ref, commit in (refs or {"main": MAIN}).items():
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / ref).write_text(commit)
        (folder / "snapshots" / commit).mkdir(parents=True, exist_ok=True)
    return folder / "snapshots" / MAIN


def put(snapshot: Path, name: str, content: Any) -> None:
    """Write a file as the hub does: in `blobs`, with a link to it."""
    blob = snapshot.parents[1] / "blobs" / f"{snapshot.name}-{name.replace('/', '-')}"
    blob.parent.mkdir(exist_ok=True)
    if isinstance(content, str):
        blob.write_text(content)
    else:
        safetensors.save(blob, content)
    (snapshot / name).parent.mkdir(exist_ok=True)
    (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))


def in_several_files(snapshot: Path, model: mt.Module, folder: str = "", **changes: str) -> None:
    arrays = model.state_dict()
    places = {name: f"model-0000{1 + (name > '1')}-of-00002.safetensors" for name in arrays}
    for file in sorted(set(places.values())):
        put(snapshot, folder + file, {name: arrays[name] for name in arrays if places[name] == file})
    put(snapshot, folder + "model.safetensors.index.json", json.dumps({"weight_map": places | changes}))


def test_one_file_of_the_main_branch_or_a_revision(tmp_path: Path) -> None:
    snapshot = repository(tmp_path, "org/net", {"main": MAIN, "v1": TAGGED})
    put(snapshot, "model.safetensors", net(1.0))
    put(snapshot.parent / TAGGED, "model.safetensors", net(2.0))
    for revision, value in ((None, 1.0), ("main", 1.0), ("v1", 2.0), (TAGGED, 2.0)):
        model = net(0.0)
        options = {"cache_dir": tmp_path, "local_files_only": True, "revision": revision}
        assert hub.load("org/net", model, **options) == ([], [])
        assert all((np.asarray(a) == value).all() for a in model.parameters())
        assert hub.download("org/net", **options).parent.name == (MAIN if value == 1.0 else TAGGED)


@pytest.mark.parametrize("folder", ["", "text/"])
def test_a_model_in_several_files_of_one_commit(tmp_path: Path, folder: str) -> None:
    snapshot = repository(tmp_path / "snapshots", "org/net")  # a cache whose path has a folder of that name, too
    in_several_files(snapshot, net(3.0), folder)
    model = net(0.0)
    file = f"{folder}model.safetensors.index.json" if folder else None
    hub.load("org/net", model, file=file, cache_dir=tmp_path / "snapshots", local_files_only=True)
    assert all((np.asarray(a) == 3.0).all() for a in model.parameters())


def test_each_part_is_asked_for_at_the_commit_of_the_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot, asked = repository(tmp_path, "org/net"), []
    in_several_files(snapshot, net(1.0))

    def download(repo: str, name: str, **options: Any) -> str:
        asked.append((name, options["revision"]))
        if not (snapshot / name).exists():
            raise Lazily("huggingface_hub.errors").EntryNotFoundError(f"404: {name}")
        return str(snapshot / name)

    hub.load  # noqa: B018  (imports it)
    monkeypatch.setattr(hub, "hf_hub_download", download)
    hub.load("org/net", net(0.0), revision="main")
    parts = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert asked == [
        ("model.safetensors", "main"),
        ("model.safetensors.index.json", "main"),
        *((part, MAIN) for part in parts),
    ]


def test_names_and_keep(tmp_path: Path) -> None:
    put(repository(tmp_path, "org/net"), "weights.safetensors", nn.ModuleDict({"net": net(1.0)}))
    model = net(0.0)
    options = {"file": "weights.safetensors", "cache_dir": tmp_path, "local_files_only": True}
    found = hub.load("org/net", model, names={"net.*": "*"}, keep="2.*", **options)
    assert found.missing_keys == ["2.weight", "2.bias"]
    assert float(model[0].bias[0]) == 1 and float(model[2].bias[0]) == 0
    with pytest.raises(ValueError, match=r"(?s)weights\.safetensors: .*nothing was loaded:\n  missing: 0\.weight"):
        hub.load("org/net", model, **options)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    snapshot = repository(tmp_path, "org/net")
    options = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(
        FileNotFoundError, match=r"org/net at its main branch has no model\.safetensors and no model\.saf"
    ):
        hub.load("org/net", net(0.0), **options)
    with pytest.raises(
        FileNotFoundError, match=r"org/net at v9 has no other\.safetensors: .*leave out local_files_only=Tru"
    ):
        hub.load("org/net", net(0.0), file="other.safetensors", revision="v9", **options)
    in_several_files(snapshot, net(1.0), **{"2.bias": "gone.safetensors"})
    with pytest.raises(FileNotFoundError, match=rf"org/net at {MAIN} has no gone\.safetensors"):
        hub.load("org/net", net(0.0), **options)
    with pytest.raises(TypeError, match="hub.load takes a repository and a Module to load into; got a dict"):
        hub.load("org/net", {}, **options)
    with pytest.raises(ValueError, match="(?i)repo"):
        hub.load("no name/of a/repository", net(0.0), **options)


def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path) -> None:
    in_several_files(repository(tmp_path, "org/net"), net(1.0), **{"2.bias": "../gone.safetensors"})
    with pytest.raises(ValueError, match="names files outside its own folder, so nothing was read"):
        hub.load("org/net", net(0.0), cache_dir=tmp_path, local_files_only=True)


def test_offline_from_the_environment(tmp_path: Path) -> None:
    put(repository(tmp_path / "hub", "org/net"), "model.safetensors", net(5.0))
    code = """
from minitorch_jax import nn
from minitorch_jax.adapters import hub
model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
hub.load("org/net", model)
assert float(model[2].bias[0]) == 5
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_CACHE", None)
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, env=environment)
