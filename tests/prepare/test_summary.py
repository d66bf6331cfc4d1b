from imrcnn_d2.data.prepare.data_set import summarise
from imrcnn_d2.utils.files import BadInputError


def content(num_images, lesions, patient=None):
    """COCO with images of 10x10 and, for each (i, area, iscrowd), a lesion on image i."""
    return {
        "images": [
            {"id": i, "width": 10, "height": 10, "patient_id": patient} for i in range(num_images)
        ],
        "annotations": [
            {"image_id": i, "area": area, "bbox": [], "iscrowd": crowd}
            for i, area, crowd in lesions
        ],
    }


def test_summary():
    coco = {
        "train": content(6, [(0, 1, 0), (0, 15, 0), (1, 100, 0), (2, 30, 1)], patient="p"),
        "val": content(2, [(0, 4, 0)]),
        "test": content(2, []),
    }
    errors = [BadInputError("x.jpg", "is cut")]
    lines = summarise(coco, (12, 3, 5), ["something"], errors).splitlines()
    cells = [line.split() for line in lines]
    assert cells[1] == ["train", "6", "4", "4", "1", "6.0", "(+0.0)"]
    assert cells[2] == ["val", "2", "1", "1", "-", "1.5", "(+0.5)"]
    assert cells[3] == ["test", "2", "0", "2", "-", "2.5", "(-0.5)"]
    assert cells[6][:2] == ["10x10", "10"]
    shares = lines[lines.index("Instances by share of the image's area:") + 1 :][:7]
    assert [int(line.split("%")[1].split()[0]) for line in shares] == [0, 1, 1, 0, 1, 1, 1]
    assert lines[-5:] == ["Notes (1):", "  something", "", "Rejected (1):", "  x.jpg: is cut"]
