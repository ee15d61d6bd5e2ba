"""Optimiser, plateau rule and choice of the epoch as in section 2.2: SGD, momentum 0.9, batch 32, 75 epochs.

Truth comes from rates and epochs worked out by hand, from SGD in NumPy, from a plateau rule written anew, and
from scikit-learn's log loss. Validation losses are written down: a hook answers for the network, so that fit
itself is tested and nothing of it replaced.
"""

import argparse
import inspect
import json
import sys

import numpy as np
import pytest
import torch
import torchvision
from conftest import read_rows
from PIL import Image
from sklearn.metrics import accuracy_score, balanced_accuracy_score, log_loss

import datasets
import engine
import evaluate
import train

SETTINGS = {
    "image_size": 4,
    "mean": (0, 0, 0),
    "std": (1, 1, 1),
    "batch_size": 4,
    "memory_format": "contiguous",
}


def cells_of(images, targets):
    """Cells of uint8 [N,H,W,3] in memory."""
    pictures = {f"{i}.png": image for i, image in enumerate(images)}
    return datasets.Cells(".", "mine", ["A", "B"], list(pictures), targets, read=pictures.__getitem__)


# without a bias their logits are 0 whatever the weights
BLACK = cells_of(np.zeros((4, 4, 4, 3), np.uint8), [0, 1, 0, 1])


def linear():
    """Softmax regression without a bias."""
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 2, bias=False))


def scripted(losses=None, right=None, fail=None):
    """A network whose validation on the BLACK cells has these losses, or numbers of right answers, by epoch.

    Its buffer `epoch` is raised by each training step, one an epoch. In epoch `fail` it fails there.
    """
    net = linear()
    net.register_buffer("epoch", torch.zeros((), dtype=torch.int64))

    def answer(module, given, out):
        if module.training:
            module.epoch += 1
            if module.epoch == fail:
                raise InterruptedError("the machine goes down")
            return None
        sign = torch.tensor([1.0, -1.0, 1.0, -1.0])  # of the right answer's margin
        if right is not None:
            sign[right[module.epoch - 1] :] *= -1
            return torch.stack([sign, -sign], 1)
        margin = -np.log(np.expm1(losses[module.epoch - 1]))  # log(1 + exp(-margin)) is the loss
        return torch.stack([sign * margin / 2, -sign * margin / 2], 1)

    net.register_forward_hook(answer)
    return net


def fitted(folder, net, epochs, cells=BLACK, **options):
    """fit's history as {column: list}, which log.csv has to repeat."""
    history = engine.fit(folder, net, cells, cells, epochs=epochs, **{"lr": 0.1} | SETTINGS | options)
    columns = {column: [row[column] for row in history] for column in history[0]}
    assert logged(folder) == columns
    return columns


def logged(folder):
    """log.csv as {column: list of numbers}."""
    rows = read_rows(folder / "log.csv")
    return {column: [float(row[column]) for row in rows] for column in rows[0]}


# ---------------------------------------------------------------- the plateau rule
def test_a_constant_loss_lowers_the_rate_after_epochs_5_9_and_13(tmp_path):
    """The first epoch is an improvement on nothing; the four after it are not, and so on."""
    found = fitted(tmp_path, linear(), 14)
    assert np.allclose(found["val_loss"], np.log(2), rtol=1e-6) and len(set(found["val_loss"])) == 1
    assert np.allclose(found["lr"], [0.1] * 5 + [0.01] * 4 + [0.001] * 4 + [0.0001], rtol=1e-9)


LOSSES = [1.0, 0.9, 0.95, 0.9, 0.89995, 0.91, 0.8, 0.85, 0.85, 0.85, 0.79, 0.8, 0.8, 0.8, 0.79, 0.5, 0.6]


def by_hand(losses, rate):
    """ReduceLROnPlateau: a tenth after the fourth epoch in a row that is no better by a ten-thousandth."""
    rates, best, bad = [], float("inf"), 0
    for loss in losses:
        rates.append(rate)
        bad = 0 if loss < best * (1 - 1e-4) else bad + 1
        best = min(best, loss) if bad == 0 else best
        if bad > 3:
            rate, bad = rate / 10, 0
    return rates


def test_the_rate_falls_to_a_tenth_after_the_fourth_epoch_without_improvement(tmp_path):
    """Epochs 3 to 6 are no better than 0.9: not 0.9 again, nor 0.89995, lower by half of a ten-thousandth.

    Three bad epochs, 8 to 10, are no reason, and the count begins with epoch 11; 12 to 15 are four again.
    """
    found = fitted(tmp_path, scripted(LOSSES), len(LOSSES))
    assert np.allclose(found["val_loss"], LOSSES, rtol=1e-5)
    assert np.allclose(found["lr"], [0.1] * 6 + [0.01] * 9 + [0.001] * 2, rtol=1e-9)
    assert np.allclose(found["lr"], by_hand(LOSSES, 0.1), rtol=1e-9)


