"""Whatever a config says, alone or inside an exported file: a config, or a ValueError in a line.

Some hundred damaged ones each; for some minutes each:
``pytest -m fuzz --hypothesis-profile minute``.
"""

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import damaged_bytes, damaged_json

from imrcnn_d2.engine import load_config
from imrcnn_d2.engine.config import load_config_text

pytestmark = [pytest.mark.fuzz, pytest.mark.slow]

OPTS = ["MODEL.DEVICE", "cpu"]
DETECTOR = load_config("configs/imrcnn_R_50.yaml", OPTS).dump()
CLASSIFIER = load_config("configs/efficientnet_lite0.yaml", OPTS).dump()
VALUES = st.sampled_from(
    """*id001 *none &id001 &a [*a] {a:&b*b} !!binary !!timestamp !!int !!float !!set !!omap
    !!python/tuple ~ .nan .inf 1e999 0x1f 0b 0o9 1:60 190:20:30 2024-01-01 0001-01-01T00:00:00+23:59
    <<: --- ... ? - | > % @ ` "\\ud800" "\\0" "\\e[2J" "('a',)" "{[]:1}" "f''" "\\x9b"
    _BASE_ _BASE_: http://127.0.0.1:9/a ../a.yaml / . "" '' detectron2://../a hf-hub:a/b
    999999999999 ImageClassifier resnet18 resnet18.a resnet18.no -1 [] {} [[[[ }}} (((""".split()
)  # fmt: skip
some_hundred = settings(
    max_examples=max(200, settings().max_examples),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@st.composite
def damaged_yaml(draw, text):
    """Bytes of a config with lines and values changed; or damaged as JSON or as bytes."""
    kind = draw(st.integers(0, 3))
    if kind == 0:
        return draw(damaged_bytes(text.encode()))
    if kind == 1:
        return draw(damaged_json(yaml.safe_load(text)))
    lines = text.splitlines()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(lines) - 1))
        key, colon, _ = lines[at].partition(":")
        value = " ".join(draw(st.lists(VALUES, max_size=3)))
        kind = draw(st.sampled_from(["replace", "key", "remove", "repeat", "indent"]))
        if kind == "replace":
            lines[at] = f"{key}{colon} {value}"
        elif kind == "key":
            lines.insert(at, f"{value}{colon} {value}")
        elif kind == "repeat":
            lines[at:at] = lines[at : at + draw(st.integers(1, 9))]
        else:
            lines[at] = "" if kind == "remove" else f"  {lines[at]}"
    return "\n".join(lines).encode()


def check(load):
    try:
        cfg = load()
    except ValueError as error:
        assert type(error) is ValueError
        assert "\n" not in str(error) and len(str(error)) < 1000
        str(error).encode()  # it can be shown
    else:
        assert cfg.VERSION == 2 and "://" not in cfg.MODEL.WEIGHTS.removeprefix("detectron2://")


@given(damaged_yaml(DETECTOR) | damaged_yaml(CLASSIFIER))
@some_hundred
def test_a_config_file(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "a.yaml"
    path.write_bytes(data)
    check(lambda: load_config(path, OPTS))


TEXTS = (damaged_yaml(DETECTOR) | damaged_yaml(CLASSIFIER)).map(lambda data: data.decode("latin-1"))


@given(TEXTS | st.none() | st.booleans() | st.integers() | st.lists(st.integers()))
@some_hundred
def test_a_config_that_a_file_brings_along(text):
    check(lambda: load_config_text(text, "a.safetensors", OPTS))
