"""Which files are taken, under which names; videos frame for frame, at their times."""

import contextlib
import hashlib
import itertools
import os
import re
import shutil
import socket
import threading
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from imrcnn_d2.deploy import predict_files
from imrcnn_d2.deploy.inputs import Source, VideoWriter, decode_video, find_inputs, read_frames
from imrcnn_d2.deploy.live import LiveFrames
from imrcnn_d2.utils.files import BadInputError

from .conftest import CODECS, film, random_image, save_image, write_video

DICOM = bytes(128) + b"DICM"
DICOM_NAME = f"dicom-{hashlib.sha256(DICOM).hexdigest()[:16]}.dcm"


@pytest.fixture
def tree(tmp_path):
    for name in (
        "x/a.JPG",
        "x/clip.mp4",
        "x/notes.txt",
        "x/.hidden.png",
        "x/deep/b.tif",
        "y/a.JPG",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "x" / "IM0001").write_bytes(DICOM)
    return tmp_path


def names(*inputs, **options):
    return [(source.name, source.kind) for source in find_inputs(inputs, **options)[1]]


def test_files_folders_and_patterns(tree):
    x, y, dicom = tree / "x", tree / "y", (DICOM_NAME, "dicom")
    in_x = [("a.JPG", "image"), ("clip.mp4", "video"), ("deep/b.tif", "image"), dicom]
    assert names(x) == in_x and find_inputs([x])[0] == x
    assert names(x / "a.JPG") == in_x[:1] and names(f"{tree}/x/*.mp4") == in_x[1:2]
    assert names(x / "notes.txt") == [("notes.txt", "image")], "it was named"
    both = [("x/a.JPG", "image"), ("y/a.JPG", "image")]
    assert names(f"{tree}/**/a.JPG") == both
    assert names(f"{tree}/[xy]") == names(x, x / "a.JPG", y), "each file once"
    # Outputs are no inputs.
    left_out = [x / "deep" / ".." / "deep"]
    assert names(tree, leave_out=left_out) == [dicom, both[0], ("x/clip.mp4", "video"), both[1]]
    (tree / "empty").mkdir()
    for missing in (x / "none.png", x / "*.bmp", tree / "empty", x):
        with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
            find_inputs([missing], leave_out=[tree])
    # A link has its own name.
    z = tree / "z"
    z.mkdir()
    (z / "three.jpg").write_bytes(b"-")
    links = {"first.jpg": x / "a.JPG", "second.jpg": x / "a.JPG", "all": y, "four.jpg": "three.jpg"}
    for name, target in links.items():
        (z / name).symlink_to(target)
    inside = ["all/a.JPG", "four.jpg", "three.jpg"]
    for follow, expected in ((False, inside), (True, sorted([*inside, "first.jpg", "second.jpg"]))):
        taken = names(z / ".." / "z", z / "all" / "a.JPG", follow_links=follow)
        assert [name for name, _ in taken] == expected


@pytest.mark.parametrize("name", ["Musterfrau.jpg", "a.mp4", "a.txt", "a.dcm"])
def test_dicom_is_recognised_by_its_content(tree, name):
    (tree / "x" / name).write_bytes(DICOM)
    assert names(tree / "x" / name) == [(DICOM_NAME, "dicom")]
    assert names(tree / "x").count((DICOM_NAME, "dicom")) == 1, "equal files are one"
    (tree / "Musterfrau.dcm").symlink_to(tree / "none")
    ((public, kind),) = names(tree / "*.dcm")
    assert kind == "dicom" and "Musterfrau" not in public


