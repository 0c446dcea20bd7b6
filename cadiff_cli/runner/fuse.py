"""Label one scan by the vote of other people's scans, and write the label map."""

from collections.abc import Sequence
from pathlib import Path

from cadiff_cli.config import Config, as_dict
from cadiff_cli.errors import OutputError
from cadiff_cli.fusion import BETA, RADIUS, SEARCH, VOTES, Fused, check_vote, choose_atlases, fuse
from cadiff_cli.io.bids.description import generated_by, refuse_foreign, save_dataset_files
from cadiff_cli.io.bids.layout import Derivatives
from cadiff_cli.io.bids.tables import check_table, save_table, table_name
from cadiff_cli.io.files import check_writable, refuse_existing, write_json
from cadiff_cli.io.images import load_scan, save_volume
from cadiff_cli.io.provenance import software, told
from cadiff_cli.io.templates import EMBEDDED, load_template
from cadiff_cli.labels.parcellation import Parcellation
from cadiff_cli.labels.schemes import load_scheme
from cadiff_cli.machine import work_folder
from cadiff_cli.pipeline import strip_scan
from cadiff_cli.products import Stripped


def fuse_file(
    t1: Path,
    atlases: Path,
    out: Path,
    parcellation: Parcellation,
    labels: str,
    config: Config,
    *,
    exclude: Sequence[str] = (),
    vote: str = "joint",
    jobs: int = 1,
    overwrite: bool = False,
) -> Path:
    """Label ``t1`` by the people in the folder ``atlases``; returns the path of the label map.

    ``labels`` names the scheme of their ids; ``config`` tells mask and registration.  ``jobs``
    processes work at a time.  Everything is checked before the first registration.  Raises
    ``OutputError`` if a file would be lost, and what ``choose_atlases`` and ``fuse`` raise.
    """
    scan, mapping = load_scan(t1), load_scheme(labels, parcellation)
    people = choose_atlases(atlases, t1, exclude)
    check_vote(vote, len(people), config.register)
    # ``seg-`` leads ``parcellation_of`` to the parcellation.
    name = f"seg-{parcellation.segmentation}_desc-{VOTES[vote]}_dseg.nii.gz"
    path = Derivatives(out, t1).path(name)
    if out.resolve() == atlases.resolve():
        raise OutputError(
            f"{out} holds the atlases: results there would be taken for labels of theirs",
            "choose another output folder",
        )
    refuse_foreign(out)
    check_table(out, parcellation)
    sidecar = path.with_name(path.name.replace(".nii.gz", ".json"))
    refuse_existing(path, sidecar, overwrite=overwrite)
    check_writable(path.parent)
    with work_folder() as work:
        stripped = strip_scan(scan, load_template(EMBEDDED), config, Path(work))
    fused = fuse(scan, stripped, people, parcellation, mapping, config.register, vote, jobs)
    save_dataset_files(out)
    save_table(out, parcellation)
    sidecar.unlink(missing_ok=True)
    save_volume(path, fused.labels.data, fused.labels.grid, like=t1, labels=True)
    write_json(sidecar, _about(fused, t1, stripped, config, parcellation))
    return path


def _about(
    fused: Fused, t1: Path, stripped: Stripped, config: Config, parcellation: Parcellation
) -> dict[str, object]:
    joint = {"Radius": RADIUS, "Search": SEARCH, "Beta": BETA} if fused.vote == "joint" else {}
    return {
        "Description": "Brain structures by multi-atlas label fusion; codes in "
        + table_name(parcellation),
        "Parcellation": parcellation.name,
        "Manual": False,
        "Sources": [t1.name],
        "SpatialReference": t1.name,
        "GeneratedBy": [generated_by()],
        "Packages": software(),
        "Vote": {"Name": fused.vote, **joint},
        "Atlases": [
            {"Name": name, "Registration": kind, "Score": score}
            for name, (kind, score) in fused.atlases.items()
        ],
        "Registration": as_dict(config.register),
        "SkullStripping": stripped.method,
        "Seconds": dict(fused.seconds),
        **told(fused.notes),
    }
