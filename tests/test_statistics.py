"""The pass over a data set: Tables 1 and 2, unreadable files, duplicates, made once, in constant memory, and
used in training.

Truth comes from Pillow's decoder, h5py and the JSON files of the synthetic sets read here directly,
torchvision's own antialiased resize, and numpy over all pixels at once; from the numbers that the paper
prints in its Tables 1 and 2; from pictures of one grey level, by hand; and, for training, from what a
network is given and a forward pass of torchvision.
"""

import io
import itertools
import json
import os
import pathlib
import shutil
import tracemalloc

import cv2
import h5py
import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, read_rows
from PIL import Image
from torchvision.transforms import v2

import datasets

TABLE_1 = {"bm": (171374, 21), "cd": (48587, 11), "pcam": (262144, 2)}  # images and classes, as printed
TABLE_2 = {  # mean and std of red, green, blue, as printed
    "bm": ("0.5630 ± 0.2421", "0.4959 ± 0.2835", "0.7353 ± 0.1767"),
    "cd": ("0.7255 ± 0.2705", "0.7826 ± 0.2380", "0.8270 ± 0.1834"),
    "pcam": ("0.7008 ± 0.2350", "0.5384 ± 0.2774", "0.6916 ± 0.2129"),
}


def decode(file):
    """A file as uint8 RGB [H,W,3], by Pillow."""
    return np.asarray(Image.open(file).convert("RGB"))


def read_bm(folder):
    """{class: [pictures]} of the class folders, by pathlib and Pillow."""
    cells = {}
    for file in sorted(folder.rglob("*.jpg")):
        label = file.relative_to(folder / "BM_cytomorphology_data").parts[0]
        cells.setdefault(label, []).append(decode(file))
    return cells


def read_cd(folder):
    """{class: [pictures]} cut out of the slides by the boxes of the JSON files; boxes of width or height 1
    hold no cell."""
    cells = {}
    for part in ("train", "test"):
        content = json.loads((folder / f"{part}.json").read_text())
        slides = {image["id"]: decode(folder / part / image["file_name"]) for image in content["images"]}
        names = {category["id"]: category["name"] for category in content["categories"]}
        for box in content["annotations"]:
            x, y, w, h = box["bbox"]
            if min(w, h) > 1:
                cell = slides[box["image_id"]][max(0, y) : y + h, max(0, x) : x + w]
                cells.setdefault(names[box["category_id"]], []).append(cell)
    return cells


def open_pcam(folder, part, letter, mode="r"):
    """One of PCam's HDF5 files."""
    return h5py.File(folder / f"camelyonpatch_level_2_split_{part}_{letter}.h5", mode)


def read_pcam(folder, parts=("train", "valid", "test")):
    """{class: [patches]} of some parts, by h5py."""
    cells = {"normal": [], "tumour": []}
    for part in parts:
        with open_pcam(folder, part, "x") as x, open_pcam(folder, part, "y") as y:
            for patch, label in zip(x["x"][()], y["y"][()].ravel(), strict=True):
                cells[("normal", "tumour")[label]].append(patch)
    return cells


def mean_and_std(pictures, kind=torch.uint8):
    """[2, 3]: over one array of all pixels of all pictures in [0,1], resized to 224 x 224 by torchvision, a
    channel each."""
    tensors = [torch.from_numpy(picture.copy()).permute(2, 0, 1).to(kind) for picture in pictures]
    resized = [v2.functional.resize(tensor, [224, 224], antialias=True) for tensor in tensors]
    pixels = torch.stack(resized).numpy() / np.float64(255)
    return np.stack([pixels.mean((0, 2, 3)), pixels.std((0, 2, 3))])


def found(info):
    """[2, 3]: mean and std that the pass found."""
    return np.array([info["mean"], info["std"]])


def grey_set(root, levels, size=20):
    """A folder of classes a and b in turn, of PNG files of one grey level each; returns the folder."""
    for i, level in enumerate(levels):
        file = root / "ab"[i % 2] / f"{i:03d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        side = size if np.ndim(size) == 0 else size[i]
        cv2.imwrite(str(file), np.full((side, side + i % 3, 3), level, np.uint8))
    return root


