#!/usr/bin/env python3
"""Synthetic cells in the formats of the real data sets: bone marrow (bm), Comparison Detector (cd), PatchCamelyon.

    python tests/demo_data.py --out demo/data                   the three sets of the demo study, about 1,600 pictures
    python tests/demo_data.py --out /tmp/cells --size tiny      the same for tests, in seconds
    python tests/demo_data.py --out demo/data --sets bm         one of them

The cells are caricatures: the nucleus, chromatin, granules and outline by which a haematologist tells the 21 classes
apart are exaggerated, the stain and focus of smears vary. Every picture has a random stream of its own, keyed by seed,
set, class and number, so that any part of a set is the same whatever else is drawn. `draw_cell` also gives the mask of
what decides the class.
"""

import argparse
import json
import os
import shutil
import zlib
from collections import namedtuple
from pathlib import Path

import cv2
import h5py
import numpy as np
from tqdm import tqdm

SIDE, VIEW = 250, 200  # pixels: of a BM image, and of its part that is kept and enlarged to that
SETS = ("bm", "cd", "pcam")
SIZES = ("demo", "tiny")
MARKER = ".demo_data"  # in each set's folder: which arguments made it, and its files

# ---------------------------------------------------------------------------------------------------------- bone marrow
# images: how many in the demo. radius: the cell's, in pixels. ratio: nucleus to cell. chromatin: colour, grain in
# pixels, contrast. granules: colours, number, radius in pixels. decides: the structure that makes the class, which
# draw_cell's mask shows. Colours are RGB.
Cell = namedtuple("Cell", "images radius form ratio chromatin nucleoli cytoplasm granules extras decides")
DARK, PURPLE, LACY = (62, 24, 112), (82, 34, 132), (124, 68, 168)
PINK, SKY, ROYAL, GREY = (226, 196, 222), (150, 180, 232), (52, 70, 178), (176, 186, 206)
FINE, AZURE = ((176, 120, 190),), ((146, 24, 120), (120, 20, 130))
ORANGE, INKY = ((226, 104, 66), (238, 128, 74)), ((44, 12, 76), (60, 16, 92))
MIXED = ORANGE + ORANGE + INKY[:1]
CELLS = {
    "NGB": Cell(68, 62, "band", 0.62, (PURPLE, 9, 0.25), 0, (240, 180, 196), (FINE, 160, 1.1), (), "nucleus"),
    "NGS": Cell(
        96, 62, "segmented", 0.70, (DARK, 8, 0.25), 0, (248, 226, 200), (FINE, 160, 1.1), (), "nucleus"
    ),
    "LYT": Cell(90, 42, "round", 0.84, (DARK, 12, 0.35), 0, SKY, None, (), "nucleus"),
    "MON": Cell(
        50, 78, "folded", 0.70, (LACY, 7, 0.30), 0, (148, 158, 178), (FINE, 50, 1.0), ("vacuoles",), "nucleus"
    ),
    "EOS": Cell(
        54, 62, "bilobed", 0.58, (PURPLE, 8, 0.25), 0, (240, 186, 160), (ORANGE, 280, 4.0), (), "granules"
    ),
    "BAS": Cell(
        28, 56, "bilobed", 0.66, (LACY, 9, 0.20), 0, (214, 186, 222), (INKY, 80, 4.6), ("over",), "granules"
    ),
    "MMZ": Cell(
        42, 68, "kidney", 0.74, (PURPLE, 9, 0.30), 0, (226, 184, 232), (FINE, 160, 1.2), (), "nucleus"
    ),
    "MYB": Cell(58, 72, "oval", 0.60, (PURPLE, 9, 0.30), 0, (186, 158, 226), (FINE, 200, 1.4), (), "nucleus"),
    "PMO": Cell(
        72, 80, "oval", 0.66, (LACY, 6, 0.22), 2, (134, 132, 216), (AZURE, 190, 2.6), ("hof",), "granules"
    ),
    "BLA": Cell(72, 68, "round", 0.86, (LACY, 4, 0.16), 3, (112, 134, 214), None, (), "nucleus"),
    "PLM": Cell(60, 66, "eccentric", 0.46, (DARK, 15, 0.50), 0, (60, 92, 190), None, ("hof",), "cell"),
    "KSC": Cell(12, 66, "", 0, (LACY, 17, 0.16), 0, PINK, None, (), "smudge"),
    "OTH": Cell(24, 78, "eccentric", 0.36, (PURPLE, 8, 0.25), 1, (198, 196, 214), None, ("foam",), "cell"),
    "ART": Cell(84, 60, "", 0, (DARK, 8, 0.30), 0, PINK, None, (), "artefact"),
    "NIF": Cell(46, 64, "round", 0.74, (PURPLE, 12, 0.20), 0, (170, 160, 206), None, (), "cell"),
    "PEB": Cell(40, 76, "round", 0.80, ((112, 30, 122), 5, 0.22), 2, ROYAL, None, ("rim",), "cell"),
    "EBO": Cell(92, 48, "round", 0.56, ((40, 16, 66), 13, 0.45), 0, (222, 146, 140), None, (), "nucleus"),
    "HAC": Cell(26, 56, "oval", 0.62, (PURPLE, 9, 0.22), 0, (152, 196, 206), None, ("hairs",), "border"),
    "ABE": Cell(
        8, 62, "bilobed", 0.58, (PURPLE, 8, 0.25), 0, (236, 186, 168), (MIXED, 280, 4.2), (), "granules"
    ),
    "LYI": Cell(16, 54, "round", 0.76, ((126, 44, 120), 5, 0.20), 1, (88, 176, 226), None, (), "nucleus"),
    "FGC": Cell(
        14, 78, "kidney", 0.60, (LACY, 6, 0.22), 0, (206, 182, 216), (AZURE, 60, 1.9), ("rods",), "rods"
    ),
}


ROUND, WAVES = np.linspace(0, 2 * np.pi, 64, endpoint=False), np.arange(2, 6)[:, None]