def test_what_is_no_file_is_never_opened(predictor, image_folder, tmp_path):
    folder, done = tmp_path / "special", []
    folder.mkdir()
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(os.path.relpath(folder / "socket"))
    suffixes = ("", ".png", ".mp4", ".dcm")
    for kind, suffix in itertools.product(("pipe", "socket", "/dev/zero"), suffixes):
        (folder / f"link to {os.path.basename(kind)}{suffix}").symlink_to(folder / kind)
    paths = sorted(folder.iterdir())
    shutil.copy(image_folder / "a.png", folder)

    def work():
        for path in paths:
            with contextlib.suppress(BadInputError):
                done.append(find_inputs([path, image_folder / "a.png"]))
        done.append(predict_files(predictor, [folder], tmp_path / "out"))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)  # a pipe would block it for ever
    (summary,) = done
    assert summary.images == 1 and summary.failed == [], "of a folder, only files are taken"
    for kind in ("image", "video", "dicom"):  # as of one that was replaced in the meantime
        with pytest.raises(BadInputError, match="special/pipe"):
            next(read_frames(Source(folder / "pipe", "pipe", kind)))


# 29.97 frames a second, with a gap.
TIMES = [Fraction(1001 * number, 30000) for number in (0, 1, 2, 10, 11, 12, 40, 41)]


@pytest.mark.parametrize(
    "size, aspect",
    [((60, 80), None), ((61, 81), Fraction(16, 11)), ((60, 80), Fraction(8, 9)), ((60, 80), 1)],
)
def test_round_trip(tmp_path, size, aspect):
    path = tmp_path / "v.mp4"
    (tmp_path / "mine").write_text("mine")
    for name in ("v.mp4", "v.mp4.tmp"):  # not written through
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_video(path, [random_image(n, *size) for n in range(8)], TIMES, aspect)
    assert (tmp_path / "mine").read_text() == "mine"
    frames = list(decode_video(path, "v.mp4"))
    assert [(frame.number, frame.time) for frame in frames] == list(enumerate(TIMES))
    for number, frame in enumerate(frames):
        image = frame.image[: size[0], : size[1]]
        assert abs(image.astype(int) - random_image(number, *size)).mean() < 12
        assert frame.image.shape == (60 + 2 * (size[0] % 2), 80 + 2 * (size[1] % 2), 3)
        assert frame.pixel_aspect == aspect
    with av.open(str(path)) as container:  # what a player goes by
        assert container.metadata["comment"] == "τ 0.5"
        list(container.decode(video=0))
        assert container.streams.video[0].sample_aspect_ratio == aspect
    capture, times = cv2.VideoCapture(str(path)), []  # another reader
    while capture.read()[0]:
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    np.testing.assert_allclose(times, [float(time) for time in TIMES], atol=1e-3)


def test_a_writer_parts_equal_times_and_leaves_nothing_on_an_error(tmp_path):
    path = tmp_path / "v.mp4"
    with VideoWriter(path, time_base=Fraction(1, 30)) as video:
        for number, time in enumerate((0, 1, 1, 1, 2, 5)):
            video.write(random_image(number), Fraction(time, 30))
    assert [frame.time * 30 for frame in decode_video(path, path)] == [0, 1, 2, 3, 4, 5]
    path.unlink()
    with pytest.raises(KeyError), VideoWriter(path, time_base=Fraction(1)) as video:
        video.write(random_image(0), Fraction(0))
        raise KeyError
    assert not list(tmp_path.iterdir())
    # Files without video are named.
    cut = write_video(path, 8).read_bytes()[:-400]
    path.write_bytes(cut)  # without its index
    sound = tmp_path / "sound.mp4"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux([*stream.encode(frame), *stream.encode()])
    for bad in (sound, path):
        pytest.raises(BadInputError, list, decode_video(bad, bad)).match(re.escape(str(bad)))


