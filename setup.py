"""Editable installs that type checkers understand, and a README whose links work elsewhere. The rest is in pyproject.toml.

`minitorch_jax.adapters` is in the folder `adapters/`. For such a mapping, setuptools installs an import hook, which mypy and
pyright do not run: they find neither the package nor the adapters. So `pip install -e .` puts a link to `adapters/` into
`minitorch_jax/`, and the project's folder on the path. Where links cannot be made (Windows, by default), the hook remains.

The README links to files of the project. An index page has none of them, so there the links lead to the repository, at the
tag of this version.
"""

import re
import tomllib
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


def readme() -> str:
    """The README, with links to the repository in the place of links to files."""
    folder = Path(__file__).resolve().parent
    project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def absolute(link: re.Match[str]) -> str:
        kind = "raw" if link["image"] else "blob"
        return f"{link['image']}{link['text']}({project['urls']['Repository']}/{kind}/v{project['version']}/{link['path']})"

    text = (folder / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(?P<image>!?)(?P<text>\[[^\]]*\])\((?!https?:|#)(?P<path>[^)]+)\)", absolute, text)


setup(cmdclass={"editable_wheel": Editable}, long_description=readme(), long_description_content_type="text/markdown")
