# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of README.md and of pages in docs from the measured JSON; `--check` fails when they differ.

python benchmarks/readme_tables.py [--check]
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = (
    "README.md",
    "docs/distillation.md",
    "docs/codebooks.md",
    "docs/gains.md",
    "docs/kernels.md",
    "docs/coreml.md",
    "docs/memory.md",
    "docs/mixdq.md",
    "docs/tfmq.md",
    "docs/vq4dit.md",
)
GAINS_FORMATS = ("int8-row", "int4-row", "vq8-d4")


def _load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["--:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def results(name: str = "alignment") -> str:
    """Alignment and bytes, float against artifacts."""
    measured = _load(name)
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
        figures = measured["unet_memory"][name]
        grown = f"{(figures['ran_anon_bytes'] - figures['start_anon_bytes']) / 1e6:.2f} MB"
        rows.append([name, f"{figures['weight_bytes'] / 1e6:.2f} MB", grown, f"{ratio:.2f} ×"])
    codebooks = _load("session_options")
    for name, runs in codebooks["grown_anon_bytes"].items():
        grown = f"{median(runs) / 1e6:.2f} MB"
        rows.append([f"onnx codebooks, {name}", f"{codebooks['weight_bytes'] / 1e6:.2f} MB", grown, ""])
    return _table(["UNet of `pocket-turbo`", "files", "anonymous memory after a run", "latency to fp32"], rows)


def predicted_memory() -> str:
    """Peaks as predicted and measured, by component; what other benchmarks recorded last."""
    found = _load("memory")
    rows = []
    for name, each in found["artifacts"].items():
        rows += [
            _peaks_row(name, component, figures, figures["measured"])
            for component, figures in each["components"].items()
        ]
    for name, each in found.get("recorded", {}).items():
        rows += [
            _peaks_row(f"{name} (recorded)", component, figures, figures["default"])
            for component, figures in each.items()
        ]
    return _table(["artifact", "component", "held", "beside that", "predicted peak", "measured", "of measured"], rows)


def _peaks_row(artifact: str, component: str, figures: dict[str, int], measured: int) -> list[str]:
    sizes = (
        f"{nbytes / 1e6:.2f} MB" for nbytes in (figures["held"], figures["running"], figures["predicted"], measured)
    )
    return [artifact, component, *sizes, f"{figures['predicted'] / measured:.2f}"]


def pocket() -> str:
    """What the teacher reaches, per attribute."""
    measured = _load("pocket_float")
    shares = {"all attributes": measured["test"]["alignment"], **measured["test"]["by_label"]}
    title = f"float `pocket`, {measured['steps']} steps, test split"
    return _table([title, "right"], [[k, f"{100 * v:.1f} %"] for k, v in shares.items()])


def _percent(figures: dict[str, Any]) -> str:
    return f"{100 * figures['alignment']:.1f} %"


STUDENT_TITLES = {
    "teacher": "teacher `pocket`, guidance 2.5",
    "tdm": "`pocket-turbo` (TDM), no guidance",
    "mse": "regression at equal compute, no guidance",
}


def students() -> str:
    """Teacher and students by number of steps."""
    measured = _load("distillation_students")["results"]
    rows = []
    for name, title in STUDENT_TITLES.items():
        aligned = [_percent(measured[f"{name} {steps}"]) for steps in (4, 2, 1)]
        most = measured.get(f"{name} 20")
        at_four = measured[f"{name} 4"]
        figures = [f"{at_four['frechet']:.2f}", f"{at_four['diversity']:.1f}"]
        rows.append([title, _percent(most) if most else "", *aligned, *figures])
    header = ["alignment in", "20 steps", "4", "2", "1", "Fréchet at 4", "diversity at 4"]
    return _table(header, rows)


def ablations() -> str:
    """TDM with each of its devices off."""
    measured = _load("distillation_ablations")["results"]
    rows = [
        [
            name.replace("_", " "),
            *[_percent(by_steps[steps]) for steps in ("4", "2", "1")],
            f"{by_steps['4']['frechet']:.2f}",
            f"{by_steps['4']['diversity']:.1f}",
        ]
        for name, by_steps in measured.items()
    ]
    header = ["alignment in", "4 steps", "2", "1", "Fréchet at 4", "diversity at 4"]
    return _table(header, rows)


def arm64() -> str:
    """Every artifact on every emulated CPU: errors, and the kernels that ran."""
    rows = []
    for artifact, cpus in _load("arm64").items():
        for cpu, row in cpus.items():
            kernels = ", ".join(f"{count} {kind}" for kind, count in row["instructions_by_kernel"].items() if count)
            errors = (f"{max(row[other].values()):.1e}" for other in ("compression", "to_pytorch", "to_x86_64"))
            rows.append([artifact, cpu, *errors, kernels])
    header = ["artifact", "CPU", "compression", "to PyTorch", "to x86-64", "instructions by kernel"]
    return _table(header, rows)


def codebooks() -> str:
    """The UNet in codebooks, step by step, and in scalar formats."""
    rows = []
    for name, row in _load("codebooks")["rows"].items():
        bits = [f"{row[kind]:.2f}" for kind in ("weight_bits", "all_in_bits")] if "weight_bits" in row else ["32", "32"]
        psnr = f"{row['median_psnr_db_to_float']:.1f} dB" if "median_psnr_db_to_float" in row else ""
        rows.append([name, *bits, psnr, _percent(row), f"{row['frechet']:.2f}"])
    header = [
        "UNet of `pocket-turbo`",
        "bits of coded layers",
        "all-in bits",
        "median PSNR to float",
        "alignment",
        "Fréchet",
    ]
    return _table(header, rows)


def opening() -> str:
    """Seconds to open chains of layers, by how many they are, and a UNet."""
    measured = _load("opening")["opening"]
    names = next(iter(measured.values()))
    rows = [[name, *(f"{found[name]:.2f} s" for found in measured.values())] for name in names]
    return _table(["weights in", *(f"{of} layers" if of.isdigit() else of for of in measured)], rows)


def executorch_codebooks() -> str:
    """A stack of layers of codebooks in ExecuTorch, by what reads them."""
    measured = _load("executorch_codebooks")
    rows = []
    for name, row in measured["programs"].items():
        grown = row["growth_bytes"]["resident"]
        rows.append(
            [
                name,
                *(f"{each / 1e6:.2f} MB" for each in (row["file_bytes"], row["planned_bytes"])),
                f"{row['relative_error']:.1e}",
                f"{grown / 1e6:.2f} MB ({row['resident_to_compressed']:.2f} x)",
                f"{row['speed_to_dense']:.2f}",
            ]
        )
    header = ["read by", "file", "planned", "to PyTorch", "resident growth, to compressed weights", "speed to dense"]
    return _table(header, rows)


def gains() -> str:
    """Losses by random projections and as they were before, beside those measured one layer at a time."""
    measured = _load("gains")
    ways = {"1 vector" if count == "1" else f"{count} vectors": row for count, row in measured["vectors"].items()}
    ways["smallest format one by one, others by Hessian losses"] = {"agreement": measured["by_hessian_loss"]}
    rows = []
    for name, row in ways.items():
        by_format = row["agreement"]
        ratio = by_format["all"]
        rows.append(
            [
                name,
                f"{row['seconds']:.1f}" if "seconds" in row else "",
                *(f"{by_format[text]['spearman']:.4f}" for text in GAINS_FORMATS),
                f"{ratio['log10_ratio_median']:+.2f} ± {ratio['log10_ratio_std']:.2f}",
            ]
        )
    rows.append(["every candidate one by one", f"{measured['seconds']['one by one, every candidate']:.0f}", *[""] * 4])
    return _table(["", "seconds", *(f"`{text}`" for text in GAINS_FORMATS), "log10 of the ratio"], rows)


def apple_pipeline() -> str:
    """Pictures by the schedulers of Apple's package, beside our own loop's."""
    rows = []
    for name, row in _load("apple_pipeline")["rows"].items():
        psnr = f"{row['median_psnr_db_to_own']:.1f} dB" if "median_psnr_db_to_own" in row else ""
        rows.append([name, _percent(row), psnr])
    return _table(["4 steps, 32 test prompts", "alignment", "median PSNR to our own loop"], rows)


def mixdq() -> str:
    """MixDQ's steps one on top of the other."""
    rows = _load("mixdq")["rows"]
    found = [
        [name, f"{row['psnr_db']:.1f} dB", f"{row['ssim']:.4f}", _percent(row)]
        for name, row in rows.items()
        if name != "float"
    ]
    return _table(["", "PSNR", "SSIM", "alignment"], found)


RULES = {"uniform": "one format", "threshold": "threshold", "ratio": "ratio", "program": "`build`"}


def allocation() -> str:
    """Plans of equal bytes by each rule, on each target."""
    rows = [
        [f"{target}, `{format}`", f"{plans['uniform']['bytes'] / 1e6:.2f} MB"]
        + [f"{plans[rule]['psnr_db']:.1f} dB" if rule in plans else "" for rule in RULES]
        for target, formats in _load("allocation")["targets"].items()
        for format, plans in formats.items()
    ]
    return _table(["bytes of", "layers", *RULES.values()], rows)


def ranges_by_step() -> str:
    """One range for all steps beside one for each, from exported files."""
    rows = [
        [name, f"{row['psnr_db']:.1f} dB", f"{row['median_psnr_db']:.1f} dB", f"{row['least_psnr_db']:.1f} dB"]
        for name, row in _load("tfmq_ranges")["rows"].items()
    ]
    return _table(["", "PSNR of all pictures together", "median picture", "worst picture"], rows)


def temporal() -> str:
    """Temporal features and pictures, by model, bits and what is done about the temporal block."""
    psnr = "block_alone_psnr_db", "block_alone_median_psnr_db", "psnr_db", "median_psnr_db"
    rows = [
        [
            f"{model}, {bits}: {name}",
            f"{row['cosine']:.5f}",
            f"{row['least_cosine']:.4f}",
            f"{row['mismatches']} of {row['features']}",
            f"{row['shift']:.1f}",
            *("" if name not in row else "equal" if row[name] is None else f"{row[name]:.1f} dB" for name in psnr),
            *([_percent(row), f"{row['frechet']:.1f}"] if "frechet" in row else [""] * 2),
        ]
        for model, measured in _load("temporal").items()
        for bits, by_name in measured["rows"].items()
        for name, row in by_name.items()
    ]
    features, pictures = ["cosine", "worst", "mismatches", "mean δ"], ["PSNR", "median", "alignment", "Fréchet"]
    header = ["", *features, "block alone", "median", *pictures]
    return _table(header, rows)


def vq4dit() -> str:
    """A diffusion transformer at 2 and 3 bits, by every method."""
    rows = []
    for name, row in _load("vq4dit")["rows"].items():
        if name == "float":
            rows.append([name, "32", "", _percent(row), "", "", f"{row['frechet']:.1f}", "", ""])
            continue
        rows.append(
            [
                name,
                f"{row['bits']:.2f}",
                f"{row['bytes'] / 1e6:.2f} MB",
                _percent(row),
                *(f"{row[kind]:.1f} dB" for kind in ("psnr_db", "mean_psnr_db")),
                f"{row['frechet']:.1f}",
                f"{1e6 * row['fit_seconds'] / row['coded_weights']:.1f}",
                f"{row['fit_peak_bytes'] / 1e6:.0f} MB" if "fit_peak_bytes" in row else "",
            ]
        )
    header = ["blocks of `pocket-dit` in", "bits", "transformer", "alignment", "PSNR", "mean PSNR", "Fréchet"]
    return _table([*header, "seconds per million weights", "memory"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "results": results,
    "results_executorch": lambda: results("alignment_executorch"),
    "memory": memory,
    "pocket": pocket,
    "arm64": arm64,
    "students": students,
    "ablations": ablations,
    "codebooks": codebooks,
    "executorch_codebooks": executorch_codebooks,
    "opening": opening,
    "gains": gains,
    "predicted memory": predicted_memory,
    "mixdq": mixdq,
    "allocation": allocation,
    "ranges by step": ranges_by_step,
    "apple_pipeline": apple_pipeline,
    "temporal": temporal,
    "vq4dit": vq4dit,
}


def filled(text: str) -> str:
    """`text` with what stands between `<!-- table: NAME -->` and `<!-- end -->` made anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda found, make=make: f"{found[1]}{make()}\n{found[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    """Writes the pages, or with --check exits 1 when one is not what the JSON says."""
    for page in PAGES:
        text = (ROOT / page).read_text()
        if "--check" not in sys.argv:
            (ROOT / page).write_text(filled(text))
        elif text != filled(text):
            sys.exit(f"{page} differs from benchmarks/results: run python benchmarks/readme_tables.py")


if __name__ == "__main__":
    main()
