"""The shapes world: captions, drawings, splits, and an oracle that knows from pixels alone what is shown."""

import random
from dataclasses import replace

import pytest
import torch

from tc_lightning.tiny.captions import BACKGROUNDS, COLOURS, SHAPES, SIZES, Scene, Thing, read, write
from tc_lightning.tiny.oracle import agreement, failure, judge, look
from tc_lightning.tiny.shapes import AREA, CENTROID_Y, SPLITS, captions, change_one_fact, coverage, draw, sample_scene, split_of


def scenes(count: int, seed: int = 0, split: str = "train") -> list[Scene]:
    rng = random.Random(seed)
    return [sample_scene(rng, split) for _ in range(count)]


def unordered(scene: Scene) -> tuple:
    return scene.background, frozenset(scene.things)


def test_reading_what_was_written_gives_the_scene_back():
    rng = random.Random(1)
    for scene in scenes(2000):
        assert unordered(read(write(scene, rng))) == unordered(scene)


def test_a_caption_that_leaves_facts_out_states_no_other():
    rng = random.Random(2)
    for scene in scenes(1000, seed=1):
        stated = read(write(scene, rng, forget=0.5))
        assert agreement(scene, stated) == 1.0 and stated.facts() <= scene.facts()


@pytest.mark.parametrize(
    ("caption", "background", "things"),
    [
        ("a red circle", None, [("circle", "red", None, None)]),
        ("A  TINY Red Disc at the top, grey background", "gray", [("circle", "red", "small", "top")]),
        ("a blue box to the left of a big cross", None, [("square", "blue", None, "left"), ("cross", None, "large", "right")]),
        ("black background, a plus above a triangle", "black", [("cross", None, None, "top"), ("triangle", None, None, "bottom")]),
    ],
)
def test_captions_in_other_words(caption, background, things):
    assert read(caption) == Scene(background, tuple(Thing(*facts) for facts in things))


@pytest.mark.parametrize("caption", ["", "a dog in the park", "red", "a circle, a cross and a square"])
def test_other_texts_are_no_captions(caption):
    with pytest.raises(ValueError, match="not a caption of the shapes world"):
        read(caption)


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.full)])
def test_oracle_passes_renders_and_refuses_one_wrong_fact(count):
    """Gates: at least 99 % of renders strictly, at most 1 % of captions with one fact changed."""
    rng = random.Random(3)
    drawn = scenes(count, seed=2) + scenes(count, seed=2, split="heldout")
    images = draw(drawn, seed=0)
    right = judge(images, [write(scene, rng) for scene in drawn])
    wrong = judge(images, [write(change_one_fact(scene, rng), rng) for scene in drawn])
    assert (right == 1).float().mean() >= 0.99
    assert (wrong == 1).float().mean() <= 0.01


def test_oracle_gives_nothing_to_blank_noise_and_crowded_images():
    prompts = captions(64, seed=3)
    generator = torch.Generator().manual_seed(0)
    blank = [torch.full((3, 32, 32), value) for value in (0.0, 0.25, 0.5, 0.75, 1.0)]
    grounds = [draw([Scene(ground, ())], 0)[0] for ground in BACKGROUNDS]
    noise = [torch.rand(3, 32, 32, generator=generator) for _ in range(56)]
    assert judge(torch.stack(blank + grounds + noise), prompts).sum() == 0


def test_oracle_gives_nothing_to_three_or_more_drawings():
    """Two drawings of a right scene and more beside them."""
    drawn = [scene for scene in scenes(300, seed=4) if len(scene.things) == 2 and scene.things[0].place in ("left", "right")]
    rng, images = random.Random(5), draw(drawn, 0)
    for count in (1, 2):
        y = torch.tensor([3.5, 28.5][:count])
        masks = coverage(torch.zeros(count), torch.full((count,), 16.0), y, torch.full((count,), 2.8)).sum(0).clamp(max=1)
        crowded = images * (1 - masks) + torch.tensor([0.9, 0.1, 0.1])[:, None, None] * masks
        assert judge(crowded, [write(scene, rng) for scene in drawn]).sum() == 0


