"""What goes beyond the paper in training: label smoothing, a frozen backbone, jitter of colours.

Truth comes from the formula of Szegedy et al. (2016, section 7), from bits that must not change, and from
torchvision's ColorJitter.
"""

import numpy as np
import pytest
import torch
from scipy import special, stats
from torchvision.transforms import v2

import datasets
import engine
import models

F = v2.functional


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_smoothed_labels_give_each_class_a_share(smoothing):
    """The cross-entropy to (1 - s) of the label and s / C of every class, by numpy."""
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(0, 3, (20, 7)), rng.integers(7, size=20)
    wanted = (1 - smoothing) * np.eye(7)[labels] + smoothing / 7
    expected = -(wanted * special.log_softmax(logits, 1)).sum(1).mean()
    ours = engine.training_loss(torch.tensor(logits), torch.tensor(labels), smoothing)
    assert ours.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "squeezenet1_0"])  # batch norm; dropout, 1x1 head
def test_of_a_frozen_network_only_the_last_layer_changes(name, demo, tmp_path):
    """Its tensors are the initial ones bit for bit after training, the averages of batch norm too."""
    cells = datasets.open_dataset(demo / "bm").subset(np.arange(64))
    torch.manual_seed(0)
    net = models.freeze(models.build_model(name, len(cells.classes), None, 32))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    options = {"mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32, "epochs": 2, "batch_size": 16}
    engine.fit(tmp_path, net, cells, cells, lr=0.1, info={"model": name, "init": "random"}, **options)
    changed = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    head = models.head_name(net)
    assert changed == {f"{head}.weight", f"{head}.bias"}


# ---------------------------------------------------------------- colours
def picture(number):
    """Soft blots of many colours, uint8 [48,48,3]."""
    rng = np.random.default_rng(number)
    return datasets.resize(rng.integers(30, 226, (6, 6, 3), dtype=np.uint8), 48)


class Fixed:
    """In place of a random generator: this change alone, by this factor."""

    def __init__(self, change, factor):
        self.change, self.factor = change, factor

    def permutation(self, names):
        assert self.change in names
        return [self.change]

    def uniform(self, low, high):
        assert low <= self.factor <= high
        return self.factor


CHANGES = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": lambda image, factor: F.adjust_hue(image, factor - 1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_each_change_is_torchvisions(change):
    """To 1 grey level, hue, which has 256 steps here, to 8."""
    for number, factor in enumerate([0.5, 0.8, 0.93, 1.0, 1.1, 1.37, 1.5]):
        image = picture(number)
        ours = datasets.jitter(image, Fixed(change, factor), 0.5)
        theirs = CHANGES[change](torch.from_numpy(image).permute(2, 0, 1), factor).permute(1, 2, 0).numpy()
        assert abs(ours.astype(int) - theirs).max() <= (8 if change == "hue" else 1)
        assert (abs(theirs.astype(int) - image).max() > 4) == (factor != 1)


def test_jitter_is_distributed_as_torchvisions():
    """Mean, spread, hue and saturation of 1,500 jittered pictures: two-sample Kolmogorov-Smirnov tests."""
    image, number, colour = picture(0), 1500, 0.2
    reference, rng = v2.ColorJitter(colour, colour, colour, colour), np.random.default_rng(1)
    torch.manual_seed(1)
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)

    def measure(pixels):
        red, green, blue = pixels.reshape(-1, 3).mean(0)
        hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue)
        return pixels.mean(), pixels.mean(2).std(), hue, np.ptp(pixels, axis=2).mean()

    ours = [measure(datasets.jitter(image, rng, colour).astype(float)) for _ in range(number)]
    theirs = [measure(reference(tensor).permute(1, 2, 0).numpy().astype(float)) for _ in range(number)]
    for a, b in zip(np.transpose(ours), np.transpose(theirs)):
        assert stats.ks_2samp(a, b).pvalue > 0.001
    weaker = [measure(datasets.jitter(image, rng, 0.15).astype(float)) for _ in range(number)]
    for a, b in zip(np.transpose(weaker), np.transpose(theirs)):  # these tests can tell
        assert stats.ks_2samp(a, b).pvalue < 0.001


def test_jitter_leaves_the_corners_of_the_rotation_black():
    image = np.full((64, 64, 3), 200, np.uint8)
    for seed in range(20):
        done = datasets.augment(image, 64, np.random.default_rng(seed), crop=False, colour=0.5)
        plain = datasets.augment(image, 64, np.random.default_rng(seed), crop=False)
        assert not done[plain.max(2) == 0].any()
