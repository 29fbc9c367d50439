# SPDX-License-Identifier: Apache-2.0
"""A model is its content: what libraries note beside it when they read it is no part of it."""

import json
import shutil
from pathlib import Path
from typing import Any

from turbopocket.export.checkpoint.identity import model_identity, module_identity
from turbopocket.export.checkpoint.load import load
from turbopocket.export.targets.side_files import write_side_files


def test_what_a_config_leaves_out_may_be_in_any_order(tiny_sd: Path, tmp_path: Path) -> None:
    """diffusers notes it in the order of a set of strings, which no two processes share."""
    folder = Path(shutil.copytree(tiny_sd, tmp_path / "model"))
    for name in ("vae", "unet"):
        path = folder / name / "config.json"
        config = json.loads(path.read_text())
        for key in ("act_fn", "dropout", "mid_block_add_attention"):
            config.pop(key, None)
        path.write_text(json.dumps(config))
    model = load(folder, steps=2)
    found = []
    for order in (1, -1):
        for name in ("vae", "unet"):
            module: Any = model.modules[name]
            noted = sorted(module.config["_use_default_values"])[::order]
            assert len(noted) > 1
            module.register_to_config(_use_default_values=noted)
        write_side_files(model, {"unet": None, "vae_decoder": None}, model.image_size, tmp_path / "files")
        written = [(tmp_path / "files" / name / "config.json").read_bytes() for name in ("unet", "vae_decoder")]
        found.append((model_identity(model), module_identity(model.modules["vae"]), written))
    assert found[0] == found[1]
    assert b"_use_default_values" not in b"".join(found[0][2])  # a list of settings that a reader is to forget
