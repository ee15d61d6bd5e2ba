"""What a folder, a pattern or a table of images means: the openers of data sets (section 2.1).

    data/bm                                                   class folders, COCO's JSON, PCam's HDF5 files
    'data/apl/Patient_{group}/Signed slides/{class}/*.jpg'    a pattern with fields
    data/mine/cells.csv                                       a table of path,label[,group][,part]

{class} is the label, {group} what no split may tear, {part} an official split (train, val, test). A field or
* is one or more characters of one level, ** any number of levels, [0-9] a character set, {{ a brace; a
pattern that ends at a folder takes all images below. A folder that could mean several things is refused, with
patterns to type. Another format takes one opener that returns Cells, and one line in open_folder.
"""

import collections
import functools
import itertools
import json
import os
import pathlib
import re
import shlex
import unicodedata

import numpy as np

from datasets import IMAGE_TYPES, Cells, find_images, list_folder

# in the order of Table 5; classes of other data sets are in alphabetical order
BM_CLASSES = "NGB NGS LYT MON EOS BAS MMZ MYB PMO BLA PLM KSC OTH ART NIF PEB EBO HAC ABE LYI FGC".split()
SOURCES = {
    "bm": "doi.org/10.7937/TCIA.AXH3-T579",
    "cd": "github.com/kuku-sichuan/ComparisonDetector",
    "pcam": "github.com/basveeling/pcam",
}
COCO = {"images", "annotations", "categories"}  # keys of its JSON files
FIELDS = ("class", "group", "part")
PARTS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
PARTS |= dict.fromkeys(("val", "valid", "validation", "dev"), "val")
BRACES = {"{{": "{", "}}": "}"}
WILDCARD = re.compile(r"(\{\{|\}\}|\{\w*\}|\*\*/|\*\*|\*|\[!?[^]/]+\])")
# words in the names of folders that are no classes
MASKS = {*"mask masks gt truth segmentation segmentations annotation annotations labels".split()}
SETS = {*"image images img imgs set sets part parts fold folds batch patient patients case slide".split()}
SETS |= MASKS | {*PARTS}
TRIES = "{part}/{class} {class}/{part} {part}/{group}/{class} {part}/{class}/{group} {class}/{group}".split()
TRIES += "{group}/**/{class}/* {class}/* {class}/*/* */{class}".split()  # patterns that may be advised
GROUPS = 5  # fewer can't be split into five folds
SHOWN = 10  # kinds of files left out, and folders' names that are tried in patterns


def open_cells(path):
    """Open a folder, a pattern or a table as Cells; SystemExit says why not."""
    try:
        if os.path.isdir(path):
            cells = open_folder(pathlib.Path(path))
        else:
            root, rows, notes = read_rows(path)
            cells = make_cells(root, pathlib.Path(root).resolve().name, rows, notes)
    except OSError as error:
        why = f"{error.filename or path}: {error.strerror or error}"
        raise SystemExit(f"{why}; make it readable (and writable, for a COCO set's crops)") from None
    cells.source = os.path.abspath(path)
    return cells


def make_cells(root, name, rows, notes=()):
    """Cells of rows {path: {"class": label, perhaps "group", "part"}}, ordered by class and path."""
    for field in FIELDS:
        without = [path for path in rows if not rows[path].get(field)]
        if without and (field == "class" or len(without) < len(rows)):
            raise SystemExit(f"{root}: no {{{field}}} of {without[0]}")
    labels = {row["class"] for row in rows.values()}
    classes = sorted(labels, key=BM_CLASSES.index) if labels <= {*BM_CLASSES} else sorted(labels)
    if len(classes) < 2:
        what = "; ".join([f"{len(classes)} class(es) with images {classes}", *notes])
        raise SystemExit(f"{root}: {what}; at least 2 are needed: unpacked, one folder a class")
    number = {label: i for i, label in enumerate(classes)}
    paths = sorted(rows, key=lambda path: (number[rows[path]["class"]], path))
    targets = [number[rows[path]["class"]] for path in paths]
    columns = {f"{field}s": [rows[path].get(field) for path in paths] for field in ("group", "part")}
    columns = {name: column for name, column in columns.items() if any(column)}
    if "parts" in columns:
        strange = sorted({part for part in columns["parts"] if part.lower() not in PARTS})
        if strange:
            raise SystemExit(f"{root}: no part: {', '.join(strange[:9])}; parts are {', '.join(PARTS)}")
        columns["parts"] = [PARTS[part.lower()] for part in columns["parts"]]
    similar = collections.defaultdict(list)
    for path in classes + paths:  # NFC: umlauts may be one character or, as on a Mac, two
        key = unicodedata.normalize("NFC", path)
        similar[key if path in rows else "".join(key.casefold().split())].append(path)
    similar = [", ".join(map(ascii, names)) for names in similar.values() if len(names) > 1]
    notes = [*notes, *(f"names that are almost the same: {names}" for names in similar)]
    return Cells(root, name, classes, paths, targets, notes, **columns)


