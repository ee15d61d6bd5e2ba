"""The page in a real headless Chromium: no console errors, nothing sticks out at 1280 and 390 pixels, all
pictures load, verdicts export.

Drives Debian's chromium over its DevTools pipe, without any library; skipped where there is none (apt-get
install chromium). Run as a script, it leaves a simulated study to look at:    python tests/test_page.py
FOLDER [images] [networks] [pre-trainings]
"""

import csv
import itertools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import warnings

import numpy as np
import pytest
from conftest import read_rows, until
from PIL import Image
from scipy import special

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import evaluate  # noqa: E402
import report  # noqa: E402

COUNTS = """9968 29424 26242 4040 5883 441 3055 6557 11994 11973 7629 42 294 19630 3538 2740 27395 409 8 65
47"""
BM = dict(zip(evaluate.CLASSES, map(int, COUNTS.split())))
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


# ---------------------------------------------------------------- a simulated study
def simulate_images(counts, seed=0, flipped=0.03):
    """Features [N,8] and labels of images of classes with these counts, a share of them mislabelled;
    (features, labels, truth)."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(len(counts)), counts)
    centres = rng.normal(size=(len(counts), 8)) * 1.5
    features = (centres[truth] + rng.normal(size=(len(truth), 8))).astype(np.float32)
    wrong = rng.random(len(truth)) < flipped
    labels = np.where(wrong, (truth + rng.integers(1, len(counts), len(truth))) % len(counts), truth)
    for c in range(len(counts)):  # every class keeps its images
        labels[np.flatnonzero(truth == c)[:4]] = c
    return centres, features, labels, truth


def write_predictions(file, paths, labels, probabilities, classes):
    """A predictions.csv as train.py leaves it."""
    text = "\n".join(map(",".join, np.char.mod("%.7g", probabilities)))
    guesses = probabilities.argmax(1)
    with open(file, "w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["path", "label", "prediction", *(f"p_{name}" for name in classes)])
        for path, label, guess, row in zip(paths, labels, guesses, text.split("\n")):
            out.writerow([path, classes[label], classes[guess], *row.split(",")])


def simulate_run(folder, fold, study, *, quality, seed, epochs=12, val=True):
    """One fold of a run: predictions of a network whose idea of the classes is off by 1 / quality."""
    classes, paths, labels, centres, features, parts = study
    rng = np.random.default_rng([seed, fold])
    folder.mkdir(parents=True)
    believed = centres + rng.normal(size=centres.shape) / quality
    for name, part in (("predictions.csv", "test"), ("val_predictions.csv", "val"))[: 1 + val]:
        here = np.flatnonzero(parts[:, fold] == part)
        p = special.softmax(-0.8 * ((features[here, None] - believed) ** 2).sum(-1), axis=1)
        write_predictions(folder / name, paths[here], labels[here], p, classes)
    write_log(folder / "log.csv", rng, epochs)
    config = {"fold": fold, "epochs": epochs, "test_images": int((parts[:, fold] == "test").sum())}
    (folder / "config.json").write_text(json.dumps(config))


def write_log(file, rng, epochs):
    """A log.csv of this many epochs."""
    with open(file, "w", newline="") as handle:
        out = csv.writer(handle)
        out.writerow("epoch lr train_loss val_loss val_accuracy images_per_second seconds".split())
        for epoch in range(1, epochs + 1):
            loss = 2.5 * np.exp(-epoch / 4) + 0.1
            rate = 0.01 if epoch < 8 else 0.001
            out.writerow([epoch, rate, loss, loss * rng.uniform(1, 1.3), 1 - loss / 3, 100, 12.5])


def write_range_test(folder):
    """lr_range.csv and measured.json with three rates that were tried on."""
    rates = np.geomspace(1e-7, 10, 90)
    losses = 2.5 - 1.2 / (1 + (0.01 / rates) ** 1.5) + (rates / 0.8) ** 4
    rows = [f"{rate:.4g},{loss:.4g}" for rate, loss in zip(rates, losses)]
    (folder / "lr_range.csv").write_text("\n".join(["lr,loss", *rows]) + "\n")
    tried = {"lr": 0.012, "candidates": [[0.004, 0.61], [0.012, 0.64], [0.036, 0.42]]}
    (folder / "measured.json").write_text(json.dumps(tried))


def simulate_study(
    folder,
    *,
    models=("resnet152", "vit_l_32"),
    inits=("random", "imagenet", "imagenet+cd"),
    images=2500,
    folds=5,
    seed=0,
    names=(),
    pictures=40,
    cells=BM,
    val=True,
):
    """Finished runs of `cells` {class: share} and some pictures; file names for the first mislabelled images.
    Returns Path of runs/."""
    counts = np.maximum(np.array(list(cells.values())) * images // sum(cells.values()), 8)
    classes = list(cells)
    centres, features, labels, truth = simulate_images(counts, seed)
    paths = [f"{classes[label]}/0001-1000/{classes[label]}_{i:05d}.jpg" for i, label in enumerate(labels)]
    for i, name in zip(np.flatnonzero(labels != truth), names):
        paths[i] = f"{classes[labels[i]]}/{name}"
    paths = np.array(paths)
    rng = np.random.default_rng(seed)
    parts = np.full((len(labels), folds), "train", dtype="<U5")
    for c in range(len(classes)):
        mine = rng.permutation(np.flatnonzero(labels == c))
        for k in range(folds):
            rest = np.setdiff1d(mine, mine[k::folds], assume_unique=True)
            parts[mine[k::folds], k], parts[rest[: max(1, len(rest) // 5)], k] = "test", "val"
    runs = folder / "runs"
    runs.mkdir(parents=True)
    with open(runs / "split.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        out = csv.writer(handle)
        out.writerow(["path", "label", *(f"fold{k}" for k in range(folds))])
        out.writerows([path, classes[label], *row] for path, label, row in zip(paths, labels, parts))
    study = classes, paths, labels, centres, features, parts
    for (m, model), (i, init), k in itertools.product(enumerate(models), enumerate(inits), range(folds)):
        options = {"quality": 2 + m + 0.5 * i, "seed": 10 * m + i, "val": val}
        simulate_run(runs / "train" / model / init / f"fold{k}", k, study, **options)
    for path in np.random.default_rng(0).permutation(paths)[:pictures] if pictures else ():
        draw_cell(folder / "bm" / path)
    return runs


def draw_cell(file):
    """A violet disc on pink, 250 x 250."""
    y, x = np.mgrid[:250, :250] - 125
    cell = np.where((x * x + y * y < 60**2)[..., None], (90, 40, 140), (235, 215, 225)).astype(np.uint8)
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(cell).save(file)


# ---------------------------------------------------------------- a browser
class Browser:
    """Headless Chromium behind its DevTools pipe: messages are JSON, ended by a zero byte, on file
    descriptors 3 and 4."""

    def __init__(self, folder):
        self.folder, self.events, self.number = pathlib.Path(folder), [], 0
        to_chromium, from_chromium = os.pipe(), os.pipe()
        options = "headless no-sandbox disable-gpu disable-dev-shm-usage no-first-run hide-scrollbars"
        options = [f"--{name}" for name in f"{options} remote-debugging-pipe".split()]
        command = [CHROMIUM, *options, f"--user-data-dir={folder}/profile", "about:blank"]
        inner = f'exec 3<&{to_chromium[0]} 4>&{from_chromium[1]}; exec "$0" "$@"'
        options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options["pass_fds"] = to_chromium[0], from_chromium[1]
        self.process = subprocess.Popen(["bash", "-c", inner, *command], **options)
        os.close(to_chromium[0])
        os.close(from_chromium[1])
        self.out, self.incoming = os.fdopen(to_chromium[1], "wb"), os.fdopen(from_chromium[0], "rb")
        self.session = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def read(self):
        """The next message."""
        text = bytearray()
        while (byte := self.incoming.read(1)) != b"\0":
            assert byte, "chromium ended"
            text += byte
        return json.loads(text)

    def call(self, method, **parameters):
        """Send a command and return its result; events that come meanwhile are kept."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        self.out.flush()
        while (answer := self.read()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, file, width, height=900):
        """Open a local file at a window size and wait until all of it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Page.navigate", url=pathlib.Path(file).resolve().as_uri())
        until(lambda: self.run("document.readyState") == "complete")

    def run(self, script):
        """The value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def text(self):
        """All text of the page."""
        return self.run("document.body.textContent")

    def complaints(self):
        """Uncaught exceptions, console errors and warnings, and log entries so far."""
        kinds = ("Runtime.exceptionThrown", "Log.entryAdded", "Runtime.consoleAPICalled")
        found = [event["params"] for event in self.events if event["method"] in kinds]
        return [params for params in found if params.get("type") not in ("log", "info", "debug")]

    def close(self):
        """End the browser."""
        self.out.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.incoming.close()


