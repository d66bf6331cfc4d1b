"""Detections become tracks, and tracks become alarms."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from imrcnn_d2.evaluation.alarms import (
    NO_TRACK,
    AlarmRule,
    Alarms,
    Tracker,
    detected_of_last,
    raise_alarms,
)
from imrcnn_d2.utils.files import BadInputError

PLACES = np.array([[0, 0, 20, 20], [5, 0, 20, 20], [60, 60, 20, 20], [62, 65, 20, 20]], float)


@st.composite
def videos(draw):
    """N detections of two videos of 12 frames: sequence, frame, box and score."""
    size = draw(st.integers(0, 40))
    numbers = {"sequence": 1, "frame": 11, "place": len(PLACES) - 1}
    columns = [
        draw(st.lists(st.integers(0, m), min_size=size, max_size=size)) for m in numbers.values()
    ]
    sequence, frame, place = np.array(columns, int).reshape(3, size)
    score = draw(st.lists(st.sampled_from([0.2, 0.5, 0.9]), min_size=size, max_size=size))
    return sequence, frame, PLACES[place], np.array(score, float)


@given(videos(), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_alarms_of_files_are_those_of_frames_in_turn_and_k_of_n_counted_by_hand(video, k, more):
    sequence, frame, boxes, score = video
    rule = AlarmRule(0.5, k, k + more)
    tracks, alarms = raise_alarms(rule, *video)
    for number in (0, 1):
        live = Alarms(rule)
        for time in range(12):
            rows = np.flatnonzero((sequence == number) & (frame == time))
            got = live(boxes[rows], score[rows])
            assert np.array_equal(got, [tracks[rows], alarms[rows]])
    for row in range(len(score)):
        same = (sequence == sequence[row]) & (tracks == tracks[row]) & (score >= 0.5)
        seen = {f for f in frame[same] if frame[row] - rule.n < f <= frame[row]}
        assert alarms[row] == (score[row] >= 0.5 and len(seen) >= k)
        assert (tracks[row] == NO_TRACK) == (score[row] < 0.5)
    for one in {
        (s, f, t) for s, f, t in zip(sequence, frame, tracks, strict=True) if t != NO_TRACK
    }:
        assert sum(one == other for other in zip(sequence, frame, tracks, strict=True)) == 1


def test_a_moving_lesion_keeps_its_track_past_another_and_after_missed_frames():
    tracker, tracks = Tracker(), []
    for frame in (*range(30), *range(40, 60)):
        moving, still = [3 * frame, 2 * frame, 40, 30], [80, 150, 30, 30]
        boxes = [still, moving] if frame % 2 else [moving, still]
        ids = tracker(frame, np.array(boxes, float))
        tracks.append(ids[::-1] if frame % 2 else ids)
    assert tracks[:30] == [[1, 2]] * 30
    assert [still for _, still in tracks] == [2] * 50, "ten missed frames do not end it"


def test_a_box_too_far_away_or_after_a_cut_starts_a_track_of_its_own():
    tracker = Tracker(0.3)
    assert tracker(0, PLACES[:1]) == [1]
    assert tracker(1, PLACES[2:3]) == [2]
    assert tracker(2, PLACES[:1]) == [1]
    tracker.restart()
    assert tracker(3, PLACES[:1]) == [3]
    assert tracker(60, PLACES[:1]) == [4], "long gone"


def test_the_window_is_counted_in_frames_and_not_in_detections():
    sequence, track = np.zeros(4, int), np.ones(4, int)
    frame = np.array([0, 1, 5, 6])
    assert detected_of_last(sequence, frame, track, 2).tolist() == [1, 2, 1, 2]
    assert detected_of_last(sequence, frame, track, 5).tolist() == [1, 2, 2, 2]
    assert detected_of_last(sequence, frame, track, 6).tolist() == [1, 2, 3, 3]
    assert detected_of_last(*np.zeros((3, 0), int), 3).tolist() == []


def test_a_rule_is_read_as_it_was_written(tmp_path):
    rule, path = AlarmRule(0.4, 3, 5, fps=10.0, rule="a", dataset="val"), tmp_path / "rule.json"
    path.write_text(rule.to_json())
    assert AlarmRule.of_file(path) == rule


@pytest.mark.parametrize(
    "change", ['"k": 3|"k": 6', '"k": 3|"k": true', '"tau": 0.4|"tau": NaN', '"k": 3|"j": 3', "{|["]
)
def test_what_is_no_rule_is_named(tmp_path, change):
    path = tmp_path / "rule.json"
    path.write_text(AlarmRule(0.4, 3, 5).to_json().replace(*change.split("|")))
    assert pytest.raises(BadInputError, AlarmRule.of_file, path).value.file == str(path)
