"""How fast is it? Both sides of each comparison in turn, one CSV row a measurement: what,ours,reference,unit,ratio.

    python tests/benchmark.py > speed.csv                               every row, on cells drawn for it; many minutes
    python tests/benchmark.py --only "input pipeline" --data data/bm    some rows, on images of one's own
    python tests/benchmark.py --only "epoch against plain loop" --model resnet18 --image-size 96

Medians of --rounds; a ratio above 1 is better for us. The reference is what is usually written instead: torchvision's
ImageFolder and PIL transforms, an eager float32 loop with .item() in each step, scikit-learn, csv.DictReader.
The machine, its load before each row and what a row stands for are told on stderr.
"""
import argparse
import contextlib
import csv
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn import metrics, model_selection
from torch.nn.functional import cross_entropy
from torchvision import transforms

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import datasets  # noqa: E402
import demo_data  # noqa: E402
import evaluate  # noqa: E402
import models  # noqa: E402
import splits  # noqa: E402
import train  # noqa: E402

MEAN, STD = (0.5630, 0.4959, 0.7353), (0.2421, 0.2835, 0.1767)  # Table 2, BM
FILES, CLASS_COUNTS = 171374, ROOT / "paper" / "table5.csv"     # as many files as BM has, in its classes


# ---------------------------------------------------------------- measuring
def in_turn(ours, reference, rounds):
    """Call both in turn, once to warm up, then rounds times: medians of their seconds."""
    seconds = [], []
    for turn in range(rounds + 1):
        for kept, call in zip(seconds, (ours, reference)):
            start = time.perf_counter()
            call()
            if turn:
                kept.append(time.perf_counter() - start)
    return tuple(map(statistics.median, seconds))


def rates(images, seconds):
    """A row's ours, reference, unit and ratio from both sides' seconds for so many images."""
    return images / seconds[0], images / seconds[1], "images/s", seconds[1] / seconds[0]


def costs(ours, reference, unit):
    """The same from what is the better the smaller."""
    return ours, reference, unit, reference / ours


def say(text):
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def describe_machine():
    """Processor, cores, GPU and versions in one line."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if any(flag in line.split() for line in lines)]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return (f"{name}, {len(os.sched_getaffinity(0))} cores ({' '.join(flags)}), {gpu}; Python {platform.python_version()}, torch "
            f"{torch.__version__}, torchvision {torchvision.__version__}, OpenCV {cv2.__version__}, {torch.get_num_threads()} thread(s)")


# ---------------------------------------------------------------- the usual way
def usual_training(size):
    """Section 2.3's augmentation by torchvision and PIL."""
    return transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.08, 1)),
        transforms.RandomRotation(180, interpolation=transforms.InterpolationMode.BILINEAR),
        transforms.RandomHorizontalFlip(), transforms.RandomVerticalFlip(),
        transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def usual_test(size):
    """Resize and normalise by torchvision and PIL."""
    return transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def usual_loader(root, transform, indices=None, sampler=None, workers=0):
    """DataLoader of batches of 32 over an ImageFolder, or its images at indices."""
    data = torchvision.datasets.ImageFolder(root, transform)
    data = data if indices is None else torch.utils.data.Subset(data, indices)
    return torch.utils.data.DataLoader(data, 32, sampler=sampler, num_workers=workers, drop_last=sampler is not None)


def usual_epoch(net, optimizer, batches, val_batches, device, file):
    """An epoch as most repositories write it: eager, float32, .item() each step, validation, checkpoint."""
    net.train()
    total = correct = 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        out = net(images)
        loss = cross_entropy(out, labels)
        loss.backward()
        optimizer.step()
        total += loss.item()
        correct += (out.argmax(1) == labels).sum().item()
    usual_evaluation(net, val_batches, device)
    torch.save(net.state_dict(), file)


