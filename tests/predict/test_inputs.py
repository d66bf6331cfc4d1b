"""Which files are taken, under which names: images, videos frame for frame, DICOM files."""

import contextlib
import hashlib
import io
import itertools
import os
import re
import resource
import shutil
import socket
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import cv2
import numpy as np
import pytest
from dicoms import PATIENT, write_dicom
from hypothesis import given
from hypothesis import strategies as st
from mutations import damaged_bytes
from PIL import Image
from pydicom.uid import JPEGBaseline8Bit

from imrcnn_d2.data.formats import Sample
from imrcnn_d2.data.images import inspect_image, is_dicom, read_header, read_image, read_still
from imrcnn_d2.data.prepare.metadata import patients_from_dicom
from imrcnn_d2.deploy import inputs, predict_files
from imrcnn_d2.deploy.inputs import decode_video, find_inputs, public_name, read_dicom
from imrcnn_d2.deploy.live import LiveFrames
from imrcnn_d2.utils.files import BadInputError, Rejects

from .conftest import CODECS, film, in_time, random_image, save_image, some_hundred, write_video

DICOM = bytes(128) + b"DICM"
DICOM_NAME = f"dicom-{hashlib.sha256(DICOM).hexdigest()[:16]}.dcm"


@pytest.fixture
def tree(tmp_path):
    (tmp_path / "x" / "deep").mkdir(parents=True)
    (tmp_path / "y").mkdir()
    for name in "x/a.JPG x/clip.mp4 x/notes.txt x/.hidden.png x/deep/b.tif y/a.JPG".split():
        (tmp_path / name).write_bytes(b"-")
    (tmp_path / "x" / "IM0001").write_bytes(DICOM)
    return tmp_path


def names(*paths, **options):
    return [(source.name, source.kind) for source in find_inputs(paths, **options)[1]]


def test_files_folders_and_patterns(tree):
    x, y, dicom = tree / "x", tree / "y", (DICOM_NAME, "dicom")
    in_x = [("a.JPG", "image"), ("clip.mp4", "video"), ("deep/b.tif", "image"), dicom]
    assert names(x) == in_x and find_inputs([x])[0] == x
    assert names(x / "a.JPG") == in_x[:1] and names(f"{tree}/x/*.mp4") == in_x[1:2]
    assert names(x / "notes.txt") == [("notes.txt", "image")], "it was named"
    both = [("x/a.JPG", "image"), ("y/a.JPG", "image")]
    assert names(f"{tree}/**/a.JPG") == both
    assert names(f"{tree}/[xy]") == names(x, x / "a.JPG", y), "each file once"
    left_out = [x / "deep" / ".." / "deep"]  # outputs are no inputs
    assert names(tree, leave_out=left_out) == [dicom, both[0], ("x/clip.mp4", "video"), both[1]]
    z = tree / "z"
    z.mkdir()
    for missing in (x / "none.png", x / "*.bmp", z, x):
        with pytest.raises(FileNotFoundError, match=re.escape(str(missing))):
            find_inputs([missing], leave_out=[tree])
    # A link has its own name.
    (z / "three.jpg").write_bytes(b"-")
    links = {"first.jpg": x / "a.JPG", "second.jpg": x / "a.JPG", "all": y, "four.jpg": "three.jpg"}
    for name, target in links.items():
        (z / name).symlink_to(target)
    inside = ["all/a.JPG", "four.jpg", "three.jpg"]
    for follow, more in ((False, []), (True, ["first.jpg", "second.jpg"])):
        taken = names(z / ".." / "z", z / "all" / "a.JPG", follow_links=follow)
        assert [name for name, _ in taken] == sorted([*inside, *more])


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
    for kind, suffix in itertools.product(("pipe", "socket", "/dev/zero"), ("", ".png", ".dcm")):
        (folder / f"link to {os.path.basename(kind)}{suffix}").symlink_to(folder / kind)
    paths = sorted(folder.iterdir())
    shutil.copy(image_folder / "a.png", folder)

    def work():
        for path in paths:
            with contextlib.suppress(BadInputError):
                done.append(find_inputs([path, image_folder / "a.png"]))
        done.append(predict_files(predictor, [folder], tmp_path / "out"))

    in_time(work)  # a pipe would block it for ever
    (summary,) = done
    assert summary.images == 1 and summary.failed == [], "of a folder, only files are taken"
    for kind in ("image", "video", "dicom"):  # as of one that was replaced in the meantime
        with pytest.raises(BadInputError, match="special/pipe"):
            next(inputs.read_frames(inputs.Source(folder / "pipe", "pipe", kind)))


