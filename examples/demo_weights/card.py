#!/usr/bin/env python
"""Make the card of the demo weights, and docs/demo_weights.md, from the runs of the Makefile here.

    python examples/demo_weights/card.py output/demo_weights datasets/demo_sources
    python examples/demo_weights/card.py    # of recorded.json, which the first writes, alone

Text stands in card.md.j2 and page.md.j2; every value comes from recorded.json and trials.csv.
Evaluations whose files are not in the folder of runs stay as they were recorded.
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
from scipy import stats

from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.evaluation import evaluate_lesions
from imrcnn_d2.evaluation.comparison import ModelMetrics, model_figures, paired_difference
from imrcnn_d2.evaluation.detection.metrics import is_count
from imrcnn_d2.evaluation.robustness import ROBUSTNESS
from imrcnn_d2.evaluation.statistics import Bootstrap
from imrcnn_d2.evaluation.subgroups import By, with_groups
from imrcnn_d2.report.html.page import template_environment
from imrcnn_d2.report.tables import format_value, markdown_table
from imrcnn_d2.utils.files import file_sha256, read_json, write_atomically
from imrcnn_d2.utils.safe_loading import load_safetensors

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECORDED, TRIALS = HERE / "recorded.json", HERE / "trials.csv"
PAGES = {
    "card.md.j2": ROOT / "imrcnn_d2/weights/demo.md",
    "page.md.j2": ROOT / "docs/demo_weights.md",
}
CENTRES = ("C1", "C2", "C3", "C4", "kvasir_seg")
EVALUATIONS = {
    "validation": "val/by_centre",
    "validation, whole frames": "whole_frames/by_centre",
    "test": "test/inference/kvasir_seg_test",
    # By imrcnn validate, at the thresholds that the weights have, and its predictions at 0.5.
    "earlier": "earlier",
    "earlier, at 0.5": "earlier/at_half",
    **{f"without {centre}": f"leave_out/{centre}/validation" for centre in CENTRES},
    **{f"without {centre}, at 0.5": f"leave_out/{centre}/validation/at_half" for centre in CENTRES},
}
ROBUSTNESS_OF = {"robustness": "robustness/demo", "robustness, earlier": "robustness/start"}
GROUPS = ("segm", "lesion", "image", "calibration", "calibration_raw")
KEYS = "AP50 AP50_voc AP precision recall f1 iou miou specificity ece brier TP FP FN TN".split()
NAMES = {"kvasir_seg": "Kvasir-SEG"}
# Metrics whose difference is tested: label -> group and key. More is better.
COMPARED = {
    "AP50": ("segm", "AP50"),
    "precision": ("lesion", "precision"),
    "recall": ("lesion", "recall"),
    "silent": ("image", "specificity"),
}


def groups_of(metrics: dict) -> dict:
    """Of what metrics.json has of all images or a part of them, what the pages may show."""
    shown = {name: metrics[name] for name in GROUPS if name in metrics}
    for name, values in shown.items():
        shown[name] = {k: v for k, v in values.items() if k.removesuffix("_ci") in KEYS}
    return {"n": metrics["n"], **shown} if "n" in metrics else shown


def recorded_evaluation(path: Path) -> dict:
    """Groups of metrics by centre, and of all images; by size of the lesions; at τ_val."""
    metrics = read_json(path)
    meta = metrics["meta"]
    everything = {"n": {key: meta[key] for key in ("images", "lesions")}, **groups_of(metrics)}
    centres = metrics.get("by_group", {}).get("centre", {"groups": {}})["groups"]
    return {
        "tau": meta["tau"],
        "groups": {**{name: groups_of(g) for name, g in centres.items()}, "all": everything},
        "sizes": metrics["by_size"]["share_of_image"],
        "tau_val": groups_of(metrics["tau_val"]) if "tau_val" in metrics else None,
    }


def figures_by_centre(folder: Path) -> dict[str, ModelMetrics]:
    """Metrics at 0.5 on the images of each centre, of the predictions of imrcnn validate."""
    predictions = folder / "predictions/predictions.json"
    results = evaluate_lesions(folder / "ground_truth.json", predictions, tau=0.5)
    groups = with_groups(results, [By("centre")]).by_group["centre"].groups
    return {name: model_figures([group.results], Bootstrap()) for name, group in groups.items()}


def differences(runs: Path) -> dict[str, dict[str, list[float | None]]]:
    """Centre -> label -> what leave-one-centre-out has there above the weights before, and the
    interval of this by a bootstrap of pairs, None where it is undefined."""
    ret = {}
    for centre, theirs in figures_by_centre(runs / "earlier").items():
        ours = figures_by_centre(runs / f"leave_out/{centre}/validation")[centre]
        pairs = {label: paired_difference(ours, theirs, *name) for label, name in COMPARED.items()}
        ret[centre] = {
            label: [None if math.isnan(x) else x for x in (pair.estimate, pair.low, pair.high)]
            for label, pair in pairs.items()
        }
    return ret


def images_of(data: Path) -> list[dict]:
    """Number of images by split and centre."""
    rows = []
    for split in ("train", "val", "test"):
        content = read_json(data / "annotations" / f"{split}.json")
        lesions = Counter(annotation["image_id"] for annotation in content["annotations"])
        for centre in sorted({image["centre"] for image in content["images"]}):
            ids = [image["id"] for image in content["images"] if image["centre"] == centre]
            row = {"split": split, "source": NAMES.get(centre, centre), "images": len(ids)}
            row |= {"lesions": sum(lesions[i] for i in ids)}
            rows.append(row | {"lesion-free images": sum(not lesions[i] for i in ids)})
    return rows


def record(runs: Path, data: Path) -> dict:
    """What recorded.json has, renewed by what is in the folder of runs."""
    recorded = read_json(RECORDED) if RECORDED.is_file() else {}
    for name, folder in EVALUATIONS.items():
        if (path := runs / folder / "metrics.json").is_file():
            recorded[name] = recorded_evaluation(path)
    for centre in CENTRES:
        if (path := runs / "leave_out" / centre / "run.json").is_file():
            recorded[f"without {centre}"]["iterations"] = read_json(path)["iterations"]
    if (runs / "earlier").is_dir():
        recorded["differences"] = differences(runs)
    for name, folder in ROBUSTNESS_OF.items():
        if (path := runs / folder / ROBUSTNESS).is_file():
            document = read_json(path)
            keys = ("distortion", "severity", "level", "lesion/f1")
            rows = [{key: row[key] for key in keys} for row in document["rows"]]
            meta = document["meta"]
            recorded[name] = {"tau": meta["tau"], "images": meta["images"], "rows": rows}
    recorded["images"] = images_of(data)
    if (path := runs / "train" / "run.json").is_file():
        run = read_json(path)
        recorded["training"] = {key: run[key] for key in ("iterations", "hours", "finished", "git")}
    if (path := runs / "demo.safetensors").is_file():
        recorded["file"] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
        metadata = load_safetensors(path)[1]
        keys = ("version", "weights_sha256", "config_sha256", "score_map", "operating_point")
        recorded["file"] |= {key: metadata.get(key) for key in keys}
        recorded["file"]["training_images"] = len(metadata["training_images"])
    return recorded


class Records:
    """What the templates use."""

    def __init__(self, recorded: dict):
        self._recorded = recorded

    def __getitem__(self, name):
        return self._recorded[name]

    def centre_rows(self, name):
        """Label -> groups of metrics of an evaluation, by centre, all images last."""
        return {NAMES.get(centre, centre): g for centre, g in self[name]["groups"].items()}

    def left_out(self, at=", at 0.5"):
        """Likewise, of the centres that the models of leave-one-centre-out did not see, at a mapped
        score of 0.5 or, with "", at the models' own thresholds."""
        return {NAMES.get(c, c): self[f"without {c}{at}"]["groups"]["all"] for c in CENTRES}

    def differences(self):
        """What leave-one-centre-out has above the weights before, which did not see these centres
        either, as a table with intervals."""
        cells = []
        for centre, labels in self["differences"].items():
            texts = {
                label: format_value(label, value, None if None in interval else interval)
                for label, (value, *interval) in labels.items()
            }
            cells.append({"": centre, **texts})
        return markdown_table(pd.DataFrame(cells))

    def changed(self, sign, beyond_chance=False):
        """What is more (sign 1) or less (-1) than with the weights before, such as "recall in C1":
        by its value or, with `beyond_chance`, by the whole interval."""
        return [
            f"{label} in {centre}"
            for centre, labels in self["differences"].items()
            for label, (value, *ends) in labels.items()
            if all(x is not None and sign * x > 0 for x in (ends if beyond_chance else [value]))
        ]

    def higher_ece(self):
        """Centres in which leave-one-centre-out has a higher ECE than the weights before."""
        before, ece = self["earlier, at 0.5"]["groups"], lambda groups: groups["calibration"]["ece"]
        return [
            c
            for c, groups in self.left_out().items()
            if c in before and ece(groups) > ece(before[c])
        ]

    def value(self, name, metric):
        """A metric of all images of an evaluation, with its interval."""
        return cell(self[name]["groups"]["all"], metric)

    def table(self, rows, columns):
        """Rows: label -> groups of metrics; columns: heading -> group/key."""
        cells = []
        for label, groups in rows.items():
            texts = {heading: cell(groups, name) for heading, name in columns.items()}
            cells.append({"": label, **texts})
        return markdown_table(pd.DataFrame(cells))

    def sizes(self, name):
        """Recall and IoU by size of the lesions."""
        rows = {size: {"lesion": values} for size, values in self[name]["sizes"].items()}
        return self.table(
            rows, {"lesions": "lesion/n", "recall": "lesion/recall", "IoU": "lesion/iou"}
        )

    def distorted(self, names):
        """F1 by distortion and severity: heading -> recorded evaluation."""
        cells = {}
        for heading, name in names.items():
            for row in self[name]["rows"]:
                label = "none"
                if distortion := DISTORTIONS.get(row["distortion"]):
                    label = f"{distortion.title} ({distortion.unit}): {row['level']}"
                cells.setdefault(label, {})[heading] = format_value("f1", row["lesion/f1"])
        return markdown_table(pd.DataFrame([{"": k, **v} for k, v in cells.items()]))

    def trials(self):
        """Of trials.csv all sources together, and between what limits 95 % of further trainings of
        the recipe are expected, by its seeds and Student's t."""
        table = pd.read_csv(TRIALS).query("source == 'all'").drop(columns=["source", "options"])
        metrics = table.columns.drop(["trial", "iterations"])
        seeds = table[table.trial.str.match(r"recipe_\d")][metrics]
        half = stats.t.ppf(0.975, len(seeds) - 1) * seeds.std() * math.sqrt(1 + 1 / len(seeds))
        low, high = ((seeds.mean() + sign * half).clip(0, 100) for sign in (-1, 1))
        texts = {k: [format_value(k, value) for value in table[k]] for k in metrics}
        limits = {k: f"{low[k]:.1f} to {high[k]:.1f}" for k in metrics}
        expected = {"trial": "recipe, 95 % of trainings", "iterations": "", **limits}
        cells = table.astype({"iterations": str}).assign(**texts)
        return markdown_table(pd.concat([cells, pd.DataFrame([expected])]), 1)

    def not_run(self):
        """Trials that the Makefile has and trials.csv lacks."""
        names = re.findall(r"call trial,([a-z_\d]+),", (HERE / "Makefile").read_text("utf-8"))
        return [name for name in names if name not in self.options()]

    def options(self):
        """Trial -> how it differs from the others."""
        return pd.read_csv(TRIALS).drop_duplicates("trial").set_index("trial").options.to_dict()


def cell(groups: dict, name: str) -> str:
    """A metric as text, with its interval; "–" where it is undefined, "" where it is not known."""
    group, _, key = name.partition("/")
    if group not in groups:
        return ""
    value = groups[group].get(key)
    if value is None:
        return "–"
    if is_count(key) or group == "n":
        return f"{value:,.0f}"
    return format_value(key, value, groups[group].get(f"{key}_ci"))


def pages(recorded: dict) -> dict[Path, str]:
    """The text of each page by its file."""
    environment = template_environment(HERE, keep_trailing_newline=True)
    return {
        page: environment.get_template(template).render(records=Records(recorded))
        for template, page in PAGES.items()
    }


def main(*folders: str) -> None:
    if folders:
        text = json.dumps(record(*map(Path, folders)), indent=1, allow_nan=False)
        write_atomically(RECORDED, text + "\n")
    for page, text in pages(read_json(RECORDED)).items():
        write_atomically(page, text)
        print(f"Written: {page}")


if __name__ == "__main__":
    main(*sys.argv[1:])