@pytest.mark.parametrize("stop", [1, 4, 6, 9, 14])
def test_the_rate_is_the_same_if_the_run_was_interrupted(tmp_path, stop):
    """By a failure in the epoch after, the count of bad epochs and the best loss are gone on with."""
    with pytest.raises(InterruptedError):
        fitted(tmp_path, scripted(LOSSES, fail=stop + 1), len(LOSSES))
    assert len(logged(tmp_path)["lr"]) == stop
    assert np.allclose(fitted(tmp_path, scripted(LOSSES), len(LOSSES))["lr"], by_hand(LOSSES, 0.1), rtol=1e-9)


@pytest.mark.parametrize("share, epochs", [(0, 14), (0.05, 9), (0.01, 13), (0.1, 9), (0.11, 5), (1, 5)])
def test_stop_lr_ends_a_run_below_that_share_of_the_initial_rate(tmp_path, share, epochs):
    """A constant loss has rates of 1, 0.1, 0.01, 0.001 from epochs 1, 6, 10 and 14: equal is not below."""
    for _ in range(2):  # nor does it resume when asked again
        assert len(fitted(tmp_path, linear(), 14, stop_lr=share)["epoch"]) == epochs


def test_fit_of_a_finished_run_trains_nothing_more(tmp_path, capsys):
    first = fitted(tmp_path, scripted(LOSSES), 2)
    assert fitted(tmp_path, scripted(LOSSES, fail=3), 2) == first
    assert "resumes after epoch 2; there is nothing left to train" in capsys.readouterr().out


# ---------------------------------------------------------------- another optimizer and schedule
@pytest.mark.parametrize("stop", [None, 3])
def test_the_rate_of_a_cosine_schedule_follows_half_a_cosine(tmp_path, stop):
    """From the initial rate towards 0 in the epoch after the last, uninterrupted or resumed after epoch 3."""
    settings = {"optimizer": "adamw", "schedule": "cosine"}
    if stop:
        with pytest.raises(InterruptedError):
            fitted(tmp_path, scripted([1.0] * 8, fail=stop + 1), 8, **settings)
    rates = fitted(tmp_path, scripted([1.0] * 8), 8, **settings)["lr"]
    assert np.allclose(rates, 0.1 * (1 + np.cos(np.pi * np.arange(8) / 8)) / 2, rtol=1e-9)


def test_the_first_step_of_adamw_by_hand():
    """The gradient's sign times the rate, after a decay of a hundredth of the rate (Loshchilov, Hutter)."""
    net = torch.nn.Linear(2, 1, bias=False)
    before = net.weight.detach().numpy().copy()
    optimizer = engine.make_optimizer("adamw", net, 0.1)
    net(torch.tensor([[3.0, -2.0]])).sum().backward()
    optimizer.step()
    expected = before * (1 - 0.1 * 0.01) - 0.1 * np.array([[1, -1]])
    assert np.allclose(net.weight.detach().numpy(), expected, atol=1e-6)


# ---------------------------------------------------------------- the epoch that is tested
RIGHT = {"later equals": ([2, 3, 3, 1, 3], 2), "last": ([1, 2, 1, 3], 4), "all equal": ([2, 2, 2, 2], 1)}
RIGHT["falling"] = ([4, 3, 2, 1], 1)


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
@pytest.mark.parametrize("right, best", RIGHT.values(), ids=RIGHT)
def test_the_first_epoch_of_highest_validation_accuracy_is_kept(tmp_path, right, best, stop):
    """best.pt has its number, accuracy and weights, whose count of steps proves it; interrupted or not."""
    if stop:
        with pytest.raises(InterruptedError):
            fitted(tmp_path, scripted(right=right, fail=stop + 1), len(right))
    found = fitted(tmp_path, scripted(right=right), len(right))
    assert found["val_accuracy"] == [number / 4 for number in right]
    kept = torch.load(tmp_path / "best.pt", weights_only=True)
    assert kept["epoch"] == best == 1 + int(np.argmax(found["val_accuracy"]))
    assert kept["val_accuracy"] == right[best - 1] / 4 and kept["state_dict"]["epoch"] == best
    assert [file.name for file in tmp_path.glob("best*")] == ["best.pt"]