def usual_evaluation(net, batches, device):
    """Sum of losses and number of right answers of a plain evaluation loop."""
    net.eval()
    total = correct = 0
    with torch.no_grad():
        for images, labels in batches:
            out, labels = net(images.to(device)), labels.to(device)
            total += cross_entropy(out, labels).item()
            correct += (out.argmax(1) == labels).sum().item()
    return total, correct


# ---------------------------------------------------------------- rows on pictures
def input_pipeline(cells, args):
    """From JPEG files to augmented batches of 32, one core each: ours to uint8, as it goes to the device."""
    indices = np.resize(np.random.default_rng(0).permutation(len(cells)), args.images)
    batches, transform = datasets.Batches(cells, args.image_size), usual_training(args.image_size)
    starts = range(0, len(indices), 32)

    def usual():
        for start in starts:
            torch.stack([transform(Image.open(cells.root / str(cells.paths[i])).convert("RGB"))
                         for i in indices[start:start + 32]])
    seconds = in_turn(lambda: [batches.__getitems__((1, start, indices[start:start + 32])) for start in starts], usual, args.rounds)
    return rates(len(indices), seconds)


def build(args, device, layout=torch.contiguous_format):
    """The network with 21 units, the same weights every time."""
    train.seed_all(0)
    return models.build_model(args.model, 21, image_size=args.image_size).to(device, memory_format=layout)


def epoch_against_plain_loop(cells, args):
    """One epoch of fit (training, validation, checkpoint) against the plain loop; same network, images, batch size, workers."""
    device, amp = settings(args)
    count, val_count = 32 * args.steps, max(8, 8 * args.steps)
    chosen = np.resize(np.random.default_rng(0).permutation(len(cells)), count + val_count)
    learn, val = cells.subset(chosen[:count]), cells.subset(chosen[count:])
    order = torchvision.datasets.ImageFolder(cells.root)
    place = {os.path.relpath(file, cells.root): i for i, (file, _) in enumerate(order.samples)}
    rows = [place[path] for path in cells.paths[chosen]]
    weights = (1 / np.bincount(learn.targets, minlength=len(cells.classes)).clip(1))[learn.targets]
    net, usual = build(args, device), build(args, device)
    optimizer = torch.optim.SGD(usual.parameters(), lr=1e-3, momentum=0.9)

    def ours():
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            train.fit(folder, net, learn, val, lr=1e-3, epochs=1, image_size=args.image_size, mean=MEAN, std=STD,
                      workers=args.workers, device=device, amp=amp, memory_format=args.memory_format, compile=args.compile)

    def reference():
        sampler = torch.utils.data.WeightedRandomSampler(weights, count)
        batches = usual_loader(cells.root, usual_training(args.image_size), rows[:count], sampler, args.workers)
        val_batches = usual_loader(cells.root, usual_test(args.image_size), rows[count:], workers=args.workers)
        with tempfile.TemporaryDirectory() as folder:
            usual_epoch(usual, optimizer, batches, val_batches, device, f"{folder}/best.pt")
    return rates(count, in_turn(ours, reference, args.rounds))


def settings(args):
    """Device, and precision as train.py chooses it."""
    device = train.choose_device(args.device)
    return device, train.choose_amp(device, args.amp)


def step_against_bare_step(cells, args):
    """train_epoch on uint8 batches in memory against forward, backward and optimiser alone on what is normalised already."""
    device, amp = settings(args)
    layout = train.LAYOUTS[args.memory_format]
    mean, std = (torch.tensor(v, device=device) for v in (MEAN, STD))
    draw = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, (32, args.image_size, args.image_size, 3), dtype=torch.uint8, generator=draw).permute(0, 3, 1, 2)
              for _ in range(args.steps)]
    labels = torch.randint(0, 21, (32,), generator=draw)
    ready = [datasets.normalise(batch.to(device), mean, std).contiguous(memory_format=layout) for batch in images]
    there, nets = labels.to(device), [build(args, device, layout).train() for _ in range(2)]
    optimizers = [torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9, fused=True) for net in nets]
    scalers = [torch.amp.GradScaler(device.type, enabled=amp == "fp16") for _ in nets]
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def ours():
        train.train_epoch(nets[0], ((batch, labels) for batch in images), optimizers[0], scalers[0], mean, std, device,
                          amp, layout)
        wait()

    def bare():
        for batch in ready:
            with torch.autocast(device.type, train.AMP_DTYPES[amp], amp != "off"):
                loss = cross_entropy(nets[1](batch), there)
            optimizers[1].zero_grad(set_to_none=True)
            scalers[1].scale(loss).backward()
            scalers[1].step(optimizers[1])
            scalers[1].update()
        wait()
    return rates(32 * len(images), in_turn(ours, bare, args.rounds))


