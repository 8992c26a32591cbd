"""
Reads a result: metrics, pictures, and the classes of your own images.

    python evaluate.py out                      the test set: numbers here, and metrics.json and
                                                pictures beside the checkpoint
    python evaluate.py out --split val          the images the checkpoint was chosen on
    python evaluate.py out --images cat.jpg     what is in this picture, and how sure is it

A checkpoint holds all that is needed (both configs, class names, normalisation), so there are no
model flags. From Python, predict does the same for paths or pixels.

Axes:  B images   K classes
"""

import argparse
import json
import math
import os
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import data
import log
import pictures
import plots
from checkpoint import build_model, load_checkpoint, write_atomically
from machine import is_out_of_memory, limit_threads, pick_device
from vit import ViTConfig


def images_per_call(config: ViTConfig) -> int:
    """How many images the model is given at once: half a gigabyte of floats, but 1,000 at most."""
    tokens = config.num_tokens * (6 * config.dim + 2 * config.mlp_dim)
    scores = 3 * config.heads * config.num_tokens**2
    return min(1_000, max(1, 2**27 // (tokens + scores)))


@torch.no_grad()
def compute_logits(
    model, images: Tensor, mean: tuple, std: tuple, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Logits, float32 (B, K), of uint8 images (B, 3, H, W): each once, in order, only normalised.

    In eval mode; the model is left in the mode it was found in. A dtype below float32 means
    autocast.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    logits = []
    # In equal parts: for train.py's 1,000, 2,000 and 5,000 images, a block of `deit` is then
    # compiled for two sizes, not four.
    calls = math.ceil(len(images) / images_per_call(model.config))
    for batch in images.chunk(calls):
        x = data.normalize(batch.to(device), mean, std)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits.append(model(x).float())
    model.train(was_training)
    return torch.cat(logits)


def predict(checkpoint: dict, images: Tensor | list[str] | str, device: str = "auto") -> Tensor:
    """Probabilities, float32 (B, K), of uint8 images (B, 3, H, W) or of picture files, or of one.

    checkpoint: of load_checkpoint; checkpoint["classes"] names the K columns. ValueError, with the
    path, for a file that is not a whole picture, and for no images at all.
    """
    if isinstance(images, str | os.PathLike):
        images = [images]
    if not len(images):
        raise ValueError("no images to classify")
    if not isinstance(images, Tensor):
        size = checkpoint["vit"]["image_size"]
        images = torch.stack([pictures.open_image(path, size) for path in images])
    model = build_model(checkpoint).to(pick_device(device))
    return compute_logits(model, images, checkpoint["mean"], checkpoint["std"]).softmax(1).cpu()


def measure(logits: Tensor, labels: Tensor, classes: list[str]) -> dict:
    """All the numbers about predictions, as plain data, from logits (B, K) and int64 labels (B,).

    Fractions are in [0, 1]; a class never predicted has precision 0. confusion_matrix[i][j] counts
    images of class i that were taken for class j. ece is the expected calibration error (Guo 2017):
    the mean distance between confidence and accuracy, over 15 equal bins of confidence.
    """
    K, logits, labels = len(classes), logits.cpu().double(), labels.cpu()
    confidence, predicted = logits.softmax(1).max(1)
    correct = (predicted == labels).double()
    confusion = torch.bincount(labels * K + predicted, minlength=K * K).view(K, K)
    hits = confusion.diagonal().double()
    precision, recall = hits / confusion.sum(0).clamp(min=1), hits / confusion.sum(1).clamp(min=1)
    bins = (confidence * 15).ceil().long().clamp(1, 15) - 1
    gaps = torch.zeros(15, dtype=torch.double).index_add(0, bins, confidence - correct)
    return {
        "accuracy": correct.mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "ece": (gaps.abs().sum() / len(labels)).item(),
        "images": len(labels),
        "classes": list(classes),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": (2 * precision * recall / (precision + recall).clamp(min=1e-12)).tolist(),
        "confusion_matrix": confusion.tolist(),
    }


def describe(metrics: dict) -> str:
    """The metrics as a text for people."""
    classes, width = metrics["classes"], max(len("class"), *map(len, metrics["classes"]))
    lines = [
        f"accuracy {metrics['accuracy']:.2%} of {metrics['images']:,} images | "
        f"loss {metrics['loss']:.4f} | calibration error {metrics['ece']:.2%}",
        f"{'class':<{width}}   images   precision   recall       F1",
    ]
    for i, name in enumerate(classes):
        count = sum(metrics["confusion_matrix"][i])
        precision, recall, f1 = (f"{metrics[key][i]:.2%}" for key in ("precision", "recall", "f1"))
        lines.append(f"{name:<{width}}  {count:>7,}  {precision:>10}  {recall:>7}  {f1:>7}")
    confusions = [
        (count, f"{classes[i]} taken for {classes[j]} {count}x")
        for i, row in enumerate(metrics["confusion_matrix"])
        for j, count in enumerate(row)
        if i != j and count
    ]
    confusions.sort(key=lambda pair: -pair[0])
    commonest = "; ".join(text for _, text in confusions[:5])
    lines.append(f"commonest confusions: {commonest or 'none'}")
    return "\n".join(lines)


# --- the program ----------------------------------------------------------------------------------


def suffix_of(checkpoint: dict, split: str) -> str:
    """What is added to the names of files: nothing for the best weights on the test set."""
    which = "_last" if "optimizer" in checkpoint else ""  # a best.pt has only weights
    return which if split == "test" else f"{which}_{split}"


def evaluate(
    checkpoint: dict,
    out: str,
    split: str = "test",
    data_dir: str | None = None,
    device: str = "auto",
    dataset: data.Dataset | None = None,
    history: list[dict] = (),
) -> dict:
    """Evaluate on split "test" or "val": print the metrics, write metrics.json, draw pictures.

    In this order, so that a picture that fails cannot cost the numbers. dataset: one that is loaded
    already; else the one the checkpoint was trained on is loaded. history: the rows of its log.csv,
    for the curves. Names of files end in _val for the validation split (but for curves and
    positions) and have _last for a last.pt (but for curves): metrics.json is of the best weights on
    the test set.
    ValueError if the data do not fit the checkpoint. Returns the metrics.
    """
    # the images
    recipe, classes, mean, std = (checkpoint[key] for key in ("train", "classes", "mean", "std"))
    data_dir = data_dir or recipe["data_dir"]
    if dataset is None:
        size, url = checkpoint["vit"]["image_size"], recipe["download_url"]
        try:
            dataset = data.load(recipe["dataset"], data_dir, size, url, only_test=split == "test")
        except FileNotFoundError as error:
            raise ValueError(f"{error} (if they have moved: --data-dir)") from None
    if list(dataset.classes) != list(classes):
        known, found = ", ".join(classes), ", ".join(dataset.classes)
        raise ValueError(f"the checkpoint knows the classes {known}; the data have {found}")
    images, labels = dataset.test_images, dataset.test_labels
    # If pictures have come or gone since training, some now set aside for the test may have been
    # trained on. (Where the test is a folder of its own, no training images are loaded.)
    are_others = len(dataset.train_images) and dataset.fingerprint != checkpoint["fingerprint"]
    if are_others and split == "val":
        raise ValueError(
            "the training images have changed since: which were held out is no longer known"
        )
    suffix = suffix_of(checkpoint, split)
    path = os.path.join(out, f"metrics{suffix}.json")
    if are_others and os.path.exists(path):
        raise ValueError(
            f"the pictures have changed since training, and there is a {path}: choose another --out"
        )
    if are_others:
        print(
            "warning: the pictures have changed since training: some that are now set aside for "
            "the test may have been trained on",
            file=sys.stderr,
        )
    if split == "val":
        _, (images, labels) = data.hold_out(dataset, recipe["val_size"], recipe["seed"])

    # the numbers
    model = build_model(checkpoint).to(pick_device(device))
    logits = compute_logits(model, images, mean, std).cpu()
    facts = {"split": split, "epoch": checkpoint["epoch"], "epochs_trained": len(history)}
    metrics = {**facts, "data_dir": data_dir, **measure(logits, labels, classes)}
    print(describe(metrics), flush=True)
    os.makedirs(out, exist_ok=True)
    write_atomically(path, json.dumps(metrics, indent=1).encode())

    # the plots
    name = plots.title_of(recipe["dataset"], data_dir)
    title = f"{name}, {split} images"
    some = torch.linspace(0, len(images) - 1, 8).long().unique()  # from all over the set
    shown = (images[some], labels[some], classes, mean, std)

    def save(plot, file: str, *arguments):
        plots.draw(plot, os.path.join(out, file), *arguments)

    save(plots.plot_confusion_matrix, f"confusion_matrix{suffix}.png", metrics, title)
    save(plots.plot_attention, f"attention{suffix}.png", model, *shown, title)
    save(plots.plot_mistakes, f"mistakes{suffix}.png", images, labels, logits, classes, title)
    save(plots.plot_positions, f"positions{suffix_of(checkpoint, 'test')}.png", model, name)
    if history:
        save(plots.plot_curves, "curves.png", history, name)
    return metrics


def read_metrics(out: str) -> dict:
    """The metrics.json of a folder; {} where there is none, or none that can be read."""
    try:
        with open(os.path.join(out, "metrics.json"), encoding="utf-8") as file:
            metrics = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    is_ours = isinstance(metrics, dict) and isinstance(metrics.get("data_dir", ""), str)
    return metrics if is_ours else {}


def refuse_place(out: str, recipe: dict, data_dir: str | None):
    """ValueError for a folder of another run, or in the pictures that this one learns from."""
    if any(os.path.exists(os.path.join(out, name)) for name in ("last.pt", "best.pt")):
        raise ValueError(f"--out {out} holds another run: choose another --out")
    if recipe["dataset"] == "folder":
        pictures.refuse_inside(out, data_dir or recipe["data_dir"])


def refuse_other_images(out: str, data_dir: str):
    """ValueError if the metrics.json there is of other images (that have not merely moved)."""
    seen = read_metrics(out).get("data_dir")
    if seen and os.path.isdir(seen) and os.path.realpath(data_dir) != os.path.realpath(seen):
        raise ValueError(
            f"{os.path.join(out, 'metrics.json')} is of the images in {seen}: for those in "
            f"{data_dir} choose another --out"
        )


def classify(checkpoint: dict, paths: list[str], device: str = "auto") -> int:
    """Print a line for each picture, with the three likeliest classes. Returns how many failed."""
    size, failed, images = checkpoint["vit"]["image_size"], 0, {}
    for path in paths:
        try:
            images[path] = pictures.open_image(path, size)
        except (ValueError, OSError) as error:
            print(f"error: {log.one_line(error)}", file=sys.stderr, flush=True)
            failed += 1
    if images:
        probabilities = predict(checkpoint, torch.stack(list(images.values())), device)
        width = max(map(len, images))
        for path, row in zip(images, probabilities):
            likeliest = row.topk(min(3, len(row)))
            answers = (f"{checkpoint['classes'][i]} {p:.1%}" for p, i in zip(*likeliest))
            print(f"{path:<{width}}  {'  '.join(answers)}")
    return failed


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Evaluate a checkpoint of train.py, or classify pictures with it.",
        usage=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = "a checkpoint, or the folder of a run, whose best.pt is meant (default: out)"
    add("checkpoint", nargs="?", default="out", help=what)
    add("--split", choices=("test", "val"), default="test", help="which images (default: test)")
    add("--images", nargs="+", metavar="PATH", help="classify these pictures and folders instead")
    place = os.path.expanduser  # shells leave the ~ of --out=~/x to us
    add("--data-dir", type=place, help="where the dataset lies (default: as in training)")
    add("--device", default="auto", help="auto, cpu, cuda or mps (default: auto)")
    add("--out", type=place, help="folder for metrics and pictures (default: the checkpoint's)")
    args = parser.parse_args(argv)
    if args.images and (args.out or args.data_dir or args.split != "test"):
        parser.error("--images only prints: it takes no --split, --data-dir or --out")
    limit_threads()
    path = args.checkpoint
    if os.path.isdir(path):
        path = os.path.join(path, "best.pt")
    folder = os.path.dirname(path) or "."
    try:
        checkpoint = load_checkpoint(path)
        if args.images:
            paths = pictures.files_in(args.images)
            return 2 if classify(checkpoint, paths, args.device) else 0
        print(f"{path}, epoch {checkpoint['epoch']}, {args.split} images", flush=True)
        history = []
        try:
            history = log.read_log(os.path.join(folder, "log.csv"))
        except FileNotFoundError:
            pass
        except (ValueError, OSError) as error:
            print(f"warning: no curves: {error}", file=sys.stderr)
        out = args.out or folder
        of_a_run = os.path.basename(path) in ("last.pt", "best.pt")  # and no copy beside them
        if not of_a_run or os.path.realpath(out) != os.path.realpath(folder):
            refuse_place(out, checkpoint["train"], args.data_dir)
        if not suffix_of(checkpoint, args.split):
            refuse_other_images(out, args.data_dir or checkpoint["train"]["data_dir"])
        evaluate(checkpoint, out, args.split, args.data_dir, args.device, history=history)
    except BrokenPipeError:  # as in `| head`: see log.run_program
        raise
    except (ValueError, OSError) as error:
        parser.error(log.one_line(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parser.error("out of memory: on a GPU that others use, --device cpu has more")
    print(f"wrote metrics and pictures into {out}/")
    return 0


if __name__ == "__main__":
    sys.exit(log.run_program(main))
