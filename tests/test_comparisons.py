"""Tests between strategies: comparisons.csv, the marks of Table 4, and how often a difference is claimed that
is none.

Truth comes from fractions worked out by hand and the t distribution's closed form for 4 degrees of
freedom, from the numbers that scikit-learn's documentation prints ('Statistical comparison of models using
grid search'), from SciPy's binomtest, from the definition of Holm's procedure, from scikit-learn's scores
of the same files, and from simulation.
"""

import itertools
import json
import math
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import make_moons
from sklearn.metrics import f1_score, recall_score
from sklearn.model_selection import RepeatedStratifiedKFold, cross_val_score
from sklearn.svm import SVC
from test_metrics import cells_of, command, read_csv, simulate, write_predictions

import evaluate

RATIO = Fraction(20, 64)  # of the paper's split: 20% tested, 64% trained on


# ---------------------------------------------------------------- corrected resampled t-test
def two_sided(t):
    """P(|T| > t) for 4 degrees of freedom, in closed form."""
    s = 1 + t * t / 4
    return 1 - 3 / 4 * t / math.sqrt(s) * (1 - t * t / s / 12)


def test_the_corrected_t_test_by_hand():
    """Differences 2, 4, 4, 6, 9 hundredths: mean 5, squares 9 + 1 + 1 + 1 + 16 = 28, so s² = 7; variance 7
    (1/5 + 5/16), t² 2000/287. 2.776445: the tables' t for 97.5% and 4."""
    differences, error = [0.02, 0.04, 0.04, 0.06, 0.09], math.sqrt(7e-4 * (1 / 5 + 5 / 16))
    mean, low, high, p = evaluate.corrected_t_test(differences, float(RATIO))
    assert mean == pytest.approx(0.05)
    assert p == pytest.approx(two_sided(math.sqrt(2000 / 287))) and round(float(p), 3) == 0.058
    assert (low, high) == pytest.approx((0.05 - 2.776445 * error, 0.05 + 2.776445 * error))
    plain = evaluate.corrected_t_test(differences, 0)[3]
    assert plain == pytest.approx(two_sided(0.05 / math.sqrt(7e-4 / 5))) and round(float(plain), 3) == 0.013


def test_scikit_learns_published_comparison():
    """Its page prints, for 10 times 10-fold cross-validation on 100 points, t and a one-sided p; uncorrected
    2.611 and 0.005."""
    x, y = make_moons(noise=0.352, random_state=1, n_samples=100)
    folds = RepeatedStratifiedKFold(n_splits=10, n_repeats=10, random_state=0)
    rbf, linear = (
        cross_val_score(SVC(kernel=kernel), x, y, scoring="roc_auc", cv=folds) for kernel in ("rbf", "linear")
    )
    for ratio, published in ((10 / 90, (0.750, 0.227)), (0, (2.611, 0.005))):
        p = evaluate.corrected_t_test(rbf - linear, ratio)[3]
        assert (round(stats.t.isf(p / 2, 99), 3), round(float(p) / 2, 3)) == published


@pytest.mark.parametrize("differences", [[0.1], [0.1, 0.1, 0.1, 0.1, 0.1], [0, 0]])
def test_without_spread_there_is_no_test(differences):
    """One fold, or the same difference in all."""
    mean, *others = evaluate.corrected_t_test(differences, 0.3)
    assert mean == pytest.approx(np.mean(differences)) and np.isnan(others).all()


# ---------------------------------------------------------------- false alarms
def false_alarms(correlations, repetitions=20000, k=5, ratio=float(RATIO), seed=0):
    """[(correlation between folds, share of p < 0.05 by the corrected test, by the plain t-test)] where there
    is no difference.

    Normal differences of k folds, any two of them correlated alike, as folds that share training images
    are.
    """
    rng, rows = np.random.default_rng(seed), []
    for correlation in correlations:
        shared, own = rng.normal(size=(repetitions, 1)), rng.normal(size=(repetitions, k))
        differences = math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own
        corrected = evaluate.corrected_t_test(differences, ratio)[3]
        plain = stats.ttest_1samp(differences, 0, axis=1).pvalue
        rows.append((correlation, float((corrected < 0.05).mean()), float((plain < 0.05).mean())))
    return rows


def expected_alarms(correlation, factor, k=5):
    """The exact share: t is then Student's, times the root of (1/k + (k-1)/k rho) / ((1 - rho) factor)."""
    inflation = math.sqrt((1 + (k - 1) * correlation) / k / (1 - correlation) / factor)
    return 2 * stats.t.sf(stats.t.ppf(0.975, k - 1) / inflation, k - 1)


