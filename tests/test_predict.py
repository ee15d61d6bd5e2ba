"""New images are judged honestly: by the networks' mean, without those they were trained on, at the prior
that is named."""

import collections
import shutil

import cv2
import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics
import torch
from conftest import call, refused
from conftest import read_rows as read

import datasets
import gradcam
import models
import predict


def command(*args):
    call(predict, *args, "--device", "cpu")


def predict_new(runs, folder, *more):
    """Fold 0's network on folder/new, into folder/out."""
    command("--checkpoint", checkpoint(runs, 0), "--images", folder / "new", "--out", folder / "out", *more)


def refusal(*args):
    return refused(predict, *args, "--device", "cpu")


def parts_of(runs, fold):
    """{path: train, val or test} of one fold."""
    return {row["path"]: row[f"fold{fold}"] for row in read(runs / "split.csv")}


def numbers(row, cells):
    """The probabilities, float64 [C], of a row of a predictions file."""
    return np.array([float(row[f"p_{label}"]) for label in cells.classes])


def checkpoint(runs, fold):
    return runs / "train" / "shufflenet_v2_x0_5" / "random" / f"fold{fold}" / "best.pt"


# ---------------------------------------------------------------- new images
def copy_cells(cells, paths, folder, rename=str):
    for path in paths:
        (folder / rename(path)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(cells.root / path, folder / rename(path))


def test_a_folds_test_images_as_new_images(trained, tmp_path, capsys):
    """The same predictions as the run's own; scores as scikit-learn's; training images left out though
    renamed."""
    runs, cells = trained
    own = {row["path"]: row for row in read(checkpoint(runs, 0).with_name("predictions.csv"))}
    copy_cells(cells, own, tmp_path / "new")
    used = [path for path, part in parts_of(runs, 0).items() if part != "test"]
    copy_cells(
        cells, used[:3], tmp_path / "new", lambda path: f"{path[:3]}/another name {used.index(path)}.jpg"
    )
    out = tmp_path / "out"
    predict_new(runs, tmp_path)
    rows = {row["path"]: row for row in read(out / "predictions.csv")}
    assert set(own) < set(rows) and len(rows) == len(own) + 3
    for path, row in own.items():
        assert rows[path]["prediction"] == row["prediction"]
        assert numbers(rows[path], cells) == pytest.approx(numbers(row, cells), abs=1e-5)
        assert float(rows[path]["confidence"]) == max(numbers(rows[path], cells))
        assert (out / "heatmaps" / f"{path}.png").exists()
    left_out = [row["path"] for row in read(out / "left_out.csv")]
    said = capsys.readouterr().out
    assert len(left_out) == 3 and all("another name" in path for path in left_out)
    assert all(f"{path}: not scored" in said for path in left_out)
    truth, predicted = [row["label"] for row in own.values()], [row["prediction"] for row in own.values()]
    report = sklearn.metrics.classification_report(truth, predicted, output_dict=True, zero_division=0)
    for row in read(out / "table5_shufflenet_v2_x0_5_prior_uniform.csv"):
        expected = report[row["class"]]
        ours = [float(row[key]) for key in ("precision_mean", "recall_mean", "f1_mean", "images")]
        theirs = [expected[key] for key in ("precision", "recall", "f1-score", "support")]
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert float(read(out / "table4.csv")[0]["accuracy_mean"]) == pytest.approx(report["accuracy"], abs=1e-6)
    for row in read(out / "confusion_shufflenet_v2_x0_5_prior_uniform.csv"):
        assert float(row[row["class"]]) == pytest.approx(report[row["class"]]["recall"], abs=1e-6)


def test_training_images_are_known_by_name_where_their_data_is_gone(trained, tmp_path, capsys):
    runs, cells = trained
    shutil.copytree(runs, tmp_path / "runs")
    config = checkpoint(tmp_path / "runs", 1).with_name("config.json")
    config.write_text(config.read_text().replace(str(cells.root), "/moved/away"))
    example = {part: path for path, part in parts_of(runs, 1).items()}  # one of each part
    copy_cells(cells, example.values(), tmp_path / "new" / "clinic")
    options = ("--images", tmp_path / "new", "--out", tmp_path / "out", "--no-heatmaps")
    command("--checkpoint", checkpoint(tmp_path / "runs", 1), *options)
    left_out = {row["path"].removeprefix("clinic/") for row in read(tmp_path / "out" / "left_out.csv")}
    assert left_out == {example["train"], example["val"]}
    command("--checkpoint", checkpoint(runs, 0), checkpoint(runs, 1), *options)  # both folds saw them all
    assert "no scores: a checkpoint was trained on all" in capsys.readouterr().out
    shutil.copy(checkpoint(runs, 1), tmp_path / "lost.pt")
    command("--checkpoint", tmp_path / "lost.pt", *options)
    assert "lost.pt: what it was trained on is not known" in capsys.readouterr().out


def test_several_checkpoints_are_averaged_and_smears_counted(trained, tmp_path):
    runs, cells = trained
    paths = [str(path) for path in cells.paths[::9]]
    for path in paths:
        copy_cells(cells, [path], tmp_path / "new", lambda p: f"smear {len(p) % 2}, ä/{p.replace('/', '#')}")
    options = ("--images", tmp_path / "new", "--no-heatmaps", "--out")
    single = []
    for fold in (0, 1):
        command("--checkpoint", checkpoint(runs, fold), *options, tmp_path / f"out{fold}")
        single.append(read(tmp_path / f"out{fold}" / "predictions.csv"))
    command("--checkpoint", checkpoint(runs, 0), checkpoint(runs, 1), *options, tmp_path / "out")
    both = read(tmp_path / "out" / "predictions.csv")
    for first, second, mean in zip(*single, both):
        expected = np.mean([numbers(first, cells), numbers(second, cells)], 0)
        assert numbers(mean, cells) == pytest.approx(expected, abs=1e-6)
    assert not (tmp_path / "out" / "heatmaps").exists() and not (tmp_path / "out" / "table4.csv").exists()
    counted = read(tmp_path / "out" / "differential.csv")
    smears = {row["path"].rpartition("/")[0] for row in both}
    assert {row["smear"] for row in counted} == smears and len(counted) == len(smears) * len(cells.classes)
    for row in counted:
        of_smear = [r["prediction"] for r in both if r["path"].rpartition("/")[0] == row["smear"]]
        number, total = of_smear.count(row["class"]), len(of_smear)
        interval = scipy.stats.binomtest(number, total).proportion_ci(0.95, method="wilson")
        assert (int(row["cells"]), int(row["of"])) == (number, total)
        expected = [100 * number / total, 100 * interval.low, 100 * interval.high]
        assert [float(row[key]) for key in ("percent", "low", "high")] == pytest.approx(expected, abs=0.006)


def test_any_image_is_judged_and_unreadable_ones_are_named(trained, tmp_path, capsys):
    runs, cells = trained
    folder = tmp_path / "new" / "sub" / "deeper"
    folder.mkdir(parents=True)
    image = cells[0]
    content = (cells.root / cells.paths[0]).read_bytes()
    cv2.imwrite(str(folder / "grey.PNG"), image[..., 0])
    cv2.imwrite(str(folder / "deep.tif"), image.astype(np.uint16) * 257)
    cv2.imwrite(str(folder / "alpha.png"), np.dstack([image, image[..., 0]]))
    cv2.imwrite(str(folder / "wide, $5 #1.bmp"), np.tile(image[:3], (1, 3, 1)))
    (folder / "half.jpg").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").touch()
    (folder / "notes.jpeg").write_text("no image")
    predict_new(runs, tmp_path)
    rows = read(tmp_path / "out" / "predictions.csv")
    names = [row["path"].split("/")[-1] for row in rows]
    assert names == ["alpha.png", "deep.tif", "grey.PNG", "wide, $5 #1.bmp"]
    left_out = [row["path"].split("/")[-1] for row in read(tmp_path / "out/left_out.csv")]
    assert sorted(left_out) == ["empty.jpg", "half.jpg", "notes.jpeg"]
    said = capsys.readouterr().out
    assert "1 images have an alpha channel" in said and "1 images hold 16 bits" in said
    assert all(f"sub/deeper/{name}: unreadable" in said for name in ("half.jpg", "empty.jpg", "notes.jpeg"))
    for row in rows:
        shown = cv2.imread(str(tmp_path / "out" / "heatmaps" / f"{row['path']}.png"))
        original = cv2.imread(str(tmp_path / "new" / row["path"]))
        height, width = (
            max(1, round(side * gradcam.PICTURE / max(original.shape))) for side in original.shape[:2]
        )
        assert shown.shape[:2] == (height, 2 * width)
    assert len(list((tmp_path / "out" / "heatmaps").rglob("*.png"))) == 4


def test_one_image_file(trained, tmp_path, capsys):
    runs, cells = trained
    shutil.copy(cells.root / cells.paths[0], tmp_path / "x.JPG")
    shutil.copy(cells.root / cells.paths[1], tmp_path / "beside.jpg")
    options = ("--checkpoint", checkpoint(runs, 0), "--out", tmp_path / "out", "--images")
    command(*options, tmp_path / "x.JPG")
    assert [row["path"] for row in read(tmp_path / "out/predictions.csv")] == ["x.JPG"]
    assert [file.name for file in (tmp_path / "out/heatmaps").iterdir()] == ["x.JPG.png"]
    (tmp_path / "x.txt").write_text("no image")
    assert "x.txt: no table of path" in refusal(*options, tmp_path / "x.txt")


def test_system_folders_are_no_images_and_pictures_not_read_are_listed(trained, tmp_path, capsys):
    """A network drive's thumbnails and a phone's HEIC among the cells."""
    runs, cells = trained
    copy_cells(cells, cells.paths[:2], tmp_path / "new")
    for folder in ("@eaDir/1.jpg", "$RECYCLE.BIN", "sub/#recycle", "lost+found", "__MACOSX", ".cache"):
        copy_cells(cells, cells.paths[:1], tmp_path / "new" / folder)
    (tmp_path / "new/@eaDir/2.heic").write_bytes(b"a thumbnail")
    for name in ("a.HEIC", "sub/b.heic", "sub/c.dcm", "notes.txt"):
        (tmp_path / "new" / name).write_bytes(b"something")
    predict_new(runs, tmp_path, "--no-heatmaps")
    assert [row["path"] for row in read(tmp_path / "out/predictions.csv")] == sorted(cells.paths[:2])
    others = [row["path"] for row in read(tmp_path / "out/left_out.csv") if "type" in row["why"]]
    assert others == ["a.HEIC", "notes.txt", "sub/b.heic", "sub/c.dcm"]
    assert "a.HEIC: a type of file that is not read" in capsys.readouterr().out


def test_file_names_as_long_as_a_file_system_takes_them(trained, tmp_path):
    """255 bytes are allowed: with .png at the end it would be more. Two such names keep two heatmaps."""
    runs, cells = trained
    names = ["ä" * 125 + "1.jpg", "ä" * 125 + "2.jpg", "x" * 251 + ".jpg"]
    assert [len(name.encode()) for name in names] == [255, 255, 255]
    (tmp_path / "new").mkdir()
    for path, name in zip(cells.paths, names):
        shutil.copy(cells.root / path, tmp_path / "new" / name)
    predict_new(runs, tmp_path)
    assert [row["path"] for row in read(tmp_path / "out/predictions.csv")] == sorted(names)
    maps = list((tmp_path / "out/heatmaps").iterdir())
    assert len(maps) == 3 and all(cv2.imread(str(file)) is not None for file in maps)


def test_a_map_of_folder_names(trained, tmp_path, capsys):
    runs, cells = trained
    own = read(checkpoint(runs, 0).with_name("predictions.csv"))
    own = [row for row in own if row["label"] in ("NGS", "LYT")]
    theirs = {"NGS": "Segmented neutrophil", "LYT": "Lymphocyte"}
    for row in own:
        (tmp_path / "new" / theirs[row["label"]]).mkdir(parents=True, exist_ok=True)
        shutil.copy(cells.root / row["path"], tmp_path / "new" / theirs[row["label"]])
    copy_cells(cells, [own[0]["path"]], tmp_path / "new", lambda p: "Unknown cell/1.jpg")
    predict_new(runs, tmp_path, "--no-heatmaps")
    assert "no scores" in capsys.readouterr().out and not list((tmp_path / "out").glob("table*"))
    table = tmp_path / "map.csv"
    table.write_text("Segmented neutrophil,NGS\nLymphocyte,LYT\nUnknown cell,\n")
    predict_new(runs, tmp_path, "--no-heatmaps", "--map", table)
    rows = read(tmp_path / "out/table5_shufflenet_v2_x0_5_prior_uniform.csv")
    counts = collections.Counter(row["label"] for row in own)
    assert {row["class"]: int(row["images"]) for row in rows} == {
        label: counts[label] for label in cells.classes
    }
    table.write_text("Segmented neutrophil,NEUTRO\n")
    options = "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out", tmp_path / "out"
    assert "NEUTRO is no class" in refusal(*options, "--map", table)
    assert "No such file" in refusal(*options, "--map", tmp_path / "none.csv")


# ---------------------------------------------------------------- the prior
def test_prior_by_hand_and_by_bayes():
    ratio = predict.prior_ratio("train", ["a", "b"], [90, 10])
    p = predict.correct(np.array([[0.6, 0.4], [0.2, 0.8]]), ratio)
    np.testing.assert_allclose(p, [[0.54 / 0.58, 0.04 / 0.58], [0.18 / 0.26, 0.08 / 0.26]])
    rng = np.random.default_rng(0)
    frequencies = np.array([0.9, 0.09, 0.01])  # of three classes of cells, one feature of known densities
    truth = rng.choice(3, 20000, p=frequencies)
    densities = scipy.stats.norm.pdf(rng.normal(truth * 1.5)[:, None], [0, 1.5, 3])
    uniform = densities / densities.sum(1, keepdims=True)  # what a network learns from balanced classes
    bayes = densities * frequencies / (densities * frequencies).sum(1, keepdims=True)
    corrected = predict.correct(uniform, predict.prior_ratio("train", list("abc"), [9000, 900, 100]))
    np.testing.assert_allclose(corrected, bayes)
    assert np.array_equal(predict.prior_ratio("uniform", list("abc"), [5, 6, 0]), np.ones(3))


def test_prior_of_a_file(tmp_path, trained):
    file = tmp_path / "prior.csv"
    file.write_text("class,frequency\nb,30\na,70\n")
    np.testing.assert_allclose(predict.prior_ratio(str(file), ["a", "b"], [10, 10]), [1.4, 0.6])
    options = (
        "--checkpoint",
        checkpoint(trained[0], 0),
        "--images",
        trained[1].root,
        "--out",
        tmp_path / "out",
    )
    options += ("--prior",)
    assert "needs class,frequency for each of" in refusal(*options, file)  # of other classes
    assert "No such file" in refusal(*options, "natural")
    for bad in ("a,-1\nb,2\n", "a,x\nb,1\n", "a,0\nb,0\n", "a,nan\nb,1\n"):
        file.write_text(bad)
        with pytest.raises(SystemExit, match="frequency"):
            predict.prior_ratio(str(file), ["a", "b"], [1, 1])
    assert not (tmp_path / "out").exists()


def test_new_images_at_the_frequencies_of_training(trained, tmp_path, capsys):
    """p times the class's number of training images, which the split tells, scaled to add up to 1."""
    runs, cells = trained
    own = read(checkpoint(runs, 0).with_name("predictions.csv"))[::4]
    copy_cells(cells, [row["path"] for row in own], tmp_path / "new")
    predict_new(runs, tmp_path, "--no-heatmaps", "--prior", "train")
    counts = collections.Counter(row["label"] for row in read(runs / "split.csv") if row["fold0"] == "train")
    counts = np.array([counts[label] for label in cells.classes])
    rows = {row["path"]: row for row in read(tmp_path / "out/predictions.csv")}
    right = 0
    for row in own:
        p = numbers(row, cells) * counts
        np.testing.assert_allclose(numbers(rows[row["path"]], cells), p / p.sum(), atol=1e-5)
        right += cells.classes[p.argmax()] == row["label"]
    (row,) = read(tmp_path / "out/table4.csv")
    assert row["init"] == "prior_train"  # that of predictions.csv; as trained is printed beside
    assert float(row["accuracy_mean"]) == pytest.approx(right / len(own), abs=1e-6)
    said = capsys.readouterr().out
    assert "prior_uniform" in said and "prior_train" in said
    assert not (tmp_path / "out/comparisons.csv").exists()


# ---------------------------------------------------------------- test-time augmentation
def put_lively_network(file, classes):
    """Put random weights whose probabilities differ from view to view, as those of a well trained network."""
    torch.manual_seed(int(file.parent.name[-1]))
    net = models.build_model("squeezenet1_0", classes, image_size=64)
    with torch.no_grad():
        net.classifier[1].weight *= 12
    content = models.read_checkpoint(file) | {"model": "squeezenet1_0", "state_dict": net.state_dict()}
    torch.save(content, file)


def mean_of_eight(file, picture):
    """Mean softmax, float [C], of the eight flips and quarter turns of a picture uint8 [S,S,3], by numpy."""
    net, info = models.load_checkpoint(file)
    p = []
    for turned in (picture, picture[:, ::-1]):
        for turns in range(4):
            pixels = np.rot90(turned, turns).transpose(2, 0, 1) / 255
            pixels = (pixels - np.reshape(info["mean"], (3, 1, 1))) / np.reshape(info["std"], (3, 1, 1))
            with torch.inference_mode():
                logits = net.eval()(torch.tensor(pixels[None], dtype=torch.float32))[0].numpy()
            p.append(scipy.special.softmax(logits.astype(float)))
    assert np.ptp(p, axis=0).max() > 0.001, "the views differ"
    return np.mean(p, 0)


def test_tta_averages_probabilities_and_not_logits():
    """Of a linear network, whose logits differ much between the views, turned and flipped by hand."""
    torch.manual_seed(0)
    net, images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3)), torch.randn(2, 3, 8, 8)
    net[1].weight.data *= 5
    views = [images, images.rot90(1, (2, 3)), images.rot90(2, (2, 3)), images.rot90(3, (2, 3))]
    views += [images.flip(2), images.flip(3), images.transpose(2, 3), images.flip(2, 3).transpose(2, 3)]
    logits = np.array([net(view).detach().numpy() for view in views], float)
    p = predict.predict_batch(net, images, tta=True)
    assert p == pytest.approx(scipy.special.softmax(logits, 2).mean(0), abs=1e-6)
    assert abs(p - scipy.special.softmax(logits.mean(0), 1)).max() > 0.05
    plain = predict.predict_batch(net, images, tta=False)
    assert plain == pytest.approx(scipy.special.softmax(logits[0], 1), abs=1e-6)


