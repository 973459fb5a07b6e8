"""What the site adds to the pages, which stay plain Markdown as GitHub shows it.

- A `reference` block becomes a table of names, and the docstring of each.
- The navigation (`navigation` in conf.py) becomes the toctrees.
- Links to files that are no pages (`../examples/my_net.py`) lead to the repository.
- Code such as `mt.jit` in a text becomes a link to the reference.
"""

from __future__ import annotations

import importlib
import inspect
import posixpath
import re
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import docstrings
import public_names
from docutils import nodes
from docutils.statemachine import StringList
from sphinx import addnodes
from sphinx.ext.autodoc.mock import mock
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx.util.inspect import stringify_signature

LOGGER = logging.getLogger(__name__)
PACKAGE = public_names.PACKAGE
OF_THE_ENGINE = {"begin_run", "end_run", "settle", "undo_run"}  # methods that the package calls; no user does
TEXTS = {  # of names without a docstring
    f"{PACKAGE}.optim.Rate": "The type of ``lr`` in a rule: ``lr: optim.Rate = optim.setting(default=1e-3)``."
}
SHORT = {PACKAGE: "mt", **{f"{PACKAGE}.{name}": name for name in ("nn", "optim", "adapters")}}


def short(full: str) -> str:
    """A name as programs write it: `mt.jit`, `nn.Linear`."""
    for prefix in sorted(SHORT, key=len, reverse=True):
        if full.startswith(prefix + "."):
            return SHORT[prefix] + full.removeprefix(prefix)
    return full


@cache
def documented() -> dict[str, str]:
    """Each public name, in full, and the one under which its object is documented: `nn.Module` is `mt.Module`."""
    homes: dict[int, str] = {}
    found = {}
    for name in public_names.all_names():
        thing = getattr(importlib.import_module(name.module), name.name)
        home = (
            homes.setdefault(id(thing), name.full) if inspect.isclass(thing) or inspect.isroutine(thing) else name.full
        )
        found[name.full] = home
    return found


@cache
def by_short_name() -> dict[str, str]:
    """As `documented`, by the names that programs write; the functions of layers also as `F.relu`."""
    names = {short(full): home for full, home in documented().items()}
    functions = {name: home for name, home in names.items() if name.startswith("nn.functional.")}
    return names | {name.replace("nn.functional", "F"): home for name, home in functions.items()}


def target_of(code: str, near: str = "") -> str | None:
    """The documented name that a piece of code stands for. `near` is the module whose docstring has it."""
    code = code.removesuffix("()")
    if not re.fullmatch(r"[A-Za-z_][\w.]*", code):
        return None
    if home := by_short_name().get(code) or documented().get(code):
        return home
    parts = near.split(".")
    while parts:  # from the module outwards
        if home := documented().get(".".join([*parts, code])):
            return home
        parts.pop()
    return None


@cache
def public_classes() -> frozenset[type]:
    things = (getattr(importlib.import_module(name.module), name.name) for name in public_names.all_names())
    return frozenset(thing for thing in things if inspect.isclass(thing))


def members(cls: type) -> list[str]:
    """The methods and properties with a docstring that a class or its private bases define."""
    found: dict[str, None] = {}
    parents = [base for base in cls.__mro__[1:] if base in public_classes()]
    for base in reversed(cls.__mro__):
        own = base is cls or (base.__module__.startswith(PACKAGE) and not any(issubclass(one, base) for one in parents))
        for name, value in vars(base).items():
            plain = getattr(value, "__func__", value)
            if name.startswith("_") or not (inspect.isroutine(plain) or isinstance(plain, property | cached_property)):
                continue
            if own and plain.__doc__:
                found[name] = None
            else:
                found.pop(name, None)
    return sorted(found.keys() - OF_THE_ENGINE)


def described(name: public_names.Name) -> Iterator[str]:
    """A name's entry, as reStructuredText."""
    home = documented()[name.full]
    if name.full in TEXTS:
        yield from [f".. py:data:: {name.full}", "", f"   {TEXTS[name.full]}", ""]
        return
    thing = getattr(importlib.import_module(name.module), name.name)
    kind = "class" if inspect.isclass(thing) else "function" if inspect.isroutine(thing) else "data"
    if home != name.full:
        yield from [f".. py:{kind}:: {name.full}", "", f"   The same as :py:obj:`{short(home)} <{home}>`.", ""]
        return
    yield f".. auto{kind}:: {name.full}"
    if kind == "class" and (names := members(thing)):
        yield f"   :members: {', '.join(names)}"
    yield ""


class Reference(SphinxDirective):
    """A table of the names that the lines of the block ask for (see `public_names.selected`), and an entry for each."""

    has_content = True

    def run(self) -> list[nodes.Node]:
        try:
            names = [name for line in self.content if line.strip() for name in public_names.selected(line)]
        except ValueError as error:
            raise self.error(str(error)) from error
        lines = [".. list-table::", "   :widths: auto", "   :class: names", ""]
        for name in names:
            home = documented()[name.full]
            thing = getattr(importlib.import_module(name.module), name.name)
            text = TEXTS.get(name.full) or docstrings.summary(
                inspect.getdoc(thing), lambda code, name=name: target_of(code, name.module)
            )
            if home != name.full:
                text = f"The same as ``{short(home)}``."
            lines += [f"   * - :py:obj:`{short(name.full)} <{name.full}>`", f"     - {text}"]
        lines.append("")
        for name in names:
            lines += described(name)
        return self.parse_rst(lines)

    def parse_rst(self, lines: list[str]) -> list[nodes.Node]:
        block = StringList(lines, source=self.get_source_info()[0])
        container = nodes.Element()
        container.document = self.state.document
        self.state.nested_parse(block, 0, container)
        return container.children


