"""How sure the network is, and what a clinic asks: each number of report.py against a hand count,
scikit-learn or SciPy."""

import types

import numpy as np
import pytest
from scipy import optimize
from sklearn.metrics import precision_recall_curve, roc_curve

import evaluate
import report


def balanced_network(n, frequencies, seed=0, spread=1.0):
    """Gaussian classes on a line, and the posterior of a network that was shown them equally often: (labels,
    probabilities, densities)."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(len(frequencies), n, p=frequencies)
    x = labels * 1.5 + rng.normal(0, spread, n)
    density = np.exp(-0.5 * ((x[:, None] - 1.5 * np.arange(len(frequencies))) / spread) ** 2)
    return labels, density / density.sum(1, keepdims=True), density


def test_ece_is_the_mean_gap_between_confidence_and_share_right():
    """Six images in three of 15 bins: 1/6 |0.5-0.42| + 2/6 |0.5-0.62| + 3/6 |2/3-0.95| by hand."""
    confidence = np.array([0.42, 0.61, 0.63, 0.94, 0.95, 0.96])
    right = np.array([False, True, False, True, True, False])
    bins = report.reliability(confidence, right)
    images = bins.images
    assert len(images) == 15 and images.sum() == 6
    assert [(i, n) for i, n in enumerate(images) if n] == [(6, 1), (9, 2), (14, 3)]
    by_hand = 1 / 6 * 0.42 + 2 / 6 * abs(0.5 - 0.62) + 3 / 6 * abs(2 / 3 - 0.95)
    assert bins.ece[0] == pytest.approx(by_hand, abs=1e-12)


def test_bins_are_of_equal_width_and_closed_above():
    """0 belongs to the first bin, 1 to the last, 3/15 to the third: the limits of Guo et al. (2017)."""
    bins = report.reliability(np.array([0.0, 1.0, 0.2, 0.2001]), np.ones(4, bool), bins=5)
    assert bins.images.tolist() == [2, 1, 0, 0, 1]


def test_a_calibrated_network_has_almost_no_ece():
    """Labels drawn from the probabilities themselves: ECE falls as 1/sqrt(N); of an overconfident one it
    stays."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5) * 0.5, 40000)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    sharp = report.posterior(p, temperature=0.5)
    errors = [report.reliability(q.max(1), q.argmax(1) == labels).ece[0] for q in (p, sharp)]
    assert errors[0] < 0.01 < 0.05 < errors[1]


