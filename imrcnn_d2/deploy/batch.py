"""Many inputs, one after the other: what fails is listed, what is done is not done again."""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from .identity import printable, run_record
from .inputs import find_inputs
from .journal import Journal
from .outputs import OUTPUTS, InputOutputs, OutputFolder, output_folders
from .pipeline import predictions
from .records import frame_record

__all__ = ["Summary", "predict_files"]


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        images (int): images and frames predicted now.
        skipped (int): inputs that an earlier call had done.
        failed (list[tuple[str, str]]): name and reason of each input that could not be read, or not
            to its end.
        kept (list[Path]): files that the user has changed or put there: they were left as they are.
    """

    images: int
    skipped: int
    failed: list
    kept: list = field(default_factory=list)


def predict_files(predictor, inputs, output, *, save=(), batch_size=1, follow_links=False):
    """
    Predict on images, videos and DICOM files, and write the tables of :meth:`Journal.write_tables`
    and what else is wished. An input that cannot be read is listed and the others go on. Called
    again with the same output, it goes on where it was interrupted.

    Args:
        predictor (Predictor):
        inputs (list[str or Path]): see :func:`find_inputs`.
        output (str or Path): folder; made if it does not exist.
        save (iterable of str): of ``OUTPUTS``.
        batch_size (int): images that the network sees at once, where they are of one size to it.
        follow_links (bool): see :func:`find_inputs`.

    Returns:
        Summary:

    Raises:
        FileNotFoundError: there is no such input.
        ValueError: the folder has the results of another run, files that no run wrote, or one is
            writing into it; or masks are asked for of a model that gives none.
        OSError: something cannot be written. What is done stays done.
    """
    if "masks" in save and not predictor.outlines:
        raise ValueError(f"{predictor.about['model']} outlines nothing: it gives no masks")
    output = Path(output)
    root, sources = find_inputs(inputs, leave_out=output_folders(output), follow_links=follow_links)
    run = run_record(predictor, root, save)
    with contextlib.closing(Journal(output, run, OUTPUTS)) as journal:
        journal.forget_outdated(sources)
        todo = [source for source in sources if not journal.is_done(source)]
        names = [source.name for source in sources]
        to = OutputFolder(
            output, save, predictor.about, predictor.classes, names, taken=journal.targets()
        )
        images = _predict(predictor, todo, to, journal, batch_size)
        journal.write_tables(predictor.about, predictor.classes)
        return Summary(images, len(sources) - len(todo), journal.failed(), to.kept)


def _predict(predictor, sources, to, journal, batch_size):
    """Number of images predicted."""
    stills = all(source.kind == "image" for source in sources)
    found_in = predictions(predictor, sources, batch_size)
    outputs, number, images = None, 0, 0
    with (
        contextlib.closing(found_in),
        contextlib.ExitStack() as files,
        tqdm(desc="Predicting", unit="image", total=len(sources) if stills else None) as bar,
    ):
        for item, found in found_in:
            source = item.source
            if outputs is None:
                outputs = files.enter_context(
                    InputOutputs(to, source, journal, pictures=item.pictures)
                )
            if item.frame is not None:
                outputs.add(item.frame, found)
                journal.add(frame_record(source.name, item.frame, item.view), found)
                number += 1
                bar.update()
                continue
            files.close()  # its files are whole before it is noted as done
            target = to.target(source.name) if number else None
            error = item.error or outputs.error
            journal.finish(source, item.signature, number, error, target)
            if error:
                tqdm.write(printable(f"{source.name}: {error}"))
            outputs, number, images = None, 0, images + number
    return images
