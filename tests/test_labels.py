"""Parcellations: the one meeting place of classes and codes, left and right, fine and coarse."""

import json
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from conftest import LOBES, ROOT

from cadiff_cli.errors import DataError, MissingInputError, UsageError
from cadiff_cli.labels.parcellation import (
    BASE,
    Parcellation,
    Structure,
    load_parcellation,
    parse,
    shipped_names,
)
from cadiff_cli.labels.schemes import load_scheme, scheme_names

MIDLINE = {"3rd-Ventricle", "4th-Ventricle", "Brain-Stem", "CSF", "Optic-Chiasm"}


def names(parcellation, classes):
    return [parcellation.structures[k - 1].name for k in classes]


def test_sizes(parcellation):
    assert len(parcellation) == 40
    assert parcellation.n_classes == 41
    assert len(parcellation.subset("all")) == 40
    assert len(parcellation.subset("malc27")) == 27
    with pytest.raises(UsageError, match="subset"):
        parcellation.subset("malc28")


def test_codes_names_and_abbreviations_are_unique(parcellation):
    for attribute in ("code", "name", "abbreviation"):
        values = [getattr(s, attribute) for s in parcellation.structures]
        assert len(set(values)) == len(values), attribute
    assert parcellation.codes[0] == 0
    assert (parcellation.codes[1:] > 0).all()


def test_mirror_is_an_involution_that_swaps_sides(parcellation):
    mirror = parcellation.mirror_classes
    np.testing.assert_array_equal(mirror[mirror], np.arange(parcellation.n_classes))
    for k, s in enumerate(parcellation.structures, start=1):
        (partner,) = names(parcellation, [mirror[k]])
        swap = {"Left": "Right", "Right": "Left"}
        side, _, rest = s.name.partition("-")
        assert partner == (f"{swap[side]}-{rest}" if side in swap else s.name)
    assert {s.name for s in parcellation.structures if s.mirror == s.code} >= MIDLINE


@pytest.mark.parametrize("name", shipped_names())
def test_pairs_are_left_and_right_whichever_code_is_lower(name):
    """Neuromorphometrics' parcels of the right have the lower codes."""
    parcellation = load_parcellation(name)
    for left, right in parcellation.pairs:
        assert left.name == f"Left-{left.shared_name}"
        assert right.name == f"Right-{left.shared_name}"
        assert parcellation.left_codes[right.code] == parcellation.left_codes[left.code]
    together = [s for members in parcellation.joined for s in members]
    assert sorted(s.code for s in together) == sorted(s.code for s in parcellation.structures)
    alone = [members[0] for members in parcellation.joined if len(members) == 1]
    assert {s.name for s in alone} == {s.name for s in together if s.mirror == s.code}


def test_neuromorphometrics_reaches_every_structure(parcellation):
    mapping = load_scheme("neuromorphometrics", parcellation)
    assert set(mapping.values()) == set(range(1, 41))
    single = [source for source in mapping if source < 100]
    assert len(single) == len({mapping[source] for source in single}) == 38


def test_cortical_parcels_are_odd_left_even_right(parcellation):
    mapping = load_scheme("neuromorphometrics", parcellation)
    for parcel in range(100, 208):
        side = "Left" if parcel % 2 else "Right"
        assert names(parcellation, [mapping[parcel]]) == [f"{side}-Cerebral-Cortex"]


def test_subset_agrees_with_the_reference(parcellation):
    path = ROOT.parent / "shared" / "reference" / "malc27.json"
    if not path.exists():
        pytest.skip(f"reference table: no {path}")
    mapping = load_scheme("neuromorphometrics", parcellation)
    found = set()
    for row in json.loads(path.read_text())["structures"]:
        # Several ids mean the cortex, whose parcels must all land in one class.
        (k,) = {mapping[source] for source in row["neuromorphometrics_ids"] if source in mapping}
        s = parcellation.structures[k - 1]
        assert s.name.split("-")[0].lower() in row["name"].lower()
        if row.get("freesurfer_aseg_id"):
            assert s.code == row["freesurfer_aseg_id"]
        found.add(k)
    assert found == set(parcellation.subset("malc27"))


def test_encoding_our_own_codes_inverts(parcellation):
    classes = np.arange(41).reshape(1, 1, 41)
    codes = parcellation.codes[classes]
    np.testing.assert_array_equal(parcellation.encode(codes, parcellation.class_of), classes)


