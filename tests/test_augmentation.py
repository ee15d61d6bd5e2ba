"""Augmentation by section 2.3: crop, rotation, horizontal flip, vertical flip, in one warp, with the paper's
distributions.

Truth comes from torchvision: RandomResizedCrop and RandomRotation for the distributions (two-sample
Kolmogorov-Smirnov tests), its crop, resize with antialiasing, rotate, hflip and vflip in turn for the
pictures, its ToTensor and Normalize for the numbers. What `augment` did is read off the pixels of a picture
whose colours say where they come from, a ruler that is itself tried on torchvision. All streams are seeded:
a p-value below 0.001 is a fault and not bad luck.
"""

import functools
import itertools

import cv2
import demo_data
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import InterpolationMode, RandomResizedCrop, RandomRotation, v2

import datasets

F = v2.functional
ALPHA = 0.001
SCALE, RATIO = (0.08, 1.0), (0.75, 4 / 3)  # the paper, 2.3, its 1.33 as torchvision's own 4/3
SHAPES = [(250, 250), (96, 240), (240, 60)]  # the last so elongated that torchvision often falls back


@functools.cache
def pictures(kind):
    """Synthetic bone marrow cells of 250 x 250, or slides of 540 x 720, as uint8 RGB."""
    if kind == "cells":
        return [demo_data.draw_cell(label, 0, 1)[0] for label in ("NGS", "EOS", "BAS", "FGC")]
    return [demo_data.draw_slide(0, "train", number)[0] for number in (1, 2)]


def by_torchvision(image, size, box, angle, flip_x, flip_y):
    """The paper's order of operations with torchvision's own functions: uint8 [size,size,3]."""
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)
    tensor = F.resize(F.crop(tensor, *box), [size, size], antialias=True)
    tensor = F.rotate(tensor, angle, InterpolationMode.BILINEAR)
    tensor = F.horizontal_flip(tensor) if flip_x else tensor
    tensor = F.vertical_flip(tensor) if flip_y else tensor
    return tensor.permute(1, 2, 0).numpy()


def covered(image, size, box, angle, flip_x, flip_y):
    """Which pixels of the result lie inside the picture, and which outside, with a margin of 1.5 of the
    crop's pixels between."""
    white = by_torchvision(np.full_like(image, 255), size, box, angle, flip_x, flip_y)[..., 0]
    margin = int(np.ceil(1.5 * max(1, size / min(box[2:])))) + 1
    kernel = np.ones((2 * margin + 1, 2 * margin + 1))
    grown = cv2.copyMakeBorder(white, margin, margin, margin, margin, cv2.BORDER_CONSTANT, value=0)
    inside = cv2.erode(grown, kernel)[margin:-margin, margin:-margin] == 255
    return inside, cv2.dilate(white, kernel) == 0


