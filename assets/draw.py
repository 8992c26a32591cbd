"""Draws the pictures of the pages that no program draws: pipeline, schedule, roofline, cost and
biases. From the repository's root:

python assets/draw.py                              with a drawn shape for an example
python assets/draw.py folder data/cifar10-jpeg     with a picture of that dataset
"""

import sys

import torch
from matplotlib.patches import FancyBboxPatch
from matplotlib.ticker import ScalarFormatter

sys.path.insert(0, ".")
import checkpoint
import data
import evaluate
import optim
import plots
import recipe
from vit import PatchEmbedding, ViTConfig


def draw_pipeline(path: str, image: torch.Tensor):
    """One image, uint8 (3, 32, 32), on its way through the model, with the real shapes."""
    config = ViTConfig()
    C, S, p = config.in_channels, config.image_size, config.patch_size
    assert PatchEmbedding(config)(image[None] / 255).shape == (1, config.num_patches, config.dim)
    gap = 1  # white pixels between patches
    size = S + gap * (S // p - 1)
    cut = torch.full((3, size, size), 255, dtype=torch.uint8)
    for i in range(0, S, p):
        for j in range(0, S, p):
            y, x = i + i // p * gap, j + j // p * gap
            cut[:, y : y + p, x : x + p] = image[:, i : i + p, j : j + p]

    figure, [[axis]] = plots.new_figure(figsize=(8.3, 2.5))
    axis.set_xlim(0, 8.3)
    axis.set_ylim(0, 2.5)
    axis.axis("off")
    middle = 1.45
    for x, width, pixels in ((0.05, 1.0, image), (1.55, 1.25, cut)):
        inner = axis.inset_axes([x, middle - width / 2, width, width], transform=axis.transData)
        inner.imshow(pixels.permute(1, 2, 0))
        inner.axis("off")
    blocks = f"{config.depth} blocks, each\n\nx + Attention(Norm(x))\n\nx + MLP(Norm(x))"
    for x, width, height, text, colour in (
        (3.35, 0.8, 1.1, "linear map\n+ class\ntoken\n+ positions", "#fde9c8"),
        (4.71, 1.42, 1.5, blocks, "#d6e6f7"),
        (6.6, 0.62, 1.1, "Norm,\nread the\nclass\ntoken", "#fde9c8"),
        (7.7, 0.5, 1.1, "linear\nmap", "#fde9c8"),
    ):
        corner = (x, middle - height / 2)
        box = {"boxstyle": "round,pad=0.03", "facecolor": colour, "edgecolor": "black"}
        axis.add_patch(FancyBboxPatch(corner, width, height, **box))
        axis.text(x + width / 2, middle, text, ha="center", va="center", fontsize=8)
    for x0, x1 in ((1.08, 1.5), (2.85, 3.28), (4.22, 4.65), (6.18, 6.53), (7.28, 7.63)):
        axis.annotate("", (x1, middle), (x0, middle), arrowprops={"arrowstyle": "->"})
    for x, text in (
        (0.55, f"image\n({C}, {S}, {S})"),
        (2.18, f"{config.num_patches} patches\n({config.num_patches}, {C * p * p})"),
        (3.75, f"tokens\n({config.num_tokens}, {config.dim})"),
        (5.42, f"tokens\n({config.num_tokens}, {config.dim})"),
        (6.91, f"a vector\n({config.dim},)"),
        (7.95, f"logits\n({config.num_classes},)"),
    ):
        axis.text(x, 0.3, text, ha="center", va="center", fontsize=9, family="monospace")
    figure.savefig(path, dpi=150)


def draw_schedule(path: str):
    """The learning rate of deit and strong over 300 epochs, asked of their own schedulers."""
    figure, [[axis]] = plots.new_figure(figsize=(8.3, 3.6))
    for name in ("deit", "strong"):
        config, _ = recipe.build_configs(recipe.PRESETS[name] | {"optimizer": "adamw"})
        steps, rates = 45_000 // config.batch_size * config.epochs, []
        tiny = ViTConfig(dim=8, depth=1, heads=1)
        state = optim.build_state(config, tiny, steps, torch.device("cpu"))
        for _ in range(steps):
            rates.append(state.scheduler.get_last_lr()[0])
            state.optimizer.step()  # of nothing: there are no gradients
            state.scheduler.step()
        epochs = [config.epochs * i / steps for i in range(steps)]
        [curve] = axis.plot(epochs, rates, label=f"{name}: {steps:,} steps of {config.batch_size}")
        end = config.mix_until * config.epochs
        text = f"{name}: mixing ends"
        axis.axvline(end, color=curve.get_color(), linestyle=":")
        axis.text(end - 3, 1e-3, text, rotation=90, ha="right", va="top", fontsize=8)
    axis.set_xlabel("epoch")
    axis.set_ylabel("learning rate")
    axis.set_title("The schedule: one rise, one fall (OneCycleLR)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    figure.savefig(path, dpi=110)


def draw_roofline(path: str):
    """How fast a training step of DeiT-Ti can be, by count."""
    flops = 3 * ViTConfig().flops_per_image  # of a step, per image
    moved = {"eager": 51.2e6, "compiled": 32.6e6, "ideal fusion": 25.2e6}  # bytes per image
    chips = {"an H200": (790e12, 4.3e12), "a T4": (65e12, 0.32e12)}  # 16-bit FLOP/s and bytes/s
    figure, [[axis]] = plots.new_figure(figsize=(8, 4.5))
    for chip, (peak, bandwidth) in chips.items():
        x = [20, peak / bandwidth, 600]
        y = [min(peak, i * bandwidth) / 1e12 for i in x]
        [roof] = axis.plot(x, y, label=f"the most that {chip} can do")
        for name, size in moved.items():
            intensity = flops / size
            reach = min(peak, intensity * bandwidth)
            axis.plot(intensity, reach / 1e12, "o", color=roof.get_color())
            text = f"{name}: at most {reach / peak:.0%} of the peak"
            at = (intensity, reach / 1e12)
            axis.annotate(text, at, (12, -6), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks([20, 50, 100, 200, 500], minor=False)
    axis.set_yticks([10, 100, 1000])
    axis.minorticks_off()
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.yaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel("operations per byte of memory traffic (FLOP/byte)")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(
        "A training step of DeiT-Ti at 32x32: on the slope, memory is the limit (by count)"
    )
    axis.grid(alpha=0.3)
    axis.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def measured(run: str) -> float:
    """Test accuracy (%) of a run in assets/."""
    return 100 * evaluate.read_metrics(f"assets/{run}")["accuracy"]


HELD_OUT, OTHERS = "on held-out images", "on test images, or the last"
PUBLISHED = (  # PFLOP of training, accuracy on CIFAR-10 (%), who, how the epoch was chosen
    (24.8, 90.9, "the notebook and ViT-CIFAR", HELD_OUT),
    (13, 90.94, "ViT-Lite-6/4", OTHERS),
    (26, 90.92, "", OTHERS),
    (16.9, 93.58, "SPT_LSA's ViT", OTHERS),
    (3.5, 86.52, "s-chh, learned positions", OTHERS),
    (3.5, 90.57, "s-chh, relative positions", OTHERS),
)
OURS = (  # the same, measured here on the JPEG copy, chosen on held-out images
    (0.15, 78.59, "absolute positions, 12 epochs"),
    (0.77, measured("cpu-small-60"), "absolute positions, 60 epochs"),
    (0.15, 84.24, "relative bias, 12 epochs"),
    (1.44, measured("laptop"), "laptop, 3 seeds"),
    (1.44, measured("laptop-seed-1"), ""),
    (1.44, measured("laptop-seed-2"), ""),
    (3.84, measured("laptop-200"), "laptop, 200 epochs"),
    (1.44, measured("laptop-without-bias"), "laptop without its bias"),
)


def draw_cost(path: str):
    """Accuracy against training cost: 3 x forward FLOPs x images seen."""
    figure, [[axis]] = plots.new_figure(figsize=(8.3, 4.5))
    for chosen, marker in ((HELD_OUT, "o"), (OTHERS, "x")):
        points = [(x, y) for x, y, _, how in PUBLISHED if how == chosen]
        label = f"published, CIFAR-10, epoch chosen {chosen}"
        axis.plot(*zip(*points), marker, color="tab:gray", label=label)
    label = f"here, CIFAR-10 (JPEG copy), epoch chosen {HELD_OUT}"
    axis.plot(*zip(*((x, y) for x, y, _ in OURS)), "o", color="tab:red", label=label)
    for x, y, name, *_ in (*PUBLISHED, *OURS):
        below = -10 if x in (3.5, 16.9, 24.8) else 5  # so that no two names meet
        axis.annotate(name, (x, y), (6, below), textcoords="offset points", fontsize=8)
    axis.set_xscale("log")
    axis.set_xlim(0.1, 200)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.set_xlabel("training cost in PFLOP (3 x forward FLOPs x images seen)")
    axis.set_ylabel("test accuracy (%)")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=110)


def draw_biases(path: str, checkpoint_path: str):
    """What the relative position biases have become: one map by displacement a block and head."""
    best = checkpoint.load_checkpoint(checkpoint_path)
    model = checkpoint.build_model(best)
    config = model.config
    reach = 2 * config.side - 1
    size = (0.85 * config.heads + 1.2, 0.85 * config.depth + 0.9)
    figure, axes = plots.new_figure(config.depth, config.heads, figsize=size)
    for i, (block, row) in enumerate(zip(model.blocks, axes)):
        table = block.attn.relative_position_bias_table.detach()  # (reach^2, h)
        for j, axis in enumerate(row):
            # softmax ignores a constant, so a map is shown as the weights it gives equal keys
            weights = table[:, j].softmax(0).view(reach, reach)
            axis.imshow(weights / weights.max(), cmap="inferno", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if j == 0:
                axis.set_ylabel(f"block {i}", fontsize=8)
            if i == 0:
                axis.set_title(f"head {j}", fontsize=8)
    title = "Where each head looks by position alone (centre: the token itself)"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    dataset, data_dir = sys.argv[1:3] if len(sys.argv) > 1 else ("shapes", "")
    images = data.load(dataset, data_dir, ViTConfig().image_size).train_images
    draw_pipeline("assets/pipeline.png", images[len(images) * 3 // 4])
    draw_schedule("assets/schedule.png")
    draw_roofline("assets/roofline.png")
    draw_cost("assets/cost.png")
    draw_biases("assets/laptop/biases.png", "assets/laptop/best.pt")
    print("wrote pipeline, schedule, roofline and cost into assets/, biases into assets/laptop/")