# ---------------------------------------------------------------- fixtures
NASTY = ['a,b "c".jpg', "<img src=x onerror='window.hacked=1'>.jpg", "Zelle_ä_\udcff.jpg"]
NASTY += ["long_" + "name_" * 40 + ".jpg", "</script><b>.jpg"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A headless Chromium."""
    if not CHROMIUM:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    folder = tmp_path_factory.mktemp("browser")
    browser = Browser(folder)
    yield browser
    browser.close()


def make_page(runs, *arguments):
    """Call report.py's main, which may not warn; the page's Path."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(sys, "argv", ["report.py", "--runs", str(runs), *map(str, arguments)])
        report.main()
    return runs / "results" / "index.html"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page of a study of two networks and three pre-trainings with all that a night can leave:
    unfinished, failed, odd names."""
    folder = tmp_path_factory.mktemp("study")
    runs = simulate_study(folder, images=700, names=NASTY, pictures=0)
    paths = [row["path"] for row in read_rows(runs / "split.csv")]
    for path in paths[::3]:
        draw_cell(folder / "bm" / path)
    rows = [[*pair, 60, 30, 0.15, 0.6] for pair in zip(paths[::50], paths[1::50])]
    with open(runs / "overlaps.csv", "w", encoding="utf-8", errors="surrogateescape", newline="") as handle:
        csv.writer(handle).writerows(["first second dx dy difference area".split(), *rows])
    (runs / "data").mkdir()
    scan = {"sizes": {"250x250": len(paths)}, "duplicates": [[paths[0], paths[-1]]]}
    (runs / "data/bm.json").write_text(json.dumps({"fingerprint": "f1"} | scan))
    config = runs / "train/vit_l_32/imagenet+cd/fold0/config.json"
    more = {"data": "f1", "left_out": [["BLA/cut_in_half.jpg", "OSError: image file is truncated"]]}
    config.write_text(json.dumps(json.loads(config.read_text()) | more))
    (runs / "train/resnet152/imagenet+cd/fold3/predictions.csv").unlink()
    shutil.rmtree(runs / "train/resnet152/imagenet+cd/fold4")
    file = runs / "train/resnet152/random/fold1/predictions.csv"
    file.write_text("path,label,prediction,p_NGB\nhalf a r")
    for init in ("cd", "imagenet+cd"):
        (runs / "pretrain/vit_l_32" / init).mkdir(parents=True)
        write_log(runs / "pretrain/vit_l_32" / init / "log.csv", np.random.default_rng(0), 7)
    (runs / "pretrain/vit_l_32/cd/predictions.csv").write_text("")
    (runs / "logs").mkdir()
    failed = runs / "logs/train-resnet152-imagenet+cd-fold4.failed"
    failed.touch()
    failed.with_suffix(".log").write_text("starting\n<b>torch.OutOfMemoryError</b>: CUDA out of memory\n\n")
    (runs / "results").mkdir()
    for init in ("random", "imagenet", "imagenet+cd"):  # of which the page shows the best one's
        Image.new("RGB", (900, 500), "teal").save(runs / f"results/gradcam_vit_l_32_{init}_FGC.png")
        write_range_test(runs / "train/vit_l_32" / init)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "GALLERY", 60)
        return make_page(runs, "--data", folder / "bm")


# ---------------------------------------------------------------- the page
def test_no_complaints_and_no_network(browser, page):
    """No console error, warning or exception; nothing but the file itself is fetched."""
    browser.events.clear()
    browser.open(page, 1280)
    requests = [e["params"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    fetched = {params["request"]["url"] for params in requests}
    assert {url for url in fetched if not url.startswith("data:")} == {page.resolve().as_uri()}
    assert browser.complaints() == [] and browser.run("window.hacked") is None


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out(browser, page, width):
    """No element reaches past the window's edge, but for what lies in a box that scrolls sideways; such a box
    can have the focus."""
    browser.open(page, width)
    root = "document.documentElement"
    assert browser.run(f"[{root}.scrollWidth, {root}.clientWidth]") == [width] * 2
    outside = """[...document.body.querySelectorAll("*")].filter(e => !e.parentElement.closest(".wide")
        && (e.getBoundingClientRect().right > innerWidth + 0.5 || e.getBoundingClientRect().left < -0.5))
        .map(e => e.outerHTML.slice(0, 200))"""
    assert browser.run(outside) == []
    assert browser.run(
        """[...document.querySelectorAll(".wide")].every(
            e => e.tabIndex == 0 && e.getAttribute("aria-label"))"""
    )
    wider = "[...document.querySelectorAll('.wide')].filter(e => e.scrollWidth > e.clientWidth).length"
    assert width < 1280 or browser.run(wider) == 0


def test_nothing_sticks_out_in_print(browser, page):
    """As wide as A4 between margins of 10 mm (718 pixels), tables too, which do not scroll on paper."""
    browser.open(page, 718)
    browser.call("Emulation.setEmulatedMedia", media="print")
    widest = browser.run(
        """Math.max(...[...document.querySelectorAll("table, img, figure, p")].map(
            e => e.getBoundingClientRect().right))"""
    )
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    browser.call("Emulation.setEmulatedMedia", media="")
    assert widest <= 718


def test_all_pictures_load_and_say_what_they_show(browser, page):
    """Curves, reliability, coverage, confusion matrix, range test, heatmap, thumbnails: all inside the page,
    all with an alt text."""
    browser.open(page, 1280)
    pictures = browser.run(
        """[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.src.slice(0, 11), i.alt,
            i.closest("section").id])"""
    )
    assert all(loaded and source == "data:image/" and alt for loaded, source, alt, _ in pictures)
    where = [section for *_, section in pictures]
    assert {"classes": 1, "calibration": 4, "training": 5, "heatmaps": 1}.items() <= {
        name: where.count(name) for name in where
    }.items()
    text = browser.run("document.getElementById('overlaps').textContent")
    assert "(15 pairs)" in text and "1 groups of exact duplicates" in text and "2 images show a cell" in text
    assert where.count("labels") > 5 and "image not found" in browser.text()


def test_tables_have_captions_and_headers(browser, page):
    """What a screen reader needs: language, one h1, a caption, column and row headers of every table, no
    heading level left out."""
    browser.open(page, 1280)
    assert browser.run("document.documentElement.lang + document.querySelectorAll('h1').length") == "en1"
    faults = """[...document.querySelectorAll("table")].filter(t => !t.getAttribute("aria-label")
        || t.tHead.rows[0].cells.length != t.tBodies[0].rows[0].cells.length
        || [...t.tHead.rows[0].cells].some(c => c.scope != "col")
        || [...t.tBodies[0].rows].some(r => r.cells[0].scope != "row")).map(t => t.outerHTML.slice(0, 300))"""
    assert browser.run(faults) == [] and browser.run("document.querySelectorAll('table').length") >= 8
    links = browser.run(
        """[...document.querySelectorAll('nav a')].map(
            a => [a.textContent, !!document.querySelector(a.getAttribute('href'))])"""
    )
    assert len(links) == 9 and all(there for _, there in links)


def test_progress_and_failures(browser, page):
    """Which folds are finished, which under way, what failed and why, which files can't be right, which image
    is unreadable."""
    browser.open(page, 1280)
    parts = ["finished5", "finished3", "at epoch 12 of 12", "at epoch 7 of", "BLA/cut_in_half.jpg"]
    parts += ["Failed: train-resnet152-imagenet+cd-fold4.", "resnet152/random/fold1/predictions.csv"]
    parts += ["<b>torch.OutOfMemoryError</b>: CUDA out of memory"]
    assert [part for part in parts if part not in browser.text()] == []


def test_numbers_are_those_of_the_tables(browser, page):
    """Tables 4 and 5 of the page equal evaluate.py's, the paper's numbers below; no cell says nan."""
    browser.open(page, 1280)
    study = evaluate.read_study(page.parent.parent)
    text = browser.text().replace("\xa0", " ")
    table4 = evaluate.table4_rows(study)
    for row in table4:
        assert evaluate.mean_std(row["f1_mean"], row["f1_std"]) in text
    model, init = evaluate.best_run(table4)
    for row in evaluate.table5_rows(study, model, init):
        assert evaluate.mean_std(row["recall_mean"], row["recall_std"]) in text
    assert "paper 0.689 ± 0.044" in text and "paper 0.503 ± 0.061" in text  # ResNet-152 random; faggot cells
    assert " nan" not in text.lower() and "undefined" not in text


def test_the_forest_plot_comes_first(browser, page):
    """Before any other picture or table: a dot at each row's F1, between the ends of its interval, a diamond
    at the paper's F1."""
    browser.open(page, 1280)
    assert browser.run("document.querySelector('main table, main img').className") == "forest"
    middle = """(e => { const box = e.getBoundingClientRect();
        return [box.left, (box.left + box.right) / 2, box.right] })"""
    ticks = browser.run(
        f"[...document.querySelectorAll('.axis span')].map(e => [+e.textContent, {middle}(e)[1]])"
    )
    slope, start = np.polyfit(*zip(*ticks), 1)
    study = evaluate.read_study(page.parent.parent)
    table4, paper = evaluate.table4_rows(study), evaluate.read_table4(ROOT / "paper/table4.csv")
    rows = browser.run(f"""[...document.querySelectorAll('.forest tbody tr')].map(r => ['b', 'i', 'u'].map(
        name => r.querySelector('.axis ' + name)).map(e => e && {middle}(e)))""")
    assert len(rows) == len(table4) == 6
    for row, (dot, diamond, line) in zip(table4, rows):
        assert dot[1] == pytest.approx(start + slope * row["f1_mean"], abs=1)
        assert diamond[1] == pytest.approx(start + slope * paper[row["model"], row["init"]]["f1_mean"], abs=1)
        assert line[0] < dot[1] < line[2]
    text = browser.run("document.querySelector('.forest').textContent")
    assert "the best" in text and "not significantly different" in text


