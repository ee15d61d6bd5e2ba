"""Folders of images whose overlaps are known: crops of one picture, each saved as a file of its own."""
import cv2
import numpy as np


def write_crops(picture, places, folder, size=250, quality=(85, 95), rng=None, kind="jpg"):
    """Cut squares at places (x, y) out of uint8 RGB [H,W,3] and save them; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for number, (x, y) in enumerate(places):
        name = f"{number:05d}.{kind}"
        options = []
        if kind == "jpg":
            options = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(quality[0], quality[1] + 1))]
        cv2.imwrite(str(folder / name), picture[y:y + size, x:x + size][..., ::-1], options)
        names.append(name)
    return names


def shared_rectangle(first, second, size=250):
    """(width, height) in pixels that two squares at places (x, y) share, 0 if none."""
    return tuple(max(0, size - abs(int(a) - int(b))) for a, b in zip(first, second))
