"""Draws assets/pipeline.png: one image on its way through the model, with the real shapes. Run from the repository's root."""

import sys

import torch

sys.path.insert(0, ".")
import data
import evaluate
from vit import PatchEmbedding, ViTConfig

config = ViTConfig()
C, S, p = config.in_channels, config.image_size, config.patch_size
source = data.load(*(sys.argv[1:3] if len(sys.argv) > 1 else ("shapes", "")), S)
image = source.train_images[len(source.train_images) * 3 // 4]
tokens = PatchEmbedding(config)(image[None] / 255.0)
assert tokens.shape == (1, config.num_patches, config.dim)

figure, [[axis]] = evaluate.new_figure(figsize=(13, 3.4))
axis.set_xlim(0, 13)
axis.set_ylim(0, 3.4)
axis.axis("off")


def box(x, width, height, text, colour):
    axis.add_patch(evaluate_patch(x, 1.9 - height / 2, width, height, colour))
    axis.text(x + width / 2, 1.9, text, ha="center", va="center", fontsize=9)


def evaluate_patch(x, y, width, height, colour):
    from matplotlib.patches import FancyBboxPatch

    return FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0.03", facecolor=colour, edgecolor="black")


def arrow(x0, x1, shape):
    axis.annotate("", (x1, 1.9), (x0, 1.9), arrowprops={"arrowstyle": "->"})
    axis.text((x0 + x1) / 2, 0.32, shape, ha="center", va="center", fontsize=9, family="monospace")


def picture(x, width, pixels):
    inner = axis.inset_axes([x, 1.9 - width / 2, width, width], transform=axis.transData)
    inner.imshow(pixels.permute(1, 2, 0))
    inner.axis("off")


gap = 1  # white pixels between patches
cut = torch.full((3, S + gap * (S // p - 1), S + gap * (S // p - 1)), 255, dtype=torch.uint8)
for i in range(0, S, p):
    for j in range(0, S, p):
        y, x = i + i // p * gap, j + j // p * gap
        cut[:, y : y + p, x : x + p] = image[:, i : i + p, j : j + p]

picture(0.1, 1.5, image)
picture(2.2, 1.9, cut)
box(4.85, 1.2, 1.5, "linear map\n+ class token\n+ positions", "#fde9c8")
box(6.95, 1.7, 2.3, f"{config.depth} x\n\nx + Attention(Norm(x))\n\nx + MLP(Norm(x))", "#d6e6f7")
box(9.55, 1.0, 1.5, "Norm,\nread the\nclass token", "#fde9c8")
box(11.4, 0.75, 1.5, "linear\nmap", "#fde9c8")
for x0, x1, shape in (
    (1.65, 2.15, f"image\n({C}, {S}, {S})"),
    (4.15, 4.75, f"{config.num_patches} patches\n({config.num_patches}, {C * p * p})"),
    (6.15, 6.85, f"tokens\n({config.num_tokens}, {config.dim})"),
    (8.75, 9.45, f"tokens\n({config.num_tokens}, {config.dim})"),
    (10.65, 11.3, f"one vector\n({config.dim},)"),
    (12.25, 12.85, f"logits\n({config.num_classes},)"),
):
    arrow(x0, x1, shape)
figure.savefig("assets/pipeline.png", dpi=100)
print("wrote assets/pipeline.png")
