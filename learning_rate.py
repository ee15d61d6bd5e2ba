"""The initial learning rate: a range test finds where the loss explodes, short trials which rates learn.

    rate = learning_rate.find_lr("runs/mine", make_net, train, val, epochs=75, batch_size=32, seed=0, ...)

find_lr leaves measured.json and lr_range.csv. To copy this file, take engine.py and datasets.py along.
"""

import contextlib
import csv
import functools
import io
import json
import math

import numpy as np
import torch
import torch_lr_finder
from tqdm import tqdm

import datasets
import engine
from engine import AMP_DTYPES, DROPOUT, LAYOUTS, TRIAL

LOW, HIGH, STEPS, SMOOTHING = 1e-7, 10, 100, 0.05  # of the range test (section 2.2)
RATES = {"sgd": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "adamw": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)}  # the trial's
MIN_STEPS, MAX_STEPS, VAL_IMAGES = 20, 300, 2000  # of the trial of one rate


def range_test(
    net,
    train,
    *,
    batch_size,
    seed,
    image_size,
    mean,
    std,
    crop,
    workers,
    device,
    amp,
    memory_format,
    optimizer="sgd",
    smoothing=0.0,
    colour=0.0,
):
    """Train net on train (Cells) for 100 steps at exponentially rising rates, or until the loss explodes.

    Returns the rate and the loss of each step, lists of up to 100 numbers.
    """
    layout = LAYOUTS[memory_format]
    net.to(device, memory_format=layout)
    mean, std = (torch.tensor(v, dtype=torch.float32, device=device) for v in (mean, std))

    def prepare(module, inputs):
        engine.train_mode(module)  # the library calls net.train() before each step
        return datasets.normalise(inputs[0].contiguous(memory_format=layout), mean, std)

    net.register_forward_pre_hook(prepare, prepend=True)
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, 0)
    order.epoch, order.batches = 0, STEPS  # 100 batches however small the data set is
    batches = datasets.Batches(train, image_size, seed, 0, crop, colour)
    batches = datasets.loader(batches, order, workers, device.type == "cuda")
    optimizer = engine.make_optimizer(optimizer, net, LOW)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    amp = {"device_type": device.type, "dtype": AMP_DTYPES[amp], "enabled": amp != "off"}
    settings = {"amp_backend": "torch", "amp_config": amp, "grad_scaler": scaler}
    loss = functools.partial(engine.training_loss, smoothing=smoothing)
    finder = torch_lr_finder.LRFinder(net, optimizer, loss, device, **settings)
    finder.state_cacher.cached.clear()  # its copy of the weights, on the device
    engine.seed_all(DROPOUT, seed, 0, 0, 0)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        finder.range_test(batches, end_lr=HIGH, num_iter=STEPS, smooth_f=SMOOTHING)
    smoothed = np.array([float(loss) for loss in finder.history["loss"]])  # as the library stops by it
    losses = (smoothed[1:] - (1 - SMOOTHING) * smoothed[:-1]) / SMOOTHING
    return finder.history["lr"], [*smoothed[:1].tolist(), *losses.tolist()]


def try_lr(
    net, train, val, lr, *, steps, batch_size, seed, crop, optimizer, smoothing=0.0, colour=0.0, **options
):
    """Train net on train for some steps at a constant rate; returns the mean recall of val's classes.

    It is the mean of two looks, half way and at the end. options: predict's.
    """
    device, amp, layout = options["device"], options["amp"], LAYOUTS[options["memory_format"]]
    net.to(device, memory_format=layout)
    mean, std = (torch.tensor(options[key], dtype=torch.float32, device=device) for key in ("mean", "std"))
    optimizer = engine.make_optimizer(optimizer, net, lr)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    order = datasets.BalancedEpochs(train.targets, batch_size, seed, 0)
    order.batches = steps // 2
    batches = datasets.Batches(train, options["image_size"], seed, 0, crop, colour)
    batches = datasets.loader(batches, order, options["workers"], device.type == "cuda")
    recalls, images = [], np.bincount(val.targets)
    for half in (1, 2):
        order.epoch = half
        iterator = iter(batches)
        engine.seed_all(DROPOUT, seed, 0, half, 0)
        bar = tqdm(iterator, f"trying the rate {lr:g}", len(batches), leave=False, disable=None)
        engine.train_epoch(net, bar, optimizer, scaler, mean, std, device, amp, layout, smoothing)
        right = engine.predict(net, val, alone=True, **options).argmax(1).numpy() == val.targets
        recalls.append((np.bincount(val.targets, right)[images > 0] / images[images > 0]).mean())
    score = float(np.mean(recalls))
    print(f"rate {lr:g}: mean recall {score:.4f} after {steps // 2} and {steps} steps", flush=True)
    return score


