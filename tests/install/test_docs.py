"""Commands, their help, and what the documents say of them."""

import argparse
import ast
import importlib
import pydoc
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from chromium import chromium
from config_keys import flat
from detectron2.config import get_cfg
from PIL import Image
from processes import ROOT

import imrcnn
from imrcnn import COMMANDS
from imrcnn_d2 import add_imrcnn_config
from imrcnn_d2.cli import export, predict
from imrcnn_d2.deploy.outputs import OUTPUTS
from imrcnn_d2.deploy.runtimes import EXPORTS, RUNTIMES
from imrcnn_d2.engine.checkpoint import pretrained
from imrcnn_d2.utils.files import file_sha256

README = (ROOT / "README.md").read_text(encoding="utf-8")
READMES = [ROOT / "README.md", ROOT / "datasets/README.md", ROOT / "examples/README.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").rglob("*.md"))]
MARKDOWN = [*PAGES, ROOT / "CHANGELOG.md", *sorted((ROOT / "imrcnn_d2").rglob("*.md"))]
CONFIG = get_cfg()
add_imrcnn_config(CONFIG)
KEYS = dict(flat(CONFIG))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site. Links and anchors that lead nowhere are warnings."""
    pytest.importorskip("mkdocs", reason="the docs extra is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_reference_has_every_key_with_its_default_and_comment(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs" / "generate")
    reference = importlib.import_module("config_reference")
    source = (ROOT / "imrcnn_d2" / "config.py").read_text()
    keys = reference.read_keys(source)
    stock = dict(flat(get_cfg()))
    ours = {name: value for name, value in KEYS.items() if name not in stock}
    assert {key.name: ast.literal_eval(key.default) for key in keys} == ours
    assert all(key.comment.endswith((".", "off")) and "----" not in key.comment for key in keys)
    page = reference.config_page(source)
    for key in keys:
        assert f"{{ #{re.sub('[._]', '-', key.name.lower())} }}" in page, key


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_of_the_repository(path):
    """As on a code host, where there are no generated pages."""
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not re.match(r"#|\w+:", target):
            assert (path.parent / target.partition("#")[0]).exists(), target


def test_the_demo_weights_have_the_card_of_their_evaluations():
    card = runpy.run_path(str(ROOT / "examples" / "demo_weights" / "card.py"))
    recorded = card["read_json"](card["RECORDED"])
    assert recorded["file"]["sha256"] == file_sha256(pretrained("demo"))
    for page, text in card["pages"](recorded).items():
        assert page.read_text(encoding="utf-8") == text, page


@pytest.mark.slow
def test_everything_public_is_in_the_reference_and_nothing_is_fetched(site):
    packages = "model_zoo", "modeling", "data", "evaluation", "engine", "report", "deploy"
    pages = [(site / "reference" / f"{package}.html").read_text() for package in packages]
    assert not re.findall(r".*:(?:func|class|meth|mod|attr|data):.*", "".join(pages))  # links now
    names = set(re.findall(r'id="imrcnn_d2\.([\w.]+)"', "".join(pages)))
    for package in packages:
        for name in getattr(importlib.import_module(f"imrcnn_d2.{package}"), "__all__", ()):
            # On the page of the package that defines it.
            assert any(f".{known}".endswith(f".{name}") for known in names), name
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", path.read_text())
        remote = [tag for tag in tags if re.search(r'(?:src|href)="(?:https?:)?//', tag)]
        assert tags and not remote, path


def flags_of(name):
    module = importlib.import_module(f"imrcnn_d2.cli.{name.replace('-', '_')}")
    parsers, flags = [module.argument_parser()], set()
    for parser in parsers:
        for action in parser._actions:
            flags |= set(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
    return flags


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_pages_name_only_what_exists(path):
    text = path.read_text(encoding="utf-8")
    pattern = r"(?:\btools/(\w+)\.py|(?:^ *|`)imrcnn\s([a-z][a-z0-9_-]+))((?:\\\n|[^\n`])*)"
    for script, command, rest in re.findall(pattern, text, re.MULTILINE):
        name = (command or re.sub("(lazyconfig_)?train_net", "train", script)).replace("_", "-")
        assert name in COMMANDS
        unknown = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", rest)) - flags_of(name)
        assert not unknown, f"{name} takes no {sorted(unknown)}"

    roots = "|".join(CONFIG)
    for key in set(re.findall(rf"\b(?:{roots})(?:\.[A-Z0-9_]+)+(?![.\w*{{])", text)):
        assert any(f"{name}.".startswith(f"{key}.") for name in KEYS), key

    for name in set(re.findall(r"\bimrcnn_d2(?:\.\w+)+", text)) - {"imrcnn_d2.egg"}:
        assert pydoc.locate(name) or name.endswith(".py"), name
    folders = "configs|tools|examples|docs|benchmarks|packaging|docker|imrcnn_d2|tests"
    for name in set(re.findall(rf"\b(?:{folders})/[\w./-]+\.(?:py|yaml|md|sh)\b", text)):
        assert (ROOT / name).exists(), name


def test_the_readmes_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 64), "red").save("image.jpg")
    section = README.partition("## Use it in Detectron2")[2].partition("\n## ")[0]
    names = {}
    for snippet in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        exec(snippet, names)  # noqa: S102
    assert names["cfg"].MODEL.BACKBONE.NAME == "build_timm_pafpn_backbone"
    assert type(names["model"]).__name__ == "GeneralizedRCNN" and len(names["lesions"]) == 0


def test_the_paths_of_the_architecture_exist_and_are_short():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:\w+/)+(?:\w+\.py)?)`", text):
        assert (ROOT / "imrcnn_d2" / name).exists(), name
    stories = re.findall(r"(?:^\d+\. .*\n(?: +.*\n)*)+", text, re.MULTILINE)
    assert len(stories) == 6
    for story in stories:
        assert len(re.findall(r"`[\w/]+(?:\.py|/)`", story)) <= 10, story
        for path, rest in re.findall(r"`([\w/]+\.py)`(.*)", story):
            code = (ROOT / "imrcnn_d2" / path).read_text(encoding="utf-8")
            for name in re.findall(r"`[\w.]*?(\w+)`", rest):
                assert re.search(rf"\b{name}\b", code), f"{path} has no {name}"


@pytest.mark.slow
def test_it_opens_from_the_disk_and_can_be_searched(site):
    with chromium() as browser:
        messages, requests = [], []
        page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto((site / "models.html").as_uri())
        assert page.evaluate("document.body.getAttribute('data-md-color-scheme')") == "slate"
        overhang = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert overhang <= 0, "wider than a telephone"

        page.set_viewport_size({"width": 1280, "height": 800})
        page.click(".md-search__input")
        page.keyboard.type("Clopper")
        links = page.locator(".md-search-result__link")
        links.first.wait_for(timeout=60_000)
        urls = links.evaluate_all("all => all.map(link => link.href)")
        assert any("metrics.html" in url for url in urls)
        assert messages == []
        assert all(url.startswith(("file:", "data:", "blob:")) for url in requests)


MODULES = sorted(path.stem for path in Path(ROOT, "imrcnn_d2", "cli").glob("[!_]*.py"))
TOOLS = sorted(path.name for path in Path(ROOT, "tools").glob("*.py"))

# Prints the slow imports that the commands' --help waits for.
IMPORTED = """
import importlib, sys
for name in sys.argv[1:]:
    module = importlib.import_module(f"imrcnn_d2.cli.{name}")
    module.argument_parser()
