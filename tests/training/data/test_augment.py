"""Augmentation: what the random draws depend on, what happens to a sample, which settings are refused."""

import dataclasses

import numpy as np
import pytest
import torch

from partial_fc.training.data import GlyphIdentities
from partial_fc.training.data.augment import AugmentConfig, augment, stream_key, to_float
from partial_fc.training.errors import UserError

OFF = AugmentConfig(
    rotation=0,
    translation=0,
    scale_min=1,
    scale_max=1,
    shear=0,
    flip_probability=0,
    blur_probability=0,
    contrast=0,
    brightness=0,
    erase_probability=0,
    noise_std=0,
)
ALL = AugmentConfig(flip_probability=0.5, blur_probability=0.5, erase_probability=0.5)


def only(**settings: float) -> AugmentConfig:
    """A configuration that does nothing but `settings`."""
    return dataclasses.replace(OFF, **settings)


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (OFF, "none"),
        (AugmentConfig(enabled=False), "none"),
        (only(flip_probability=0.5), "mirrored 0.5"),
        (only(blur_probability=0.5, blur_sigma=0), "none"),
        (
            AugmentConfig(),
            "rotation 8, translation 0.06, scale 0.9 to 1.1, shear 4, blur 0.3, contrast 0.2, brightness 0.1, "
            "erasing 0.3, noise 0.05",
        ),
    ],
)
def test_what_is_done_in_one_line(config, line):
    assert str(config) == line


@pytest.fixture(scope="module")
def glyphs() -> tuple[torch.Tensor, torch.Tensor]:
    data = GlyphIdentities("train", identities=10)
    return torch.stack([data.load(index) for index in range(100)]), torch.arange(100)


def test_a_sample_is_augmented_alike_alone_and_in_any_batch(glyphs):
    images, indices = glyphs
    whole = augment(images, indices, seed=3, epoch=2, config=ALL)
    assert whole.dtype == torch.float32
    assert whole.shape == images.shape
    for index in (0, 1, 57, 99):
        alone = augment(images[index : index + 1], indices[index : index + 1], seed=3, epoch=2, config=ALL)
        assert torch.equal(alone[0], whole[index])
    order = torch.randperm(100, generator=torch.Generator().manual_seed(1))[:37]
    assert torch.equal(augment(images[order], indices[order], seed=3, epoch=2, config=ALL), whole[order])


def test_the_global_random_states_have_no_part_and_are_left_alone(glyphs):
    images, indices = glyphs
    torch.manual_seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    first = augment(images, indices, seed=0, epoch=0, config=ALL)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, augment(images, indices, seed=0, epoch=0, config=ALL))


def test_epoch_seed_and_index_each_change_every_sample(glyphs):
    images, indices = glyphs
    base = augment(images, indices, seed=0, epoch=0, config=AugmentConfig())
    for other in (
        augment(images, indices, seed=0, epoch=1, config=AugmentConfig()),
        augment(images, indices, seed=1, epoch=0, config=AugmentConfig()),
        augment(images, indices + 1000, seed=0, epoch=0, config=AugmentConfig()),
    ):
        assert (other - base).abs().flatten(1).amax(1).min() > 0.05


def test_the_input_is_left_as_it_is(glyphs):
    images, indices = glyphs
    floats = to_float(images)
    kept = images.clone(), floats.clone()
    from_bytes = augment(images, indices, seed=0, epoch=0, config=ALL)
    from_floats = augment(floats, indices, seed=0, epoch=0, config=ALL)
    assert torch.equal(images, kept[0])
    assert torch.equal(floats, kept[1])
    assert torch.equal(from_bytes, from_floats)
    copy = augment(floats, indices, seed=0, epoch=0, config=AugmentConfig(enabled=False))
    assert torch.equal(copy, floats)
    assert copy.data_ptr() != floats.data_ptr()


def test_with_every_strength_zero_nothing_changes(glyphs):
    images, indices = glyphs
    torch.testing.assert_close(
        augment(images, indices, seed=0, epoch=0, config=OFF), to_float(images), atol=2e-5, rtol=0
    )


def test_to_float_spans_minus_one_to_one():
    bytes_ = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    torch.testing.assert_close(to_float(bytes_).flatten(), torch.tensor([-1.0, 1.0, (51 / 255 - 0.5) / 0.5]))


def test_the_stream_is_that_of_a_philox_keyed_by_seed_epoch_and_index():
    """The contrast factor is a known one of a sample's numbers: drawn again here by constructing the generator."""
    grey = torch.full((3, 1, 4, 4), 0.5)
    indices = torch.tensor([4, 7, 123456789])
    got = augment(grey, indices, seed=5, epoch=6, config=only(contrast=0.2))[:, 0, 0, 0]
    for value, index in zip(got.tolist(), indices.tolist(), strict=True):
        key = np.array([stream_key(5, 6), index], dtype=np.uint64)
        number = np.random.Generator(np.random.Philox(key=key)).random(9)[8]
        assert value == pytest.approx(0.5 * (1 + 0.2 * (2 * number - 1)), abs=1e-6)


def test_rotation_by_the_drawn_angle_matches_a_reference():
    """A horizontal bar turned by the drawn angle lies along that angle, and its centre stays."""
    bar = torch.full((8, 1, 41, 41), -1.0)
    bar[:, :, 19:22, 5:36] = 1.0
    turned = augment(bar, torch.arange(8), seed=0, epoch=0, config=only(rotation=40))
    ys, xs = torch.meshgrid(torch.arange(41.0) - 20, torch.arange(41.0) - 20, indexing="ij")
    angles = []
    for index, image in enumerate(turned[:, 0]):
        ink = image + 1
        xx, yy, xy = ((a * b * ink).sum() for a, b in ((xs, xs), (ys, ys), (xs, ys)))
        angles.append(float(torch.rad2deg(0.5 * torch.atan2(2 * xy, xx - yy))))
        number = np.random.Generator(
            np.random.Philox(key=np.array([stream_key(0, 0), index], dtype=np.uint64))
        ).random()
        assert angles[-1] == pytest.approx(40 * (2 * number - 1), abs=0.5)
        assert float((ink * xs).sum() / ink.sum()) == pytest.approx(0, abs=0.05)
    assert min(angles) < -10 < 10 < max(angles)


