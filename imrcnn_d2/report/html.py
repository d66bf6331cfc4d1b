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

__all__ = ["write_page"]


def write_page(name, runs, output, *, cohort, **values):
    """
    Render templates/<name>.html, a page.html, with report.css, gallery.js and <name>.js.

    Args:
        name (str): of the template.
        runs (list[Run]):
        output (str or Path): the page to write; replaced at once, or not at all.
        cohort (dict): of :func:`imrcnn_d2.report.cohort.cohort`.
        **values: what this template needs besides what all pages say of runs.

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
    css, *scripts = (
        environment.loader.get_source(environment, file)[0]
        for file in ("report.css", "gallery.js", f"{name}.js")
    )
    script = Markup("\n".join(scripts))
    page = environment.get_template(f"{name}.html").render(
        title=runs[0].dataset or runs[0].name,
        task=runs[0].task,
        css=Markup(css),
        script=script,
        script_hash=_hash(script),
        run_names=[run.name for run in runs],
        facts=facts(runs, cohort["settings"]),
        config_differences=config_differences(runs),
        configs=configs(runs),
        cohort=cohort,
        made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        version=metadata.version("imrcnn-d2"),
        sources=", ".join(str(run.folder) for run in runs),
        **values,
    )
    write_atomically(output, page)
    return Path(output)


def _hash(script):
    """The page runs this script and no other, whatever its data say."""
    digest = hashlib.sha256(script.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
