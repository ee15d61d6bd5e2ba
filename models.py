"""Network architectures, the weights they start from, and their layers for Grad-CAM.

    python models.py                               # Table 3: ImageNet accuracies and parameters
    python models.py --fetch resnet152 vit_l_32    # fetches ImageNet weights for a night without network

Any classification model of torchvision gets a new last layer. Files are read as mere data: weights_only=True.
"""
import argparse
import collections
import difflib
import pathlib
import re
import signal
import socket
import sys

import torch
import torchvision
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

ARCHITECTURES = {  # Table 3: the paper's name, the weights of these accuracies, Acc@1, Acc@5, parameters
    "vgg19_bn": ("VGG-19 BN", "IMAGENET1K_V1", 74.218, 91.842, 143_678_248),
    "resnet152": ("ResNet-152", "IMAGENET1K_V2", 82.284, 96.002, 60_192_808),
    "regnet_y_32gf": ("Regnet_y_32gf", "IMAGENET1K_V2", 83.368, 96.498, 145_046_770),
    "vit_l_32": ("ViT l 32", "IMAGENET1K_V1", 76.972, 93.07, 306_535_400),
    "resnext50_32x4d": ("ResNeXt-50", "DEFAULT", None, None, None),  # of Matek et al., not in Table 3
}
INITS = ("random", "imagenet", "pcam", "cd", "imagenet+pcam", "imagenet+cd")
KEYS = "state_dict model classes mean std image_size init fold epoch val_accuracy train_counts".split()
OURS = "name a best.pt that train.py or pretrain.py left"


def check_name(name, image_size=None, weights=None):
    """ValueError names what is wrong with a model, an image size (pixels) or a name of ImageNet weights."""
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(str(name).lower(), known, 3) or list(ARCHITECTURES)
        raise ValueError(f"{name}: no classification model of torchvision; do you mean {', '.join(close)}?")
    least = 224 if name == "maxvit_t" else 75 if name in ("alexnet", "inception_v3") else 32
    step = int(name[-2:]) if name.startswith("vit_") else least if name == "maxvit_t" else 1
    if image_size is not None and (image_size < least or image_size % step):
        raise ValueError(f"{name}: image size {image_size} is not at least {least} and a multiple of {step}")
    if weights is not None:
        find_weights(name, weights)


def find_weights(name, weights="imagenet"):
    """torchvision's entry for ImageNet weights, 'imagenet' (Table 3's) or by name. ValueError without one."""
    wanted, entries = weights.upper(), torchvision.models.get_model_weights(name).__members__
    if wanted == "IMAGENET":
        wanted = ARCHITECTURES.get(name, ("", "DEFAULT"))[1]
    if wanted not in entries:
        raise ValueError(f"{name}: no weights {weights}; torchvision has {', '.join(entries) or 'none'}")
    return entries[wanted]


def is_imagenet(weights):
    """Are build_model's weights the name of ImageNet ones? It has neither dot nor slash."""
    return re.fullmatch(r"imagenet\w*|default", str(weights), re.IGNORECASE) is not None


def imagenet_file(name, weights="imagenet"):
    """(URL, Path) of ImageNet weights: the place that torch.hub (TORCH_HOME) has for them, filled or not."""
    url = find_weights(name, weights).url
    return url, pathlib.Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]


def build_model(name, num_classes, weights=None, image_size=224):
    """A torchvision network (float32, CPU) whose last layer is new, of num_classes units (section 2.2).

    weights: None (random, from torch's global generator, which the caller seeds), 'imagenet' (Table 3's), or
    torchvision's name of ImageNet weights, or the path of a best.pt or a state dict in torchvision's layout:
    all but the head is copied. The head is nn.Linear's random one, drawn last: alike for all weights. A ViT's
    position embeddings are interpolated to image_size. ValueError as check_name's, SystemExit for a bad file.
    """
    check_name(name, image_size, weights if is_imagenet(weights) else None)
    options = {"image_size": image_size} if name.startswith("vit_") else {}
    if name in ("googlenet", "inception_v3"):  # without their side outputs
        options = {"aux_logits": False, "init_weights": True}
    net = torchvision.models.get_model(name, weights=None, **options)
    old, (above, _, last) = net.get_submodule(head_name(net)), head_name(net).rpartition(".")
    if isinstance(old, torch.nn.Linear):
        new = torch.nn.Linear(old.in_features, num_classes)
    else:
        new = torch.nn.Conv2d(old.in_channels, num_classes, old.kernel_size)
    setattr(net.get_submodule(above), last, new)
    if is_imagenet(weights):
        url, file = fetch(*imagenet_file(name, weights))
        advice = f"remove it and put {url} there"
        load_state(net, read_file(file, advice), file, name, advice)
    elif weights is not None:
        content, advice = read_file(weights), f"{OURS}, or a state dict of torchvision's {name}"
        if isinstance(content.get("model"), str) and content["model"] != name:
            raise SystemExit(f"{weights}: a checkpoint of {content['model']}, not of {name}; {advice}")
        inner = [content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)]
        load_state(net, inner[0] if inner else content, weights, name, advice)
    return net


def head_name(net):
    """Dotted name of the last layer with weights, e.g. 'fc', 'classifier.6', 'heads.head'."""
    kinds = torch.nn.Linear, torch.nn.Conv2d
    return [name for name, module in net.named_modules() if type(module) in kinds][-1]