def check(folder, runs, **options):
    """The pass over a folder."""
    return datasets.check_dataset(datasets.open_dataset(folder), runs, **options)


@pytest.fixture(scope="module")
def passes(demo, tmp_path_factory):
    """What the pass finds in the three synthetic sets: {name: (dict, its text)}."""
    runs = tmp_path_factory.mktemp("runs")
    infos = {name: check(demo / name, runs) for name in ("bm", "cd", "pcam")}
    return {name: (info, datasets.describe(info)) for name, info in infos.items()}


READERS = {"bm": read_bm, "cd": read_cd, "pcam": read_pcam}


@pytest.fixture(scope="module")
def truth(demo):
    """What Table 2 shall be taken over: {name: [pictures]}, of PCam the training patches alone."""
    cells = {"bm": read_bm(demo / "bm"), "cd": read_cd(demo / "cd")}
    cells["pcam"] = read_pcam(demo / "pcam", ["train"])
    return {name: list(itertools.chain(*pictures.values())) for name, pictures in cells.items()}


@pytest.fixture(scope="module")
def numpys(truth):
    """Means and stds by numpy: {name: [2, 3]}."""
    return {name: mean_and_std(pictures) for name, pictures in truth.items()}


# ---------------------------------------------------------------- Tables 1 and 2
@pytest.mark.parametrize("name", READERS)
def test_classes_counts_and_sizes_are_those_of_the_files(demo, passes, name):
    info, truth = passes[name][0], READERS[name](demo / name)
    counts = {label: len(cells) for label, cells in truth.items()}
    assert dict(zip(info["classes"], info["counts"], strict=True)) == counts
    sizes = [f"{cell.shape[1]}x{cell.shape[0]}" for cells in truth.values() for cell in cells]
    assert info["sizes"] == {size: sizes.count(size) for size in sizes}
    assert list(info["sizes"].values()) == sorted(info["sizes"].values(), reverse=True)
    assert info["unreadable"] == [] and info["duplicates"] == []


def test_classes_are_in_the_order_of_table_5_for_the_bm_cells_and_else_alphabetical(passes):
    bm, cd = passes["bm"][0]["classes"], passes["cd"][0]["classes"]
    assert bm == [row["class"] for row in read_rows(ROOT / "paper/table5.csv")]
    assert cd == sorted(cd) and len(cd) == 11


@pytest.mark.parametrize("name", READERS)
def test_mean_and_std_are_those_of_all_pixels_after_torchvisions_resize(truth, numpys, passes, name):
    """To 1e-9 of numpy's over one array of all pixels; to 5e-5, the printed 4 decimals, if resized pixels are
    not rounded to uint8."""
    assert np.abs(found(passes[name][0]) - numpys[name]).max() < 1e-9
    assert np.abs(found(passes[name][0]) - mean_and_std(truth[name], torch.float32)).max() < 5e-5


def test_each_image_counts_equally_however_large(tmp_path):
    """By hand: 3 white pictures of 10 pixels, 1 black one of 900: mean 3/4, std sqrt(3)/4, of the whole
    population (no n - 1).

    The std is that of all pixels: a mean of the pictures' own stds would be 0.
    """
    info = check(grey_set(tmp_path / "mine", [255, 255, 255, 0], [10, 10, 10, 900]), tmp_path / "runs")
    assert found(info)[0] == pytest.approx([3 / 4] * 3, abs=1e-12)
    assert found(info)[1] == pytest.approx([np.sqrt(3) / 4] * 3, abs=1e-12)


def test_channels_are_in_the_order_red_green_blue(tmp_path):
    for label, colour in (("a", (255, 51, 0)), ("b", (204, 153, 51))):
        (tmp_path / "mine" / label).mkdir(parents=True)
        Image.new("RGB", (8, 8), colour).save(tmp_path / "mine" / label / "1.png")
    info = check(tmp_path / "mine", tmp_path / "runs")
    assert found(info) == pytest.approx(np.array([[0.9, 0.4, 0.1], [0.1, 0.2, 0.1]]), abs=1e-9)


