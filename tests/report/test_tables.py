from imrcnn_d2.report.tables import figures_table


def test_a_table_of_groups():
    groups = {
        "lesion": {"TP": 12.0, "precision": 100 / 3, "iou": float("nan")},
        "image": {"TP": 3.0, "precision": 100.0, "auroc": 97.256},
    }
    assert figures_table(groups).splitlines() == [
        "|           | lesion |  image |",
        "| --------- | -----: | -----: |",
        "| TP        |     12 |      3 |",
        "| precision |  33.33 | 100.00 |",
        "| iou       |    n/a |        |",
        "| auroc     |        |  97.26 |",
    ]
