"""What a config cannot be is said in a line."""

import pytest

from imrcnn_d2.engine import load_config


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("MODEL: {NOSUCH: 1}", "Non-existent config key: MODEL.NOSUCH"),
        ("just words", "a.yaml is no config"),
        ("[1, 2]", "a.yaml is no config"),
        ("SOLVER: {MAX_ITER: many}", "a.yaml is no config"),
        ("MODEL: !!python/object/apply:eval ['1']", "no plain YAML"),
    ],
)
def test_files_that_are_no_config(tmp_path, content, said):
    path = tmp_path / "a.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_config(str(path))
    assert "a.yaml" in str(caught.value)


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.yaml: no such config file"):
        load_config(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("opts", [["MODEL.NOSUCH", "1"], ["SOLVER.MAX_ITER"], ["SEED", "x"]])
def test_overrides_that_cannot_be(opts):
    with pytest.raises(ValueError, match="KEY VALUE"):
        load_config("", opts)


def test_overrides_come_after_the_file(tmp_path):
    (tmp_path / "a.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}")
    cfg = load_config(str(tmp_path / "a.yaml"), ["SOLVER.MAX_ITER", "9"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (9, 0.5)
