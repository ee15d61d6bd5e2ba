"""Reading images: whatever an image file holds becomes RGB uint8, whatever it is called; what cannot be read
is found, counted, left out.

Truth comes from the NumPy arrays that the files were made of, from Pillow's decoder and its exif_transpose
where a format loses something, and from files written here byte by byte (PNG and TIFF of 16
bits a channel, a picture of 90 million pixels).
"""

import errno
import os
import shutil
import struct
import sys
import warnings
import zlib

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import crop_boxes
import datasets
import evaluate
import train

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (4, 5, 3), np.uint8)
COLOURS = cv2.resize(COLOURS, (40, 32), interpolation=cv2.INTER_CUBIC)  # [32,40,3], smooth
GREY = COLOURS[..., 1].copy()
ALPHA = RNG.integers(0, 256, GREY.shape, np.uint8)
DEEP = RNG.integers(0, 65536, COLOURS.shape, np.uint16)
PICTURE = Image.fromarray(COLOURS)
PALETTE = PICTURE.quantize(50)
FIFTY = np.reshape(PALETTE.getpalette(), (-1, 3))[np.asarray(PALETTE)]  # what its numbers stand for
INKS = np.dstack([255 - COLOURS, GREY // 3])  # cyan, magenta, yellow, black
INKED = np.rint((255.0 - INKS[..., :3]) * (255 - INKS[..., 3:]) / 255)  # in RGB


def three(grey):
    """Grey [H,W] as RGB."""
    return np.repeat(np.asarray(grey, np.uint8)[..., None], 3, 2)


def png(width, height, depth, kind, rows):
    """A PNG file's bytes: bits a sample, colour type, and the rows' bytes, each after a 0 for 'not
    filtered'."""

    def chunk(name, content):
        check = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def deep_png():
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in DEEP)
    return png(40, 32, 16, 2, rows)


def deep_tiff():
    """Little-endian, uncompressed, three samples of 16 bits, one strip."""
    tags = [(256, 3, 1, 40), (257, 3, 1, 32), (258, 3, 3, 8), (259, 3, 1, 1), (262, 3, 1, 2), (273, 4, 1, 14)]
    tags += [(277, 3, 1, 3), (278, 3, 1, 32), (279, 4, 1, DEEP.nbytes)]
    start = struct.pack("<2sHI3H", b"II", 42, 14 + DEEP.nbytes, 16, 16, 16) + DEEP.astype("<u2").tobytes()
    tags = [struct.pack("<HHII", *tag) for tag in tags]
    return start + struct.pack("<H", len(tags)) + b"".join(tags) + bytes(4)


def saved(image, **options):
    """Writes a Pillow image with these options."""
    return lambda file: image.save(file, **options)


def bytes_of(content):
    return lambda file: file.write_bytes(content)


def with_alpha(image, alpha):
    image = image.copy()
    image.putalpha(alpha)
    return image


# ---------------------------------------------------------------- kinds of pictures
BITS, OTHERS = Image.fromarray(GREY > 127), [Image.new("RGB", (40, 32)), PICTURE.rotate(180)]
SEEN = ALPHA[..., None] / 255
TRANSPARENT = np.where(np.asarray(PALETTE)[..., None] == 3, 0, FIFTY)
CLEAR, CLEAR_GREY = (with_alpha(image, Image.fromarray(ALPHA)) for image in (PICTURE, Image.fromarray(GREY)))
DEEP_GREY = Image.fromarray(DEEP[..., 0])
KINDS = {  # how it is written, what it shows, tolerance: one level for rounding, more for CMYK and JPEG
    "lzw.tiff": (saved(PICTURE, compression="tiff_lzw"), COLOURS, 0),
    "deflate.tif": (saved(PICTURE, compression="tiff_adobe_deflate"), COLOURS, 0),
    "transparent palette.png": (saved(PALETTE, transparency=3), TRANSPARENT, 0),
    "alpha.bmp": (saved(CLEAR), COLOURS, 0),
    "opaque.tif": (saved(with_alpha(PICTURE, 255)), COLOURS, 0),
    "one pixel.png": (saved(PICTURE.crop((3, 4, 4, 5))), COLOURS[4:5, 3:4], 0),
    "one row.png": (saved(PICTURE.crop((0, 4, 40, 5))), COLOURS[4:5], 0),
    "animated.png": (saved(PICTURE, save_all=True, append_images=OTHERS), COLOURS, 0),
    "pages.tif": (saved(PICTURE, save_all=True, append_images=OTHERS), COLOURS, 0),
    "a PNG.jpg": (saved(PICTURE, format="png"), COLOURS, 0),
    "a BMP.tif": (saved(PICTURE, format="bmp"), COLOURS, 0),
    "alpha.png": (saved(CLEAR), COLOURS * SEEN, 1),
    "alpha.tif": (saved(CLEAR), COLOURS * SEEN, 1),
    "alpha.webp": (saved(CLEAR, lossless=True), COLOURS * SEEN, 1),
    "grey and alpha.png": (saved(CLEAR_GREY), three(GREY) * SEEN, 1),
    "gif.gif": (saved(PALETTE), FIFTY, 0),
    "lossless.webp": (saved(PICTURE, lossless=True), COLOURS, 0),
    "jpeg.jfif": (saved(PICTURE, format="jpeg", quality=95), COLOURS, 16),
    "jpeg.jpe": (saved(PICTURE, format="jpeg", quality=95), COLOURS, 16),
    "jpeg 2000.jp2": (saved(PICTURE), COLOURS, 1),
    "map.ppm": (saved(PICTURE), COLOURS, 0),
    "map.pgm": (saved(Image.fromarray(GREY)), three(GREY), 0),
    "deep grey.png": (saved(DEEP_GREY), three(DEEP[..., 0] // 256), 1),
    "deep grey.tif": (saved(DEEP_GREY), three(DEEP[..., 0] // 256), 1),
    "deep.png": (bytes_of(deep_png()), DEEP // 256, 1),
    "deep.tif": (bytes_of(deep_tiff()), DEEP // 256, 1),
    "cmyk.tif": (saved(Image.fromarray(INKS, "CMYK")), INKED, 2),
    "colour.jpg": (saved(PICTURE, quality=95), COLOURS, 16),
    "progressive.jpeg": (saved(PICTURE, quality=95, progressive=True), COLOURS, 16),
    "grey.jpg": (saved(Image.fromarray(GREY), quality=95), three(GREY), 8),
    "cmyk.jpg": (saved(Image.fromarray(INKS, "CMYK"), quality=98), INKED, 16),
}
for ending in ("png", "bmp", "tif"):
    KINDS[f"colour.{ending}"] = saved(PICTURE), COLOURS, 0
    KINDS[f"grey.{ending}"] = saved(Image.fromarray(GREY)), three(GREY), 0
    KINDS[f"bits.{ending}"] = saved(BITS), three((GREY > 127) * 255), 0
    KINDS[f"palette.{ending}"] = saved(PALETTE), FIFTY, 0


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_picture_becomes_rgb_uint8(tmp_path, name):
    """What is transparent is black, of an animation and of several pages the first counts, the content
    decides and not the ending."""
    write, expected, tolerance = KINDS[name]
    write(tmp_path / name)
    image = datasets.read_image(tmp_path / name)
    assert image.dtype == np.uint8 and image.shape == expected.shape and image.flags.c_contiguous
    assert np.abs(image.astype(int) - expected).max() <= tolerance
    assert datasets.find_images(tmp_path) == ([name], [])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif"])
def test_a_picture_is_turned_as_its_exif_says(tmp_path, ending, orientation):
    """All eight orientations, on four quarters of different colour, against Pillow's exif_transpose."""
    quarters = np.array([[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (240, 240, 240)]], np.uint8)
    quarters = quarters.repeat(16, 0).repeat(24, 1)
    exif, file = Image.Exif(), tmp_path / f"turned.{ending}"
    exif[0x112] = orientation
    options = {"quality": 95, "subsampling": 0} if ending == "jpg" else {}
    Image.fromarray(quarters).save(file, exif=exif, **options)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    assert expected.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    assert np.abs(datasets.read_image(file) - expected).max() <= 2
    if orientation == 6:  # a camera held upright: what was left is above
        assert np.abs(expected[5, 5] - (10, 10, 250)).max() < 10


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.webp", "palette.png", "palette.gif", "colour.tif"])
def test_what_is_transparent_is_black_in_every_format(tmp_path, name):
    """Noise under alpha 0, which formats keep or not: the network sees black; the rest stays. Half is shown
    at half."""
    alpha = np.full(GREY.shape, 255, np.uint8)
    alpha[:, :10], alpha[:, 10:20] = 0, 0 if "palette" in name else 128
    picture = with_alpha(PALETTE.convert("RGB"), Image.fromarray(alpha))
    if "palette" in name:
        numbers = np.where(alpha == 0, 60, np.asarray(PALETTE)).astype(np.uint8)
        picture = Image.fromarray(numbers, "P")
        picture.putpalette(PALETTE.getpalette()[:150] + [77, 88, 99] * 20)
        picture.save(tmp_path / name, transparency=60)
    else:
        picture.save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
    image = datasets.read_image(tmp_path / name).astype(int)
    assert (image[:, :10] == 0).all() and np.array_equal(image[:, 20:], FIFTY[:, 20:])
    if "palette" not in name:
        assert np.abs(image[:, 10:20] - FIFTY[:, 10:20] * 128 / 255).max() <= 1
    good(tmp_path / "mine")
    shutil.copy(tmp_path / name, tmp_path / "mine/A")
    assert check(tmp_path / "mine", tmp_path / "runs")["notes"] == [
        f"1 images have an alpha channel: what is transparent is black, e.g. A/{name}"
    ]


@pytest.mark.parametrize("bits, ending", [(8, "png"), (10, "png"), (12, "tif"), (14, "tif"), (16, "png")])
def test_sixteen_bits_are_scaled_by_the_files_own_depth(tmp_path, bits, ending):
    """A microscope's 12 bits in a file of 16 become 256 grey levels, not 16; the pass says which depths it
    found."""
    deep = (DEEP >> (16 - bits)).astype(np.uint16)
    deep[0, 0] = 2**bits - 1
    good(tmp_path / "mine")
    assert cv2.imwrite(str(tmp_path / f"mine/A/deep.{ending}"), deep[..., ::-1])
    assert np.array_equal(datasets.read_image(tmp_path / f"mine/A/deep.{ending}"), deep >> (bits - 8))
    assert check(tmp_path / "mine", tmp_path / "runs")["notes"] == [
        f"1 images hold {bits} bits a channel in 16, of which the upper 8 are read, e.g. A/deep.{ending}"
    ]


@pytest.mark.parametrize("name", ["pages.tif", "animated.png"])
def test_several_pages_are_counted_aloud(tmp_path, name):
    """A page a channel, say: one note with the number of such files, in the pass and in training."""
    good(tmp_path / "mine")
    for i in range(3):
        KINDS[name][0](tmp_path / f"mine/B/{i}{name}")
    info = check(tmp_path / "mine", tmp_path / "runs")
    assert info["notes"] == [f"3 images hold several pages, of which the first is read, e.g. B/0{name}"]
    assert f"note: {info['notes'][0]}" in datasets.describe(info)


def test_files_that_are_not_read_are_counted_aloud(tmp_path, monkeypatch, capsys):
    """Per ending, whatever they are; the count is there although an earlier pass is kept, and costs no new
    one."""
    good(tmp_path / "mine")
    assert check(tmp_path / "mine", tmp_path / "runs")["notes"] == []
    names = "A/1.heic A/2.HEIC B/deep/3.svs B/4.avif B/read_me.txt A/.5.heic B/@eaDir/6.heic"
    put(tmp_path / "mine", names.split())
    note = "5 files left out: 2 *.heic, 1 *.avif, 1 *.svs, 1 *.txt"
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "inspect", None)
        assert check(tmp_path / "mine", tmp_path / "runs")["notes"] == [note]
    datasets.open_checked(tmp_path / "mine", tmp_path / "runs")
    assert note in capsys.readouterr().err


def test_all_types_that_are_read_are_read_by_both_decoders(tmp_path):
    """Written by Pillow, read by Pillow and OpenCV to the same pixels."""
    for ending in datasets.IMAGE_TYPES:
        grey = PICTURE.convert({".pbm": "1", ".pgm": "L"}.get(ending, "RGB"))
        grey.save(tmp_path / f"a{ending}", **({"quality": 95} if ending in (".jfif", ".jpe") else {}))
        with Image.open(tmp_path / f"a{ending}") as image:
            theirs = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(datasets.read_image(tmp_path / f"a{ending}") - theirs).max() <= 1, ending


# ---------------------------------------------------------------- names and folders
NAMES = "plain.jpg UPPER.JPG Mixed.JpEg p.PNG b.Bmp t.TIF t.Tiff it's.png #1.png per%20cent.png".split()
NAMES += (
    "back\\slash.png star*[1]?.png äöü-細胞.png e\u0301.png \u00e9.png {0}.png $HOME.png -flag.png".split()
)
NAMES += ["with space .png", "comma, too.png", 'a "quoted" one.png', "new\nline.png", "tab\t.png", " .png"]
NAMES += ["no text \udcff\udce4.png", "double.jpg.png"]


def put(folder, names, content=b"x"):
    """Files of these names and this content below a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def shade(i):
    """A grey picture that tells its number."""
    return np.full((9, 9, 3), (5 * i + 20) % 256, np.uint8)


@pytest.fixture
def named(tmp_path):
    """Data set in a folder of an odd name, of two classes of odd names, with all NAMES in each; (root,
    classes)."""
    root, classes = tmp_path / "da[ta] #1, é\udcfa", ['A, "b"\n', "cl\udce9ß"]
    for label in classes:
        (root / label).mkdir(parents=True)
        for i, name in enumerate(NAMES):
            (root / label / name).write_bytes(cv2.imencode(".png", shade(i))[1].tobytes())
    return root, classes


def test_files_of_every_name_are_found_and_read(named):
    root, classes = named
    cells = datasets.open_dataset(root)
    assert cells.classes == sorted(classes) and len(cells) == 2 * len(NAMES)
    assert sorted(cells.paths.tolist()) == sorted(f"{label}/{name}" for label in classes for name in NAMES)
    for i, path in enumerate(cells.paths.tolist()):
        label, name = path.split("/")
        assert cells.classes[cells.targets[i]] == label
        assert np.array_equal(cells[i], shade(NAMES.index(name))), path


def test_names_that_are_no_text_are_printed_all_the_same(named, tmp_path, monkeypatch, capsys):
    """The terminal takes UTF-8 alone: what is none comes as an escape. Duplicates across the two classes name
    every file."""
    argv = ["datasets.py", "--data", str(named[0]), "--runs", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", argv)
    datasets.main()
    out = capsys.readouterr().out
    assert f"exact duplicates {len(NAMES)} groups, {len(NAMES)} of them across classes" in out
    assert "cl\\udce9ß/äöü-細胞.png" in out and "no text \\udcff\\udce4.png" in out


def test_training_on_files_of_every_name(named, tmp_path, monkeypatch, capsys):
    """From the folder to predictions.csv and best.pt, all names are those of the disk."""
    root, classes = named
    options = "--model shufflenet_v2_x0_5 --init random --fold 0 --image-size 32 --device cpu --workers 0"
    argv = ["train.py", "--data", str(root), "--runs", str(tmp_path / "runs"), *options.split()]
    monkeypatch.setattr(sys, "argv", [*argv, *"--lr 0.01 --epochs 1".split()])
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # as run_main and Python do
    assert not train.main()
    assert "cl\\udce9ß" in capsys.readouterr().out
    folder = tmp_path / "runs/train/shufflenet_v2_x0_5/random/fold0"
    read = [evaluate.read_predictions(folder / name) for name in ("predictions.csv", "val_predictions.csv")]
    assert sorted(classes) == sorted(read[0].classes)
    assert sorted(classes) == torch.load(folder / "best.pt", weights_only=True)["classes"]
    tested = [path for part in read for path in part.paths]
    assert len(set(tested)) == len(tested) == round(0.36 * 2 * len(NAMES))
    assert all((root / path).is_file() for path in tested)


def test_what_is_no_cell_is_not_taken_for_one(tmp_path):
    """Hidden files and folders, stray files, empty classes; folders may end like files."""
    keep = ["A/1.png", "A/deeper/still/2.jpg", "A/folder.png/3.png", "B/1.png"]
    drop = "A/.hidden.png A/._1.png .trash/1.png A/.thumbs/1.png A/Thumbs.db A/readme.txt B/1.png.part B/png"
    drop += " B/notes.csv list.txt stray.png also_stray.JPG .DS_Store"
    put(tmp_path / "mine", keep + drop.split())
    for name in ("empty", "hollow/deeper"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    cells = datasets.open_dataset(tmp_path / "mine")
    assert cells.paths.tolist() == keep and cells.classes == ["A", "B"]
    assert cells.targets.tolist() == [0, 0, 0, 1]
    notes = "\n".join(cells.notes)
    left = "8 files left out: 2 *.txt, 1 ./*.jpg, 1 ./*.png, 1 *.db, 1 *.part, 1 *.csv, 1 without an ending"
    assert len(cells.notes) == 3 and cells.notes[2] == left
    assert "class folder empty holds no image" in notes and "class folder hollow holds no image" in notes


def test_a_class_that_is_a_link_to_nowhere_is_no_silent_loss(tmp_path):
    good(tmp_path / "mine")
    (tmp_path / "mine/C").symlink_to(tmp_path / "not mounted")
    with pytest.raises(SystemExit, match="mine/C: a link that leads nowhere"):
        datasets.open_dataset(tmp_path / "mine")


def test_a_tiff_in_which_zero_is_white_is_read_as_what_it_shows(tmp_path):
    """In 16 bits as in 8: tag 262 (PhotometricInterpretation) 0, TIFF 6.0; Pillow turns 8 bits itself on
    writing."""
    shown = np.linspace(20, 230, 64 * 64).reshape(64, 64)
    deep = (65535 - np.round(257 * shown)).astype(np.uint16)
    for bits, stored in ((8, np.round(shown).astype(np.uint8)), (16, deep)):
        Image.fromarray(stored).save(tmp_path / "white.tif", tiffinfo={262: 0})
        with Image.open(tmp_path / "white.tif") as image:
            assert image.tag_v2[262] == 0
        assert abs(datasets.read_image(tmp_path / "white.tif")[..., 0] - shown).max() <= 1.1, bits


def test_links_in_a_loop_end_and_give_no_class_the_images_of_another(tmp_path):
    """To the folder itself, the class, the data set, above it; by name and through another folder. A link to
    elsewhere is followed."""
    root = tmp_path / "mine"
    put(tmp_path, ["mine/A/in/1.png", "mine/B/in/1.png", "elsewhere/2.png"])
    links = {"A/in/self": ".", "A/in/class": "..", "A/in/set": root, "A/in/above": tmp_path, "B/up": "../.."}
    links |= {"loop": ".", "B/far": tmp_path / "elsewhere", "A/3.png": "../../elsewhere/2.png"}
    links |= {"A/in/round": "../round", "A/round": "in/round"}
    for place, target in links.items():
        (root / place).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to(root)
    cells = datasets.open_dataset(root)
    assert cells.paths.tolist() == ["A/3.png", "A/in/1.png", "B/far/2.png", "B/in/1.png"]
    empty = "class folder loop holds no image: left out"
    assert cells.notes == [empty, "2 files left out: 2 without an ending"]
    (tmp_path / "linked").symlink_to(root)  # the data set by another name
    assert datasets.open_dataset(tmp_path / "linked").paths.tolist() == cells.paths.tolist()


def test_system_folders_and_our_own_output_are_no_data(tmp_path, without_rights, capsys):
    """Thumbnails, recycle bins, an unreadable lost+found, and `--data .` beside a runs folder; also for new
    images."""
    folder, context = without_rights
    good(folder / "mine")
    names = "A/@eaDir/good_0.png/SYNOPHOTO_THUMB_M.jpg $RECYCLE.BIN/x/1.png #recycle/1.png lost+found/1.png"
    names += " A/Thumbs/1.png A/.thumbnails/1.png __MACOSX/A/._1.png seen/1.png seen/predictions.csv"
    names += " runs/train/resnet18/random/fold0/1.png runs/results/1.png"
    put(folder / "mine", names.split(), cv2.imencode(".png", shade(1))[1].tobytes())
    (folder / "mine/lost+found").chmod(0)
    with context():
        cells = datasets.open_dataset(folder / "mine")
        assert datasets.find_images(folder / "mine")[0] == sorted(cells.paths.tolist())
    assert cells.classes == ["A", "B"] and len(cells) == 6
    assert cells.notes == [
        "2 files left out: 1 output of these scripts (runs/), 1 output of these scripts (seen/)"
    ]
    (folder / "mine/lost+found").chmod(0o755)


def test_runs_beside_the_data_at_the_second_start(tmp_path, monkeypatch, capsys):
    """python datasets.py --data . --runs runs, twice, with a result's picture in runs: it is no class."""
    good(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["datasets.py", "--data", ".", "--runs", "runs"])
    datasets.main()
    (tmp_path / "runs/results").mkdir()
    PICTURE.save(tmp_path / "runs/results/overlaps.png")
    datasets.main()
    out = capsys.readouterr().out
    assert out.count("classes   2\n") == 2 and out.count("1 output of these scripts (runs/)") == 1


# ---------------------------------------------------------------- what cannot be read
# 11 KB that become 271 MB of RGB; Pillow warns from 89,478,485 pixels on
BOMB = png(9500, 9500, 1, 0, bytes(1189 * 9500))


def good(folder, number=6):
    """Two classes of pictures."""
    for i in range(number):
        (folder / "AB"[i % 2]).mkdir(parents=True, exist_ok=True)
        (folder / "AB"[i % 2] / f"good {i}.png").write_bytes(cv2.imencode(".png", shade(i))[1].tobytes())


def check(folder, runs, **options):
    """The pass over a data set."""
    return datasets.check_dataset(datasets.open_dataset(folder), runs, **options)


@pytest.mark.parametrize("ending", ["jpg", "png", "bmp", "tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_a_file_cut_anywhere_is_found(tmp_path, ending, share):
    """Of noise, so that the last twentieth holds pixels."""
    good(tmp_path / "mine")
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / f"mine/A/cut.{ending}")
    content = (tmp_path / f"mine/A/cut.{ending}").read_bytes()
    assert check(tmp_path / "mine", tmp_path / "runs")["unreadable"] == []
    (tmp_path / f"mine/A/cut.{ending}").write_bytes(content[: int(share * len(content))])
    ((path, _),) = check(tmp_path / "mine", tmp_path / "runs")["unreadable"]
    assert path == f"A/cut.{ending}"


def test_damage_that_opencv_bears_is_found(tmp_path):
    """A byte in the middle of a compressed TIFF: OpenCV gives an array, Pillow an error."""
    good(tmp_path / "mine")
    noise = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8))
    noise.save(tmp_path / "mine/A/damaged.tif", compression="tiff_adobe_deflate")
    content = bytearray((tmp_path / "mine/A/damaged.tif").read_bytes())
    content[len(content) // 2] ^= 255
    (tmp_path / "mine/A/damaged.tif").write_bytes(content)
    assert datasets.read_image(tmp_path / "mine/A/damaged.tif").shape == (64, 64, 3)
    ((path, why),) = check(tmp_path / "mine", tmp_path / "runs")["unreadable"]
    assert path == "A/damaged.tif" and "decoder error" in why


def test_pictures_of_too_many_pixels_are_left_out_whichever_thread_meets_them(tmp_path):
    """A third of 300 files are bombs, looked at by 8 threads at once; the warnings of the program are as
    before."""
    good(tmp_path / "mine", 200)
    bombs = [f"{'AB'[i % 2]}/good {2 * i}~.png" for i in range(100)]
    put(tmp_path / "mine", bombs, BOMB)
    filters = list(warnings.filters)
    info = check(tmp_path / "mine", tmp_path / "runs", workers=8)
    assert sorted(path for path, _ in info["unreadable"]) == sorted(bombs)
    assert all("90250000 pixels" in why for _, why in info["unreadable"])
    assert warnings.filters == filters


def test_a_file_that_the_system_does_not_give_is_no_damage(tmp_path, without_rights, monkeypatch):
    """A link to nothing or to itself, missing rights, a stale handle: one line that names it, and nothing is
    kept.

    Once it is whole, the very same call finds every image. Nor may boxes be left out for it when they are
    cropped.
    """
    folder, context = without_rights
    good(folder / "mine")
    (folder / "runs").mkdir(mode=0o777)
    (folder / "runs").chmod(0o777)
    reasons = {"gone.png": "No such file", "link.png": "Too many levels", None: "Permission denied"}
    for target, why in reasons.items():
        file = folder / "mine/A/link.png"
        file.unlink(missing_ok=True)
        file.symlink_to(target) if target else file.touch(mode=0)
        with context(), pytest.raises(SystemExit, match=rf"^[^\n]*mine/A/link.png: {why}[^\n]*$"):
            check(folder / "mine", folder / "runs")
        with context(), pytest.raises(OSError, match=why) as refused:
            datasets.read_image(file)
        assert refused.value.filename == str(file)
    shutil.copy(folder / "mine/A/good 0.png", folder / "mine/A/other.png")
    os.replace(folder / "mine/A/other.png", file)

    def read_stale(file):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), file)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "read_file", read_stale)
        with pytest.raises(SystemExit, match=r"^[^\n]*Stale file handle[^\n]*$"):
            check(folder / "mine", folder / "runs")
        patch.setattr(crop_boxes, "read_image", read_stale)
        with pytest.raises(OSError, match="Stale"):
            crop_boxes.open_picture(file, 9, 9)
    assert not list(folder.glob("runs/data/*.json"))
    assert check(folder / "mine", folder / "runs")["unreadable"] == []


def test_a_class_folder_without_rights_ends_the_run(without_rights):
    """Its images would be missed."""
    folder, context = without_rights
    good(folder / "mine")
    (folder / "mine/B").chmod(0)
    try:
        with context(), pytest.raises(SystemExit, match=r"^[^\n]*mine/B: Permission denied[^\n]*$"):
            datasets.open_dataset(folder / "mine")
    finally:
        (folder / "mine/B").chmod(0o755)


def test_files_that_hold_no_picture_are_left_out(tmp_path):
    """A picture of 32-bit numbers and an empty file; a pass that says the same each time."""
    good(tmp_path / "mine")
    numbers = np.random.default_rng(0).random((9, 9)).astype(np.float32)
    Image.fromarray(numbers).save(tmp_path / "mine/B/f.tif")
    (tmp_path / "mine/B/empty.png").touch()
    info = check(tmp_path / "mine", tmp_path / "runs")
    assert [path for path, _ in info["unreadable"]] == ["B/empty.png", "B/f.tif"]
    assert check(tmp_path / "mine", tmp_path / "again")["unreadable"] == info["unreadable"]
    with pytest.raises(ValueError, match=r"^[^\n]*B/empty.png: an empty file$"):
        datasets.read_image(tmp_path / "mine/B/empty.png")


def test_a_class_of_which_nothing_can_be_read_ends_the_run(tmp_path):
    """Git LFS's pointers in place of pictures: two classes are needed after reading, not before."""
    good(tmp_path / "mine")
    put(tmp_path / "mine", [f"C/{i}.jpg" for i in range(4)], b"version https://git-lfs.github.com/spec/v1\n")
    message = r"^[^\n]*none of the 4 images of class C can be read, e.g. C/0.jpg[^\n]*$"
    with pytest.raises(SystemExit, match=message):
        check(tmp_path / "mine", tmp_path / "runs")
    assert not (tmp_path / "runs/data/mine.json").exists()
    PICTURE.save(tmp_path / "mine/C/0.jpg")
    assert len(check(tmp_path / "mine", tmp_path / "runs")["unreadable"]) == 3


def test_training_names_what_it_leaves_out(tmp_path, capsys):
    """Seven files of 20: five by name and reason, the others by number; the cells that remain keep class and
    order."""
    good(tmp_path / "mine", 13)
    for i in range(7):
        (tmp_path / f"mine/A/broken {i}.png").write_bytes(b"x" * i)
    cells, _info = datasets.open_checked(tmp_path / "mine", tmp_path / "runs")
    said = capsys.readouterr().err.splitlines()
    assert [f"broken {i}.png cannot be read" in line for i, line in zip(range(5), said)] == [True] * 5
    assert len(said) == 6 and "7 unreadable images" in said[5] and "mine.json; remove it to look" in said[5]
    numbers = (0, 10, 12, 2, 4, 6, 8, 1, 11, 3, 5, 7, 9)
    kept = [f"{'AB'[i % 2]}/good {i}.png" for i in numbers]
    assert cells.paths.tolist() == kept and cells.targets.tolist() == [0] * 7 + [1] * 6
    assert all(np.array_equal(cells[i], shade(int(path[7:-4]))) for i, path in enumerate(kept))


def test_names_that_are_almost_the_same_are_named(tmp_path):
    """Folders that differ in case and blanks, files in two Unicode forms: two classes and two images, but
    said."""
    names = [
        "HSIL/1.png",
        "hsil/1.png",
        "h sil /1.png",
        "B/e\u0301.png",
        "B/\u00e9.png",
        "B/E.png",
        "B/e.png",
    ]
    put(tmp_path / "mine", names)
    cells = datasets.open_dataset(tmp_path / "mine")
    assert len(cells.classes) == 4 and len(cells) == 7
    assert cells.notes == [
        "names that are almost the same: 'HSIL', 'h sil ', 'hsil'",
        r"names that are almost the same: 'B/e\u0301.png', 'B/\xe9.png'",
    ]