@pytest.mark.parametrize("known", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_found(known):
    """Calibrated logits divided by 1/T: the temperature that undoes it is T."""
    rng = np.random.default_rng(1)
    p = rng.dirichlet(np.ones(4), 30000)
    labels = (p.cumsum(1) > rng.random((len(p), 1))).argmax(1)
    found = report.fit_temperature(report.posterior(p, temperature=1 / known), labels)
    assert found == pytest.approx(known, rel=0.03)


@pytest.mark.parametrize("corrected", [False, True])
def test_the_temperature_is_the_optimum_of_the_likelihood(corrected):
    """Against a second optimiser, of a loss written down anew."""
    frequencies = np.array([0.6, 0.3, 0.1])
    labels, p, _ = balanced_network(2000, frequencies)
    sharp = p**3 / (p**3).sum(1, keepdims=True)

    def loss(parameter):
        weights = sharp ** (1 / parameter[0]) * (frequencies if corrected else 1)
        return -np.log(weights[np.arange(len(labels)), labels] / weights.sum(1)).mean()

    best = optimize.minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x[0]
    found = report.fit_temperature(sharp, labels, frequencies if corrected else None)
    assert found == pytest.approx(best, rel=1e-3)
    assert not corrected or best == pytest.approx(3, rel=0.15)


def test_temperature_keeps_the_most_probable_class_and_bears_zeros():
    p = np.array([[1.0, 0.0, 0.0], [0.2, 0.5, 0.3]])
    hot = report.posterior(p, temperature=4)
    assert np.isfinite(hot).all() and np.allclose(hot.sum(1), 1)
    assert hot.argmax(1).tolist() == [0, 1] and hot[0, 0] < 1
    assert np.isfinite(report.fit_temperature(p, np.array([2, 1])))


def test_prior_correction_is_bayes():
    """Two classes shown equally often, 0.8 to 0.2, of which the first makes 10% of the images: 0.08 to 0.18,
    so 4/13."""
    assert report.posterior(np.array([[0.8, 0.2]]), np.array([10, 90]))[0] == pytest.approx([4 / 13, 9 / 13])
    assert report.posterior(np.array([[0.8, 0.2]]), np.array([7, 7]))[0] == pytest.approx([0.8, 0.2])


def test_prior_correction_gives_the_posterior_at_natural_frequencies():
    """Against the densities themselves; it is right more often and better calibrated than as trained."""
    frequencies = np.array([0.7, 0.2, 0.08, 0.02])
    labels, p, density = balanced_network(20000, frequencies)
    corrected = report.posterior(p, frequencies * 1234)
    expected = density * frequencies
    assert corrected == pytest.approx(expected / expected.sum(1, keepdims=True))
    assert (corrected.argmax(1) == labels).mean() > (p.argmax(1) == labels).mean() + 0.05
    ece = [report.reliability(q.max(1), q.argmax(1) == labels).ece[0] for q in (p, corrected)]
    assert ece[1] < 0.015 < ece[0]


def test_frequencies_do_not_come_from_the_test_part():
    """Ten images, of which the fold tests three: what remains is 5 and 2."""
    fold = types.SimpleNamespace(confusion=np.array([[1, 0], [1, 1]]))
    study = evaluate.Study(["a", "b"], np.array([6, 4]), {("m", "i"): {0: fold}}, [], [])
    assert report.frequencies(study, ("m", "i"), 0).tolist() == [5, 2]


def coverage_by_hand():
    """Two classes; on validation the confidences are 0.6 to 0.9, on test three of four images are surer than
    0.75."""
    val = np.array([[0.6, 0.4], [0.7, 0.3], [0.2, 0.8], [0.1, 0.9]])
    test = np.array([[0.9, 0.1], [0.2, 0.8], [0.55, 0.45], [0.85, 0.15]])
    test, val = dict.fromkeys(report.PLAIN, test), dict.fromkeys(report.PLAIN, val)
    return report.Fold(np.array([0, 1, 1, 1]), test, np.array([0, 0, 1, 1]), val, {})


def test_risk_and_coverage_by_hand():
    """Half of the validation images lie below 0.8; of the three test images kept two are right, recalls are
    1/1 and 1/2."""
    rows = {(row["variant"], row["planned"]): row for row in report.coverage_rows([coverage_by_hand()], 2)}
    all_kept, half = rows["as trained", 0], rows["as trained", 0.5]
    assert (all_kept["handed_over"], all_kept["accuracy"]) == (0, 0.5)
    assert half["handed_over"] == 0.25 and half["accuracy"] == pytest.approx(2 / 3)
    assert half["macro_recall"] == pytest.approx((1 + 1 / 2) / 2) and half["classes_left"] == 2


def test_sensitivity_at_a_specificity_by_hand():
    """Ten other cells: at 90% specificity one of them may raise an alarm; a cell as high as the second would
    bring that one too."""
    others = np.arange(10) / 10
    scores, positive = np.r_[others, 0.95, 0.85, 0.8, 0.3], np.r_[np.zeros(10, bool), np.ones(4, bool)]
    assert report.sensitivity_at(scores, positive, 0.9) == (0.5, 0.8)
    assert report.sensitivity_at(scores, positive, 0.99) == (0.25, 0.9)


def test_sensitivity_agrees_with_the_roc_curve():
    """The highest point of scikit-learn's ROC curve left of 1 - specificity."""
    rng = np.random.default_rng(3)
    positive = rng.random(5000) < 0.02
    scores = np.round(rng.normal(positive * 2.0, 1), 2)
    for specificity in report.SPECIFICITIES:
        false, true, _ = roc_curve(positive, scores, drop_intermediate=False)
        expected = pytest.approx(true[false <= 1 - specificity + 1e-12].max())
        assert report.sensitivity_at(scores, positive, specificity)[0] == expected


def test_pr_auc_is_the_step_sum_under_the_curve():
    """Average precision: sum of (R_n - R_n-1) P_n over scikit-learn's curve, of faggot cells among blasts."""
    rng = np.random.default_rng(4)
    labels = (rng.random(400) < 0.1).astype(int)
    p = np.column_stack([1 - (s := rng.beta(1 + 2 * labels, 3)), s])
    fold = report.Fold(labels, dict.fromkeys(report.PLAIN, p), None, None, {})
    row = next(row for row in report.clinic_rows([fold], ["OTH", "FGC"]) if row["variant"] == "as trained")
    precision, recall, _ = precision_recall_curve(labels, s)
    assert row["pr_auc_mean"] == pytest.approx(-np.sum(np.diff(recall) * precision[:-1]))
    assert row["images"] == labels.sum() and row["class"] == "FGC" and "val_sensitivity_0.99_mean" not in row


def test_scores_of_all_classes_agree_with_scikit_learn():
    """Macro, weighted, balanced and top-2 of one fold of eight classes."""
    from sklearn import metrics

    rng = np.random.default_rng(5)
    labels = np.concatenate([rng.integers(0, 8, 400), np.arange(8)])
    p = report.posterior(rng.dirichlet(np.ones(8), len(labels)) + 0.3 * np.eye(8)[labels])
    fold = report.Fold(labels, dict.fromkeys(report.PLAIN, p), None, None, {})
    table, guess = report.score_rows([fold], np.bincount(labels)), p.argmax(1)
    rows = {row["score"]: row["mean"] for row in table if row["variant"] == "as trained"}
    recalls = {"macro": "macro recall (balanced accuracy)", "weighted": "accuracy (weighted recall)"}
    for average, recall in recalls.items():
        theirs = metrics.precision_recall_fscore_support(labels, guess, average=average)[:3]
        names = f"{average} precision", recall, f"{average} F1"
        assert [rows[name] for name in names] == pytest.approx(theirs)
    assert rows[recalls["macro"]] == pytest.approx(metrics.balanced_accuracy_score(labels, guess))
    assert rows["accuracy (weighted recall)"] == pytest.approx(metrics.accuracy_score(labels, guess))
    assert rows["top-2 accuracy"] == pytest.approx(metrics.top_k_accuracy_score(labels, p, k=2))