def test_encoding_drops_what_it_does_not_know(parcellation):
    codes = np.array([0, 2, 3, 1999, 7])
    mapping = {2: 5, 7: 40, 100_000: 3}
    np.testing.assert_array_equal(parcellation.encode(codes, mapping), [0, 5, 0, 0, 40])
    with pytest.raises(DataError, match="-3"):
        parcellation.encode(np.array([-3, 1]), mapping)


def test_a_callosum_without_sides_is_shared_out(parcellation):
    """Each voxel goes to the side whose labelled white matter is nearer."""
    ids = np.zeros((9, 3, 3), dtype=np.int16)
    ids[0:2], ids[7:9], ids[3:6] = 44, 45, 95
    classes = parcellation.encode(ids, load_scheme("dlmuse", parcellation))
    found = [names(parcellation, [k])[0] for k in classes[[0, 3, 5, 8], 1, 1]]
    assert found == ["Right-Cerebral-White-Matter"] * 2 + ["Left-Cerebral-White-Matter"] * 2
    assert not classes[[2, 6]].any()
    # With no neighbour that has a side it is all on one, but not lost.
    assert set(
        np.unique(parcellation.encode(np.full((2, 2, 2), 95), load_scheme("dlmuse", parcellation)))
    ) == {load_scheme("dlmuse", parcellation)[45]}


def test_the_order_of_axes_decides_nothing_about_a_callosum(parcellation):
    """Voxels that are as near to both sides go to the same one, however the map is stored."""
    rng = np.random.default_rng(0)
    ids = np.zeros((15, 11, 9), dtype=np.int16)
    ids[:7], ids[8:], ids[7] = 44, 45, 95
    ids[rng.random(ids.shape) < 0.5] = 0
    mapping, spacing_mm = load_scheme("dlmuse", parcellation), np.array([1.0, 2.0, 3.0])
    wanted = parcellation.encode(ids, mapping, spacing_mm)
    for order in permutations(range(3)):
        for flips in ((), (0,), (0, 1, 2)):
            stored = np.flip(ids, flips).transpose(order)
            found = parcellation.encode(stored, mapping, spacing_mm[list(order)])
            again = np.flip(found.transpose(np.argsort(order)), flips)
            np.testing.assert_array_equal(again, wanted)


def test_nearer_is_meant_in_mm(parcellation):
    ids = np.array([44, 0, 95, 45], dtype=np.int16).reshape(2, 2, 1)  # 44 above 95, 45 beside it
    mapping = load_scheme("dlmuse", parcellation)
    for spacing_mm, side in (((1, 3, 1), 44), ((3, 1, 1), 45)):
        assert parcellation.encode(ids, mapping, spacing_mm)[1, 0, 0] == mapping[side]


def test_dlmuse_is_neuromorphometrics_with_parcelled_white_matter(parcellation):
    mapping, manual = (
        load_scheme("dlmuse", parcellation),
        load_scheme("neuromorphometrics", parcellation),
    )
    assert {k: mapping[k] for k in manual} == manual
    right, left = manual[44], manual[45]
    assert {mapping[k] for k in range(81, 95, 2)} == {right}
    assert {mapping[k] for k in range(82, 95, 2)} == {left}
    assert mapping[1] == 0  # sulcal CSF is no structure


def test_label_mappings(parcellation, tmp_path):
    path = tmp_path / "map.tsv"
    path.write_text("source\tindex\n1\t10\n2\t49\n3\t0\n")
    classes = load_scheme(str(path), parcellation)
    assert {source: int(parcellation.codes[k]) for source, k in classes.items()} == {
        1: 10,
        2: 49,
        3: 0,
    }
    assert load_scheme("cadiff", parcellation)[10] == classes[1]
    assert load_scheme("neuromorphometrics", parcellation)[60] == classes[1]
    # FreeSurfer's own extras join the structure that they lie in; the rest is as we write it.
    freesurfer = load_scheme("freesurfer", parcellation)
    assert freesurfer[10] == classes[1]
    assert freesurfer[31] == freesurfer[4] != freesurfer[63] == freesurfer[43]
    assert freesurfer[251] == -freesurfer[2]  # of either side
    assert load_scheme("dlmuse", parcellation)[60] == classes[1]
    path.write_text("source\tindex\n1\t-2\n")
    assert load_scheme(str(path), parcellation) == {1: freesurfer[251]}
    path.write_text("source\tindex\n1\t1999\n")
    with pytest.raises(DataError, match="1999"):
        load_scheme(str(path), parcellation)
    path.write_text("source\tindex\n10\t10\n17\t17\n-1\t0\n")
    with pytest.raises(DataError, match="-1"):  # it would count from the end
        load_scheme(str(path), parcellation)
    path.write_text("source\tindex\n7\t10\n8\t10\n7\t17\n7\t10\n")
    with pytest.raises(DataError, match=r"\[7\] to several"):
        load_scheme(str(path), parcellation)
    path.write_text("from\tto\n1\t2\n")
    with pytest.raises(DataError, match="mapping"):
        load_scheme(str(path), parcellation)
    with pytest.raises(MissingInputError):
        load_scheme("no-such-mapping", parcellation)