def test_shift_scale_and_flip_move_pixels_as_they_say():
    dot = torch.full((200, 1, 33, 33), -1.0)
    dot[:, :, 14:19, 22:27] = 1.0  # centred 8 pixels right of the middle
    xs = torch.arange(33.0) - 16

    def columns(config: AugmentConfig) -> torch.Tensor:
        ink = augment(dot, torch.arange(200), seed=0, epoch=0, config=config)[:, 0] + 1
        return (ink * xs).sum((1, 2)) / ink.sum((1, 2))

    shifted = columns(only(translation=0.1)) - 8
    assert -3.31 < shifted.min() < -2.8
    assert 2.8 < shifted.max() < 3.31
    scaled = columns(only(scale_min=0.5, scale_max=1.5)) / 8
    assert 0.49 < scaled.min() < 0.6
    assert 1.4 < scaled.max() < 1.51
    flipped = columns(only(flip_probability=0.3))
    torch.testing.assert_close(flipped.abs(), torch.full((200,), 8.0))
    assert 40 <= int((flipped < 0).sum()) <= 80
    assert (columns(only(flip_probability=0)) > 0).all()


def test_shear_slants_vertical_lines_only():
    cross = torch.full((50, 1, 41, 41), -1.0)
    cross[:, :, 20, 10:31] = 1.0
    cross[:, :, 10:31, 20] = 1.0
    out = augment(cross, torch.arange(50), seed=0, epoch=0, config=only(shear=30))
    assert (out[:, 0, 20, 12:29] > 0.99).all(), "the horizontal line stays"
    tops = out[:, 0, 10].argmax(-1) - 20
    assert tops.min() <= -4
    assert tops.max() >= 4
    assert tops.abs().max() <= 6  # 10 rows * tan(30 degrees)


def test_outside_the_image_the_border_is_repeated():
    white = torch.full((20, 3, 16, 16), 255, dtype=torch.uint8)
    moved = augment(white, torch.arange(20), seed=0, epoch=0, config=only(translation=0.3, rotation=30, scale_min=0.5))
    torch.testing.assert_close(moved, torch.ones(20, 3, 16, 16))


def test_blur_keeps_the_light_and_spreads_a_point_by_sigma():
    point = torch.zeros(400, 1, 21, 21)
    point[:, :, 10, 10] = 1.0
    out = augment(point, torch.arange(400), seed=0, epoch=0, config=only(blur_probability=0.5, blur_sigma=2.0))
    torch.testing.assert_close(out.sum((1, 2, 3)), torch.ones(400), atol=1e-4, rtol=0)
    blurred = out[:, 0, 10, 10] < 0.999
    assert 140 <= int(blurred.sum()) <= 260
    variance = (out[:, 0].sum(1) * (torch.arange(21.0) - 10) ** 2).sum(1)
    assert 1.7 < variance.max().sqrt() <= 2.0


def test_noise_has_the_stated_deviation_and_no_mean():
    grey = torch.zeros(64, 1, 32, 32)
    out = augment(grey, torch.arange(64), seed=0, epoch=0, config=only(noise_std=0.05))
    assert float(out.std()) == pytest.approx(0.05, rel=0.02)
    assert abs(float(out.mean())) < 0.001
    flat = out.flatten(1)
    correlation = torch.corrcoef(flat)
    assert (correlation - torch.eye(64)).abs().max() < 0.16


def test_erasing_greys_one_rectangle_of_the_share():
    white = torch.ones(300, 1, 32, 32)
    out = augment(white, torch.arange(300), seed=0, epoch=0, config=only(erase_probability=0.5, erase_size=0.5))
    grey = (out == 0).squeeze(1)
    erased = grey.any(2).any(1)
    assert 110 <= int(erased.sum()) <= 190
    heights, widths = grey.any(2).sum(1)[erased], grey.any(1).sum(1)[erased]
    assert torch.equal(grey.sum((1, 2))[erased], heights * widths), "a filled rectangle"
    for lengths in (heights, widths):
        assert (lengths.min(), lengths.max()) == (4, 16)
    assert (out[~erased] == 1).all()


@pytest.mark.parametrize("shape", [(0, 1, 32, 32), (2, 3, 7, 12), (1, 1, 1, 1), (2, 3, 112, 112)])
def test_any_shape_goes(shape):
    images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    out = augment(images, torch.arange(shape[0]), seed=-1, epoch=0, config=ALL)
    assert out.shape == shape
    assert out.isfinite().all()
    assert (out.abs() <= 1).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blur_probability": 1.5}, r"augment\.blur_probability is 1\.5; give a number from 0 to 1"),
        ({"noise_std": -0.1}, r"augment\.noise_std is -0\.1; give a number of at least 0"),
        ({"rotation": float("nan")}, r"augment\.rotation is nan"),
        ({"shear": 90.0}, r"augment\.shear is 90\.0; give less than 80 degrees"),
        ({"scale_min": 1.3}, r"augment\.scale_min is 1\.3 and scale_max is 1\.1; give 0 < scale_min <= scale_max"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        AugmentConfig(**settings)