slow = [f"imrcnn_d2.{package}" for package in ("deploy", "engine", "evaluation", "report")]
print(*{*slow, "matplotlib.pyplot", "pandas", "scipy"} & set(sys.modules))
"""


@pytest.mark.parametrize("tool", TOOLS)
def test_every_script_starts(tool, monkeypatch, capsys):
    """In this process, which has imported what takes seconds."""
    monkeypatch.setattr(imrcnn, "_quiet_libraries", lambda: None)  # other tests see warnings
    monkeypatch.setattr(sys, "argv", [tool, "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools" / tool), run_name="__main__")
    assert not end.value.code and "usage:" in capsys.readouterr().out


def test_every_command_has_a_module_and_a_script(capsys):
    assert sorted(name.replace("-", "_") for name in imrcnn.COMMANDS) == MODULES
    scripts = {"train" if "train_net" in tool else tool.removesuffix(".py") for tool in TOOLS}
    assert scripts == set(MODULES)
    imrcnn.main(["--help"])
    printed = capsys.readouterr().out
    assert all(f"  {name} " in printed for name in imrcnn.COMMANDS)


def test_a_command_names_itself_and_needs_to_exist_and_detectron2(monkeypatch, capsys):
    monkeypatch.setattr(imrcnn, "_quiet_libraries", lambda: None)  # other tests see warnings
    monkeypatch.setattr(sys, "argv", ["imrcnn"])
    for command in ("prepare-dataset", "prepare_dataset", "install-detectron2"):
        with pytest.raises(SystemExit, match="^0$"):
            imrcnn.main([command, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: imrcnn {command.replace('_', '-')} ")
    assert "'prepare'" in imrcnn.main(["prepare"])
    monkeypatch.setattr(imrcnn, "find_spec", lambda name: None)
    assert imrcnn.main(["predict"]).count("imrcnn install-detectron2") == 1


def test_help_imports_nothing_slow():
    listed = "import imrcnn, sys; imrcnn.main([]); print({'torch', 'imrcnn_d2'} & set(sys.modules))"
    for code, last in ((listed, "set()\n"), (IMPORTED, "\n")):
        command = [sys.executable, "-W", "ignore", "-c", code, *MODULES]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert f"\n{done.stdout}".endswith(f"\n{last}"), done.stdout + done.stderr


def test_the_options_are_those_of_the_package():
    help_text = " ".join(predict.argument_parser().format_help().split())
    assert all(name in help_text for name in (*RUNTIMES, *(f"--{kind}" for kind in OUTPUTS)))
    help_text = export.argument_parser().format_help()
    assert all(form in help_text for form in EXPORTS)
    precisions = {name for runtime in EXPORTS.values() for name in runtime.precisions}
    assert precisions == set(export.BOUNDS) - {"exact"}


def test_the_threshold_has_two_names_in_every_command():
    names = "--tau", "--score-threshold"
    commands = [c for c in COMMANDS if not flags_of(c).isdisjoint(names)]
    assert {"predict", "evaluate", "agreement", "robustness"} <= {*commands}
    assert all(flags_of(command).issuperset(names) for command in commands)
    args = ["--weights", "demo", "--input", "a.png", "--output", "out", "--score-threshold", "0.3"]
    assert predict.argument_parser().parse_args(args).tau == 0.3