def expand(app: Any, docname: str, source: list[str]) -> None:
    """Before a page is read: its toctree, its reference blocks, and links to the repository."""
    folder = posixpath.dirname(docname)

    def to_repository(match: re.Match[str]) -> str:
        target, anchor = match[2], match[3] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target))
        place = public_names.ROOT / path
        outside = not path.startswith("docs/")
        if not outside and (place.suffix in (".md", ".ipynb", ".png", ".svg", ".gif") or not place.exists()):
            return match[0]
        if not place.exists():
            LOGGER.warning("%s links to %s, which does not exist", docname, target)
        kind = "tree" if place.is_dir() else "blob"
        return f"{match[1]}({app.config.repository}/{kind}/main/{path}{anchor})"

    text = source[0]
    if not docname.startswith("gallery/") or "{toctree}" in text:  # notebooks are JSON
        text = re.sub(r"(\])\(([^)#\s]+)(#[^)\s]*)?\)", to_repository, text)
    text = re.sub(
        r"^```\{reference\}\n(.*?)^```$", r"````{eval-rst}\n.. reference::\n\n\1````", text, flags=re.S | re.M
    )
    text = re.sub(r"(?<=^\.\. reference::\n\n)(.*?)(?=^````$)", _indented, text, flags=re.S | re.M)
    groups = {} if "```{toctree}" in text else app.config.navigation.get(docname, {})
    for caption, entries in groups.items():
        options = ":hidden:\n:glob:\n" + (f":caption: {caption}\n" if caption else "")
        text += f"\n\n```{{toctree}}\n{options}\n" + "\n".join(entries) + "\n```\n"
    source[0] = text


def _indented(match: re.Match[str]) -> str:
    return "".join(f"   {line}\n" for line in match[1].splitlines())


modules = frozenset(public_names.modules())


def convert_docstring(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    near = name
    while near and near not in modules:
        near = near.rpartition(".")[0]
    lines[:] = docstrings.as_rst(lines, lambda code: target_of(code, near))


def signature_of(app: Any, what: str, name: str, obj: Any, options: Any, signature: str, returned: str) -> Any:
    """A class's signature is that of its constructor, not of its metaclass. The docstrings say types."""
    if what != "class":
        return None
    try:
        found = inspect.signature(obj)
    except (TypeError, ValueError):
        return None
    text = stringify_signature(found, show_annotation=False, show_return_annotation=False)
    return re.sub(r"<class '(?:jax\.numpy|numpy)\.(\w+)'>", r"jnp.\1", text), None


def shorten(app: Any, domain: str, objtype: str, node: addnodes.desc_content) -> None:
    """Show `nn.Linear(…)` in place of `minitorch_jax.nn.Linear(…)`."""
    for signature in node.parent.findall(addnodes.desc_signature):
        for prefix in signature.findall(addnodes.desc_addname):
            full = prefix.astext()
            prefix.clear()
            prefix += nodes.Text(short(full + "x").removesuffix("x"))


class LinkNames(SphinxPostTransform):
    """Link code that is a public name to the reference, outside of headings and other links."""

    default_priority = 5

    def run(self, **_: Any) -> None:
        domain = self.env.get_domain("py")
        for node in list(self.document.findall(nodes.literal)):
            inside = node.parent
            while inside is not None and not isinstance(inside, nodes.title | nodes.reference | addnodes.pending_xref):
                inside = inside.parent
            code = node.astext()
            if inside is not None or "." not in code:
                continue
            target = target_of(code)
            if target is None or target not in domain.objects:
                continue
            entry = domain.objects[target]
            if entry.docname == self.env.docname:
                continue
            uri = self.app.builder.get_relative_uri(self.env.docname, entry.docname) + "#" + entry.node_id
            link = nodes.reference("", "", internal=True, refuri=uri)
            node.replace_self(link)
            link += node


def import_adapters() -> None:
    """Import the adapters, with a stand-in for a library that is not installed: torch, say."""
    for adapter in public_names.adapters():
        try:
            importlib.import_module(adapter)
        except ImportError as error:
            with mock([(error.name or "").partition(".")[0]]):
                importlib.import_module(adapter)


def setup(app: Any) -> dict[str, Any]:
    import_adapters()
    app.add_config_value("navigation", {}, "env")
    app.add_config_value("repository", "", "env")
    app.add_directive("reference", Reference)
    app.add_post_transform(LinkNames)
    app.connect("source-read", expand)
    app.connect("autodoc-process-docstring", convert_docstring)
    app.connect("autodoc-process-signature", signature_of)
    app.connect("object-description-transform", shorten)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