def test_the_lowest_loss_does_not_choose_the_epoch(tmp_path):
    """Above log 2 are four wrong answers, below four right ones: epoch 3 is as accurate as 2, and surer."""
    found = fitted(tmp_path, scripted([0.8, 0.5, 0.4]), 3)
    assert found["val_accuracy"] == [0, 1, 1] and found["val_loss"][2] < found["val_loss"][1]
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2


# ---------------------------------------------------------------- optimiser
def test_defaults_are_the_papers():
    parser = argparse.ArgumentParser()
    train.add_options(parser)
    found = vars(parser.parse_args(["--model", "vit_l_32"]))
    expected = {"epochs": 75, "batch_size": 32, "image_size": 224, "stop_lr": 0}
    assert {name: found[name] for name in expected} == expected and found["lr"] == "auto"
    own = {name: one.default for name, one in inspect.signature(engine.fit).parameters.items()}
    assert {name: own[name] for name in expected} == expected and own["crop"] is True


def test_weights_without_a_gradient_stay_as_they_are(tmp_path):
    """Black cells have none: weight decay, be it ever so small, would shrink the weights."""
    net = linear()
    before = net[1].weight.detach().clone()
    fitted(tmp_path, net, 3)
    assert torch.equal(net[1].weight, before)


def on_training_batch(net, call):
    """Give each batch that net is trained on to call before it is."""

    def hook(module, given):
        if module.training:
            call(given[0])

    net.register_forward_pre_hook(hook)


def test_training_is_sgd_with_momentum_on_cross_entropy(tmp_path):
    """Against NumPy: v = 0.9 v + g, w = w - rate v, over 3 epochs of 3 steps that share their momentum."""
    rng, seen = np.random.default_rng(0), []
    images = rng.integers(0, 256, (9, 4, 4, 3), np.uint8)
    red = np.where(np.arange(9) < 5, 40, 200)[:, None, None]  # the middle's red says the class
    images[:, 1:3, 1:3, 0] = red
    images[:, :, :, 0] = images[:, 1:2, 1:2, 0]
    cells, net = cells_of(images, np.arange(9) >= 5), linear()
    on_training_batch(net, lambda batch: seen.append(batch.clone()))
    w, v, losses = net[1].weight.detach().double().numpy().copy(), 0, []
    found = fitted(tmp_path, net, 3, cells)
    assert [len(batch) for batch in seen] == [4] * 9  # 9 images are three batches of 4
    for batch in seen:
        x, y = batch.double().numpy().reshape(4, -1), (batch[:, 0].amax((1, 2)) > 0.4).long().numpy()
        p = np.exp(x @ w.T)
        p /= p.sum(1, keepdims=True)
        losses.append(-np.log(p[range(4), y]).mean())
        v = 0.9 * v + (p - np.eye(2)[y]).T @ x / 4
        w = w - 0.1 * v
    assert np.allclose(net[1].weight.detach().numpy(), w, rtol=0, atol=2e-5) and np.abs(v).max() > 0.01
    assert np.allclose(found["train_loss"], np.reshape(losses, (3, 3)).mean(1), rtol=1e-4)
    assert found["lr"] == [0.1] * 3


def test_momentum_starts_from_nothing_where_fp16_overflows_in_the_first_steps(tmp_path):
    """The scaler's first scale, 65,536, makes these gradients infinite in fp16: no step is made until it has
    come down, and by then momentum must still be 0. PyTorch fills memory that nobody wrote to with NaN."""
    generator = np.random.default_rng(0)
    cells, net = cells_of(generator.integers(0, 256, (4, 4, 4, 3), dtype=np.uint8), [0, 1, 0, 1]), linear()
    net.register_forward_hook(lambda module, given, out: 100 * out)
    before = net[1].weight.detach().clone()
    torch.use_deterministic_algorithms(True)
    try:
        columns = fitted(tmp_path, net, 20, cells, lr=1e-5, amp="fp16")
    finally:
        torch.use_deterministic_algorithms(False)
    losses = columns["val_loss"]
    assert losses[0] == losses[1] != losses[-1]  # nothing moved, then it did
    assert torch.isfinite(net[1].weight).all() and not torch.equal(net[1].weight, before)


def test_a_batch_has_32_images_unless_it_is_told_otherwise(tmp_path):
    seen, net = [], linear()
    on_training_batch(net, lambda batch: seen.append(len(batch)))
    forty = cells_of(np.zeros((40, 4, 4, 3), np.uint8), np.arange(40) % 2)
    settings = {key: value for key, value in SETTINGS.items() if key != "batch_size"}
    engine.fit(tmp_path, net, forty, forty, lr=0.1, epochs=1, **settings)
    assert seen == [32, 32]