def key(seed, *parts):
    """A random generator of its own for what `parts` (strings or numbers) name."""
    return np.random.default_rng([seed, *(zlib.crc32(str(part).encode()) for part in parts)])


def blob(rng, x, y, rx, ry=None, angle=0.0, wobble=0.04):
    """A rounded outline about (x, y) with half-axes rx, ry in pixels: float [64, 2]."""
    size, phase = wobble * rng.standard_normal(4) / WAVES[:, 0], rng.uniform(0, 2 * np.pi, (4, 1))
    r = 1 + size @ np.cos(WAVES * ROUND + phase)
    u, v, c, s = rx * r * np.cos(ROUND), (ry or rx) * r * np.sin(ROUND), np.cos(angle), np.sin(angle)
    return np.stack([x + u * c - v * s, y + u * s + v * c], 1)


def fill(mask, outline):
    """Fills an outline [N, 2] in `mask` (uint8 [H, W], smooth edge), which is changed and returned."""
    return cv2.fillPoly(mask, [np.round(outline * 16).astype(np.int32)], 255, cv2.LINE_AA, 4)


def stroke(mask, points, width):
    """Draws a line through points [N, 2] in `mask` (uint8 [H, W]), which is changed and returned."""
    points = np.round(np.asarray(points) * 16).astype(np.int32)
    return cv2.polylines(mask, [points], False, 255, max(1, round(width)), cv2.LINE_AA, 4)


def dots(mask, points, radii):
    """Fills a disc at each of points [N, 2] in `mask` (uint8 [H, W]), which is changed and returned."""
    for (x, y), radius in zip(points, radii):
        cv2.circle(mask, (round(x * 16), round(y * 16)), max(8, round(radius * 16)), 255, -1, cv2.LINE_AA, 4)
    return mask


def noise(rng, shape, grain):
    """Smooth random texture with structures of `grain` pixels: float32 [H, W] in about -2..2."""
    coarse = rng.standard_normal((int(shape[0] / grain) + 3, int(shape[1] / grain) + 3), dtype=np.float32)
    return cv2.resize(coarse, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)


def paint(image, mask, colour, opacity=1.0, texture=None):
    """Lays `colour` over `image` (float32 [H, W, 3], changed in place) where `mask` (uint8 [H, W]) says.

    texture, float [H, W] about 0, makes the colour lighter or darker.
    """
    x, y, w, h = cv2.boundingRect(mask)
    if w and h:
        alpha = mask[y : y + h, x : x + w] * np.float32(opacity / 255)
        shade = 1 if texture is None else 1 + texture[y : y + h, x : x + w]
        for channel in range(3):  # three times faster than one broadcast over an axis of length 3
            part = image[y : y + h, x : x + w, channel]
            part += (np.float32(colour[channel]) * shade - part) * alpha


def blank(image):
    """An empty mask for an image: uint8 [H, W]."""
    return np.zeros(image.shape[:2], np.uint8)


def soften(mask, sigma):
    """Blurs a mask's edge by `sigma` pixels, in the part that holds anything: uint8 [H, W], a new one."""
    x, y, w, h = cv2.boundingRect(mask)
    left, top, reach = max(0, x - int(3 * sigma)), max(0, y - int(3 * sigma)), int(6 * sigma)
    part, blurred = mask[top : y + h + reach, left : x + w + reach], np.zeros_like(mask)
    if w and h:
        box = 2 * round(sigma * 1.2) + 1  # two box filters of this width blur like the Gaussian, and faster
        part = (
            cv2.blur(cv2.blur(part, (box, box)), (box, box))
            if sigma >= 3
            else cv2.GaussianBlur(part, (0, 0), sigma)
        )
        blurred[top : y + h + reach, left : x + w + reach] = part
    return blurred


def shrink(mask, pixels):
    """A mask less a rim of `pixels`: uint8 [H, W], a new one."""
    return cv2.erode(mask, np.ones((2 * pixels + 1, 2 * pixels + 1), np.uint8))


def inside(rng, mask, number):
    """`number` random points where a mask is set (none where it is empty): float [number, 2]."""
    points = cv2.findNonZero((mask > 128).astype(np.uint8))
    if points is None:
        return np.empty((0, 2))
    return points.reshape(-1, 2)[rng.integers(len(points), size=number)] + rng.uniform(-0.5, 0.5, (number, 2))


def draw_plasma(rng, shape):
    """The ground of a smear: float32 [H, W, 3]."""
    image = np.empty((*shape, 3), np.float32)
    image[:] = np.array([242, 236, 236]) + rng.normal(0, 4, 3)
    return image + cv2.merge([2.5 * noise(rng, image.shape, 40)] * 3)


def draw_smear(rng):
    """Plasma, red cells, platelets and a cut-off neighbour or two: float32 [250, 250, 3]."""
    image = draw_plasma(rng, (SIDE, SIDE))
    draw_red_cells(rng, image, 125, 125)
    for _ in range(rng.integers(0, 3)):
        angle, far = rng.uniform(0, 2 * np.pi), rng.uniform(150, 175)
        x, y, r = 125 + far * np.cos(angle), 125 + far * np.sin(angle), rng.uniform(45, 65)
        paint(image, fill(blank(image), blob(rng, x, y, r)), (PINK, SKY, GREY)[rng.integers(3)])
        nucleus = fill(blank(image), blob(rng, x, y, r * rng.uniform(0.6, 0.85)))
        paint(image, nucleus, PURPLE, texture=0.25 * noise(rng, image.shape, 9))
    draw_platelets(rng, image)
    return image


