"""MkDocs hooks: the pages that are made of the repository's other files, at each build."""

import logging
import posixpath
import re
from pathlib import Path

from commands import commands_page
from config_reference import config_page
from mkdocs.structure.files import File
from neck_diagram import neck_diagram

logger = logging.getLogger(f"mkdocs.hooks.{__name__}")

ROOT = Path(__file__).parents[2]

# Pages that show a file of the repository.
INCLUDED = {
    "index.md": "README.md",
    "guide/data.md": "datasets/README.md",
    "guide/other-projects.md": "examples/README.md",
    "reference/changelog.md": "CHANGELOG.md",
}
PAGES = {source: page for page, source in INCLUDED.items()}
PAGES["imrcnn_d2/config.py"] = "reference/config.md"
PAGES["imrcnn_d2/cli"] = "reference/commands.md"
# Packages and modules with a page of their public functions and classes.
PACKAGES = {
    "model_zoo": "The shipped configs and their models.",
    "modeling": "Backbones, neck, attention and heads.",
    "data": "Formats in, COCO out; splits, checks and augmentation. Knows no models.",
    "evaluation": "Metrics from arrays and COCO records. Works without a model, "
    "but for `LesionEvaluator`, which is one of Detectron2's evaluators.",
    "engine": "Training: schedule, hooks, checkpoints, devices, processes, cross-validation.",
    "report": "Tables, plots, comparisons, the HTML report and the model card.",
    "deploy": "Trained models at work: prediction on files and streams, export.",
    "utils": "Files: atomic writes, strict JSON, and loading that runs no code.",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    pages = {
        "reference/config.md": config_page((ROOT / "imrcnn_d2" / "config.py").read_text()),
        "reference/commands.md": commands_page(ROOT),
    }
    for page, source in INCLUDED.items():
        pages[page] = (ROOT / source).read_text(encoding="utf-8")
    for name in PACKAGES:
        pages[f"reference/{name}.md"] = package_page(name)
    for page, text in pages.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, page, **kwargs):
    name = page.file.src_uri
    markdown = relink(markdown, INCLUDED.get(name, f"docs/{name}"), name)
    diagram = f'<div class="scrolls">\n{neck_diagram()}\n</div>'
    return markdown.replace("<!-- neck diagram -->", diagram)


def relink(text: str, source: str, page: str) -> str:
    """Make links to the repository's files lead to their pages: in the repository the text is read
    as it is. Links to files without a page become code.
    """

    def link(match):
        image, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            logger.warning("%s links to %s, which does not exist", source, target)
        linked = PAGES.get(path) or (path.startswith("docs/") and path.removeprefix("docs/"))
        if not linked:
            return f"`{path}`"
        relative = posixpath.relpath(linked, posixpath.dirname(page) or ".")
        return f"{image}[{label}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, text)


def package_page(name: str) -> str:
    """The page of a package's modules, for mkdocstrings."""
    parts = [f"# imrcnn_d2.{name}\n\n{PACKAGES[name]}\n"]
    package = ROOT / "imrcnn_d2" / name
    for path in sorted(package.rglob("[!_]*.py")) or [package.with_suffix(".py")]:
        parts.append(f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n")
    return "\n".join(parts)