def test_false_alarms_at_most_5_percent_up_to_a_correlation_of_a_fifth():
    """A fold's training part is 64% of the images, so two share much of theirs; no correlation is known, 0.2
    is a usual guess."""
    print("correlation, corrected, plain t-test")
    for correlation, corrected, plain in false_alarms((0, 0.1, 0.2, 0.3)):
        print(f"{correlation:.1f} {corrected:.4f} {plain:.4f}")
        margin = 4 * math.sqrt(0.05 * 0.95 / 20000)
        assert corrected <= 0.05 + margin or correlation > 0.2
        assert (plain > 0.05 + margin) == (correlation > 0)  # it keeps its level for independent folds alone
        for share, factor in ((corrected, 1 / 5 + float(RATIO)), (plain, 1 / 5)):
            exact = expected_alarms(correlation, factor)
            assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / 20000)


def test_false_alarms_are_5_percent_at_the_correlation_that_nadeau_and_bengio_assume():
    """Test images / (test images + images fitted on), of which the corrected variance is free of bias:
    neither more nor fewer."""
    ((_, corrected, _),) = false_alarms([float(RATIO / (1 + RATIO))], repetitions=100000)
    assert abs(corrected - 0.05) < 4 * math.sqrt(0.05 * 0.95 / 100000)


# ---------------------------------------------------------------- Holm, Wilson
@pytest.mark.parametrize(
    "p, adjusted",
    [
        ([0.01, 0.04, 0.03, 0.005], [0.03, 0.06, 0.06, 0.02]),  # .02 .03 .06 .04 ascending: no falling back
        ([0.5, 0.6], [1, 1]),
        ([], []),
        ([0.03, 0.03, 0.03], [0.09, 0.09, 0.09]),
        ([0.02, np.nan, 0.04], [0.04, np.nan, 0.04]),
    ],
)
def test_holm_by_hand(p, adjusted):
    """A comparison that can't be tested doesn't count."""
    assert evaluate.holm(p) == pytest.approx(adjusted, nan_ok=True)


def rejected_by_holm(p, level):
    """The procedure as it is defined: from the smallest p on, until one is above level / (number that
    remain)."""
    rejected = [False] * len(p)
    for step, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        if p[i] > level / (len(p) - step):
            break
        rejected[i] = True
    return rejected


def test_adjusted_p_values_reject_what_holms_procedure_rejects():
    rng = np.random.default_rng(0)
    for _ in range(300):
        p = (rng.random(rng.integers(1, 25)) ** rng.integers(1, 5)).tolist()
        for level in (0.01, 0.05, 0.2):
            assert (evaluate.holm(p) <= level).tolist() == rejected_by_holm(p, level)