def test_label_maps_may_be_stored_as_floats(parcellation):
    """Scaled and cast on the way, as some writers do: whole numbers are meant."""
    mapping = parcellation.class_of
    codes = np.array([[[0.0, 2.9999, 41.00001, 10.0]]])
    classes = parcellation.encode(codes, mapping)
    assert classes.ravel().tolist() == [0, mapping[3], mapping[41], mapping[10]]
    with pytest.raises(DataError, match="NaN"):
        parcellation.encode(np.array([[[np.nan]]]), mapping)


def test_freesurfers_parcels_are_what_they_are_parts_of(parcellation):
    mapping = load_scheme("freesurfer", parcellation)
    parts = {3: (1000, 1035, 11175), 42: (2000, 2035, 12175), 2: (3001, 5001), 41: (4035, 5002)}
    for whole, codes in parts.items():
        assert {mapping[code] for code in codes} == {mapping[whole]}


def test_a_mapping_may_come_from_a_spreadsheet(parcellation, tmp_path):
    path = tmp_path / "map.tsv"
    for encoding in ("utf-8-sig", "utf-16"):
        path.write_text("source\tindex\n7\t10\n", encoding=encoding)
        assert load_scheme(str(path), parcellation) == {7: parcellation.class_of[10]}
    for wrong, said in (
        ("source\tindex\n7\t10é\n".encode("latin-1"), "not a mapping"),
        (b"x" * 200_000, "not a mapping"),
        (b"source\tlast\tindex\n1\t99999999\t2\n", "maps 99999999 ids"),
    ):
        path.write_bytes(wrong)
        with pytest.raises(DataError, match=said):
            load_scheme(str(path), parcellation)
    with pytest.raises(MissingInputError, match="no scheme"):
        load_scheme("z" * 5000, parcellation)


def many(n):
    """A parcellation of ``n`` structures in the middle, with codes in falling order."""
    codes = range(2 * n, n, -1)
    return Parcellation("many", tuple(Structure(c, f"S{c}", f"s{c}", "#0", 8, c) for c in codes))


@pytest.mark.parametrize("n", [255, 256, 300])
def test_no_class_wraps_around(n):
    """255 is the greatest class that 8 bits hold."""
    parcellation = many(n)
    classes = np.arange(n + 1).reshape(1, 1, -1)
    encoded = parcellation.encode(parcellation.codes[classes], parcellation.class_of)
    np.testing.assert_array_equal(encoded, classes)
    assert encoded.dtype == (np.uint8 if n < 256 else np.int16)


def test_a_table_survives_being_written(parcellation, lobes):
    for one in (parcellation, lobes):
        assert parse(one.name, one.as_tsv()) == one


def test_a_parcellation_is_named_after_its_file(lobes, tmp_path):
    assert lobes.name == lobes.segmentation == "lobes"
    path = tmp_path / "seg-lobes_dseg.tsv"
    for encoding in ("utf-8-sig", "utf-16"):  # by Excel
        path.write_text(LOBES, encoding=encoding)
        assert load_parcellation(path) == load_parcellation(str(path)) == lobes
    assert load_parcellation(BASE).segmentation == "cadiff"
    with pytest.raises(MissingInputError, match="no-such") as caught:
        load_parcellation("no-such")
    assert BASE in caught.value.remedy
    for taken in (BASE, "cadiff"):
        (tmp_path / f"{taken}.tsv").write_text(LOBES)
        with pytest.raises(DataError, match="taken"):
            load_parcellation(tmp_path / f"{taken}.tsv")
    path.write_bytes(LOBES.replace("Brain", "Bräin").encode("latin-1"))
    with pytest.raises(DataError, match="not a table"):
        load_parcellation(path)


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        ("\tmirror", "\tpartner", "mirror"),
        ("1001\tLeft-F", "x\tLeft-F", "cannot be read"),
        ("2002\tRight-Back", "2001\tRight-Back", "code 2001 is given to several"),
        ("Left-Back", "Left-Front", "name Left-Front is given to several"),
        ("Left-Back", "left_front", "Left-Front and left_front would be one column"),
        ("\tL_B", '\tL"B', "quotation mark"),
        ("\tL_B\t", "\t\t", "abbreviation of 1002 is empty"),
        ("\tBrain-Stem\tBS\t#779fb0\t10\t16\t16\tn/a", "", "cannot be read"),
        ("\t2001\t3", "\t2002\t3", "Left-Front mirrors 2002"),
        ("\t16\t16\tn/a", "\t17\t16\tn/a", "Brain-Stem mirrors 17"),
        ("\t16\t16\tn/a", "\t16\t1001\tn/a", "parent of Brain-Stem is 1001"),
        ("16\tBrain-Stem\tBS\t#779fb0\t10\t16", "40000\tB\tBS\t#7\t10\t40000", "40000"),
    ],
)
def test_a_table_that_makes_no_parcellation_is_refused(before, after, why):
    assert before in LOBES
    with pytest.raises(DataError, match=why) as caught:
        parse("lobes", LOBES.replace(before, after))
    assert caught.value.remedy


