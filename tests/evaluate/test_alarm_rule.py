"""Choosing an alarm rule on validation procedures."""

import csv
import json
from dataclasses import replace

import pytest

from imrcnn_d2.cli.alarm_rule import main
from imrcnn_d2.cli.evaluate import main as evaluate
from imrcnn_d2.evaluation import alarms
from imrcnn_d2.evaluation.alarms import AlarmRule, candidates, choose_alarm_rule, with_alarms
from imrcnn_d2.evaluation.procedures import read_procedures, read_video_detections

FPS, FRAMES = 10, 600  # a minute
LESION = range(100, 140)
HERE, THERE = [10, 10, 30, 30], [60, 60, 20, 20]
# False alarms: three of one frame, of a high score, and one that lasts three frames.
FALSE = {200: 0.9, 300: 0.9, 400: 0.9, **dict.fromkeys((500, 501, 502), 0.8)}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Ground truth, and predictions: the lesion at 0.6, missed in every fifth frame."""
    folder = tmp_path_factory.mktemp("procedures")
    images = [
        {"id": i, "file_name": f"v/{i:06d}.jpg", "sequence_id": "v", "frame": i, "width": 100}
        | {"height": 100}
        for i in range(FRAMES)
    ]
    annotations = [
        {"id": i, "image_id": i, "category_id": 1, "bbox": HERE, "lesion_id": "a", "area": 900}
        for i in LESION
    ]
    hits = [(i, HERE, 0.6) for i in LESION if i % 5 != 4]
    everything = [*hits, *((i, THERE, score) for i, score in FALSE.items())]
    detections = [
        {"id": n, "image_id": i, "category_id": 1, "bbox": box, "score": score}
        for n, (i, box, score) in enumerate(sorted(everything))
    ]
    shared = {"images": images, "categories": [{"id": 1, "name": "polyp"}]}
    videos = [{"id": "v", "fps": FPS, "num_frames": FRAMES}]
    info = {"tau": 0.5, "weights_sha256": "c" * 64, "source_sha256": "a" * 64}  # of an export
    info["score_map"] = {"slope": 0.8, "offset": -0.25, "dataset": "val"}
    contents = {
        "gt.json": {**shared, "videos": videos, "annotations": annotations},
        "dt.json": {**shared, "info": info, "annotations": detections},
    }
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content))
    return [folder / name for name in contents]


@pytest.fixture(scope="module")
def known(files):
    truth = read_procedures(files[0])
    return candidates(truth, read_video_detections(files[1], truth))


@pytest.mark.parametrize(
    "limit, window, delay, rate",
    [
        (4, (1, 1), 0.0, 4),  # all are within the limit: the soonest rule
        (1, (2, 2), 0.1, 1),  # of single frames none is an alarm
        (0, (4, 5), 0.3, 0),  # nor is one that lasts three
    ],
)
def test_the_rule_that_finds_most_lesions_soonest_within_the_limit(
    known, limit, window, delay, rate
):
    chosen = choose_alarm_rule(known, limit)
    assert (chosen.rule.k, chosen.rule.n) == window and chosen.rule.tau <= 0.6
    assert chosen.lesion_sensitivity == 100 and chosen.false_alarms_per_minute == rate
    assert chosen.seconds_to_detection == pytest.approx(delay)


def test_where_no_rule_keeps_the_limit_a_warning_says_so(known, caplog):
    frequent = [each for each in known if each.false_alarms_per_minute > 1]
    chosen = choose_alarm_rule(frequent, 0.5)
    assert chosen.false_alarms_per_minute == min(e.false_alarms_per_minute for e in frequent)
    assert "0.5" in caplog.text


def test_a_rule_that_finds_no_lesion_has_no_delay(files, tmp_path, capsys):
    gt, dt = files
    content = json.loads(dt.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["bbox"] == THERE]
    (nothing := tmp_path / "nothing.json").write_text(json.dumps(content))
    main(["--gt", str(gt), "--dt", str(nothing), "--output", str(tmp_path / "rule.json")])
    printed = capsys.readouterr().out
    assert "0.0 % of 1 lesions found, " in printed and "nan" not in printed


def test_a_rule_is_written_and_evaluated_but_not_on_what_it_was_chosen_on(
    files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(alarms, "WINDOWS", [(1, 1), (2, 2)])
    gt, dt = files
    output = ["--false-alarms", "1", "--output", str(tmp_path / "rule.json")]
    main(["--gt", str(gt), "--dt", str(dt), *output])
    assert "100.0 % of 1 lesions found, after 0.10 s" in capsys.readouterr().out
    rule = AlarmRule.of_file(tmp_path / "rule.json")
    assert rule.fps == FPS and rule.weights_sha256 == "a" * 64
    with open(tmp_path / "rule.csv") as file:
        rows = [
            {k: float(v) if v else None for k, v in row.items()} for row in csv.DictReader(file)
        ]
    chosen = {"tau": rule.tau, "k": 2, "n": 2, "lesion_sensitivity": 100}
    assert [row["seconds_to_detection"] for row in rows if chosen.items() <= row.items()] == [0.1]
    test = tmp_path / "test.json"
    test.write_text(gt.read_text().replace('"a"', '"b"'))
    options = ["--video", "--alarm-rule", str(tmp_path / "rule.json"), "--resamples", "0"]
    options += ["--dt", str(dt), "--output", str(tmp_path / "out"), "--gt"]
    evaluate([*options, str(test)])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["meta"]["alarms_by"] == vars(rule)
    video = metrics["video"]
    assert video["lesion_sensitivity"] == 100 and video["false_alarms"] == 1
    assert video["seconds_to_detection"] == pytest.approx(0.1)
    other, mapped_anew = tmp_path / "other.json", tmp_path / "mapped.json"
    other.write_text(dt.read_text().replace("a" * 64, "b" * 64))
    mapped_anew.write_text(dt.read_text().replace("-0.25", "-0.75"))
    for fault, named in (
        ([str(gt)], str(gt)),
        ([str(test), "--dt", str(other)], "bbbbbbbb"),
        ([str(test), "--dt", str(mapped_anew)], "-0.75"),
    ):
        with pytest.raises(SystemExit):
            evaluate([*options, *fault])
        assert named in capsys.readouterr().err


def test_of_frames_at_another_rate_or_after_a_gap(files, tmp_path, caplog):
    """Tracks start anew after a gap of three usual steps and more than a second, as live."""
    truth = read_procedures(files[0])
    detections = read_video_detections(files[1], truth)
    rule = AlarmRule(0.3, 2, 2, fps=FPS)
    raised = with_alarms(rule, truth, detections)
    assert "Choose one" not in caplog.text and raised.alarm.any()
    late = replace(truth, frame=truth.frame * 100)  # the step with it
    assert (with_alarms(rule, late, detections).alarm == raised.alarm).all()
    assert f"{len(truth.names)} of {len(truth.names)} procedures" in caplog.text
    second = LESION[0] + 1  # of the lesion's frames, with the first alarm
    apart = truth.frame + 100 * (truth.frame >= second)
    gapped = with_alarms(rule, replace(truth, frame=apart), detections)
    rows = truth.frame[detections.regions.image] == second
    assert raised.alarm[rows].any() and not gapped.alarm[rows].any()


def test_its_rate_is_that_of_the_frames_that_are_evaluated(files, tmp_path):
    """Here every fifth."""
    paths = [tmp_path / path.name for path in files]
    for path, source in zip(paths, files, strict=True):
        content = json.loads(source.read_text())
        for image in content["images"]:
            image["frame"] *= 5
        path.write_text(json.dumps(content))
    gt, dt = map(str, paths)
    main(["--gt", gt, "--dt", dt, "--output", str(tmp_path / "rule.json")])
    assert AlarmRule.of_file(tmp_path / "rule.json").fps == FPS / 5