def boxes(image, height, width, number, seed):
    """Random boxes of this size or a quarter more where there is room, angles and flips for warp."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        h = min(image.shape[0], round(height * rng.uniform(1, 1.25)))
        w = min(image.shape[1], round(width * rng.uniform(1, 1.25)))
        top, left = rng.integers(image.shape[0] - h + 1), rng.integers(image.shape[1] - w + 1)
        yield (int(top), int(left), h, w), rng.uniform(0, 180), bool(rng.integers(2)), bool(rng.integers(2))


# ---------------------------------------------------------------- the picture
@pytest.mark.parametrize(
    "kind, height, width, size, mean, greatest, everywhere",
    [
        ("cells", 70, 80, 224, 0.5, 30, 1.2),  # magnified 3 times
        ("cells", 130, 110, 224, 0.5, 30, 1.2),  # magnified twice
        ("slides", 400, 90, 128, 0.5, 30, 1.2),  # reduced one way and magnified the other
        ("cells", 250, 250, 224, 0.001, 1, 0.001),  # reduced a little
        ("slides", 500, 640, 128, 0.001, 1, 0.001),  # reduced 4 times
    ],
)
def test_the_picture_is_that_of_torchvisions_crop_resize_rotate_and_flips(
    kind, height, width, size, mean, greatest, everywhere
):
    """Mean and greatest difference in grey levels inside the rotated picture, and mean difference of all
    pixels.

    Reduced crops are equal but for rounding. Magnified ones are interpolated once here and twice in
    torchvision; and along
    their edges half a pixel of the crop fades to the black around it, which torchvision repeats.
    """
    for number, image in enumerate(pictures(kind)):
        for parameters in boxes(image, height, width, 6, seed=number):
            inside, _ = covered(image, size, *parameters)
            assert inside.mean() > 0.4
            theirs = by_torchvision(image, size, *parameters).astype(int)
            difference = np.abs(datasets.warp(image, size, *parameters) - theirs)
            assert difference[inside].mean() < mean and difference[inside].max() <= greatest
            assert difference.mean() < everywhere


def test_corners_that_the_rotation_uncovers_are_black():
    """White pictures rotated: exactly 0 outside, exactly 255 inside; at 45 degrees a sixth of the square is
    uncovered."""
    image = np.full((250, 250, 3), 255, np.uint8)
    for box, angle, flip_x, flip_y in [*boxes(image, 90, 110, 8, 0), *boxes(image, 250, 250, 8, 1)]:
        inside, outside = covered(image, 224, box, angle, flip_x, flip_y)
        ours = datasets.warp(image, 224, box, angle, flip_x, flip_y)
        assert (ours[inside] == 255).all() and (ours[outside] == 0).all()
    diagonal = datasets.warp(image, 224, (0, 0, 250, 250), 45)
    octagon = 2 * np.sqrt(2) - 2  # a regular one is left
    assert (diagonal == 0).all(-1).mean() == pytest.approx(1 - octagon, abs=0.01)


def test_the_rotation_comes_before_the_flips():
    """The same parameters in the other order give another picture: rotated the other way round."""
    image, size, box, angle = pictures("cells")[0], 128, (10, 20, 220, 200), 35.0
    for flips in ((True, False), (False, True)):
        inside, _ = covered(image, size, box, angle, *flips)
        ours = datasets.warp(image, size, box, angle, *flips).astype(int)
        swapped = F.crop(torch.from_numpy(image.copy()).permute(2, 0, 1), *box)
        swapped = F.resize(swapped, [size, size], antialias=True)
        swapped = F.horizontal_flip(swapped) if flips[0] else F.vertical_flip(swapped)
        swapped = F.rotate(swapped, angle, InterpolationMode.BILINEAR).permute(1, 2, 0).numpy()
        assert np.abs(ours - by_torchvision(image, size, box, angle, *flips))[inside].mean() < 0.25
        assert np.abs(ours - swapped)[inside].mean() > 10


def test_the_crop_comes_before_the_rotation():
    """White outside the box never enters the picture: cropping after a rotation would bring it into the
    corners."""
    image = np.full((200, 200, 3), 255, np.uint8)
    image[60:140, 50:150] = (40, 90, 160)
    for angle in (0, 20, 45, 90, 135):
        for size in (48, 96):
            picture = datasets.warp(image, size, (60, 50, 80, 100), angle)
            assert (picture.reshape(-1, 3).max(0) <= (40, 90, 160)).all()


def test_a_rotation_turns_counter_clockwise():
    """A mark on the right is at the top after 90 degrees, as torchvision and Pillow turn; on the left after
    180."""
    image = np.zeros((101, 101, 3), np.uint8)
    image[48:53, 90:95] = 255
    for angle, (x, y) in {0: (92, 50), 90: (50, 8), 180: (8, 50)}.items():
        mark = datasets.warp(image, 101, (0, 0, 101, 101), angle)[..., 0]
        assert [v.mean() for v in np.nonzero(mark > 128)] == [y, x]
        assert np.array_equal(mark, np.asarray(Image.fromarray(image).rotate(angle, Image.BILINEAR))[..., 0])


@pytest.mark.parametrize("height, width", [(256, 256), (250, 240), (512, 200)])
def test_stripes_finer_than_a_pixel_become_grey_and_do_not_alias(height, width):
    """Stripes and a chequerboard one pixel wide, black and white, reduced to 64 pixels: 127.5 everywhere, not
    moire."""
    rows, columns = np.indices((height, width))
    for pattern in (columns % 2, rows % 2, (rows + columns) % 2):
        image = np.repeat((pattern * 255).astype(np.uint8)[..., None], 3, 2)
        parameters = (0, 0, height, width), 30, False, True
        inside, _ = covered(image, 64, *parameters)
        for grey in (datasets.resize(image, 64)[1:-1, 1:-1], datasets.warp(image, 64, *parameters)[inside]):
            assert np.abs(grey - 127.5).max() < 16
        bare = cv2.resize(image, (64, 64), interpolation=cv2.INTER_LINEAR)
        nearest = image[:: height // 64, :: width // 64]
        assert max(np.abs(grey - 127.5).max() for grey in (bare, nearest)) > 100, "the pattern could tell"


# ---------------------------------------------------------------- validation and numbers
def in_memory(images):
    """Cells of {path: image}, of classes a and b in turn."""
    targets = np.arange(len(images)) % 2
    return datasets.Cells(".", "memory", ["a", "b"], list(images), targets, read=images.__getitem__)


@pytest.mark.parametrize("size", [224, 64])
def test_validation_pictures_are_resized_alone_to_torchvisions_very_pixels(size):
    """Equal to resize(antialias=True) of uint8 tensors in every pixel, and to Pillow's bilinear resize within
    1 grey level."""
    slide, other = pictures("slides")
    images = [*pictures("cells"), slide, other[:90, :400], demo_data.draw_patch(0, "train", 1)[0]]
    images = {str(i): image for i, image in enumerate([*images, pictures("cells")[0][:3, :7]])}
    cells = in_memory(images)
    batch, labels = datasets.Batches(cells, size).__getitems__(range(len(cells)))
    assert batch.dtype == torch.uint8 and batch.shape == (len(images), 3, size, size)
    assert labels.tolist() == cells.targets.tolist()
    for ours, image in zip(batch, images.values(), strict=True):
        theirs = F.resize(torch.from_numpy(image.copy()).permute(2, 0, 1), [size, size], antialias=True)
        assert torch.equal(ours, theirs)
        pillow = np.asarray(Image.fromarray(image).resize((size, size), Image.BILINEAR))
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - pillow).max() <= 1


def test_normalise_is_torchvisions_to_tensor_and_normalize():
    """Of all 256 grey levels in every channel, with the paper's mean and std of the bone marrow cells, to
    1e-5."""
    mean, std = (0.5630, 0.4959, 0.7353), (0.2421, 0.2835, 0.1767)
    levels = np.tile(np.arange(256, dtype=np.uint8), (2, 3, 4))
    levels = np.random.default_rng(0).permuted(levels, axis=2).reshape(2, 3, 32, 32)
    usual = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    theirs = torch.stack([usual(Image.fromarray(image.transpose(1, 2, 0))) for image in levels])
    for layout in (torch.contiguous_format, torch.channels_last):
        ours = datasets.normalise(torch.from_numpy(levels).contiguous(memory_format=layout), mean, std)
        assert ours.dtype == torch.float32 and ours.is_contiguous(memory_format=layout)
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- distributions, read off the pixels
def ruler(height, width):
    """A picture whose red says in which column a pixel lies, its green in which row; blue is 255
    everywhere."""
    rows, columns = np.indices((height, width))
    channels = [columns * 255 / (width - 1), rows * 255 / (height - 1), np.full((height, width), 255)]
    return np.stack(channels, -1).round().astype(np.uint8)


def read_ruler(picture, height, width):
    """(top, left, height, width, angle in [0,180), flip_x, flip_y) that made a picture of the ruler, from a
    fit to its pixels.

    Both flips are a turn by 180 degrees, so that every turn by 0-360 degrees, mirrored or not, is read as one
    of these.
    """
    size = len(picture)
    v, u = 2 * np.array(np.nonzero(picture[::2, ::2, 2] >= 254))
    places = picture[v, u, :2] * (np.array([width - 1, height - 1]) / 255)
    centred = np.column_stack([u - (size - 1) / 2, v - (size - 1) / 2, np.ones(len(u))])
    fit = np.linalg.lstsq(centred, places, rcond=None)[0].T
    w, h = np.rint(size * np.hypot(fit[:, 0], fit[:, 1]))
    (cos_x, sin_x), (sin_y, cos_y) = fit[:, :2] * size / np.array([[w], [h]])
    flip_x, flip_y = sin_y < 0, sin_x > 0
    angle = np.degrees(np.arctan2(abs(sin_x) + abs(sin_y), cos_x * (-1) ** flip_x + cos_y * (-1) ** flip_y))
    return fit[1, 2] - (h - 1) / 2, fit[0, 2] - (w - 1) / 2, h, w, angle, flip_x, flip_y


@functools.cache
def seen(height, width, crop=True, number=1000, size=64):
    """What augment did to the ruler at some positions of an epoch: read_ruler's columns, [number, 7]."""
    image = ruler(height, width)
    rng = np.random.default_rng(9 + crop)
    made = (datasets.augment(image, size, rng, crop) for _ in range(number))
    return np.array([read_ruler(picture, height, width) for picture in made])


