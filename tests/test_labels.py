"""The label table: one meeting place of classes and codes, left and right."""

import json

import numpy as np
import pytest
from conftest import ROOT

from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.labels import label_mapping

MIDLINE = {"3rd-Ventricle", "4th-Ventricle", "Brain-Stem", "CSF", "Optic-Chiasm"}


def names(table, classes):
    return [table.structures[k - 1].name for k in classes]


def test_sizes(table):
    assert len(table) == 40
    assert table.n_classes == 41
    assert len(table.subset("all")) == 40
    assert len(table.subset("malc27")) == 27
    with pytest.raises(UsageError, match="subset"):
        table.subset("malc28")


def test_codes_names_and_abbreviations_are_unique(table):
    for attribute in ("code", "name", "abbreviation"):
        values = [getattr(s, attribute) for s in table.structures]
        assert len(set(values)) == len(values), attribute
    assert table.codes[0] == 0
    assert (table.codes[1:] > 0).all()


def test_mirror_is_an_involution_that_swaps_sides(table):
    mirror = table.mirror_classes
    np.testing.assert_array_equal(mirror[mirror], np.arange(table.n_classes))
    for k, s in enumerate(table.structures, start=1):
        (partner,) = names(table, [mirror[k]])
        swap = {"Left": "Right", "Right": "Left"}
        side, _, rest = s.name.partition("-")
        assert partner == (f"{swap[side]}-{rest}" if side in swap else s.name)
    assert {s.name for s in table.structures if s.mirror == s.code} >= MIDLINE


def test_each_neuromorphometrics_id_belongs_to_one_structure(table):
    ids = [s.neuromorphometrics for s in table.structures]
    assert len(set(ids)) == len(ids)
    mapping = table.neuromorphometrics_mapping()
    assert set(mapping.values()) == set(range(1, 41))
    single = [source for source in mapping if source < 100]
    assert len(single) == 38


def test_cortical_parcels_are_odd_left_even_right(table):
    mapping = table.neuromorphometrics_mapping()
    for parcel in range(100, 208):
        side = "Left" if parcel % 2 else "Right"
        assert names(table, [mapping[parcel]]) == [f"{side}-Cerebral-Cortex"]


def test_subset_agrees_with_the_reference(table):
    path = ROOT.parent / "shared" / "reference" / "malc27.json"
    if not path.exists():
        pytest.skip(f"reference table: no {path}")
    mapping = table.neuromorphometrics_mapping()
    found = set()
    for row in json.loads(path.read_text())["structures"]:
        # Several ids mean the cortex, whose parcels must all land in one class.
        (k,) = {mapping[source] for source in row["neuromorphometrics_ids"] if source in mapping}
        s = table.structures[k - 1]
        assert s.name.split("-")[0].lower() in row["name"].lower()
        if row.get("freesurfer_aseg_id"):
            assert s.code == row["freesurfer_aseg_id"]
        found.add(k)
    assert found == set(table.subset("malc27"))


def test_encoding_our_own_codes_inverts(table):
    classes = np.arange(41).reshape(1, 1, 41)
    codes = table.codes[classes]
    np.testing.assert_array_equal(table.encode(codes, table.identity_mapping()), classes)


def test_encoding_drops_what_it_does_not_know(table):
    codes = np.array([0, 2, 3, 1999, 7])
    mapping = {2: 5, 7: 40, 100_000: 3}
    np.testing.assert_array_equal(table.encode(codes, mapping), [0, 5, 0, 0, 40])
    with pytest.raises(DataError, match="-3"):
        table.encode(np.array([-3, 1]), mapping)


