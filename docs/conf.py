"""The site: `python -m sphinx -W --keep-going -n -b html docs build/site` builds it (extra `docs`), without a network.

Sphinx reads the docstrings; the pages are Markdown, by MyST. The theme is pydata's, as of NumPy, pandas and scikit-learn:
sections in a bar on top, search, light and dark, and a menu on phones.
"""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "_site"), str(HERE.parent)]

with open(HERE.parent / "pyproject.toml", "rb") as file:
    _project = tomllib.load(file)["project"]

project = _project["name"]
author = copyright = "the authors of minitorch_jax"
release = version = _project["version"]
# Links to files lead there. A placeholder until the project is published.
repository = _project["urls"]["Repository"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx_copybutton",
    "sphinx_design",
    "mathml",  # these two are in _site/
    "pages",
]
exclude_patterns = ["_site"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 4
nb_execution_mode = "off"  # notebooks are stored as they were run
smartquotes = False
highlight_language = "none"  # of a fence without a language: output, commands
html_math_renderer = "mathml"
python_maximum_signature_line_length = 88
toc_object_entries_show_parents = "hide"
autodoc_typehints = "none"  # the docstrings say types and shapes
autodoc_member_order = "alphabetical"
autodoc_inherit_docstrings = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

_MADE = [("Recipes", "recipes/index"), ("Gallery", "gallery/index")]
_RULES = ["sgd", "adam", "adaptive", "rprop-asgd", "adafactor-muon", "beyond-torch", "lbfgs"]
_LAYERS = ["linear", "convolution", "pooling", "normalization", "activation", "dropout", "recurrent", "attention"]
_LAYERS += ["embedding", "loss", "distance", "padding", "vision", "container", "lazy"]

# Which pages are under which, in what order, under which caption: the pages themselves have no navigation in them.
navigation = {
    "index": {
        "": [
            "First steps <first-steps>",
            "Guides <guides>",
            "Coming from <migrating>",
            *(f"{name} <{page}>" for name, page in _MADE if (HERE / f"{page}.md").exists()),
            "Reference <reference/index>",
            "How it works <design>",
        ]
    },
    "guides": {
        "Training": ["training-loops", "nn", "optimizers", "Schedules <schedules>", "saving", "inference"],
        "When something is wrong": ["Debugging <debugging>", "following"],
        "Faster and larger": ["performance", "precision", "sharding"],
        "Further": ["adapters", "extending", "Torch's layers <coverage>"],
    },
    "optimizers": {"": ["optim/groups-and-tools", *(f"optim/{page}" for page in _RULES)]},
    "migrating": {
        "": ["migrating/pytorch", "migrating/tensors", "migrating/numpy", "migrating/flax", "migrating/equinox"]
    },
    "recipes/index": {"": ["*"]},
    "gallery/index": {"": ["*"]},
    "reference/index": {
        "The package": ["training", "module", "state", "errors"],
        "Layers": [f"layers/{page}" for page in _LAYERS] + ["init", "utils"],
        "Optimizers": ["optimizers", "optimizer-state", "schedules", "optimizer-tools"],
        "Adapters": ["adapters/*"],
    },
}

# A page that nothing above names is a guide.
_entries = [entry for groups in navigation.values() for entries in groups.values() for entry in entries]
_named = {entry.rpartition("<")[2].rstrip(">") for entry in _entries}
navigation["guides"]["Further"] += sorted({path.stem for path in HERE.glob("*.md")} - _named - {"index"})

html_theme = "pydata_sphinx_theme"
html_title = "minitorch_jax"
html_sidebars = {page: [] for page in ("index", "first-steps", "design")}  # nothing is under them
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(HERE / "_site" / "scorer.js")
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_theme_options = {
    "github_url": repository,
    "show_prev_next": True,
    "navigation_with_keys": False,
    "header_links_before_dropdown": 7,
    "show_toc_level": 2,
    "navigation_depth": 3,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