def test_the_interval_is_that_of_the_corrected_t_test():
    """Three folds of macro F1 0.5, 0.6 and 0.7, each of 20 tested and 64 fitted images: 4.303 * 0.1 *
    sqrt(1/3 + 20/64) by hand."""
    confusion, f1s = np.diag([10, 10]), (0.5, 0.6, 0.7)
    folds = {k: evaluate.Fold(confusion, np.full((3, 2), f1), 64.0) for k, f1 in enumerate(f1s)}
    row = {"model": "m", "init": "i"}
    report.add_intervals(evaluate.Study(["a", "b"], np.array([30, 30]), {("m", "i"): folds}, [], []), [row])
    half = pytest.approx(4.3027 * 0.1 * np.sqrt(1 / 3 + 20 / 64), rel=1e-4)
    assert row["f1_high"] - 0.6 == half and 0.6 - row["f1_low"] == half


def test_overlaps_are_counted_by_hand(tmp_path):
    """Images of 100 pixels, so that less than 16 of displacement is the same cell; two folds, of which each
    image is tested in one."""
    split = "path,label,fold0,fold1 A/a,A,test,train B/b,B,train,test A/c,A,test,train B/d,B,val,test "
    split += "A/e,A,test,train B/f,B,train,test A/g,A,train,test "
    (tmp_path / "split.csv").write_text(split.replace(" ", "\n"))
    (tmp_path / "data").mkdir()
    scan = {"fingerprint": "f1", "sizes": {"100x100": 7, "250x250": 1}, "duplicates": [["A/e", "B/f", "A/g"]]}
    (tmp_path / "data/bm.json").write_text(json.dumps(scan))
    pairs = ["first,second,dx,dy,difference,area", "A/a,B/b,9,-12,0.15,0.8", "A/c,B/d,16,0,0.15,0.8"]
    (tmp_path / "overlaps.csv").write_text("\n".join(pairs) + "\n")
    found = report.of_overlaps(study := evaluate.read_study(tmp_path), tmp_path, "f1")
    # fold 0: a has b in training, c has d in validation alone, e has f and g
    # fold 1: b has a, d has c, f and g have e
    assert study.overlaps.startswith("3 of 7 test images")
    assert found["twins"] == {("A/e", "fold0"), ("B/f", "fold1"), ("A/g", "fold1")}
    same = {"A/a": ("B", "same cell as B/b"), "B/b": ("A", "same cell as A/a")}
    assert {path: why for path, why in found["contradicted"].items() if path in same} == same
    labels = {path: label for path, (label, _) in found["contradicted"].items()}
    assert labels == {"A/a": "B", "B/b": "A", "A/e": "B", "B/f": "A", "A/g": "B"}


