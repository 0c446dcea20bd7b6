"""What made a result: the recipe that decides whether it must be made again, and the software."""

import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import cadiff_cli
from cadiff_cli import machine
from cadiff_cli.config import Config, Recipe, StripConfig, fingerprint
from cadiff_cli.io.files import sha256
from cadiff_cli.io.releases import strip_weights_sha256
from cadiff_cli.io.templates import joint_name
from cadiff_cli.io.volumes import about_expected_dice, calibration
from cadiff_cli.machine import ITK_THREADS
from cadiff_cli.products import Result, Scan, Stripped, Template, sound


def make_recipe(
    config: Config,
    templates: Sequence[Template],
    model: str,
    weights_sha256: str,
    spaces: Sequence[str] = (),
    field: bool = False,
) -> Recipe:
    """The recipe of results that this installation makes, or has just made, with these settings."""
    calibrate = calibration(config, weights_sha256)
    return Recipe(
        config,
        joint_name(templates),
        model,
        weights_sha256,
        strip_weights_sha256(config.strip),
        fingerprint(calibrate.as_dict()) if calibrate else "",
        tuple(spaces),
        field,
    )


def provenance(result: Result, field: bool = False) -> dict[str, Any]:
    """What made this segmentation: enough to make it again, and to know that it need not be."""
    registrations = result.prepared.registrations
    to_scan = [r.from_template for r in registrations]
    recipe = make_recipe(
        result.config,
        [r.template for r in registrations],
        result.model.name,
        result.model.sha256,
        [space.name for space in result.spaces],
        field,
    )
    return {
        "GeneratedBy": [{"Name": "cadiff", "Version": cadiff_cli.__version__}],
        "Packages": software(),
        "Model": {"Name": result.model.name, "WeightsSHA256": result.model.sha256},
        "Steps": result.segmentation.steps,
        "Seed": result.segmentation.seed,
        "Tile": result.segmentation.tile,
        "Device": result.segmentation.device,
        "Precision": result.segmentation.precision,
        "RegistrationThreads": registration_threads() if any(to_scan) else None,
        "Templates": [
            {
                "Name": r.template.name,
                "Source": r.template.source,
                "Registration": r.kind,
                "Score": r.score,
                "InField": r.from_template is not None and r in sound(registrations),
            }
            for r in registrations
        ],
        "SkullStripping": result.prepared.stripped.method,
        "BiasRatio": result.prepared.stripped.bias_ratio,
        "AgeYears": result.prepared.scan.age_years,
        "Settings": recipe.settings(),
        "Fingerprint": recipe.fingerprint(),
        "SourceSHA256": result.prepared.scan.sha256 or sha256(result.prepared.scan.path),
        "Seconds": dict(result.seconds),
        "ExpectedDice": about_expected_dice(result),
        "Warnings": [machine.without_home(text) for text in result.warnings],
    }


def mask_provenance(scan: Scan, stripped: Stripped) -> dict[str, Any]:
    """What made a brain mask that stands alone."""
    learned = stripped.method == "net"
    return {
        "GeneratedBy": [{"Name": "cadiff", "Version": cadiff_cli.__version__}],
        "Packages": software(),
        "BiasRatio": stripped.bias_ratio,
        **({"WeightsSHA256": strip_weights_sha256(StripConfig("net"))} if learned else {}),
        "SourceSHA256": scan.sha256 or sha256(scan.path),
    }


def registration_threads() -> int | None:
    """Threads of ANTs' registration; more than one make it change in the last digits."""
    number = os.environ.get(ITK_THREADS, "")
    return int(number) if number.isdigit() else None


def software() -> dict[str, str]:
    """Versions of Python and of the packages that the numbers depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "antspyx", "nibabel", "numpy", "scipy", "monai"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
