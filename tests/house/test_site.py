"""The documentation site: built strictly, nothing from elsewhere, no link that leads nowhere.

Needs the packages of the `docs` extra: ``python -m pytest -n 0 -m docs tests/house``.
"""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urldefrag, urlsplit

import pytest

ROOT = Path(__file__).resolve().parents[2]
MODULES = ("", ".linen", ".nnx", ".training", ".testing", ".inspect", ".plot", ".checkpoint")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)

pytestmark = pytest.mark.docs


class Page(HTMLParser):
  """The title, the anchors and the links of a page, and what a browser would load with it."""

  def __init__(self, path: Path) -> None:
    super().__init__()
    self.anchors: set[str] = set()
    self.links: list[str] = []
    self.loaded: list[str] = []
    self.classes: set[str] = set()
    self.feed(path.read_text())

  def handle_starttag(self, tag, attrs):
    found = dict(attrs)
    self.anchors |= {found[key] for key in ("id", "name") if found.get(key)}
    self.classes |= set((found.get("class") or "").split())
    if tag == "a" and found.get("href"):
      self.links.append(found["href"])
    if tag in ("script", "img", "iframe", "source") and found.get("src"):
      self.loaded.append(found["src"])
    if tag == "link" and "stylesheet" in (found.get("rel") or "") + (found.get("as") or ""):
      self.loaded.append(found["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
  """The site, as the one command builds it: every warning is an error."""
  out = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "docs", str(out)]
  environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
  result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert result.returncode == 0, result.stderr
  return out


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
  return {path: Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}


def test_every_page_is_rendered_whole(pages):
  for path, page in pages.items():
    assert re.search(r"<h1>\S", path.read_text()) or path.stem in ("search", "genindex"), path
    broken = page.classes & {"problematic", "system-message", "cell_output_error"}
    assert not broken, f"{path.name} has {broken}"


def test_nothing_is_loaded_from_elsewhere(site, pages):
  elsewhere = {
    f"{path.name}: {address}"
    for path, page in pages.items()
    for address in page.loaded
    if urlsplit(address).netloc
  }
  for sheet in site.rglob("*.css"):
    found = re.findall(r"(?:@import|url\()\s*[\"']?(https?:[^\"')]+)", sheet.read_text())
    elsewhere |= {f"{sheet.name}: {address}" for address in found}
  assert not elsewhere


def test_every_link_within_the_site_leads_somewhere(pages):
  by_path = {path.resolve(): page for path, page in pages.items()}
  lost = []
  for path, page in pages.items():
    for link in page.links:
      target, anchor = urldefrag(link)
      if urlsplit(target).scheme or urlsplit(target).netloc:
        continue
      file = (path.parent / unquote(urlsplit(target).path)).resolve() if target else path.resolve()
      known = by_path.get(file)
      if not file.exists() or (anchor and known and unquote(anchor) not in known.anchors):
        lost.append(f"{path.name}: {link}")
  assert not lost


def test_the_search_finds_autocast(site):
  text = (site / "searchindex.js").read_text()
  index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
  entries = (index[kind].get("autocast", []) for kind in ("terms", "titleterms"))
  found = [n for entry in entries for n in (entry if isinstance(entry, list) else [entry])]
  names = {index["docnames"][n] for n in found}
  assert {"how/autocast", "guides/functions", "reference"} <= names


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium")
def test_the_search_finds_autocast_in_a_browser(site):
  page = f"{(site / 'search.html').as_uri()}?q=autocast"
  flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
  command = [BROWSER, *flags, "--dump-dom", page]
  shown = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
  assert 'href="reference.html#mpjax.autocast"' in shown and 'href="how/autocast.html"' in shown


@pytest.mark.parametrize("suffix", MODULES, ids=lambda suffix: f"mpjax{suffix}")
def test_the_reference_has_every_public_name(pages, suffix):
  module = importlib.import_module(f"mpjax{suffix}")
  (reference,) = (page for path, page in pages.items() if path.name == "reference.html")
  names = {
    f"{module.__name__}.{name}"
    for name in module.__all__
    if not isinstance(getattr(module, name), ModuleType)
  }
  assert names <= reference.anchors