@functools.cache
def crops_of_torchvision(height, width, number=1500):
    """(top, left, height, width) as RandomResizedCrop draws them, [number, 4]."""
    torch.manual_seed(height + width)
    image = torch.zeros(3, height, width)
    return np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(number)], float)


def measures(crops, height, width):
    """What a crop is judged by, dict of [N]: its share of the area, its aspect ratio, and its place where it
    has room to move."""
    top, left, h, w = crops.T[:4]
    room = {"place from the top": (top, height - h), "place from the left": (left, width - w)}
    places = {name: (place / space.clip(1))[space >= 5] for name, (place, space) in room.items()}
    area = h * w / (height * width)
    return places | {"area": area, "ratio": w / h, "width": w, "height": h, "top": top, "left": left}


@pytest.mark.parametrize("height, width", SHAPES)
def test_the_ruler_reads_what_torchvisions_own_functions_did(height, width):
    """Box to a pixel, angle to half a degree, both flips, of 40 pictures that crop, resize, rotate, hflip and
    vflip made."""
    rng, image = np.random.default_rng(0), ruler(height, width)
    for _ in range(40):
        h, w = rng.integers(height // 3, height + 1), rng.integers(width // 3, width + 1)
        box = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), int(h), int(w)
        angle, flip_x, flip_y = rng.uniform(2, 178), bool(rng.integers(2)), bool(rng.integers(2))
        top, left, *read = read_ruler(by_torchvision(image, 96, box, angle, flip_x, flip_y), height, width)
        assert (top, left, *read[:2]) == pytest.approx(box, abs=1)
        assert read[2] == pytest.approx(angle, abs=0.5) and tuple(read[3:]) == (flip_x, flip_y)


