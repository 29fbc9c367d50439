# SPDX-License-Identifier: Apache-2.0
"""What is done for `test_staging_crashes`, in a process without PyTorch: of a small one a thousand forks take seconds.

argv is the name of a case, a folder, its arguments as JSON, and 1 or 0 for whether two folders can be exchanged.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from turbopocket.export.build.journal import opened
from turbopocket.export.output import replacing
from turbopocket.export.output.owned import refuse_build, refuse_folder, refuse_occupied, write_record
from turbopocket.export.output.staging import claimed, report_folder, run_folder, settle_output
from turbopocket.export.progress import StageProgress
from turbopocket.ground.errors import TurbopocketError

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.export.crash_states import crash_states, killed_before
from tests.export.stand_ins import put_artifact, put_product, put_report

Work = Callable[[Path, str, bool], None]


def build(out: Path, text: str, overwrite: bool) -> None:
    """The files of a build of one target, with a product from which it could go on."""
    with (
        claimed(out, lambda: refuse_build(out, run_folder(out), overwrite)) as claim,
        opened(run_folder(out), False, StageProgress(quiet=True)) as run,
        claim.staged(out, report_folder(out)) as (artifact, report),
    ):
        put_product(run.path)
        put_artifact(artifact, text)
        put_report(report, text)


def build_targets(out: Path, text: str, overwrite: bool) -> None:
    """Those of a build of two targets."""
    with claimed(out, lambda: refuse_occupied(out, overwrite)) as claim, claim.staged(out) as (folder,):
        for target in ("onnx", "coreml"):
            build(folder / target, text, False)


def distil(out: Path, text: str, overwrite: bool) -> None:
    """Those of a distillation."""
    with claimed(out, lambda: refuse_folder(out, overwrite)) as claim, claim.staged(out) as (folder,):
        (folder / "unet").mkdir()
        (folder / "unet" / "weights").write_text(text)
        write_record(folder)


CAN_SWAP = bool(int(sys.argv[4]))
WORKS = {"build": build, "targets": build_targets, "distill": distil}
WHOLE = {
    "build": {"a/model.onnx", "a.report/report.html"},
    "targets": {
        f"a/{target}{name}" for target in ("onnx", "coreml") for name in ("/model.onnx", ".report/report.html")
    },
    "distill": {"a/unet/weights"},
}


def contents(folder: Path, verb: str) -> dict[str, str]:
    """By path, the text of the files that tell one output from another, where they are to lie in the end."""
    return {name: (folder / name).read_text() for name in WHOLE[verb] if (folder / name).is_file()}


def is_whole(found: dict[str, str], verb: str, texts: tuple[str, ...]) -> bool:
    return found.keys() == WHOLE[verb] and set(found.values()) in [{text} for text in texts]


NEIGHBOURS = {".a.backup/.lock": "", ".a.backup/gold": "mine", "a.txt": "mine", ".a.turbopocket.old/x": "mine"}


def neighbours(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in NEIGHBOURS}


def next_command_after_a_kill(folder: Path, verb: str, overwrite: bool, next_command: str) -> None:
    """The work killed before each of its operations, and what the next command then finds and makes."""
    out, work = folder / "a", WORKS[verb]

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        for name, text in NEIGHBOURS.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text)
        if overwrite:
            work(out, "OLD", False)

    states = 0
    for operation in crash_states(
        folder, prepare, lambda: work(out, "NEW", overwrite), folder / ".a.turbopocket" / "new"
    ):
        states += 1
        left = contents(folder, verb)
        if CAN_SWAP and overwrite:  # a reader always finds an artifact
            assert left.keys() == WHOLE[verb], operation
        if next_command == "fails":
            fail(out)
        elif next_command == "reads":
            settle_output(out)
        else:
            again(work, out, overwrite)
        found = contents(folder, verb)
        absent = not found and not overwrite
        assert absent or is_whole(found, verb, ("OLD", "NEW", "AGAIN")), f"{operation}: {found}"
        assert neighbours(folder) == NEIGHBOURS, operation
        if next_command != "reads":
            assert not (folder / ".a.turbopocket").exists(), operation
    assert states > 20
    last = "AGAIN" if next_command == "ends well" and overwrite else "NEW"
    assert is_whole(contents(folder, verb), verb, (last,))


def fail(out: Path) -> None:
    """A command for the output that comes to nothing."""
    with suppress(RuntimeError), claimed(out, lambda: None) as claim, claim.staged(out):
        raise RuntimeError


def again(work: Work, out: Path, overwrite: bool) -> None:
    """The same command once more: it makes its output, or says that the killed one had ended."""
    ended, refused = out.exists() and not overwrite, ""
    try:
        work(out, "AGAIN", overwrite)
    except TurbopocketError as error:
        refused = str(error)
    assert ("is not empty" in refused) if ended else not refused, refused


def next_command_after_a_kill_of_the_next(folder: Path) -> None:
    """A replacement killed before each of its operations, the command after it before each of its own, and a third."""
    out, made = folder / "a", folder / ".a.turbopocket" / "new"
    states = 0
    for first in range(100):

        def prepare(first: int = first) -> None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            build(out, "OLD", False)
            killed_before(first, folder, lambda: build(out, "NEW", True), made)

        prepare()
        if not (folder / ".a.turbopocket").exists() and states:
            break
        if not (folder / ".a.turbopocket" / "journal.json").exists():
            continue
        for operation in crash_states(folder, prepare, lambda: fail(out), made):
            fail(out)
            states += 1
            assert is_whole(contents(folder, "build"), "build", ("OLD", "NEW")), (first, operation)
            assert sorted(path.name for path in folder.iterdir()) in (["a", "a.report"], ["a", "a.report", "a.run"])
    assert states > 20


if __name__ == "__main__":
    case, place, arguments, _ = sys.argv[1:]
    if not CAN_SWAP:
        replacing.exchange = lambda one, other: False
    os.fsync = lambda file: None  # a kill loses nothing that was written; a power cut would
    globals()[case](Path(place), **json.loads(arguments))
