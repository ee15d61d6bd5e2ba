"""The initial learning rate: the range test, the trial of rates after it, and that a run is the same with them or without.

Truth comes from numpy.geomspace for the rates and from a softmax regression trained by hand in NumPy for the losses.
"""

import collections
import csv
import json
import math
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from sklearn import metrics

import datasets
import models
import engine
import learning_rate
import train

RATES = np.geomspace(1e-7, 10, 100)
MEAN, STD = (
    np.array([0.5, 0.4, 0.6]),
    np.array([20, 25, 22]),
)  # large ones keep the regression stable up to a rate of 10
SETTINGS = {
    "seed": 3,
    "image_size": 8,
    "mean": MEAN,
    "std": STD,
    "crop": True,
    "workers": 0,
    "device": torch.device("cpu"),
    "amp": "off",
    "memory_format": "contiguous",
    "batch_size": 8,
}


# ---------------------------------------------------------------- how it is run
@pytest.fixture
def cells():
    """Two classes of 20 and 3 pictures of 12 x 12: red 60 or 180 says the class, green and blue the picture; halves differ by 20 in red."""
    pictures = {}
    for i in range(23):
        image = np.empty((12, 12, 3), np.uint8)
        image[:] = (60 if i < 20 else 180, 40 + 9 * i, 250 - 9 * i)
        image[:, 6:, 0] += 20
        pictures[f"{i}.png"] = image
    return datasets.Cells(
        ".", "two", ["A", "B"], list(pictures), np.arange(23) >= 20, read=pictures.__getitem__
    )


def regression(seen, size=8):
    """Softmax regression of pixels; seen gets a copy of each batch that it is given and the precision of what comes out."""
    torch.manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * size * size, 2))
    net[0].register_forward_pre_hook(lambda module, given: seen.append([given[0].detach().clone()]))
    net.register_forward_hook(lambda module, given, out: seen[-1].append(out.dtype))
    return net


def pixels(batch):
    """uint8 values [N,3,H,W] of a normalised batch."""
    return (batch.double().numpy() * STD[:, None, None] + MEAN[:, None, None]) * 255


def labels(batch):
    """Class numbers of the pictures, by the red of their middle, where the rotation leaves no black."""
    return (pixels(batch)[:, 0, 4, 4] > 130).astype(int)


def losses_by_hand(net, batches):
    """Losses of softmax regression under SGD with momentum 0.9 and without weight decay, in NumPy."""
    weight, bias = (p.detach().double().numpy().copy() for p in net.parameters())
    moves, losses = [0, 0], []
    for rate, batch in zip(RATES, batches, strict=True):
        x, y = batch.double().numpy().reshape(len(batch), -1), labels(batch)
        logits = x @ weight.T + bias
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log(p[np.arange(len(y)), y]).mean())
        slope = (p - np.eye(2)[y]) / len(y)
        moves = [0.9 * moves[0] + slope.T @ x, 0.9 * moves[1] + slope.sum(0)]
        weight, bias = weight - rate * moves[0], bias - rate * moves[1]
    return np.array(losses)


def test_100_rates_from_1e7th_to_10_and_losses_of_sgd_by_hand(cells):
    seen = []
    rates, losses = learning_rate.range_test(regression(seen), cells, **SETTINGS)
    net = regression([])
    assert np.allclose(rates, RATES, rtol=1e-9, atol=0) and len(losses) == 100
    assert np.allclose(losses, losses_by_hand(net, [batch for batch, _ in seen]), rtol=2e-5)
    assert np.std(losses) > 0.01


@pytest.mark.parametrize("crop", [True, False])
def test_its_batches_are_those_of_the_training(cells, crop):
    """23 images, 3 batches an epoch: still 100 batches, all different, balanced, rotated, cropped but in pre-training."""
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
def test_it_uses_the_layout_of_the_training(cells, layout):
    seen = []
    learning_rate.range_test(regression(seen), cells, **SETTINGS | {"memory_format": layout})
    assert {batch.is_contiguous(memory_format=torch.channels_last) for batch, _ in seen} == {
        layout == "channels_last"
    }


