"""Balanced epochs: classes seen equally often, images of a class too, in an order that seed, fold and epoch
alone decide.

Truth comes from torch's WeightedRandomSampler with weights of 1/count (two-sample tests), from chi-square
and Kolmogorov-Smirnov tests of scipy, and from the expected number of distinct images among draws with
replacement. All streams are seeded, so a p-value below 0.001 is a fault and not bad luck.
"""

import functools
import itertools
import random
import sys

import numpy as np
import pytest
import torch
from scipy import signal, stats

import datasets

COUNTS = np.array([28800, 2000, 300, 8])  # 3,600 : 1, as of the BM cells' largest and smallest class
TARGETS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), COUNTS))
ALPHA = 0.001


def draws(epoch=1, targets=TARGETS, batch_size=32, **key):
    """The indices of one epoch, int64 [draws]."""
    sampler = datasets.BalancedEpochs(targets, batch_size, **key)
    sampler.epoch = epoch
    return np.concatenate([indices for _, _, indices in sampler])


@pytest.fixture(scope="module")
def ours():
    """Forty epochs' indices, [40, draws]."""
    return np.stack([draws(epoch, seed=3, fold=2) for epoch in range(1, 41)])


@pytest.fixture(scope="module")
def torchs():
    """As many epochs from torch's sampler with weights of 1/count."""
    generator = torch.Generator().manual_seed(1)
    sampler = torch.utils.data.WeightedRandomSampler(1 / COUNTS[TARGETS], 31136, generator=generator)
    return np.array([list(sampler) for _ in range(40)])


def alike(one, two):
    """p-value of the chi-square test that two rows of counts come from the same distribution; rare cells
    pooled."""
    table = np.array([one, two])
    common = table.sum(0) >= 20
    table = np.column_stack([table[:, common], table[:, ~common].sum(1)])
    return stats.chi2_contingency(table[:, table.sum(0) > 0])[1]


# ---------------------------------------------------------------- frequencies
def test_all_classes_are_drawn_equally_often_at_an_imbalance_of_3600_to_1(ours):
    p = [stats.chisquare(np.bincount(TARGETS[epoch], minlength=4))[1] for epoch in ours]
    assert min(p) > ALPHA / len(p)
    assert stats.kstest(p, "uniform")[1] > ALPHA, "too unequal, or equal by force"
    assert stats.chisquare(np.bincount(TARGETS[ours.ravel()], minlength=4))[1] > ALPHA


def test_torchs_weighted_sampler_draws_the_same_class_frequencies(ours, torchs):
    assert alike(*(np.bincount(TARGETS[drawn.ravel()], minlength=4) for drawn in (ours, torchs))) > ALPHA


@pytest.mark.parametrize("label", [1, 2, 3])
def test_images_of_a_class_are_drawn_equally_often(ours, label):
    """The classes of 2,000, 300 and 8 images, over forty epochs: 156 draws of each image and more."""
    times = np.bincount(ours.ravel(), minlength=len(TARGETS))[label == TARGETS]
    assert len(times) == COUNTS[label] and times.min() > 0
    assert stats.chisquare(times)[1] > ALPHA


def test_images_of_the_largest_class_are_drawn_equally_often(ours):
    """28,800 images are drawn 11 times each: too few for a count each, so their places among the class are
    uniform instead."""
    place = np.cumsum(TARGETS == 0) - 1
    chosen = ours[TARGETS[ours] == 0]
    assert stats.kstest((place[chosen] + 0.5) / COUNTS[0], "uniform")[1] > ALPHA
    assert place[chosen].min() < 10 and place[chosen].max() > COUNTS[0] - 10


