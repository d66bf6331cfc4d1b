"""Every planted fault is found, and clean images are left alone."""

from collections import Counter

import pytest
from planted_faults import Planted

from imrcnn_d2.data.audit.audit import Audit, audit
from imrcnn_d2.data.audit.checks import groups
from imrcnn_d2.data.audit.findings import KINDS, AuditedData, finding, read_entries
from imrcnn_d2.engine.embedding import embed_images

CLEAN = 100  # thresholds were chosen on Kvasir-SEG, not on drawn images


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    planted = Planted(tmp_path_factory.mktemp("planted"))
    planted.plant_all(CLEAN)
    return planted


@pytest.fixture(scope="module")
def found(planted):
    return audit(read_entries("planted", planted.write(), planted.images), embed_images)


def test_every_kind_is_planted(planted):
    kinds = Counter(kind for kind, _ in planted.faults)
    assert sum(kinds.values()) >= 20
    assert set(kinds) == {
        key for key, kind in KINDS.items() if kind.area in ("files", "annotations", "leakage")
    }


def test_every_planted_fault_is_found(planted, found):
    said = [(finding.kind, set(finding.images)) for finding in found.findings]
    missed = [
        (kind, names)
        for kind, names in planted.faults
        if not any(kind == of and set(names) <= images for of, images in said)
    ]
    assert not missed
    # One finding for each, and what says something else of the same image is no surprise to a user.
    assert len(found.findings) <= 1.3 * len(planted.faults)


def test_clean_images_are_left_alone(planted, found):
    flagged = {name for _, name in found.flagged} & set(planted.clean)
    told = [f for f in found.findings if flagged & set(f.images)]
    assert len(flagged) <= 0.02 * len(planted.clean), told


def test_what_crosses_splits_is_an_error(planted, found):
    for one in found.findings:
        if one.kind in ("exact_duplicate", "near_duplicate"):
            crosses = len(set(one.splits)) > 1
            assert one.severity == ("error" if crosses else "warning"), one


def test_groups_hold_duplicates_and_patients(planted, found):
    together = [
        {found.data.entries[i].name for i in g}
        for g in groups(found.data.entries, found.duplicates)
    ]
    wanted = [
        set(names)
        for kind, names in planted.faults
        if kind in ("exact_duplicate", "near_duplicate", "patient_across_splits")
    ]
    assert sorted(map(sorted, together)) == sorted(map(sorted, wanted))


def test_without_embeddings_copies_are_found(planted, found):
    from imrcnn_d2.data.audit.checks import near_duplicates

    names = [entry.name for entry in found.data.entries]
    near = {(names[pair.a], names[pair.b]) for pair in near_duplicates(found.examined, None)}
    copies = [set(names) for kind, names in planted.faults if kind == "near_duplicate"][:3]
    assert [pair for pair in copies if pair not in map(set, near)] == []


def test_the_strongest_come_first():
    """Within kind and severity by score, whatever the names; areas smallest first."""
    result = Audit(AuditedData("own", (), (), ()), [], [], [])
    scores = {"tiny": (9.0, 2.0, 5.0), "blur": (0.6, 0.9, 0.7)}
    given = [
        finding(kind, [f"{number}.png"], [""], "", score=score)
        for kind, own in scores.items()
        for number, score in enumerate(own)
    ]
    error = finding("blur", ["z.png"], [""], "", score=0.1, severity="error")
    result.add([*given, error])
    assert [(found.kind, found.score) for found in result.findings] == [
        *(("blur", score) for score in (0.1, 0.9, 0.7, 0.6)),
        *(("tiny", score) for score in (2.0, 5.0, 9.0)),
    ]
