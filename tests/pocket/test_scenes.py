# SPDX-License-Identifier: Apache-2.0
"""Captions, splits and labels of scenes."""

import pytest

from turbopocket.pocket.scenes import (
    LABELS,
    SPLITS,
    CaptionError,
    Scene,
    captions,
    labels_of,
    parse_caption,
    sample_scenes,
    scenes_of,
    split_of,
)

ACCEPTANCE = "a large red circle left of a small blue square on a white background"


def pairs_of(scenes: tuple[Scene, ...]) -> set[frozenset[tuple[str, str]]]:
    return {frozenset((each.colour, each.shape) for each in (scene.first, scene.second)) for scene in scenes}


def test_parsing_a_caption_and_printing_it_are_inverse() -> None:
    scenes = [scene for split in SPLITS for scene in sample_scenes(split, 200, seed=0)]
    assert [parse_caption(scene.caption) for scene in scenes] == scenes
    assert parse_caption(ACCEPTANCE).caption == ACCEPTANCE


@pytest.mark.parametrize(
    "caption",
    ["", ACCEPTANCE + ".", ACCEPTANCE.replace("red", "orange"), ACCEPTANCE.replace("left of", "beside")],
)
def test_a_sentence_outside_the_language_is_refused_with_the_words_that_are_allowed(caption: str) -> None:
    with pytest.raises(CaptionError, match="left of.*pink"):
        parse_caption(caption)


def test_no_pair_of_coloured_shapes_is_in_two_splits() -> None:
    train, selection, test = (pairs_of(scenes_of(split)) for split in SPLITS)
    assert not train & selection
    assert not train & test
    assert not selection & test
    assert len(train | selection | test) == 30 * 31 // 2
    assert len(test) >= 30
    assert len(selection) >= 30


def test_every_coloured_shape_is_seen_in_training() -> None:
    assert len(frozenset().union(*pairs_of(scenes_of("train")))) == 30


def test_the_acceptance_prompt_is_held_out() -> None:
    assert split_of(parse_caption(ACCEPTANCE)) == "test"


def test_sampled_captions_belong_to_their_split_and_follow_the_seed() -> None:
    drawn = captions("selection", 50, seed=3)
    assert {split_of(parse_caption(caption)) for caption in drawn} == {"selection"}
    assert drawn == captions("selection", 50, seed=3)
    assert drawn != captions("selection", 50, seed=4)


def test_both_tellings_of_a_scene_have_the_same_labels() -> None:
    scenes = sample_scenes("train", 100, seed=0)
    mirrored = [scene.mirrored for scene in scenes]
    assert labels_of(scenes).equal(labels_of(mirrored))
    assert all(scene.mirrored.mirrored == scene != scene.mirrored for scene in scenes)


def test_labels_name_the_left_or_top_object_first() -> None:
    scene = parse_caption("a small cyan ring below a large green cross on a pink background")
    row = dict(zip(LABELS, labels_of([scene])[0].tolist(), strict=True))
    expected = {"axis": 1, "background": 3, "shape0": 3, "colour0": 1, "size0": 1}
    assert row == expected | {"shape1": 4, "colour1": 5, "size1": 0}
