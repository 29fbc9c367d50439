# SPDX-License-Identifier: Apache-2.0
"""Cases by seed: a damaged model or artifact, or a hostile request, run in a child and judged."""

import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import tomli_w

from .children import SECONDS, Children, Ran
from .mutations import damage_file, files_of, json_bytes, mutate_json, rehash

PROMPT = "a red circle"
UNBUILT = ("--lora", "nowhere.safetensors")
"""What ends a build once everything else was read."""
PLAN = ("plan", "model", "--set", "sampler.steps=1", "--set", "sampler.guidance=1")


@dataclass
class Tally:
    """How the cases of one kind ended, and the faults among them."""

    ends: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def add(self, ran: Ran, what: str, wrong: str | None = None) -> None:
        """One case; `wrong` is what is wrong with a success."""
        fault = ran.fault or (wrong if ran.code == 0 else None)
        told = "crash told in a sentence" if "the process ended by SIG" in ran.err else "refusal"
        self.ends[fault or ("success" if ran.code == 0 else told)] += 1
        if fault:
            said = (ran.err.strip() or "nothing").splitlines()
            self.faults.append(f"{what}: {fault}: {' | '.join(said[-3:])[-600:]}")

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {end}" for end, count in sorted(self.ends.items()))
        return f"{sum(self.ends.values())} cases: {ends}"


