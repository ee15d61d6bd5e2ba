"""Images of single cells: data sets, augmentation, batches, statistics and integrity check.

    python datasets.py --data data/bm data/cd   # counts, sizes, mean and std, unreadable files, duplicates

A data set is a folder, a pattern or a table: what they mean, and how to add a format, stands in layouts.py.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import copy
import errno
import fcntl
import functools
import hashlib
import io
import json
import math
import multiprocessing
import os
import pathlib
import signal
import sys
import threading
import warnings

os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # we say ourselves which image cannot be read
import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

IMAGE_TYPES = tuple(".jpg .jpeg .jpe .jfif .png .bmp .tif .tiff .webp .gif .jp2 .j2k .ppm .pgm .pbm".split())
SYSTEM = "__macosx @eadir @recycle @tmp #recycle #snapshot $recycle.bin lost+found thumbs thumbnails".split()
OUTPUT = ["split.csv", "overlaps.csv", "predictions.csv", "data/*.json", "train/*/*/fold*", "pretrain/*/*/*"]
# Tables 1 and 2: images, classes, (counts and sizes are not printed,) channel mean ± std of red, green, blue
PAPER = {
    "bm": ("171,374", 21, "", "", "0.5630 ± 0.2421", "0.4959 ± 0.2835", "0.7353 ± 0.1767"),
    "cd": ("48,587", 11, "", "", "0.7255 ± 0.2705", "0.7826 ± 0.2380", "0.8270 ± 0.1834"),
    "pcam": ("262,144 for training", 2, "", "", "0.7008 ± 0.2350", "0.5384 ± 0.2774", "0.6916 ± 0.2129"),
}
STATISTICS_SIZE = 224  # pixels; means and stds are taken after section 2.3's resize, whatever --image-size is
CROP_SCALE, CROP_RATIO, ROTATION = (0.08, 1.0), (0.75, 4 / 3), 180.0  # section 2.3; 1.33 as torchvision's 4/3
ORDER, AUGMENTATION = 1, 2  # begin the keys of random streams, since numpy pads short keys with zeros
SHOWN = 50  # unreadable files, and groups of duplicates, that are printed (PatchCamelyon has thousands)


# ---------------------------------------------------------------- images
def read_image(file, turn=True):
    """Decode an image file to uint8 RGB [H,W,3], turned as its EXIF says; ValueError if it is damaged.

    Transparent pixels become black; of several pages the first is read. 16 bits are scaled by the file's
    depth: the smallest of 8, 10, 12, 14, 16 bits that holds its brightest value. A file that the system does
    not give is no damage: OSError with its name.
    """
    content = read_file(file)
    try:
        return decode(np.frombuffer(content, np.uint8), turn)[0]
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def read_file(file):
    """A file's bytes; an OSError always has its name."""
    try:
        with open(file, "rb", buffering=0) as handle:  # half the time of np.fromfile
            return handle.read()
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(file)) from None


