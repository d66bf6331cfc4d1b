"""The documentation site: it builds without a warning, is complete, and names only what exists."""

import argparse
import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import chromium
from config_keys import flat
from detectron2.config import get_cfg

from imrcnn_d2 import add_imrcnn_config

ROOT = Path(__file__).parents[2]
# What a reader is told, outside the code.
PROSE = [
    ROOT / "README.md",
    ROOT / "datasets" / "README.md",
    ROOT / "examples" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]


def generator(name):
    """A module of docs/generate."""
    path = ROOT / "docs" / "generate" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. Links and anchors that lead nowhere are warnings."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.mark.slow
def test_the_page_of_keys_has_every_key_with_its_default(site):
    cfg, stock = get_cfg(), dict(flat(get_cfg()))
    add_imrcnn_config(cfg)
    ours = {key: value for key, value in flat(cfg) if key not in stock}
    source = (ROOT / "imrcnn_d2" / "config.py").read_text()
    keys = generator("config_reference").read_keys(source)
    assert {key.name: ast.literal_eval(key.default) for key in keys} == ours
    assert all(key.comment.endswith((".", "off")) for key in keys), keys
    page = (site / "reference" / "config.html").read_text()
    for key in keys:
        assert f'id="{re.sub("[._]", "-", key.name.lower())}"' in page, key


def test_comments_of_a_config_are_read_by_their_place():
    source = '''
def add_imrcnn_config(cfg):
    """Not this."""
    # ---- First part, over
    # two lines.
    cfg.A = CN()
    # One
    # comment.
    cfg.A.B = ("x", 1)

    # A stray remark.

    # ---- Second part.
    # Directly below.
    cfg.A.C_D = -1.0


def other():
    cfg.A.E = 0
'''
    reference = generator("config_reference")
    assert reference.read_keys(source) == [
        reference.Key("A.B", '("x", 1)', "One comment.", "First part, over two lines"),
        reference.Key("A.C_D", "-1.0", "Directly below.", "Second part"),
    ]
    assert "### `A.C_D` { #a-c-d }\n\nDefault: `-1.0`" in reference.config_page(source)


@pytest.mark.slow
def test_everything_public_is_in_the_reference(site):
    for package in ("modeling", "data", "evaluation", "engine", "report", "deploy"):
        page = (site / "reference" / f"{package}.html").read_text()
        roles = re.findall(r".*:(?:func|class|meth|mod|attr|data):.*", page)
        assert not roles  # they became links
        for path in sorted((ROOT / "imrcnn_d2" / package).rglob("[!_]*.py")):
            tree = ast.parse(path.read_text())
            defined = {n.name for n in tree.body if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
            for node in tree.body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    for name in defined & set(ast.literal_eval(node.value)):
                        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                        anchor = f"{module}.{name}"
                        assert f'id="{anchor}"' in page, f"{anchor} has no docstring"


@pytest.mark.slow
def test_nothing_is_fetched(site):
    for page in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        assert tags
        for tag in tags:
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), (page, tag)


def flags_of(command):
    """The options of `imrcnn COMMAND`, or of tools/COMMAND.py."""
    name = command.replace("-", "_")
    name = {"train_net": "train", "lazyconfig_train_net": "train"}.get(name, name)
    if name == "cross_validate":
        return {"--cfg", "--multirun", "--help"}  # Hydra's
    parser = importlib.import_module(f"imrcnn_d2.cli.{name}").argument_parser()
    subparsers = [choice for action in parser._actions for choice in subcommands(action)]
    actions = [action for one in (parser, *subparsers) for action in one._actions]
    return {flag for action in actions for flag in action.option_strings}


def subcommands(action):
    return action.choices.values() if isinstance(action, argparse._SubParsersAction) else ()


@pytest.mark.parametrize("path", PROSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_written_names_only_what_exists(path):
    text = path.read_text(encoding="utf-8")
    # From the name of a command to its end.
    for script, command, rest in re.findall(
        r"(?:\btools/(\w+)\.py|^imrcnn ([a-z2-]+))((?:\\\n|[^\n`])*)", text, re.MULTILINE
    ):
        name = script or command
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)) - flags_of(name)
        assert not unknown, f"{name} takes no {sorted(unknown)}"

    cfg = get_cfg()
    add_imrcnn_config(cfg)
    keys = dict(flat(cfg))
    roots = "|".join(sorted(cfg))
    for key in set(re.findall(rf"\b(?:{roots})(?:\.[A-Z0-9_]+)+(?![.\w*{{])", text)):
        assert key in keys or any(name.startswith(f"{key}.") for name in keys), key

    for name in set(re.findall(r"(?:configs|tools|examples|docs)/[\w./-]+\.(?:py|yaml|md)", text)):
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_it_opens_from_the_disk_and_can_be_searched(site):
    with chromium() as browser:
        said, asked = [], []
        for scheme, body in (("light", "default"), ("dark", "slate")):
            page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.on("request", lambda request: asked.append(request.url))
            page.goto((site / "models.html").as_uri())
            assert page.evaluate("document.body.getAttribute('data-md-color-scheme')") == body
            wide = page.evaluate("document.documentElement.scrollWidth - innerWidth")
            assert wide <= 0, "wider than a telephone"

        page.set_viewport_size({"width": 1280, "height": 800})
        page.click(".md-search__input")
        page.keyboard.type("Clopper")
        links = page.locator(".md-search-result__link")
        links.first.wait_for(timeout=60_000)
        found = links.evaluate_all("all => all.map(link => link.href)")
        assert any("metrics.html" in url for url in found)
        assert said == []
        assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
