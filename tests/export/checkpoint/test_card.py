# SPDX-License-Identifier: Apache-2.0
"""Licence and author come from the model's card, and a card that says nothing, or is none, is no error."""

from pathlib import Path

import pytest

from turbopocket.export.checkpoint.card import ModelCard, model_card
from turbopocket.export.checkpoint.hub import wanted_files

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: openrail++\ntags:\n- text-to-image\n---\n# A model\n", ModelCard("openrail++")),
        ("---\nlicense: other\nlicense_name: sai-nc-community\n---\n", ModelCard("sai-nc-community")),
        ("---\nlicense: 'mit'\nauthor: A Person\n---\n", ModelCard("mit", "A Person")),
        ("---\nlicense:\n- mit\n---\nlicense: apache-2.0\n", ModelCard()),
        ("---\nlicense: [mit, gpl]\nauthor: >\n  folded\n---\n", ModelCard()),
        ("# A model\nlicense: mit\n", ModelCard()),
        ("---\nlicense: mit\n", ModelCard()),
        ("", ModelCard()),
    ],
)
def test_the_head_of_the_card_is_read(text: str, found: ModelCard, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(text)
    assert model_card(tmp_path) == found


def test_what_can_not_be_read_says_nothing(tmp_path: Path) -> None:
    assert model_card(tmp_path) == ModelCard()
    (tmp_path / "README.md").write_bytes(b"---\nlicense: \xff\n---\n")
    assert model_card(tmp_path) == ModelCard()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n" + "a" * 300_000)
    assert model_card(tmp_path) == ModelCard()


@pytest.mark.parametrize("name", ["weights", "turbo_weights", "dit_weights"])
def test_bundled_models_have_a_card(name: str) -> None:
    assert model_card(ROOT / "pocket" / name) == ModelCard("apache-2.0", "the turbopocket project")


def test_the_card_is_fetched_with_a_model_of_the_hub() -> None:
    assert "README.md" in wanted_files(["README.md", "model_index.json", "LICENSE.md"], [], [])
    assert "README.md" not in wanted_files(["model_index.json"], [], [])
