"""Images of single cells: reading three kinds of data sets, augmentation, batches, statistics and integrity check.

    python datasets.py --data data/bm              # counts, sizes, channel mean and std, unreadable files, duplicates
    python datasets.py --data data/bm data/cd data/pcam

A data set is one folder: PatchCamelyon's HDF5 files, a COCO detection set (each box becomes one image), or a folder
of class folders. To copy this file into another project is enough to use open_dataset, Batches and loader there.
"""
import argparse
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import io
import json
import math
import os
import pathlib
import re
import shutil
import signal
import threading
import sys
import warnings

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")
# class order of Table 5; other data sets are in alphabetical order
BM_CLASSES = ("NGB NGS LYT MON EOS BAS MMZ MYB PMO BLA PLM KSC OTH ART NIF PEB EBO HAC ABE LYI FGC").split()
PAPER = {  # Tables 1 and 2: images, classes, channel mean, channel std
    "bm": (171374, 21, (0.5630, 0.4959, 0.7353), (0.2421, 0.2835, 0.1767)),
    "cd": (48587, 11, (0.7255, 0.7826, 0.8270), (0.2705, 0.2380, 0.1834)),
    "pcam": (262144, 2, (0.7008, 0.5384, 0.6916), (0.2350, 0.2774, 0.2129)),
}
SOURCES = {
    "bm": "get Bone-Marrow-Cytomorphology_MLL_Helmholtz_Fraunhofer from TCIA (doi.org/10.7937/TCIA.AXH3-T579, 6.8 GB, IBM Aspera) "
          "and unpack it there",
    "cd": "get the Comparison Detector data set (github.com/kuku-sichuan/ComparisonDetector) and unpack it there",
    "pcam": "get PatchCamelyon's six HDF5 files (github.com/basveeling/pcam) and unpack them there",
}
PARTS = {"train", "training", "test", "testing", "val", "valid", "validation", "images", "annotations"}  # no classes if all are such
STATISTICS_SIZE = 224  # pixels; means and stds are taken after the resize of section 2.3, whatever --image-size
CROP_SCALE, CROP_RATIO, ROTATION = (0.08, 1.0), (0.75, 4 / 3), 180.0  # section 2.3; the ratio's 1.33 as torchvision's 4/3
DRAWS = 32  # random numbers that belong to one position of an epoch: 10 crop attempts of 2, place, angle, 2 flips, spare
UNREADABLE = ("not an image that can be decoded", "an empty file", "No such file")  # read_image's words for a file gone bad
SHOWN = 50  # unreadable files, and groups of duplicates, that are printed (PatchCamelyon has thousands)
FLAT = "a colour channel has one value in all images: its standard deviation is taken as 1"
WORKER_TIMEOUT = 600  # seconds without a batch after which a data worker counts as hanging


# ---------------------------------------------------------------- images
def read_image(file):
    """Decode an image file to uint8 RGB [H,W,3]: grey, palette, alpha, CMYK and 16 bits become 8-bit RGB, turned by EXIF.

    Raises ValueError with one line if it cannot be read. OpenCV bears some damage: check_dataset judges strictly.
    """
    try:
        with open(file, "rb", buffering=0) as handle:
            data = np.frombuffer(handle.read(), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    except (OSError, cv2.error) as error:
        raise ValueError(f"{file}: {str(error).splitlines()[0]}") from None
    if image is None:
        raise ValueError(f"{file}: {'not an image that can be decoded' if data.size else 'an empty file'}")
    return image


def resize(image, size, width=None):
    """Bilinear resize, antialiased on down-scaling, of uint8 [H,W,3] to [size,width or size,3]; aspect ratio not kept."""
    planes = torch.from_numpy(np.ascontiguousarray(image)[None]).permute(0, 3, 1, 2)  # so torch sees channels_last: twice as fast
    out = torch.nn.functional.interpolate(planes, (size, width or size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(out.permute(0, 2, 3, 1)[0].numpy())


def uniforms(seed, fold, epoch, first, count):
    """Random numbers in [0,1), float64 [count, DRAWS], of the positions first, first+1, ... of one epoch's order.

    Counter-based (Philox), so that a position's numbers do not depend on who draws them or together with which others.
    """
    bits = np.random.Philox(key=[seed, fold], counter=[first * DRAWS // 4, epoch, 0, 2])
    return np.random.Generator(bits).random((count, DRAWS))


def draw_crop(height, width, draws):
    """Random resized crop's box (top, left, height, width) in pixels as torchvision draws it, from uniform numbers."""
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    for attempt in range(10):
        area = height * width * (CROP_SCALE[0] + (CROP_SCALE[1] - CROP_SCALE[0]) * draws[2 * attempt])
        ratio = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draws[20] * (height - h + 1)), int(draws[21] * (width - w + 1)), h, w
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])  # the largest central crop of an allowed ratio
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))
    return (height - h) // 2, (width - w) // 2, h, w


