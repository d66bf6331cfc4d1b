"""Videos come out frame for frame, at the times they went in."""

import http.server
import itertools
import threading
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from imrcnn_d2.deploy.inputs import VideoWriter, decode_video
from imrcnn_d2.deploy.live import LiveFrames
from imrcnn_d2.utils.files import BadInputError

from .conftest import random_image

# 29.97 frames a second, with a gap.
TIMES = [Fraction(1001 * number, 30000) for number in (0, 1, 2, 10, 11, 12, 40, 41)]


def write(path, size=(60, 80), times=TIMES):
    with VideoWriter(path, time_base=Fraction(1, 30000), comment="τ 0.5") as video:
        for number, time in enumerate(times):
            video.write(random_image(number, *size), time)
    return path


@pytest.mark.parametrize("size", [(60, 80), (61, 81)])
def test_round_trip(tmp_path, size):
    frames = list(decode_video(write(tmp_path / "v.mp4", size), "v.mp4"))
    assert [frame.time for frame in frames] == TIMES
    assert [frame.number for frame in frames] == list(range(8))
    for number, frame in enumerate(frames):
        image = frame.image[: size[0], : size[1]]
        assert abs(image.astype(int) - random_image(number, *size)).mean() < 12
        assert frame.image.shape[0] % 2 == frame.image.shape[1] % 2 == 0
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.metadata["comment"] == "τ 0.5"


def test_another_reader_sees_the_same_times(tmp_path):
    cv2 = pytest.importorskip("cv2")
    capture = cv2.VideoCapture(str(write(tmp_path / "v.mp4")))
    times = []
    while capture.read()[0]:
        times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    np.testing.assert_allclose(times, [float(time) for time in TIMES], atol=1e-3)


def test_times_that_do_not_rise_are_parted(tmp_path):
    times = [Fraction(n, 30) for n in (0, 1, 1, 1, 2, 5)]
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 30)) as video:
        for number, time in enumerate(times):
            video.write(random_image(number), time)
    found = [frame.time * 30 for frame in decode_video(tmp_path / "v.mp4", "v.mp4")]
    assert found == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("aspect", [Fraction(16, 11), Fraction(8, 9), Fraction(1), None])
def test_pixels_keep_their_shape(tmp_path, aspect):
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 30)) as video:
        video.write(random_image(0), Fraction(0), aspect)
    (frame,) = decode_video(tmp_path / "v.mp4", "v.mp4")
    assert frame.pixel_aspect == aspect
    with av.open(str(tmp_path / "v.mp4")) as container:  # what a player goes by
        (packet, *_) = container.demux(video=0)
        (decoded,) = packet.decode() or container.streams.video[0].decode(None)
        assert (decoded.width, decoded.height) == (80, 60)
        assert container.streams.video[0].sample_aspect_ratio == aspect


def test_a_video_that_breaks_off_leaves_nothing(tmp_path):
    def break_off():
        with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 30)) as video:
            video.write(random_image(0), Fraction(0))
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert not list(tmp_path.iterdir())


def test_it_is_turned_as_the_file_says(tmp_path):
    with VideoWriter(tmp_path / "v.mp4", time_base=Fraction(1, 30)) as video:
        video.write(random_image(0), Fraction(0), Fraction(16, 11))
    data = (tmp_path / "v.mp4").read_bytes()
    one, minus = (1 << 16).to_bytes(4, "big"), (-1 << 16).to_bytes(4, "big", signed=True)
    zero, last = bytes(4), (1 << 30).to_bytes(4, "big")
    upright = one + zero * 3 + one + zero * 3 + last
    quarter = zero + one + zero + minus + zero * 4 + last  # clockwise, as telephones write it
    track = data.index(b"tkhd")
    at = data.index(upright, track)
    (tmp_path / "turned.mp4").write_bytes(data[:at] + quarter + data[at + len(quarter) :])
    (frame,) = decode_video(tmp_path / "turned.mp4", "turned.mp4")
    assert frame.image.shape == (80, 60, 3)
    assert frame.pixel_aspect == Fraction(11, 16)
    expected = np.rot90(random_image(0), -1).astype(int)
    assert abs(frame.image - expected).mean() < 12