@pytest.mark.parametrize("height, width", SHAPES)
def test_crops_are_distributed_as_those_of_torchvisions_random_resized_crop(height, width):
    """Area, aspect ratio and place of 1,000 crops that augment made, read off the pixels."""
    ours = measures(np.rint(seen(height, width)), height, width)
    for name, theirs in measures(crops_of_torchvision(height, width), height, width).items():
        assert stats.ks_2samp(ours[name], theirs)[1] > ALPHA, name


@pytest.mark.parametrize("height, width", [*SHAPES, (7, 9)])
def test_four_thousand_drawn_crops_are_distributed_as_torchvisions(height, width):
    """The boxes themselves, integers, four times as many as are read off pictures; also of an image of 7 x 9
    pixels."""
    rng = np.random.default_rng(8)
    ours = np.array([datasets.draw_crop(height, width, rng) for _ in range(4000)])
    assert ours.dtype.kind == "i" and (ours[:, :2] >= 0).all() and (ours[:, 2:] > 0).all()
    assert (ours[:, :2] + ours[:, 2:] <= (height, width)).all()
    ours = measures(ours.astype(float), height, width)
    for name, theirs in measures(crops_of_torchvision(height, width, 4000), height, width).items():
        assert stats.ks_2samp(ours[name], theirs)[1] > ALPHA, name


