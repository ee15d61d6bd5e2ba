"""Fig. 4: the confusion matrix is a mean of folds whose rows add up to 1, and its picture can be read.

Truth comes from scikit-learn's confusion_matrix(normalize="true"), from counts by hand, from Pillow, which
opens the picture, from matplotlib's own boxes around each text, and from the contrast that WCAG 2.1 asks
of text.
"""

import io
import itertools
import random
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import confusion_matrix
from test_metrics import command, read_csv, simulate, write_predictions

import evaluate
import gradcam

BM = {row["class"]: int(row["images"]) for row in read_csv(ROOT / "paper/table5.csv")}
CD = "actinomyces agc asch ascus candida flora herps hsil lsil scc trichomonas".split()
TITLE = "Regnet_y_32gf, ImageNet + CD (mean of 5 folds)"


# ---------------------------------------------------------------- numbers
def confusion_of(file):
    """(classes of the header, classes of the rows, float64 [C,C]); NaN for empty cells."""
    header, *rows = [line.split(",") for line in file.read_text().splitlines()]
    assert header[0] == "class"
    matrix = pd.DataFrame(rows).set_index(0).replace("", "nan").astype(float)
    return header[1:], list(matrix.index), matrix.to_numpy()


def test_the_mean_of_folds_by_hand(tmp_path):
    """Of a's images fold 0 has the only one right, fold 1 one of three: 2/3 by the mean of folds, 1/2 if they
    were pooled."""
    write_predictions(tmp_path, ("m", "i"), 0, [("1", "a", "a"), ("2", "b", "a"), ("3", "b", "b")], "ab")
    rows = [("4", "a", "a"), ("5", "a", "b"), ("6", "a", "b"), ("7", "b", "b")]
    write_predictions(tmp_path, ("m", "i"), 1, rows, "ab")
    assert command("--runs", tmp_path)[0] == 0
    header, rows, matrix = confusion_of(tmp_path / "results/confusion_m_i.csv")
    assert header == rows == ["a", "b"]  # rows are the true classes
    assert matrix == pytest.approx(np.array([[2 / 3, 1 / 3], [1 / 4, 3 / 4]]), rel=1e-5)


def test_a_class_is_averaged_over_the_folds_that_hold_it(tmp_path):
    """b is tested in fold 0 alone; c, only ever predicted, has an empty row."""
    write_predictions(tmp_path, ("m", "i"), 0, [("1", "a", "a"), ("2", "b", "a"), ("3", "b", "b")], "abc")
    write_predictions(tmp_path, ("m", "i"), 1, [("4", "a", "c")], "abc")
    assert command("--runs", tmp_path)[0] == 0
    matrix = confusion_of(tmp_path / "results/confusion_m_i.csv")[2]
    assert matrix == pytest.approx(np.array([[0.5, 0, 0.5], [0.5, 0.5, 0], [np.nan] * 3]), nan_ok=True)


def test_the_matrix_agrees_with_scikit_learn_in_the_papers_order(tmp_path):
    """All 21 classes, given in another order; the rarest with 8 images, so that every fold tests each."""
    names = random.Random(1).sample(list(BM), 21)
    counts = {name: 8 + i for i, name in enumerate(names)}
    answers = simulate(tmp_path, counts, {("vit_l_32", "cd"): 0.6}, folds=4)
    assert command("--runs", tmp_path, pictures=True)[0] == 0
    header, rows, matrix = confusion_of(tmp_path / "results/confusion_vit_l_32_cd.csv")
    assert header == rows == list(BM)
    assert np.abs(matrix.sum(1) - 1).max() < 1e-4 < np.abs(matrix.sum(0) - 1).max()
    options = {"labels": list(BM), "normalize": "true"}
    theirs = np.mean([confusion_matrix(*answer, **options) for answer in answers.values()], axis=0)
    assert np.abs(matrix - theirs).max() < 1e-6
    recall = [float(row["recall_mean"]) for row in read_csv(tmp_path / "results/table5_vit_l_32_cd.csv")]
    assert np.diag(matrix) == pytest.approx(recall, rel=1e-4), "its diagonal is Table 5's recall"
    with Image.open(tmp_path / "results/confusion_vit_l_32_cd.png") as picture:
        assert picture.format == "PNG" and picture.width > 1200
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 50