# 29.97 frames a second, with a gap.
MOMENTS = [Fraction(1001 * number, 30000) for number in (0, 1, 2, 10, 11, 12, 40, 41)]


@pytest.mark.parametrize("odd, aspect", [(0, None), (1, Fraction(16, 11)), (0, 1)])
def test_round_trip(tmp_path, odd, aspect):
    path, size = tmp_path / "v.mp4", (60 + odd, 80 + odd)
    (tmp_path / "mine").write_text("mine")
    for name in ("v.mp4", "v.mp4.tmp"):  # not written through
        (tmp_path / name).symlink_to(tmp_path / "mine")
    write_video(path, [random_image(n, *size) for n in range(8)], MOMENTS, aspect)
    assert (tmp_path / "mine").read_text() == "mine"
    frames = list(decode_video(path, "v.mp4"))
    assert [(frame.number, frame.time) for frame in frames] == list(enumerate(MOMENTS))
    for number, frame in enumerate(frames):
        image = frame.image[: size[0], : size[1]]
        assert abs(image.astype(int) - random_image(number, *size)).mean() < 12
        assert frame.image.shape == (60 + 2 * odd, 80 + 2 * odd, 3)
        assert frame.pixel_aspect == aspect
    with av.open(str(path)) as container:  # what a player goes by
        assert container.metadata["comment"] == "τ 0.5"
        list(container.decode(video=0))
        assert container.streams.video[0].sample_aspect_ratio == aspect
    capture, times = cv2.VideoCapture(str(path)), []  # another reader
    while capture.read()[0]:
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    np.testing.assert_allclose(times, [float(time) for time in MOMENTS], atol=1e-3)


def test_a_writer_parts_equal_times_and_leaves_nothing_on_an_error(tmp_path):
    path = tmp_path / "v.mp4"
    with inputs.VideoWriter(path, time_base=Fraction(1, 30)) as video:
        for number, time in enumerate((0, 1, 1, 1, 2, 5)):
            video.write(random_image(number), Fraction(time, 30))
    assert [frame.time * 30 for frame in decode_video(path, path)] == [0, 1, 2, 3, 4, 5]
    path.unlink()
    with pytest.raises(KeyError), inputs.VideoWriter(path, time_base=Fraction(1)) as video:
        video.write(random_image(0), Fraction(0))
        raise KeyError
    assert not list(tmp_path.iterdir())
    # Files without video are named.
    path.write_bytes(write_video(path, 8).read_bytes()[:-400])  # without its index
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
UNEVEN = [
    ([Fraction(n, 20) for n in (0, 1, 2, 30, 31, 32, 200, 201, 400)], 20),
    ([3 + time for time in STEADY], 20),  # a late first frame
    ([Fraction(5 * n) for n in range(8)], Fraction(1, 5)),  # long frames
]
WHOLE = [
    *((suffix, STEADY, 20, sound) for suffix in CODECS for sound in (0, 1, 12)),
    *((s, *times, 0) for s in ("mkv", "mp4", "mov", "ts", "flv") for times in UNEVEN),
    # others' muxers want sound and images closer together
    *((suffix, *times, 2) for suffix in ("mkv", "mp4", "mov") for times in UNEVEN),
]


@pytest.mark.parametrize("suffix, times, rate, sound", WHOLE)
def test_whole_files_are_whole(tmp_path, suffix, times, rate, sound):
    path = film(tmp_path / f"v.{suffix}", times, sound, rate)
    frames = list(decode_video(path, path))
    assert len(frames) == len(times)
    if suffix in ("ts", "m2ts", "mpg"):  # whose streams begin at any time
        assert 0 <= frames[0].time < Fraction(1, 2)


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


def test_a_frame_has_no_more_pixels_than_an_image(tmp_path, monkeypatch):
    path = film(tmp_path / "v.mp4", STEADY[:3])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60)
    assert len(list(decode_video(path, path))) == 3
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 80 * 60 - 1)
    pytest.raises(BadInputError, list, decode_video(path, path)).match("v.mp4: has 80x60 = 4800")


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


H264, JPEG_LOSSLESS = "1.2.840.10008.1.2.4.102", "1.2.840.10008.1.2.4.70"
PIXEL_DATA = b"\xe0\x7f\x10\0"


def jpeg(path):
    """A still, compressed as endoscopes write it."""
    stream = io.BytesIO()
    Image.fromarray(random_image(0)).save(stream, "JPEG", quality=95)
    fields = {"syntax": JPEGBaseline8Bit, "PhotometricInterpretation": "YBR_FULL_422"}
    return write_dicom(path, random_image(0), encoded=[stream.getvalue()], **fields)


