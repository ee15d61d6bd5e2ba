"""Doubtful labels: 3% of the labels of simulated cells are flipped, half of them to the most similar class;
who finds them?

Confident learning is compared with cleanlab where that is installed (pip install cleanlab); it is no
requirement.
"""

import csv

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

import evaluate
import report

CLASSES = "NGB NGS LYT MON EOS MMZ MYB PMO BLA ART EBO HAC LYI FGC".split()
COUNTS = dict(zip(CLASSES, (500, 1400, 1200, 200, 280, 150, 320, 580, 580, 900, 1300, 60, 30, 20)))


def flip(labels, similar, share, rng):
    """Labels of which this share is wrong, half of those as the most similar class [C], and where."""
    wrong, near = rng.random(len(labels)) < share, rng.random(len(labels)) < 0.5
    far = (labels + rng.integers(1, len(similar), len(labels))) % len(similar)
    return np.where(wrong, np.where(near, similar[labels], far), labels), wrong


@pytest.fixture(scope="module")
def simulation():
    """Cells of Gaussian classes, mislabelled, and out-of-fold probabilities of classifiers that saw all
    classes equally often."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(len(COUNTS)), list(COUNTS.values()))
    centres = rng.normal(size=(len(COUNTS), 8)) * 1.6
    cells = centres[truth] + rng.normal(size=(len(truth), 8))
    distance = ((centres[:, None] - centres) ** 2).sum(-1) + 1e9 * np.eye(len(COUNTS))
    labels, wrong = flip(truth, distance.argmin(1), 0.03, rng)
    folds, p = np.zeros(len(truth), int), np.zeros((len(truth), len(COUNTS)))
    for k, (train, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=0).split(cells, labels)):
        network = LinearDiscriminantAnalysis(priors=np.full(len(COUNTS), 1 / len(COUNTS)))
        folds[test], p[test] = k, network.fit(cells[train], labels[train]).predict_proba(cells[test])
    return {"labels": labels, "wrong": wrong, "folds": folds, "p": p, "truth": truth}


def natural(simulation, here):
    """Prior-corrected probabilities of a fold's images, by the frequencies outside it."""
    labels = simulation["labels"]
    return report.posterior(simulation["p"][here], np.bincount(labels[~here], minlength=len(COUNTS)))


def search(simulation, corrected=True, enough=report.ENOUGH):
    """Suggestions, scores and flags of all folds."""
    labels, folds = simulation["labels"], simulation["folds"]
    images = np.bincount(labels)
    out = [np.zeros(len(labels), kind) for kind in (int, float, bool)]
    for k in range(5):
        here = folds == k
        p = natural(simulation, here) if corrected else simulation["p"][here]
        for column, values in zip(out, report.doubtful(labels[here], p, images >= enough)):
            column[here] = values
    return out


def quality(flagged, wrong):
    """Precision and recall of the flags."""
    return (flagged & wrong).sum() / flagged.sum(), (flagged & wrong).sum() / wrong.sum()


def test_flipped_labels_are_found(simulation):
    """More than half of what is flagged is wrong, of 3% wrong labels; most wrong labels of classes that may
    be flagged are found."""
    (suggested, score, flagged), wrong = search(simulation), simulation["wrong"]
    common = np.bincount(simulation["labels"])[simulation["labels"]] >= report.ENOUGH
    precision, recall = quality(flagged[common], wrong[common])
    assert precision > 0.5 and recall > 0.75
    assert average_precision_score(wrong, score) > 0.75
    found = flagged & wrong
    assert (suggested[found] == simulation["truth"][found]).mean() > 0.9


def test_uncorrected_probabilities_cost_precision(simulation):
    """The network believes rare classes to be frequent, and suggests them for images of the frequent ones."""
    wrong = simulation["wrong"]
    (_, score, flagged), (_, naive_score, naive) = search(simulation), search(simulation, corrected=False)
    assert quality(flagged, wrong)[0] > 1.3 * quality(naive, wrong)[0]
    assert average_precision_score(wrong, score) > average_precision_score(wrong, naive_score) + 0.05


def test_picking_by_score_beats_the_off_diagonal_itself(simulation):
    """As many labels are flagged as confident learning counts, those of highest score: better than the
    counted images themselves."""
    labels, folds, wrong = simulation["labels"], simulation["folds"], simulation["wrong"]
    images = np.bincount(labels)
    plain = np.zeros(len(labels), bool)
    for k in range(5):
        here = folds == k
        counted, off = report.confident_joint(labels[here], natural(simulation, here))
        plain[here] = off & (images[labels[here]] >= report.ENOUGH) & (images[counted] >= report.ENOUGH)
    flagged = search(simulation)[2]
    ours, theirs = quality(flagged, wrong), quality(plain, wrong)
    assert flagged.sum() == plain.sum()
    assert ours[0] > theirs[0] and ours[1] > theirs[1]