@pytest.mark.parametrize("label", [0, 1, 2])
def test_an_epoch_draws_with_replacement(ours, torchs, label):
    """Of n images, m draws with replacement miss (1 - 1/n)^m of them; and images come back as often as in
    torch's sampler."""
    members = label == TARGETS
    count = functools.partial(np.bincount, minlength=len(TARGETS))
    times = [np.apply_along_axis(count, 1, drawn)[:, members] for drawn in (ours, torchs)]
    draws_of_class = times[0].sum(1)
    missed = COUNTS[label] * (1 - 1 / COUNTS[label]) ** draws_of_class
    assert abs(((times[0] == 0).sum(1) - missed).sum()) < 4 * np.sqrt(missed.sum() + 1)
    assert alike(*(np.bincount(t.ravel().clip(max=60), minlength=61) for t in times)) > ALPHA


def test_a_draw_tells_nothing_of_the_next(ours):
    """Pairs of neighbouring draws: all 16 pairs of classes equally often; places within a class
    uncorrelated."""
    ours = ours[:8]
    pairs = TARGETS[ours[:, :-1]] * 4 + TARGETS[ours[:, 1:]]
    assert stats.chisquare(np.bincount(pairs[:, ::2].ravel(), minlength=16))[1] > ALPHA
    first, second = ours[:, :-1].ravel(), ours[:, 1:].ravel()
    assert stats.spearmanr(first, second)[1] > ALPHA


def test_a_class_without_a_training_image_leaves_the_others_equally_often():
    """A class of one image may stand in the test part alone."""
    labels = np.repeat([0, 2, 5], [3000, 100, 2])
    assert set(labels[draws(targets=labels)]) == {0, 2, 5}
    assert stats.chisquare(np.bincount(labels[draws(targets=labels)])[[0, 2, 5]])[1] > ALPHA


# ---------------------------------------------------------------- whole batches
@pytest.mark.parametrize("images, batches", [(1, 1), (31, 1), (32, 1), (33, 2), (64, 2), (65, 3)])
def test_an_epoch_is_as_many_draws_as_images_rounded_up_to_whole_batches(images, batches):
    sampler = datasets.BalancedEpochs(np.arange(images) % 3, 32)
    keys = list(sampler)
    assert len(sampler) == len(keys) == batches
    assert [len(indices) for _, _, indices in keys] == [32] * batches
    assert [first for _, first, _ in keys] == [32 * i for i in range(batches)]
    assert all(indices.min() >= 0 and indices.max() < images for _, _, indices in keys)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_the_shares_of_all_ranks_are_together_the_order_of_one(ranks):
    """Each batch is cut into as many equal parts, and each part knows the position of its first image in the
    one order."""
    whole = draws(5, TARGETS[:1000], seed=1, fold=3)
    shares = [datasets.BalancedEpochs(TARGETS[:1000], 32, 1, 3, rank, ranks) for rank in range(ranks)]
    covered = np.zeros(len(whole), int)
    for share in shares:
        share.epoch = 5
        assert len(share) == len(list(share)) == 32
        for batch, (epoch, first, indices) in enumerate(share):
            assert epoch == 5 and len(indices) == 32 // ranks and first // 32 == batch
            assert np.array_equal(indices, whole[first : first + len(indices)])
            covered[first : first + len(indices)] += 1
    assert (covered == 1).all()


# ---------------------------------------------------------------- the key
def test_the_order_depends_on_seed_fold_and_epoch_alone():
    """Neither on the global generators nor on what was drawn before; and it leaves those generators as they
    were."""
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    sampler = datasets.BalancedEpochs(TARGETS, 32, seed=4, fold=1)
    sampler.epoch = 7
    once = np.concatenate([indices for _, _, indices in sampler])
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    random.seed(2), np.random.seed(2), torch.manual_seed(2)
    sampler.epoch = 2
    list(sampler)
    sampler.epoch = 7
    assert np.array_equal(once, np.concatenate([indices for _, _, indices in sampler]))
    assert np.array_equal(once, draws(7, seed=4, fold=1))


def test_another_seed_fold_or_epoch_gives_another_order():
    """All pairs of 48 keys, seed 0 in fold 1 and seed 1 in fold 0 among them, agree no more than by chance:
    in 1 of 4,800 places."""
    labels = np.repeat([0, 1], [3000, 2000])
    keys = list(itertools.product((0, 1, 2, 2**63 - 1), (0, 1, 2), (1, 2, 3, 75)))
    orders = [draws(epoch, labels, seed=seed, fold=fold) for seed, fold, epoch in keys]
    agree = [(one == two).mean() for one, two in itertools.combinations(orders, 2)]
    assert len(agree) == 48 * 47 / 2 and max(agree) < 0.005