# ---------------------------------------------------------------- the picture
def plausible(recalls, seed=0):
    """float64 [C,C] with these recalls; what is missed goes to a few other classes."""
    matrix = np.random.default_rng(seed).dirichlet(np.full(len(recalls), 0.2), len(recalls))
    np.fill_diagonal(matrix, 0)
    matrix *= (1 - np.array(recalls))[:, None] / np.maximum(matrix.sum(1, keepdims=True), 1e-12)
    np.fill_diagonal(matrix, recalls)
    return matrix


def draw(matrix, images, classes, title=TITLE):
    """(figure, matrix' axes, counts' axes, PNG bytes) of evaluate.draw_confusion."""
    figure = Figure()
    with mock.patch.object(evaluate, "Figure", lambda figsize: figure.set_size_inches(figsize) or figure):
        png = evaluate.draw_confusion(matrix, np.array(images), classes, title)
    FigureCanvasAgg(figure).draw()
    return figure, *figure.axes, png


@pytest.fixture(scope="module")
def fig4():
    """Fig. 4 at the paper's recalls and numbers of images: (matrix, figure, matrix' axes, counts' axes, PNG
    bytes)."""
    matrix = plausible([float(row["recall_mean"]) for row in read_csv(ROOT / "paper/table5.csv")])
    return matrix, *draw(matrix, list(BM.values()), list(BM))


def drawn_texts(figure):
    """[(text, its box in pixels)] of everything that is written, without the ticks beyond an axis' ends."""
    renderer, texts = figure.canvas.get_renderer(), list(figure.texts)  # the title is among these
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = axis.get_major_ticks() + axis.get_minor_ticks()
            texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
    texts = [text for text in texts if text.get_visible() and text.get_text()]
    return [(text.get_text(), text.get_window_extent(renderer)) for text in texts]


def test_each_number_stands_in_its_cell(fig4):
    """True classes downwards, predicted ones to the right; what rounds to 0.00 is left blank."""
    matrix, _, cells, _, _ = fig4
    written = {tuple(text.get_position()): text.get_text() for text in cells.texts}
    assert written == {(j, i): f"{value:.2f}" for (i, j), value in np.ndenumerate(matrix) if value >= 0.005}
    assert cells.get_xlabel() == "Predicted class" and cells.get_ylabel() == "True class"
    left, right, bottom, top = *cells.get_xlim(), *cells.get_ylim()
    assert left < right and bottom > top, "the first class is above and on the left"
    for labels in (cells.get_xticklabels(), cells.get_yticklabels()):
        assert [label.get_text() for label in labels] == list(BM)
    assert np.array(cells.images[0].get_array()) == pytest.approx(matrix)


def test_the_numbers_of_images_stand_beside_the_rows_on_a_log_scale(fig4):
    _, _, cells, bars, _ = fig4
    assert (bars.get_xscale(), bars.get_yscale(), bars.get_ylim()) == ("log", "linear", cells.get_ylim())
    assert [bar.get_width() for bar in bars.patches] == list(BM.values())
    assert [bar.get_y() + bar.get_height() / 2 for bar in bars.patches] == pytest.approx(range(21))
    low, high = bars.get_xlim()
    assert low < 1 and max(BM.values()) < high  # one image has a bar, the largest class is not cut


def test_nothing_overlaps_at_21_classes_and_nothing_is_cut_off(fig4):
    _, figure, _, _, png = fig4
    texts = drawn_texts(figure)
    assert {*BM, "Predicted class", "True class", "Images", TITLE} <= {text for text, _ in texts}
    assert len(texts) > 100
    assert_legible(figure, texts)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.size == tuple(np.floor(figure.get_size_inches() * picture.info["dpi"][0] + 0.01))
        assert picture.width < 2000, "for a page"


