"""The result of procedures in the form of the package `true-colon`, of the extra [video]."""

import logging

import numpy as np

from imrcnn_d2.evaluation.detection.inputs import MAX_DETECTIONS
from imrcnn_d2.evaluation.video import VideoResults, at_least
from imrcnn_d2.utils.files import install_extra

logger = logging.getLogger(__name__)


def true_colon_result(results: VideoResults) -> dict | None:
    """The result at τ as the package has it, for its tables and plots: None where it is not
    installed, and of masks, which it does not know.

    Its functions make the tiers of detections, frames and lesions. FROC and AFROC hold our counts:
    it would match millions of frames anew at every threshold. It has one frame rate, the median.
    """
    if results.outcomes.iou_type != "bbox":
        logger.info("TRUE-Colon is of boxes: --iou-type bbox writes its result too.")
        return None
    try:
        import true_colon
    except ModuleNotFoundError:
        logger.warning(
            f"true_colon.json is not written: it needs {install_extra('video')}, on Python 3.11 or "
            "later. All other results are complete."
        )
        return None
    scored, truth = results.outcomes, results.outcomes.truth
    detections, tau, iou_thr = scored.detections, results.meta["tau"], scored.iou_threshold
    evaluated = scored.has_lesion | scored.clean
    used = detections.alarm & (scored.rank < MAX_DETECTIONS) & evaluated[detections.regions.image]
    names = [
        f"{truth.names[number]}_{facts['lesion_id']}"
        for number, facts in zip(truth.procedure_of_lesion, truth.lesions, strict=True)
    ]
    annotations = _package_records(truth, truth.regions, ~truth.crowd)
    for record, lesion in zip(annotations, truth.lesion[~truth.crowd].tolist(), strict=True):
        record["unique_id"] = names[lesion] if lesion >= 0 else None
    coco = {"annotations": annotations}
    above = used & (detections.score >= tau)
    found_at_tau = _package_records(truth, detections.regions, above)
    for record, score in zip(found_at_tau, detections.score[above].tolist(), strict=True):
        record["score"] = score
    at = {"iou_thr": iou_thr, "conf": tau}
    scores = tuple(
        np.maximum(scored.frame_score[frames], 0).tolist()
        for frames in (scored.has_lesion, scored.clean)
    )
    settings = true_colon.LesionConfig(fps=float(np.median(truth.fps)))
    lesion = None
    if truth.lesions:
        rule = true_colon.create_canonicalizer("stem_int_suffix")
        lesion = true_colon.compute_lesion_metrics(
            coco, found_at_tau, **at, canonicalizer=rule, config=settings
        )
    grid = np.array(true_colon.DEFAULT_CONF_GRID)
    taken = at_least(scored.claimed_score[~truth.crowd], grid)
    marks = at_least(detections.score[used], grid)
    flagged = at_least(scored.frame_score[scored.clean], grid)
    images, clean = int(evaluated.sum()), int(scored.clean.sum())
    curve = {
        "iou_thr": iou_thr,
        "conf_thresholds": grid.tolist(),
        "tpr_loc": (taken / max(len(annotations), 1)).tolist(),
        "tp": taken.tolist(),
        "fp": (marks - taken).tolist(),
        "total_gt": len(annotations),
        "n_images": images,
    }
    rates = ((marks - taken) / images).tolist(), (flagged / max(clean, 1)).tolist()
    return true_colon.result_to_dict(
        true_colon.EvaluationResult(
            **at,
            n_frames=images,
            n_preds=int(used.sum()),
            detection=true_colon.compute_detection_metrics(coco, found_at_tau, **at),
            frame=true_colon.compute_frame_metrics(coco, [], **at, scores=scores),
            lesion=lesion,
            froc=true_colon.FrocCurve(**curve, fp_per_image=rates[0]),
            afroc=true_colon.AfrocCurve(**curve, fpf=rates[1], n_neg_images=clean),
            provenance={"true_colon": true_colon.__version__, "fps": settings.fps},
        )
    )


def _package_records(truth, regions, chosen):
    """Regions as the package reads them; frames are known by procedure and number."""
    place = regions.image[chosen]
    columns = (truth.procedure[place], truth.frame[place], regions.boxes[chosen])
    return [
        {"image_id": f"{procedure}_{frame}", "category_id": 1, "bbox": box}
        for procedure, frame, box in zip(*(c.tolist() for c in columns), strict=True)
    ]