@pytest.mark.parametrize("name", READERS)
def test_the_papers_values_are_printed_beside(passes, name):
    """What was found to 4 decimals and what Tables 1 and 2 print, in one line for each number of images,
    classes and colour."""
    info, text = passes[name]
    lines = {line.split()[0]: line for line in text.splitlines()}
    images, classes = TABLE_1[name]
    images = f"{images:,}{' for training' * (name == 'pcam')}"
    assert f"(paper: {images})" in lines["images"] and f"(paper: {classes})" in lines["classes"]
    assert f" {len(info['classes'])} " in lines["classes"]
    colours = zip(("red", "green", "blue"), TABLE_2[name], info["mean"], info["std"], strict=True)
    for colour, printed, mean, std in colours:
        assert lines[colour].split() == f"{colour} {mean:.4f} ± {std:.4f} (paper: {printed})".split()
    for label, count in zip(info["classes"], info["counts"], strict=True):
        assert f" {label} {count}" in text


def test_nothing_of_the_paper_is_printed_beside_a_data_set_of_ones_own(tmp_path):
    text = datasets.describe(check(grey_set(tmp_path / "mine", [0, 255]), tmp_path / "runs"))
    assert "(paper" not in text and "0.5000 ± 0.5000" in text and "a 1, b 1" in text


# ---------------------------------------------------------------- one pass
def test_the_number_of_threads_changes_nothing(demo, tmp_path):
    """Sums of integers have no order: with 1, 3 and 8 threads the files are equal byte by byte."""
    files = set()
    for workers in (1, 3, 8):
        check(demo / "pcam", tmp_path / str(workers), workers=workers)
        files.add((tmp_path / str(workers) / "data" / "pcam.json").read_bytes())
    assert len(files) == 1


def test_two_parts_pooled_give_the_whole(demo, passes, tmp_path):
    """By the law of total variance, of 1/3 and 2/3 of the bm cells, to 1e-12: no running mean that drifts."""
    cells, moments = datasets.open_dataset(demo / "bm"), []
    third = np.arange(len(cells)) % 3 == 0
    for part, chosen in enumerate((third, ~third)):
        mean, std = found(datasets.check_dataset(cells.subset(chosen), tmp_path / str(part)))
        moments.append(chosen.mean() * np.array([mean, std**2 + mean**2]))
    mean, square = sum(moments)
    assert np.abs(found(passes["bm"][0]) - [mean, np.sqrt(square - mean**2)]).max() < 1e-12


@pytest.mark.long
def test_memory_does_not_grow_with_the_number_of_images(tmp_path, monkeypatch):
    """By tracemalloc at its peak, 1,024 images more cost less than 1 KB each, the digest that finds
    duplicates.

    Resized pictures (copied into numpy's memory here, since torch's is not traced) are 12 KB, histograms 6
    KB, files 5 KB.
    """
    resize, rng, peaks = datasets.resize, np.random.default_rng(0), {}
    monkeypatch.setattr(datasets, "resize", lambda *args: np.array(resize(*args)))
    monkeypatch.setattr(datasets, "STATISTICS_SIZE", 64)
    for i in range(2048):
        file = tmp_path / "many" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(256, size=(40, 40, 3), dtype=np.uint8)).save(file)
    cells = datasets.open_dataset(tmp_path / "many")
    for number in (1024, 2048):
        part = cells.subset(np.arange(number))
        tracemalloc.start()
        datasets.check_dataset(part, tmp_path / str(number), workers=2)
        peaks[number] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (peaks[2048] - peaks[1024]) / 1024 < 1000


@pytest.fixture
def counted(monkeypatch):
    """A list that gets one entry for each image that a pass looks at."""
    looked_at, inspect = [], datasets.inspect
    watched = lambda cells, index: looked_at.append(index) or inspect(cells, index)  # noqa: E731
    monkeypatch.setattr(datasets, "inspect", watched)
    return looked_at