def evaluation_against_plain_loop(cells, args):
    """predict from files to logits against a plain loop under no_grad."""
    device, amp = settings(args)
    chosen = np.resize(np.arange(len(cells)), 64 * args.steps) % len(cells)
    some = cells.subset(chosen)
    net, usual = build(args, device, train.LAYOUTS[args.memory_format]), build(args, device)
    batches = usual_loader(cells.root, usual_test(args.image_size), chosen, workers=args.workers)
    seconds = in_turn(lambda: train.predict(net, some, image_size=args.image_size, mean=MEAN, std=STD, workers=args.workers,
                                            device=device, amp=amp), lambda: usual_evaluation(usual, batches, device), args.rounds)
    return rates(len(some), seconds)


# ---------------------------------------------------------------- rows at the study's size
def full_targets():
    """Classes and class numbers (int64 [171374]) of the BM data set, from the published Table 5."""
    with open(CLASS_COUNTS, encoding="utf-8", newline="") as handle:
        counts = {row["class"]: int(row["images"]) for row in csv.DictReader(handle)}
    return list(counts), np.repeat(np.arange(len(counts)), list(counts.values()))


def write_study(runs):
    """Predictions of 125 runs on a fifth of 171,374 images each, 21 probabilities an image; returns the files."""
    classes, targets = full_targets()
    paths = np.array([f"{classes[t]}/{i // 1000:04d}/{classes[t]}_{i:06d}.jpg" for i, t in enumerate(targets)])
    parts = splits.make_splits(targets)
    splits.write_splits(runs / "split.csv", paths, [classes[t] for t in targets], parts)
    pairs = [(model, init) for model in evaluate.MODELS for init in evaluate.INITS if model != "resnext50_32x4d" or init == "random"]
    rng, files = np.random.default_rng(0), []
    for fold in range(5):
        rows = np.flatnonzero(parts[:, fold] == "test")
        logits = rng.normal(0, 1.5, (len(rows), len(classes)))
        logits[np.arange(len(rows)), targets[rows]] += 4
        share = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        tails = [classes[p.argmax()] + "".join(f",{v:.7g}" for v in p) for p in share]
        heads = [f"{paths[i]},{classes[targets[i]]}," for i in rows]
        members = [np.flatnonzero(targets[rows] == label) for label in range(len(classes))]
        for number, (model, init) in enumerate(pairs):  # every network gives a class's answers to other images
            place = np.empty(len(rows), np.int64)
            for group in members:
                place[group] = np.roll(group, 37 * number)
            file = runs / "train" / model / init / f"fold{fold}" / "predictions.csv"
            file.parent.mkdir(parents=True)
            text = "\n".join(head + tails[p] for head, p in zip(heads, place))
            file.write_text("path,label,prediction," + ",".join(f"p_{c}" for c in classes) + f"\n{text}\n", encoding="utf-8")
            files.append(file)
    return files