def test_a_truncated_video_gives_its_frames_and_then_says_so(tmp_path):
    times = [Fraction(number, 10) for number in range(60)]
    whole = tmp_path / "whole.mkv"
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.gop_size = 80, 60, 5
        for number in range(len(times)):
            frame = av.VideoFrame.from_ndarray(random_image(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert len(list(decode_video(whole, whole))) == 60
    cut = tmp_path / "cut.mkv"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    seen = []
    with pytest.raises(BadInputError, match=r"cut.mkv: (is cut off|cannot be decoded).* frames"):
        for frame in decode_video(cut, cut):
            seen.append(frame.number)
    assert 10 < len(seen) < 50
    mp4 = tmp_path / "cut.mp4"
    mp4.write_bytes(write(tmp_path / "v.mp4").read_bytes()[:-400])
    with pytest.raises(BadInputError, match="cut.mp4: cannot be decoded from the start"):
        list(decode_video(mp4, mp4))


CODECS = {
    "mkv": ("mpeg4", "aac"),
    "webm": ("libvpx", "libopus"),
    "mp4": ("mpeg4", "aac"),
    "mov": ("libx264", "aac"),
    "avi": ("mpeg4", "mp3"),
    "flv": ("libx264", "aac"),
    "ts": ("libx264", "aac"),
    "m2ts": ("libx264", "aac"),
    "mpg": ("mpeg2video", "mp2"),
}


def film(path, times, sound=None, rate=20, **options):
    """Of mixed streams, as a camera with a microphone writes it; ``sound`` is its seconds."""
    kind, sound_kind = CODECS[path.suffix[1:]]
    with av.open(str(path), "w", options=options) as container:
        fast = {"preset": "veryfast", "deadline": "realtime", "cpu-used": "8"}
        video = container.add_stream(kind, rate=rate, options=fast)
        video.width, video.height, video.pix_fmt, video.gop_size = 80, 60, "yuv420p", 5
        video.time_base = video.codec_context.time_base = 1 / Fraction(rate)
        audio = container.add_stream(sound_kind, rate=48000, layout="mono") if sound else None
        samples = itertools.count(0, 960)
        noise = np.random.default_rng(0).standard_normal((1, 960)).astype(np.float32) / 10
        heard = 0
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(random_image(number), format="rgb24")
            frame.pts, frame.time_base = round(time * rate), 1 / Fraction(rate)
            container.mux(video.encode(frame))
            while sound and heard < 48000 * (sound if time == times[-1] else min(sound, time)):
                chunk = av.AudioFrame.from_ndarray(noise, "fltp", "mono")
                heard = chunk.pts = next(samples)
                chunk.sample_rate, chunk.time_base = 48000, Fraction(1, 48000)
                container.mux(audio.encode(chunk))
        for stream in container.streams:
            container.mux(stream.encode())
    return path


STEADY = [Fraction(number, 20) for number in range(80)]


@pytest.mark.parametrize("sound", [None, 1, 12], ids=lambda s: f"{s} s of sound")
@pytest.mark.parametrize("suffix", CODECS)
def test_whole_files_are_whole(tmp_path, suffix, sound):
    path = film(tmp_path / f"v.{suffix}", STEADY, sound)
    assert len(list(decode_video(path, path))) == len(STEADY)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "mov", "ts", "flv"])
