import pytest

from imrcnn_d2.report.names import PAPER_DATA, published_values


def values(dataset, table):
    return {
        (row.model, row.figure): (row.value, row.sd) for row in published_values(dataset, table)
    }


def test_the_values_of_the_data_set():
    assert values("kvasir_seg_test", "3")["IMR-CNN", "segm/AP50_voc"] == (91.6, None)
    assert values("egc_val", "3")["IMR-CNN", "lesion/iou"] == (79.1, None)
    assert values("egc_test", "4")["MR-CNN", "segm/AP50_voc"] == (90.6, 0.4)
    assert len(values("kvasir_seg_test", "3")) == len(values("egc_test", "4")) == 6
    # The paper has neither folds nor an operating point for Kvasir-SEG.
    assert not values("kvasir_seg_test", "4") and not values("kvasir_seg_test", "5")


@pytest.mark.parametrize("dataset", [None, "", "synthetic_test", "kvasir_segment", "egc2_test"])
def test_no_values_for_other_data(dataset):
    assert not any(published_values(dataset, table) for table in "345")


def test_f1_is_that_of_the_published_precision_and_recall():
    table = {row.figure: row for row in published_values("egc_test", "5")}
    precision, recall = (table[f"lesion/{name}"].value for name in ("precision", "recall"))
    f1 = 2 * precision * recall / (precision + recall)
    assert table["lesion/f1"].value == pytest.approx(f1, abs=0.06)


def test_what_cannot_be_compared_says_why():
    rows = published_values("egc_test", "5")
    assert {row.figure for row in rows if not row.comparable} == {
        "lesion/specificity",
        "lesion/accuracy",
    }
    for dataset in PAPER_DATA:
        for table in "345":
            for row in published_values(f"{dataset}_test", table):
                assert row.remarks
                assert row.comparable == ("Not comparable" not in row.remarks[0])
