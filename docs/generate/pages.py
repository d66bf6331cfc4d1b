"""MkDocs hooks: the pages that are made of the repository's other files, at each build."""

import logging
import posixpath
import re
from pathlib import Path

from commands import commands_page
from config_reference import config_page
from mkdocs.structure.files import File
from neck_figure import neck_figure

logger = logging.getLogger(f"mkdocs.hooks.{__name__}")

ROOT = Path(__file__).parents[2]

# Pages that show a file of the repository.
INCLUDED = {
    "index.md": "README.md",
    "guide/data.md": "datasets/README.md",
    "guide/other-projects.md": "examples/README.md",
    "reference/changelog.md": "CHANGELOG.md",
}
# Files that are a page in another form.
ALSO = {"imrcnn_d2/config.py": "reference/config.md"}
# Packages with a page of their public functions and classes.
PACKAGES = {
    "modeling": "Backbones, neck, attention and heads.",
    "data": "Formats in, COCO out; splits, checks and augmentation. Knows no models.",
    "evaluation": "Figures from arrays and COCO records. Works without a model, "
    "but for `LesionEvaluator`, which is one of Detectron2's evaluators.",
    "engine": "Training: schedule, hooks, checkpoints, devices, processes, cross-validation.",
    "report": "Tables, pictures, comparisons, the HTML report and the model card.",
    "deploy": "Trained models at work: prediction on files and streams, export.",
    "utils": "Files: atomic writes, strict JSON, and loading that runs no code.",
}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files, config):
    for page, source in INCLUDED.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=relink(text, source, page)))
    generated = {
        "reference/config.md": config_page((ROOT / "imrcnn_d2" / "config.py").read_text()),
        "reference/commands.md": commands_page(ROOT),
        **{f"reference/{name}.md": package_page(name) for name in PACKAGES},
    }
    for page, text in generated.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown, **kwargs):
    drawing = f'<div class="scrolls">\n{neck_figure()}\n</div>'
    return markdown.replace("<!-- neck figure -->", drawing)


def relink(text, source, page):
    """
    Args:
        text (str): Markdown.
        source (str): the file it is from, relative to the repository.
        page (str): the page it becomes, relative to docs/.

    Returns:
        str: links to other files lead to their pages; those to files without one are set as code.
    """

    def link(match):
        picture, label, target = match.groups()
        if "://" in target or target.startswith("#"):
            return match[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if not (ROOT / path).exists():
            logger.warning("%s links to %s, which does not exist", source, target)
        pages = {file: own for own, file in INCLUDED.items()} | ALSO
        own = pages.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
        if own is None:
            return f"`{path}`"
        relative = posixpath.relpath(own, posixpath.dirname(page) or ".")
        return f"{picture}[{label}]({relative}{'#' + anchor if anchor else ''})"

    return LINK.sub(link, text)


def package_page(name):
    """
    Args:
        name (str): of a package in imrcnn_d2.

    Returns:
        str: the page of its modules that say what is public in them, for mkdocstrings.
    """
    parts = [f"# imrcnn_d2.{name}\n\n{PACKAGES[name]}\n"]
    for path in sorted((ROOT / "imrcnn_d2" / name).rglob("[!_]*.py")):
        if re.search(r"^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE):
            parts.append(f"::: {'.'.join(path.relative_to(ROOT).with_suffix('').parts)}\n")
    return "\n".join(parts)