def test_no_gradients_are_held_while_the_activations_grow(tmp_path):
    """A set of gradients is as large as the network: freed before the forward pass, it is not in the peak."""
    net, held = linear(), []
    on_training_batch(net, lambda batch: held.append(net[1].weight.grad))
    fitted(tmp_path, net, 3)
    assert held == [None] * 3


GPUS = [((9, 0), "bf16"), ((8, 6), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 1), "off")]


@pytest.mark.parametrize("capability, amp", GPUS)
def test_precision_is_what_the_gpu_is_made_for(monkeypatch, capability, amp):
    """Tensor cores compute in bf16 from Ampere on (8.0), in fp16 from Volta on (7.0); Pascal has none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert train.choose_amp(torch.device("cuda")) == amp
    assert train.choose_amp(torch.device("cuda"), "off") == "off"


# ---------------------------------------------------------------- a run
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, split's rows) of a run of train.py: classes of 40, 15 and 10 pictures, hard to tell."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    for label, count, red in (("A", 40, 110), ("B", 15, 120), ("C", 10, 130)):
        (folder / "mine" / label).mkdir(parents=True)
        for i in range(count):
            image = np.clip(rng.normal((red, 120, 120), 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "mine" / label / f"{i}.png")
    arguments = (
        "--model shufflenet_v2_x0_5 --init random --fold 1 --image-size 32 --batch-size 22 --workers 0"
    )
    arguments += f" --device cpu --amp off --lr 0.02 --stop-lr 0.05 --data {folder}/mine --runs {folder}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *arguments.split()])
        assert train.main() == 0
    return folder / "train/shufflenet_v2_x0_5/random/fold1", read_rows(folder / "split.csv")


def test_the_rates_of_a_run_follow_from_its_validation_losses(finished):
    """And it ended once the rate that comes next was below 0.05 of the first, long before epoch 75."""
    found = logged(finished[0])
    assert np.allclose(found["lr"], by_hand(found["val_loss"], 0.02), rtol=1e-9)
    comes_next = by_hand([*found["val_loss"], 9], 0.02)[1:]
    assert [rate < 0.05 * 0.02 for rate in comes_next] == [False] * (len(comes_next) - 1) + [True]
    assert found["epoch"] == list(range(1, len(comes_next) + 1)) and len(comes_next) < 75
    assert json.loads((finished[0] / "config.json").read_text())["epochs"] == 75


def test_validation_loss_and_accuracy_are_over_all_images_as_they_come(finished):
    """scikit-learn on val_predictions.csv gives log.csv's best row; classes are not weighted here."""
    folder, rows = finished
    found, read = logged(folder), evaluate.read_predictions(folder / "val_predictions.csv")
    best = torch.load(folder / "best.pt", weights_only=True)["epoch"]
    assert best == 1 + int(np.argmax(found["val_accuracy"]))
    labels = [read.classes[label] for label in read.labels]
    validated = {row["path"]: row["label"] for row in rows if row["fold1"] == "val"}
    assert dict(zip(read.paths, labels)) == validated
    p = read.probabilities / read.probabilities.sum(1, keepdims=True)  # seven digits stand in the file
    loss, accuracy = (found[column][best - 1] for column in ("val_loss", "val_accuracy"))
    assert loss == pytest.approx(log_loss(read.labels, p), rel=1e-5)
    assert accuracy == pytest.approx(accuracy_score(read.labels, read.predictions), abs=1e-12)
    weights = 1 / np.bincount(read.labels)[read.labels]
    assert abs(log_loss(read.labels, p, sample_weight=weights) - loss) > 1e-3
    assert balanced_accuracy_score(read.labels, read.predictions) != accuracy


def test_the_epoch_that_is_tested_is_the_best_one(finished):
    """best.pt in a bare torchvision network, given the test images by Pillow, gives predictions.csv."""
    folder, rows = finished
    best = torch.load(folder / "best.pt", weights_only=True)
    read = evaluate.read_predictions(folder / "predictions.csv")
    assert set(read.paths) == {row["path"] for row in rows if row["fold1"] == "test"}
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=3).eval()
    net.load_state_dict(best["state_dict"])
    images = [np.asarray(Image.open(folder.parents[3] / "mine" / path)) for path in read.paths]
    images = (np.stack(images) / 255 - best["mean"]) / best["std"]
    with torch.inference_mode():
        logits = net(torch.from_numpy(images).float().permute(0, 3, 1, 2))
    assert np.allclose(logits.double().softmax(1).numpy(), read.probabilities, atol=1e-5)