def test_agreement_is_the_share_of_asked_facts():
    thing, other = Thing("circle", "red", "small", "left"), Thing("square", "blue", "large", "right")
    scene = Scene("white", (thing, other))
    assert agreement(scene, scene) == agreement(Scene("white", (other, thing)), scene) == 1.0
    assert agreement(replace(scene, background="black"), scene) == pytest.approx(8 / 9)
    assert agreement(Scene("white", (thing,)), scene) == pytest.approx(5 / 9)
    assert agreement(scene, Scene("white", (thing,))) == 0.0 == agreement(None, scene)
    swapped = Scene("white", (replace(thing, colour="blue"), replace(other, colour="red")))
    assert agreement(swapped, scene) == pytest.approx(7 / 9)


def test_failures_have_a_kind():
    scene = Scene("white", (Thing("circle", "red", "large", "centre"),))
    image = draw([scene], 0)
    assert failure(look(image)[0], scene) == ""
    assert failure(look(image)[0], Scene("white", (Thing("circle", "blue", "large", "centre"),))) == "alignment"
    assert failure(look(torch.rand(1, 3, 32, 32))[0], scene) == "decoding"


def test_oracle_reads_larger_images_too():
    drawn = scenes(32, seed=6)
    small = draw(drawn, 0)
    large = torch.nn.functional.interpolate(small, scale_factor=4, mode="nearest")
    assert [reading.scene for reading in look(large)] == [reading.scene for reading in look(small)]


def test_drawing_is_a_function_of_the_scenes_and_the_seed():
    drawn = scenes(16)
    state = torch.get_rng_state()
    images = draw(drawn, seed=4)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, draw(drawn, seed=4)) and not torch.equal(images, draw(drawn, seed=5))
    assert images.shape == (16, 3, 32, 32) and images.min() >= 0 and images.max() <= 1


def test_area_and_centre_of_mass_are_those_of_the_drawings():
    """What the oracle computes radius and place with, against the masks themselves at high resolution."""
    count, radius = len(SHAPES), 120.0
    centre = torch.full((count,), 200.0)
    masks = coverage(torch.arange(count), centre, centre, torch.full((count,), radius), canvas=400)
    area = masks.sum((1, 2))
    axis = torch.arange(400) + 0.5
    assert torch.allclose(area / radius**2, torch.tensor(AREA), rtol=0.01)
    down = ((masks.sum(2) @ axis) / area - 200) / radius
    assert torch.allclose(down, torch.tensor(CENTROID_Y), atol=0.01)


def test_splits_are_disjoint_cover_all_and_never_change():
    """Held-out combinations are fixed by a hash: a change here makes every published number another one."""
    kinds = [Thing(shape, colour, "small", place) for shape in SHAPES for colour in COLOURS for place in ("left", "right")]
    pairs = [Scene("white", (a, b)) for a in kinds for b in kinds if a.place == "left" and b.place == "right"]
    shares = dict(zip(SPLITS, (0.7, 0.1, 0.2), strict=True))
    counts = {name: sum(split_of(scene) == name for scene in pairs) for name in SPLITS}
    assert counts == {name: pytest.approx(len(pairs) * share, rel=0.25) for name, share in shares.items()}
    for scene in pairs:
        mirrored = Scene("black", (replace(scene.things[1], size="large"), scene.things[0]))
        assert split_of(mirrored) == split_of(scene)
    assert captions(2, 0, "heldout") == captions(3, 0, "heldout")[:2]


@pytest.mark.parametrize("split", SPLITS)
def test_captions_show_combinations_of_their_split_only(split):
    texts = captions(500, seed=7, split=split)
    assert len(set(texts)) == 500 and {split_of(read(text)) for text in texts} == {split}


def test_unknown_split():
    with pytest.raises(ValueError, match="accepted are train, dev, heldout"):
        sample_scene(random.Random(0), "test")


def test_one_fact_is_changed_and_it_is_another_value():
    rng = random.Random(8)
    for scene in scenes(500, seed=8):
        changed = change_one_fact(scene, rng)
        facts = [(scene.background, changed.background)]
        for one, two in zip(scene.things, changed.things, strict=True):
            facts += zip(vars(one).values(), vars(two).values(), strict=True)
        assert sum(one != two for one, two in facts) == 1
        assert {thing.size for thing in changed.things} <= set(SIZES)
        assert split_of(changed) == split_of(scene)  # else training would meet held-out combinations
