"""Draws the results of ``single_gpu.py`` as bars: tokens per second of each contender, by model and micro-batch.

    pip install matplotlib
    python benchmarks/chart.py                     # all of results/single_gpu-*.json -> results/single_gpu-<device>.png
    python benchmarks/chart.py a.json b.json -o chart.png

Whole models, extrapolated from the measured depths; the number on a bar is its speed over Transformers eager in that run.
Runs on different devices go to different charts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import common

#: Contenders in the order of their bars. Colours of Okabe and Ito, which colour-blind readers tell apart.
CONTENDERS = {
    "hf": ("Transformers eager", "#999999"),
    "hf_compile": ("torch.compile(Transformers)", "#56B4E9"),
    "nemo": ("NeMo AutoModel", "#E69F00"),
    "moefx": ("moefx", "#009E73"),
}
TITLES = {"qwen3_30b": "Qwen3-30B-A3B", "nemotron_nano": "Nemotron-3-Nano-30B-A3B", "gpt_oss_20b": "GPT-OSS-20B"}
ROUTING = {"real": "", "balanced": ", balanced routing", "zipf": ", Zipf routing"}


def bars(record: Mapping[str, Any]) -> dict[str, list[tuple[int, float, float | None]]]:
    """Of one result: by contender, in their order, (micro-batch, tokens/s, times hf), micro-batches ascending."""
    found: dict[str, list] = {who: [] for who in CONTENDERS}
    for row in sorted(record["whole_model"], key=lambda r: r["mbs"]):
        found[row["who"]].append((row["mbs"], row["tokens_per_s"], row["speedup"]))
    return {who: rows for who, rows in found.items() if rows}


def draw(records: Sequence[Mapping[str, Any]], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(records), figsize=(max(6.0, 1.2 + 3.6 * len(records)), 4.6), squeeze=False)
    for axis, record in zip(axes[0], records):
        contenders = bars(record)
        batches = sorted({b for rows in contenders.values() for b, _, _ in rows})
        width = 0.8 / len(contenders)
        for i, (who, rows) in enumerate(contenders.items()):
            at = [batches.index(b) + (i - (len(contenders) - 1) / 2) * width for b, _, _ in rows]
            drawn = axis.bar(at, [t / 1e3 for _, t, _ in rows], width * 0.94, color=CONTENDERS[who][1], label=CONTENDERS[who][0])
            texts = ["" if s is None or who == "hf" else f"{s:.2f}×" for _, _, s in rows]
            axis.bar_label(drawn, texts, fontsize=8, padding=2, fontweight="bold" if who == "moefx" else "normal")
        axis.set_xticks(range(len(batches)), [f"micro-batch {b}" for b in batches])
        settings = record["settings"]
        axis.set_title(TITLES.get(settings["model"], settings["model"]) + ROUTING[settings.get("routing", "real")], fontsize=10)
        axis.set_ylim(0, 1.1 * max(t / 1e3 for rows in contenders.values() for _, t, _ in rows))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("thousand tokens per second")
    labels: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    order = [name for name, _ in CONTENDERS.values() if name in labels]
    figure.legend([labels[n] for n in order], order, loc="lower center", ncols=min(len(order), 2 * len(records)), frameon=False, fontsize=9)
    settings = records[0]["settings"]
    figure.suptitle(
        f"Training on one {device}: forward + loss + backward\n"
        f"sequence {settings['seq']}, {settings['dtype']}, whole models extrapolated from a few layers",
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.07 if len(records) > 1 else 0.11, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    common.say(f"drew {path.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: results/single_gpu-*.json)")
    parser.add_argument("-o", "--output", type=Path, help="of the PNG, if all results are of one device")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: pip install matplotlib")
        return 1
    by_device: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in args.results or sorted(common.RESULTS.glob("single_gpu-*.json")):
        record = json.loads(path.read_text())
        if record["whole_model"] and record["settings"]["model"] in TITLES:
            by_device[record["machine"]["gpu"]["name"] if "gpu" in record["machine"] else "CPU"].append(record)
        else:
            common.say(f"{path.name}: no extrapolated model that is charted, left out")
    if not by_device:
        print("no results to draw: run benchmarks/single_gpu.py first")
        return 1
    if args.output and len(by_device) > 1:
        print(f"--output is one file, the results are of {len(by_device)} devices: {', '.join(by_device)}")
        return 1
    order = list(TITLES)
    for device, records in by_device.items():
        records.sort(key=lambda r: (list(ROUTING).index(r["settings"].get("routing", "real")), order.index(r["settings"]["model"])))
        draw(records, device, args.output or common.RESULTS / f"single_gpu-{common.slug(device)}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