def test_names_must_fit_into_file_names():
    with pytest.raises(DataError, match="letters and digits"):
        parse("my_lobes", LOBES)
    with pytest.raises(DataError, match="no rows"):
        parse("lobes", LOBES.splitlines()[0])


def test_subsets_are_the_tables(lobes):
    assert lobes.subsets == ("all", "frontal")
    assert names(lobes, lobes.subset("frontal")) == ["Left-Front", "Right-Front"]
    with pytest.raises(UsageError, match="malc27") as caught:
        lobes.subset("malc27")
    assert "'frontal'" in caught.value.remedy


def test_a_fine_label_map_becomes_a_coarse_one(lobes, parcellation):
    fine = np.array([0, 1001, 2002, 1002, 16, 2001]).reshape(1, 2, 3)
    coarse = lobes.coarsen(fine)
    np.testing.assert_array_equal(coarse, [[[0, 3, 42], [3, 16, 42]]])
    # Whoever is coarse stays so, and nobody becomes finer.
    np.testing.assert_array_equal(parcellation.coarsen(coarse), coarse)
    with pytest.raises(DataError, match="no parts"):
        parcellation.mapping_to(lobes)


def test_what_has_no_parents_becomes_nothing_coarser(lobes, parcellation):
    """All of it would be background."""
    structures = tuple(replace(s, parent=None) for s in lobes.structures)
    foreign = Parcellation("regions", structures)
    assert not foreign.has_parents
    assert lobes.has_parents
    for own, other in ((foreign, parcellation), (parcellation, foreign)):
        with pytest.raises(DataError, match="no parts") as caught:
            own.mapping_to(other)
        assert caught.value.remedy == f"compare with {own.name}"


@pytest.mark.parametrize("name", shipped_names())
def test_the_parent_of_a_mirror_image_is_the_mirror_image_of_the_parent(name, lobes):
    base = load_parcellation(BASE)
    mirror = {s.code: s.mirror for s in base.structures}
    for parcellation in (load_parcellation(name), lobes):
        parent = {s.code: s.parent for s in parcellation.structures if s.parent is not None}
        for s in parcellation.structures:
            if s.parent is not None:
                assert parent[s.mirror] == mirror[s.parent], s.name
        # Flipping before or after coarsening is the same.
        classes = np.arange(parcellation.n_classes)
        flipped = parcellation.codes[parcellation.mirror_classes[classes]]
        coarse = base.encode(parcellation.coarsen(parcellation.codes), base.class_of)
        np.testing.assert_array_equal(
            parcellation.coarsen(flipped), base.codes[base.mirror_classes[coarse]]
        )


def test_schemes_belong_to_a_parcellation(parcellation, lobes, tmp_path):
    assert {"dlmuse", "freesurfer", "neuromorphometrics", "synthseg"} < {
        *scheme_names(parcellation)
    }
    assert scheme_names(lobes) == ["cadiff"]
    assert load_scheme("cadiff", lobes) == lobes.class_of
    assert load_scheme(BASE, parcellation) == parcellation.class_of
    with pytest.raises(MissingInputError, match="dlmuse"):
        load_scheme("dlmuse", lobes)
    path = tmp_path / "map.tsv"
    path.write_text("source\tlast\tindex\n5\t9\t1001\n11\t\t-2002\n")
    assert load_scheme(str(path), lobes) == dict.fromkeys(range(5, 10), 1) | {11: -4}
    path.write_text("source\tlast\tindex\n9\t5\t1001\n")
    with pytest.raises(DataError, match="9 to 5"):
        load_scheme(str(path), lobes)