def warp(image, size, box, angle, flip_x=False, flip_y=False, out=None):
    """Crop uint8 [H,W,3] to box, resize to size, rotate by angle (degrees, counter-clockwise) and flip, in one warp.

    Returns uint8 [size,size,3] (out, if given); corners that the rotation uncovers are black (section 2.3). Crops larger than size
    are first shrunk with antialiasing. Four channels, since OpenCV's warp of four takes half the time of three's.
    """
    top, left, h, w = box
    image = image[top:top + h, left:left + w]
    if h > size or w > size:
        h, w = min(h, size), min(w, size)
        image = resize(image, h, w)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    fx, fy = (-1 if flip_x else 1), (-1 if flip_y else 1)
    linear = np.array([[cos * fx * w, -sin * fy * w], [sin * fx * h, cos * fy * h]]) / size
    shift = np.array([(w - 1) / 2, (h - 1) / 2]) - linear.sum(1) * (size - 1) / 2
    warped = cv2.warpAffine(cv2.cvtColor(image, cv2.COLOR_RGB2RGBA), np.column_stack([linear, shift]), (size, size),
                            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB, dst=out)


def augment(image, size, draws, crop=True, out=None):
    """The paper's augmentation (2.3) of uint8 [H,W,3] to [size,size,3] from DRAWS uniform numbers; no crop in pre-training."""
    height, width = image.shape[:2]
    box = draw_crop(height, width, draws) if crop else (0, 0, height, width)
    return warp(image, size, box, ROTATION * draws[22], draws[23] < 0.5, draws[24] < 0.5, out)