@pytest.mark.parametrize("height, width", [(2, 300), (300, 2), (40, 3000)])
def test_images_too_elongated_for_any_crop_fall_back_to_torchvisions_central_one(height, width):
    """No box of 8% of the area and an aspect ratio of 0.75-1.33 fits: always the largest central one."""
    theirs = set(map(tuple, crops_of_torchvision(height, width, 20).astype(int).tolist()))
    rng = np.random.default_rng(0)
    assert {datasets.draw_crop(height, width, rng) for _ in range(200)} == theirs and len(theirs) == 1


@pytest.mark.parametrize("crop", [True, False])
def test_angles_are_distributed_as_torchvisions_random_rotation_by_0_to_180_degrees(crop):
    torch.manual_seed(1)
    theirs = [RandomRotation.get_params([0, 180]) for _ in range(1500)]
    ours = seen(250, 250, crop)[:, 4]
    assert stats.ks_2samp(ours, theirs)[1] > ALPHA
    assert 0 <= ours.min() < 1 and 179 < ours.max() <= 180.5
    assert stats.ks_2samp(np.array(theirs) * 0.9, theirs)[1] < ALPHA, "it could tell 0-162 degrees"


def test_half_of_the_pictures_are_flipped_each_way_independently():
    """Of 1,000 crops and 3,000 small whole images: a fourth each not, horizontally, vertically or both ways,
    a half each way."""
    flips = np.concatenate([seen(250, 250), seen(32, 32, False, 3000, 32)])[:, 5:].astype(int)
    assert stats.chisquare(np.bincount(flips @ [1, 2], minlength=4))[1] > ALPHA
    for flipped in flips.sum(0):
        assert stats.binomtest(int(flipped), len(flips), 0.5).pvalue > ALPHA
    assert stats.binomtest(round(0.45 * len(flips)), len(flips), 0.5).pvalue < ALPHA / 10, (
        "it could tell 0.45"
    )


def test_crop_angle_and_flips_are_independent_of_each_other():
    """Rank correlations of all pairs of area, aspect ratio, place, angle and flips in 1,000 augmentations of
    a square."""
    top, left, h, w, angle, flip_x, flip_y = seen(250, 250).T
    columns = [h * w, w / h, top / (251 - h), left / (251 - w), angle, flip_x, flip_y]
    p = [stats.spearmanr(one, two)[1] for one, two in itertools.combinations(columns, 2)]
    assert min(p) > ALPHA / len(p)


# ---------------------------------------------------------------- pre-training
@pytest.mark.parametrize("height, width", SHAPES)
def test_without_crop_the_whole_image_is_always_in_the_picture(height, width):
    """Read off the ruler: box, all of the image in each of 300 augmentations, while rotation and flips go
    on."""
    made = seen(height, width, crop=False, number=300)
    assert np.abs(made[:, :4] - (0, 0, height, width)).max() <= 1
    assert np.ptp(made[:, 4]) > 170 and (np.bincount(made[:, 5:].astype(int) @ [1, 2]) > 40).all()


def target(height, width):
    """Grey, in it a white ellipse that touches all four sides, in it a black one: resized whole, a target
    under any turn and flip."""
    rows, columns = np.indices((height, width))
    radius = np.hypot((rows + 0.5) / height * 2 - 1, (columns + 0.5) / width * 2 - 1)
    return np.dstack([np.select([radius < 0.5, radius < 0.97], [0, 255], 100).astype(np.uint8)] * 3)


@pytest.fixture
def watched(watched_inputs, tmp_path):
    """Call a script's main() in this process: returns the pictures, float [N,3,H,W] normalised, that its
    network was trained on."""
    return lambda *arguments: torch.cat(watched_inputs(*arguments, "--image-size", 48)).numpy()