def usual_scores(file):
    """A fold's table by csv.DictReader and scikit-learn."""
    with open(file, encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    np.array([[float(value) for key, value in row.items() if key.startswith("p_")] for row in rows])
    labels, predictions = [row["label"] for row in rows], [row["prediction"] for row in rows]
    metrics.precision_recall_fscore_support(labels, predictions, zero_division=0)
    metrics.confusion_matrix(labels, predictions)


def script(name, *arguments):
    """Run one of the scripts to its end; returns its seconds and its peak memory in MB."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / name), *map(str, arguments)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} {' '.join(map(str, arguments))}: ended with status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def evaluate_full_study(_, args):
    """evaluate.py on 125 runs; reference: three files read by csv.DictReader and scored by scikit-learn, times 125 / 3."""
    with tempfile.TemporaryDirectory() as folder:
        files = write_study(pathlib.Path(folder))
        ours, usual = [], []
        for _ in range(args.rounds):
            seconds, peak = script("evaluate.py", "--runs", folder)
            start = time.perf_counter()
            for file in files[:3]:
                usual_scores(file)
            ours.append(seconds)
            usual.append((time.perf_counter() - start) * len(files) / 3)
            say(f"  {seconds:.1f} s, peak memory {peak:.0f} MB")
    return costs(statistics.median(ours), statistics.median(usual), "s")


def write_tiny_files(folder):
    """171,374 JPEG files of 8x8 pixels in BM's classes, as TCIA unpacks them."""
    classes, targets = full_targets()
    rng = np.random.default_rng(0)
    contents = [cv2.imencode(".jpg", rng.integers(0, 256, (8, 8, 3), np.uint8))[1].tobytes() for _ in range(256)]
    for label, name in enumerate(classes):
        for number in range((targets == label).sum()):
            place = folder / "BM_cytomorphology_data" / name / f"{number // 1000 * 1000 + 1:04d}-{number // 1000 * 1000 + 1000:04d}"
            if number % 1000 == 0:
                place.mkdir(parents=True)
            (place / f"{name}_{number:05d}.jpg").write_bytes(contents[number % 256])
    return folder / "BM_cytomorphology_data"


def splits_full_study(tiny, args):
    """splits.py from start to end; reference: ImageFolder's listing, StratifiedKFold and train_test_split, without Python's start."""
    def usual():
        targets = np.array(torchvision.datasets.ImageFolder(tiny).targets)
        for rest, _ in model_selection.StratifiedKFold(5, shuffle=True, random_state=0).split(targets, targets):
            model_selection.train_test_split(rest, test_size=0.2, stratify=targets[rest], random_state=0)

    def ours():
        with tempfile.TemporaryDirectory() as folder:
            script("splits.py", "--data", tiny, "--out", f"{folder}/split.csv")
    return costs(*in_turn(ours, usual, args.rounds), "s")


OURS = """
import os, sys, torch
sys.path.insert(0, sys.argv.pop(1))
import train
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
train.main()
"""
USUAL = """
import sys, numpy as np, torch, torchvision
from torchvision import transforms as T
data = torchvision.datasets.ImageFolder(sys.argv[1], T.Compose([T.RandomResizedCrop(64), T.ToTensor()]))
train, val = torch.utils.data.random_split(data, [0.8, 0.2])
targets = np.array(data.targets)[train.indices]
sampler = torch.utils.data.WeightedRandomSampler(1 / np.bincount(targets)[targets], len(targets))
net = torchvision.models.squeezenet1_1(num_classes=21)
optimizer = torch.optim.SGD(net.parameters(), lr=0.001)
for images, labels in torch.utils.data.DataLoader(train, 32, sampler=sampler):
    torch.nn.functional.cross_entropy(net(images), labels).backward()
    optimizer.step()
    break
"""


def start_up(tiny, args):
    """train.py until its first step, the pass over the data made before; reference: ImageFolder, random split, sampler, loop."""
    with tempfile.TemporaryDirectory() as runs:
        start = time.perf_counter()
        cells = datasets.open_dataset(tiny.parent)
        datasets.check_dataset(cells, runs)
        say(f"  the pass over {len(cells):,} tiny files, once a data set: {time.perf_counter() - start:.0f} s")
        ours = [sys.executable, "-c", OURS, ROOT, "--model", "squeezenet1_1", "--init", "random", "--fold", "0", "--data", tiny.parent,
                "--runs", runs, "--lr", "0.001", "--epochs", "1", "--image-size", "64", "--workers", "0", "--device", "cpu"]
        seconds = in_turn(*(lambda command=command: subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
                            for command in (ours, [sys.executable, "-c", USUAL, tiny])), args.rounds)
    return costs(*seconds, "s")


MEMORY = """
import os, pathlib, sys
sys.path.insert(0, sys.argv[1])
if sys.argv[3] == "ours":
    import datasets
    cells = datasets.open_dataset(sys.argv[2])
    batches = datasets.loader(datasets.Batches(cells, 64), datasets.BalancedEpochs(cells.targets, 32), workers=2)
else:
    import torch, torchvision
    from torchvision import transforms as T
    data = torchvision.datasets.ImageFolder(sys.argv[2], T.Compose([T.RandomResizedCrop(64), T.ToTensor()]))
    batches = torch.utils.data.DataLoader(data, 32, shuffle=True, num_workers=2)
for step, batch in enumerate(batches):
    if step == 1000:
        children = pathlib.Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
        rows = [pathlib.Path(f"/proc/{p}/smaps_rollup").read_text().splitlines() for p in (os.getpid(), *children)]
        print(sum(int(line.split()[1]) for part in rows for line in part if line.startswith("Pss:")) / 1024)
        os._exit(0)
"""


def memory(tiny, _):
    """Proportional set size of the main process and two workers together after 1,000 batches of 32, without a network."""
    sizes = []
    for side in ("ours", "usual"):
        command = [sys.executable, "-uc", MEMORY, str(ROOT), str(tiny), side]
        sizes.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return costs(*sizes, "MB")


PICTURES = {"input pipeline": input_pipeline, "epoch against plain loop": epoch_against_plain_loop,
            "step against bare step": step_against_bare_step, "evaluation against plain loop": evaluation_against_plain_loop}
FULL = {"evaluate.py full study seconds": evaluate_full_study}
TINY = {"splits.py full study seconds": splits_full_study, "start-up seconds until the first step": start_up,
        "memory of main process and workers MB": memory}


def read_arguments():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [*PICTURES, *FULL, *TINY]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help="; ".join(names))
    parser.add_argument("--data", help="folder of class folders (default: cells drawn for it)")
    parser.add_argument("--model", default="resnext50_32x4d")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--images", type=int, default=320, help="of a round of the input pipeline")
    parser.add_argument("--steps", type=int, default=2, help="of 32 images in a round that trains, of 64 in one that evaluates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch; OpenCV has one")
    parser.add_argument("--workers", type=int, default=0, help="data workers of both sides")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--amp", choices=["auto", *train.AMP_DTYPES], default="auto")
    parser.add_argument("--memory-format", choices=train.LAYOUTS, default="channels_last")
    parser.add_argument("--compile", action="store_true")
    return parser.parse_args()


def main():
    args = read_arguments()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the scripts that are started
    cv2.setNumThreads(0)
    say(describe_machine())
    rows = csv.writer(sys.stdout)
    rows.writerow(["what", "ours", "reference", "unit", "ratio"])
    with tempfile.TemporaryDirectory() as folder:
        folder, places = pathlib.Path(folder), {}

        def place(kind):
            if kind not in places:
                if kind == "tiny":
                    places[kind] = write_tiny_files(folder / "bm_full")
                else:
                    if not args.data:
                        demo_data.make(folder, size="tiny", seed=0, sets=("bm",))
                    places[kind] = datasets.open_dataset(args.data or folder / "bm")
            return places[kind]
        for name, measure in (PICTURES | FULL | TINY).items():
            if name in args.only:
                data = place("pictures") if name in PICTURES else place("tiny") if name in TINY else None
                say(f"{name}: {measure.__doc__} Load {os.getloadavg()[0]:.1f}.")
                ours, reference, unit, ratio = measure(data, args)
                rows.writerow([name, f"{ours:.4g}", f"{reference:.4g}", unit, f"{ratio:.3f}"])
                sys.stdout.flush()


if __name__ == "__main__":
    main()