def test_a_second_call_makes_no_second_pass_and_a_copy_has_the_same_fingerprint(tmp_path, counted, capsys):
    """What is returned is read from the file. A folder of that name elsewhere is looked at, and said; its
    fingerprint is of the contents, so that a run resumes on a copy, and not on other images of equal names.
    """
    folder, other = grey_set(tmp_path / "here/mine", [0, 50, 100, 150]), tmp_path / "other/mine"
    first = check(folder, tmp_path / "runs")
    assert check(folder, tmp_path / "runs") == first
    assert first == json.loads((tmp_path / "runs/data/mine.json").read_text())
    assert sorted(counted) == [0, 1, 2, 3]
    shutil.copytree(folder, tmp_path / "there/mine")
    assert check(tmp_path / "there/mine", tmp_path / "runs")["fingerprint"] == first["fingerprint"]
    assert len(counted) == 8 and "here/mine" in capsys.readouterr().err
    for file in grey_set(other, [0, 50, 100, 200]).rglob("*.png"):
        os.utime(file, ns=(0, (folder / file.relative_to(other)).stat().st_mtime_ns))
    assert check(other, tmp_path / "runs")["fingerprint"] != first["fingerprint"]


def test_a_file_changed_in_place_makes_a_new_pass(tmp_path, counted):
    """At its size, as stain normalisation leaves BMPs; and a download that had reserved its whole size is
    whole now."""
    folder = tmp_path / "mine"
    for label, level in (("a", 50), ("b", 150), ("b", 151)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (level,) * 3).save(folder / label / f"{level}.bmp")
    whole = (folder / "b/151.bmp").read_bytes()
    (folder / "b/151.bmp").write_bytes(bytes(len(whole)))
    before = check(folder, tmp_path / "runs")
    assert [path for path, _ in before["unreadable"]] == ["b/151.bmp"]
    (folder / "b/151.bmp").write_bytes(whole)
    os.utime(folder / "b/151.bmp", ns=(0, (folder / "b/150.bmp").stat().st_mtime_ns + 1))
    after = check(folder, tmp_path / "runs")
    assert len(counted) == 6 and after["unreadable"] == [] and after["fingerprint"] != before["fingerprint"]
    assert np.abs(found(after) - mean_and_std([decode(file) for file in folder.rglob("*.bmp")])).max() < 1e-9


def change_size(folder):
    Image.new("RGB", (90, 90), (7, 7, 7)).save(folder / "a" / "000.png")


def add(folder):
    Image.new("RGB", (9, 9), (7, 7, 7)).save(folder / "b" / "new.png")


def take_away(folder):
    (folder / "a" / "000.png").unlink()


def rename(folder):
    (folder / "a" / "000.png").rename(folder / "a" / "zzz.png")


def relabel(folder):
    (folder / "a" / "000.png").rename(folder / "b" / "000.png")


@pytest.mark.parametrize("what", [change_size, add, take_away, rename, relabel])
def test_a_file_changed_come_gone_or_relabelled_makes_a_new_pass(tmp_path, counted, what):
    folder = grey_set(tmp_path / "mine", [0, 50, 100, 150, 200, 250])
    before = check(folder, tmp_path / "runs")
    counted.clear()
    what(folder)
    after = check(folder, tmp_path / "runs")
    assert len(counted) == len(list(folder.rglob("*.png"))) and after["fingerprint"] != before["fingerprint"]
    assert np.abs(found(after) - mean_and_std([decode(file) for file in folder.rglob("*.png")])).max() < 1e-9
    assert check(folder, tmp_path / "runs") == after and len(counted) == len(list(folder.rglob("*.png")))


# ---------------------------------------------------------------- unreadable files and duplicates
def wrong_byte(content, at):
    """A file's content with one byte inverted."""
    return content[:at] + bytes([content[at] ^ 255]) + content[at + 1 :]


def read_by_opencv_alone(content):
    """Does OpenCV decode what Pillow refuses? (Not each wrong byte of a TIFF breaks its compression.)"""
    try:
        Image.open(io.BytesIO(content)).load()
    except OSError:
        return cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) is not None
    return False