def normalise(images, mean, std):
    """uint8 [N,3,H,W] to float32 on the same device: (x/255 - mean) / std per channel."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32, device=images.device).view(3, 1, 1) for v in (mean, std))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


# ---------------------------------------------------------------- data sets
class Cells:
    """A data set's index: classes (list of str), targets (int64 [N]), paths (str array [N], relative to root), notes.

    [i] is image i as uint8 RGB [H,W,3]. Arrays, not lists: reference counts would copy every page into every worker.
    """

    def __init__(self, root, name, classes, paths, targets, notes=(), read=None):
        self.root, self.name, self.classes, self.notes = pathlib.Path(root), name, list(classes), list(notes)
        self.paths, self.targets = np.asarray(paths, dtype=np.str_), np.asarray(targets, np.int64)
        self.read = read or functools.partial(read_below, str(root))

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.read(str(self.paths[index]))

    def subset(self, indices):
        """The images at indices (integers or a mask), of the same classes."""
        return Cells(self.root, self.name, self.classes, self.paths[indices], self.targets[indices], self.notes, self.read)


def read_below(root, path):
    """read_image of root/path."""
    return read_image(f"{root}/{path}")


def open_dataset(path):
    """Open a folder as Cells: PCam's HDF5 files, COCO detection (*.json), else class folders. SystemExit says what's wrong."""
    folder = pathlib.Path(path)
    if not str(path) or not folder.is_dir():  # Path("") is the current folder
        source = SOURCES.get(folder.name, "put the data set there or name its folder with --data")
        raise SystemExit(f"{path or repr(path)}: {'a file, not a' if folder.is_file() else 'no such'} folder; {source} (to see it all on "
                         "synthetic cells: bash run_all.sh --demo)")
    name = folder.resolve().name
    try:
        folder = descend(folder, (*IMAGE_TYPES, ".json", ".h5", ".gz"))[0]
        if any(folder.glob("camelyonpatch_level_2_split_*.h5")):
            return open_pcam(folder, name)
        if any(folder.glob("camelyonpatch_level_2_split_*.h5.gz")):
            raise SystemExit(f"{folder}: PatchCamelyon's files are still packed; unpack them: gunzip {folder}/*.gz")
        coco = {file: content for file in sorted(folder.glob("*.json")) if (content := read_coco(file))}
        if coco:
            return open_classes(*crop_coco(folder, coco), name)
        return open_classes(folder, [], name)
    except OSError as error:
        raise SystemExit(f"{error.filename or folder}: {error.strerror or error}; make it readable (and writable, for"
                         " the crops of a COCO set)") from None


def find_images(folder, above=()):
    """Relative paths of the image files below folder, at any depth, sorted; hidden ones left out, loops of links cut.

    above: (device, inode) of further folders that a link must not lead to.
    """
    found, pending = [], [("", above)]
    while pending:
        here, above = pending.pop()
        state = os.stat(os.path.join(folder, here))
        if (state.st_dev, state.st_ino) in above:
            continue
        above += ((state.st_dev, state.st_ino),)
        for entry in os.scandir(os.path.join(folder, here)):
            if not entry.name.startswith("."):
                if is_folder(entry):
                    pending.append((f"{here}{entry.name}/", above))
                elif entry.name.lower().endswith(IMAGE_TYPES):
                    found.append(here + entry.name)
    return sorted(found)


def is_folder(entry):
    """Is an os.DirEntry a folder, or a link to one? False, and no error, for a link to itself."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def descend(folder, endings):
    """Go down while a folder holds one subfolder and no file of these endings: (folder, names of its subfolders, number of such files)."""
    root, seen = pathlib.Path(folder), set()
    while True:
        visible = [e for e in os.scandir(root) if not e.name.startswith((".", "__MACOSX"))]
        below = sorted(e.name for e in visible if is_folder(e))
        files = sum(not is_folder(e) and e.name.lower().endswith(endings) for e in visible)
        if len(below) != 1 or files or root.resolve() in seen:
            return root, below, files
        seen.add(root.resolve())
        root = root / below[0]


def open_classes(folder, notes, name):
    """A folder of class folders, however deep: goes down while a folder holds one subfolder and no image."""
    root, below, stray = descend(folder, IMAGE_TYPES)
    above = tuple((state.st_dev, state.st_ino) for state in map(os.stat, (root, *root.resolve().parents)))
    images = {label: find_images(root / label, above) for label in below}
    classes = [label for label in below if images[label]]
    notes = list(notes) + [f"class folder {label} holds no image: left out" for label in below if not images[label]]
    if stray:
        notes.append(f"{stray} images lie in {root} outside any class folder: left out")
    if len(classes) < 2:
        raise SystemExit(f"{folder}: {len(classes)} class folder(s) with images and {stray} images outside any found (in {root}), "
                         "at least 2 are needed: one folder a class, holding jpg, png, bmp or tif files")
    if {label.lower() for label in classes} <= PARTS:
        raise SystemExit(f"{root}: {' and '.join(classes)} are parts of a data set, not classes; name one of them, or put the JSON files of a "
                         "COCO set beside its image folders")
    if set(classes) <= set(BM_CLASSES):
        classes.sort(key=BM_CLASSES.index)
    paths = [f"{label}/{image}" for label in classes for image in images[label]]
    return Cells(root, name, classes, paths, np.repeat(np.arange(len(classes)), [len(images[c]) for c in classes]), notes)


