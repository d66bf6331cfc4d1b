"""Alarms in videos: of files, live, and in what is written."""

import contextlib
import logging
from fractions import Fraction

import numpy as np
import pytest
from rectangles import rectangle

from imrcnn_d2.deploy import Predictor, live, outputs, predict_files
from imrcnn_d2.deploy.inputs import decode_video
from imrcnn_d2.deploy.live import predict_live
from imrcnn_d2.evaluation.alarms import LONGEST_GAP, MEMORY, AlarmRule, Alarms
from imrcnn_d2.utils.files import file_sha256

from .conftest import random_image, read_coco, read_table, save_image, write_video

RATE, FRAMES = 10, 12
RULE = AlarmRule(0.5, k=2, n=3, fps=float(RATE))


@pytest.fixture(scope="module")
def watching(weights):
    return Predictor(None, weights, alarm_rule=RULE)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Two scenes, each of one image that shakes."""
    wide = [random_image(seed, 80, 100) for seed in (0, 7)]
    frames = [wide[n // 6][n % 3 : n % 3 + 60, n % 2 : n % 2 + 80] for n in range(FRAMES)]
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", frames, rate=RATE)


@pytest.fixture(scope="module")
def found(watching, film, tmp_path_factory):
    output = tmp_path_factory.mktemp("found") / "out"
    save_image(film.parent / "still.png", 0)
    predict_files(watching, [film.parent], output, save=["overlays"], batch_size=3)
    return output


def of_frames(coco, name="film"):
    """The annotations of each frame in turn."""
    frames = [image for image in coco["images"] if image.get("sequence_id") == name]
    assert [image["frame"] for image in frames] == list(range(FRAMES))
    return [[a for a in coco["annotations"] if a["image_id"] == i["id"]] for i in frames]


def test_tracks_and_alarms_of_a_video_are_in_its_predictions(found):
    coco, seen, alarms = read_coco(found), {}, []
    for frame, annotations in enumerate(of_frames(coco)):
        tracks = [a["track_id"] for a in annotations if a["score"] >= RULE.tau]
        assert len(set(tracks)) == len(tracks)
        for annotation in annotations:
            if annotation["score"] < RULE.tau:
                assert "track_id" not in annotation and annotation["alarm"] is False
                continue
            frames = seen.setdefault(annotation["track_id"], [])
            frames.append(frame)
            expected = len([f for f in frames if f > frame - RULE.n]) >= RULE.k
            assert annotation["alarm"] is expected
            alarms.append(expected)
    assert any(alarms) and not all(alarms)
    assert max(map(len, seen.values())) > 3, "a track lasts while the scene does"
    assert coco["info"]["alarm_rule"] == vars(RULE) and coco["info"]["tau"] == RULE.tau
    (still,) = (image["id"] for image in coco["images"] if "frame" not in image)
    assert not any("alarm" in a for a in coco["annotations"] if a["image_id"] == still)
    rows = read_table(found / "predictions.csv")
    counts = [sum(a["alarm"] for a in annotations) for annotations in of_frames(coco)]
    assert [row["alarms"] for row in rows] == [*map(str, counts), ""]


def test_live_stores_the_tracks_and_alarms_of_the_file(
    watching, film, found, tmp_path, monkeypatch
):
    class Frames(contextlib.nullcontext):
        """A camera that waits for the network."""

        received, dropped, error, pixel_aspect = FRAMES, 0, None, None

        def __enter__(self):
            return self

        def stop(self):
            pass

        def __iter__(self):
            for frame in decode_video(film, film):
                yield frame.image, frame.number, float(frame.time)

    monkeypatch.setattr(live, "LiveFrames", Frames)
    predict_live(watching, str(film), tmp_path / "live")
    keys = "track_id", "alarm", "score"
    both = [
        [
            [[a.get(key) for key in keys] for a in frame]
            for frame in of_frames(read_coco(path), name)
        ]
        for path, name in ((found, "film"), (tmp_path / "live", "live"))
    ]
    for from_file, from_camera in zip(*both, strict=True):
        assert [row[:2] for row in from_file] == [row[:2] for row in from_camera]


def test_an_alarm_has_a_thick_contour_with_text_and_another_detection_a_thin_white_one():
    image, box = (
        np.full((240, 320, 3), 90, np.uint8),
        rectangle(1, 100, 80, 60, 50, size=(240, 320)),
    )
    overlays = [
        outputs.draw_overlay(image, [{**box, "score": 0.9, "alarm": alarm}], ["polyp"], "")
        for alarm in (True, False)
    ]
    yellow = [np.abs(each.astype(int) - outputs.CONTOUR).max(axis=2) < 60 for each in overlays]
    white = [(each > 200).all(axis=2) for each in overlays]
    assert yellow[0][80, 105:155].all() and not yellow[1].any()
    assert white[1][80, 105:155].all()
    assert white[0][60:76].any() and not (overlays[1][:76] != 90).any(), "text above the box"


def test_after_a_gap_or_a_step_back_the_tracks_start_anew():
    alarms = Alarms(AlarmRule(0.5, 2, 5))
    box = {"bbox": [10, 10, 30, 30], "score": 0.8}
    steps = [0.1, 0.1, 2 * LONGEST_GAP, 0.1, -3.0, 0.1]
    seen = []
    for time in np.cumsum(steps):
        alarms.annotate([annotation := dict(box)], time)
        seen.append((annotation["track_id"], annotation["alarm"]))
    assert seen == [(1, False), (1, True), (2, False), (2, True), (3, False), (3, True)]


def test_a_rule_of_several_frames_works_where_each_takes_seconds():
    """As of a large network on a processor; what is long is relative to that."""
    alarms, raised = Alarms(AlarmRule(0.5, 3, 5)), []
    for time in np.cumsum([4.0, 4, 4.5, 4, 30, 4]):
        alarms.annotate([annotation := {"bbox": [10, 10, 30, 30], "score": 0.8}], time)
        raised.append(annotation["alarm"])
    assert raised == [False, False, False, True, False, False]  # what is usual, the first shows


@pytest.mark.parametrize("rate, warned", [(10, False), (14, False), (25, True), (3, True)])
def test_frames_that_come_at_another_rate_are_warned_of_once(caplog, rate, warned):
    alarms = Alarms(RULE)
    with caplog.at_level(logging.WARNING):
        for frame in range(3 * MEMORY):
            alarms.annotate([], Fraction(frame, rate))
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == warned and all(f"{rate}.0" in text and "10.0" in text for text in texts)


def test_what_a_rule_is_not_for_is_refused(weights, classifier_weights, tmp_path):
    other = AlarmRule(0.5, weights_sha256="f" * 64)
    (path := tmp_path / "rule.json").write_text(other.to_json())
    pytest.raises(ValueError, Predictor, None, weights, alarm_rule=path).match("ffffffff")
    mapped = AlarmRule(0.5, weights_sha256=file_sha256(weights), score_map={"slope": 0.875})
    pytest.raises(ValueError, Predictor, None, weights, alarm_rule=mapped).match("0.875")
    pytest.raises(ValueError, Predictor, None, weights, tau=0.3, alarm_rule=RULE).match("τ")
    pytest.raises(ValueError, Predictor, None, classifier_weights, alarm_rule=RULE)