@pytest.mark.parametrize(
    "amp, precision", [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_it_uses_the_precision_of_the_training(cells, amp, precision):
    """Mixed precision follows the hand-made losses to its three digits, but not to float32's seven."""
    seen = []
    rates, losses = learning_rate.range_test(regression(seen), cells, **SETTINGS | {"amp": amp})
    net = regression([])
    assert {out for _, out in seen} == {precision} and len(rates) == 100
    error = np.abs(losses / losses_by_hand(net, [batch for batch, _ in seen]) - 1)
    assert error.max() < 0.02 and (error.max() < 2e-5) == (amp == "off")


def test_the_number_of_data_workers_changes_nothing(cells):
    """Two runs, one with a worker process: the same losses, bit for bit."""
    alone, shared = (
        learning_rate.range_test(regression([]), cells, **SETTINGS | {"workers": workers}) for workers in (0, 1)
    )
    assert alone == shared


def test_a_network_that_diverges_ends_the_test(cells):
    """Three linear layers without normalisation explode long before a rate of 10: the library stops at five times the best loss."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(192, 64), torch.nn.Linear(64, 64), torch.nn.Linear(64, 2)
    )
    rates, losses = learning_rate.range_test(net, cells, **SETTINGS | {"std": np.full(3, 0.02)})
    assert len(rates) == len(losses) < 100 and not losses[-1] < 5 * min(losses)


# ---------------------------------------------------------------- in a run
OPTIONS = "--model shufflenet_v2_x0_5 --init random --image-size 32 --batch-size 8 --workers 0 --device cpu --amp off --epochs 160 --stop-lr 1".split()


def train_py(*arguments):
    """train.py's main() with arguments; its exit status."""
    before, sys.argv = sys.argv, ["train.py", *OPTIONS, *map(str, arguments)]
    try:
        return train.main()
    finally:
        sys.argv = before


def place(runs, fold=None):
    """The folder of the runs' one model and init, or of a fold of it."""
    return (
        pathlib.Path(runs)
        / "train"
        / "shufflenet_v2_x0_5"
        / "random"
        / ("" if fold is None else f"fold{fold}")
    )


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
def measured(pictures, tmp_path_factory):
    """Runs folder of fold 1 alone with --lr auto, the rate then measured, and a copy of what stood there after it."""
    runs = tmp_path_factory.mktemp("measured")
    assert train_py("--data", pictures, "--runs", runs / "now", "--fold", 1) == 0
    shutil.copytree(runs / "now", runs / "then")
    return runs


def test_what_is_kept_of_it(measured):
    """measured.json, and the rate and the loss of every step as CSV."""
    folder = place(measured / "then")
    assert {file.name for file in folder.iterdir()} == {
        "measured.json",
        "measured.lock",
        "lr_range.csv",
        "fold1",
    }
    found = json.loads((folder / "measured.json").read_text())
    with open(folder / "lr_range.csv", newline="") as file:
        header, *rows = csv.reader(file)
    rates, losses = np.array(rows, float).T
    assert header == ["lr", "loss"] and np.allclose(rates, RATES[: len(rates)], rtol=1e-9, atol=0)
    assert len(losses) == len(rates) > 50
    tried = [rate for rate, _ in found["candidates"]]
    assert (
        found["lr"] == learning_rate.choose_rate(found["candidates"], np.full(3, 2))[0]
        and max(tried) < rates[-1]
        and len(tried) == 5
    )
    assert json.loads((folder / "fold1/config.json").read_text())["lr"] == found["lr"]


def test_it_is_done_once_on_fold_0_whichever_fold_comes_first(measured, pictures, tmp_path):
    """Fold 1 first: fold 0 measures nothing anew, and a runs folder where fold 0 came first has the same curve and rate."""
    names = ("measured.json", "lr_range.csv")
    assert train_py("--data", pictures, "--runs", measured / "now", "--fold", 0) == 0
    assert all(
        (place(measured / "now") / name).read_bytes() == (place(measured / "then") / name).read_bytes()
        for name in names
    )
    assert (place(measured / "now") / "lr_range.csv").stat().st_mtime < (
        place(measured / "now", 0) / "config.json"
    ).stat().st_mtime
    assert train_py("--data", pictures, "--runs", tmp_path, "--fold", 0) == 0
    for name in ("measured.json", "lr_range.csv"):
        assert (place(tmp_path) / name).read_bytes() == (place(measured / "now") / name).read_bytes()
    assert same_run(place(tmp_path, 0), place(measured / "now", 0))


def test_it_sees_the_training_images_of_fold_0_and_no_other(measured, pictures):
    """The curve comes out again from the images that split.csv, read here line by line, marks train in fold 0; not from fold 1's."""
    with open(measured / "then/split.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(place(measured / "then") / "lr_range.csv", newline="") as file:
        written = [float(row["loss"]) for row in csv.DictReader(file)]
    info = json.loads((measured / "then/data/bm.json").read_text())
    settings = SETTINGS | {
        "seed": 0,
        "image_size": 32,
        "mean": info["mean"],
        "std": info["std"],
        "memory_format": "channels_last",
    }
    for fold in (0, 1):
        paths = [
            row["path"]
            for label in ("LYT", "EOS", "EBO")
            for row in rows
            if row[f"fold{fold}"] == "train" and row["label"] == label
        ]
        part = datasets.Cells(
            pictures, "bm", ["LYT", "EOS", "EBO"], paths, np.repeat([0, 1, 2], len(paths) // 3)
        )
        paths.sort(key=lambda path: (part.classes.index(path[:3]), path))
        part.paths = np.array(paths)
        engine.seed_all(engine.WEIGHTS, 0, 0)
        _, losses = learning_rate.range_test(
            models.build_model("shufflenet_v2_x0_5", 3, image_size=32), part, **settings
        )
        assert (losses == written) == (fold == 0)


def same_run(one, other):
    """Do two folders hold the same training? log.csv but for time, the weights bit by bit, the predictions byte by byte."""

    def log(folder):
        with open(folder / "log.csv", newline="") as file:
            return [
                {k: v for k, v in row.items() if k not in ("seconds", "images_per_second")}
                for row in csv.DictReader(file)
            ]

    first, second = (
        torch.load(folder / "best.pt", weights_only=True)["state_dict"] for folder in (one, other)
    )
    return (
        log(one) == log(other)
        and all(
            (one / name).read_bytes() == (other / name).read_bytes()
            for name in ("predictions.csv", "val_predictions.csv")
        )
        and all(torch.equal(value, second[key]) for key, value in first.items())
    )


def test_a_run_is_the_same_with_a_range_test_before_it_or_without(measured, pictures, tmp_path):
    """The rate read from measured.json, or given as --lr, gives the bits that the run had which measured it."""
    rate = json.loads((place(measured / "then") / "measured.json").read_text())["lr"]
    place(tmp_path / "read").mkdir(parents=True)
    shutil.copy(place(measured / "then") / "measured.json", place(tmp_path / "read"))
    assert train_py("--data", pictures, "--runs", tmp_path / "read", "--fold", 1) == 0
    assert not (place(tmp_path / "read") / "lr_range.csv").exists()
    assert (
        train_py(
            "--data",
            pictures,
            "--runs",
            tmp_path / "given",
            "--fold",
            1,
            "--lr",
            rate,
            "--memory-format",
            "channels_last",
        )
        == 0
    )
    assert not place(tmp_path / "given").joinpath("measured.json").exists()
    for runs in ("read", "given"):
        assert same_run(place(tmp_path / runs, 1), place(measured / "then", 1))


def test_a_short_run_takes_the_middle_rate_and_says_so(pictures, tmp_path, capsys):
    """Two epochs of 3 steps cannot pay for a range test: 0.003, once, for all folds."""
    assert train_py("--data", pictures, "--runs", tmp_path, "--epochs", 2, "--fold", 2, 0) == 0
    out = capsys.readouterr().out
    assert (
        out.count("too few steps to try rates: learning rate 0.003") == 1
        and not (place(tmp_path) / "lr_range.csv").exists()
    )
    for fold in (0, 2):
        with open(place(tmp_path, fold) / "log.csv", newline="") as file:
            assert [float(row["lr"]) for row in csv.DictReader(file)] == [0.003] * 2


# ---------------------------------------------------------------- the trial
def test_a_trial_is_sgd_at_a_constant_rate_by_hand(cells):
    """Half of the steps, a look at the validation images, the other half, and again: a regression by hand in NumPy."""
    seen, val, right = [], cells.subset(np.arange(10, 23)), []
    score = learning_rate.try_lr(regression(seen), cells, val, 1e-2, steps=40, **SETTINGS, optimizer="sgd")
    (weight, bias), moves = (p.detach().double().numpy().copy() for p in regression([]).parameters()), [0, 0]
    assert [len(batch) for batch, _ in seen] == 2 * [*[8] * 20, 13]
    for batch, _ in seen:
        x = batch.double().numpy().reshape(len(batch), -1)
        logits = x @ weight.T + bias
        if len(batch) == 13:
            right.append(metrics.recall_score(val.targets, logits.argmax(1), average="macro"))
            continue
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        slope = (p - np.eye(2)[labels(batch)]) / 8
        moves = [0.9 * moves[0] + slope.T @ x, 0.9 * moves[1] + slope.sum(0)]
        weight, bias = weight - 1e-2 * moves[0], bias - 1e-2 * moves[1]
    assert len(right) == 2 and score == pytest.approx(np.mean(right)) != 0.5


def test_the_rates_are_tried_and_kept_with_their_recalls(cells, tmp_path):
    """Half decades about 0.003, each from the same first weights, trained and validated on what is given; kept with their scores."""
    part, val = {"optimizer": "sgd", **SETTINGS}, cells.subset(np.r_[10:20, np.repeat([20, 21, 22], 4)])
    rate = learning_rate.find_lr(tmp_path, lambda seed: regression([]), cells, val, epochs=200, **part)
    found = json.loads((tmp_path / "measured.json").read_text())
    tried, scores = zip(*found["candidates"])
    assert tried == (3e-4, 1e-3, 3e-3, 1e-2, 3e-2) and max(scores) > 1 / 2
    assert (
        found["lr"]
        == rate
        == learning_rate.choose_rate(found["candidates"], np.unique(val.targets, return_counts=True)[1])[0]
    )
    again = [learning_rate.try_lr(regression([]), cells, val, lr, steps=40, **part) for lr in tried]
    assert again == list(scores)  # (200 epochs x 3 steps / 2 - 100) / 5 rates


RATES_TRIED = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)


@pytest.mark.parametrize(
    "recalls, number",
    [
        ((0.2, 0.6, 0.2, 0.2, 0.2), 1),
        ((1, 0.5, 0.5, 0.5, 0.5), 1),  # one stands out
        ((0.2, 0.6, 0.6, 0.2, 0.2), 2),
        ((0.6, 0.6, 0.6, 0.1, 0.1), 3),
        ((0.2, 1, 1, 0.2, 0.2), 2),
    ],
)  # as good as each other
def test_the_middle_of_the_good_rates_is_taken(recalls, number):
    """The geometric mean of those that are as good as the best, with two digits."""
    good = [rate for rate, recall in zip(RATES_TRIED, recalls) if recall == max(recalls)]
    assert len(good) == number
    assert learning_rate.choose_rate(list(zip(RATES_TRIED, recalls)), np.full(10, 80)) == (
        float(f"{stats.gmean(good):.2g}"),
        True,
    )


def test_rates_are_weighted_by_the_chance_of_such_a_difference():
    """The standard error from recalls drawn class by class, the weights from SciPy's normal density."""
    images, rng = np.array([80, 80, 40, 200, 10]), np.random.default_rng(0)
    drawn = (rng.binomial(images, 0.6, (4, 200_000, 5)) / images).mean(2)
    error = (drawn[0] + drawn[1] - drawn[2] - drawn[3]).std()  # of a difference, all variances doubled
    weights = stats.norm.pdf([0.04, 0, 0.05, 0.12, 0.4], scale=error)
    rate, _ = learning_rate.choose_rate(list(zip(RATES_TRIED, (0.56, 0.6, 0.55, 0.48, 0.2))), images)
    assert rate == pytest.approx(stats.gmean(RATES_TRIED, weights=weights), rel=0.03)
    assert (
        min(abs(math.log(rate / other)) for other in (stats.gmean(RATES_TRIED[:3]), *RATES_TRIED)) > 0.1
    )  # a case that matters


def test_chance_is_no_learning():
    """A rate must beat chance by more than the standard error of networks that guess, drawn here."""
    images, rng = np.full(7, 80), np.random.default_rng(0)
    error = (rng.binomial(80, 1 / 7, (100_000, 7)) / 80).mean(1).std()
    for errors, learned in ((0.9, False), (1.1, True)):
        assert learning_rate.choose_rate([(0.003, 1 / 7 + errors * error)], images) == (0.003, learned)


@pytest.mark.parametrize("optimizer, epochs, expected", [("sgd", 100, []), ("adamw", 160, [3e-5])])
def test_half_of_the_steps_at_most(cells, tmp_path, optimizer, epochs, expected):
    """300 steps leave 50 after the range test, ten for each rate: too few; AdamW's rates are a tenth of SGD's."""
    learning_rate.find_lr(
        tmp_path, lambda seed: regression([]), cells, cells, epochs=epochs, optimizer=optimizer, **SETTINGS
    )
    found = json.loads((tmp_path / "measured.json").read_text())
    assert [rate for rate, _ in found["candidates"]][:1] == expected


def test_rare_classes_are_all_looked_at(cells, tmp_path):
    """2,000 validation images at most, a thousand of either class, so that all 40 of the rarer one are among them."""
    seen = collections.Counter()
    paths, targets = [f"{i}.png" for i in range(1540)], np.repeat([0, 1], (1500, 40))
    val = datasets.Cells(
        ".",
        "two",
        cells.classes,
        paths,
        targets,
        read=lambda path: seen.update([path]) or np.zeros((12, 12, 3), np.uint8),
    )
    learning_rate.find_lr(tmp_path, lambda seed: regression([]), cells, val, epochs=140, optimizer="sgd", **SETTINGS)
    assert set(seen.values()) == {2 * 5} and len(seen) == 1040  # two looks for each of five rates
    assert set(paths[1500:]) <= set(seen)


@pytest.mark.parametrize("rows", [(slice(0), slice(None)), (slice(None), slice(0))])
def test_a_fold_0_without_images_is_said(cells, tmp_path, rows):
    """A published split may leave fold 0 without validation images: one line, and --lr as the way out."""
    parts = [cells.subset(np.arange(23)[row]) for row in rows]
    with pytest.raises(SystemExit, match=r"^[^\n]*fold 0 has no images[^\n]*--lr[^\n]*$"):
        learning_rate.find_lr(tmp_path, lambda seed: regression([]), *parts, epochs=200, optimizer="sgd", **SETTINGS)


def test_where_nothing_is_learned_the_middle_of_all_is_taken(cells, tmp_path, capsys):
    """Black pictures: all networks name one class, whose recall of 1 makes 1/2 in the mean; this is said."""
    black = datasets.Cells(
        ".",
        "two",
        cells.classes,
        cells.paths,
        cells.targets,
        read=lambda path: np.zeros((12, 12, 3), np.uint8),
    )
    assert (
        learning_rate.find_lr(
            tmp_path, lambda seed: regression([]), black, black, epochs=200, optimizer="sgd", **SETTINGS
        )
        == 0.0031
    )
    assert "no network learned in the trial: learning rate 0.0031" in capsys.readouterr().out


# ---------------------------------------------------------------- kept
def test_the_rate_is_measured_once(cells, tmp_path):
    """A second call reads measured.json, and keeps what else stands in it; a damaged one is named."""
    (tmp_path / "measured.json").write_text('{"more": [1]}')
    rate = learning_rate.find_lr(
        tmp_path, lambda seed: regression([]), cells, cells, epochs=1, optimizer="sgd", **SETTINGS
    )
    assert json.loads((tmp_path / "measured.json").read_text()) == {
        "more": [1],
        "candidates": [],
        "lr": rate,
        "optimizer": "sgd",
        "batch_size": 8,
        "image_size": 8,
        "seed": 3,
        "epochs": 1,
        "data": None,
        "weights": None,
    }
    assert learning_rate.find_lr(tmp_path, None, cells, cells, epochs=1, optimizer="sgd", **SETTINGS) == rate
    (tmp_path / "measured.json").write_text('{"lr": 0.0')
    with pytest.raises(SystemExit, match=r"^[^\n]*measured.json: damaged[^\n]*$"):
        learning_rate.find_lr(tmp_path, None, cells, cells, epochs=1, optimizer="sgd", **SETTINGS)


@pytest.mark.parametrize(
    "key, value",
    [
        ("optimizer", "adamw"),
        ("image_size", 16),
        ("batch_size", 4),
        ("epochs", 75),
        ("seed", 0),
        ("data", "other"),
        ("weights", "others"),
    ],
)
def test_a_rate_of_other_settings_is_not_taken(cells, tmp_path, key, value):
    """A rate of SGD is a hundred times too high for AdamW: the row needs a folder of its own."""
    (tmp_path / "measured.json").write_text(
        '{"lr": 0.1, "optimizer": "sgd", "image_size": 8, "batch_size": 8, '
        '"epochs": 1, "seed": 3, "data": "cells", "weights": null}'
    )
    with pytest.raises(SystemExit, match=f"measured with {key}.*not {value}.*--name"):
        learning_rate.find_lr(
            tmp_path,
            None,
            cells,
            cells,
            **({"optimizer": "sgd", "epochs": 1, "data": "cells"} | SETTINGS | {key: value}),
        )