def read_coco(file):
    """The content of a COCO detection JSON, or None for any other JSON file."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise SystemExit(f"{file}: not valid JSON ({error}); fetch it again or remove it") from None
    return content if isinstance(content, dict) and {"images", "annotations", "categories"} <= set(content) else None


def crop_coco(folder, coco):
    """Crop every box of a COCO set once to .crops/<class>/<image>_<box id>.png. Returns (folder of crops, notes)."""
    digest = hashlib.sha256(json.dumps(list(coco.values()), sort_keys=True).encode()).hexdigest()
    done, part = folder / ".crops" / ".done.json", folder / f".crops.{digest[:12]}.part"

    def finished():
        state = read_json(done) if done.exists() else {}
        return state.get("digest") == digest and not any(find_image(folder, *miss) for miss in state["missing"])
    if finished():  # before the lock, which a folder that is read only has no place for
        return done.parent, read_json(done)["notes"]
    with file_lock(folder / ".crops.lock"):
        if finished():
            return done.parent, read_json(done)["notes"]
        try:
            boxes, dropped, missing = collect_boxes(folder, coco)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SystemExit(f"{', '.join(map(str, coco))}: no COCO detection set as it should be ({type(error).__name__}: {error}); "
                             "fetch it again") from None
        if not boxes:
            why = "; ".join(f"{count}: {reason}" for reason, count in dropped.items()) or "there is none"
            raise SystemExit(f"{', '.join(map(str, coco))}: no box can be cropped ({why}); the image folders belong beside the JSON files")
        for (image, where), cells in tqdm(boxes.items(), desc=f"{folder}: cropping cells", unit="image", disable=None):
            if all((part / cell).exists() for cell, _ in cells):
                continue
            try:
                picture = read_image(where)
            except ValueError:
                dropped["in an image that cannot be read; once it is mended, remove .crops"] += len(cells)
                continue
            for cell, (x, y, w, h) in cells:
                crop = picture[max(0, round(y)):max(0, round(y + h)), max(0, round(x)):max(0, round(x + w))]
                if min(crop.shape[:2]) < 2:
                    dropped["outside the image"] += 1
                    continue
                with open_atomic(part / cell) as handle:
                    handle.write(cv2.imencode(".png", crop[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1])
        notes = [f"{count} boxes dropped: {why}" for why, count in sorted(dropped.items())]
        if missing:
            notes.append(f"{len(missing)} images of the JSON files are missing, e.g. {missing[0][1]}: their boxes are left out")
        with open_atomic(part / ".done.json", "w") as handle:
            json.dump({"digest": digest, "missing": missing, "notes": notes}, handle)
        if done.parent.exists():
            old = folder / f".crops.old.{os.getpid()}"
            os.rename(done.parent, old)
            os.rename(part, done.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(part, done.parent)
    return done.parent, notes


def find_image(folder, json_stem, file_name):
    """Where an image of a COCO file lies: below the root, or in a folder named as the JSON file or 'images'; else None."""
    for place in (folder, folder / json_stem, folder / "images", folder / json_stem / "images"):
        if (place / file_name).is_file():
            return place / file_name
    return None


def collect_boxes(folder, coco):
    """Sort the boxes of COCO files: ({(image, file): [(crop's path, box)]}, dropped counts, [(json stem, missing image)])."""
    boxes, dropped, missing, taken = collections.defaultdict(list), collections.Counter(), [], set()
    owner, first = {}, {}  # the picture that has a name; the JSON file that has a box
    for file, content in coco.items():
        names = {c["id"]: str(c["name"]).replace("/", "-").strip(". ") or "unnamed" for c in content["categories"]}
        images = {i["id"]: i["file_name"] for i in content["images"]}
        where = {i: find_image(folder, file.stem, name) for i, name in images.items()}
        missing += [(file.stem, images[i]) for i, place in where.items() if place is None]
        for box in content["annotations"]:
            label, place, area = names.get(box["category_id"]), where.get(box["image_id"]), box.get("bbox") or [0] * 4
            if label is None or box["image_id"] not in images:
                dropped[f"of an unknown {'category' if label is None else 'image'}"] += 1
            elif place is None:
                dropped["their image is missing"] += 1
            elif len(area) != 4 or not all(map(math.isfinite, area)) or min(area[2:]) <= 1:
                dropped["width or height of 1 or less, no cell"] += 1
            else:
                image = str(pathlib.PurePath(images[box["image_id"]]).with_suffix("")).replace("/", "-")
                number = re.sub("[/_]", "-", str(box["id"]))  # what follows the last _: pretrain.py keeps crops of one image together
                if owner.setdefault(image, place) != place:  # another picture of that name
                    image = f"{file.stem}-{image}"
                cell = f"{label}/{image}_{number}.png"
                if cell in taken:
                    cell = f"{label}/{image}_{number}-2.png"
                if first.setdefault((place, label, *area), file) is not file:
                    dropped["also in another JSON file"] += 1
                elif cell in taken:
                    dropped["a third box of the same id"] += 1
                else:
                    taken.add(cell)
                    boxes[image, str(place)].append((cell, area))
    return boxes, dropped, missing


def open_pcam(folder, name):
    """PatchCamelyon's HDF5 files; paths are train/17, valid/3, test/5. The labels are read once, patches on demand."""
    import h5py
    paths, targets = [], []
    for part in ("train", "valid", "test"):
        files = [folder / f"camelyonpatch_level_2_split_{part}_{kind}.h5" for kind in "xy"]
        if part == "test" and not any(file.exists() for file in files):
            continue  # nothing here uses the test part
        try:
            with h5py.File(files[0]) as x, h5py.File(files[1]) as y:
                labels, shape = y["y"][()].reshape(-1), x["x"].shape
        except (OSError, KeyError, AttributeError, TypeError) as error:
            gone = [f"{file.name} is missing" for file in files if not file.exists()]
            raise SystemExit(f"{folder}: the {part} part cannot be read ({(gone or str(error).splitlines())[0]}); fetch "
                             f"{files[0].name} and {files[1].name} again, unpacked") from None
        if shape[1:] != (96, 96, 3) or len(labels) != shape[0]:
            raise SystemExit(f"{files[0]}: {shape} patches and {len(labels)} labels; expected [N,96,96,3] and as many labels")
        paths += [f"{part}/{i}" for i in range(len(labels))]
        targets.append(labels)
    targets = np.concatenate(targets)
    if set(np.unique(targets)) != {0, 1}:
        raise SystemExit(f"{folder}: labels {np.unique(targets)[:5]} in the y files; expected 0 and 1")
    return Cells(folder, name, ["normal", "tumour"], paths, targets, read=PcamReader(str(folder)))


class PcamReader:
    """Reads 'train/17' as uint8 RGB [96,96,3]; each process opens the HDF5 files itself (h5py handles don't survive a fork)."""

    def __init__(self, folder):
        self.folder, self.files = folder, {}

    def __call__(self, path):
        import h5py
        part, index = path.split("/")
        key = os.getpid(), part
        try:
            if key not in self.files:
                self.files[key] = h5py.File(f"{self.folder}/camelyonpatch_level_2_split_{part}_x.h5", "r")["x"]
            return self.files[key][int(index)]
        except OSError as error:
            raise ValueError(f"{self.folder}, patch {path}: {str(error).splitlines()[0]}") from None

    def __getstate__(self):
        return {"folder": self.folder, "files": {}}


# ---------------------------------------------------------------- batches
class Batches(torch.utils.data.Dataset):
    """Batches of Cells: (uint8 [B,3,size,size] in channels_last, int64 labels [B]), for a loader without collation.

    A batch's key comes with the sampler: (epoch, first position, indices) is augmented, plain indices are only resized.
    (An attribute set on a data set never reaches persistent workers.)
    """

    def __init__(self, cells, size, seed=0, fold=0, crop=True):
        self.cells, self.size, self.seed, self.fold, self.crop = cells, size, seed, fold, crop

    def __getitems__(self, key):
        epoch, first, indices = key if isinstance(key, tuple) else (None, None, key)
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        if epoch is None:
            for image, index in zip(images, indices):
                image[:] = resize(self.cells[index], self.size)
        else:
            draws = uniforms(self.seed, self.fold, epoch, first, len(indices))
            for image, index, numbers in zip(images, indices, draws):
                augment(self.cells[index], self.size, numbers, self.crop, out=image)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.cells.targets[indices])


class BalancedEpochs(torch.utils.data.Sampler):
    """Keys of an epoch's training batches: all classes equally likely, with replacement (weighted sampling by 1/count).

    Set .epoch before iterating; the order depends on (seed, fold, epoch) alone, len(targets) draws rounded up to whole
    batches. Of each batch a rank takes its contiguous share.
    """

    def __init__(self, targets, batch_size, seed=0, fold=0, rank=0, ranks=1):
        order = np.argsort(targets, kind="stable")
        self.classes = np.split(order, np.flatnonzero(np.diff(np.asarray(targets)[order])) + 1)
        self.batch_size, self.seed, self.fold, self.epoch = batch_size, seed, fold, 1
        self.rank, self.share, self.batches = rank, batch_size // ranks, -(-len(order) // batch_size)

    def __len__(self):
        return self.batches

    def draw(self):
        """The epoch's order: int64 [batches * batch_size] indices."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, self.fold], counter=[0, self.epoch, 0, 1]))
        label, place = generator.random((2, self.batches * self.batch_size))
        sizes = np.array([len(members) for members in self.classes])
        label = (label * len(sizes)).astype(np.int64)
        start = np.cumsum(sizes) - sizes
        return np.concatenate(self.classes)[start[label] + (place * sizes[label]).astype(np.int64)]

    def __iter__(self):
        order = self.draw()
        for first in range(self.rank * self.share, len(order), self.batch_size):
            yield self.epoch, first, order[first:first + self.share]


class Loader(torch.utils.data.DataLoader):
    """DataLoader whose timeout, doubled, holds even if a worker stops while it hands over a batch, where PyTorch's does not look."""

    def __iter__(self):
        with limited(2 * self.timeout):
            batches = super().__iter__()
        return self.timely(batches)

    def timely(self, batches):
        while True:
            with limited(2 * self.timeout):
                batch = next(batches, None)
            if batch is None:
                return
            yield batch


@contextlib.contextmanager
def limited(seconds):
    """RuntimeError if what is done inside takes longer (0: no limit; signals, hence the limit, reach the main thread alone)."""
    def late(*_):
        raise RuntimeError(f"DataLoader timed out after {seconds:.0f} seconds: a worker hangs")
    if not seconds or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def loader(batches, sampler, workers=0, pin=False):
    """DataLoader over Batches: sampler yields the keys; persistent workers; results do not depend on their number."""
    return Loader(batches, batch_sampler=sampler, num_workers=workers, collate_fn=unchanged, pin_memory=pin, persistent_workers=workers > 0,
                  timeout=WORKER_TIMEOUT if workers else 0, worker_init_fn=quiet_worker)


def unchanged(batch):
    """The batch as it is: Batches collates itself."""
    return batch


def quiet_worker(_):
    """Data workers: one thread each, and Ctrl-C is the main process's business."""
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # a batch that nobody fetches any more is no news (what goes wrong in reading comes another way)


# ---------------------------------------------------------------- statistics and integrity
@contextlib.contextmanager
def file_lock(file):
    """Wait for an exclusive lock on file (created, never removed), so that two processes don't make the same thing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        fcntl.lockf(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def open_atomic(file, mode="wb"):
    """Open a file to write so that it appears whole or not at all: written beside, flushed, renamed."""
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_name(f".{file.name[:200]}.{os.getpid()}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "errors": "surrogateescape", "newline": ""}
    try:
        with open(beside, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def read_json(file):
    """The dict that a JSON file of ours holds; SystemExit with one line if it is damaged."""
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise SystemExit(f"{file}: damaged ({error}); remove it, and it is made anew") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{file}: damaged (no JSON object); remove it, and it is made anew")
    return content


def fingerprint(cells):
    """SHA-256 over paths, labels and file sizes (of PCam: the files'), so it is the same on a copy elsewhere."""
    digest = hashlib.sha256(repr(cells.classes).encode())
    digest.update("\0".join(cells.paths).encode(errors="surrogateescape") + cells.targets.tobytes())
    files = sorted(cells.root.glob("*_[xy].h5")) if isinstance(cells.read, PcamReader) else [f"{cells.root}/{p}" for p in cells.paths]
    digest.update(np.array([os.stat(f).st_size if os.path.exists(f) else -1 for f in files], np.int64).tobytes())
    return digest.hexdigest()


def inspect(cells, index):
    """One image, judged strictly: (why it is unreadable or None, digest of its content, (height, width), histogram [3,256])."""
    file = cells.root / str(cells.paths[index])
    try:
        if isinstance(cells.read, PcamReader):
            image = cells[index]
            content = image.tobytes()
        else:
            content = file.read_bytes()
            Image.open(io.BytesIO(content)).load()  # raises on a file cut short, which OpenCV may decode
            image = cells[index]
    except Exception as error:  # Pillow's decoders raise all sorts
        text = str(error).split(" <_io.")[0].splitlines()  # without the address of a buffer
        return f"{type(error).__name__}: {text[0] if text else 'unreadable'}", None, None, None
    small = resize(image, STATISTICS_SIZE)
    histogram = [np.bincount(small[..., channel].ravel(), minlength=256) for channel in range(3)]
    return None, hashlib.sha1(content).digest(), image.shape[:2], np.array(histogram)


def check_dataset(cells, runs="runs", workers=None):
    """One pass over a data set, kept as <runs>/data/<name>.json; made again when files have come, gone or changed size.

    Returns a dict: fingerprint, classes, counts, mean and std (per channel, of pixels in [0,1] after the resize to 224,
    each readable image counting equally; PCam: its training patches), sizes, unreadable [[path, why]], duplicates
    [[paths of equal content]], across_classes (how many of those differ in class), notes. Exact sums of integers: the
    same on any machine, in constant memory.
    """
    file, stamp = pathlib.Path(runs) / "data" / f"{cells.name}.json", fingerprint(cells)
    with file_lock(file.with_suffix(".lock")):
        info = read_json(file) if file.exists() else {}
        if info.get("fingerprint") == stamp and {"mean", "std", "counts", "sizes", "unreadable", "duplicates", "notes"} <= set(info):
            return info
        total, unreadable, sizes, same = np.zeros((3, 256), np.int64), [], collections.Counter(), {}
        bar = tqdm(total=len(cells), desc=f"checking {cells.name}", unit="image", disable=None)
        with warnings.catch_warnings(), concurrent.futures.ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # here, since warning filters belong to all threads
            for start in range(0, len(cells), 1024):
                block = range(start, min(start + 1024, len(cells)))
                for index, (why, digest, shape, histogram) in zip(block, pool.map(functools.partial(inspect, cells), block)):
                    path = str(cells.paths[index])
                    if why:
                        unreadable.append([path, why])
                        continue
                    same.setdefault(digest, []).append(index)
                    sizes["{1}x{0}".format(*shape)] += 1
                    if not path.startswith(("valid/", "test/")) or not isinstance(cells.read, PcamReader):
                        total += histogram
                bar.update(len(block))
        if len(unreadable) == len(cells):
            raise SystemExit(f"{cells.root}: none of {len(cells)} images can be read, e.g. {unreadable[0][0]} ({unreadable[0][1]})")
        groups = [group for group in same.values() if len(group) > 1]
        level, pixels = np.arange(256) / 255, total.sum(1)
        mean = total @ level / pixels
        variance = total @ level**2 / pixels - mean**2
        flat = variance < 1e-9  # one value in all images, e.g. an empty channel: normalised to 0, not to NaN
        info = {"name": cells.name, "root": str(cells.root), "fingerprint": stamp, "classes": cells.classes,
                "counts": np.bincount(cells.targets, minlength=len(cells.classes)).tolist(), "mean": mean.tolist(),
                "std": np.sqrt(np.where(flat, 1, variance)).tolist(), "sizes": dict(sizes.most_common()),
                "unreadable": unreadable, "notes": cells.notes + [FLAT] * bool(flat.any()),
                "duplicates": [[str(cells.paths[i]) for i in group] for group in groups],
                "across_classes": sum(len(set(cells.targets[group])) > 1 for group in groups)}
        with open_atomic(file, "w") as handle:
            json.dump(info, handle, indent=1)
    return info


def describe(info):
    """Tables 1 and 2 of one data set as text, with the paper's values beside where it has any."""
    images, classes, mean, std = PAPER.get(info["name"], (None, None, None, None))
    beside = (lambda text: f"   (paper: {text})") if images else (lambda text: "")
    common = ", ".join(f"{size} ({count:,})" for size, count in list(info["sizes"].items())[:3])
    lines = [f"{info['name']} ({info['root']})",
             f"  images    {sum(info['counts']):,}" + beside(f"{images or 0:,}{' for training' * (info['name'] == 'pcam')}"),
             f"  classes   {len(info['classes'])}" + beside(classes),
             "            " + ", ".join(f"{label} {count:,}" for label, count in zip(info["classes"], info["counts"])),
             f"  pixels    {common}{', ...' if len(info['sizes']) > 3 else ''}"]
    for channel, colour in enumerate(("red", "green", "blue")):
        lines.append(f"  {colour:9s} {info['mean'][channel]:.4f} ± {info['std'][channel]:.4f}"
                     + (beside(f"{mean[channel]:.4f} ± {std[channel]:.4f}") if images else ""))
    lines.append(f"  unreadable {len(info['unreadable'])}, exact duplicates {len(info['duplicates'])} groups, "
                 f"{info['across_classes']} of them across classes")
    for found in ([f"unreadable, left out: {path} ({why})" for path, why in info["unreadable"]],
                  [f"the same image: {', '.join(group)}" for group in info["duplicates"]]):
        lines += [f"    {line}" for line in found[:SHOWN]]
        lines += [f"    ... and {len(found) - SHOWN} more, see data/{info['name']}.json in the folder of --runs"] * (len(found) > SHOWN)
    return "\n".join(lines + [f"  note: {note}" for note in info["notes"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["data/bm"], help="folders of data sets")
    parser.add_argument("--runs", default="runs", help="folder that keeps what was found, as data/<name>.json")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # folders may have any name
    for folder in args.data:
        cells = open_dataset(folder)
        try:
            print(describe(check_dataset(cells, args.runs)))
        except OSError as error:
            raise SystemExit(f"{error.filename or args.runs}: {error.strerror or error}; name a folder to write to with --runs") from None


if __name__ == "__main__":
    main()