def test_it_is_turned_and_shortened_as_the_file_says(tmp_path):
    path = write_video(tmp_path / "v.mp4", 1, aspect=Fraction(16, 11))
    data, one, last = path.read_bytes(), 1 << 16, 1 << 30
    upright = np.array([one, 0, 0, 0, one, 0, 0, 0, last], ">i4").tobytes()
    quarter = np.array([0, one, 0, -one, 0, 0, 0, 0, last], ">i4").tobytes()  # as telephones do
    at = data.index(upright, data.index(b"tkhd"))
    path.write_bytes(data[:at] + quarter + data[at + len(quarter) :])
    (frame,) = decode_video(path, path)
    assert frame.image.shape == (80, 60, 3) and frame.pixel_aspect == Fraction(11, 16)
    assert abs(frame.image - np.rot90(random_image(0), -1).astype(int)).mean() < 12
    path = film(tmp_path / "v.mov", STEADY, 4)
    head, _, rest = path.read_bytes().partition(b"elst" + bytes(7) + b"\1")  # one entry
    assert int.from_bytes(rest[:4], "big") == 4000  # ms, its duration
    path.write_bytes(head + b"elst" + bytes(7) + b"\1" + (2000).to_bytes(4, "big") + rest[4:])
    assert 38 <= len(list(decode_video(path, path))) <= 45, "it is whole"


STEADY = [Fraction(number, 20) for number in range(80)]
UNEVEN = {
    "variable rate": ([Fraction(n, 20) for n in (0, 1, 2, 30, 31, 32, 200, 201, 400)], 20),
    "a late first frame": ([3 + time for time in STEADY], 20),
    "long frames": ([Fraction(5 * n) for n in range(8)], Fraction(1, 5)),
}
UNEVEN_CASES = [
    (suffix, *UNEVEN[kind], sound)
    for suffix, kind, sound in itertools.product(["mkv", "mp4", "mov", "ts", "flv"], UNEVEN, [0, 2])
    # their muxers want sound and images closer together
    if not (kind == "long frames" and suffix in ("flv", "ts") and sound)
]


@pytest.mark.parametrize(
    "suffix, times, rate, sound",
    [*((s, STEADY, 20, n) for s, n in itertools.product(CODECS, (0, 1, 12))), *UNEVEN_CASES],
)
def test_whole_files_are_whole(tmp_path, suffix, times, rate, sound):
    path = film(tmp_path / f"v.{suffix}", times, sound, rate)
    assert len(list(decode_video(path, path))) == len(times)


@pytest.mark.parametrize("share", [0.5, 0.6])
@pytest.mark.parametrize("sound", [None, 4])
@pytest.mark.parametrize("suffix", ["mkv", "webm", "mp4", "avi", "flv", "mpg", "ts", "m2ts"])
def test_cut_files_give_their_frames_and_then_an_error(tmp_path, suffix, sound, share):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = film(tmp_path / f"v.{suffix}", STEADY, sound, **options)
    data, seen = path.read_bytes(), []
    path.write_bytes(data[: int(share * len(data)) | 1])  # not between two transport packets
    with pytest.raises(BadInputError, match=r"after \d+ frames") as error:
        for frame in decode_video(path, path):
            seen.append(frame.number)
    assert error.value.file == str(path) and 10 < len(seen) < 75


# What FFmpeg, which goes by the content, takes for a list of other files in the same folder.
PLAYLISTS = {
    "list.mp4": "ffconcat version 1.0\nfile secret.ts\n",
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "url.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nURL\n#EXT-X-ENDLIST\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>secret.ts</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "list.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 50004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "list%d.png": "",  # list1.png, list2.png, ...
}


@pytest.fixture(scope="module")
def server():
    """A socket that listens, which nobody connects to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        yield listening


@pytest.mark.parametrize("read", [lambda path: list(decode_video(path, path)), LiveFrames])
@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_opens_no_other_file(tmp_path, server, name, read):
    film(tmp_path / "secret.ts", STEADY)
    for number in range(3):
        save_image(tmp_path / f"list{number}.png", number)
    url, path = f"http://127.0.0.1:{server.getsockname()[1]}/a.ts", tmp_path / name
    path.write_text(PLAYLISTS[name].replace("URL", url))
    assert pytest.raises(BadInputError, read, path).value.file == str(path)
    pytest.raises(BlockingIOError, server.accept)  # nobody has connected