def test_verdicts_are_exported_and_kept(browser, page, tmp_path):
    """Buttons tell their state, a second press takes it back, a reload keeps it, the CSV reads back with its
    odd names."""
    browser.open(page, 390)
    browser.run("localStorage.clear()")
    browser.open(page, 390)
    cells = browser.run("[...document.querySelectorAll('.cell')].map(c => ({...c.dataset}))")
    press = "document.querySelectorAll('.cell')[{}].querySelector('[data-verdict={}]').click()"
    for verdict in "0 label,2 suggested,3 neither,3 unsure,4 label,4 label".split(","):
        browser.run(press.format(*verdict.split()))
    odd = next(i for i, cell in enumerate(cells) if i > 4 and ('"' in cell["path"] or "," in cell["path"]))
    browser.run(press.format(odd, "suggested"))
    browser.open(page, 1280)
    assert browser.run("document.getElementById('count').textContent") == f"4 of {len(cells)} looked at"
    pressed = "document.querySelectorAll('.cell')[{}].querySelector('[aria-pressed=true]')"
    assert browser.run(f"{pressed.format(3)}.dataset.verdict") == "unsure"
    browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.getElementById('export').click()")
    until((tmp_path / "verdicts.csv").exists)
    rows = read_rows(tmp_path / "verdicts.csv")
    expected = [(1, "label"), (3, "suggested"), (4, "unsure"), (odd + 1, "suggested")]
    assert [(int(row["rank"]), row["verdict"]) for row in rows] == expected
    assert [row["path"] for row in rows] == [cells[i]["path"] for i in (0, 2, 3, odd)]
    assert list(rows[0]) == ["rank", "path", "label", "suggested", "score", "verdict"]
    # a page made anew, whose best network suggests another class for the first cell
    stored = browser.run("""(() => {
        const all = JSON.parse(localStorage.getItem(store)), [key, row] = Object.entries(all)[0];
        delete all[key]; row.suggested = "another";
        all[[row.path, row.label, row.suggested].join("\\n")] = row;
        localStorage.setItem(store, JSON.stringify(all)); return Object.keys(all).length })()""")
    browser.open(page, 1280)
    assert stored == 4 and browser.run(pressed.format(0)) is None
    count = browser.run("document.getElementById('count').textContent")
    assert count.startswith(f"3 of {len(cells)} looked at; 1 more") and browser.complaints() == []