def test_rare_classes_are_ranked_but_never_flagged(simulation):
    """Classes of under 50 images: none of their labels and no suggestion of them is flagged, some have a high
    score."""
    suggested, score, flagged = search(simulation)
    rare = np.bincount(simulation["labels"]) < report.ENOUGH
    touched = rare[simulation["labels"]] | rare[suggested]
    assert rare.any() and not flagged[touched].any() and flagged.any()
    assert (score[touched] > np.sort(score)[-200]).any()


def test_a_clean_fold_of_sure_predictions_has_no_flags():
    labels = np.repeat([0, 1, 2], 60)
    p = np.eye(3)[labels] * 0.94 + 0.02
    assert not report.doubtful(labels, p, np.ones(3, bool))[2].any()


def test_thresholds_by_hand():
    """Class means 0.8 and 0.6: the image labelled 0 with 0.65 for class 1 is counted to 1, the one with 0.55
    to none."""
    first = np.array([0.95, 0.98, 0.92, 0.35, 0.45, 0.3, 0.35, 0.55])
    p, labels = np.column_stack([first, 1 - first]), np.array([0, 0, 0, 0, 0, 1, 1, 1])
    assert p[:5, 0].mean() == pytest.approx(0.73) and p[5:, 1].mean() == pytest.approx(0.6)
    counted, off = report.confident_joint(labels, p)
    assert off.tolist() == [False, False, False, True, False, False, False, False]
    assert counted[3] == 1


def test_agrees_with_cleanlab(simulation):
    """The same images off the diagonal, fold by fold, as cleanlab's filter 'confident_learning', and as many
    as it counts."""
    cleanlab_filter = pytest.importorskip("cleanlab.filter")
    cleanlab_count = pytest.importorskip("cleanlab.count")
    labels, images = simulation["labels"], np.bincount(simulation["labels"])
    for k in range(5):
        here = simulation["folds"] == k
        p = report.posterior(simulation["p"][here], images)
        off = report.confident_joint(labels[here], p)[1]
        assert off.sum() > 20
        assert off.sum() == cleanlab_count.num_label_issues(labels=labels[here], pred_probs=p)
        theirs = cleanlab_filter.find_label_issues(labels[here], p, filter_by="confident_learning", n_jobs=1)
        assert off.tolist() == theirs.tolist()


def write_study(folder, simulation):
    """The simulation as train.py would leave it: predictions.csv of five folds."""
    classes, labels, p = list(COUNTS), simulation["labels"], simulation["p"]
    for k in range(5):
        file = folder / f"train/resnet18/random/fold{k}/predictions.csv"
        file.parent.mkdir(parents=True)
        with open(file, "w", newline="") as handle:
            out = csv.writer(handle)
            out.writerow(["path", "label", "prediction", *(f"p_{name}" for name in classes)])
            for i in np.flatnonzero(simulation["folds"] == k):
                values = [f"{value:.9g}" for value in p[i]]
                out.writerow([f"{i:05d}.jpg", classes[labels[i]], classes[p[i].argmax()], *values])


def issues_of(runs, contradicted=()):
    """Rows of report.label_issues of a study's one run."""
    study, run = evaluate.read_study(runs), ("resnet18", "random")
    tested = {k: evaluate.read_predictions(fold.file) for k, fold in study.runs[run].items()}
    return report.label_issues(study, run, tested, contradicted).to_dict("records")


def test_rows_from_a_study_on_disk(simulation, tmp_path):
    """label_issues.csv holds exactly the images with another class on top, most doubtful first, flags as in
    memory."""
    write_study(tmp_path, simulation)
    rows = issues_of(tmp_path)
    _, score, flagged = search(simulation)
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)
    shown = {row["path"] for row in rows if row["flagged"] == "yes"}
    assert shown == {f"{i:05d}.jpg" for i in np.flatnonzero(flagged)} and len(rows) == (score > 0).sum()
    for row in rows:
        assert row["label"] == CLASSES[simulation["labels"][int(row["path"][:5])]] != row["suggested"]


def test_contradicting_labels_come_first(simulation, tmp_path):
    """Two images of one cell with two labels: flagged whatever the network says, with the other's label and
    the reason."""
    write_study(tmp_path, simulation)
    classes, labels, sure = list(COUNTS), simulation["labels"], simulation["p"].max(1) > 0.9
    one, other = (np.flatnonzero(sure & (labels == c) & ~simulation["wrong"])[0] for c in (0, 2))
    names = [f"{i:05d}.jpg" for i in (one, other)]
    contradicted = {names[0]: (classes[2], "same cell as b"), names[1]: (classes[0], "same cell as a")}
    plain, rows = issues_of(tmp_path), issues_of(tmp_path, contradicted)
    assert {row["path"] for row in rows[:2]} == set(names) and rows[2:] == plain
    first = next(row for row in rows if row["path"] == names[0])
    values = [first[key] for key in ("label", "suggested", "flagged", "kind")]
    assert values == [classes[0], classes[2], "yes", "same cell as b"]
    assert first["score"] < 0 and first["p_label"] > 0.9
