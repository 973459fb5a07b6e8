"""Editable installs that type checkers understand. Everything else is in pyproject.toml.

`minitorch_jax.adapters` is in the folder `adapters/`. For such a mapping, setuptools installs an import hook, which mypy and
pyright do not run: they find neither the package nor the adapters. So `pip install -e .` puts a link to `adapters/` into
`minitorch_jax/`, and the project's folder on the path. Where links cannot be made (Windows, by default), the hook remains.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel


class Editable(editable_wheel):
    def finalize_options(self) -> None:
        link = Path(__file__).resolve().parent / "minitorch_jax" / "adapters"
        try:
            if not link.exists():
                link.symlink_to(Path("..", "adapters"), target_is_directory=True)
            self.distribution.package_dir = {"": "."}
        except OSError:
            pass
        super().finalize_options()


setup(cmdclass={"editable_wheel": Editable})
