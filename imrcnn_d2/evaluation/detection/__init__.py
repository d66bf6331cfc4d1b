"""Detection, from files to results: ``inputs`` reads ground truth and detections as arrays,
``matching`` says which detection hits which lesion, ``counts`` what happened in each image,
``metrics`` has the table of metrics and their formulas, ``curves`` and ``coco_ap`` what ranks
detections, and ``results`` puts them together in ``evaluate_lesions``."""
