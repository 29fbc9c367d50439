# SPDX-License-Identifier: Apache-2.0
"""Writes the README's tables from the measured JSON; `--check` fails when they differ.

python benchmarks/readme_tables.py [--check]
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def results() -> str:
    """Alignment and bytes, float against artifacts."""
    measured = _load("alignment")
    rows = []
    for name, row in measured["results"].items():
        size = f"{row['bytes'] / 1e6:.2f} MB" if "bytes" in row else f"{measured['fp16_bytes'] / 1e6:.2f} MB (fp16)"
        psnr = f"{row['median_psnr_db_to_float']:.1f} dB" if "median_psnr_db_to_float" in row else ""
        rows.append([name, row["runtime"], size, f"{100 * row['alignment']:.1f} %", psnr])
    return _table(["model", "runtime", "all files", "alignment", "median PSNR to float"], rows)


def memory() -> str:
    """UNet latency and resident memory per format, from one run."""
    measured = _load("unet")
    rows = []
    for name, ratio in measured["latency_ratio_to_fp32"].items():
        figures = measured["unet_memory"].get(name)
        grown = f"{(figures['ran_anon_bytes'] - figures['start_anon_bytes']) / 1e6:.2f} MB" if figures else ""
        unet_bytes = measured["unet_bytes"][name] if figures is None else figures["weight_bytes"]
        rows.append([name, f"{unet_bytes / 1e6:.2f} MB", grown, f"{ratio:.2f} ×"])
    return _table(["UNet of `pocket`", "files", "anonymous memory after a run", "latency to fp32"], rows)


def pocket() -> str:
    """What the float model reaches, per attribute."""
    measured = _load("alignment")
    row = measured["results"]["float"]
    shares = {"all attributes": row["alignment"], **row["by_label"]}
    title = f"float `{measured['model']}`, {measured['steps']} steps, test split"
    return _table([title, "right"], [[k, f"{100 * v:.1f} %"] for k, v in shares.items()])


TABLES: dict[str, Callable[[], str]] = {
    "results": results,
    "memory": memory,
    "pocket": pocket,
}


def filled(text: str) -> str:
    """`text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        table = make()
        text = re.sub(pattern, lambda found, table=table: f"{found[1]}{table}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Writes the README, or with --check exits 1 when it is not what the JSON says."""
    readme = ROOT / "README.md"
    text = readme.read_text()
    if "--check" not in sys.argv:
        readme.write_text(filled(text))
    elif text != filled(text):
        sys.exit("README.md differs from benchmarks/results: run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