def test_a_callosum_without_sides_is_shared_out(table):
    """Each voxel goes to the side whose labelled white matter is nearer."""
    ids = np.zeros((9, 3, 3), dtype=np.int16)
    ids[0:2], ids[7:9], ids[3:6] = 44, 45, 95
    classes = table.encode(ids, table.dlmuse_mapping())
    found = [names(table, [k])[0] for k in classes[[0, 3, 5, 8], 1, 1]]
    assert found == ["Right-Cerebral-White-Matter"] * 2 + ["Left-Cerebral-White-Matter"] * 2
    assert not classes[[2, 6]].any()
    # With no neighbour that has a side it is all on one, but not lost.
    assert set(np.unique(table.encode(np.full((2, 2, 2), 95), table.dlmuse_mapping()))) == {
        table.dlmuse_mapping()[45]
    }


def test_dlmuse_is_neuromorphometrics_with_parcelled_white_matter(table):
    mapping, manual = table.dlmuse_mapping(), table.neuromorphometrics_mapping()
    assert {k: mapping[k] for k in manual} == manual
    right, left = manual[44], manual[45]
    assert {mapping[k] for k in range(81, 95, 2)} == {right}
    assert {mapping[k] for k in range(82, 95, 2)} == {left}
    assert mapping[1] == 0  # sulcal CSF is no structure


def test_label_mappings(table, tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("source\tindex\n1\t10\n2\t49\n3\t0\n")
    classes = label_mapping(str(path), table)
    assert {source: int(table.codes[k]) for source, k in classes.items()} == {1: 10, 2: 49, 3: 0}
    assert label_mapping("cadiff", table)[10] == classes[1]
    assert label_mapping("neuromorphometrics", table)[60] == classes[1]
    # FreeSurfer's own extras join the structure that they lie in; the rest is as we write it.
    freesurfer = label_mapping("freesurfer", table)
    assert freesurfer[10] == classes[1]
    assert freesurfer[31] == freesurfer[4] != freesurfer[63] == freesurfer[43]
    assert freesurfer[251] == -freesurfer[2]  # of either side
    assert label_mapping("dlmuse", table)[60] == classes[1]
    path.write_text("source\tindex\n1\t-2\n")
    assert label_mapping(str(path), table) == {1: freesurfer[251]}
    path.write_text("source\tindex\n1\t1999\n")
    with pytest.raises(DataError, match="1999"):
        label_mapping(str(path), table)
    path.write_text("source\tindex\n10\t10\n17\t17\n-1\t0\n")
    with pytest.raises(DataError, match="-1"):  # it would count from the end
        label_mapping(str(path), table)
    path.write_text("source\tindex\n7\t10\n8\t10\n7\t17\n7\t10\n")
    with pytest.raises(DataError, match=r"\[7\] to several"):
        label_mapping(str(path), table)
    path.write_text("from\tto\n1\t2\n")
    with pytest.raises(DataError, match="mapping"):
        label_mapping(str(path), table)
    with pytest.raises(MissingInputError):
        label_mapping("no-such-mapping", table)


def test_label_maps_may_be_stored_as_floats(table):
    """Scaled and cast on the way, as some writers do: whole numbers are meant."""
    mapping = table.identity_mapping()
    codes = np.array([[[0.0, 2.9999, 41.00001, 10.0]]])
    classes = table.encode(codes, mapping)
    assert classes.ravel().tolist() == [0, mapping[3], mapping[41], mapping[10]]
    with pytest.raises(DataError, match="NaN"):
        table.encode(np.array([[[np.nan]]]), mapping)


def test_freesurfers_parcels_are_what_they_are_parts_of(table):
    mapping = table.freesurfer_mapping()
    parts = {3: (1000, 1035, 11175), 42: (2000, 2035, 12175), 2: (3001, 5001), 41: (4035, 5002)}
    for whole, codes in parts.items():
        assert {mapping[code] for code in codes} == {mapping[whole]}


def test_a_mapping_may_come_from_a_spreadsheet(table, tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("source\tindex\n7\t10\n", encoding="utf-8-sig")
    assert label_mapping(str(path), table) == {7: table.identity_mapping()[10]}
    path.write_text("source\tindex\n7\t10\n", encoding="utf-16")
    with pytest.raises(DataError, match="not a mapping"):
        label_mapping(str(path), table)