def assert_legible(figure, texts):
    """No two texts overlap and none reaches beyond the picture."""
    pairs = itertools.combinations(texts, 2)
    assert [(a, b) for (a, box), (b, other) in pairs if box.overlaps(other)] == []
    ends = {
        text: [box.x0, box.y0, figure.bbox.width - box.x1, figure.bbox.height - box.y1] for text, box in texts
    }
    assert [text for text, distances in ends.items() if min(distances) < 0] == []


def test_numbers_stay_within_their_cells(fig4):
    _, figure, cells, _, _ = fig4
    for text in cells.texts:
        box, (x, y) = text.get_window_extent(figure.canvas.get_renderer()), text.get_position()
        (x0, x1), (y1, y0) = cells.transData.transform([(x - 0.5, y - 0.5), (x + 0.5, y + 0.5)]).T
        assert x0 < box.x0 and box.x1 < x1 and y0 < box.y0 and box.y1 < y1


@pytest.mark.parametrize("classes", [["asch", "hsil"], CD, [f"a long name, number {i}" for i in range(5)]])
def test_data_sets_of_other_sizes_are_legible_too(classes):
    images = np.geomspace(1, 40000, len(classes)).round().astype(int)
    figure, *_ = draw(plausible([0.8] * len(classes)), images, classes)
    assert_legible(figure, drawn_texts(figure))


def luminance(rgb):
    """Relative luminance of a colour (WCAG 2.1)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb[:3]]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_numbers_stand_out_from_their_cells():
    """Contrast of at least 4.5 : 1 (WCAG 2.1, level AA) for every hundredth from 0.01 to 1."""
    matrix = np.arange(1, 101).reshape(10, 10) / 100
    _, cells, _, _ = draw(matrix, [5] * 10, [f"c{i}" for i in range(10)])
    picture = cells.images[0]
    for text in cells.texts:
        j, i = text.get_position()
        ink = {"black": 0.0, "white": 1.0}[text.get_color()]
        ground = luminance(picture.cmap(picture.norm(matrix[i, j])))
        assert (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05) >= 4.5, text.get_text()


def test_names_that_matplotlib_would_read_as_formulas_or_lines_are_written_as_they_are():
    names = ["$x_1$", "new\nline", "50% \\alpha", "bytes\udcff"]
    figure, cells, _, _ = draw(plausible([0.8] * 4), [3, 40, 0, 9], names, title="$a$, random")
    written = [label.get_text() for label in cells.get_yticklabels()]
    assert written == ["$x_1$", "new\\nline", "50% \\\\alpha", "bytes\\udcff"]
    texts = *figure.texts, *cells.get_xticklabels(), *cells.get_yticklabels()
    assert not any(text.get_parse_math() for text in texts)


@pytest.mark.long
def test_300_classes_have_a_picture_of_the_largest_size():
    """Without numbers, and every sixth class named; at 21 classes' scale it would be 130 inches wide."""
    classes = [f"class {i}, a name that goes on and on and on" for i in range(300)]
    figure, cells, bars, png = draw(plausible([0.9] * 300), [5] * 300, classes)
    assert not cells.texts and not bars.texts and figure.get_size_inches().max() < 32
    assert [label.get_text()[:9] for label in cells.get_yticklabels()[:2]] == ["class 0, ", "class 6, "]
    with Image.open(io.BytesIO(png)) as picture:
        assert max(picture.size) < 4200
    assert_legible(figure, drawn_texts(figure))


def test_a_name_that_the_font_cannot_draw_becomes_the_classs_number():
    """DejaVu Sans, which matplotlib brings, has umlauts and Greek, but no Chinese."""
    for drawable in (evaluate.drawable, gradcam.drawable):
        names = ["Prälymphozyt", "淋巴细胞", "μm", "b\udcff"]
        assert drawable(names) == ["Prälymphozyt", "class 2", "μm", "b\\udcff"]


def test_a_class_without_images_has_an_empty_row():
    matrix = np.array([[1, 0], [np.nan, np.nan]])
    _, cells, bars, _ = draw(matrix, [7, 0], ["a", "b"])
    assert [(text.get_position(), text.get_text()) for text in cells.texts] == [((0, 0), "1.00")]
    assert bars.patches[1].get_width() == 0
