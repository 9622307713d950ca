"""Draws the results of ``single_gpu.py`` and ``multi_gpu.py`` as bars: tokens per second, by model, micro-batch and contender.

    pip install matplotlib
    python benchmarks/chart.py                     # all of results/ -> docs/images/single_gpu-<device>.png, multi_gpu-8x-<device>.png
    python benchmarks/chart.py a.json b.json -o chart.png
    python benchmarks/chart.py --overview          # -> docs/images/overview.png, the README's

One device: whole models, extrapolated from the measured depths; the number on a bar is its speed over Transformers eager in that
run. Several: whole models as measured, tokens per second and GPU; the number is the speed over Transformers with FSDP2, "r" says
that blocks were recomputed in the backward. Runs on different devices go to different charts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import common

#: The pages that show them are built from this folder alone.
IMAGES = Path(__file__).parent.parent / "docs/images"
#: Contenders in the order of their bars. Colours of Okabe and Ito, which colour-blind readers tell apart.
CONTENDERS = {
    "hf": ("Transformers eager", "#999999"),
    "hf_compile": ("torch.compile(Transformers)", "#56B4E9"),
    "nemo": ("NeMo AutoModel", "#E69F00"),
    "hf_fsdp": ("Transformers, FSDP2", "#999999"),
    "hf_ep": ("Transformers, its own EP", "#E69F00"),
    "moefx": ("moefx", "#009E73"),
    "moefx_graph": ("moefx, CUDA graph", "#0072B2"),
    "moefx_chunks": ("moefx, two chunks", "#56B4E9"),
    "moefx_graph_chunks": ("moefx, two chunks, CUDA graph", "#D55E00"),
    "moefx_graph_lean": ("moefx, CUDA graph, experts recomputed", "#F0E442"),
    "moefx_no_overlap": ("moefx, no overlap", "#CC79A7"),
}
#: The number on their bars would be 1.
BASELINES = ("hf", "hf_fsdp")
TITLES = {"qwen3_30b": "Qwen3-30B-A3B", "nemotron_nano": "Nemotron-3-Nano-30B-A3B", "gpt_oss_20b": "GPT-OSS-20B"}
ROUTING = {"real": "", "balanced": ", balanced routing", "zipf": ", Zipf routing"}


#: (micro-batch, tokens/s, what is written on the bar)
Bar = tuple[int, float, str]


def bars(record: Mapping[str, Any]) -> dict[str, list[Bar]]:
    """Of a result of one device: by contender, in their order, its bars, micro-batches ascending."""
    return _by_contender((r["who"], r["mbs"], r["tokens_per_s"], _times(r["who"], r["speedup"])) for r in record["whole_model"])


def panels(record: Mapping[str, Any]) -> list[tuple[str, dict[str, list[Bar]]]]:
    """(Title, bars by contender) of what one result shows: one panel, and of several devices one for each routing."""
    settings = record["settings"]
    name = TITLES.get(settings["model"], settings["model"])
    if "whole_model" in record:
        return [(name + ROUTING[settings.get("routing", "real")], bars(record))]
    found = []
    for routing in dict.fromkeys(r["routing"] for r in record["rows"]):
        rows = (
            (
                r["who"],
                r["mbs"],
                r["tokens_per_s_per_gpu"]["mean"],
                _times(r["who"], r["speedup"].get("hf_fsdp")) + (" r" if r["recompute"] else ""),
            )
            for r in record["rows"]
            if r["routing"] == routing
        )
        found.append((name + (ROUTING[routing] or ", real routing"), _by_contender(rows)))
    return found


def _times(who: str, speedup: float | None) -> str:
    return "" if speedup is None or who in BASELINES else f"{speedup:.2f}×"


def _by_contender(rows: Iterable[tuple[str, int, float, str]]) -> dict[str, list[Bar]]:
    found: dict[str, list[Bar]] = {who: [] for who in CONTENDERS}
    for who, *bar in sorted(rows, key=lambda r: r[1]):
        found[who].append(tuple(bar))  # type: ignore[arg-type]
    return {who: some for who, some in found.items() if some}


def device_of(record: Mapping[str, Any]) -> str:
    name = record["machine"]["gpu"]["name"] if "gpu" in record["machine"] else "CPU"
    return name if "whole_model" in record else f"{record['settings']['gpus']}x {name}"


def draw(records: Sequence[Mapping[str, Any]], device: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [panel for record in records for panel in panels(record)]
    single = "whole_model" in records[0]
    widths = [max(3, len(contenders)) for _, contenders in shown]  # of equal bars, that labels have room
    size = max(6.0, 1.2 + 1.2 * sum(widths)), 4.6
    figure, axes = plt.subplots(1, len(shown), figsize=size, width_ratios=widths, squeeze=False, sharey=not single)
    for axis, (title, contenders) in zip(axes[0], shown):
        batches = sorted({b for rows in contenders.values() for b, _, _ in rows})
        width = 0.8 / len(contenders)
        there = {b: [who for who, rows in contenders.items() if b in {r[0] for r in rows}] for b in batches}
        for who, rows in contenders.items():
            at = [batches.index(b) + (there[b].index(who) - (len(there[b]) - 1) / 2) * width for b, _, _ in rows]
            drawn = axis.bar(
                at, [t / 1e3 for _, t, _ in rows], width * 0.94, color=CONTENDERS[who][1], label=CONTENDERS[who][0]
            )
            axis.bar_label(
                drawn, [text for _, _, text in rows], fontsize=7, padding=2, fontweight="bold" if who == "moefx" else "normal"
            )
        axis.set_xticks(range(len(batches)), [f"micro-batch {b}" for b in batches])
        axis.set_title(title, fontsize=10)
        top = [contenders] if single else [rows for _, rows in shown]
        axis.set_ylim(0, 1.1 * max(t / 1e3 for rows in top for some in rows.values() for _, t, _ in some))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"thousand tokens per second{'' if single else ' and GPU'}")
    labels: dict[str, Any] = {}
    for axis in axes[0]:
        for handle, label in zip(*axis.get_legend_handles_labels()):
            labels.setdefault(label, handle)
    order = [name for name, _ in CONTENDERS.values() if name in labels]
    figure.legend(
        [labels[n] for n in order], order, loc="lower center", ncols=min(len(order), 2 * len(shown)), frameon=False, fontsize=9
    )
    settings = records[0]["settings"]
    recomputed = any(text.endswith("r") for _, rows in shown for some in rows.values() for *_, text in some)
    figure.suptitle(
        f"Training on {'one ' if single else ''}{device}: forward + loss + backward\n"
        f"sequence {settings['seq']}, {settings['dtype']}, whole models {'extrapolated from a few layers' if single else 'as measured'}"
        + ("\nr: blocks recomputed in the backward, which else needs more memory than there is" if recomputed else ""),
        fontsize=10,
    )
    figure.tight_layout(rect=(0, 0.07 if len(shown) > 1 else 0.11, 1, 1))
    figure.savefig(path, dpi=150)
    plt.close(figure)
    common.say(f"drew {path.name}")


#: The README's chart: Qwen3-30B-A3B on one H200, and on four.
OVERVIEW = ("single_gpu-qwen3-30b-nvidia-h200", "multi_gpu-qwen3-30b-4x-nvidia-h200")


def overview(single: Mapping[str, Any], several: Mapping[str, Any], path: Path) -> None:
    """Tokens per second on one device, then tokens per second and peak memory on several; micro-batch 1, balanced over several."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [r for r in several["rows"] if r["mbs"] == 1 and r["routing"] == "balanced"]
    shown = [
        (
            f"1 × {device_of(single)}\nthousand tokens/s, whole model extrapolated",
            {r["who"]: r["tokens_per_s"] / 1e3 for r in single["whole_model"] if r["mbs"] == 1},
        ),
        (
            f"{device_of(several).replace('x', ' ×')}\nthousand tokens/s per GPU, 48 layers",
            {r["who"]: r["tokens_per_s_per_gpu"]["mean"] / 1e3 for r in rows},
        ),
        (f"{device_of(several).replace('x', ' ×')}\npeak memory per GPU, GiB", {r["who"]: r["peak_gib"] for r in rows}),
    ]
    figure, axes = plt.subplots(1, len(shown), figsize=(12, 2.6))
    for axis, (title, found) in zip(axes, shown):
        names = [who for who in ("hf", "hf_compile", "nemo", "hf_fsdp", "hf_ep", "moefx", "moefx_graph") if who in found]
        drawn = axis.barh([CONTENDERS[n][0] for n in names], [found[n] for n in names], color=[CONTENDERS[n][1] for n in names])
        axis.bar_label(drawn, fmt="%.1f", fontsize=8, padding=3)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=9, loc="left")
        axis.set_xlim(0, 1.18 * max(found.values()))
        axis.set_xticks([])
        axis.tick_params(axis="y", length=0, labelsize=8)
        axis.spines[["top", "right", "bottom"]].set_visible(False)
    days = " and ".join(r["machine"]["time"][:10] for r in (single, several))
    figure.text(
        0.005,
        0.01,
        f"Qwen3-30B-A3B, bf16, sequence {single['settings']['seq']}, micro-batch 1, forward + loss + backward; {days}",
        fontsize=8,
        color="#555555",
    )
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=160)
    plt.close(figure)
    common.say(f"drew {path.name}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files (default: all of results/)")
    parser.add_argument("-o", "--output", type=Path, help="of the PNG, if all results are of one device")
    parser.add_argument("--overview", action="store_true", help="the README's chart")
    args = parser.parse_args()
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("matplotlib is not installed: pip install matplotlib")
        return 1
    if args.overview:
        overview(
            *(json.loads((common.RESULTS / f"{n}.json").read_text()) for n in OVERVIEW), args.output or IMAGES / "overview.png"
        )
        return 0
    by_device: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in args.results or sorted([*common.RESULTS.glob("single_gpu-*.json"), *common.RESULTS.glob("multi_gpu-*.json")]):
        record = json.loads(path.read_text())
        if record.get("whole_model", record.get("rows", None)) and record["settings"]["model"] in TITLES:
            by_device[device_of(record)].append(record)
        else:
            common.say(f"{path.name}: no whole model that is charted, left out")
    if not by_device:
        print("no results to draw: run benchmarks/single_gpu.py or multi_gpu.py first")
        return 1
    if args.output and len(by_device) > 1:
        print(f"--output is one file, the results are of {len(by_device)} devices: {', '.join(by_device)}")
        return 1
    order = list(TITLES)
    for device, records in by_device.items():
        records.sort(
            key=lambda r: (list(ROUTING).index(r["settings"].get("routing", "real")), order.index(r["settings"]["model"]))
        )
        kind = "single_gpu" if "whole_model" in records[0] else "multi_gpu"
        draw(records, device, args.output or IMAGES / f"{kind}-{common.slug(device)}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
