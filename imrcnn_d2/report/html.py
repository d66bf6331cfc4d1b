"""One HTML page that needs nothing else."""

import base64
import hashlib
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..evaluation.files import write_atomically
from .page_facts import config_differences, configs, facts

__all__ = ["write_html", "write_page"]


def write_page(name, runs, output, *, cohort, **values):
    """
    Write a page of runs: templates/<name>.html, a page.html, with gallery.js and <name>.js.

    Args:
        name (str): of the template.
        runs (list[Run]):
        output (str or Path): the page to write; replaced at once, or not at all.
        cohort (dict): of :func:`imrcnn_d2.report.cohort.cohort`.
        **values: what this template needs besides what all pages say of runs.

    Returns:
        Path: the page.
    """
    return write_html(
        name,
        output,
        scripts=("gallery.js", f"{name}.js"),
        title=runs[0].dataset or runs[0].name,
        task=runs[0].task,
        run_names=[run.name for run in runs],
        facts=facts(runs, cohort["settings"]),
        config_differences=config_differences(runs),
        configs=configs(runs),
        cohort=cohort,
        sources=", ".join(str(run.folder) for run in runs),
        **values,
    )


def write_html(name, output, *, scripts=(), **values):
    """
    Write templates/<name>.html, with report.css.

    Args:
        name (str): of the template.
        output (str or Path): the page to write; replaced at once, or not at all.
        scripts (sequence of str): files in templates/ that the page runs, and no others.
        **values: what the template needs: for head.html ``title``, ``lead`` and ``lines``, for
            footer.html ``sources``.

    Returns:
        Path: the page.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("imrcnn_d2.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    css, *texts = (
        environment.loader.get_source(environment, file)[0] for file in ("report.css", *scripts)
    )
    script = Markup("\n".join(texts))
    page = environment.get_template(f"{name}.html").render(
        css=Markup(css),
        script=script,
        script_hash=_hash(script),
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("imrcnn-d2"),
        **values,
    )
    write_atomically(output, page)
    return Path(output)


def _hash(script):
    """The page runs this script and no other, whatever its data say."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