def draw_red_cells(rng, image, x, y):
    """Red cells around (x, y), painted into a smear."""
    for _ in range(rng.integers(2, 8)):
        angle, far, r = rng.uniform(0, 2 * np.pi), rng.uniform(75, 160), rng.uniform(34, 46)
        u, v = x + far * np.cos(angle), y + far * np.sin(angle)
        paint(
            image,
            fill(blank(image), blob(rng, u, v, r, r * rng.uniform(0.85, 1), angle)),
            (212, 190, 186),
            0.85,
        )
        if rng.random() < 0.6:
            paint(image, soften(fill(blank(image), blob(rng, u, v, r * 0.4)), r * 0.18), (236, 224, 222), 0.7)


def draw_platelets(rng, image):
    """Platelets, painted into a smear."""
    for x, y in rng.uniform((0, 0), image.shape[1::-1], (rng.integers(0, 6), 2)):
        r = rng.uniform(4, 10)
        paint(image, soften(fill(blank(image), blob(rng, x, y, r, wobble=0.2)), 1.5), (170, 110, 184), 0.7)


def draw_nucleus(rng, shape, form, x, y, r):
    """A nucleus about (x, y) of half-axis r in pixels, its form as in CELLS: a mask, uint8 of `shape` [H, W]."""
    mask, angle = np.zeros(shape, np.uint8), rng.uniform(0, 2 * np.pi)
    ahead, across = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    centre = np.array([x, y])
    if form in ("round", "eccentric"):
        return fill(mask, blob(rng, x, y, r, r * rng.uniform(0.92, 1), angle, 0.03))
    if form == "oval":
        return fill(mask, blob(rng, x, y, r * 1.1, r * rng.uniform(0.78, 0.9), angle, 0.04))
    if form in ("kidney", "folded"):
        height, wobble = (0.84, 0.03) if form == "kidney" else (0.95, 0.10)
        fill(mask, blob(rng, x, y, r * 1.1, r * height, angle, wobble))
        notch = blob(
            rng, *(centre + across * r * 1.02), r * rng.uniform(0.42, 0.55), r * rng.uniform(0.5, 0.62), angle
        )
        return cv2.subtract(mask, fill(np.zeros(shape, np.uint8), notch))
    if form == "band":
        bend, width = rng.uniform(1.7, 2.4), r * rng.uniform(0.52, 0.66)
        t = np.linspace(-bend, bend, 40)[:, None]
        stroke(mask, centre + r * 0.78 * (np.cos(t) * ahead + np.sin(t) * across) - ahead * r * 0.1, width)
        return fill_smooth(mask, 3)
    lobes = 2 if form == "bilobed" else rng.integers(2, 6)
    span = 1.25 if lobes == 2 else rng.uniform(1.8, 2.5)
    t = np.linspace(-span, span, lobes)[:, None] + rng.normal(0, 0.08, (lobes, 1))
    points = centre + r * 0.80 * (np.cos(t) * ahead + np.sin(t) * across) - ahead * r * 0.15
    stroke(mask, points, 6)
    for lobe in points:
        size = r * (rng.uniform(0.60, 0.70) if form == "bilobed" else rng.uniform(0.40, 0.52))
        fill(mask, blob(rng, *lobe, size, size * rng.uniform(0.75, 0.95), rng.uniform(0, 7), 0.06))
    return mask


def fill_smooth(mask, sigma):
    """Rounds a mask's corners: uint8 [H, W]."""
    return np.clip((soften(mask, sigma).astype(np.float32) - 128) * 4 + 128, 0, 255).astype(np.uint8)


def draw_hairs(rng, mask, x, y, r):
    """Adds thin projections all round a cell's outline to its mask, in place."""
    for angle in np.linspace(0, 2 * np.pi, rng.integers(24, 34)) + rng.normal(0, 0.06):
        length, bend = r * rng.uniform(1.12, 1.42), rng.normal(0, 0.12)
        t = np.array([angle, angle + bend * 0.5, angle + bend])
        far = np.array([r * 0.9, (r + length) / 2, length])
        stroke(mask, np.stack([x + far * np.cos(t), y + far * np.sin(t)], 1), 2 if rng.random() < 0.6 else 4)


def draw_rods(rng, image, body, nucleus):
    """Auer rods: bundles of crimson needles in the cytoplasm. Returns their mask, uint8 [H, W]."""
    mask, free = blank(image), shrink(cv2.subtract(body, nucleus), 5)
    for x, y in inside(rng, free if free.max() > 128 else body, rng.integers(5, 9)):
        angle = rng.uniform(0, np.pi)
        for _ in range(rng.integers(2, 5)):
            tilt, half, shift = angle + rng.normal(0, 0.18), rng.uniform(11, 18), rng.normal(0, 3, 2)
            reach = half * np.array([np.cos(tilt), np.sin(tilt)])
            stroke(mask, np.array([[x, y] - reach, [x, y] + reach]) + shift, 3)
    mask = cv2.min(mask, body)
    paint(image, mask, (188, 14, 84))
    return mask


def draw_granules(rng, image, where, granules):
    """Granules (colours, number, radius) inside the mask `where`. Returns their mask, uint8 [H, W]."""
    colours, number, radius = granules
    points, every = inside(rng, where, int(number * rng.uniform(0.8, 1.2))), blank(image)
    colour = rng.integers(len(colours), size=len(points))
    for i in range(len(colours)):
        chosen = points[colour == i]
        mask = cv2.min(dots(blank(image), chosen, radius * rng.uniform(0.75, 1.25, len(chosen))), where)
        paint(image, mask, colours[i], 0.9)
        every = cv2.max(every, mask)
    return every


