"""The page: what is on it and what happens when something on it is moved."""

import base64
from importlib import resources

import gradio as gr

from .cards import about_html, captions, cards_html, empty_html, summary_html
from .findings import download, find, unique_names

__all__ = ["LOOK", "MAX_FILES", "build_page"]

MAX_FILES = 50  # at once
MAX_WAITING = 100  # who have dropped files, and for whom the network has no time yet
MAX_SESSIONS, MAX_KEPT_MB = 200, 1000  # of tabs, which may never close: then the oldest goes
TITLE = "IMR-CNN"
DIGITS = 3  # of τ on the slider
LEAST_SCORE = 0.05  # Detectron2's, of what is found at all
_FOLDER = resources.files("imrcnn_d2.deploy.web") / "templates"
# Of gr.mount_gradio_app. Fonts are the reader's own: nothing is fetched.
LOOK = {
    "theme": gr.themes.Base(
        primary_hue="teal",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    ).set(body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300"),
    "css": (_FOLDER / "page.css").read_text(encoding="utf-8"),
}
_SHOW, _SAVE, _HEADER = (
    (_FOLDER / name).read_text(encoding="utf-8") for name in ("show.js", "save.js", "header.html")
)
_KINDS = {"masks": "Masks (PNG)", "labelme": "LabelMe", "coco": "COCO"}


async def _as_it_is(path):
    """Gradio's own copies any file of this machine, and fetches a URL; `look` takes neither."""
    return path


def build_page(predictor, uploads):
    """
    Args:
        predictor (Predictor):
        uploads (Uploads): the files that may be looked at.

    Returns:
        gr.Blocks: keeps what was found in the session's state, and forgets the whole session when
        its tab is closed, or when there are too many and it is the one that was not used longest.
    """
    kept = {}  # of each session, bytes
    detector = not predictor.is_classifier

    def exact(tau):
        """What the slider stands for: where it starts, τ with all its digits."""
        if not detector:
            return None
        return predictor.tau if tau == round(predictor.tau, DIGITS) else tau

    def look(files, tau, request: gr.Request, progress=gr.Progress()):  # noqa: B008  (asks for a bar)
        paths, findings, size = [], [], 0
        try:
            for file in files:
                paths.append(uploads.take(file["path"]))
            if len(paths) > MAX_FILES:
                raise gr.Error(f"{len(paths)} files at once; at most {MAX_FILES}", title="Too many")
            names = unique_names([file.get("orig_name") or "image" for file in files])
            for path, name in progress.tqdm(
                list(zip(paths, names, strict=True)), desc="Looking", unit="images"
            ):
                findings.append(find(predictor, path, name))
                size += findings[-1].num_bytes
                if size > 2**20 * MAX_KEPT_MB:
                    raise gr.Error(f"Over {MAX_KEPT_MB} MB of pixels: drop fewer", title="Too much")
            keep(request.session_hash, size)
        except KeyError:
            raise gr.Error("The upload is no longer there: drop the images again") from None
        finally:
            for path in paths:
                path.unlink(missing_ok=True)
        found = any(finding.error is None for finding in findings)
        return (
            None,
            findings,
            cards_html(findings, predictor, exact(tau)),
            summary_html(findings, exact(tau)),
            *(gr.update(interactive=found) for _ in buttons),
        )

    def show(findings, tau):
        tau = exact(tau)
        return captions(findings, predictor, tau), summary_html(findings, tau)

    def save(kind):
        def make(findings, tau):
            try:
                name, content = download(findings, kind, exact(tau), predictor)
            except ValueError as error:
                raise gr.Error(str(error), title="No file") from error
            return {"name": name, "base64": base64.b64encode(content).decode()}

        return make

    def keep(session, size):
        sessions = page.state_holder.session_data  # by when they were last used
        kept[session] = size
        others = [key for key in list(sessions) if key in kept and key != session]
        for other in kept.keys() - {session, *others}:
            del kept[other]
        while sum(kept.values()) > 2**20 * MAX_KEPT_MB:
            oldest = others.pop(0)
            del kept[oldest]
            sessions.pop(oldest, None)

    def forget(request: gr.Request):
        page.state_holder.session_data.pop(request.session_hash, None)

    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True) as page:
        page.state_session_capacity = MAX_SESSIONS
        findings = gr.State([])
        gr.HTML(_HEADER)
        with gr.Row():
            with gr.Column(scale=1, min_width=320):
                files = gr.File(file_count="multiple", label="Images", height=200)
                # Not by a subclass: of each, Gradio writes a .pyi beside its source.
                files.async_move_resource_to_block_cache = _as_it_is
                start = round(predictor.tau, DIGITS) if detector else 1
                tau = gr.Slider(
                    *(min(LEAST_SCORE, start), 1),
                    value=start,
                    step=10**-DIGITS,
                    label="Threshold τ",
                    info="Findings with a score of at least τ count.",
                    visible=detector,
                )
                summary = gr.HTML()
                with gr.Row():
                    buttons = {
                        kind: gr.Button(label, interactive=False, size="sm", min_width=90)
                        for kind, label in _KINDS.items()
                        if kind != "masks" or predictor.outlines
                    }
                gr.HTML(about_html(predictor))
            with gr.Column(scale=3, min_width=320):
                cards = gr.HTML(empty_html(predictor))
        shown, file = gr.JSON(visible=False), gr.JSON(visible=False)

        looked = files.upload(
            look,
            [files, tau],
            [files, findings, cards, summary, *buttons.values()],
            preprocess=False,
            show_progress_on=files,
            api_name="look",
        )
        # Once more when all is there: the slider may have been moved in the meantime.
        for event, name in ((looked.then, "show_again"), (tau.change, "show")):
            event(
                show,
                [findings, tau],
                [shown, summary],
                queue=False,
                trigger_mode="always_last",
                show_progress="hidden",
                api_name=name,
            ).then(None, shown, js=_SHOW)
        for kind, button in buttons.items():
            button.click(save(kind), [findings, tau], file, queue=False, api_name=kind).then(
                None, file, file, js=_SAVE
            )
        page.unload(forget)
    page.queue(api_open=False, max_size=MAX_WAITING)  # nobody passes by the queue
    return page