@pytest.mark.parametrize(
    "times, rate",
    [
        ([Fraction(n, 20) for n in (0, 1, 2, 30, 31, 32, 200, 201, 400)], 20),  # variable rate
        ([3 + time for time in STEADY], 20),  # the first frame comes late
        ([Fraction(5 * n) for n in range(8)], Fraction(1, 5)),  # each frame is shown long
    ],
    ids=["variable", "late", "slow"],
)
@pytest.mark.parametrize("sound", [None, 2])
def test_uneven_files_are_whole(tmp_path, suffix, times, rate, sound):
    if rate != 20 and suffix in ("flv", "ts") and sound:
        pytest.skip("their muxers want sound and picture closer together")
    path = film(tmp_path / f"v.{suffix}", times, sound, rate)
    assert len(list(decode_video(path, path))) == len(times)


def test_a_file_that_an_edit_list_shortens_is_whole(tmp_path):
    data = film(tmp_path / "v.mov", STEADY, 4).read_bytes()
    at = data.index(b"elst") + 12  # version, flags, number of entries: then the first's duration
    assert int.from_bytes(data[at : at + 4], "big") == 4000  # ms
    (tmp_path / "v.mov").write_bytes(data[:at] + (2000).to_bytes(4, "big") + data[at + 4 :])
    assert 38 <= len(list(decode_video(tmp_path / "v.mov", "v.mov"))) <= 45


@pytest.mark.parametrize("share", [0.5, 0.6])
@pytest.mark.parametrize("sound", [None, 4])
@pytest.mark.parametrize("suffix", ["mkv", "webm", "mp4", "avi", "flv", "mpg", "ts", "m2ts"])
def test_cut_files_are_told(tmp_path, suffix, sound, share):
    options = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = film(tmp_path / f"v.{suffix}", STEADY, sound, **options)
    data, seen = path.read_bytes(), []
    path.write_bytes(data[: int(share * len(data)) | 1])  # not between two transport packets
    with pytest.raises(BadInputError, match=r"(is cut off: it ends|cannot be decoded) after \d+ "):
        for frame in decode_video(path, path):
            seen.append(frame.number)
    assert 10 < len(seen) < 75


def test_a_playlist_fetches_nothing(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/a.ts"
        listing = tmp_path / "list.m3u8.mp4"
        lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXTINF:1,", url, "#EXT-X-ENDLIST", ""]
        listing.write_text("\n".join(lines))
        with pytest.raises(BadInputError, match="list.m3u8.mp4: cannot be decoded"):
            list(decode_video(listing, listing))
        server.shutdown()
    assert asked == []


# What FFmpeg, which goes by the content, takes for a list of other files in the same folder.
PLAYLISTS = {
    "list.mp4": "ffconcat version 1.0\nfile secret.ts\n",
    "list.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nsecret.ts\n#EXT-X-ENDLIST\n",
    "list.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT1S" profiles="urn:mpeg:dash:profile:isoff-on-demand:2011">'
    '<Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1">'
    "<BaseURL>secret.ts</BaseURL></Representation></AdaptationSet></Period></MPD>",
    "list.sdp": "v=0\nc=IN IP4 127.0.0.1\nm=video 50004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "list%d.png": "",  # list1.png, list2.png, ...
}


@pytest.mark.parametrize("read", [lambda path: list(decode_video(path, path)), LiveFrames])
@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_opens_no_other_file(tmp_path, name, read):
    film(tmp_path / "secret.ts", STEADY)
    for number in range(3):
        Image.fromarray(random_image(number)).save(tmp_path / f"list{number}.png")
    (tmp_path / name).write_text(PLAYLISTS[name])
    with pytest.raises(BadInputError) as error:
        read(tmp_path / name)
    assert error.value.file == str(tmp_path / name)


def test_a_link_in_the_way_of_a_video_is_not_followed(tmp_path):
    (tmp_path / "own").write_text("mine")
    for name in ("v.mp4", "v.mp4.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "own")
    write(tmp_path / "v.mp4")
    assert (tmp_path / "own").read_text() == "mine"
    assert len(list(decode_video(tmp_path / "v.mp4", "v.mp4"))) == len(TIMES)


def test_sound_alone_is_no_video(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(BadInputError, match="sound.mp4: holds no video"):
        list(decode_video(path, path))