def test_tta_is_the_mean_probability_of_eight_views(trained, tmp_path):
    """Of new images, and of two networks."""
    runs, cells = trained
    copy_cells(cells, cells.paths[:3], tmp_path / "new")
    shutil.copytree(runs, tmp_path / "runs")
    both = [checkpoint(tmp_path / "runs", fold) for fold in (0, 1)]
    for file in both:
        put_lively_network(file, len(cells.classes))
    options = ("--images", tmp_path / "new", "--out", tmp_path / "out", "--no-heatmaps", "--tta")
    command("--checkpoint", *both, *options)
    for row in read(tmp_path / "out/predictions.csv"):
        picture = datasets.resize(cells[list(cells.paths).index(row["path"])], 64)
        expected = np.mean([mean_of_eight(file, picture) for file in both], 0)
        assert numbers(row, cells) == pytest.approx(expected, abs=2e-6)


def test_tta_of_a_study_stands_beside_its_predictions(trained, tmp_path, capsys):
    """The same images, labels and columns in the same order; a copy called fold0_old is no fold."""
    runs, cells = trained
    shutil.copytree(runs, tmp_path / "runs")
    folder = checkpoint(tmp_path / "runs", 0).parents[1]
    shutil.copytree(folder / "fold0", folder / "fold0_old")
    for fold in (0, 1):
        put_lively_network(folder / f"fold{fold}/best.pt", len(cells.classes))
    options = ("--model", "shufflenet_v2_x0_5", "--init", "random", "--runs", tmp_path / "runs", "--tta")
    command(*options)
    written = [folder / f"fold{fold}" / "predictions_tta.csv" for fold in (0, 1)]
    assert capsys.readouterr().out.splitlines() == list(map(str, written))
    for fold in (0, 1):
        plain, rows = read(folder / f"fold{fold}/predictions.csv"), read(written[fold])
        assert list(rows[0]) == list(plain[0])
        assert [(row["path"], row["label"]) for row in rows] == [(row["path"], row["label"]) for row in plain]
        picture = datasets.resize(cells[list(cells.paths).index(rows[5]["path"])], 64)
        p = numbers(rows[5], cells)
        assert p == pytest.approx(mean_of_eight(folder / f"fold{fold}/best.pt", picture), abs=2e-6)
        assert rows[5]["prediction"] == cells.classes[np.argmax(p)]
    assert "--data" in refusal(*options, "--data", cells.root.parent.parent / "cd")