def test_pretraining_sees_whole_images_and_fine_tuning_crops(watched, tmp_path):
    """Targets that touch all sides: pretrain.py's network gets them whole, rotated on black; train.py's gets
    parts of them."""
    import pretrain
    import train

    for label, i in itertools.product("ab", range(16)):
        file = tmp_path / "targets" / label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(file), target(60 + 3 * i, 120 - 2 * i))
    whole = target(48, 48)[..., 0]
    flat = (cv2.erode(whole, np.ones((5, 5))) == cv2.dilate(whole, np.ones((5, 5)))) & (whole != 100)
    seen_whole = {}
    for script, init in ((pretrain, "targets"), (train, "random")):
        fold = ["--fold", 0] if script is train else []
        images = watched(script, "--data", tmp_path / "targets", "--init", init, *fold)[:, 0]
        levels = (images - images.min()) / np.ptp(images) * 255
        assert len(images) >= 16 and np.median(levels[:, 0, 0]) < 1, "rotation uncovers most of the corners"
        seen_whole[script] = (np.abs(levels - whole)[:, flat] < 64).all(1)
    assert seen_whole[pretrain].all() and seen_whole[train].mean() < 0.2


# ---------------------------------------------------------------- keyed draws
def memory(number=40, size=50):
    """Random images in memory."""
    draw = {str(i): np.random.default_rng(i) for i in range(number)}
    return in_memory({i: rng.integers(256, size=(size, size, 3), dtype=np.uint8) for i, rng in draw.items()})


@pytest.mark.parametrize("crop", [True, False])
def test_a_position_is_augmented_alike_however_the_epoch_is_divided_into_batches(crop):
    batches = datasets.Batches(memory(), 24, seed=3, fold=2, crop=crop)
    indices = np.random.default_rng(0).integers(40, size=96)
    whole = batches.__getitems__((4, 0, indices))[0]
    for size in (1, 7, 32):
        keys = [(4, first, indices[first : first + size]) for first in range(0, 96, size)]
        assert torch.equal(torch.cat([batches.__getitems__(key)[0] for key in keys]), whole)


def test_one_image_is_augmented_differently_by_seed_fold_epoch_and_position():
    """Through Batches: the same image under 24 keys gives 24 pictures."""
    cells, indices, pictures_made = memory(1), np.zeros(3, int), set()
    for seed, fold, epoch in itertools.product((0, 1), (0, 1), (1, 2)):
        images, _ = datasets.Batches(cells, 24, seed, fold).__getitems__((epoch, 64, indices))
        pictures_made |= {image.numpy().tobytes() for image in images}
    assert len(pictures_made) == 24


def test_neighbouring_positions_epochs_folds_and_seeds_are_augmented_independently():
    """Keys that differ by 1 in one place: the angles that a batch's pictures were turned by are
    uncorrelated."""
    cells = in_memory({"0": ruler(32, 32)})

    def angles(seed, fold, epoch, first, number=500):
        batch = datasets.Batches(cells, 32, seed, fold, crop=False)
        images, _ = batch.__getitems__((epoch, first, np.zeros(number, int)))
        return np.array([read_ruler(image.permute(1, 2, 0).numpy(), 32, 32)[4] for image in images])

    base = angles(1, 1, 5, 0)
    assert stats.kstest(base, "uniform", (0, 180))[1] > ALPHA
    for key in ((2, 1, 5, 0), (1, 2, 5, 0), (1, 1, 6, 0), (1, 1, 5, 500)):
        assert stats.spearmanr(base, angles(*key))[1] > ALPHA, key
    assert stats.spearmanr(base[:-1], base[1:])[1] > ALPHA
    assert np.array_equal(base[1:], angles(1, 1, 5, 1, 499)), "the position decides, not the batch"


def test_a_further_augmentation_may_draw_as_it_likes(monkeypatch):
    """Seam: one that draws a random number of times and brightens half of the images; the others stay as they
    were."""
    plain, cells = datasets.augment, memory(8)

    def brighter(image, size, rng, crop=True, colour=0.0):
        shift = rng.integers(1, 20, size=rng.integers(1, 5)).sum() if image[0, 0, 0] > 100 else 0
        return np.minimum(plain(image, size, rng, crop), 255 - shift) + np.uint8(shift)

    before = datasets.Batches(cells, 24).__getitems__((1, 0, np.arange(8)))[0]
    monkeypatch.setattr(datasets, "augment", brighter)
    after = datasets.Batches(cells, 24).__getitems__((1, 0, np.arange(8)))[0]
    chosen = [cells[i][0, 0, 0] > 100 for i in range(8)]
    assert (before != after).flatten(1).any(1).tolist() == chosen and 0 < sum(chosen) < 8