def decode(data, turn=True):
    """read_image of a file's bytes, uint8 [N]: (image, [what about it the user should know])."""
    if not data.size:
        raise ValueError("an empty file")
    image, notes, flags = None, [], 0 if turn else cv2.IMREAD_IGNORE_ORIENTATION
    jpeg = data[:2].tobytes() == b"\xff\xd8"
    with contextlib.suppress(OSError, cv2.error):
        picture = None if jpeg else Image.open(io.BytesIO(data))  # which looks at the header alone
        if getattr(picture, "n_frames", 1) > 1:
            notes.append("hold several pages, of which the first is read")
        if picture and ("transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La")):
            notes.append("have an alpha channel: what is transparent is black")
            picture = ImageOps.exif_transpose(picture) if turn else picture
            colours, alpha = np.split(np.asarray(picture.convert("RGBA")), [3], axis=2)
            image = np.uint8(np.rint(colours * (alpha / 255)))
        elif jpeg:
            image = cv2.imdecode(data, flags | cv2.IMREAD_COLOR_RGB)
        else:  # OpenCV swaps the colours of RGB in 16 bits
            image = cv2.imdecode(data, flags | cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
            if image.dtype == np.uint16 and getattr(picture, "tag_v2", {}).get(262) == 0:
                image = 65535 - image  # WhiteIsZero, which OpenCV turns in 8 bits alone
    if image is not None and image.dtype == np.uint16:
        depth = next(bits for bits in (8, 10, 12, 14, 16) if image.max() < 2**bits)
        notes.append(f"hold {depth} bits a channel in 16, of which the upper 8 are read")
        image = np.uint8(image >> (depth - 8))
    if image is None or image.dtype != np.uint8:
        raise ValueError("not an image that can be decoded")
    return image, notes


def resize(image, size, width=None):
    """Bilinear resize of uint8 [H,W,3] to [size,width or size,3], antialiased, aspect ratio not kept."""
    planes = torch.from_numpy(np.ascontiguousarray(image))  # [None] by torch: of numpy's, channels_last and
    planes = planes[None].permute(0, 3, 1, 2)  # its speed are not recognised, since that has a stride of 0
    out = torch.nn.functional.interpolate(planes, (size, width or size), mode="bilinear", antialias=True)
    return np.ascontiguousarray(out.permute(0, 2, 3, 1)[0].numpy())


def draw_crop(height, width, rng):
    """Random resized crop's box (top, left, height, width) in pixels, distributed as torchvision's."""
    for _ in range(10):
        area = height * width * rng.uniform(*CROP_SCALE)
        ratio = math.exp(rng.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    ratio = min(max(width / height, CROP_RATIO[0]), CROP_RATIO[1])
    w, h = min(width, round(height * ratio)), min(height, round(width / ratio))  # the largest central crop
    return (height - h) // 2, (width - w) // 2, h, w


def warp(image, size, box, angle, flip_x=False, flip_y=False):
    """Crop uint8 [H,W,3] to box, resize, rotate (degrees, counter-clockwise) and flip, in one warp.

    Returns uint8 [size,size,3]; uncovered corners are black (2.3); larger crops are shrunk antialiased.
    """
    top, left, h, w = box
    image = image[top : top + h, left : left + w]
    if h > size or w > size:
        h, w = min(h, size), min(w, size)
        image = resize(image, h, w)
    cos, sin = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    fx, fy, middle = (-1 if flip_x else 1), (-1 if flip_y else 1), (size - 1) / 2
    a, b, c, d = cos * fx * w / size, -sin * fy * w / size, sin * fx * h / size, cos * fy * h / size
    matrix = np.array([[a, b, (w - 1) / 2 - (a + b) * middle], [c, d, (h - 1) / 2 - (c + d) * middle]])
    image = cv2.cvtColor(image, cv2.COLOR_RGB2RGBA)  # OpenCV warps four channels in half the time of three
    image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    return cv2.cvtColor(image, cv2.COLOR_RGBA2RGB)


def jitter(image, rng, colour):
    """Brightness, contrast, saturation and hue of uint8 RGB [H,W,3], each changed at random, in random order.

    Distributed as torchvision's ColorJitter(colour, colour, colour, colour), colour from 0 to 0.5.
    """
    for change in rng.permutation(["brightness", "contrast", "saturation", "hue"]):
        factor, grey = rng.uniform(1 - colour, 1 + colour), cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
        if change == "brightness":
            image = cv2.convertScaleAbs(image, alpha=factor)
        elif change == "contrast":
            image = cv2.addWeighted(image, factor, image, 0, (1 - factor) * grey.mean())
        elif change == "saturation":
            image = cv2.addWeighted(image, factor, cv2.cvtColor(grey, cv2.COLOR_GRAY2RGB), 1 - factor, 0)
        else:
            hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # hue in 256 steps, which wrap
            hsv[..., 0] += np.uint8(round(256 * (factor - 1)) % 256)
            image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)
    return image


def augment(image, size, rng, crop=True, colour=0.0):
    """The paper's augmentation (2.3) of uint8 RGB [H,W,3] to [size,size,3]; no crop in pre-training.

    colour: jitter's, which the paper does not have. rng (numpy's Generator) is of this image in this epoch
    alone: draw from it as often as you like.
    """
    height, width = image.shape[:2]
    box = draw_crop(height, width, rng) if crop else (0, 0, height, width)
    angle, flip_x, flip_y = rng.uniform(0, ROTATION), rng.random() < 0.5, rng.random() < 0.5
    if colour:  # before the rotation, whose corners stay black
        top, left, height, width = box
        image = jitter(image[top : top + height, left : left + width], rng, colour)
        box = (0, 0, height, width)
    return warp(image, size, box, angle, flip_x, flip_y)


def normalise(images, mean, std):
    """uint8 [N,3,H,W] to float32 on the same device: (x/255 - mean) / std per channel."""
    as_float = functools.partial(torch.as_tensor, dtype=torch.float32, device=images.device)
    mean, std = as_float(mean).view(3, 1, 1), as_float(std).view(3, 1, 1)
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


# ---------------------------------------------------------------- data sets
class Cells:
    """A data set's index; [i] is image i as uint8 RGB [H,W,3].

    targets int64 [N], paths str [N] relative to root, files str [N] absolute (None where read(path) gives
    images that are no files), groups str [N] that no split may tear or None, parts official "train", "val" or
    "test" [N] or None: arrays, since reference counts of lists would copy every page into every worker.
    source: the absolute folder, pattern or table that opens it again.
    """

    def __init__(
        self, root, name, classes, paths, targets, notes=(), read=None, files=None, groups=None, parts=None
    ):
        self.root, self.name, self.classes, self.notes = pathlib.Path(root), name, list(classes), list(notes)
        self.paths, self.targets, self.read = np.asarray(paths, np.str_), np.asarray(targets, np.int64), read
        self.source = os.path.abspath(root)
        if files is None and read is None:
            files = [os.path.join(self.source, path) for path in paths]
        columns = (files, groups, parts)
        self.files, self.groups, self.parts = [None if c is None else np.asarray(c, np.str_) for c in columns]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.read(str(self.paths[index])) if self.read else read_image(str(self.files[index]))

    def subset(self, indices):
        """The images at indices (integers or a mask), of the same classes."""
        cells = copy.copy(self)
        for name in ("paths", "targets", "files", "groups", "parts"):
            column = getattr(self, name)
            setattr(cells, name, None if column is None else column[indices])
        return cells


def open_dataset(path):
    """Open a folder, a pattern or a table as Cells (see layouts.py). SystemExit says why not."""
    import layouts  # Cells and batches do without the file

    return layouts.open_cells(str(path))


def list_folder(folder):
    """Names of a folder's (folders, files, folders made by these scripts), but no hidden and system ones."""
    names = [name for name in sorted(os.listdir(folder)) if name[0] != "." and name.lower() not in SYSTEM]
    below = [name for name in names if os.path.isdir(f"{folder}/{name}")]
    made = [name for name in below if any(any(pathlib.Path(folder, name).glob(some)) for some in OUTPUT)]
    return [name for name in below if name not in made], sorted({*names} - {*below}), made


def find_images(folder):
    """Sorted paths, relative to a folder, of the images below it, and of all else (output of ours: name/).

    Links are followed last, no folder is entered twice and none above this one: loops end.
    """
    images, others, pending, links, start = [], [], [""], [], pathlib.Path(folder)
    visited = {*map(os.path.realpath, start.absolute().parents), *map(str, start.resolve().parents)}
    while pending or links:
        inside = (pending or links).pop()
        real = os.path.realpath(start / inside)
        below, files, made = list_folder(real) if real not in visited else ([], [], [])
        visited.add(real)
        for name in below:
            (links if os.path.islink(f"{real}/{name}") else pending).append(f"{inside}{name}/")
        for name in files:
            (images if name.lower().endswith(IMAGE_TYPES) else others).append(inside + name)
        others += [f"{inside}{name}/" for name in made]
    return sorted(images), sorted(others)


# ---------------------------------------------------------------- batches
class Batches(torch.utils.data.Dataset):
    """Batches of Cells, collated: (uint8 [B,3,size,size] in channels_last, int64 labels [B]).

    The sampler gives a batch's key: (epoch, first position, indices) is augmented, plain indices are resized.
    (An attribute set on a data set never reaches persistent workers.)
    """

    def __init__(self, cells, size, seed=0, fold=0, crop=True, colour=0.0):
        self.cells, self.size, self.seed, self.fold = cells, size, seed, fold
        self.crop, self.colour = crop, colour

    def __getitems__(self, key):
        epoch, first, indices = key if isinstance(key, tuple) else (None, 0, key)
        images = np.empty((len(indices), self.size, self.size, 3), np.uint8)
        for position, index in enumerate(indices):
            if epoch is None:
                images[position] = resize(self.cells[index], self.size)
            else:
                rng = np.random.default_rng([AUGMENTATION, self.seed, self.fold, epoch, first + position])
                images[position] = augment(self.cells[index], self.size, rng, self.crop, self.colour)
        return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(self.cells.targets[indices])


class BalancedEpochs(torch.utils.data.Sampler):
    """Keys of an epoch's batches: classes equally likely, with replacement (weighted sampling by 1/count).

    Set .epoch before iterating; the order depends on (seed, fold, epoch) alone. An epoch has .batches whole
    batches, by default len(targets) draws, rounded up. Of each batch a rank takes its contiguous share.
    """

    def __init__(self, targets, batch_size, seed=0, fold=0, rank=0, ranks=1):
        self.images = np.argsort(targets, kind="stable")
        self.sizes = np.unique(targets, return_counts=True)[1]
        self.batch_size, self.seed, self.fold, self.epoch = batch_size, seed, fold, 1
        self.rank, self.share, self.batches = rank, batch_size // ranks, -(-len(targets) // batch_size)

    def __len__(self):
        return self.batches

    def __iter__(self):
        rng = np.random.default_rng([ORDER, self.seed, self.fold, self.epoch])
        label = rng.integers(len(self.sizes), size=self.batches * self.batch_size)
        order = self.images[np.cumsum(self.sizes)[label] - 1 - rng.integers(self.sizes[label])]
        for first in range(self.rank * self.share, len(order), self.batch_size):
            yield self.epoch, first, order[first : first + self.share]


def loader(batches, sampler, workers=0, pin=False):
    """DataLoader over Batches; sampler yields the keys. Results do not depend on the number of workers."""
    options = {"collate_fn": tuple, "pin_memory": pin, "num_workers": workers}
    if workers:
        options |= {"persistent_workers": True, "timeout": 600, "worker_init_fn": quiet_worker}
    return torch.utils.data.DataLoader(batches, batch_sampler=sampler, **options)


def quiet_worker(_):
    """Data workers: one thread each, never outlive the main process; Ctrl-C is its business alone."""
    cv2.setNumThreads(0)
    # PyTorch's own watch misses a parent that is killed while its worker starts
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = lambda *_: None  # tracebacks at shutdown are noise; reading errors come another way


# ---------------------------------------------------------------- files
@contextlib.contextmanager
def file_lock(file):
    """Wait for an exclusive lock on file (created, never removed); without locks it says so and goes on."""
    file = pathlib.Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            print(f"{file}: no locks on this file system ({error.strerror}); going without", file=sys.stderr)
        yield


@contextlib.contextmanager
def run_lock(folder):
    """Hold the lock of a run's folder; yields False if another process holds it. SystemExit without locks.

    By lockf: a flock would live on in data workers. Removes what a killed process left half written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as handle:
        ours = True
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink()
        except BlockingIOError:
            ours = False
        except OSError as error:
            why = f"cannot be locked ({error.strerror})"
            raise SystemExit(f"{handle.name}: {why}; name a --runs folder on a disk that has locks") from None
        yield ours


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
    """What a JSON file holds; SystemExit with one line if it is damaged."""
    try:
        return json.loads(pathlib.Path(file).read_bytes())
    except ValueError as error:
        advice = "remove it to have it made anew, or fetch it again if it is not of these scripts"
        raise SystemExit(f"{file}: damaged ({error}); {advice}") from None


# ---------------------------------------------------------------- statistics and integrity
def stamp(cells):
    """SHA-256 of what a pass depends on: place, paths, labels, parts, sizes and times of files.

    The files are those of the root where images are none. OSError names one that is not there.
    """
    digest = hashlib.sha256(repr((os.path.realpath(cells.root), cells.classes)).encode())
    for column in (cells.paths, cells.targets, cells.parts):
        digest.update("\0".join(map(str, () if column is None else column)).encode(errors="surrogateescape"))
    files = sorted(cells.root.glob("[!.]*.*")) if cells.files is None else cells.files
    states = [os.stat(file) for file in files]
    digest.update(np.array([(state.st_size, state.st_mtime_ns) for state in states], np.int64).tobytes())
    return digest.hexdigest()


def inspect(cells, index):
    """One image, judged strictly: (None or why not, SHA-1 of its file, picture, histogram [3,256], oddities).

    picture: (height, width, SHA-1 of the pixels). An OSError with a file's name is no damage, and is raised.
    """
    try:
        if cells.files is None:
            image, oddities = cells[index], []
            content = image.tobytes()
        else:
            content = read_file(str(cells.files[index]))
            Image.open(io.BytesIO(content)).load()  # raises on a file cut short, which OpenCV may decode
            image, oddities = decode(np.frombuffer(content, np.uint8))
    except Exception as error:  # Pillow's decoders raise all sorts, OSErrors without a name among them
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.filename):
            raise
        text = str(error).split(" <_io.")[0].splitlines()  # without the address of a buffer
        return f"{type(error).__name__}: {text[0] if text else 'unreadable'}", None, None, None, []
    small = resize(image, STATISTICS_SIZE)
    histogram = [np.bincount(small[..., channel].ravel(), minlength=256) for channel in range(3)]
    picture = *image.shape[:2], hashlib.sha1(image.tobytes()).digest()
    return None, hashlib.sha1(content).digest(), picture, np.array(histogram), oddities


def in_threads(function, items, text, unit, threads=None):
    """Yield function(item) for all items, in order, from as many threads as cores, with a progress bar."""
    bar = tqdm(total=len(items), desc=text, unit=unit, disable=None)
    with concurrent.futures.ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool, bar:
        for start in range(0, len(items), 256):  # since map keeps all results that wait
            for result in pool.map(function, items[start : start + 256]):
                yield result
                bar.update()


def inspect_all(cells, workers=None):
    """inspect's results in order, from several threads, with a progress bar."""
    work = functools.partial(inspect, cells)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)  # here: filters belong to all threads
        yield from in_threads(work, range(len(cells)), f"checking {cells.name}", "image", workers)


