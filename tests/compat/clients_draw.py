# SPDX-License-Identifier: Apache-2.0
"""Runtimes that nobody here wrote draw an artifact by the examples of docs, and are held against our own picture.

    python tests/compat/clients_draw.py NODE_MODULES ARTIFACT...

NODE_MODULES holds onnxruntime-node and onnxruntime-web; the browser is headless Chromium, where one is installed.
"""

import http.server
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import urllib.parse
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import turbopocket

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
PROMPT = "a large red circle left of a small blue square on a white background"
SEED = 7
MOST_STEPS_APART = 1
"""Of a value of a pixel: other builds of the runtime sum in another order, which may round the other way."""
MOST_VALUES_APART = 0.005

Pixels = NDArray[np.int64]


def by_node(modules: Path, artifact: Path, noise: Path, *options: str) -> Pixels:
    """The picture by the example for Node."""
    out = noise.with_suffix(".ppm")
    command = ["node", EXAMPLES / "node.mjs", artifact, PROMPT, out, "--noise", noise, *options]
    subprocess.run(command, check=True, cwd=modules.parent)
    with Image.open(out) as picture:
        return np.asarray(picture).astype(np.int64)


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line for each."""

    def log_message(self, *_: object) -> None:
        pass


def by_browser(chromium: str, modules: Path, artifact: Path, noise: Path) -> Pixels:
    """The picture by the example for browsers, in one without a window."""
    site = noise.with_suffix("")
    site.mkdir()
    for name, place in {"node_modules": modules, "artifact": artifact, "noise.bin": noise}.items():
        (site / name).symlink_to(place.resolve())
    for name in ("draw.mjs", "browser.html"):
        (site / name).symlink_to(EXAMPLES / name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        asked = urllib.parse.urlencode({"artifact": "artifact/", "prompt": PROMPT, "noise": "noise.bin"})
        page = f"http://127.0.0.1:{server.server_port}/browser.html?{asked}"
        flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={site / 'profile'}")
        budget = ("--virtual-time-budget=600000", "--timeout=600000", "--dump-dom")
        done = subprocess.run([chromium, *flags, *budget, page], capture_output=True, text=True, timeout=600)
        server.shutdown()
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, flags=re.DOTALL)
    if found is None or not re.fullmatch(r"[\d ]+", found[1]):
        raise SystemExit(f"the browser says: {found[1] if found else done.stderr[-2000:]}")
    values = np.array(found[1].split(), dtype=np.int64)
    side = int((len(values) / 3) ** 0.5)
    return values.reshape(side, side, 3)


def main(modules: Path, artifacts: list[Path]) -> None:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    failed = 0
    for artifact in artifacts:
        opened = turbopocket.Artifact.open(artifact)
        expected = np.asarray(opened.generate(PROMPT, SEED)).astype(np.int64)
        image = opened.manifest.image
        shape = (1, image.latent_channels, image.latent_height, image.latent_width)
        with tempfile.TemporaryDirectory() as folder:
            noise = Path(folder) / "noise.bin"
            np.random.default_rng(SEED).standard_normal(shape, dtype=np.float32).tofile(noise)
            found = {
                "onnxruntime-node": by_node(modules, artifact, noise),
                "onnxruntime-web in Node": by_node(modules, artifact, noise, "--web"),
            }
            if chromium is None:
                print("no Chromium is installed: the browser was left out")
            else:
                found["onnxruntime-web in Chromium"] = by_browser(chromium, modules, artifact, noise)
        for name, pixels in found.items():
            apart = np.abs(pixels - expected)
            share = float((apart > 0).mean())
            right = apart.max() <= MOST_STEPS_APART and share <= MOST_VALUES_APART
            failed += not right
            count = f"{int((apart > 0).sum())} of {apart.size:,} values differ, by {apart.max()} at most"
            print(f"{artifact.name:12} {name:28} {count} {'' if right else 'FAILED'}")
    if failed:
        raise SystemExit(f"{failed} pictures are not ours")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), [Path(each).resolve() for each in sys.argv[2:]])
