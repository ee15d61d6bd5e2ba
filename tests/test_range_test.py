"""The initial learning rate: the range test, the trial of rates after it, and runs with them or without.

Truth comes from numpy.geomspace for the rates and from a softmax regression trained by hand in NumPy.
"""

import collections
import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import read_log, read_rows
from PIL import Image
from scipy import stats
from scipy.special import softmax
from sklearn import metrics

import datasets
import engine
import learning_rate
import models
import train

RATES = np.geomspace(1e-7, 10, 100)
MEAN = np.array([0.5, 0.4, 0.6])
STD = np.array([20, 25, 22])  # large ones keep the regression stable up to a rate of 10
SETTINGS = {"seed": 3, "image_size": 8, "mean": MEAN, "std": STD, "crop": True, "workers": 0, "batch_size": 8}
SETTINGS |= {"device": torch.device("cpu"), "amp": "off", "memory_format": "contiguous"}


# ---------------------------------------------------------------- how it is run
@pytest.fixture
def cells():
    """20 and 3 pictures of 12 x 12: red says the class, green and blue the picture; halves differ in red."""
    pictures = {}
    for i in range(23):
        image = np.empty((12, 12, 3), np.uint8)
        image[:] = (60 if i < 20 else 180, 40 + 9 * i, 250 - 9 * i)
        image[:, 6:, 0] += 20
        pictures[f"{i}.png"] = image
    targets = np.arange(23) >= 20
    return datasets.Cells(".", "two", ["A", "B"], list(pictures), targets, read=pictures.__getitem__)


def regression(seen=()):
    """Softmax regression of pixels; `seen` gets a copy of each batch and the precision of its logits."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2))
    if not isinstance(seen, list):
        return net
    net[0].register_forward_pre_hook(lambda module, given: seen.append([given[0].detach().clone()]))
    net.register_forward_hook(lambda module, given, out: seen[-1].append(out.dtype))
    return net


def pixels(batch):
    """uint8 values [N,3,H,W] of a normalised batch."""
    return (batch.double().numpy() * STD[:, None, None] + MEAN[:, None, None]) * 255


def labels(batch):
    """Class numbers of the pictures, by the red of their middle, where the rotation leaves no black."""
    return (pixels(batch)[:, 0, 4, 4] > 130).astype(int)


class ByHand:
    """The regression in NumPy, under SGD with momentum 0.9 and without weight decay."""

    def __init__(self):
        self.weights = [p.detach().double().numpy().copy() for p in regression().parameters()]
        self.moves = [0, 0]

    def logits(self, batch):
        return batch.double().numpy().reshape(len(batch), -1) @ self.weights[0].T + self.weights[1]

    def step(self, batch, rate):
        """Its loss before the step."""
        p, y = softmax(self.logits(batch), 1), labels(batch)
        slope = (p - np.eye(2)[y]) / len(y)
        gradients = slope.T @ batch.double().numpy().reshape(len(batch), -1), slope.sum(0)
        self.moves = [0.9 * move + gradient for move, gradient in zip(self.moves, gradients)]
        self.weights = [weight - rate * move for weight, move in zip(self.weights, self.moves)]
        return -np.log(p[np.arange(len(y)), y]).mean()


def losses_by_hand(seen):
    """Losses of the range test's batches."""
    net = ByHand()
    return np.array([net.step(batch, rate) for rate, (batch, _) in zip(RATES, seen, strict=True)])


def test_100_rates_from_1e7th_to_10_and_losses_of_sgd_by_hand(cells):
    seen = []
    rates, losses = learning_rate.range_test(regression(seen), cells, **SETTINGS)
    assert np.allclose(rates, RATES, rtol=1e-9, atol=0) and len(losses) == 100
    assert np.allclose(losses, losses_by_hand(seen), rtol=2e-5) and np.std(losses) > 0.01