def left_out(paths):
    """A list of one note on files that are not read, by kind, images by their folder; [] of none."""
    kinds = collections.Counter()
    for path in paths:
        folder, name = os.path.split(path)
        ending = os.path.splitext(name)[1].lower()
        kind = f"*{ending}" if ending else "without an ending"
        if ending in IMAGE_TYPES:
            kind = f"{os.path.basename(folder) or '.'}/{kind}"
        kinds[kind if name else f"output of these scripts ({path})"] += 1
    counts = [f"{number:,} {kind}" for kind, number in kinds.most_common(SHOWN)]
    more = ", ..." * (len(kinds) > SHOWN)
    return [f"{len(paths):,} files left out: {', '.join(counts)}{more}"] if paths else []


# ---------------------------------------------------------------- patterns and tables
def read_rows(path):
    """(root, {image: {"class", "group", "part": as far as known}}, notes) of a pattern or a table."""
    if os.path.isfile(path):
        return read_table(path)
    root, regex = translate(path) if re.search(r"[{}*[]", path) else (path, "")
    if not regex or not os.path.isdir(root):
        source = f"get {SOURCES.get(os.path.basename(path), 'a data set')} and unpack it there"
        advice = f"{source}, or name it with --data (synthetic cells: bash run_all.sh --demo)"
        raise SystemExit(f"{root or repr(path)}: no such folder; {advice}")
    images, others = find_images(root)
    rows = match(path, regex, images)
    if not rows:
        example = f", e.g. {images[0]}" if images else ""
        raise SystemExit(f"{path}: fits none of the {len(images)} images below {root}{example}")
    return root, rows, left_out([image for image in images if image not in rows] + others)


def read_table(file):
    """read_rows of a table with a column path and perhaps label, group and part."""
    import splits  # has the reader of such files

    root, rows, gone = os.path.dirname(file) or ".", {}, []
    images, others = find_images(root)
    header, table = splits.read_table(file, ["path"], images)
    columns = ["class" if name == "label" else name for name in header]
    for row in table:
        path = os.path.relpath(os.path.join(root, row[0]), root)  # of ./A/1.png and absolute ones
        if not os.path.isfile(os.path.join(root, path)):
            gone.append(row[0])
            continue
        fields = {name: value for name, value in zip(columns, row) if name in FIELDS}
        if rows.setdefault(path, fields) != fields:
            raise SystemExit(f"{file}: {path} is there twice, as {rows[path]} and {fields}")
    if not rows:
        raise SystemExit(f"{file}: none of its {len(gone)} rows has an image in {root}, e.g. {gone[0]}")
    rest = [image for image in images if image not in rows]
    notes = [f"{len(gone):,} rows without an image: left out, e.g. {gone[0]}"] if gone else []
    notes += [f"{len(rest):,} images without a row: left out, e.g. {rest[0]}"] if rest else []
    return root, rows, notes + left_out([other for other in others if other != os.path.basename(file)])