def test_the_gallery_shows_label_issues_flagged_ones_first(browser, page):
    """Same images in the same order but for that; the CSV reads back any file name, bytes that are no text
    included."""
    browser.open(page, 1280)
    shown = browser.run(
        """[...document.querySelectorAll('.cell')].map(
            c => [c.dataset.path, c.dataset.label, c.dataset.suggested])"""
    )
    rows = read_rows(page.parent / "label_issues.csv")
    assert len(shown) == 60 and len(rows) > 60
    order = sorted(rows, key=lambda row: row["flagged"] != "yes")
    expected = [[row["path"].replace("\udcff", "?"), row["label"], row["suggested"]] for row in order[:60]]
    assert shown == expected and any("\udcff" in row["path"] for row in rows)
    kinds = [row["kind"].split(" as ")[0] for row in rows[:3]]
    assert kinds == ["exact duplicate", "exact duplicate", "prediction"]
    assert browser.run("document.querySelectorAll('details .cell').length") == 60 - report.UNFOLDED


# ---------------------------------------------------------------- partial studies
def test_nothing_has_been_run(browser, tmp_path):
    (tmp_path / "runs").mkdir()
    browser.events.clear()
    browser.open(make_page(tmp_path / "runs"), 390)
    assert "Nothing has been begun yet" in browser.text() and browser.complaints() == []