def test_stills_and_videos(tmp_path):
    path = write_dicom(tmp_path / "still", random_image(0))
    assert is_dicom(path)
    (frame,) = read_dicom(path)
    assert (frame.image == random_image(0)).all() and frame.number is frame.time is None
    (frame,) = read_dicom(jpeg(tmp_path / "jpeg.dcm"))
    assert abs(frame.image.astype(int) - random_image(0)).mean() < 4, "its colours are right"
    frames = np.stack([random_image(number) for number in range(5)])
    video = write_video(tmp_path / "v.mp4", 5).read_bytes()
    path = write_dicom(tmp_path / "v.dcm", frames, encoded=[video], syntax=H264)
    decoded = list(read_dicom(path))
    assert [frame.time for frame in decoded] == [Fraction(number, 25) for number in range(5)]
    assert all(abs(f.image.astype(int) - frames[f.number]).mean() < 12 for f in decoded)


RATES = "CineRate", "RecommendedDisplayFrameRate"
STEPS = (
    "40",
    ["0", "40"],
    ["0", "-40", "40"],
    ["-1", "40", "40"],
    ["0", "0", "1"],
    ["0", "1", "1e300"],
)
TIMES = [
    ({"FrameTime": "33.25"}, [Fraction(133, 4000) * n for n in range(3)]),
    ({"FrameTime": "86400000"}, [86400 * n for n in range(3)]),
    ({"FrameTimeVector": ["0", "40", "86400000"]}, [0, Fraction(1, 25), 86400 + Fraction(1, 25)]),
    *(({key: "25"}, [Fraction(n, 25) for n in range(3)]) for key in RATES),
    *((fields, [None] * 3) for fields in ({}, {"FrameTime": "-40"}, {"FrameTime": "1e300"})),
    *(({"FrameTimeVector": steps}, [None] * 3) for steps in STEPS),
]


@pytest.mark.parametrize("fields, times", TIMES)
def test_several_frames(tmp_path, fields, times):
    frames = np.stack([random_image(seed) for seed in range(3)])
    stack = list(read_dicom(write_dicom(tmp_path / "a.dcm", frames, **fields)))
    assert [(frame.number, frame.time) for frame in stack] == list(enumerate(times))
    assert all((frame.image == frames[n]).all() for n, frame in enumerate(stack))


def test_gray_of_many_bits(tmp_path):
    ramp = np.linspace(0, 4095, 256).astype(np.uint16).reshape(16, 16)
    expected = np.rint(np.linspace(0, 255, 256)).reshape(16, 16)
    window = {"WindowCenter": "1024", "WindowWidth": "2048"}
    for pixels, fields, gray in (
        (ramp, {}, expected),
        (ramp, {"PhotometricInterpretation": "MONOCHROME1"}, expected[::-1, ::-1]),
        (ramp.astype(np.int16) - 2048, {}, expected),
        (ramp, window, np.clip(2 * expected, 0, 255)),
    ):
        path = write_dicom(tmp_path / "a.dcm", pixels, BitsStored=12, HighBit=11, **fields)
        (frame,) = read_dicom(path)
        assert abs(frame.image - gray[:, :, None]).max() <= 1


def damaged(path, old, new):
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))
    return path


def test_names_of_patients_and_of_bad_files(tmp_path):
    pixels = random_image(0)
    path = write_dicom(tmp_path / "file", pixels)
    name = f"dicom-{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}.dcm"
    assert public_name(path) == public_name(path.rename(tmp_path / "ERIKA.dcm")) == name
    assert len({public_name(tmp_path / "erika.dcm") for _ in range(2)}) == 2, "not from the name"
    assert inputs.may_show_patient(write_dicom(tmp_path / "a", pixels, BurnedInAnnotation="YES"))
    assert not inputs.may_show_patient(write_dicom(tmp_path / "a", pixels))
    assert not inputs.may_show_patient(write_dicom(tmp_path / "b", BurnedInAnnotation="NO"))
    lossless = {"encoded": [b"\xff\xd8\xff\xd9"], "syntax": JPEG_LOSSLESS}
    digits = write_dicom(tmp_path / "digits", np.stack([pixels] * 2), FrameTime="1e1")
    damaged(digits, b"DS\4\x001e1 ", b"DS\x0c\x001e9999999999")
    (tmp_path / "junk").write_bytes(b"junk")
    for path, reason in {
        write_dicom(tmp_path / "report"): "without an image",
        write_dicom(tmp_path / "cut", pixels, Rows=1000): "pixels",
        write_dicom(tmp_path / "x", pixels, **lossless): "gdcm",
        write_dicom(tmp_path / "rows", pixels, Rows=None): "rows or columns",
        write_dicom(tmp_path / "columns", pixels, Columns=0): "rows or columns",
        digits: "no readable DICOM file",
        tmp_path / "junk": "no readable DICOM file",
        tmp_path / "Musterfrau": "No such file",
    }.items():
        with pytest.raises(BadInputError, match=reason) as caught:
            list(read_dicom(path))
        assert caught.value.file == str(path) and "Musterfrau" not in caught.value.reason
    assert not is_dicom(tmp_path / "junk") and not is_dicom(tmp_path / "none")


