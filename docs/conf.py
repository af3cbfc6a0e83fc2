"""The site: `make docs` builds it into `site/`, without a request to any other host. Warnings are errors."""

import importlib
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "_ext"))


project, author = "lmc", "the lmc contributors"
copyright = author
release = version = importlib.import_module("lmc.core.files").__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_design",
    "sphinx_copybutton",
    "checked",
    "course",
    "figures",
    "formulas",
    "links",
    "reference",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["site.css"]

# Notebooks are shown as they are stored; nothing is run.
nb_execution_mode = "off"
nb_merge_streams = True
nb_output_stderr = "remove"
myst_enable_extensions = ["dollarmath", "colon_fence", "deflist"]
myst_heading_anchors = 3
html_math_renderer = "mathml"

# The reference comes from the docstrings of the imported package, whose lifted methods have signatures of their own.
autosummary_generate = True
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
add_module_names = False
default_role = "literal"  # what stands in single backticks is code
suppress_warnings = ["mystnb.unknown_mime_type", "ref.python"]

html_theme = "pydata_sphinx_theme"
html_title = "lmc"
html_sidebars = {
    "notebooks/*": [],
    "index": [],
    "gallery": [],
    "glossary": [],
    "methods": [],
    "start": [],
    "correctness": [],
}
html_theme_options = {
    "navbar_align": "left",
    "show_toc_level": 2,
    "footer_start": ["copyright"],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "navigation_with_keys": False,
    # As axe-core wants them: a button whose name is what it shows, a list without unnamed folds.
    "navbar_persistent": ["search-button"],
    "collapse_navigation": True,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
html_show_sourcelink = False
html_copy_source = False


def setup(app):
    """Defaults that are made anew print as `<factory>`, which is no Python: the whole signature would stay plain text."""

    def readable(_app, _what, _name, _object, _options, signature, returns):
        return (signature.replace("<factory>", "..."), returns) if signature else None

    app.connect("autodoc-process-signature", readable)
