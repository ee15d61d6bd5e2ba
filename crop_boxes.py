"""Crop the boxes of a COCO detection set, such as Comparison Detector's, to one image a cell (section 2.1).

    python crop_boxes.py --data data/cd     # what opening such a data set does by itself, once

A COCO set is a folder with one or more JSON files (images, annotations, categories) beside its image folders.
Its cells become a folder of class folders: <data>/.crops/<class>/<image>_<box id>.png.
"""

import argparse
import collections
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil

import cv2
from tqdm import tqdm

from datasets import file_lock, open_dataset, read_image, read_json


def crop_once(folder, coco):
    """Make folder/.crops unless it is there; returns notes on the boxes left out.

    coco: {JSON file: its content}. SystemExit if it is no COCO set or has changed since it was cropped.
    """
    crops, part = folder / ".crops", folder / ".crops.part"
    digest = hashlib.sha256(json.dumps(list(coco.values()), sort_keys=True).encode()).hexdigest()
    if not crops.exists():  # before the lock, which a read-only folder has no place for
        with file_lock(folder / ".crops.lock"):
            if not crops.exists():
                shutil.rmtree(part, ignore_errors=True)  # what a killed cropping left
                try:
                    notes = crop_boxes(folder, coco, part)
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    files = ", ".join(map(str, coco))
                    raise SystemExit(f"{files}: no COCO detection set ({error!r}); fetch it again") from None
                if not part.exists():
                    why = f"no box can be cropped ({'; '.join(notes)})"
                    raise SystemExit(f"{folder}: {why}; the image folders belong beside the JSON files")
                (part / ".done.json").write_text(json.dumps({"digest": digest, "notes": notes}))
                os.rename(part, crops)
    done = read_json(crops / ".done.json")
    if done["digest"] != digest:
        raise SystemExit(f"{crops}: the JSON files have changed since; remove it, and it is made anew")
    return done["notes"]


def crop_boxes(folder, coco, part):
    """Crop the boxes of a COCO set to class folders below part, as PNG; returns notes on those left out."""
    dropped, taken, owner = collections.Counter(), set(), {}
    for file, content in coco.items():
        labels = {c["id"]: clean(c["name"]) for c in content["categories"]}
        boxes = collections.defaultdict(list)
        for box in content["annotations"]:
            boxes[box["image_id"]].append(box)
        for image in tqdm(content["images"], desc=f"{file}: cropping cells", unit="image", disable=None):
            name, parents = image["file_name"].replace("\\", "/"), (folder, folder / file.stem)
            places = [place / name for parent in parents for place in (parent, parent / "images")]
            place = next(filter(pathlib.Path.is_file, places), places[0])
            stem = clean(pathlib.PurePath(name).with_suffix(""))
            if owner.setdefault(stem, place) != place:  # another picture has that name
                stem = f"{file.stem}-{stem}"
            picture, problem = open_picture(place, image.get("width"), image.get("height"))
            for box in boxes.pop(image["id"], ()):
                label, area = labels.get(box["category_id"]), box.get("bbox") or box.get("segmentation")
                key, (crop, why) = (place, label, str(area)), cut_box(picture, area)
                if why or label is None or key in taken:
                    dropped[problem or why or ("listed twice" if label else "of an unknown category")] += 1
                    continue
                cell = f"{label}/{stem}_{clean(box['id']).replace('_', '-')}"
                if cell in taken:
                    cell += f"-{len(taken)}"
                taken |= {cell, key}
                (part / label).mkdir(parents=True, exist_ok=True)
                png = cv2.imencode(".png", crop[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])[1]
                (part / f"{cell}.png").write_bytes(png)
        dropped["of an unknown image"] += sum(map(len, boxes.values()))
    return [f"{count} boxes dropped: {why}" for why, count in sorted(dropped.items()) if count]


def open_picture(file, width, height):
    """A COCO set's picture and None, or None and why: turned by EXIF only if it has the JSON's size then."""
    try:
        sizes = {image.shape[1::-1]: image for image in (read_image(file), read_image(file, turn=False))}
    except (FileNotFoundError, ValueError):  # any other OSError is of the moment, and ends the cropping
        return None, "their image is missing or unreadable; once it is there, remove .crops"
    picture = sizes.get((width, height)) if width and height else [*sizes.values()][-1]
    return picture, None if picture is not None else "their image is not of the size that the JSON says"


def cut_box(picture, area):
    """Pixels of a COCO box [x, y, width, height] or polygons [[x, y, ...]]: (crop, None) or (None, why)."""
    if isinstance(area, list) and area and isinstance(area[0], list):
        points = list(itertools.chain(*area))
        x, y = points[::2], points[1::2]
        area = [min(x), min(y), max(x) - min(x), max(y) - min(y)]
    is_box = isinstance(area, list) and len(area) == 4 and all(map(math.isfinite, area))
    if picture is None or not is_box or min(area[2:]) <= 1:
        return None, "width or height of 1 or less, no cell"
    x, y, w, h = area
    crop = picture[max(0, round(y)) : max(0, round(y + h)), max(0, round(x)) : max(0, round(x + w))]
    return (crop, None) if min(crop.shape[:2]) > 1 else (None, "outside the image")


def clean(name):
    """A name as one level of a path."""
    return str(name).replace("/", "-").strip(". ") or "unnamed"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default="data/cd", help="folder of the COCO set")
    cells = open_dataset(parser.parse_args().data)
    print(f"{cells.root}: {len(cells):,} cells in {len(cells.classes)} classes")
    for note in cells.notes:
        print(f"  {note}")


if __name__ == "__main__":
    main()