def translate(pattern):
    """(root, regular expression of the paths below it) of a pattern; its fields are named groups."""
    if re.search("[{}]", WILDCARD.sub("", pattern)):
        raise SystemExit(f"{pattern}: a single brace; {{{{ and }}}} are braces themselves")
    wild = (found.start() for found in WILDCARD.finditer(pattern) if found[0] not in BRACES)
    start = pattern.rfind("/", 0, next(wild, None)) + 1
    root, regex, seen = pattern[:start].replace("{{", "{").replace("}}", "}"), "", []
    for token in WILDCARD.split(pattern[start:].rstrip("/")):
        field = token.strip("{}")
        if token in BRACES or not WILDCARD.fullmatch(token):
            regex += re.escape(BRACES.get(token, token))
        elif token[0] == "[":
            characters = re.sub(r"[\\[]", r"\\\g<0>", token[1:-1])
            regex += f"(?!/)[{re.sub('^!', '^', characters)}]"
        elif token[0] == "*":
            regex += {"*": "[^/]+", "**": ".+", "**/": "(?:.+/)?"}[token]
        elif field in FIELDS and field not in seen:
            seen.append(field)
            regex += f"(?P<{field}>[^/]+)"
        else:
            what = "is there twice" if field in seen else f"is none of {', '.join(FIELDS)}"
            raise SystemExit(f"{pattern}: the field {token} {what}")
    return root or ".", regex


def match(pattern, regex, images):
    """{image: its fields} of those that a pattern names; of one that ends at a folder, all below."""
    last = pattern.rstrip("/").rpartition("/")[2]
    ends = ["", "/.+"]  # at files, at a folder
    if "{" in last.replace("{{", "") and not last.lower().endswith(IMAGE_TYPES):
        ends = ends[::-1][: 1 if re.fullmatch(r"\{\w+\}", last) else 2]
    for end in ends:
        matches = [re.fullmatch(f"(?s:{regex}{end})", image) for image in images]
        if any(matches):
            return {found.string: found.groupdict() for found in matches if found}
    return {}


# ---------------------------------------------------------------- folders
def open_folder(top):
    """A folder: PCam's HDF5 files, COCO's JSON, else class folders below single folders."""
    name, folder = top.resolve().name, descend(top, (*IMAGE_TYPES, ".json", ".h5"))[0]
    if any(folder.glob("camelyonpatch_level_2_split_*")):
        return open_pcam(folder, name)
    if coco := find_coco(folder):
        return open_coco(folder, name, coco)
    root, below = descend(top, IMAGE_TYPES)
    images, others = find_images(top)
    for link in list_folder(root)[1]:  # a class on a disk that is not mounted, say
        if "." not in link and not os.path.exists(root / link):
            raise SystemExit(f"{root / link}: a link that leads nowhere; mend or remove it")
    images = [path.removeprefix(f"{root.relative_to(top)}/") for path in images]
    rows = {path: {"class": path.split("/")[0]} for path in images if "/" in path}
    if why := ambiguity([*rows]):
        raise SystemExit(f"{root}: {why}; {suggest(root, [*rows])}")
    empty = sorted({*below} - {row["class"] for row in rows.values()})
    notes = [f"class folder {label} holds no image: left out" for label in empty]
    return make_cells(root, name, rows, notes + left_out([x for x in images if x not in rows] + others))


def descend(folder, endings):
    """Go down while a folder holds one folder and no such file: (folder, its folders' names)."""
    while True:
        below, files, _ = list_folder(folder)
        if len(below) != 1 or any(name.lower().endswith(endings) for name in files):
            return folder, below
        folder = folder / below[0]


def words(name):
    """The words in a folder's name, in lower case: test of TestA, image and sets of image_sets2."""
    return {*re.findall(r"[^\W\d_]{2,}", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())}


def find_shared(paths):
    """{folder: first folders that hold it} of several, or of masks; the images in them; that of any."""
    holders, inside = collections.defaultdict(set), collections.defaultdict(list)
    for path in paths:
        label, *folders, _ = path.split("/")
        for name in {*folders} - {label}:
            if not re.fullmatch(r"\d+-\d+", name):  # thousands of images, as TCIA packs them
                holders[name].add(label)
                inside[name].append(path)
    shared = [name for name in holders if len(holders[name]) > 1 or words(name) & MASKS]
    shared = {name: holders[name] for name in shared if len(inside[name]) < len(paths)}
    return shared, {*itertools.chain(*map(inside.get, shared))}, holders