@pytest.fixture
def damaged(demo, tmp_path):
    """Twelve bm cells in two classes and seven files that no strict decoder reads; (folder, their paths)."""
    files = sorted(demo.glob("bm/BM_cytomorphology_data/*/*/*.jpg"))[:12]
    for i, file in enumerate(files):
        (tmp_path / "mine" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "mine" / "ab"[i % 2])
    jpeg = files[0].read_bytes()
    png, tiff = (bytearray(cv2.imencode(kind, decode(files[1]))[1]) for kind in (".png", ".tif"))
    damages = (wrong_byte(tiff, at) for at in range(len(tiff) // 2, len(tiff)))
    tiff = next(filter(read_by_opencv_alone, damages))
    broken = {
        "a/half.jpg": jpeg[: len(jpeg) // 2],
        "a/nine tenths.jpg": jpeg[: len(jpeg) * 9 // 10],
        "b/half.png": png[: len(png) // 2],
        "b/one byte.tif": tiff,
        "b/empty.jpg": b"",
        "b/text.png": b"no image",
        "b/page.jpg": b"<!DOCTYPE html><html>404</html>",
    }
    for path, content in broken.items():
        (tmp_path / "mine" / path).write_bytes(content)
    return tmp_path / "mine", sorted(broken)


def test_unreadable_files_are_named_and_left_out_of_the_mean(damaged, tmp_path):
    """A JPEG cut in half and a TIFF with one wrong byte among them, which OpenCV takes without a word."""
    folder, broken = damaged
    assert cv2.imread(str(folder / "a/half.jpg")) is not None
    assert cv2.imdecode(np.fromfile(folder / "b/one byte.tif", np.uint8), cv2.IMREAD_COLOR) is not None
    info = check(folder, tmp_path / "runs")
    assert sorted(path for path, _ in info["unreadable"]) == broken
    assert all(why for _, why in info["unreadable"])
    whole = sorted({*folder.rglob("*.jpg")} - {folder / path for path in broken})
    whole = [decode(file) for file in whole]
    assert len(whole) == 12 and np.abs(found(info) - mean_and_std(whole)).max() < 1e-9
    assert sum(info["sizes"].values()) == 12
    text = datasets.describe(info)
    assert "unreadable 7," in text and all(f"unreadable, left out: {path} (" in text for path in broken)


def test_exact_duplicates_are_named_within_and_across_classes(tmp_path):
    """Three copies in one class, two across classes, and two pictures that differ by one pixel, which are no
    duplicates."""
    folder = grey_set(tmp_path / "mine", [10, 20, 30, 40])
    shutil.copy(folder / "a/000.png", folder / "a/copy.png")
    shutil.copy(folder / "a/000.png", folder / "a/other copy.png")
    shutil.copy(folder / "b/001.png", folder / "a/wrong.png")
    almost = decode(folder / "b/003.png").copy()
    almost[0, 0] += 1
    Image.fromarray(almost).save(folder / "b/almost.png")
    Image.fromarray(decode(folder / "a/002.png")).save(folder / "a/as bitmap.bmp")  # the same pixels
    info = check(folder, tmp_path / "runs")
    groups = {frozenset(group) for group in info["duplicates"]}
    expected = ["a/000.png", "a/copy.png", "a/other copy.png"], ["b/001.png", "a/wrong.png"]
    assert groups == {*map(frozenset, [*expected, ["a/002.png", "a/as bitmap.bmp"]])}
    text = datasets.describe(info)
    assert "exact duplicates 3 groups, 1 of them across classes" in text
    assert info["notes"] == ["1 groups of equal images have several labels, e.g. a/wrong.png and b/001.png"]
    assert all(path in text for group in groups for path in group)


def test_a_box_labelled_twice_is_a_duplicate_across_classes(demo, tmp_path):
    """Of a COCO set: the same box in two categories."""
    shutil.copytree(demo / "cd", tmp_path / "cd", ignore=shutil.ignore_patterns(".*"))
    content = json.loads((tmp_path / "cd/test.json").read_text())
    box = next(box for box in content["annotations"] if min(box["bbox"][2:]) > 1)
    other = next(category["id"] for category in content["categories"] if category["id"] != box["category_id"])
    content["annotations"].append({**box, "id": 999, "category_id": other})
    (tmp_path / "cd/test.json").write_text(json.dumps(content))
    info = check(tmp_path / "cd", tmp_path / "runs")
    [group] = info["duplicates"]
    stems = [f"test_{box['image_id']:05d}_{number}" for number in (box["id"], 999)]
    assert sorted(pathlib.PurePath(path).stem for path in group) == stems
    assert "1 groups, 1 of them across classes" in datasets.describe(info)


def test_duplicates_of_pcam_are_across_classes_only_where_labels_differ(demo, tmp_path):
    """Two training patches stand in the validation part with the same label, and one twice in the training
    part with both labels."""
    folder = shutil.copytree(demo / "pcam", tmp_path / "pcam")
    with open_pcam(folder, "train", "y") as y:
        labels = y["y"][()].ravel()
    normal, tumour = np.flatnonzero(labels == 0), np.flatnonzero(labels == 1)
    with (
        open_pcam(folder, "train", "x", "r+") as x,
        open_pcam(folder, "valid", "x", "r+") as v,
        open_pcam(folder, "valid", "y", "r+") as w,
    ):
        v["x"][3], w["y"][3] = x["x"][normal[0]], 0
        v["x"][5], w["y"][5] = x["x"][tumour[0]], 1
        x["x"][tumour[1]] = x["x"][normal[1]]
    info = check(folder, tmp_path / "runs")
    expected = [f"train/{normal[0]}", "valid/3"], [f"train/{tumour[0]}", "valid/5"]
    expected = [*expected, [f"train/{normal[1]}", f"train/{tumour[1]}"]]
    assert {*map(frozenset, info["duplicates"])} == {*map(frozenset, expected)}
    assert "3 groups, 1 of them across classes" in datasets.describe(info)


# ---------------------------------------------------------------- in training
@pytest.fixture
def train_here(watched_inputs):
    """Call a script's main() in this process: returns the darkest value of each channel of each training
    batch, [batches, 3]."""

    def call(*arguments):
        batches = watched_inputs(*arguments, "--image-size", 32)
        return np.array([batch.amin((0, 2, 3)).tolist() for batch in batches])

    return call


@pytest.mark.long
def test_fine_tuning_normalises_with_the_full_data_set_in_every_fold_and_pretraining_with_its_own(
    demo, numpys, tmp_path, train_here
):
    """best.pt's mean and std are those of the pass. The network was trained on them: a corner that rotation
    uncovers is (0 - mean) / std. And tested on them: torchvision's resize, ToTensor and Normalize give the
    probabilities of predictions.csv."""
    import pretrain
    import train

    for script, name, folds in ((pretrain, "cd", 1), (train, "bm", 5)):
        darkest = train_here(script, "--data", demo / name, "--init", "random" if script is train else "cd")
        info = json.loads((tmp_path / f"runs/data/{name}.json").read_text())
        mean, std = found(info)
        assert np.abs(numpys[name] - [mean, std]).max() < 1e-6
        assert len(darkest) >= folds * 4 and np.abs(darkest - (0 - mean) / std).max() < 1e-5
        best = sorted(tmp_path.glob(f"runs/{script.__name__}/*/*/**/best.pt"))
        assert len(best) == folds
        for file in best:
            kept = torch.load(file, weights_only=True)
            assert np.abs(np.array([kept["mean"], kept["std"]]) - [mean, std]).max() < 1e-7, "as float32"
            assert forward(kept, demo / name, file.with_name("predictions.csv")) < 1e-4


def forward(kept, folder, file):
    """Greatest difference between a forward pass of torchvision's network and the first 8 rows of
    predictions.csv."""
    net = torchvision.models.shufflenet_v2_x0_5(weights=None, num_classes=len(kept["classes"])).eval()
    net.load_state_dict(kept["state_dict"])
    usual = [v2.ToImage(), v2.Resize([32, 32], antialias=True), v2.ToDtype(torch.float32, scale=True)]
    usual = v2.Compose([*usual, v2.Normalize(kept["mean"], kept["std"])])
    root = folder / ("BM_cytomorphology_data" if folder.name == "bm" else ".crops")
    rows = read_rows(file)[:8]
    pictures = [usual(Image.open(root / row["path"]).convert("RGB")) for row in rows]
    with torch.inference_mode():
        p = net(torch.stack(pictures)).softmax(1).numpy()
    return np.abs(p - [[float(row[f"p_{label}"]) for label in kept["classes"]] for row in rows]).max()
