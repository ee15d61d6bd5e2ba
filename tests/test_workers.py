"""Training gives the same numbers however many processes read the images, and compiled the same as
uncompiled."""

import csv

import numpy as np
import pytest
import torch

SETTINGS = {"mean": (0.56, 0.50, 0.74), "std": (0.24, 0.28, 0.18), "image_size": 32, "lr": 0.002}


def train_once(cells, folder, model="squeezenet1_1", epochs=2, **options):
    """Fit a fresh network on every other image; returns (history, best.pt's weights, logits)."""
    import models
    import engine

    torch.manual_seed(3)
    net = models.build_model(model, len(cells.classes), image_size=32)
    learn, val = cells.subset(np.arange(0, len(cells), 2)), cells.subset(np.arange(1, len(cells), 4))
    history = engine.fit(folder, net, learn, val, epochs=epochs, seed=5, **SETTINGS, **options)
    best = torch.load(folder / "best.pt", weights_only=True)["state_dict"]
    keys = ("mean", "std", "image_size")
    logits = engine.predict(
        net, val, workers=options.get("workers", 0), **{key: SETTINGS[key] for key in keys}
    )
    return history, best, logits


@pytest.fixture
def cells(demo):
    import datasets

    return datasets.open_dataset(demo / "bm")


def test_results_do_not_depend_on_the_number_of_workers(cells, tmp_path):
    """Augmentation and dropout (squeezenet has it) draw the same numbers with 0 and 2 workers: bitwise equal
    weights."""
    cells = cells.subset(np.arange(0, len(cells), 2))
    runs = {workers: train_once(cells, tmp_path / str(workers), workers=workers) for workers in (0, 2)}
    history, best, logits = runs[0]
    assert len(history) == 2 and torch.isfinite(logits).all()
    other_history, other_best, other_logits = runs[2]
    assert all(torch.equal(value, other_best[key]) for key, value in best.items())
    assert torch.equal(logits, other_logits)
    for ours, others in zip(history, other_history, strict=True):
        for column in ("epoch", "lr", "train_loss", "val_loss", "val_accuracy"):
            assert ours[column] == others[column], column


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_match_images_augmented_one_by_one(cells, workers):
    """A batch that a loader brings holds, at each position, what augment makes of that image by its own
    random numbers."""
    import datasets

    order = datasets.BalancedEpochs(cells.targets, 16, seed=7, fold=1)
    order.epoch = 4
    keys = list(order)
    for (epoch, first, indices), (images, labels) in zip(
        keys, datasets.loader(datasets.Batches(cells, 40, 7, 1), order, workers), strict=True
    ):
        assert images.shape == (16, 3, 40, 40) and images.dtype == torch.uint8
        assert labels.tolist() == [int(cells.targets[i]) for i in indices]
        for position in (0, 9, 15):
            rng = np.random.default_rng([datasets.AUGMENTATION, 7, 1, epoch, first + position])
            expected = datasets.augment(cells[indices[position]], 40, rng)
            assert np.array_equal(images[position].permute(1, 2, 0).numpy(), expected)


@pytest.mark.long
def test_compiled_training_follows_eager(cells, tmp_path):
    """torch.compile changes the order of sums, nothing else: losses and logits stay close, and best.pt has
    the bare names."""
    eager, compiled = (
        train_once(cells, tmp_path / str(compile), model="resnet18", compile=compile)
        for compile in (False, True)
    )
    for ours, others in zip(eager[0], compiled[0], strict=True):
        assert others["train_loss"] == pytest.approx(ours["train_loss"], rel=0.02)
        assert others["val_loss"] == pytest.approx(ours["val_loss"], rel=0.05)
    assert list(eager[1]) == list(compiled[1])
    with open(tmp_path / "True" / "log.csv", encoding="utf-8", newline="") as handle:
        assert len(list(csv.DictReader(handle))) == 2