# Of one element its length, or what it is: what follows is then read as a part of it.
MONOCHROME = b"\x28\0\x04\0CS\x0c\0MONOCHROME2 ", b"\x28\0\x04\0CS\x0c\0MUSTERFRAU  "
DAMAGES = {
    "length of a syntax": (b"\x02\0\x10\0UI\x14\0", b"\x02\0\x10\0UI\xff\0"),
    "name for a number": (b"\x10\0\x10\0PN", b"\x28\0\x08\0IS"),
    "name for an interpretation": MONOCHROME,
    "a syntax": (b"1.2.840.10008.1.2.1\0", b"1.2.840.Musterfrau1\0"),
    "a character set": (b"\x10\0\x10\0PN", b"\x08\0\x05\0CS"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_message_quotes_the_file(predictor, tmp_path, capfd, caplog, damage):
    web = pytest.importorskip("imrcnn_d2.deploy.web", reason="the demo extra is not installed")
    path, out = tmp_path / "a.dcm", tmp_path / "out"
    damaged(write_dicom(path, random_image(0)[:, :, 0]), *DAMAGES[damage])
    os.utime(path, (0, 0))  # else the journal's time could contain such digits by chance
    sample = Sample("a.png", SimpleNamespace(path=path), [], {})
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        failed, rejects = predict_files(predictor, [path], out).failed, Rejects("reject")
        for read in (inspect_image, read_image, lambda _: patients_from_dicom()(sample)):
            with rejects.catch():
                read(path)
        finding = web.find(predictor, Path(shutil.copy(path, tmp_path / "a")), "a")
    messages = [*failed, finding.error, *(each.reason for each in rejects.errors), caplog.text]
    messages += [*(each.message for each in warned), *capfd.readouterr()]
    messages += [file.read_text() for file in out.iterdir()]
    parts = [part for value in PATIENT.values() for part in value.replace("-", "^").split("^")]
    parts += [uid.decode() for uid in re.findall(rb"1\.2\.826\.[0-9.]{20,}", path.read_bytes())]
    everything = " ".join(map(str, messages)).lower()
    for word in parts:
        assert word.lower() not in everything, (word, everything)


@pytest.fixture(scope="module")
def contents(tmp_path_factory):
    """Of files of each kind, the bytes up to the pixels, of a JPEG all, and the rest."""
    path = tmp_path_factory.mktemp("kinds") / "a.dcm"
    parts = [(jpeg(path).read_bytes(), b"")]
    for pixels, fields in (
        (random_image(0), {"BurnedInAnnotation": "NO"}),
        (np.arange(4800, dtype=np.uint16).reshape(60, 80), {}),
        (np.stack([random_image(0)] * 2), {"FrameTime": "40"}),
    ):
        head, tag, rest = write_dicom(path, pixels, **fields).read_bytes().partition(PIXEL_DATA)
        parts.append((head, tag + rest))
    return parts


@some_hundred
@given(st.data())
def test_fuzz_dicom(tmp_path_factory, contents, data):
    root = tmp_path_factory.mktemp("dicom")
    head, pixels = data.draw(st.sampled_from(contents))
    (root / "a.dcm").write_bytes(data.draw(damaged_bytes(head)) + pixels)
    pages = int(Path("/proc/self/statm").read_text().split()[0])  # of this process now
    limits, memory = resource.getrlimit(resource.RLIMIT_AS), pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory + 4 * 2**30, limits[1]))
    try:
        for read in (
            read_header,
            inputs.may_show_patient,
            read_still,
            lambda p: list(read_dicom(p)),
        ):
            try:
                read(root / "a.dcm")
            except BadInputError as error:
                assert "usterfrau" not in error.reason.lower()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    shutil.rmtree(root)