@pytest.mark.parametrize("crop", [True, False])
def test_its_batches_are_those_of_the_training(cells, crop):
    """3 batches an epoch: still 100, all different, balanced, rotated, cropped but in pre-training."""
    seen = []
    learning_rate.range_test(regression(seen), cells, **SETTINGS | {"crop": crop})
    batches = [pixels(batch) for batch, _ in seen]
    assert len(batches) == 100 and {batch.shape for batch in batches} == {(8, 3, 8, 8)}
    assert len({batch.tobytes() for batch in batches}) == 100
    share = np.mean([labels(batch) for batch, _ in seen])
    assert abs(share - 0.5) < 5 * 0.5 / 800**0.5  # 3 of 23 images
    images = np.concatenate(batches)
    assert 0.5 < (images[:, :, 0, 0].max(1) < 20).mean() < 1  # corners uncovered by the rotation
    inner = images[:, 0, 2:6, 2:6]
    assert (np.ptp(inner, axis=(1, 2)) < 3).any() == crop  # one half of the picture alone


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("amp, precision", [("off", "float32"), ("bf16", "bfloat16"), ("fp16", "float16")])
def test_it_uses_layout_and_precision_of_the_training(cells, layout, amp, precision):
    """Mixed precision follows the hand-made losses to its three digits, but not to float32's seven."""
    seen, settings = [], SETTINGS | {"amp": amp, "memory_format": layout}
    _, losses = learning_rate.range_test(regression(seen), cells, **settings)
    layouts = {batch.is_contiguous(memory_format=torch.channels_last) for batch, _ in seen}
    assert layouts == {layout == "channels_last"} and {out for _, out in seen} == {getattr(torch, precision)}
    error = np.abs(losses / losses_by_hand(seen) - 1)
    assert error.max() < 0.02 and (error.max() < 2e-5) == (amp == "off")


def test_the_number_of_data_workers_changes_nothing(cells):
    """Two runs, one with a worker process: the same losses, bit for bit."""
    settings = [SETTINGS | {"workers": workers} for workers in (0, 1)]
    alone, shared = (learning_rate.range_test(regression(), cells, **some) for some in settings)
    assert alone == shared


