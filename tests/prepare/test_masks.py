"""Components against SciPy's labelling, annotations against pycocotools and NumPy."""

import numpy as np
import pycocotools.mask as mask_util
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from imrcnn_d2.data.masks import annotation_from_mask, components

masks = arrays(bool, st.tuples(st.integers(1, 14), st.integers(1, 14)))


@given(masks, st.integers(1, 5))
@settings(max_examples=200)
def test_components(mask, min_area):
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    wanted = {
        (labels == i).tobytes() for i in range(1, count + 1) if (labels == i).sum() >= min_area
    }
    found, specks = components(mask, min_area)
    found = list(found)
    assert {part.tobytes() for part in found} == wanted
    assert len(found) == len(wanted)
    assert specks == count - len(wanted)


def test_components_are_in_raster_order():
    mask = np.zeros((6, 6), bool)
    mask[4, 0] = mask[0, 4] = mask[2, 2] = True
    assert [part.argmax() for part in components(mask, 1)[0]] == [4, 14, 24]


def test_a_mask_of_noise_is_refused():
    """A small PNG can hold millions of components."""
    mask = np.zeros((80, 80), bool)
    mask[::2, ::2] = True
    with pytest.raises(ValueError, match="1600 separate parts"):
        components(mask, 1)
    assert components(mask, 2)[1] == 1600


@given(masks.filter(np.any))
def test_annotation(mask):
    annotation = annotation_from_mask(mask, 3, lesion_id="x")
    rows, columns = np.nonzero(mask)
    assert annotation["bbox"] == [
        columns.min(),
        rows.min(),
        columns.max() - columns.min() + 1,
        rows.max() - rows.min() + 1,
    ]
    assert annotation["area"] == mask.sum()
    assert np.array_equal(mask_util.decode(annotation["segmentation"]), mask)
    rest = {"category_id": 3, "iscrowd": 0, "lesion_id": "x"}
    assert {key: annotation[key] for key in rest} == rest