def check_dataset(cells, runs="runs", workers=None):
    """scan's dict, kept as <runs>/data/<name>.json; made again when a file's place, size or time changes.

    SystemExit if the system does not give a file, which is no damage, or if what is needed cannot be read.
    """
    file = pathlib.Path(runs) / "data" / f"{cells.name}.json"
    with file_lock(file.with_suffix(".lock")):
        info = read_json(file) if file.exists() else {}
        try:
            now = stamp(cells)
            if info.get("stamp") != now:
                if info.get("root", str(cells.root)) != str(cells.root):
                    print(f"{file}: is of {info['root']}, now of {cells.root}", file=sys.stderr)
                info = scan(cells, workers) | {"stamp": now}
        except OSError as error:
            why = f"{error.filename or cells.root}: {error.strerror or error}"
            raise SystemExit(f"{why}; no damage that can be left out: put it right and start again") from None
        if info.get("notes") != cells.notes + info["oddities"]:
            info["notes"] = cells.notes + info["oddities"]
            with open_atomic(file, "w") as handle:
                json.dump(info, handle, indent=1)
    return info


def scan(cells, workers=None):
    """One pass over a data set.

    Returns a dict: fingerprint (of labels, paths, contents), classes, counts, mean and std (per channel, of
    resized pixels in [0,1], each readable image counting equally; of official parts, train's), sizes,
    unreadable [[path, why]], oddities, duplicates [[paths of equal pixels]], across_classes (how many of them
    differ in class). SystemExit if all images of a class are unreadable.
    """
    total, unreadable, sizes = np.zeros((3, 256), np.int64), [], collections.Counter()  # exact sums
    same, odd = collections.defaultdict(list), collections.defaultdict(list)
    contents = hashlib.sha256(repr([cells.classes, cells.targets.tolist()]).encode())
    for index, (why, digest, picture, histogram, oddities) in enumerate(inspect_all(cells, workers)):
        contents.update(cells.paths[index].encode(errors="surrogateescape") + b"\0" + (digest or b""))
        if why:
            unreadable.append([str(cells.paths[index]), why])
            continue
        same[picture].append(index)
        sizes["{1}x{0}".format(*picture)] += 1
        for what in oddities:
            odd[what].append(index)
        if cells.parts is None or cells.parts[index] == "train":
            total += histogram
    counts = np.bincount(cells.targets, minlength=len(cells.classes))
    gone = np.isin(cells.paths, [path for path, _ in unreadable])
    lost = np.bincount(cells.targets[gone], minlength=len(counts))
    for label in np.flatnonzero((lost == counts) & (counts > 0)):
        example = ": ".join(unreadable[np.flatnonzero(cells.targets[gone] == label)[0]])
        why = f"none of the {counts[label]} images of class {cells.classes[label]} can be read"
        raise SystemExit(f"{cells.root}: {why}, e.g. {example}; fetch them again, or take the class away")
    if not total.any():
        raise SystemExit(f"{cells.root}: no image of the part train can be read")
    level, pixels = np.arange(256) / 255, total.sum(1)
    mean = total @ level / pixels
    variance = total @ level**2 / pixels - mean**2
    notes = [f"{len(odd[what])} images {what}, e.g. {cells.paths[odd[what][0]]}" for what in sorted(odd)]
    if (variance < 1e-9).any():  # an empty channel, say: normalised to 0, not to NaN
        notes.append("a colour channel has one value in all images: its standard deviation is taken as 1")
    twins = [group for group in same.values() if len(group) > 1]
    across = [group for group in twins if len(set(cells.targets[group])) > 1]
    if across:
        examples = " and ".join(cells.paths[across[0]][:2])
        notes.append(f"{len(across)} groups of equal images have several labels, e.g. {examples}")
    std = np.sqrt(np.where(variance < 1e-9, 1, variance))
    twins = [cells.paths[group].tolist() for group in twins]
    info = {"name": cells.name, "root": str(cells.root), "fingerprint": contents.hexdigest()}
    info |= {"classes": cells.classes, "counts": counts.tolist(), "sizes": dict(sizes.most_common())}
    info |= {"mean": mean.tolist(), "std": std.tolist(), "unreadable": unreadable, "oddities": notes}
    return info | {"duplicates": twins, "across_classes": len(across)}


