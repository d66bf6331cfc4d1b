"""Whole procedures: a story by hand, every metric against a computation frame by frame on
random procedures, and the tiers of TRUE-Colon against its package."""

import json
import math
from collections import defaultdict

import numpy as np
import pycocotools.mask as mask_util
import pytest

from imrcnn_d2.cli.evaluate import main
from imrcnn_d2.evaluation import Bootstrap, procedures
from imrcnn_d2.evaluation.procedures import read_procedures, read_video_detections
from imrcnn_d2.evaluation.subgroups import By
from imrcnn_d2.evaluation.true_colon import true_colon_result
from imrcnn_d2.evaluation.video import (
    compare_videos,
    curves,
    evaluate_video,
    match_operating_point,
)
from imrcnn_d2.report.plots import draw_all
from imrcnn_d2.utils.files import BadInputError

SIZE = 60
CATEGORIES = [{"id": 1, "name": "polyp"}]


def rle(box):
    """The mask of a box of whole pixels."""
    x, y, w, h = map(int, box)
    mask = np.zeros((SIZE, SIZE), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    code = mask_util.encode(mask)
    return {"size": [SIZE, SIZE], "counts": code["counts"].decode()}


class Story:
    """Procedures, frame by frame, and the detections of a model in them."""

    def __init__(self, masks=False):
        self.masks, self.images, self.annotations, self.detections = masks, [], [], []
        self.videos = []

    def video(self, name, fps, **facts):
        self.videos.append({"id": name, "fps": fps, **facts})

    def frame(self, name, number, lesions=(), found=(), **fields):
        """``lesions`` are {id: box}, ``found`` (box, score) or (box, score, alarm)."""
        image_id = len(self.images) + 1
        record = {"id": image_id, "file_name": f"{name}/{number}.jpg", "sequence_id": name}
        self.images.append({**record, "frame": number, "height": SIZE, "width": SIZE, **fields})
        for lesion, box in dict(lesions).items():
            record = {"id": len(self.annotations) + 1, "image_id": image_id, "category_id": 1}
            record |= {"bbox": list(box), "lesion_id": lesion, "size_mm": 3 + len(lesion)}
            self.annotations.append({**record, **self._mask(box)})
        for box, score, *alarm in found:
            record = {"image_id": image_id, "category_id": 1, "bbox": list(box), "score": score}
            record |= {"alarm": alarm[0]} if alarm else {}
            self.detections.append({**record, **self._mask(box)})

    def _mask(self, box):
        return {"segmentation": rle(box)} if self.masks else {}

    def write(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        truth = {"images": self.images, "categories": CATEGORIES, "videos": self.videos}
        gt, dt = folder / "gt.json", folder / "dt.json"
        gt.write_text(json.dumps({**truth, "annotations": self.annotations}))
        dt.write_text(json.dumps(self.detections))
        return gt, dt

    def read(self, folder):
        gt, dt = self.write(folder)
        truth = read_procedures(gt)
        return truth, read_video_detections(dt, truth)


LESION, ELSEWHERE, NEARBY, FAR = (10, 10, 20, 20), (40, 40, 9, 9), (44, 44, 9, 9), (0, 50, 5, 5)


def test_a_procedure_by_hand(tmp_path):
    """Ten frames at 10 fps: a lesion in frames 2 to 5, found in 4 and 5; a false alarm of frames 0
    and 1, another one elsewhere in frame 1; one more in frame 8 after a frame of silence."""
    story = Story()
    story.video("a", 10)
    story.frame("a", 0, (), [(ELSEWHERE, 0.9)])
    story.frame("a", 1, (), [(NEARBY, 0.8), (FAR, 0.7)])
    story.frame("a", 2, {"polyp": LESION}, [(ELSEWHERE, 0.3)])  # below the threshold
    story.frame("a", 3, {"polyp": LESION}, [(LESION, 0.95, False)])  # no alarm, by the rule
    story.frame("a", 4, {"polyp": LESION}, [((25, 25, 20, 20), 0.6)])  # overlaps a little
    story.frame("a", 5, {"polyp": LESION}, [(LESION, 0.5), (FAR, 0.6)])
    for number in (6, 7, 9):
        story.frame("a", number)
    story.frame("a", 8, (), [(ELSEWHERE, 0.9)])
    truth, detections = story.read(tmp_path)
    results = evaluate_video(truth, detections, tau=0.5)
    values = results.compared()["video"]
    assert values["lesions"] == 1 and values["lesion_sensitivity"] == 100
    assert values["persistence"] == 50 and values["persistent_50"] == 100
    assert values["frames_to_detection"] == 2 and values["seconds_to_detection"] == 0.2
    assert values["within_1s"] == 0  # fifteen frames with a hit are needed
    assert values["minutes"] == pytest.approx(1 / 60)
    assert values["clean_frames"] == 6 and values["clean_frames_with_alarm"] == 3
    assert values["fpr"] == 50 and values["frame_sensitivity"] == 50
    # Two boxes of frames 0 and 1 that overlap; FAR in frame 1, in frame 5 and frame 8.
    assert values["false_alarms"] == 4 and values["lasting_false_alarms"] == 0
    assert values["false_alarms_per_minute"] == pytest.approx(240)
    first = results.tables()["false_alarms.csv"][0][0]
    assert (first["first_frame"], first["last_frame"], first["highest_score"]) == (0, 1, 0.9)


def random_story(rng, masks=False, videos=3):
    story, lesions = Story(masks), iter(range(1000))
    for v in range(videos):
        name, fps, step = f"v{v}", (10, 25, 30)[v % 3], 1 + (v == 2)
        story.video(name, fps, centre="AB"[v % 2])
        visible = {}
        for number in range(0, 60 * step, step):
            if rng.random() < 0.1:  # not listed
                continue
            if rng.random() < 0.1:
                visible[f"{name}_{next(lesions)}"] = rng.integers(0, 40, 2)
            if visible and rng.random() < 0.08:
                visible.pop(next(iter(visible)))
            boxes = {k: (*map(int, place), 12, 10) for k, place in visible.items()}
            boxes_found = []
            for x, y, w, h in boxes.values():
                if rng.random() < 0.5:
                    boxes_found.append(((x + int(rng.integers(0, 9)), y, w, h), _score(rng)))
            for _ in range(rng.poisson(0.7)):
                boxes_found.append(((*map(int, rng.integers(0, 45, 2)), 12, 12), _score(rng)))
            alarms = [(*f, bool(rng.random() < 0.9)) for f in boxes_found]
            story.frame(name, number, boxes, alarms)
    return story


def _score(rng):
    return round(float(rng.uniform(0.02, 1)), 2)  # with ties


def iou(a, b):
    x = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    y = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    both = max(x, 0) * max(y, 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def frame_by_frame(story, tau, threshold):
    """Every metric of the group "video", without an array."""
    frames = defaultdict(dict)
    for image in story.images:
        frames[image["sequence_id"]][image["frame"]] = image["id"]
    fps = {video["id"]: video["fps"] for video in story.videos}
    boxes = defaultdict(list)
    for a in story.annotations:
        boxes[a["image_id"]].append(a)
    alarms = defaultdict(list)
    for d in story.detections:
        if d["score"] >= tau and d.get("alarm", True):
            alarms[d["image_id"]].append(d["bbox"])
    seen, hits = defaultdict(list), defaultdict(list)
    v = dict.fromkeys(
        "procedures minutes false_alarms lasting_false_alarms lesion_frames lesion_frames_hit "
        "clean_frames clean_frames_with_alarm".split(),
        0,
    )
    for name, numbered in frames.items():
        numbers = sorted(numbered)
        gaps = sorted(b - a for a, b in zip(numbers, numbers[1:], strict=False))
        median = (gaps[(len(gaps) - 1) // 2] + gaps[len(gaps) // 2]) / 2
        usual = [gap for gap in gaps if gap <= 1.5 * median]
        step = sum(usual) / len(usual)
        v["procedures"] += 1
        v["minutes"] += len(numbers) * step / fps[name] / 60
        open_alarms, closed = [], []  # lists of [frame, box]
        for number in numbers:
            image, any_hit, false = numbered[number], False, []
            for annotation in boxes[image]:
                seen[annotation["lesion_id"]].append((name, number))
                if any(iou(annotation["bbox"], box) > threshold for box in alarms[image]):
                    hits[annotation["lesion_id"]].append((name, number))
                    any_hit = True
            for box in alarms[image]:
                if not any(iou(a["bbox"], box) > threshold for a in boxes[image]):
                    false.append(box)
            v["lesion_frames"] += bool(boxes[image])
            v["lesion_frames_hit"] += any_hit
            v["clean_frames"] += not boxes[image]
            v["clean_frames_with_alarm"] += not boxes[image] and bool(alarms[image])
            alive = [a for a in open_alarms if number - a[-1][0] <= 1.5 * step]
            closed += [a for a in open_alarms if number - a[-1][0] > 1.5 * step]
            open_alarms = alive
            for box in false:  # joins all false alarms that it touches
                touched = [
                    a
                    for a in open_alarms
                    if any(iou(box, b) > 0 and number - f <= 1.5 * step for f, b in a)
                ]
                joined = sorted((e for a in touched for e in a), key=lambda e: e[0])
                open_alarms = [a for a in open_alarms if a not in touched]
                open_alarms.append([*joined, (number, box)])
        closed += open_alarms
        v["false_alarms"] += len(closed)
        lasting = [(max(f for f, _ in a) - a[0][0] + step) / fps[name] >= 0.5 for a in closed]
        v["lasting_false_alarms"] += sum(lasting)
    shares = [len(hits[lesion]) / len(seen[lesion]) for lesion in seen]
    delays = [(hits[k][0][1] - seen[k][0][1], fps[seen[k][0][0]]) for k in seen if hits[k]]
    n = len(seen)
    v |= {
        "lesions": n,
        "lesion_sensitivity": 100 * len(delays) / n,
        "persistence": 100 * sum(shares) / n,
        "persistent_25": 100 * sum(s >= 0.25 for s in shares) / n,
        "persistent_50": 100 * sum(s >= 0.5 for s in shares) / n,
        "frames_to_detection": sum(d for d, _ in delays) / len(delays) if delays else math.nan,
        "seconds_to_detection": (
            sum(d / f for d, f in delays) / len(delays) if delays else math.nan
        ),
        "frame_sensitivity": 100 * v["lesion_frames_hit"] / v["lesion_frames"],
        "fpr": 100 * v["clean_frames_with_alarm"] / v["clean_frames"],
        "false_alarms_per_minute": v["false_alarms"] / v["minutes"],
        "lasting_false_alarms_per_minute": v["lasting_false_alarms"] / v["minutes"],
        "false_alarms_per_procedure": v["false_alarms"] / v["procedures"],
    }
    for seconds in (1, 3, 5):
        stable = [
            sum(f < seen[k][0][1] + seconds * fps[seen[k][0][0]] for _, f in hits[k]) >= 15
            for k in seen
        ]
        v[f"within_{seconds}s"] = 100 * sum(stable) / n
    return v


@pytest.mark.parametrize("seed", range(8))
def test_every_metric_against_a_computation_frame_by_frame(seed, tmp_path):
    rng = np.random.default_rng(seed)
    story = random_story(rng, masks=seed % 2)
    truth, detections = story.read(tmp_path)
    for tau, threshold in ((0.05, 0.0), (0.4, 0.0), (0.7, 0.3), (1.01, 0.0)):
        results = evaluate_video(truth, detections, tau=tau, iou_threshold=threshold)
        assert results.meta["iou_type"] == ("segm" if seed % 2 else "bbox")
        values = results.compared()["video"]
        expected = frame_by_frame(story, tau, threshold)
        assert values.keys() == expected.keys()
        assert values == pytest.approx(expected, nan_ok=True)


def test_curves_are_the_metrics_at_each_threshold(tmp_path):
    story = random_story(np.random.default_rng(0))
    truth, detections = story.read(tmp_path)
    table = curves(evaluate_video(truth, detections, tau=0.5).outcomes)
    for row in range(0, len(table["tau"]), 9):
        values = evaluate_video(truth, detections, tau=table["tau"][row]).compared()["video"]
        for name in ("lesion_sensitivity", "frame_sensitivity", "fpr", "false_alarms_per_minute"):
            assert table[name][row] == pytest.approx(values[name]), name


@pytest.mark.parametrize("seed", range(4))
def test_the_tiers_are_those_of_true_colon(seed, tmp_path):
    """The package reads the files itself; frame rates are the same, as it has only one."""
    true_colon = pytest.importorskip("true_colon")
    story = random_story(np.random.default_rng(seed))
    for video in story.videos:
        video["fps"] = 10
    for number, detection in enumerate(story.detections):
        del detection["alarm"]
        detection["score"] += number * 1e-7  # AP depends on the order of ties
    truth, detections = story.read(tmp_path)
    names = {i["id"]: f"{i['sequence_id']}_{i['frame']}" for i in story.images}
    coco = {"categories": CATEGORIES, "annotations": story.annotations}
    coco["images"] = [{**i, "file_name": names[i["id"]]} for i in story.images]
    for annotation in coco["annotations"]:
        annotation |= {"id": annotation["id"], "iscrowd": 0, "area": 120}
    evaluator = true_colon.create_evaluator(
        canonicalizer="stem_int_suffix",
        id_source="gt_integer",
        conf=0.4,
        tiers=frozenset(true_colon.Tier),
        lesion=true_colon.LesionConfig(lesion_id_key="lesion_id", fps=10.0),
    )
    theirs = evaluator.evaluate(coco, story.detections)
    results = evaluate_video(truth, detections, tau=0.4)
    groups = results.compared()
    ours, summary = groups["video"], theirs.lesion.summary
    assert groups["detection"]["AP50"] == pytest.approx(100 * theirs.coco.ap50)
    assert groups["detection"]["AP"] == pytest.approx(100 * theirs.coco.ap)
    assert ours["frame_sensitivity"] == pytest.approx(100 * theirs.frame.tpr)
    assert ours["fpr"] == pytest.approx(100 * theirs.frame.fpr)
    assert ours["lesion_sensitivity"] == pytest.approx(summary.pct_detected_any)
    assert ours["persistent_25"] == pytest.approx(summary.pct_detected_25pct)
    assert ours["persistent_50"] == pytest.approx(summary.pct_detected_50pct)
    assert ours["persistence"] == pytest.approx(100 * summary.mean_det_fraction)
    assert ours["frames_to_detection"] == pytest.approx(summary.mean_latency_frames)
    for seconds in (1, 3, 5):
        count = getattr(summary, f"detected_within_{seconds}s")
        assert ours[f"within_{seconds}s"] == pytest.approx(100 * count / summary.n_lesions)
    table = curves(results.outcomes)
    for tau, fpf, found in zip(
        theirs.afroc.conf_thresholds, theirs.afroc.fpf, theirs.afroc.tpr_loc, strict=True
    ):
        row = np.flatnonzero(table["tau"] >= tau)[-1:]  # the lowest score at the threshold
        if len(row):
            assert table["fpr"][row] == pytest.approx(100 * fpf)
            assert table["box_sensitivity"][row] == pytest.approx(100 * found)
    matched = evaluator.match_operating_point(coco, story.detections, target_fpr=0.2)
    point = match_operating_point(results, "fpr<=20")
    assert point.tau == matched.threshold
    # And what the package makes of what was read is the same as of the files.
    written = true_colon.result_from_dict(true_colon_result(results))
    for tier in ("frame", "detection", "froc", "afroc"):
        assert getattr(written, tier) == getattr(theirs, tier)
    assert written.lesion.summary == theirs.lesion.summary


def predictions(story, *, video_name="{}.mp4", offset=0):
    """The detections as `imrcnn predict` writes those of videos, other ids and all."""
    ids = {image["id"]: 5000 - image["id"] for image in story.images}
    images = [
        {
            "id": ids[image["id"]],
            "file_name": f"{video_name.format(image['sequence_id'])}#{image['frame']:06d}",
            "frame": image["frame"] + offset,
        }
        for image in story.images
    ]
    annotations = [{**d, "image_id": ids[d["image_id"]]} for d in story.detections]
    return {"info": {"tau": 0.5}, "images": images, "annotations": annotations}


def test_predictions_of_videos_are_matched_by_sequence_and_frame(tmp_path, caplog):
    story = random_story(np.random.default_rng(3), masks=True)
    truth, detections = story.read(tmp_path)
    expected = evaluate_video(truth, detections, tau=0.5).compared()
    document = predictions(story)
    extra = {
        "id": 9999,
        "file_name": "v0.mp4#009999",
        "frame": 9999,
    }  # which the truth does not list
    document["images"].append(extra)
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(document))
    read = read_video_detections(path, truth)
    assert evaluate_video(truth, read, tau=0.5).compared() == expected
    assert read.notes == {"frames_not_evaluated": 1}
    # By the names of images, where there are no frame numbers; one image is missing.
    names = {image["id"]: image["file_name"] for image in story.images}
    last = names.popitem()[0]
    document["images"] = [{"id": 5000 - id_, "file_name": n} for id_, n in names.items()]
    rest = [r for r in document["annotations"] if r["image_id"] != 5000 - last]
    document["annotations"] = rest
    path.write_text(json.dumps(document))
    read = read_video_detections(path, truth)
    assert read.notes == {"frames_without_predictions": 1}
    assert any("lacks 1 of" in record.message for record in caplog.records)


@pytest.mark.parametrize(
    "fault, named",
    [
        (lambda gt, dt: gt["images"][3].pop("frame"), ("gt.json", "images[3]")),
        (lambda gt, dt: gt["images"][3].update(gt["images"][4], id=4), ("gt.json", "'v0'")),
        (lambda gt, dt: gt["videos"].pop(1), ("gt.json", "'v1'", "--fps")),
        (lambda gt, dt: gt["images"][3].update(frame=10**12), ("gt.json", "images[3]")),
        (lambda gt, dt: gt["images"][3].update(sequence_id=[1]), ("gt.json", "images[3]")),
        (lambda gt, dt: gt["annotations"][2].update(lesion_id={}), ("annotations[2]", "{}")),
        (lambda gt, dt: gt["annotations"][2].update(image_id=[3]), ("annotations[2]", "[3]")),
        (lambda gt, dt: gt.pop("images"), ("gt.json", "images")),
        (lambda gt, dt: dt[5].update(image_id=None), ("dt.json", "[5]", "None")),
        (lambda gt, dt: gt["annotations"][2].update(image_id=7777), ("annotations[2]", "7777")),
        (lambda gt, dt: gt["annotations"][2].update(bbox=[1, 2]), ("annotations[2]", "[1, 2]")),
        (lambda gt, dt: gt["images"][3].update(height=-5), ("gt.json", "-5")),
        (lambda gt, dt: gt["annotations"][2].update(segmentation=[[1, 1]]), ("annotations[2]",)),
        (lambda gt, dt: dt[5].update(score=-1), ("dt.json", "[5]", "-1")),
        (lambda gt, dt: dt[5].update(image_id=8888), ("dt.json", "8888", "--ignore-extra-images")),
    ],
)
def test_what_cannot_be_used_is_named(fault, named, tmp_path):
    story = random_story(np.random.default_rng(2))
    files = story.write(tmp_path)
    gt, dt = (json.loads(path.read_text()) for path in files)
    fault(gt, dt)
    for path, content in zip(files, (gt, dt), strict=True):
        path.write_text(json.dumps(content))
    with pytest.raises(BadInputError) as error:
        read_video_detections(files[1], read_procedures(files[0]))
    assert all(text in str(error.value) for text in named)


def test_foreign_predictions_name_the_videos(tmp_path):
    story = random_story(np.random.default_rng(2))
    truth, _ = story.read(tmp_path)
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(predictions(story, video_name="other_{}.mp4")))
    with pytest.raises(BadInputError, match="other_v0.mp4.*'v0'"):
        read_video_detections(path, truth)


def test_a_crowd_is_neither_clean_nor_a_lesion(tmp_path):
    story = Story()
    story.video("a", 10)
    story.frame("a", 0, {"polyp": LESION}, [(LESION, 0.9)])
    story.frame("a", 1, {"crowd": LESION}, [(LESION, 0.9), (FAR, 0.9)])
    story.annotations[-1]["iscrowd"] = 1
    truth, detections = story.read(tmp_path)
    values = evaluate_video(truth, detections, tau=0.5).compared()["video"]
    assert (values["lesions"], values["lesion_frames"], values["clean_frames"]) == (1, 1, 0)
    assert values["false_alarms"] == 1 and math.isnan(values["fpr"])


@pytest.mark.parametrize("lacking", ["detections", "lesion ids", "lesions", "clean frames"])
def test_what_is_not_there_is_undefined_not_an_error(lacking, tmp_path):
    story = random_story(np.random.default_rng(9))
    if lacking == "detections":
        story.detections = []
    elif lacking == "lesion ids":
        for annotation in story.annotations:
            del annotation["lesion_id"]
    elif lacking == "lesions":
        story.annotations = []
    else:
        kept = {annotation["image_id"] for annotation in story.annotations}
        story.images = [image for image in story.images if image["id"] in kept]
        story.detections = [d for d in story.detections if d["image_id"] in kept]
    truth, detections = story.read(tmp_path)
    results = evaluate_video(truth, detections, tau=0.3, bootstrap=Bootstrap(20))
    values, tables = results.compared()["video"], results.tables()
    assert len(tables["per_procedure.csv"][0]) == 3
    assert math.isnan(values["fpr"]) == (lacking == "clean frames")
    assert math.isnan(values["frame_sensitivity"]) == (lacking == "lesions")
    assert math.isnan(values["lesion_sensitivity"]) == (lacking in ("lesions", "lesion ids"))
    assert (values["false_alarms"] == 0) == (lacking == "detections")
    draw_all(results, tmp_path)


def test_groups_intervals_and_comparison(tmp_path):
    """Groups are the procedures or lesions alone; two models are compared on the same resamples."""
    story = random_story(np.random.default_rng(4), videos=8)
    truth, detections = story.read(tmp_path)
    options = {"tau": 0.3, "bootstrap": Bootstrap(200)}
    results = evaluate_video(truth, detections, **options, by=[By("centre"), By("size_mm", (8,))])
    values, intervals = results.compared()["video"], results.intervals["video"]
    for name in ("lesion_sensitivity", "fpr", "false_alarms_per_minute", "persistence"):
        low, high = intervals[name]
        assert low < values[name] < high, name
    centres = results.by_group["centre"].groups
    total = sum(group.values["video"]["false_alarms"] for group in centres.values())
    assert total == values["false_alarms"]
    part = Story()
    part.videos = [video for video in story.videos if video["centre"] == "A"]
    part.images = [image for image in story.images if image["sequence_id"] in "v0 v2 v4 v6"]
    kept = {image["id"] for image in part.images}
    part.annotations = [a for a in story.annotations if a["image_id"] in kept]
    part.detections = [d for d in story.detections if d["image_id"] in kept]
    alone = evaluate_video(*part.read(tmp_path / "a"), tau=0.3).compared()["video"]
    assert centres["A"].values["video"] == pytest.approx(alone)
    sizes = results.by_group["size_mm"].groups
    assert sum(group.values["video"]["lesions"] for group in sizes.values()) == values["lesions"]

    same = compare_videos(results, results, options["bootstrap"])
    assert all(difference.estimate == 0 and p == 1 for *_, difference, p in same)
    fewer = evaluate_video(truth, detections, tau=0.8, bootstrap=options["bootstrap"])
    rows = {name: d for _, name, _, _, d, _ in compare_videos(results, fewer, options["bootstrap"])}
    difference = rows["false_alarms_per_minute"]
    expected = values["false_alarms_per_minute"]
    expected -= fewer.compared()["video"]["false_alarms_per_minute"]
    assert difference.estimate == pytest.approx(expected) and difference.low > 0
    assert rows["AP50"].estimate == 0  # of all scores
    other = evaluate_video(*part.read(tmp_path / "a"), tau=0.3, bootstrap=options["bootstrap"])
    with pytest.raises(ValueError, match="gt.json"):
        compare_videos(results, other, options["bootstrap"])


def test_a_matched_threshold_keeps_its_limit(tmp_path):
    story = random_story(np.random.default_rng(6))
    truth, detections = story.read(tmp_path)
    results = evaluate_video(truth, detections, tau=0.5)
    for rule in ("fpr<=10", "false_alarms_per_minute<=40", "fpr<=0"):
        name, limit = rule.split("<=")
        tau = match_operating_point(results, rule).tau
        assert evaluate_video(truth, detections, tau=tau).compared()["video"][name] <= float(limit)
    with pytest.raises(ValueError, match="recall>=95"):
        match_operating_point(results, "recall>=95")


def test_the_command(tmp_path, capsys, real_plots):
    story, other = (random_story(np.random.default_rng(s), videos=6) for s in (7, 8))
    gt, dt = story.write(tmp_path / "test")
    val_gt, val_dt = other.write(tmp_path / "val")
    output = tmp_path / "scores"
    command = ["--video", "--gt", gt, "--dt", dt, "--tau", "0.4", "--by", "centre"]
    command += ["--tau-from", val_gt, val_dt, "--tau-rule", "fpr<=10", "--against", dt, val_dt]
    main([*map(str, command), "--resamples", "50", "--output", str(output)])
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics["meta"]["task"] == "video" and metrics["meta"]["tau"] == 0.4
    assert len(metrics["video"]["lesion_sensitivity_ci"]) == 2
    assert metrics["tau_val"]["rule"] == "fpr<=10" and "video" in metrics["tau_val"]
    for name in ("per_procedure.csv", "per_lesion.csv", "false_alarms.csv", "comparison.csv"):
        assert len((output / name).read_text().splitlines()) > 1
    printed = capsys.readouterr().out
    for path in output.iterdir():
        assert path.name in printed
        assert path.suffix != ".png" or path.stat().st_size > 10_000


def test_the_command_refuses(tmp_path, capsys):
    gt, dt = map(str, random_story(np.random.default_rng(7)).write(tmp_path / "test"))
    val_gt, val_dt = map(str, random_story(np.random.default_rng(8)).write(tmp_path / "val"))
    command = ["--video", "--gt", gt, "--dt", dt, "--output", str(tmp_path / "scores")]
    without_rule = tmp_path / "without_rule.json"
    with open(val_dt) as file:
        without_rule.write_text(json.dumps([{**r, "alarm": True} for r in json.load(file)]))
    for options, named in (
        (["--tau-from", val_gt, str(without_rule)], "without_rule.json"),
        (["--tau-from", gt, dt], gt),
        (["--tau-from", val_gt, val_dt, "--against", dt], "--against"),
        (["--tau-from", val_gt, val_dt, "--alarm-rule", dt], "--alarm-rule"),
        (["--tau", "0"], "tau"),
        (["--iou", "1"], "iou"),
        (["--tau-from", val_gt, val_dt, "--tau-rule", "recall>=95"], "recall>=95"),
    ):
        with pytest.raises(SystemExit):
            main([*command, *options])
        assert named in capsys.readouterr().err.splitlines()[-1]  # after argparse's usage
    with pytest.raises(SystemExit):
        main([*command[1:], "--fps", "25"])
    assert "--video" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("names", "sequences", "positions"),
    [
        (["case.01"], ["case.01", "case.02"], [0, -1]),  # .01 is no suffix of a video
        (["case.01"], ["case.02"], [-1]),
        (["a", "b.mp4"], ["clips/a.MP4", "b"], [0, 1]),
        (["C1/001"], ["C2/001"], [-1]),
        (["C1/001"], ["001"], [0]),
        (["C1/001", "C2/001"], ["001"], [-1]),
        (["001"], ["001", "C2/001"], [0, -1]),  # the first is it
        ([7], ["7"], [0]),
    ],
)
def test_which_video_is_which(names, sequences, positions):
    assert procedures._procedures_of(dict.fromkeys(sequences), names).tolist() == positions


def write_procedure(path, frames, fps=25, lesions=(), videos=()):
    """One video with these frames, and a box with each lesion_id in its first."""
    images = [{"id": n, "sequence_id": "v", "frame": f} for n, f in enumerate(frames)]
    box = {"image_id": 0, "category_id": 1, "bbox": [0, 0, 9, 9]}
    annotations = [{"id": n, "lesion_id": name, **box} for n, name in enumerate(lesions)]
    content = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    content["videos"] = [{"id": "v", "fps": fps, **dict(videos)}]
    path.write_text(json.dumps(content))
    return path


def test_frames_of_an_alternating_step_follow_each_other(tmp_path):
    """10 of 25 frames a second; then 30 without any."""
    frames = [n // 2 * 5 + 2 * (n % 2) for n in range(20)]
    truth = read_procedures(write_procedure(tmp_path / "gt.json", [*frames, 80, 82]))
    assert truth.step == pytest.approx([np.mean([2, 3] * 9 + [2, 2])])
    assert truth.followed.tolist() == [True] * 19 + [False, True, False]
    assert truth.minutes == pytest.approx(22 * truth.step / 25 / 60)


def test_an_empty_id_names_no_lesion_or_patient(tmp_path, caplog):
    options = {"lesions": ["", "a", ""], "videos": {"patient_id": ""}}
    path = write_procedure(tmp_path / "gt.json", [0], **options)
    truth = read_procedures(path)
    assert truth.lesion.tolist() == [-1, 0, -1] and "2 of 3 annotations" in caplog.text
    assert "patient_id" not in truth.facts[0]


def test_a_field_with_the_name_of_a_column_keeps_both(tmp_path):
    videos = {"lesions": 3, "site": "colon"}
    path = write_procedure(tmp_path / "gt.json", [0, 1], lesions=["a"], videos=videos)
    (tmp_path / "dt.json").write_text("[]")
    truth = read_procedures(path)
    detections = read_video_detections(tmp_path / "dt.json", truth)
    rows, _ = evaluate_video(truth, detections, tau=0.5).tables()["per_procedure.csv"]
    assert (rows[0]["lesions"], rows[0]["videos.lesions"], rows[0]["site"]) == (1, 3, "colon")
    assert rows[0]["fps"] == 25 and "videos.fps" not in rows[0]