def test_the_order_and_the_augmentation_share_no_random_numbers():
    """Streams of one key begin with other constants: with 4,096 classes of one image an order shows its own
    draws."""
    assert datasets.ORDER != datasets.AUGMENTATION
    sampler = datasets.BalancedEpochs(np.arange(4096), 32, seed=1, fold=2)
    sampler.epoch = 3
    order = np.concatenate([indices for _, _, indices in sampler]) / 4096
    for key in itertools.product([(datasets.AUGMENTATION,), ()], [(1, 2, 3), (1, 2, 3, 0)]):
        numbers = np.random.default_rng(sum(key, ())).random(20000)
        correlation = np.abs(signal.correlate(numbers - 0.5, order - 0.5, "valid")).max() / (4096 / 12)
        assert correlation < 0.2, "0.08 by chance, as the greatest of 16,000; 1 if shared"


# ---------------------------------------------------------------- cost
def test_an_epoch_of_the_bm_cells_makes_no_python_object_an_image():
    """Of 171,374 images and as many draws nothing but a few arrays is left; torch's sampler leaves a number
    object each."""
    targets = np.random.default_rng(0).choice(21, 171374, p=np.arange(1, 22) / 231)
    list(datasets.BalancedEpochs(targets[:100], 32))  # what numpy makes once
    before = sys.getallocatedblocks()
    sampler = datasets.BalancedEpochs(targets, 32)
    made = sys.getallocatedblocks() - before
    batch = next(iter(sampler))
    drawn = sys.getallocatedblocks() - before
    assert isinstance(batch[2], np.ndarray) and batch[2].dtype == np.int64 and len(sampler) == 5356
    assert made < 1000 and drawn < 1000
    before = sys.getallocatedblocks()
    theirs = list(torch.utils.data.WeightedRandomSampler(torch.ones(171374), 171374))
    assert sys.getallocatedblocks() - before > 100000 and len(theirs) == 171374, "the count could tell"


# ---------------------------------------------------------------- through a loader
def pictures():
    """Forty images whose labels are their own indices, so that a batch's labels tell which images were
    drawn."""
    rng = np.random.default_rng(0)
    images = {str(i): rng.integers(256, size=(20, 20, 3), dtype=np.uint8) for i in range(40)}
    return datasets.Cells(".", "memory", list(images), list(images), np.arange(40), read=images.__getitem__)


def read_epoch(batches):
    """(labels [draws], images [draws,3,16,16]) of one epoch."""
    images, labels = zip(*batches)
    return torch.cat(labels).numpy(), torch.cat(images).numpy()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_epoch_reaches_persistent_workers_and_a_continued_run_does_not_replay_the_first(workers):
    """One loader through epochs 1, 2, 3, beside a fresh loader that begins at 3 as a continued run does:
    bitwise the same."""
    targets = np.arange(40) % 3
    sampler = datasets.BalancedEpochs(targets, 8, seed=6, fold=1)
    loader = datasets.loader(datasets.Batches(pictures(), 16, seed=6, fold=1), sampler, workers)
    epochs = {}
    for epoch in (1, 2, 3):
        sampler.epoch = epoch
        epochs[epoch] = read_epoch(loader)
        assert np.array_equal(epochs[epoch][0], draws(epoch, targets, 8, seed=6, fold=1))
    for one, two in itertools.combinations(epochs.values(), 2):
        assert (one[0] == two[0]).mean() < 0.5
    later = datasets.BalancedEpochs(targets, 8, seed=6, fold=1)
    later.epoch = 3
    continued = read_epoch(datasets.loader(datasets.Batches(pictures(), 16, seed=6, fold=1), later, workers))
    for ours, theirs in zip(epochs[3], continued, strict=True):
        assert np.array_equal(ours, theirs)
