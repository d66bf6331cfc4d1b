#!/usr/bin/env python
"""Make the card of the demo weights, and docs/demo_weights.md, from the runs of the Makefile here.

    python examples/demo_weights/card.py output/demo_weights datasets/demo_sources
    python examples/demo_weights/card.py    # of recorded.json, which the first writes, alone

Text stands in card.md.j2 and page.md.j2; every value comes from recorded.json and trials.csv.
Evaluations whose files are not in the folder of runs stay as they were recorded.
"""

import json
import re
import sys
from collections import Counter
from pathlib import Path

import pandas as pd

from imrcnn_d2.data.distortions import DISTORTIONS
from imrcnn_d2.evaluation.detection.metrics import is_count
from imrcnn_d2.evaluation.robustness import ROBUSTNESS
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
# Label -> group, key and the sign of what is better.
COMPARED = {
    "AP50": ("segm", "AP50", 1),
    "precision": ("lesion", "precision", 1),
    "recall": ("lesion", "recall", 1),
    "ECE": ("calibration", "ece", -1),
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

    def worse(self, at=", at 0.5"):
        """Where models of leave-one-centre-out are worse than the weights before, which did not see
        these centres either, such as "ECE in C1 (+0.3)"."""
        worse = []
        for centre in CENTRES[:-1]:
            ours = self[f"without {centre}{at}"]["groups"]["all"]
            theirs = self[f"earlier{at}"]["groups"][centre]
            for label, (group, key, sign) in COMPARED.items():
                change = round(ours[group][key] - theirs[group][key], 1)
                if sign * change < 0:
                    worse.append(f"{label} in {centre} ({change:+.1f})".replace("-", "−"))
        return worse

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
                    label = f"{distortion.title}: {row['level']} {distortion.unit}"
                cells.setdefault(label, {})[heading] = format_value("f1", row["lesion/f1"])
        return markdown_table(pd.DataFrame([{"": k, **v} for k, v in cells.items()]))

    def trials(self):
        """trials.csv as a table."""
        table = pd.read_csv(TRIALS)
        texts = {
            name: [format_value(name, value).replace("n/a", "–") for value in table[name]]
            for name in table.columns
            if table[name].dtype == float
        }
        return markdown_table(table.assign(**texts).astype(str).drop(columns="options"), 3)

    def not_run(self):
        """Trials that the Makefile has and trials.csv lacks."""
        names = re.findall(r"call trial,([a-z_]+)", (HERE / "Makefile").read_text("utf-8"))
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