def draw_leukocyte(rng, image, cell, x, y):
    """Draws a whole cell about (x, y) into `image`. Returns the mask, uint8 [H, W], of what decides its class."""
    r, shape = cell.radius * rng.uniform(0.9, 1.1), image.shape[:2]
    body = fill(blank(image), blob(rng, x, y, r, r * rng.uniform(0.9, 1), rng.uniform(0, 7)))
    core = body.copy()
    if "hairs" in cell.extras:
        draw_hairs(rng, body, x, y, r)
    paint(image, body, np.array(cell.cytoplasm) + rng.normal(0, 6, 3), texture=0.05 * noise(rng, shape, 6))
    if sum(cell.cytoplasm) < 400 or "rim" in cell.extras:  # basophilic cytoplasm is deepest at the edge
        paint(image, cv2.subtract(body, soften(shrink(body, 4), 4)), np.array(cell.cytoplasm) * 0.75, 0.8)
    ratio = cell.ratio * rng.uniform(0.95, 1.05)
    away, angle = 0.95 if cell.form == "eccentric" else rng.uniform(0, 0.35), rng.uniform(0, 2 * np.pi)
    away *= r * max(0, 0.96 - ratio)
    nx, ny = x + away * np.cos(angle), y + away * np.sin(angle)
    nucleus = cv2.min(draw_nucleus(rng, shape, cell.form, nx, ny, r * ratio), body)
    if "hof" in cell.extras:  # the pale Golgi zone beside the nucleus
        gap = r * ratio * 0.95
        hof = blob(rng, nx - gap * np.cos(angle), ny - gap * np.sin(angle), r * 0.27, r * 0.36, angle)
        paint(image, cv2.min(soften(fill(blank(image), hof), 4), body), (226, 212, 234), 0.9)
    if "vacuoles" in cell.extras or "foam" in cell.extras:
        number, size = (120, 7.5) if "foam" in cell.extras else (9, 4.5)
        points = inside(rng, shrink(body, 4), number)
        paint(
            image,
            dots(blank(image), points, size * rng.uniform(0.5, 1.2, len(points))),
            (240, 236, 244),
            0.75,
        )
    covered = "over" in cell.extras
    granules = blank(image)
    if cell.granules and not covered:
        granules = draw_granules(rng, image, cv2.subtract(shrink(body, 2), nucleus), cell.granules)
    colour, grain, contrast = cell.chromatin
    clumps = contrast * (1.3 * noise(rng, shape, grain) + 0.7 * noise(rng, shape, grain / 2)).clip(-1, 1)
    paint(image, nucleus, np.array(colour) + rng.normal(0, 6, 3), texture=clumps)
    paint(image, cv2.subtract(nucleus, soften(nucleus, 3)), np.array(colour) * 0.7, 0.9)
    number = rng.integers(1, cell.nucleoli + 1) if cell.nucleoli else 0
    for nx, ny in inside(rng, shrink(nucleus, 10), number):
        paint(image, soften(fill(blank(image), blob(rng, nx, ny, r * 0.13)), 1.5), (172, 150, 222), 0.85)
    if cell.granules and covered:
        granules = draw_granules(rng, image, shrink(body, 2), cell.granules)
    rods = draw_rods(rng, image, body, nucleus) if "rods" in cell.extras else None
    if cell.decides == "border":
        return cv2.subtract(body, shrink(core, 5))
    granules = cv2.dilate(granules, np.ones((3, 3), np.uint8))
    return {"nucleus": nucleus, "granules": granules, "rods": rods, "cell": body}[cell.decides]


def draw_smudge(rng, image, cell):
    """A burst nucleus: streaked, without outline or cytoplasm. Returns its mask, uint8 [H, W]."""
    angle, mask = rng.uniform(0, 2 * np.pi), blank(image)
    fill(mask, blob(rng, 125, 125, cell.radius * 1.1, cell.radius * 0.7, angle, 0.25))
    for _ in range(rng.integers(6, 12)):
        t = angle + rng.normal(0, 0.5) + np.pi * rng.integers(2)
        start = rng.normal(125, 20, 2)
        stroke(
            mask, [start, start + rng.uniform(60, 105) * np.array([np.cos(t), np.sin(t)])], rng.uniform(5, 16)
        )
    mask = soften(mask, 7)
    paint(image, mask, (166, 104, 190), 0.9, cell.chromatin[2] * noise(rng, image.shape, cell.chromatin[1]))
    shreds = dots(blank(image), rng.normal(125, 26, (14, 2)), rng.uniform(4, 10, 14))
    paint(image, cv2.min(mask, soften(shreds, 4)), LACY, 0.6)
    return (mask > 100).astype(np.uint8) * 255


def draw_artefact(rng, image):
    """No cell: stain precipitate, a bubble, a fibre or a crystal. Returns its mask, uint8 [H, W]."""
    mask, kind = blank(image), rng.integers(3)
    x, y = rng.normal(125, 10, 2)
    if kind == 0:  # precipitate of the stain
        points = rng.normal((x, y), rng.uniform(22, 34), (rng.integers(60, 140), 2))
        dots(mask, points, rng.gamma(2, 1.6, len(points)) + 1)
        paint(image, mask, (38, 14, 58), 0.95)
    elif kind == 1:  # an air bubble or a drop
        r = rng.uniform(36, 62)
        fill(mask, blob(rng, x, y, r, wobble=0.01))
        paint(image, mask, (250, 248, 240))
        paint(image, cv2.subtract(mask, soften(shrink(mask, 4), 3)), (70, 66, 78), 0.95)
    else:  # fibres and scratches
        for _ in range(rng.integers(2, 5)):
            angle, reach = rng.uniform(0, np.pi), rng.uniform(50, 110)
            t = np.linspace(-1, 1, 20)[:, None]
            bend = rng.normal(0, 25) * t**2 * np.array([-np.sin(angle), np.cos(angle)])
            line = bend + reach * t * np.array([np.cos(angle), np.sin(angle)])
            stroke(mask, rng.normal((x, y), 12) + line, rng.uniform(3, 9))
        paint(image, mask, (84, 76, 112), 0.9, 0.3 * noise(rng, image.shape, 5))
    return mask