# ---------------------------------------------------------------- bad input
def test_bad_input_is_one_line(trained, tmp_path, capsys):
    runs, cells = trained
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.jpg").write_text("no image")
    options, good = (
        ("--images", cells.root, "--out", out),
        ("--checkpoint", checkpoint(runs, 0), "--out", out),
    )
    assert "no image found" in refusal(*good, "--images", tmp_path / "empty")
    assert "no such folder" in refusal(*good, "--images", tmp_path / "no")
    assert "none of 1 images" in refusal(*good, "--images", tmp_path / "bad")
    torch.save({"epoch": 3, "state_dict": {}}, tmp_path / "lightning.ckpt")
    assert "no checkpoint of ours" in refusal("--checkpoint", tmp_path / "lightning.ckpt", *options)
    assert "No such file" in refusal("--checkpoint", tmp_path / "none.pt", *options)
    content = models.read_checkpoint(checkpoint(runs, 1))
    torch.save(content | {"classes": content["classes"][::-1]}, tmp_path / "other.pt")
    message = refusal("--checkpoint", checkpoint(runs, 0), tmp_path / "other.pt", *options)
    assert "other.pt: of different classes" in message
    assert not out.exists()
    for args in ((), ("--checkpoint", "best.pt"), ("--model", "resnet18", "--init", "random")):
        with pytest.raises(SystemExit) as caught:
            command(*args)
        assert caught.value.code == 2


def test_pictures_that_an_earlier_call_wrote_among_the_images_are_no_images(trained, tmp_path):
    runs, cells = trained
    copy_cells(cells, cells.paths[:3], tmp_path / "new")
    options = "--checkpoint", checkpoint(runs, 0), "--images", tmp_path / "new", "--out"
    for _ in range(2):
        command(*options, tmp_path / "new/out")
        assert [row["path"] for row in read(tmp_path / "new/out/predictions.csv")] == sorted(cells.paths[:3])
    assert "the images' own folder" in refusal(*options, tmp_path / "new/../new")
