"""Draws assets/roofline.png: how fast a step of DeiT-Ti can be, by count. Run from the repository's root."""

import sys

sys.path.insert(0, ".")
import evaluate
from vit import ViTConfig

FLOPS = 3 * ViTConfig().flops_per_image  # of a step, per image
BYTES = {"eager": 51.2e6, "compiled": 32.6e6, "ideal fusion": 25.2e6}  # moved per image, by count
CHIPS = {"H200": (790e12, 4.3e12), "T4": (65e12, 0.32e12)}  # 16-bit FLOP/s and bytes/s

figure, [[axis]] = evaluate.new_figure(figsize=(8, 4.5))
for (chip, (peak, bandwidth)), colour in zip(CHIPS.items(), ("tab:blue", "tab:orange")):
    x = [20, peak / bandwidth, 600]
    axis.plot(x, [min(peak, i * bandwidth) / 1e12 for i in x], color=colour, label=f"the most a {chip} can do")
    for name, moved in BYTES.items():
        intensity = FLOPS / moved
        reach = min(peak, intensity * bandwidth)
        axis.plot(intensity, reach / 1e12, "o", color=colour)
        if chip == "H200":
            text = f"{name}, {intensity:.0f} FLOP/byte: MFU at most {reach / peak:.0%}"
            axis.annotate(text, (intensity, reach / 1e12), (12, -6), textcoords="offset points", fontsize=8)
axis.set_xscale("log")
axis.set_yscale("log")
axis.set_xlabel("operations per byte moved (FLOP/byte)")
axis.set_ylabel("TFLOP/s")
axis.set_title("A training step of DeiT-Ti at 32x32: under the slope, memory is the limit (by count)")
axis.grid(alpha=0.3, which="both")
axis.legend()
figure.savefig("assets/roofline.png", dpi=100)
print("wrote assets/roofline.png")
