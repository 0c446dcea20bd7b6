"""Draw a result with NiiVue in a headless browser, and compare its picture with the table.

    npm pack @niivue/niivue@0.69.0 && tar xzf niivue-niivue-*.tgz
    python tools/niivue_check.py OUT package/dist/index.js -o niivue.png

For every structure of the first result in OUT, the pixel at the voxel that is deepest inside it
must have the colour of ``OUT/luts``, and NiiVue must name it.  Prints each structure that has not;
exits with 1 when there is any.  Needs playwright (extra ``browser``) and chromium; no network and
no GPU.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

from cadiff_cli.io.bids.layout import finished

DEEP_MM = 1.5
"""A structure that is thinner shows its neighbours' colours where the picture is interpolated."""
HOST = "http://niivue.test/"
PAGE = """<!doctype html><body style="margin:0;background:#000">
<canvas id="gl" width="900" height="900"></canvas><script type="module">
import { Niivue } from "./niivue.js";
const nv = new Niivue({ crosshairWidth: 0, show3Dcrosshair: false, isOrientCube: false });
await nv.attachTo("gl");
await nv.loadVolumes([{ url: "t1.nii.gz" }, { url: "labels.nii.gz", opacity: 1 }]);
const labels = nv.volumes[1];
let said = "";
nv.onLocationChange = (data) => { said = data.string; };
window.header = () => ({ intent: labels.hdr.intent_code, colormap: labels.colormap });
window.look = async (lut) => {
  labels.setColormapLabel(lut); nv.setSliceType(nv.sliceTypeAxial); nv.updateGLVolume();
};
window.pixel = (mm) => {
  nv.scene.crosshairPos = nv.mm2frac(mm); nv.drawScene(); nv.createOnLocationChange();
  const [x, y] = nv.frac2canvasPos(nv.scene.crosshairPos), gl = nv.gl, rgba = new Uint8Array(4);
  gl.readPixels(x, gl.canvas.height - 1 - y, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, rgba);
  return { rgb: [...rgba].slice(0, 3), said };
};
window.four = (opacity) => {
  nv.scene.crosshairPos = nv.mm2frac([0, -15, 10]); nv.setOpacity(1, opacity);
  nv.setSliceType(nv.sliceTypeMultiplanar);
};
document.body.dataset.ready = "yes";
</script></body>"""


@dataclass(frozen=True)
class Files:
    """What NiiVue is given: a scan, its labels (both on one grid) and the table of colours."""

    t1: Path
    labels: Path
    colours: Path

    @classmethod
    def of(cls, out: Path) -> "Files":
        """Those of the first result in ``out``."""
        result = next(finished(out))
        begin = result.sidecar.parent / result.entities
        return cls(
            Path(f"{begin}_desc-preproc_T1w.nii.gz"),
            Path(f"{begin}_seg-cadiff_desc-structures_dseg.nii.gz"),
            out / "luts" / "seg-cadiff_niivue.json",
        )


def deepest(labels: nib.Nifti1Image) -> dict[int, tuple[float, list[float]]]:
    """For each code, how many millimetres deep its deepest voxel lies, and where (world mm)."""
    data = np.asarray(labels.dataobj)
    spacing_mm = np.linalg.norm(labels.affine[:3, :3], axis=0)
    found = {}
    for code, box in enumerate(ndimage.find_objects(data), start=1):
        if box is None:
            continue
        depth = ndimage.distance_transform_edt(np.pad(data[box] == code, 1), spacing_mm)
        at = np.unravel_index(depth.argmax(), depth.shape)
        voxel = [start.start + k - 1 for start, k in zip(box, at, strict=True)]
        mm = nib.affines.apply_affine(labels.affine, voxel).tolist()
        found[code] = (float(depth[at]), mm)
    return found


@contextmanager
def niivue(program: Path, files: Files) -> Iterator:
    """A page on which NiiVue shows the scan under its labels."""
    from playwright.sync_api import sync_playwright

    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        raise FileNotFoundError("no chromium in PATH (apt-get install chromium)")
    served = {"niivue.js": program, "t1.nii.gz": files.t1, "labels.nii.gz": files.labels}

    def answer(route) -> None:
        name = route.request.url.removeprefix(HOST)
        if not name:
            route.fulfill(body=PAGE, content_type="text/html")
        elif name in served:
            kind = "text/javascript" if name.endswith(".js") else "application/octet-stream"
            route.fulfill(body=served[name].read_bytes(), content_type=kind)
        else:
            route.fulfill(status=404)

    arguments = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=found, args=[*arguments, "--enable-unsafe-swiftshader"]
        )
        page = browser.new_page(viewport={"width": 900, "height": 900})
        page.on("pageerror", lambda error: print(f"page: {error}", file=sys.stderr))
        page.route("**/*", answer)
        page.goto(HOST)
        page.wait_for_function("document.body?.dataset.ready === 'yes'", timeout=90_000)
        yield page
        browser.close()


def differences(page, files: Files, places: dict[int, tuple[float, list[float]]]) -> Iterator[str]:
    """What NiiVue draws or says at ``places`` otherwise than the table does."""
    header = page.evaluate("header()")
    if header["intent"] != 1002:
        yield f"intent code {header['intent']}: not taken for labels"
    lut = json.loads(files.colours.read_text())
    page.evaluate("lut => look(lut)", lut)
    row = {code: k for k, code in enumerate(lut["I"])}
    for code, (depth_mm, mm) in places.items():
        k = row[code]
        wanted, name = [lut[channel][k] for channel in "RGB"], lut["labels"][k]
        drawn = page.evaluate("mm => pixel(mm)", mm)
        if name not in drawn["said"]:
            yield f"{name} ({code}): it says {drawn['said']!r}"
        if depth_mm >= DEEP_MM and np.abs(np.subtract(drawn["rgb"], wanted)).max() > 2:
            yield f"{name} ({code}): drawn {drawn['rgb']}, in the table {wanted}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="A folder of results.")
    parser.add_argument("niivue", type=Path, help="NiiVue's dist/index.js.")
    parser.add_argument("-o", "--picture", type=Path, help="Where to leave a screenshot.")
    wanted = parser.parse_args()
    files = Files.of(wanted.out)
    places = deepest(nib.load(files.labels))
    with niivue(wanted.niivue, files) as page:
        found = list(differences(page, files, places))
        if wanted.picture:
            page.evaluate("four(0.7)")
            page.screenshot(path=str(wanted.picture))
    checked = sum(depth_mm >= DEEP_MM for depth_mm, _ in places.values())
    print("\n".join(found) or "nothing differs")
    print(f"{len(places)} structures, colours of {checked} compared, {len(found)} differences")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