def test_a_network_that_diverges_ends_the_test(cells):
    """Three linear layers explode long before a rate of 10: the library stops at five times the best loss."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(*size) for size in ((192, 64), (64, 64), (64, 2))]
    net = torch.nn.Sequential(torch.nn.Flatten(), *layers)
    rates, losses = learning_rate.range_test(net, cells, **SETTINGS | {"std": np.full(3, 0.02)})
    assert len(rates) == len(losses) < 100 and not losses[-1] < 5 * min(losses)


# ---------------------------------------------------------------- in a run
OPTIONS = "--model shufflenet_v2_x0_5 --init random --image-size 32 --batch-size 8 --workers 0 --device cpu"
OPTIONS += " --amp off --epochs 160 --stop-lr 1"


@pytest.fixture(scope="module")
def train_py(pictures):
    """train_py(runs, more options) calls train.py's main() on the pictures."""

    def call(runs, more=""):
        argv = ["train.py", *f"{OPTIONS} {more}".split(), "--data", str(pictures), "--runs", str(runs)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            assert train.main() == 0

    return call


def place(runs, fold=""):
    """The folder of the runs' one model and init, or of a fold of it."""
    return pathlib.Path(runs, "train/shufflenet_v2_x0_5/random", fold)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Folder of three classes of 10 pictures of noise around a colour of their own."""
    folder, rng = tmp_path_factory.mktemp("pictures") / "bm", np.random.default_rng(0)
    for label, colour in {"EBO": (200, 60, 60), "EOS": (60, 200, 60), "LYT": (60, 60, 200)}.items():
        (folder / label).mkdir(parents=True)
        for i in range(10):
            image = np.clip(rng.normal(colour, 40, (40, 40, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def measured(train_py, tmp_path_factory):
    """Folder of `now`, of fold 1 with --lr auto, and of `then`, a copy of what stood there after it."""
    runs = tmp_path_factory.mktemp("measured")
    train_py(runs / "now", "--fold 1")
    shutil.copytree(runs / "now", runs / "then")
    return runs


def test_what_is_kept_of_it(measured):
    """measured.json, and the rate and the loss of every step as CSV."""
    folder = place(measured / "then")
    names = {"measured.json", "measured.lock", "lr_range.csv", "fold1"}
    assert {file.name for file in folder.iterdir()} == names
    found = json.loads((folder / "measured.json").read_text())
    rates, losses = np.array([[*row.values()] for row in read_rows(folder / "lr_range.csv")], float).T
    assert (folder / "lr_range.csv").read_text().startswith("lr,loss\n")
    assert np.allclose(rates, RATES[: len(rates)], rtol=1e-9, atol=0) and len(losses) == len(rates) > 50
    tried = [rate for rate, _ in found["candidates"]]
    assert len(tried) == 5 and max(tried) < rates[-1]
    assert found["lr"] == learning_rate.choose_rate(found["candidates"], np.full(3, 2))[0]
    assert json.loads((folder / "fold1/config.json").read_text())["lr"] == found["lr"]


def same_rate(runs, others):
    """Are the curve and the rate of two runs folders the same, byte by byte?"""
    pairs = [(place(runs) / name, place(others) / name) for name in ("measured.json", "lr_range.csv")]
    return all(one.read_bytes() == other.read_bytes() for one, other in pairs)


@pytest.mark.long
def test_it_is_done_once_on_fold_0_whichever_fold_comes_first(measured, train_py, tmp_path):
    """Fold 1 first: fold 0 measures nothing anew; where fold 0 came first are the same curve and rate."""
    written = (place(measured / "now") / "lr_range.csv").stat().st_mtime_ns
    train_py(measured / "now", "--fold 0")
    assert same_rate(measured / "now", measured / "then")
    assert (place(measured / "now") / "lr_range.csv").stat().st_mtime_ns == written
    train_py(tmp_path, "--fold 0")
    assert same_rate(tmp_path, measured / "now")
    assert same_run(place(tmp_path, "fold0"), place(measured / "now", "fold0"))


def test_it_sees_the_training_images_of_fold_0_and_no_other(measured, pictures):
    """The curve comes out again from the images that split.csv marks train in fold 0; not from fold 1's."""
    rows, labels = read_rows(measured / "then/split.csv"), ["LYT", "EOS", "EBO"]
    written = [float(row["loss"]) for row in read_rows(place(measured / "then") / "lr_range.csv")]
    info = json.loads((measured / "then/data/bm.json").read_text())
    settings = SETTINGS | {"seed": 0, "image_size": 32, "memory_format": "channels_last"}
    settings |= {"mean": info["mean"], "std": info["std"]}
    for fold in (0, 1):
        paths = [row["path"] for row in rows if row[f"fold{fold}"] == "train"]
        paths.sort(key=lambda path: (labels.index(path[:3]), path))
        targets = np.array([labels.index(path[:3]) for path in paths])
        part = datasets.Cells(pictures, "bm", labels, paths, targets)
        engine.seed_all(engine.WEIGHTS, 0, 0)
        net = models.build_model("shufflenet_v2_x0_5", 3, image_size=32)
        assert (learning_rate.range_test(net, part, **settings)[1] == written) == (fold == 0)


def same_run(one, other):
    """Do two folders hold the same training? log.csv but for time, weights bit by bit, predictions."""
    nets = [torch.load(folder / "best.pt", weights_only=True)["state_dict"] for folder in (one, other)]
    names = ("predictions.csv", "val_predictions.csv")
    same = read_log(one) == read_log(other)
    same &= all((one / name).read_bytes() == (other / name).read_bytes() for name in names)
    return same and all(torch.equal(value, nets[1][key]) for key, value in nets[0].items())


def test_a_run_is_the_same_with_a_range_test_before_it_or_without(measured, train_py, tmp_path):
    """The rate read from measured.json, or given as --lr, gives the bits of the run that measured it."""
    file = place(measured / "then") / "measured.json"
    place(tmp_path / "read").mkdir(parents=True)
    shutil.copy(file, place(tmp_path / "read"))
    train_py(tmp_path / "read", "--fold 1")
    assert not (place(tmp_path / "read") / "lr_range.csv").exists()
    train_py(tmp_path / "given", f"--fold 1 --lr {json.loads(file.read_text())['lr']}")
    assert not (place(tmp_path / "given") / "measured.json").exists()
    for runs in ("read", "given"):
        assert same_run(place(tmp_path / runs, "fold1"), place(measured / "then", "fold1"))


def test_a_short_run_takes_the_middle_rate_and_says_so(train_py, tmp_path, capsys):
    """Two epochs of 3 steps cannot pay for a range test: 0.003, once, for all folds."""
    train_py(tmp_path, "--epochs 2 --fold 2 0")
    assert capsys.readouterr().out.count("too few steps to try rates: learning rate 0.003") == 1
    assert not (place(tmp_path) / "lr_range.csv").exists()
    for fold in ("fold0", "fold2"):
        assert [float(row["lr"]) for row in read_log(place(tmp_path, fold))] == [0.003] * 2


# ---------------------------------------------------------------- the trial
def test_a_trial_is_sgd_at_a_constant_rate_by_hand(cells):
    """Half of the steps, a look at the validation images, the other half, and again: by hand in NumPy."""
    seen, val, right, net = [], cells.subset(np.arange(10, 23)), [], ByHand()
    score = learning_rate.try_lr(regression(seen), cells, val, 1e-2, steps=40, **SETTINGS, optimizer="sgd")
    assert [len(batch) for batch, _ in seen] == 2 * [*[8] * 20, 13]
    for batch, _ in seen:
        if len(batch) == 13:
            right.append(metrics.recall_score(val.targets, net.logits(batch).argmax(1), average="macro"))
        else:
            net.step(batch, 1e-2)
    assert len(right) == 2 and score == pytest.approx(np.mean(right)) != 0.5


def find(folder, train, val=None, make_net=lambda number: regression(), **settings):
    """find_lr of the regression, with SGD unless another optimizer is named."""
    val = train if val is None else val
    return learning_rate.find_lr(folder, make_net, train, val, **{"optimizer": "sgd"} | SETTINGS | settings)


def test_the_rates_are_tried_and_kept_with_their_recalls(cells, tmp_path):
    """Half decades about 0.003, each from the same first weights, on the images that are given."""
    val = cells.subset(np.r_[10:20, np.repeat([20, 21, 22], 4)])
    rate = find(tmp_path, cells, val, epochs=200)
    found = json.loads((tmp_path / "measured.json").read_text())
    tried, scores = zip(*found["candidates"])
    assert tried == RATES_TRIED and max(scores) > 1 / 2
    assert found["lr"] == rate == learning_rate.choose_rate(found["candidates"], np.array([10, 12]))[0]
    options = {"steps": 40, "optimizer": "sgd"} | SETTINGS  # (200 epochs x 3 steps / 2 - 100) / 5 rates
    assert [learning_rate.try_lr(regression(), cells, val, lr, **options) for lr in tried] == list(scores)


RATES_TRIED = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


def test_the_rates_within_one_standard_error_of_the_best_are_averaged():
    """Breiman's rule; the standard error is drawn here, class by class, for rates near it on both sides."""
    rng = np.random.default_rng(0)
    for images, best in (([80, 80, 40, 200, 10], 0.6), ([40] * 7, 0.9), ([333] * 3, 0.45)):
        p = np.full(len(images), best)
        drawn = (rng.binomial(images, p, (4, 200_000, len(images))) / images).mean(2)
        error = (drawn[0] + drawn[1] - drawn[2] - drawn[3]).std()  # of a difference, all variances doubled
        for errors in ((0, 9, 9, 9, 9), (0.97, 0, 1.03, 9, 9), (2, 0.5, 0.97, 0, 1.03), (0, 0, 0, 0, 0)):
            good = [rate for rate, number in zip(RATES_TRIED, errors) if number < 1]
            candidates = list(zip(RATES_TRIED, best - np.minimum(np.multiply(errors, error), best)))
            rate = float(f"{stats.gmean(good):.2g}")
            assert learning_rate.choose_rate(candidates, np.array(images)) == (rate, True)


def test_chance_is_no_learning():
    """A rate must beat chance by more than the standard error of networks that guess, drawn here."""
    images, rng = np.full(7, 80), np.random.default_rng(0)
    error = (rng.binomial(80, 1 / 7, (100_000, 7)) / 80).mean(1).std()
    middle = float(f"{stats.gmean((0.003, 0.01)):.2g}")  # of all where nothing is learned
    for errors, expected in ((0.9, (middle, False)), (1.1, (0.003, True)), (9, (0.003, True))):
        candidates = [(0.003, 1 / 7 + errors * error), (0.01, 0)]
        assert learning_rate.choose_rate(candidates, images) == expected


@pytest.mark.parametrize("optimizer, epochs, expected", [("sgd", 100, []), ("adamw", 160, [3e-5])])
def test_half_of_the_steps_at_most(cells, tmp_path, optimizer, epochs, expected):
    """300 steps leave 50 after the range test, ten a rate: too few; AdamW's rates are a tenth of SGD's."""
    find(tmp_path, cells, epochs=epochs, optimizer=optimizer)
    found = json.loads((tmp_path / "measured.json").read_text())
    assert [rate for rate, _ in found["candidates"]][:1] == expected


def black_cells(targets, read=lambda path: np.zeros((12, 12, 3), np.uint8)):
    """Cells of black pictures."""
    return datasets.Cells(".", "two", ["A", "B"], [str(i) for i in range(len(targets))], targets, read=read)


def test_rare_classes_are_all_looked_at(cells, tmp_path):
    """2,000 validation images at most, a thousand of either class, so that all 40 of the rarer one are."""
    seen = collections.Counter()

    def read(path):
        seen[path] += 1
        return np.zeros((12, 12, 3), np.uint8)

    find(tmp_path, cells, black_cells(np.repeat([0, 1], (1500, 40)), read), epochs=140)
    assert set(seen.values()) == {2 * 5} and len(seen) == 1040  # two looks for each of five rates
    assert {str(i) for i in range(1500, 1540)} <= set(seen)


@pytest.mark.parametrize("rows", [(slice(0), slice(None)), (slice(None), slice(0))])
def test_a_fold_0_without_images_is_said(cells, tmp_path, rows):
    """A published split may leave fold 0 without validation images: one line, and --lr as the way out."""
    parts = [cells.subset(np.arange(23)[row]) for row in rows]
    with pytest.raises(SystemExit, match=r"^[^\n]*fold 0 has no images[^\n]*--lr[^\n]*$"):
        find(tmp_path, *parts, epochs=200)


def test_where_nothing_is_learned_the_middle_of_all_is_taken(cells, tmp_path, capsys):
    """Black pictures: all networks name one class, whose recall of 1 makes 1/2 in the mean; this is said."""
    assert find(tmp_path, black_cells(cells.targets), epochs=200) == 0.0031
    assert "no network learned in the trial: learning rate 0.0031" in capsys.readouterr().out


# ---------------------------------------------------------------- kept
KEPT = {"optimizer": "sgd", "batch_size": 8, "image_size": 8, "seed": 3, "smoothing": 0.0, "colour": 0.0}
KEPT |= {"epochs": 1, "data": "cells", "weights": None}
OTHERS = {"optimizer": "adamw", "batch_size": 4, "image_size": 16, "seed": 0, "smoothing": 0.1, "colour": 0.2}
OTHERS |= {"epochs": 75, "data": "other", "weights": "others"}


def find_again(folder, cells, **changed):
    """find with the settings KEPT but for the changed ones."""
    settings = KEPT | changed
    origin = {key: settings.pop(key) for key in ("data", "weights")}
    return find(folder, cells, origin=origin, **settings)


def test_the_rate_is_measured_once(cells, tmp_path):
    """A second call reads measured.json; a damaged one is named."""
    rate = find_again(tmp_path, cells)
    file = tmp_path / "measured.json"
    assert json.loads(file.read_text()) == KEPT | {"candidates": [], "lr": rate}
    file.write_text(json.dumps(KEPT | {"lr": 0.123}))
    assert find_again(tmp_path, cells) == 0.123
    file.write_text('{"lr": 0.0')
    with pytest.raises(SystemExit, match=r"^[^\n]*measured.json: damaged[^\n]*$"):
        find_again(tmp_path, cells)


@pytest.mark.parametrize("key", OTHERS)
def test_a_rate_of_other_settings_is_measured_anew(cells, tmp_path, capsys, key):
    """A rate of SGD is a hundred times too high for AdamW; this is said, and the old curve goes."""
    (tmp_path / "measured.json").write_text(json.dumps(KEPT | {"lr": 0.123}))
    (tmp_path / "lr_range.csv").write_text("lr,loss\n")
    expected = 3e-4 if key == "optimizer" else 0.003  # too few steps to try rates
    assert find_again(tmp_path, cells, **{key: OTHERS[key]}) == expected
    assert f"was measured with other settings ({key}): measuring anew" in capsys.readouterr().out
    found = json.loads((tmp_path / "measured.json").read_text())
    assert found == KEPT | {key: OTHERS[key], "candidates": [], "lr": expected}
    assert not (tmp_path / "lr_range.csv").exists()