@contextmanager
def emptied(folder: Path) -> Iterator[Path]:
    """The folder, made anew, gone afterwards."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def damaged_models(children: Children, model: Path, scratch: Path, seeds: range) -> Tally:
    """A model folder with one or two damaged files, read as a build reads it, and planned."""
    tally = Tally()
    for seed in seeds:
        random = Random(f"model {seed}")
        with emptied(scratch) as folder:
            shutil.copytree(model, folder / "model")
            what = _damaged(folder / "model", random, seed)
            if seed % 3:
                ran = children.read_model(folder, folder / "model")
            else:
                ran = children.command(folder, *PLAN, "--budget", "1GB", "--json")
            tally.add(ran, what)
    return tally


def damaged_artifacts(
    children: Children, artifact: Path, scratch: Path, seeds: range, planted: str = "", seconds: float = SECONDS
) -> Tally:
    """An artifact with damaged files, drawn with; of every other one the manifest agrees with the files.

    What draws another picture although its manifest knows better is a wrong success. `planted` is run before each case.
    """
    with emptied(scratch) as folder:
        shutil.copytree(artifact, folder / "art")
        whole = _drawn(children, folder)
        expected = (folder / "out.png").read_bytes() if whole.code == 0 else b""
    assert expected, whole.err
    children.planted = planted
    tally = Tally()
    for seed in seeds:
        random = Random(f"artifact {seed}")
        with emptied(scratch) as folder:
            shutil.copytree(artifact, folder / "art")
            agrees = bool(seed % 4)
            what = _damaged(folder / "art", random, seed, manifest=0.3)
            if agrees:
                _rehashed(folder / "art")
            ran = _drawn(children, folder, seconds)
            picture = folder / "out.png"
            other = ran.code == 0 and picture.read_bytes() != expected
            wrong = "wrong success: another picture" if other and not agrees and "manifest.json" not in what else None
            tally.add(ran, what, wrong)
    children.planted = ""
    return tally


def hostile_requests(children: Children, model: Path, artifact: Path, scratch: Path, seeds: range) -> Tally:
    """Recipes and command lines that nobody means well with."""
    from turbopocket.export.recipe import Recipe

    tally = Tally()
    for seed in seeds:
        random = Random(f"request {seed}")
        with emptied(scratch) as folder:
            (folder / "art").symlink_to(artifact)
            (folder / "model").symlink_to(model)
            arguments = _request(random, folder, Recipe())
            ran = children.command(folder, *arguments)
            tally.add(ran, f"{seed}: {' '.join(map(ascii, arguments))[:300]}")
    return tally


def _damaged(folder: Path, random: Random, seed: int, manifest: float = 0.0) -> str:
    own = folder / "manifest.json"
    files = files_of(folder)
    chosen = [own] if random.random() < manifest else [random.choice(files)]
    if random.randrange(4) == 0:
        chosen.append(random.choice(files))
    said = [f"{file.relative_to(folder)} {damage_file(file, random)}" for file in dict.fromkeys(chosen)]
    return f"{seed}: {', '.join(said)}"


def _rehashed(folder: Path) -> None:
    with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):  # the manifest itself is damaged
        rehash(folder)


def _drawn(children: Children, folder: Path, seconds: float = SECONDS) -> Ran:
    asked = "generate", "art", PROMPT, "--seed", 7, "--out", "out.png", "--json"
    return children.command(folder, *asked, seconds=seconds)


def _request(random: Random, folder: Path, recipe: object) -> list[object]:
    odd = random.choice(TEXTS)
    if random.randrange(2):
        values = mutate_json(recipe.model_dump(mode="json", exclude_none=True), random)  # type: ignore[attr-defined]
        file = folder / "own.toml"
        try:
            file.write_bytes(tomli_w.dumps(values).encode("utf-8", "surrogatepass"))
        except (TypeError, ValueError, AttributeError):  # what TOML has no words for
            file.write_bytes(json_bytes(values, random))
        return [*random.choice((["recipe", "show"], [*PLAN, "--recipe"])), "own.toml"]
    return random.choice(
        (
            ["generate", "art", odd, "--out", "x.png"],
            ["generate", "art", PROMPT, "--out", odd or "."],
            ["generate", odd, PROMPT, "--out", "x.png"],
            ["generate", "art", PROMPT, "--out", "x.png", "--negative", odd, "--guidance", 3],
            ["generate", "art", PROMPT, "--out", "x.png", "--size", odd],
            ["generate", "art", PROMPT, "--out", "x.png", "--image", odd],
            ["generate", "art", PROMPT, "--out", "x.png", "--steps", random.choice(NUMBERS)],
            ["generate", "art", PROMPT, "--out", "x.png", "--guidance", random.choice(NUMBERS)],
            ["generate", "art", PROMPT, "--out", "x.png", "--seed", random.choice(NUMBERS)],
            ["plan", odd],
            [*PLAN, "--budget", odd],
            [*PLAN, "--formats", odd],
            [*PLAN, "--pin", odd],
            [*PLAN, "--measured", odd],
            [*PLAN, "--recipe", odd],
            [*PLAN, "--config", odd],
            [*PLAN, "--set", odd],
            [*PLAN, "--set", f"compress.pin={odd}"],
            ["recipe", "show", "--set", f"sampler.steps={odd}"],
            ["recipe", "show", odd],
            ["check", odd],
            ["report", odd],
            ["build", "model", "--out", odd, *UNBUILT],
            ["build", "model", "--out", "new", "--lora", odd],
            ["build", "model", "--out", "new", "--size", odd, *UNBUILT],
            ["build", odd, "--out", "new", *UNBUILT],
            [odd],
        )
    )


NUMBERS = ("0", "-1", "1", "2000", "1e9", "nan", "inf", "9" * 5000, "1.5", "")
TEXTS = (
    *(
        "",
        " ",
        "\t\n",
        "-",
        "--",
        "x" * 100_000,
        "x" * 300,
        "\udcff\udcfe",
        "é" * 200,
        "[/x]",
        "[bold]",
        "~nosuchuser/x",
    ),
    *("..", ".", "/", "art", "model", "art/manifest.json", "model/unet", "nowhere/x", "C:\\x", "a=b", "=", "a.b.c=1"),
    *(
        "1e400",
        "-1",
        "0x10",
        "10" * 3000,
        "[" * 5000,
        "{a=" * 2000,
        '"',
        "'''",
        "${HOME}",
        "%s%n",
        "owner/name",
        "a\nb",
    ),
    *(
        "model/unet/config.json:0.5",
        "model/unet/diffusion_pytorch_model.safetensors:nan",
        "0x0",
        "32x32",
        "9" * 400 + "x1",
    ),
    *("\u202e", "\U0001f600" * 100, "<|endoftext|>" * 50, "int4-g0", "int4-g999999999999"),
    *("avq9x99-d8", "**=fp16", "seed=true", "compress.budget=1"),
)