def draw_unidentifiable(rng, image, cell):
    """A crushed cell under another, which nobody could name (blurred by the caller). Returns its mask, uint8 [H, W]."""
    x, y = rng.normal(125, 16, 2)
    form = ("oval", "kidney", "round", "bilobed")[rng.integers(4)]
    cell = cell._replace(form=form, radius=rng.uniform(50, 74), ratio=rng.uniform(0.5, 0.85))
    mask = draw_leukocyte(rng, image, cell, x, y)
    if rng.random() < 0.5:
        angle = rng.uniform(0, 2 * np.pi)
        over = fill(blank(image), blob(rng, x + 50 * np.cos(angle), y + 50 * np.sin(angle), 44))
        paint(image, over, (206, 180, 190), 0.7)
    return mask


def photograph(rng, image, defocus):
    """Stain strength and hue, light, focus and sensor noise of one picture: float32 [H, W, 3] to uint8."""
    stain, light = rng.normal(1, 0.04, 3).clip(0.85, 1.15) * rng.uniform(0.93, 1.08), rng.uniform(0.96, 1.02)
    curve = (
        255 * light * (np.arange(256).clip(3)[:, None] / 255) ** stain
    )  # Beer-Lambert: density times stain
    image = cv2.GaussianBlur(image.clip(0, 255).astype(np.uint8), (0, 0), defocus)
    image = cv2.LUT(image, curve.clip(0, 255).astype(np.uint8)[None])
    height, width = image.shape[:2]
    grain = np.frombuffer(rng.bytes(height // 2 * (width // 2) * 3), np.uint8).reshape(
        height // 2, width // 2, 3
    )
    return cv2.addWeighted(image, 1, cv2.resize(grain, (width, height)), 0.06, -7.65)


def enlarge(image):
    """The middle VIEW of SIDE pixels of an image or a mask (of a field: all but as much of its rim), SIDE pixels wide."""
    rim, scale = (SIDE - VIEW) // 2, SIDE / VIEW
    return cv2.resize(image[rim:-rim, rim:-rim], None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)


def draw_field(first, second, seed, number):
    """Two cells of classes first and second side by side, and a picture of each, cropped from the same field.

    Returns two pictures, uint8 RGB [250, 250, 3], that share a quarter to a half of their area pixel for pixel, as
    neighbours in the real data do.
    """
    rng = key(seed, "bm field", first, second, number)
    a, b = CELLS[first], CELLS[second]
    step = rng.permutation([(a.radius + b.radius) * rng.uniform(0.85, 1), rng.uniform(0, 40)]) * rng.choice(
        [-1, 1], 2
    )
    step = np.round(step / 4).astype(int) * 4  # 4 pixels here are 5 in the picture
    left, top = np.maximum(-step, 0)
    image = draw_plasma(rng, SIDE + np.abs(step[::-1]))
    for _, x, y in ((a, left + 125, top + 125), (b, left + 125 + step[0], top + 125 + step[1])):
        draw_red_cells(rng, image, x, y)
    for cell, x, y in ((a, left + 125, top + 125), (b, left + 125 + step[0], top + 125 + step[1])):
        draw_leukocyte(rng, image, cell, x, y)
    draw_platelets(rng, image)
    image = photograph(rng, enlarge(image), rng.uniform(0.4, 1.6))
    corners = ((x * 5 // 4, y * 5 // 4) for x, y in ((left, top), (left + step[0], top + step[1])))
    return [image[y : y + SIDE, x : x + SIDE] for x, y in corners]


def draw_cell(class_code, seed, number, size=SIDE):
    """One bone-marrow picture, e.g. draw_cell("FGC", seed=0, number=1).

    class_code is one of CELLS. Returns the picture, uint8 RGB [size, size, 3], and where the structure lies that
    decides the class, bool [size, size]: nucleus, granules, Auer rods, hairy border, smudge, artefact or whole cell.
    """
    rng, cell = key(seed, "bm", class_code, number), CELLS[class_code]
    image = draw_smear(rng)
    if cell.decides == "smudge":
        mask = draw_smudge(rng, image, cell)
    elif cell.decides == "artefact":
        mask = draw_artefact(rng, image)
    elif class_code == "NIF":
        mask = draw_unidentifiable(rng, image, cell)
    else:
        mask = draw_leukocyte(rng, image, cell, *rng.normal(125, 6, 2))
    defocus = rng.uniform(4.5, 7) if class_code == "NIF" else rng.uniform(0.4, 1.6)
    image, mask = photograph(rng, enlarge(image), defocus), enlarge(mask)
    if size != SIDE:
        image, mask = (cv2.resize(a, (size, size), interpolation=cv2.INTER_AREA) for a in (image, mask))
    return image, mask > 100


def write_image(file, rgb):
    """Writes uint8 RGB [H, W, 3] as the file's ending says, JPEG at quality 92."""
    if not cv2.imwrite(os.fspath(file), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 92]):
        raise OSError(f"could not write {file}")


def bm_counts(size):
    """Images of each class, dict in the order of CELLS: a long tail, down to 8 abnormal eosinophils."""
    return {
        code: c.images if size == "demo" or code == "ABE" else 6 + c.images // 20 for code, c in CELLS.items()
    }


NEIGHBOURS = (
    "NGS NGB",
    "NGS NGS",
    "EBO EBO",
    "EBO MYB",
    "LYT NGS",
    "PMO BLA",
    "PMO MYB",
    "LYT EBO",
)  # pairs of classes


def write_bm(folder, size, seed):
    """BM as TCIA unpacks it: BM_cytomorphology_data/<CLASS>/0001-1000/<CLASS>_00001.jpg.

    In the demo the last images of some classes are 32 pairs of neighbours, cropped from one field each.
    """
    left, fields = {code: list(range(1, count + 1)) for code, count in bm_counts(size).items()}, {}
    for number, pair in enumerate(4 * NEIGHBOURS if size == "demo" else ()):
        first, second = pair.split()
        fields[first, left[first].pop(), second, left[second].pop()] = number
    with tqdm(total=sum(bm_counts(size).values()), desc="bm", unit="image", disable=None) as bar:

        def write(code, number, image):
            start = (number - 1) // 1000 * 1000
            nested = folder / "BM_cytomorphology_data" / code / f"{start + 1:04d}-{start + 1000:04d}"
            nested.mkdir(parents=True, exist_ok=True)
            write_image(nested / f"{code}_{number:05d}.jpg", image)
            bar.update()

        for code, numbers in left.items():
            for number in numbers:
                write(code, number, draw_cell(code, seed, number)[0])
        for (first, one, second, two), number in fields.items():
            for code, name, image in zip(
                (first, second), (one, two), draw_field(first, second, seed, number)
            ):
                write(code, name, image)


# --------------------------------------------------------------------------------------- cervical smears (Papanicolaou)
# Cells of each class in a round of 64, in the order of the published categories (ids 1 to 11).
CERVICAL = {
    "ascus": 8,
    "asch": 6,
    "lsil": 7,
    "hsil": 8,
    "scc": 6,
    "agc": 6,
    "trichomonas": 6,
    "candida": 4,
    "flora": 5,
    "herps": 4,
    "actinomyces": 4,
}
WIDE, HIGH, MARGIN = 720, 540, 110  # pixels: an image, and the strip around it that is drawn and cut off
CD_IMAGES = {"demo": {"train": 40, "test": 10}, "tiny": {"train": 8, "test": 2}}
TEAL, ROSE, BLUE, OCHRE = (150, 206, 208), (226, 150, 186), (128, 150, 184), (232, 140, 96)
INK, SLATE = (44, 44, 92), (92, 104, 140)


def squamous(rng, image, x, y, r, colour, wobble=0.10, stretch=1.0):
    """Cytoplasm of a squamous cell, half-axis r in pixels: painted, and returned as a mask (uint8 [H, W])."""
    mask = fill(blank(image), blob(rng, x, y, r * stretch, r / stretch, rng.uniform(0, 7), wobble))
    paint(image, mask, np.array(colour) + rng.normal(0, 8, 3), 0.85, 0.07 * noise(rng, mask.shape, 9))
    paint(image, cv2.subtract(mask, soften(mask, 3)), np.array(colour) * 0.7, 0.8)
    return mask


def dark_nucleus(rng, image, x, y, r, colour=INK, stretch=1.15, rim=0.7, contrast=0.22):
    """A stained nucleus, half-axis r in pixels: painted, and returned as a mask (uint8 [H, W])."""
    mask = fill(blank(image), blob(rng, x, y, r * stretch, r / stretch, rng.uniform(0, 7), 0.07))
    paint(image, mask, np.array(colour) + rng.normal(0, 6, 3), 0.95, contrast * noise(rng, mask.shape, 3.5))
    paint(image, cv2.subtract(mask, soften(mask, 1.5)), np.array(colour) * rim)
    return mask


def threads(rng, image, x, y, number, reach, width, colour):
    """Thin bent filaments about (x, y): painted, and returned as a mask (uint8 [H, W])."""
    mask = blank(image)
    for _ in range(number):
        angle = rng.uniform(0, 2 * np.pi) + np.cumsum(rng.normal(0, 0.25, 8))
        path = np.cumsum(reach / 8 * np.stack([np.cos(angle), np.sin(angle)], 1), 0)
        stroke(mask, np.array([x, y]) + np.vstack([[0, 0], path]), width)
    paint(image, mask, colour, 0.9)
    return mask


def draw_cervical(rng, image, name):
    """Draws a cell of class `name` amid `image` (float32 [H, W, 3], changed). Returns its mask, uint8 [H, W]."""
    x, y = image.shape[1] / 2, image.shape[0] / 2
    scale = rng.uniform(0.8, 1.2)
    if name in ("ascus", "lsil"):  # mature, its nucleus enlarged; with a halo and often two nuclei: koilocyte
        mask = squamous(rng, image, x, y, 46 * scale, TEAL if rng.random() < 0.7 else ROSE)
        if name == "lsil":
            paint(
                image,
                cv2.min(mask, soften(fill(blank(image), blob(rng, x, y, 29 * scale)), 2)),
                (240, 246, 246),
                0.9,
            )
        r, colour = (12, INK) if name == "lsil" else (14, SLATE)
        for shift in (-10, 10) if name == "lsil" and rng.random() < 0.6 else (0,):
            dark_nucleus(rng, image, x + shift * scale, y + rng.normal(0, 2), r * scale, colour)
    elif name == "asch":  # a small immature cell, large nucleus
        mask = squamous(rng, image, x, y, 26 * scale, (120, 182, 190), 0.05)
        dark_nucleus(rng, image, x + rng.normal(0, 3), y, 15 * scale, (70, 76, 118))
    elif name in ("hsil", "agc"):  # crowded dark nuclei: in a loose heap, or in a rosette of columnar cells
        mask, number = blank(image), rng.integers(5, 10) if name == "hsil" else rng.integers(12, 20)
        around, within = (
            ((110, 150, 176), (34, 30, 76)) if name == "hsil" else ((150, 130, 184), (74, 48, 116))
        )
        for i in range(number):
            t, far = (
                (rng.uniform(0, 7), 30 * rng.random() ** 0.5) if name == "hsil" else (2.4 * i, 12 * i**0.5)
            )
            cx, cy, r = (
                x + far * scale * np.cos(t),
                y + far * scale * np.sin(t),
                (11 if name == "hsil" else 8) * scale,
            )
            mask = cv2.max(mask, squamous(rng, image, cx, cy, r * 1.35, around, 0.05))
            dark_nucleus(rng, image, cx, cy, r, within, 1.3)
    elif name == "scc":  # keratinised spindles and tadpoles, orange, with an inky nucleus
        mask = squamous(rng, image, x, y, 36 * scale, OCHRE, 0.12, rng.uniform(1.35, 1.8))
        dark_nucleus(rng, image, x, y, 12 * scale, (30, 20, 44), rng.uniform(1.2, 1.6))
    elif name == "trichomonas":  # a small grey-green pear, pale nucleus
        mask = squamous(rng, image, x, y, 17 * scale, (168, 192, 180), 0.08, 1.25)
        dark_nucleus(rng, image, x + 3, y, 4 * scale, (120, 140, 150), 1.4)
    elif name == "candida":  # pseudohyphae and budding yeasts
        mask = threads(rng, image, x, y, rng.integers(4, 8), 95 * scale, 3, (150, 96, 116))
        yeasts = dots(blank(image), rng.normal((x, y), 26 * scale, (14, 2)), rng.uniform(2.5, 4.5, 14))
        paint(image, yeasts, (134, 70, 106))
        mask = cv2.max(mask, yeasts)
    elif name == "flora":  # a clue cell: strewn with bacteria that blur its border
        mask = squamous(rng, image, x, y, 46 * scale, (146, 164, 200))
        bacteria = dots(
            blank(image), inside(rng, cv2.dilate(mask, np.ones((7, 7), np.uint8)), 380), np.full(380, 1.1)
        )
        paint(image, bacteria, (74, 74, 134))
        dark_nucleus(rng, image, x, y, 7 * scale, SLATE)
    elif name == "herps":  # moulded ground-glass nuclei with dark rims in one cell
        mask = squamous(rng, image, x, y, 40 * scale, (120, 170, 172), 0.06)
        for t in np.arange(rng.integers(3, 6)) * 1.4 + rng.uniform(0, 7):
            cx, cy = x + 17 * scale * np.cos(t), y + 17 * scale * np.sin(t)
            dark_nucleus(rng, image, cx, cy, 14 * scale, (152, 172, 186), 1.1, 0.3, 0.05)
    else:  # actinomyces: a dark ball of wool
        mask = threads(rng, image, x, y, 90, 62 * scale, 1, (62, 70, 74))
        core = soften(fill(blank(image), blob(rng, x, y, 30 * scale, wobble=0.15)), 6)
        paint(image, core, (40, 44, 48), 0.9)
        mask = cv2.max(mask, (core > 128).astype(np.uint8) * 255)
    return mask


def draw_slide(seed, split, number):
    """One cervical image with up to nine cells and the neutrophils around them, and its boxes.

    Returns uint8 RGB [540, 720, 3] and a list of (class name, [x, y, width, height]) in pixels. A cell at the edge
    keeps its whole box, some of it outside the image; every third image has a box of width or height 1 that holds no
    cell, as in the published set.
    """
    rng = key(seed, "cd", split, number)
    deck = [name for name, copies in CERVICAL.items() for _ in range(copies)]
    key(seed, "cd", split).shuffle(deck)
    image = np.empty((HIGH + 2 * MARGIN, WIDE + 2 * MARGIN, 3), np.float32)
    image[:] = np.array([240, 246, 244]) + rng.normal(0, 3, 3)
    image += cv2.merge([3 * noise(rng, image.shape, 60)] * 3)
    for x, y in rng.uniform(20, (image.shape[1] - 20, image.shape[0] - 20), (rng.integers(25, 60), 2)).astype(
        int
    ):
        dark_nucleus(rng, image[y - 16 : y + 16, x - 16 : x + 16], 16, 16, rng.uniform(4, 6.5), (70, 84, 120))
    boxes = []
    for cell in range(9):
        name = deck[((number - 1) * 9 + cell) % len(deck)]
        x, y = np.array([120 + 240 * (cell % 3), 90 + 180 * (cell // 3)]) + rng.integers(-20, 21, 2)
        if cell == number % 9 and cell % 3 != 1:
            x = rng.integers(-8, 9) + (WIDE if cell % 3 else 0)
        view = image[y + MARGIN - 100 : y + MARGIN + 100, x + MARGIN - 100 : x + MARGIN + 100]
        left, top, w, h = cv2.boundingRect((draw_cervical(rng, view, name) > 100).astype(np.uint8))
        boxes.append((name, [int(v) for v in (x - 100 + left, y - 100 + top, w, h)]))
    if number % 3 == 1:
        thin = [1, int(rng.integers(1, 60))][:: 1 if number % 2 else -1]
        boxes.append(
            (deck[number % len(deck)], [int(rng.integers(WIDE - 60)), int(rng.integers(HIGH - 60)), *thin])
        )
    image = photograph(rng, image, rng.uniform(0.5, 1.6))
    return image[MARGIN:-MARGIN, MARGIN:-MARGIN], boxes


def write_cd(folder, size, seed):
    """CD as COCO detection: train.json and test.json beside train/ and test/."""
    ids = {name: i for i, name in enumerate(CERVICAL, 1)}
    with tqdm(total=sum(CD_IMAGES[size].values()), desc="cd", unit="image", disable=None) as bar:
        for split, count in CD_IMAGES[size].items():
            (folder / split).mkdir()
            images, annotations = [], []
            for number in range(1, count + 1):
                rgb, boxes = draw_slide(seed, split, number)
                file = f"{split}_{number:05d}.jpg"
                images.append({"id": number, "file_name": file, "width": WIDE, "height": HIGH})
                write_image(folder / split / file, rgb)
                for name, (x, y, w, h) in boxes:
                    annotations.append(
                        {
                            "id": len(annotations) + 1,
                            "image_id": number,
                            "category_id": ids[name],
                            "bbox": [x, y, w, h],
                            "area": w * h,
                            "iscrowd": 0,
                            "segmentation": [],
                        }
                    )
                bar.update()
            categories = [{"id": i, "name": name, "supercategory": "cell"} for name, i in ids.items()]
            content = {"images": images, "annotations": annotations, "categories": categories}
            (folder / f"{split}.json").write_text(json.dumps(content))


# ------------------------------------------------------------------------- lymph node sections (haematoxylin and eosin)
PATCH, CENTRE = 96, slice(32, 64)  # pixels; the label asks for tumour in the middle 32 x 32
PCAM_IMAGES = {
    "demo": {"train": 512, "valid": 128, "test": 128},
    "tiny": {"train": 64, "valid": 16, "test": 16},
}


def draw_patch(seed, split, number):
    """One lymph node patch: uint8 RGB [96, 96, 3], and where tumour nuclei lie, bool [96, 96].

    Half the patches (one of 1 and 2, one of 3 and 4, ...) have tumour in their middle 32x32 pixels; of the others
    most have it around the middle, never inside.
    """
    rng, chosen = (
        key(seed, "pcam", split, number),
        key(seed, "pcam", split, "pair", (number + 1) // 2).integers(2),
    )
    positive = number % 2 == chosen
    image = np.empty((PATCH, PATCH, 3), np.float32)
    image[:] = np.array([232, 188, 212]) + rng.normal(0, 5, 3)
    fibres = noise(rng, (PATCH, PATCH // 4), 5) + 0.5 * noise(rng, (PATCH, PATCH // 4), 2)
    image *= 1 + 0.05 * cv2.resize(fibres if rng.random() < 0.5 else fibres.T, (PATCH, PATCH))[..., None]
    nest, spread = rng.uniform((-5, -5), (100, 100)), rng.uniform(26, 60) * (rng.random() < 0.75)
    if positive:
        nest, spread = rng.uniform((36, 36), (60, 60)), rng.uniform(18, 60)
    grid = np.mgrid[0:105:13, 0:105:13].reshape(2, -1).T + rng.normal(0, 2.2, (81, 2))
    tumour, rims, small, nucleoli = blank(image), blank(image), blank(image), []
    texture = 0.14 * noise(rng, image.shape, 3)
    for x, y in grid:
        if np.hypot(*(nest - (x, y))) < spread and (positive or max(abs(x - 48), abs(y - 48)) > 29):
            outline = blob(rng, x, y, rng.uniform(6.5, 9), rng.uniform(5.5, 7.5), rng.uniform(0, 7), 0.10)
            nucleus = fill(blank(image), outline)
            paint(image, nucleus, np.array([148, 92, 168]) + rng.normal(0, 8, 3), 0.95, texture)
            stroke(rims, outline, 1)
            nucleoli.append(rng.normal((x, y), 1.5))
            tumour = cv2.max(tumour, nucleus)
        elif rng.random() < 0.6:  # a lymphocyte, now and then a fibroblast
            r, thin = (3.4, 1) if rng.random() < 0.75 else (5, 0.35)
            fill(small, blob(rng, x, y, r, r * thin, rng.uniform(0, 7), 0.05))
    paint(image, small, np.array([72, 48, 122]) + rng.normal(0, 6, 3), 0.95)
    paint(image, rims, (84, 40, 120), 0.7)
    paint(image, dots(blank(image), nucleoli, [1.5] * len(nucleoli)), (84, 30, 110))
    return photograph(rng, image, rng.uniform(0.4, 0.9)), tumour > 100


def write_pcam(folder, size, seed):
    """PCam as published: camelyonpatch_level_2_split_<split>_{x,y}.h5, x [N, 96, 96, 3] and y [N, 1, 1, 1], uint8."""
    with tqdm(total=sum(PCAM_IMAGES[size].values()), desc="pcam", unit="image", disable=None) as bar:
        for split, count in PCAM_IMAGES[size].items():
            x, y = np.empty((count, PATCH, PATCH, 3), np.uint8), np.empty((count, 1, 1, 1), np.uint8)
            for i in range(count):
                x[i], tumour = draw_patch(seed, split, i + 1)
                y[i] = tumour[CENTRE, CENTRE].any()
                bar.update()
            for letter, array in (("x", x), ("y", y)):
                with h5py.File(folder / f"camelyonpatch_level_2_split_{split}_{letter}.h5", "w") as file:
                    file.create_dataset(letter, data=array)


# ---------------------------------------------------------------------------------------------------------------- files
def is_complete(folder, wanted):
    """Whether a set's folder was made with the arguments `wanted` and all its files stand there."""
    try:
        made = json.loads((folder / MARKER).read_text())
        return made["arguments"] == wanted and all((folder / file).is_file() for file in made["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make(out, size="demo", seed=0, sets=SETS):
    """Writes the sets into out/bm, out/cd, out/pcam unless they are there. size: "demo" or "tiny". Returns Path(out).

    A set appears whole: drawn in a hidden folder beside, then renamed. One made by this script with other arguments, or
    before it was changed, is replaced. SystemExit where a folder stands that it did not make, or that can't be written.
    """
    out = Path(out)
    for name in sets:
        folder, fresh, old = out / name, out / f".{name}.tmp{os.getpid()}", out / f".{name}.old{os.getpid()}"
        wanted = {"set": name, "size": size, "seed": seed, "script": zlib.crc32(Path(__file__).read_bytes())}
        if is_complete(folder, wanted):
            continue
        if (
            folder.exists()
            and not (folder / MARKER).exists()
            and (not folder.is_dir() or any(folder.iterdir()))
        ):
            raise SystemExit(
                f"{folder} holds something that is not synthetic: choose another --out, or move it away"
            )
        try:
            fresh.mkdir(parents=True)
            {"bm": write_bm, "cd": write_cd, "pcam": write_pcam}[name](fresh, size, seed)
            files = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file())
            (fresh / MARKER).write_text(json.dumps({"arguments": wanted, "files": files}))
            if folder.exists():
                os.replace(folder, old)
            os.replace(fresh, folder)
        except OSError as error:
            if not is_complete(folder, wanted):  # else another process has just drawn the same
                raise SystemExit(f"{folder} can't be written ({error}): choose another --out") from None
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", default="demo/data", help="folder for bm, cd and pcam")
    parser.add_argument("--size", choices=SIZES, default="demo")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=SETS)
    args = parser.parse_args()
    if args.seed < 0:
        parser.error(f"argument --seed: {args.seed} is negative")
    make(args.out, size=args.size, seed=args.seed, sets=args.sets)
    print(f"synthetic cells: {', '.join(os.path.join(args.out, name) for name in args.sets)}")


if __name__ == "__main__":
    main()