def fetch(url, file):
    """Download a file that is not there yet, with a hash check; returns both. SystemExit if that fails."""
    if file.exists():
        return url, file
    print(f"fetching {url} to {file}", file=sys.stderr, flush=True)
    socket.setdefaulttimeout(60)  # seconds without a byte; torch.hub sets none
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(file), file.stem[-8:], progress=sys.stderr.isatty())
    except Exception as error:  # no network, no room, a wrong hash, ...
        raise SystemExit(f"{url}: cannot be fetched ({error}); get it elsewhere, put it at {file}") from None
    return url, file


def read_file(file, advice=OURS):
    """The dict in a .pt or .pth file. SystemExit if it is missing, damaged or more than plain data."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # no such file, or what damage leads to: EOFError, KeyError, ...
        why = getattr(error, "strerror", None) or "damaged or cut short"
        if re.search("unsupported (global|class)", str(error), re.IGNORECASE):
            why = "holds more than tensors and plain data, nothing of it was run"
        raise SystemExit(f"{file}: {why}; {advice}") from None
    if not isinstance(content, dict):
        raise SystemExit(f"{file}: holds a {type(content).__name__}, no weights; {advice}")
    return content


def load_state(net, state, file, name, advice=OURS, head=False):
    """Copy tensors (dict by name) into net, whose own last layer stays without head. SystemExit if unfit."""
    last, new = head_name(net) + ".", collections.OrderedDict()
    try:
        for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of torch.compile, of DistributedDataParallel
            consume_prefix_in_state_dict_if_present(state, prefix)
        new._metadata = getattr(state, "_metadata", None)  # versions, by which modules know older files
        for key, value in state.items():
            if not key.startswith(("aux1.", "aux2.", "AuxLogits.")):  # side outputs; DenseNet's older names:
                new[re.sub(r"(denselayer\d+\.(norm|conv))\.", r"\1", key)] = value
        if not head:
            new |= {key: value for key, value in net.state_dict().items() if key.startswith(last)}
        if "encoder.pos_embedding" in new and isinstance(net, torchvision.models.VisionTransformer):
            interpolate = torchvision.models.vision_transformer.interpolate_embeddings
            new = interpolate(net.image_size, net.patch_size, new)
        net.load_state_dict(new)
    except (AttributeError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[:2][-1].strip()[:200]  # PyTorch's first line says only of which class
        raise SystemExit(f"{file}: not the weights of {name} ({why}); {advice}") from None


def read_checkpoint(path):
    """The dict of a best.pt. SystemExit with one line if the file is no such thing."""
    content = read_file(path)
    missing = [key for key in KEYS if key not in content]
    if missing or not isinstance(content["state_dict"], dict):
        lacks = ", ".join(missing[:3]) or "tensors"
        raise SystemExit(f"{path}: no checkpoint of ours, it lacks {lacks}; {OURS}")
    return content


def load_checkpoint(path):
    """(trained network in eval mode, float32, CPU; dict of all else in a best.pt). SystemExit if unfit."""
    info = read_checkpoint(path)
    try:
        net = build_model(info["model"], len(info["classes"]), None, info["image_size"])
    except (ValueError, TypeError) as error:
        raise SystemExit(f"{path}: no checkpoint of ours ({error}); {OURS}") from None
    load_state(net, info.pop("state_dict"), path, info["model"], head=True)
    return net.eval(), info


def cam_layer(net):
    """Grad-CAM's layer: the last one in which place is kept (VGG: the last ReLU before the pooling)."""
    if isinstance(net, torchvision.models.VisionTransformer):  # later, patches have no gradient
        return net.encoder.layers[-1].ln_1
    if hasattr(net, "features") and isinstance(net.features[-1], torch.nn.MaxPool2d):
        return net.features[-2]
    for name in "permute layer4 trunk_output conv5 layers Mixed_7c inception5b features".split():
        if hasattr(net, name):  # permute: Swin's, where channels come first
            return getattr(net, name)
    return net.blocks[-1]  # MaxVit


def cam_reshape(net):
    """For a ViT, turns tokens [N, 1 + h*w, C] into a grid [N, C, h, w] without the class token; else None."""
    if isinstance(net, torchvision.models.VisionTransformer):
        side = net.image_size // net.patch_size
        return lambda tokens: tokens[:, 1:].transpose(1, 2).unflatten(2, (side, side))


def main():
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--fetch", nargs="+", metavar="MODEL", help="fetch their ImageNet weights")
    parser.add_argument("--weights", default="imagenet", help="Table 3's, or by name, e.g. IMAGENET1K_V1")
    args = parser.parse_args()
    if args.fetch:
        try:
            for name in args.fetch:
                check_name(name, None, args.weights)
        except ValueError as error:
            parser.error(str(error))
        for name in args.fetch:
            print(fetch(*imagenet_file(name, args.weights))[1])
        return
    line = "{:<16}{:>8}{:>8}{:>8}{:>8}{:>13}{:>13}  {}"
    print(line.format("Table 3", "Acc@1", "paper", "Acc@5", "paper", "#Params", "paper", "weights"))
    for name, (_, weights, *paper) in ARCHITECTURES.items():
        meta = find_weights(name, weights).meta
        ours = *meta["_metrics"]["ImageNet-1K"].values(), meta["num_params"]
        pairs = [f"{value:,}" if value else "-" for pair in zip(ours, paper) for value in pair]
        print(line.format(name, *pairs, find_weights(name, weights).name))


if __name__ == "__main__":
    main()