def test_wilsons_interval():
    for total in (1, 2, 8, 47, 29424):
        for correct in {0, 1, total // 3, total - 1, total}:
            theirs = stats.binomtest(correct, total).proportion_ci(0.95, method="wilson")
            assert evaluate.wilson(correct, total) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert np.isnan(evaluate.wilson(0, 0)).all()


# ---------------------------------------------------------------- comparisons.csv
COUNTS = {"NGB": 60, "LYT": 45, "BLA": 80, "FGC": 12}
RESNET, VIT = (
    {"random": 0.5, "imagenet": 0.75, "cd": 0.7},
    {"random": 0.3, "imagenet": 0.85, "imagenet+cd": 0.88},
)
NETWORKS = {("resnet152", init): right for init, right in RESNET.items()}
NETWORKS |= {("vit_l_32", init): right for init, right in VIT.items()} | {("alexnet", "cd"): 0.6}
BEST = ("vit_l_32", "imagenet+cd")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(runs, answers, comparisons, Markdown of Table 4); vit_l_32 random has folds 1, 3 and 4 only, else it
    were the best."""
    runs = tmp_path_factory.mktemp("study") / "runs"
    answers = simulate(runs, COUNTS, NETWORKS)
    for fold in (0, 2):
        shutil.rmtree(runs / f"train/vit_l_32/random/fold{fold}")
        del answers[("vit_l_32", "random"), fold]
    for fold in (1, 3, 4):  # all right but for as many images as the fold's number
        rows = read_csv(runs / f"train/vit_l_32/random/fold{fold}/predictions.csv")
        labels = [row["label"] for row in rows]
        predictions = ["BLA"] * fold + labels[fold:]
        rows = zip([row["path"] for row in rows], labels, predictions)
        write_predictions(runs, ("vit_l_32", "random"), fold, rows, list(COUNTS))
        answers[("vit_l_32", "random"), fold] = labels, predictions
    assert command("--runs", runs)[0] == 0
    return runs, answers, read_csv(runs / "results/comparisons.csv"), (runs / "results/table4.md").read_text()


def pair(row):
    """The two runs that a row compares."""
    return (row["model"], row["init"]), (row["against_model"], row["against_init"])


def macro_f1(answers, run):
    """{fold: macro F1 by scikit-learn}; each fold tests all four classes."""
    return {
        k: f1_score(*answers[run, k], average="macro", zero_division=0)
        for k in range(5)
        if (run, k) in answers
    }


def differences(answers, one, other):
    """Differences of macro F1 in the folds that both have, and the images tested there."""
    scores, others = macro_f1(answers, one), macro_f1(answers, other)
    folds = sorted(set(scores) & set(others))
    return np.array([scores[k] - others[k] for k in folds]), sum(len(answers[one, k][0]) for k in folds)


def test_the_best_is_sought_among_the_rows_with_the_most_folds(study):
    """By scikit-learn, vit_l_32 random scores highest of all on its three folds."""
    _, answers, comparisons, _ = study
    scores = {run: np.mean(list(macro_f1(answers, run).values())) for run in NETWORKS}
    assert sorted(scores, key=scores.get)[-2:] == [BEST, ("vit_l_32", "random")]
    assert {pair(row)[1] for row in comparisons if row["family"] == "best"} == {BEST}


def test_two_families_every_run_with_the_best_and_every_init_with_imagenet_of_its_model(study):
    best = [("best", run, BEST) for run in NETWORKS if run != BEST]
    others = [run for run in NETWORKS if run[1] != "imagenet" and run[0] != "alexnet"]
    imagenet = [("imagenet", run, (run[0], "imagenet")) for run in others]
    assert sorted((row["family"], *pair(row)) for row in study[2]) == sorted(best + imagenet)


def test_macro_f1_is_compared_by_the_corrected_t_test_over_the_folds_of_both(study):
    """Against scikit-learn's macro F1 and SciPy's t; of 197 images a fold tests a fifth, the other four are
    trained on."""
    _, answers, comparisons, _ = study
    for row in comparisons:
        each, images = differences(answers, *pair(row))
        k = len(each)
        assert int(row["folds"]) == k == (3 if ("vit_l_32", "random") in pair(row) else 5)
        train = 197 - images / k  # on average over the folds compared
        error = math.sqrt(each.var(ddof=1) * (1 / k + images / k / train))
        assert float(row["difference"]) == pytest.approx(each.mean(), rel=1e-4, abs=1e-6)
        assert float(row["p"]) == pytest.approx(2 * stats.t.sf(abs(each.mean()) / error, k - 1), rel=1e-4)
        half = stats.t.ppf(0.975, k - 1) * error
        ends = pytest.approx((each.mean() - half, each.mean() + half), rel=1e-3, abs=1e-5)
        assert (float(row["low"]), float(row["high"])) == ends


def test_holm_is_taken_over_the_pairs_of_each_family(study):
    """By the definition, at the levels that each p_holm itself sets: just above it is rejected, just below it
    isn't."""
    for family, size in (("best", 6), ("imagenet", 4)):
        rows = [row for row in study[2] if row["family"] == family]
        p, adjusted = ([float(row[key]) for row in rows] for key in ("p", "p_holm"))
        assert len(p) == size
        for i, level in enumerate(adjusted):
            assert rejected_by_holm(p, level * 1.0001)[i] or level == 1
            assert not rejected_by_holm(p, level * 0.9999)[i]


def test_table_5_gives_an_interval_of_the_recall_over_networks_and_images(study):
    """By scikit-learn's recall of each fold and SciPy's t; one of images alone is too narrow, since the
    folds' networks differ."""
    runs, answers, _, _ = study
    for run in NETWORKS:
        folds = [answers[run, k] for k in range(5) if (run, k) in answers]
        ratio = sum(len(labels) for labels, _ in folds) / sum(197 - len(labels) for labels, _ in folds)
        for row in read_csv(runs / f"results/table5_{'_'.join(run)}.csv"):
            each = np.array([recall_score(*fold, labels=[row["class"]], average="macro") for fold in folds])
            half = stats.t.ppf(0.975, len(each) - 1) * each.std(ddof=1) * math.sqrt(1 / len(each) + ratio)
            expected = np.clip([each.mean() - half, each.mean() + half], 0, 1)
            expected = pytest.approx(expected if half else [np.nan] * 2, rel=1e-4, abs=1e-6, nan_ok=True)
            assert [float(row[key] or "nan") for key in ("recall_low", "recall_high")] == expected


def test_a_class_that_some_folds_lack_leaves_table_4_and_the_test_agreed(tmp_path):
    """Class c has images in folds 0 and 2 of three; the difference tested is that of the F1 in Table 4, to
    its six digits."""
    rng = np.random.default_rng(0)
    for fold in range(3):
        labels = ["a"] * 20 + ["b"] * 20 + ["c"] * (fold != 1)
        for init, right in (("x", {"a": 0.6, "b": 0.6, "c": 1}), ("y", {"a": 0.9, "b": 0.9, "c": 0})):
            rows = []
            for i, label in enumerate(labels):
                guess = label if rng.random() < right[label] else rng.choice(list("ab"))
                rows.append((f"{fold}-{i}", label, guess))
            write_predictions(tmp_path, ("m", init), fold, rows, "abc")
    assert command("--runs", tmp_path)[0] == 0
    f1 = {row["init"]: float(row["f1_mean"]) for row in read_csv(tmp_path / "results/table4.csv")}
    (row,) = read_csv(tmp_path / "results/comparisons.csv")
    assert row["init"] == min(f1, key=f1.get)
    assert float(row["difference"]) == pytest.approx(f1[row["init"]] - f1[row["against_init"]], abs=3e-6)


def test_rows_of_different_splits_are_named(tmp_path):
    """config.json of train.py holds a digest of each fold's split; folds differ, rows must not."""
    accuracies = [(15, 10), (14, 12), (17, 11)]
    said = {}
    for name in ("same", "other"):
        runs = tmp_path / name
        two_networks(runs, accuracies)
        for fold, init in itertools.product(range(3), "ab"):
            split = f"{fold}{init if name == 'other' else ''}"
            (runs / f"train/m/{init}/fold{fold}/config.json").write_text(json.dumps({"split": split}))
        said[name] = command("--runs", runs)[1]
    assert "different settings, so tests may not hold: split of fold 0, split of fold 1," in said["other"]
    assert "different settings" not in said["same"]


def test_the_marks_of_table_4(study):
    """* the best, = not significantly different from it (p_holm >= 0.05), nothing if it is (and worse, as all
    here)."""
    signs = {BEST: "*"}
    for row in study[2][:6]:
        signs[pair(row)[0]] = "=" if float(row["p_holm"]) >= 0.05 else ""
    rows = read_csv(study[0] / "results/table4.csv")
    marks = {(row["model"], row["init"]): cells[-1] for row, cells in zip(rows, cells_of(study[3])[2:])}
    assert marks == signs and set(marks.values()) == {"*", "=", ""}, "all kinds are in the study"


def test_the_sentences_below_table_4(study):
    """Who differs from ImageNet of the same model, in numbers of comparisons.csv."""
    assert "Holm over 6 rows" in study[3]
    line = study[3].split("- Significantly different from ImageNet")[1].split("\n")[0]
    rows = [row for row in study[2] if row["family"] == "imagenet" and float(row["p_holm"]) < 0.05]
    assert 0 < len(rows) < 4 and "Holm over 4" in line
    assert re.findall(r"[+-]0\.\d+", line) == [f"{float(row['difference']):+.3f}" for row in rows]


def test_tta_is_tested_against_the_same_networks_without_it(tmp_path):
    """By scikit-learn's macro F1 and SciPy's t; ECE of probabilities of 0.9 by hand, |0.9 - accuracy|."""
    runs, names = tmp_path / "runs", {("vit_l_32", "cd"): 0.6, ("resnet152", "cd"): 0.5}
    plain = simulate(runs, COUNTS, names)
    simulate(tmp_path / "tta", COUNTS, dict.fromkeys(names, 0.9), seed=1)
    shutil.rmtree(tmp_path / "tta/train/resnet152")
    for fold in range(4):  # of five
        file = f"train/vit_l_32/cd/fold{fold}/predictions"
        shutil.copy(tmp_path / "tta" / f"{file}.csv", runs / f"{file}_tta.csv")
    assert command("--runs", runs)[0] == 0
    before = (runs / "results/table4.csv").read_bytes()
    status, out, err = command("--runs", runs, "--tta")
    assert (status, err) == (0, "") and (runs / "results/table4.csv").read_bytes() == before
    (row,) = read_csv(runs / "results/tta/comparisons.csv")
    each, ece = [], []
    for fold in range(4):
        rows = read_csv(runs / f"train/vit_l_32/cd/fold{fold}/predictions_tta.csv")
        both = [r["label"] for r in rows], [r["prediction"] for r in rows]
        answers = plain[("vit_l_32", "cd"), fold], both
        f1 = [f1_score(*answer, average="macro", zero_division=0) for answer in answers]
        each.append(f1[1] - f1[0])
        ece.append([abs(0.9 - np.mean(np.array(labels) == guesses)) for labels, guesses in answers])
    error = np.std(each, ddof=1) * math.sqrt(1 / 4 + 1 / 4)  # a fold tests a fifth, the rest is training
    assert (row["family"], pair(row)) == ("plain", (("vit_l_32", "cd"),) * 2) and row["folds"] == "4"
    assert float(row["difference"]) == pytest.approx(np.mean(each), rel=1e-4)
    assert float(row["p"]) == pytest.approx(2 * stats.t.sf(np.mean(each) / error, 3), rel=0.02)
    without, with_tta = np.mean(ece, 0)
    assert f"macro F1 {np.mean(each):+.3f} (" in out
    assert f"ECE (calibration) {without:.3f} without and {with_tta:.3f} with." in out


def two_networks(folder, accuracies, images=20):
    """Runs m a and m b of two classes in as many folds as there are pairs of images right of class a; class b
    is always right."""
    for fold, pair_of in enumerate(accuracies):
        for init, right in zip(("a", "b"), pair_of):
            guesses = "a" * right + "b" * (2 * images - right)
            rows = zip([f"{fold}-{i}" for i in range(2 * images)], "a" * images + "b" * images, guesses)
            write_predictions(folder, ("m", init), fold, rows, "ab")
    status, _, err = command("--runs", folder)
    assert (status, err) == (0, "")
    return read_csv(folder / "results/comparisons.csv"), (folder / "results/table4.md").read_text()


def test_a_better_row_of_fewer_folds_is_marked_so(tmp_path):
    """b is far better in the three folds that it has; a has five."""
    two_networks(tmp_path, [(3, 18), (4, 19), (3, 18), (5, 18), (4, 18)])
    for fold in (3, 4):
        shutil.rmtree(tmp_path / f"train/m/b/fold{fold}")
    out = command("--runs", tmp_path)[1]
    assert {cells[1]: cells[-1] for cells in cells_of(out)[2:]} == {"a": "*", "b": ">"}


@pytest.mark.parametrize("accuracies", [[(15, 10)] * 5, [(15, 10)], [(15, 15)] * 3])
def test_zero_variance_gives_an_empty_p(tmp_path, accuracies):
    """The same difference in every fold, or a single fold: no p, no interval, a question mark in Table 4."""
    rows, markdown = two_networks(tmp_path, accuracies)
    (macro,) = rows
    assert [macro[key] for key in ("low", "high", "p", "p_holm")] == [""] * 4
    assert (float(macro["difference"]) < 0) == (accuracies[0] == (15, 10))
    assert sorted(cells[-1] for cells in cells_of(markdown)[2:]) == ["*", "?"]
    assert "nan" not in markdown and "nan" not in (tmp_path / "results/comparisons.csv").read_text()


def test_without_a_split_the_ratio_of_test_to_training_images_is_the_papers(tmp_path):
    accuracies = [(15, 10), (14, 12), (17, 11), (13, 9), (16, 15)]
    rows, _ = two_networks(tmp_path, accuracies)
    (macro,) = rows
    f1 = [[macro_f1_by_hand(right) for right in pair_of] for pair_of in accuracies]
    each = np.diff(f1, axis=1)[:, 0]
    error = math.sqrt(each.var(ddof=1) * (1 / 5 + 0.20 / 0.64))
    assert pair(macro) == (("m", "b"), ("m", "a"))
    assert float(macro["p"]) == pytest.approx(2 * stats.t.sf(abs(each.mean()) / error, 4), rel=1e-4)


def macro_f1_by_hand(right, images=20):
    """Macro F1 by hand where `right` of a's images are right, the others taken for b, and b's all right."""
    return (2 * right / (right + images) + 2 * images / (3 * images - right)) / 2


def test_runs_without_a_common_fold_are_not_compared(tmp_path):
    rows = [("1", "a", "a"), ("2", "b", "a")]
    write_predictions(tmp_path, ("m", "x"), 0, rows, "ab")
    write_predictions(tmp_path, ("m", "imagenet"), 1, [("3", "a", "a"), ("4", "b", "b")], "ab")
    status, out, err = command("--runs", tmp_path)
    assert (status, err) == (0, "") and not (tmp_path / "results/comparisons.csv").exists()
    assert sorted(cells[-1] for cells in cells_of(out)[2:]) == ["*", "?"]