def find_companions(paths):
    """Those named as others and a suffix (x_mask.png), of classes where half of the others have one."""
    stems = collections.Counter(os.path.splitext(path)[0] for path in paths)
    found, sizes = collections.defaultdict(list), collections.Counter(path.split("/")[0] for path in paths)
    for path in paths:
        for cut in re.finditer(r"[-_. (]+(?=[A-Za-z][^/]*$)", path):
            stem = path[: cut.start()]
            if stems[stem] > (stem == os.path.splitext(path)[0]):
                found[path.split("/")[0], path[cut.start() :]].append(path)
                break
    found = {label: some for (label, _), some in sorted(found.items()) if 3 * len(some) >= sizes[label]}
    return {*itertools.chain(*found.values())}


def ambiguity(paths):
    """Why the first folders of images may not be their classes, or not every image a cell; None if clear."""
    folders = {*map(os.path.dirname, paths)}
    deeper = collections.Counter(folder.split("/")[0] for folder in folders)
    firsts = sorted(deeper)
    whole = [label for label in firsts if words(label) and words(label) <= SETS]
    numbered = len({re.sub(r"\d+", "", label) for label in firsts}) == 1 < len(firsts)
    several = numbered or min(deeper.values(), default=0) > 1
    if (several and are_sets(firsts)) or 1 < len(whole) >= len(firsts) / 2:
        return f"{', '.join(firsts[:3])} look like parts, patients or sets, not classes"
    shared, inside, holders = find_shared(paths)
    if inner := sorted(deeper.keys() & holders.keys()):
        return f"class {inner[0]} is there a second time, in {min(holders[inner[0]])}"
    if masks := [name for name in shared if words(name) & MASKS]:
        return f"{min(shared[masks[0]])} holds a folder {masks[0]}, which may be no cells"
    held = sorted({*itertools.chain(*shared.values())})
    if 2 * len(inside) > len(paths) and 2 * len(held) >= len(firsts):
        return f"{', '.join(held[:3])} hold folders of the same names ({', '.join(sorted(shared)[:5])})"
    if companions := sorted(find_companions(paths)):
        return f"{len(companions)} images are named as others with a suffix, e.g. {companions[0]}"
    return None


def suggest(root, paths):
    """Advice for an ambiguous folder: up to three patterns after which nothing is ambiguous, each tried."""
    tries, companions = [*TRIES], find_companions(paths)
    for label in sorted({path.split("/")[0] for path in paths}):
        if words(label) and words(label) <= SETS - MASKS:
            tries.append(f"{escape(label)}/{{class}}")
    names = [escape(name) for name in find_shared(paths)[0] if not words(name) & MASKS]
    for name in names[:SHOWN]:
        tries += [f"{{class}}/{name}", f"{{class}}/**/{name}/*"]
    endings = sorted({os.path.splitext(path)[1] for path in {*paths} - companions if companions})
    for names in itertools.product(["{class}/"], ["", "**/"], ["*", "*[0-9]", "*[!a-z]"], endings):
        tries.append("".join(names))
    good = {}
    for pattern in tries:
        above, regex = translate(f"/{pattern}")
        rows = match(pattern, re.escape(above[1:]) + regex, paths)
        if is_clear(rows) and not companions & rows.keys():
            good.setdefault(frozenset((path, row["class"]) for path, row in rows.items()), pattern)
    telling = {rows: pattern for rows, pattern in good.items() if "{group}" in pattern or "{part}" in pattern}
    advice = []
    for rows, pattern in sorted((telling or good).items(), key=lambda both: -len(both[0]))[:3]:
        classes = sorted({label for _, label in rows})
        what = f"{len(rows):,} images of {', '.join(classes[:3])}" + ", ..." * (len(classes) > 3)
        advice.append(f"{shlex.quote(f'{escape(root)}/{pattern}')} ({what})")
    return f"type --data {' or '.join(advice)}" if advice else "say which is what in a table of path,label"


def is_clear(rows):
    """Whether the images of a pattern have classes, parts and groups to train with, and no second meaning."""
    labels, groups = {row["class"] for row in rows.values()}, {row.get("group") for row in rows.values()}
    parts = {row.get("part", "test").lower() for row in rows.values()}
    few = len(labels) < 2 or (groups != {None} and len(groups) < GROUPS)
    if few or not parts <= {*PARTS} or are_sets(labels):
        return False
    below = []
    for path, row in rows.items():
        *folders, name = path.split("/")
        folders = folders[folders.index(row["class"]) + 1 :]
        folders = [folder for folder in folders if folder not in row.values()]
        below.append("/".join([row["class"], *folders, name]))
    distinct = len({*below}) == len(below) or len(row) > 1
    return distinct and not ambiguity([*{*below}])


