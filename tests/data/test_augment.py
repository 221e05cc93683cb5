import numpy as np

from mllm_jax.data.augment import HorizontalFlip, RandomResizedCrop, rng_for


def image(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack([y, x, np.zeros_like(x)], -1).astype(np.uint8)


def test_numbers_depend_on_seed_id_and_epoch_alone():
    draw = lambda *key: rng_for(*key).integers(2**62)
    assert draw(0, "a", 0) == draw(0, "a", 0)
    assert len({draw(s, i, e) for s in range(3) for i in ("a", "b", "1", "11") for e in range(3)}) == 36
    # Not confused by ids that contain the separator.
    assert draw(1, "2/x", 3) != draw(1, "x", 3)


def test_crops_are_boxes_of_the_image_with_the_asked_area_and_shape():
    crop = RandomResizedCrop(scale=(0.2, 0.5), ratio=(0.5, 2.0))
    areas = []
    for i in range(200):
        out = crop(image(100, 160), rng_for(0, str(i), 0))
        height, width = out.shape[:2]
        top, left = out[0, 0, :2]
        np.testing.assert_array_equal(out, image(100, 160)[top : top + height, left : left + width])
        # Sides are rounded to pixels, hence two percent.
        assert 0.5 * 0.98 <= width / height <= 2.0 * 1.02
        areas.append(height * width / 16000)
    assert 0.19 < min(areas) < 0.25 and 0.45 < max(areas) < 0.51


def test_an_image_without_such_a_box_gives_its_centre():
    out = RandomResizedCrop(scale=(1.0, 1.0), ratio=(1.0, 1.0))(image(10, 100), rng_for(0, "x", 0))
    np.testing.assert_array_equal(out, image(10, 100)[:, 45:55])


def test_flips_are_their_own_inverse_and_as_frequent_as_asked():
    always, never = HorizontalFlip(p=1.0), HorizontalFlip(p=0.0)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(always(always(image(4, 6), rng), rng), image(4, 6))
    np.testing.assert_array_equal(never(image(4, 6), rng), image(4, 6))
    flipped = sum(HorizontalFlip(p=0.3)(image(4, 6), rng_for(0, str(i), 0))[0, 0, 1] == 5 for i in range(1000))
    assert 250 < flipped < 350          # 300 expected, standard deviation 14.5; the seed is fixed