def open_checked(path, runs="runs"):
    """The readable images of a data set as Cells, and scan's dict; prints what it is and what is left out."""
    cells = open_dataset(path)
    info = check_dataset(cells, runs)
    unreadable, labels = info["unreadable"], np.array(cells.classes)[cells.targets]
    print(f"{cells.root}: {len(cells)} images in {len(cells.classes)} classes ({', '.join(cells.classes)})")
    for kind, column in (("class", labels), ("part", cells.parts), ("group", cells.groups)):
        if column is None:
            continue
        names, first, counts = np.unique(column, return_index=True, return_counts=True)
        if kind == "group":
            print(f"  {len(names):,} groups, the largest of {counts.max():,} images")
        for i in np.argsort(first)[: 1 if kind == "group" else SHOWN]:
            print(f"  {kind} {names[i]}: {counts[i]:,}, e.g. {cells.paths[first[i]]}")
    notes = info["notes"] + [f"{path} cannot be read ({why}): left out" for path, why in unreadable[:5]]
    if unreadable:
        file = f"{runs}/data/{cells.name}.json"
        notes.append(f"{len(unreadable)} unreadable images, see {file}; remove it to look at them again")
    for note in notes:
        print(f"  {note}", file=sys.stderr)
    return cells.subset(~np.isin(cells.paths, [path for path, _ in unreadable])), info