def test_one_fold_without_anything_beside_it(browser, tmp_path):
    """No validation predictions, log, split, range test, heatmaps or images, other classes than bone marrow:
    all of this is said."""
    cells = {"asch": 5, "hsil": 6, "scc $x$ <i>": 3}
    options = {"models": ["resnet18"], "inits": ["cd"], "images": 180, "folds": 2, "pictures": 0}
    runs = simulate_study(tmp_path, **options, cells=cells, val=False)
    shutil.rmtree(runs / "train/resnet18/cd/fold1")
    (runs / "train/resnet18/cd/lr_range.csv").touch()  # of a full disk
    for name in ("split.csv", "train/resnet18/cd/fold0/log.csv", "train/resnet18/cd/fold0/config.json"):
        (runs / name).unlink()
    browser.events.clear()
    browser.open(make_page(runs), 390)
    text = browser.text()
    parts = ["no log.csv", "no range test", "No heatmaps yet", "no val_predictions.csv", "No temperature"]
    parts += ["BLA, FGC, HAC, PEB", "scc $x$ <i>", "finished1"]
    assert [part for part in parts if part not in text] == []
    assert " nan" not in text.lower() and "paper 0." not in text and browser.complaints() == []
    assert browser.run("document.documentElement.scrollWidth") == 390


