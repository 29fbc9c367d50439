# SPDX-License-Identifier: Apache-2.0
"""What Python computes, in a folder for the app's tests to compare with: ids, noise, steps of samplers, pictures."""

import hashlib
import json
import random
import unicodedata
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from turbopocket.runtimes.drawing.conditioning import PromptCut
from turbopocket.runtimes.drawing.sampler import Memory, make_sampler
from turbopocket.runtimes.drawing.table import sampler_table
from turbopocket.runtimes.drawing.text_to_image import generate
from turbopocket.runtimes.drawing.tokenizer import Tokenizer, open_tokenizers
from turbopocket.runtimes.manifest import load_manifest
from turbopocket.runtimes.onnx.runner import OnnxRunner
from turbopocket.runtimes.schedule import SamplerSpec

PROMPTS = 500
SEEDS = (0, 1, 7, 42, 1234, 65_535, 2**31, 2**32 - 1, 2**32, 2**63 - 1, *range(100, 110))
NORMAL_NUMBERS = 100_000
"""Of each seed: some 25 of them lie in the tail."""
SAMPLER_STEPS = 6
SHAPE = (1, 4, 4, 4)
WRITTEN = (
    "a large red circle left of a small blue square on a white background",
    "Ein großes rotes Quadrat über einem kleinen blauen Kreis, ÄÖÜ ß ẞ",
    "Большой красный круг слева от маленького синего квадрата",
    "白い背景の上の大きな赤い円と小さな青い四角",
    "하얀 배경 위의 큰 빨간 원 각",
    "दायरे के बाईं ओर एक बड़ा लाल वर्ग ३४५",
    "دائرة حمراء كبيرة على يسار مربع أزرق صغير ١٢٣",
    "עיגול אדום גדול משמאל לריבוע כחול קטן",
    "วงกลมสีแดงขนาดใหญ่ทางซ้ายของสี่เหลี่ยม",
    "ΜΕΓΆΛΟΣ ΚΌΚΚΙΝΟΣ ΚΎΚΛΟΣ ΟΔΥΣΣΕΎΣ",
    "İSTANBUL ışık I i İ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 ☕️ 🤷🏾‍♀️",
    "e\u0301 é a\u030a Å \u212b \u1e9b\u0323 \u0958 \u1100\u1161\u11a8",
    "it's we're they've I'm you'll he'd don't IT'S '' 's ''s !'s",
    "1234 12.5% 3rd ½ Ⅷ ² ௧ 𝟘𝟙",
    "tabs\tand\nnew\r\nlines   and\u00a0no-break\u2003wide\u200bzero\u3000ideographic\x1cseparators\x85",
    "  leading and trailing  ",
    "<|startoftext|> inside <|endoftext|> and <|ENDOFTEXT|><|StartOfText|>",
    "a!b!!c ! !! wow!",
    "𝕳𝖊𝖑𝖑𝖔 𐐀𐐨 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 ǅ ß ﬁ ﬀ",
    "___---***(((weighted:1.3))), [bracket], {curly} \\ / | ~ ` @ # $ % ^ & * + =",
    "",
    " ",
    "\x00\x01\x7f",
    "word " * 200,
    "ab" * 300,
    "!" * 100,
    "ö" * 90 + " end",
)


def write_golden(folder: Path, artifact: Path, tokenizers: Mapping[str, Path], pictures: Sequence[str]) -> None:
    """Writes `golden.json` and one file of bytes for each picture, [H, W, 3], of a prompt and its place as seed."""
    folder.mkdir(parents=True)
    golden = {
        "artifact": str(artifact),
        "tokenizers": [_tokens(path, name) for name, path in tokenizers.items()],
        "noise": [_noise(seed) for seed in SEEDS],
        "pictures": list(_pictures(folder, artifact, pictures)),
    }
    (folder / "golden.json").write_text(json.dumps(golden))


def write_walks(folder: Path, kinds: Mapping[str, dict[str, Any]]) -> None:
    """Writes `walks.json`: tables of samplers, and each of their steps as the sampler itself computes it."""
    (folder / "walks.json").write_text(json.dumps([_walk(kind, config) for kind, config in kinds.items()]))


def prompts() -> list[str]:
    """500 prompts: those above, mixtures of their words, and random characters that every platform knows."""
    chance = random.Random(0)
    words = [word for prompt in WRITTEN for word in prompt.split(" ")[:40]]
    known = [chr(point) for point in range(0x20, 0x30000) if unicodedata.ucd_3_2_0.category(chr(point))[0] not in "C"]
    mixed = [" ".join(chance.choices(words, k=chance.randint(1, 30))) for _ in range(300)]
    drawn = PROMPTS - len(WRITTEN) - len(mixed)
    return [*WRITTEN, *mixed, *("".join(chance.choices(known, k=chance.randint(1, 60))) for _ in range(drawn))]


def _tokens(path: Path, name: str) -> dict[str, Any]:
    length = 77
    tokenizer = Tokenizer(path, length)
    read = [(prompt, tokenizer.encode(prompt)) for prompt in prompts()]
    cases = [{"prompt": p, "ids": t.ids.tolist(), "mask": t.mask.tolist(), "cut": t.cut} for p, t in read]
    return {"name": name, "file": str(path), "length": length, "cases": cases}


def _noise(seed: int) -> dict[str, Any]:
    values = np.random.default_rng(seed).standard_normal(NORMAL_NUMBERS, dtype=np.float32)
    bits = values.astype("<f4").tobytes()
    return {"seed": seed, "count": NORMAL_NUMBERS, "sha256": hashlib.sha256(bits).hexdigest(), "tail": _tail(values)}


def _tail(values: Any) -> int:
    """How many numbers are beyond the ziggurat's last layer."""
    return int((np.abs(values) > 3.6541529).sum())


def _pictures(folder: Path, artifact: Path, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    manifest = load_manifest(artifact)
    runner, tokenizers = OnnxRunner(artifact, manifest), open_tokenizers(artifact, manifest)
    for seed, prompt in enumerate(wanted):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptCut)
            pixels = generate(runner, manifest, tokenizers, prompt, seed)
        (folder / f"{seed}.rgb").write_bytes(pixels.tobytes())
        yield {"prompt": prompt, "seed": seed, "file": f"{seed}.rgb"}


def _walk(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    spec = SamplerSpec.from_scheduler_config(config, SAMPLER_STEPS, guidance_scale=1.0)
    sampler, memory, steps = make_sampler(spec), Memory(), []
    rng = np.random.default_rng(3)
    x_t = rng.standard_normal(SHAPE, dtype=np.float32) * np.float32(sampler.init_noise_sigma)
    for index in range(len(sampler.timesteps)):
        output, noise = (rng.standard_normal(SHAPE, dtype=np.float32) for _ in range(2))
        seen = sampler.scale_model_input(x_t, index)
        expected, memory = sampler.step(index, x_t, output, memory, lambda shape, noise=noise: noise)
        named = {"x": x_t, "seen": seen, "output": output, "noise": noise, "next": expected}
        steps.append({name: np.asarray(value, np.float32).ravel().tolist() for name, value in named.items()})
        x_t = expected
    return {"kind": kind, "table": sampler_table(spec, first_picture=False).model_dump(), "steps": steps}
