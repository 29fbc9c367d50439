# SPDX-License-Identifier: Apache-2.0
"""Figures in sentences are those of the measured JSON, as tables are (`benchmarks/readme_tables.py`)."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


def measured(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def percent(row: dict[str, Any]) -> str:
    return f"{100 * row['alignment']:.1f} %"


def readme_codebooks() -> list[str]:
    rows = measured("codebooks")["rows"]
    own, shared = rows["avq2x8-d8 + fine-tuning"], rows["avq2x8-d8-shared + fine-tuning"]
    under = 100 * (rows["float"]["alignment"] - own["alignment"])
    return [
        f"the whole UNet at 2 bits a weight draws {percent(own)} of the test prompts right, {under:.1f} points under "
        f"float, where palettes of 2 bits draw {percent(rows['lut2 mse'])}",
        f"the whole UNet is {shared['bytes'] / 1e6:.2f} MB, {shared['all_in_bits']:.2f} bits a weight with everything "
        f"counted, and draws {percent(shared)}",
    ]


def page_codebooks() -> list[str]:
    rows = measured("codebooks")["rows"]
    two, three, four = (rows[f"avq{count}x8-d8-shared + fine-tuning"] for count in (2, 3, 4))
    row, group = rows["int4-row gptq"], rows["int4-g32 gptq"]
    psnr = "median_psnr_db_to_float"
    scalars = (values for name, values in rows.items() if name.startswith(("lut", "int4")))
    best = max(each[psnr] for each in scalars if each["bytes"] <= four["bytes"])
    return [
        f"{percent(two)} at **{two['all_in_bits']:.2f} bits all-in**, the whole UNet in {two['bytes'] / 1e6:.2f} MB; "
        f"palettes of about as many bytes draw {percent(rows['lut2 mse'])}",
        f"At **{three['all_in_bits']:.2f} bits all-in** it has {three[psnr] - rows['lut3 mse'][psnr]:.1f} dB more",
        f"`lut4` with {100 * (rows['lut4 mse']['bytes'] / three['bytes'] - 1):.0f} % more; `int4-row` by `gptq`, with "
        f"{100 * (row['bytes'] / three['bytes'] - 1):.0f} % more, has {row[psnr] - three[psnr]:.1f} dB more",
        f"At **{four['all_in_bits']:.2f} bits all-in**",
        f"({four[psnr]:.1f} dB; the best of those has {best:.1f}); `int4-g32` by `gptq`, with "
        f"{100 * (group['bytes'] / four['bytes'] - 1):.0f} % more, has {group[psnr]:.1f}",
        f"({rows['avq4x8-d8 + sequential'][psnr]:.1f} to {rows['avq4x8-d8 + fine-tuning'][psnr]:.1f} dB)",
    ]


def executorch_codebooks() -> list[str]:
    found = measured("executorch_codebooks")
    kernel, portable, dense = (each["growth_bytes"]["resident"] / 1e6 for each in found["programs"].values())
    codes = found["compressed_weights_bytes"] / 1e6
    return [
        f"{found['layers']} layers of {found['width']} x {found['width']}, {codes:.1f} MB of codes: {kernel:.1f} MB "
        f"resident with the kernels, {portable:.1f} MB without, {dense:.0f} MB as fp32"
    ]


def mixdq() -> list[str]:
    return [f"whose alignment is {percent(measured('mixdq')['rows']['float'])}"]


def full_size() -> list[str]:
    rows = [row for row in measured("sdxl_builds") if (row["folder"], row["fit"]) == ("sdxl-full", "mse")]
    built, single, core_ml = (
        [row for row in rows if (row["target"], row["formats"]) == asked][-1]
        for asked in (("onnx", "int4-row,int8-row"), ("onnx", "int4-row"), ("coreml", "int4-row,int8-row"))
    )
    spare = built["planned_bytes"] - built["artifact_bytes"]
    return [
        f"with {built['pictures']} pictures to calibrate, is built for ONNX in {built['seconds'] / 60:.0f} minutes by "
        f"{built['threads']} threads and in {built['peak_anonymous_bytes'] / 1e9:.1f} GB of memory, to {spare} bytes "
        f"of its plan of {built['planned_bytes'] / 1e9:.1f} GB",
        f"From the same journal it then is there for Core ML in {core_ml['seconds'] / 60:.0f} more, of which three "
        f"evaluators take {(core_ml['stage_seconds']['compare'] + core_ml['stage_seconds']['self-check']) / 60:.0f}, "
        f"and in {core_ml['peak_anonymous_bytes'] / 1e9:.1f} GB",
        f"In one format, with {single['pictures']} pictures, it holds {single['peak_anonymous_bytes'] / 1e9:.1f} GB",
    ]


def executorch() -> list[str]:
    written = measured("alignment_executorch")["results"]["executorch"]["bytes"]
    return [f"The command above writes {written / 1e6:.2f} MB"]


def accuracy_level() -> list[str]:
    moved = [each["compression"]["unet"] for each in measured("arm64")["onnx"].values()]
    return [f"about as much as compression does ({moved[0]:.1e})".replace("e-0", "e-")]


def gains() -> list[str]:
    agreement = measured("gains")["vectors"]["32"]["agreement"]
    integers, rows, vectors = (agreement[name]["log10_ratio_std"] for name in ("int8-row", "int4-row", "vq8-d4"))
    return [f"({integers:.2f} with 32 vectors; {rows:.2f} for `int4-row`, {vectors:.2f} for `vq8-d4`)"]


def transformer() -> list[str]:
    found = measured("pocket_dit")
    return [f"{percent(found['test'])} of the test prompts right in {found['steps']} steps"]


def temporal() -> list[str]:
    found = measured("temporal")
    rows, folded = (found[name]["rows"]["W4A8"] for name in ("pocket-turbo", "pocket-turbo, folded"))

    def further(of: Any, name: str) -> int:
        blocks, nearest = of[name]["blocks"], of["nearest"]["blocks"]
        return sum(blocks[each]["cosine"] < nearest[each]["cosine"] for each in blocks)

    def alone(name: str) -> str:
        return f"{folded[name]['block_alone_median_psnr_db']:.1f} dB"

    def behind(name: str) -> str:
        return f"{rows['tiar']['psnr_db'] - rows[name]['psnr_db']:.1f} dB"

    cosines = [f"{folded[name]['cosine']:.5f}" for name in ("inside", "tiar", "nearest")]
    assert further(folded, "tiar") == further(rows, "tiar") == 0
    of_four = (found[name]["rows"].values() for name in ("pocket-turbo", "pocket-turbo, folded"))
    assert not any(row["mismatches"] for bits in of_four for by_name in bits for row in by_name.values())
    twenty = found["pocket"]["rows"]["W4A8"]["nearest"]
    own, six = found["pocket-turbo"]["float"], found["pocket-turbo"]["rows"]["W8A6"]
    return [
        f"Of float, {percent(own)} of the test prompts are right, at a Fréchet distance of {own['frechet']:.1f}; "
        f"folded, {100 * found['pocket-turbo, folded']['float_alone']['alignment']:.0f} of 100",
        f"folded, `inside` turns the features of {further(folded, 'inside')} of 17 blocks further than nearest "
        f"rounding, and `tiar` none (cosine {cosines[0]} and {cosines[1]}; nearest {cosines[2]})",
        f"picture at {alone('inside')} with `inside` and {alone('tiar')} with `tiar`, at {alone('nearest')}",
        f"`inside` turns the features of {further(rows, 'inside')} of 17 blocks further",
        f"{twenty['mismatches']} of {twenty['features']} are in W4A8",
        f"of 6 bits, the worst feature's cosine is {six['nearest, FSC']['least_cosine']:.4f} in the place of "
        f"{six['nearest']['least_cosine']:.4f}",
        f"to {behind('inside')} in PSNR, and of learning anything at all {behind('nearest')} are gained; `frozen` is "
        f"{behind('frozen')} behind",
    ]


SENTENCES = [
    ("docs/tfmq.md", temporal),
    ("README.md", executorch),
    ("README.md", accuracy_level),
    ("docs/gains.md", gains),
    ("README.md", transformer),
    ("README.md", full_size),
    ("README.md", readme_codebooks),
    ("README.md", executorch_codebooks),
    ("docs/codebooks.md", page_codebooks),
    ("docs/mixdq.md", mixdq),
]


@pytest.mark.parametrize(("page", "said"), SENTENCES, ids=lambda value: getattr(value, "__name__", value))
def test_sentences_say_what_was_measured(page: str, said: Any) -> None:
    text = " ".join((ROOT / page).read_text().split())
    for sentence in said():
        assert sentence in text, sentence
