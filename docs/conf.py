"""Sphinx's settings: ``python -m sphinx -W --keep-going docs build/docs`` builds the site."""

import shutil
import sys
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent / "_ext")]

import mpjax  # noqa: E402  # of this checkout

# Pages that lie elsewhere in the repository: Sphinx reads what is below docs/ only.
ELSEWHERE = (
  ("notebooks", "*.ipynb", "notebooks"),
  ("benchmarks/results", "*.md", "results"),
)
for source, pattern, folder in ELSEWHERE:
  (ROOT / "docs" / folder).mkdir(exist_ok=True)
  for file in sorted((ROOT / source).glob(pattern)):
    shutil.copy2(file, ROOT / "docs" / folder)

project = "mpjax"
author = "the mpjax authors"
copyright = author  # noqa: A001  # Sphinx's name
release = version = mpjax.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "from_code"]
nitpicky = False
default_role = "py:obj"  # docstrings name what they mean in single backticks

myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # .ci/notebooks.py executes them
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_preprocess_types = False

html_theme = "sphinx_book_theme"
html_title = f"mpjax {release}"
html_static_path = ["_static"]
html_css_files = ["mpjax.css"]
html_favicon = "_static/mark.svg"
html_copy_source = False
html_show_sourcelink = False
html_last_updated_fmt = None
toc_object_entries_show_parents = "hide"
html_theme_options = {
  "logo": {"image_light": "_static/mark.svg", "image_dark": "_static/mark.svg", "text": "mpjax"},
  "navbar_persistent": [],
  "show_toc_level": 2,
  "use_download_button": False,
  "use_fullscreen_button": False,
  "home_page_in_toc": False,
  "navigation_with_keys": False,
}


def links_to_the_copies(app: Sphinx, name: str, content: list[str]) -> None:
  """Pages link to these files where they lie in the repository; a site has its copies of them."""
  up = "../" * name.count("/")
  for source, _, folder in ELSEWHERE:
    content[0] = content[0].replace(f"]({up}../{source}/", f"]({up}{folder}/")


def setup(app: Sphinx) -> None:
  """Sphinx calls this as it starts."""
  app.connect("source-read", links_to_the_copies)