def choose_rate(candidates, images):
    """(A rate, is any better than chance?) of candidates [(rate, mean recall)]: the one-standard-error rule.

    The geometric mean of the rates whose recall lies within one standard error of the best (Breiman et al.
    1984, Classification and Regression Trees, 3.4.3); of all rates where none is better than chance. The
    error is that of a difference of two mean recalls, by the choice of images (int [C], of each class); its
    square is doubled, since training has as much luck again (paper/RESULTS.md).
    """
    rates, recalls = np.array(candidates).T
    share = (1 / images).sum() / len(images) ** 2  # p (1 - p) share: the variance of a mean recall p
    best, chance = recalls.max(), 1 / len(images)
    learned = best > chance + math.sqrt(chance * (1 - chance) * share)
    if learned:
        rates = rates[recalls >= best - math.sqrt(4 * best * (1 - best) * share)]
    return float(f"{np.exp(np.log(rates).mean()):.2g}"), learned


def balanced_subset(cells, seed):
    """Up to VAL_IMAGES of cells, drawn: as many of each class, since classes count alike."""
    order = np.random.default_rng([TRIAL, seed]).permutation(len(cells))
    most = math.ceil(VAL_IMAGES / len(cells.classes))
    chosen = [order[cells.targets[order] == label][:most] for label in range(len(cells.classes))]
    return cells.subset(np.sort(np.concatenate(chosen)))


def find_lr(folder, make_net, train, val, *, epochs, origin=None, **options):
    """The initial learning rate of a model and init, once for all folds, from fold 0 (measured.json).

    Each of five rates below the one at which the range test's loss explodes is tried on a new network. All of
    it takes at most half of one fold's steps; a run too short for that takes the middle one of the five.
    origin: what else the rate depends on (weights, data, ...), a dict: where it changes, the rate is measured
    anew. options: range_test's.
    """
    if not len(train) or not len(val):
        why = "fold 0 has no images to train on or to validate with, by which the rate of all folds is found"
        raise SystemExit(f"{folder}: {why}; set it with --lr, or use another split.csv")
    file, tried = folder / "measured.json", RATES[options["optimizer"]]
    steps = epochs * math.ceil(len(train) / options["batch_size"])
    steps = min((steps // 2 - STEPS) // len(tried), MAX_STEPS)
    names = "optimizer batch_size image_size seed smoothing colour".split()
    settings = {key: options[key] for key in names if key in options} | {"epochs": epochs} | (origin or {})
    with datasets.file_lock(folder / "measured.lock"):
        before = datasets.read_json(file) if file.exists() else {}
        changed = [key for key in settings if before.get(key) != settings[key]]
        if not changed:
            return before["lr"]
        if before:
            print(f"{file}: was measured with other settings ({', '.join(changed)}): measuring anew")
            (folder / "lr_range.csv").unlink(missing_ok=True)
        candidates, rate, learned, why = [], tried[2], False, "too few steps to try rates"
        if steps >= MIN_STEPS:
            rates, losses = range_test(make_net(0), train, **options)
            with datasets.open_atomic(folder / "lr_range.csv", "w") as handle:
                csv.writer(handle).writerows([("lr", "loss"), *zip(rates, losses)])
            some = balanced_subset(val, options["seed"])
            for lr in [lr for lr in tried if lr < rates[-1]]:
                candidates.append((lr, try_lr(make_net(0), train, some, lr, steps=steps, **options)))
            torch.cuda.empty_cache()  # other jobs of this GPU may need it
        if candidates:
            images = np.unique(some.targets, return_counts=True)[1]
            rate, learned = choose_rate(candidates, images)
            why = "no network learned in the trial"
        if not learned:
            print(f"{folder}: {why}: learning rate {rate:g}; --lr sets another")
        with datasets.open_atomic(file, "w") as handle:
            json.dump(settings | {"candidates": candidates, "lr": rate}, handle)
    return rate