def test_eight_images_all_right_get_their_page(tmp_path):
    """Too few for any bin of the reliability diagram, so that none is drawn; the commands it names are of
    these folders."""
    for fold in range(2):
        paths, labels = [f"{fold}{i}" for i in range(4)], np.arange(4) % 2
        p = np.where(np.eye(2)[labels] > 0, 0.6, 0.4)
        file = tmp_path / f"runs/train/resnet18/random/fold{fold}/predictions.csv"
        file.parent.mkdir(parents=True)
        write_predictions(file, paths, labels, p, ["a", "b"])
    html = make_page(tmp_path / "runs").read_text()
    assert "Reliability diagram" not in html and f"--init random --runs {tmp_path / 'runs'}" in html


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "alexnet"], "no finished fold of alexnet"),
        (["--init", "nowhere"], "no finished fold of any network/nowhere"),
        (["--runs", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_mistakes_get_one_line(page, arguments, message):
    with pytest.raises(SystemExit) as found:
        make_page(page.parent.parent, *arguments)
    assert message in str(found.value) and "\n" not in str(found.value)


@pytest.mark.long
def test_as_a_script(page, run, tmp_path):
    """What run_all.sh does: one line with the page's place, status 0; a message and status 1 where there is
    nothing."""
    done = run("report.py", "--runs", page.parent.parent, "--data", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(str(page)) and len(done.stdout.splitlines()) == 1
    done = run("report.py", "--runs", tmp_path / "nowhere")
    assert done.returncode == 1 and done.stdout == "" and len(done.stderr.splitlines()) == 1


if __name__ == "__main__":
    texts = [*sys.argv[2:], *("2500", "2", "3")[max(0, len(sys.argv) - 2) :]]
    size, networks, starts = map(int, texts)
    options = {"models": list(evaluate.MODELS)[:networks], "inits": list(evaluate.INITS)[:starts]}
    print(simulate_study(pathlib.Path(sys.argv[1]), images=size, **options))