def describe(info):
    """Tables 1 and 2 of one data set as text, with the paper's values beside where it has any."""
    sizes = [f"{size} ({count:,})" for size, count in info["sizes"].items()]
    counts = ", ".join(f"{label} {count:,}" for label, count in zip(info["classes"], info["counts"]))
    colours = ["{:.4f} ± {:.4f}".format(*both) for both in zip(info["mean"], info["std"])]
    pixels = ", ".join(sizes[:3] + ["..."] * (len(sizes) > 3))
    ours = f"{sum(info['counts']):,}", len(info["classes"]), counts, pixels, *colours
    theirs = PAPER.get(info["name"], [""] * 7)
    lines = [f"{info['name']} ({info['root']})"]
    for name, value, paper in zip(("images", "classes", "", "pixels", "red", "green", "blue"), ours, theirs):
        lines.append(f"  {name:9s} {value}" + f"   (paper: {paper})" * bool(paper))
    twins = f"{len(info['duplicates'])} groups, {info['across_classes']} of them across classes"
    lines.append(f"  unreadable {len(info['unreadable'])}, exact duplicates {twins}")
    unreadable = [f"unreadable, left out: {path} ({why})" for path, why in info["unreadable"]]
    for found in (unreadable, [f"the same image: {', '.join(group)}" for group in info["duplicates"]]):
        lines += [f"    {line}" for line in found[:SHOWN]]
        if len(found) > SHOWN:
            lines.append(f"    ... and {len(found) - SHOWN} more, see <runs>/data/{info['name']}.json")
    return "\n".join(lines + [f"  note: {note}" for note in info["notes"]])


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that | head ends without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["data/bm"], help="folders, patterns or tables")
    parser.add_argument("--runs", default="runs", help="folder that keeps the result, as data/<name>.json")
    args = parser.parse_args()
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")  # folders may have any name
    for folder in args.data:
        cells = open_dataset(folder)
        try:
            print(describe(check_dataset(cells, args.runs)))
        except OSError as error:
            why = f"{error.filename or args.runs}: {error.strerror or error}"
            raise SystemExit(f"{why}; name a folder to write to with --runs") from None


if __name__ == "__main__":
    main()