def are_sets(names):
    """Whether each folder's name has a word for a set of images other than an official part."""
    return all(words(name) & SETS - {*PARTS} for name in names)


def escape(text):
    """Text as a part of a pattern that means just that."""
    return re.sub(r"[{}*[]", lambda found: f"[{found[0]}]" if found[0] in "*[" else 2 * found[0], str(text))


# ---------------------------------------------------------------- other formats
def find_coco(folder):
    """{JSON file: its content} of the COCO detection sets at the root, among whatever else is JSON."""
    contents, damaged = {}, []
    for file in sorted(folder.glob("[!.]*.json")):
        try:
            contents[file] = json.loads(file.read_bytes())
        except ValueError:
            damaged.append(file)
    coco = {file: c for file, c in contents.items() if isinstance(c, dict) and c.keys() >= COCO}
    if coco and damaged:
        raise SystemExit(f"{damaged[0]}: damaged; fetch it again")
    return coco


def open_coco(folder, name, coco):
    """A COCO set, {JSON file: content}: its boxes are cropped once, to the class folders .crops."""
    import crop_boxes  # a conversion; other data sets do without the file

    notes, root = crop_boxes.crop_once(folder, coco), folder / ".crops"
    rows = {path: {"class": path.split("/")[0]} for path in find_images(root)[0]}
    for path, row in rows.items():
        row["group"] = re.sub("_[^_]*$", "", path.split("/", 1)[1])
    return make_cells(root, name, rows, notes)


def open_pcam(folder, name):
    """PatchCamelyon's HDF5 files; paths are train/17, valid/3, test/5. Only the labels are read now."""
    paths, parts, targets = [], [], []
    for part in ("train", "valid", "test"):
        x, y = (folder / f"camelyonpatch_level_2_split_{part}_{kind}.h5" for kind in "xy")
        if part == "test" and not x.exists() and not y.exists():
            continue  # nothing here uses the test part
        try:
            shape = open_hdf5(str(x), os.getpid())["x"].shape
            labels = open_hdf5(str(y), os.getpid())["y"][()].reshape(-1)
        except (OSError, KeyError, AttributeError, TypeError) as error:
            why = f"the {part} part cannot be read ({str(error).splitlines()[0]})"
            advice = f"fetch {x.name} and {y.name} again, unpacked and under these very names"
            raise SystemExit(f"{folder}: {why}; {advice}") from None
        if shape != (len(labels), 96, 96, 3) or not {*labels} <= {0, 1}:
            what = f"{shape} patches and {len(labels)} labels {sorted({*labels})[:5]}"
            raise SystemExit(f"{x}: {what}; expected [N,96,96,3] and as many labels, 0 or 1")
        paths += [f"{part}/{i}" for i in range(len(labels))]
        parts += [PARTS[part]] * len(labels)
        targets.append(labels)
    read = functools.partial(read_patch, str(folder))
    return Cells(folder, name, ["normal", "tumour"], paths, np.concatenate(targets), read=read, parts=parts)


@functools.lru_cache(maxsize=12)
def open_hdf5(file, process):
    """An HDF5 file, opened once in each process, since handles don't survive a fork."""
    import h5py

    try:
        return h5py.File(file, "r")
    except OSError:  # reading needs no lock, which a file system may not have, or another program
        return h5py.File(file, "r", locking=False)


def read_patch(folder, path):
    """Patch 'train/17' as uint8 RGB [96,96,3]; ValueError if it is damaged."""
    part, index = path.split("/")
    try:
        file = f"{folder}/camelyonpatch_level_2_split_{part}_x.h5"
        return open_hdf5(file, os.getpid())["x"][int(index)]
    except OSError as error:
        number = error.errno or int((re.search(r"errno = (\d+)", str(error)) or [0, 0])[1])
        if number:  # the system's, not HDF5's: no damage
            raise OSError(number, os.strerror(number), file) from None
        raise ValueError(f"{folder}, patch {path}: {str(error).splitlines()[0]}") from None
