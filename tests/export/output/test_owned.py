# SPDX-License-Identifier: Apache-2.0
"""What a build and a distillation replace is theirs, to the last file; anything else stays, also with --overwrite."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from turbopocket.export.output.owned import refuse_build as refuse_build_in
from turbopocket.export.output.owned import refuse_occupied, remove_journal
from turbopocket.export.output.staging import run_folder
from turbopocket.ground.errors import TurbopocketError

from ..stand_ins import put_artifact, put_product, put_report


def refuse_build(out: Path, overwrite: bool) -> None:
    """For a build that works beside its output."""
    refuse_build_in(out, run_folder(out), overwrite)


def precious(folder: Path, name: str = "thesis.txt") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("precious")
    return folder / name


def put_build(out: Path) -> None:
    put_artifact(out)
    put_report(out.with_name(f"{out.name}.report"))


def test_occupied_output_needs_overwrite_and_only_artifacts_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    refuse_build(out, overwrite=False)
    out.mkdir()
    refuse_build(out, overwrite=False)
    precious(out)
    with pytest.raises(TurbopocketError, match="is not empty"):
        refuse_build(out, overwrite=False)
    with pytest.raises(TurbopocketError, match=r"has no manifest\.json, so it is not an artifact"):
        refuse_build(out, overwrite=True)
    with pytest.raises(TurbopocketError, match="is a file"):
        refuse_build(out / "thesis.txt", overwrite=True)
    put_artifact(out)
    with pytest.raises(TurbopocketError, match=r"holds thesis\.txt, which no command of ours made"):
        refuse_build(out, overwrite=True)
    (out / "thesis.txt").unlink()
    refuse_build(out, overwrite=True)


@pytest.mark.parametrize("content", ["{}", "onnx", '{"name": "a web page"}', '{"files": ["thesis.txt"]}', "[" * 10_000])
def test_a_manifest_of_something_else_makes_no_artifact(content: str, tmp_path: Path) -> None:
    precious(tmp_path / "out")
    (tmp_path / "out" / "manifest.json").write_text(content)
    with pytest.raises(TurbopocketError, match="is not an artifact's manifest, or is damaged"):
        refuse_build(tmp_path / "out", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("beside", ["mine.report", "mine.run"])
def test_a_foreign_folder_where_a_build_puts_something_is_refused(beside: str, overwrite: bool, tmp_path: Path) -> None:
    precious(tmp_path / beside)
    with pytest.raises(TurbopocketError, match=rf"{beside} (is not empty|holds thesis\.txt)"):
        refuse_build(tmp_path / "mine", overwrite)


def test_a_report_without_its_artifact_needs_overwrite_as_well(tmp_path: Path) -> None:
    put_report(tmp_path / "mine.report")
    with pytest.raises(TurbopocketError, match=r"mine\.report is not empty") as raised:
        refuse_build(tmp_path / "mine", overwrite=False)
    assert raised.value.hint == "give another folder, or --overwrite"
    refuse_build(tmp_path / "mine", overwrite=True)


@pytest.mark.parametrize("where", ["", "deep/down"])
@pytest.mark.parametrize("folder", ["mine", "mine.report", "both/onnx", "both/onnx.report"])
def test_a_file_of_the_users_in_a_folder_of_ours_is_not_replaced(folder: str, where: str, tmp_path: Path) -> None:
    put_build(tmp_path / "mine")
    put_build(tmp_path / "both" / "onnx")
    out = tmp_path / folder.partition("/")[0].removesuffix(".report")
    refuse_build(out, overwrite=True)
    precious(tmp_path / folder / where)
    with pytest.raises(TurbopocketError, match=r"holds .*thesis\.txt, which no command of ours made"):
        refuse_build(out, overwrite=True)


@pytest.mark.parametrize("name", ["thesis.txt", "onnx.run/thesis.txt", "notes.report/report.html"])
def test_a_folder_of_artifacts_holds_nothing_else(name: str, tmp_path: Path) -> None:
    put_build(tmp_path / "both" / "onnx")
    refuse_occupied(tmp_path / "both", overwrite=True)
    precious((tmp_path / "both" / name).parent, Path(name).name)
    with pytest.raises(TurbopocketError, match="so it is not an artifact"):
        refuse_occupied(tmp_path / "both", overwrite=True)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", ["mine", "mine.report", "both/onnx", "mine/model.onnx"])
def test_a_symlink_is_not_replaced(name: str, overwrite: bool, tmp_path: Path) -> None:
    put_build(tmp_path / "mine")
    put_build(tmp_path / "both" / "onnx")
    place = tmp_path / name
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    out = tmp_path / name.partition("/")[0].removesuffix(".report")
    if name == "mine/model.onnx":  # its name is ours: replaced is the link, never its target
        refuse_build(out, overwrite=True)
        return
    with pytest.raises(TurbopocketError, match="is a symlink|is not empty"):
        refuse_build(out, overwrite)


def test_a_mounted_file_system_is_not_replaced() -> None:
    with pytest.raises(TurbopocketError, match="output /proc is a mounted file system"):
        refuse_build(Path("/proc"), overwrite=True)


def test_what_is_write_protected_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_build(tmp_path / "mine")
    honest = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda path, mode: "report" not in str(path) and honest(path, mode))
    with pytest.raises(TurbopocketError, match=r"mine\.report is write-protected"):
        refuse_build(tmp_path / "mine", overwrite=True)


def test_what_a_killed_writer_left_in_a_report_is_ours(tmp_path: Path) -> None:
    put_build(tmp_path / "mine")
    (tmp_path / "mine.report" / ".turbopocket-0123456789abcdef").write_text("half a page")
    refuse_build(tmp_path / "mine", overwrite=True)


def test_what_stages_made_is_removed_and_nothing_else_is(tmp_path: Path) -> None:
    run, out = tmp_path / "mine.run", tmp_path / "mine"
    product = put_product(run)
    lowered = run / "lower-0123456789abcdef.partial" / "files" / "unet.mlpackage" / "weight.bin"
    lowered.parent.mkdir(parents=True)
    lowered.write_text("half a file")
    refuse_build(out, overwrite=False)
    assert remove_journal(run, product.parent) == len("{}layer")
    assert lowered.is_file()
    assert not product.parent.exists()
    put_product(run)
    precious(product.parent)
    (run / "fedcba9876543210").mkdir()
    remove_journal(run)
    assert sorted(path.name for path in run.rglob("*")) == [product.parent.name, "fedcba9876543210", "thesis.txt"]


def test_a_link_among_the_products_is_a_strangers(tmp_path: Path) -> None:
    elsewhere = put_product(tmp_path / "other.run").parent
    (tmp_path / "mine.run").mkdir()
    (tmp_path / "mine.run" / elsewhere.name).symlink_to(elsewhere)
    with pytest.raises(TurbopocketError, match="holds .*, which this command did not make"):
        refuse_build(tmp_path / "mine", overwrite=True)
    remove_journal(tmp_path / "mine.run")
    assert len(list(elsewhere.iterdir())) == 2


@pytest.mark.parametrize(
    "name", ["run.json", "checkpoint/model.safetensors", "compress-0123456789abcdef/deep/a@fp16.safetensors"]
)
def test_the_run_of_a_distillation_is_not_a_builds(name: str, tmp_path: Path) -> None:
    precious((tmp_path / "mine.run" / name).parent, Path(name).name)
    with pytest.raises(TurbopocketError, match="holds .*, which this command did not make"):
        refuse_build(tmp_path / "mine", overwrite=True)


def test_a_refused_build_does_no_work(
    tiny_sd: Path, tmp_path: Path, turbopocket: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("turbopocket.export.build.bench.load", lambda *_: pytest.fail("a model was loaded"))
    notes, thesis = precious(tmp_path / "mine.report", "notes.txt"), precious(tmp_path / "mine.run")
    for arguments in ((), ("--overwrite",)):
        ran = turbopocket("build", tiny_sd, "--out", tmp_path / "mine", *arguments)
        assert ran.code == 1
        assert "error: " in ran.err
        assert notes.read_text() == thesis.read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.report", "mine.run"]
