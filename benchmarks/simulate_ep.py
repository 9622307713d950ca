"""``single_gpu.py --simulate-ep N``: moefx as one of N ranks that share the experts, on one device. A MODEL, not a measurement.

What is measured: a step of a rank that holds an N-th of the experts and computes as many rows as it sends, its rows copied where
they would travel. What is added: the bytes that the cost model says go to other ranks, over a stated bandwidth, as if nothing
overlapped. What is left out: ranks that wait for one another, uneven loads, FSDP's gathering. Nothing is checked: the loss means
nothing.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import common
import extrapolate
import models
import torch

import moefx
from moefx.integrations import transformers as hf


def run(args: argparse.Namespace) -> int:
    common.say(
        f"a MODEL of {args.model}, one of {args.simulate_ep} ranks that share the experts; {args.layers} layers, sequence {args.seq}, "
        f"mbs {args.mbs}, {args.dtype} on {args.device}, {args.routing} routing"
    )
    if args.routing == "zipf":
        return common.verdict(
            ["--simulate-ep knows the routings real and balanced: a rank's share of a Zipf load depends on the rank"]
        )
    depths: list[dict[str, Any]] = []
    for layers in args.layers:
        depths.append(depth(args, layers))
        common.free(torch.device(args.device))
    record = {
        "what": "a model: measured steps of one rank whose rows do not travel, plus exchanges from bytes and bandwidth",
        "machine": common.machine(args.device), "settings": {k: v for k, v in vars(args).items() if k != "name"},
        "seconds": common.elapsed(), "depths": depths, "whole_model_modelled": whole(args, depths),
    }  # fmt: skip
    show(args, record)
    common.save(args.name, record)
    bad = [
        f"{d['layers']} layers, mbs {r['mbs']}: the loss is {r['loss']}"
        for d in depths
        for r in d["rows"]
        if not math.isfinite(r["loss"])
    ]
    return common.verdict(bad)


def depth(args: argparse.Namespace, layers: int) -> dict[str, Any]:
    """Steps at one number of layers, and what their exchanges would take."""
    device = torch.device(args.device)
    with common.simulated_ep(args.simulate_ep, device, args.backends) as options:
        model: Any = models.build(args.model, layers, getattr(torch, args.dtype), device).train()
        moefx.optimize(model, balanced_routing=args.routing == "balanced", compile=args.compile, **options)
        common.fill_experts(model)
        record: dict[str, Any] = {"layers": layers, "moe_layers": len(hf.experts_modules(model)), "rows": []}
        for batch in args.mbs:
            given = models.tokens(args.model, batch, args.seq, device)
            timing = common.measure(model, model, given, device, warmup=args.warmup, steps=args.steps)
            exchange = common.exchange_ms(model, args.exchange_gb_per_s, B=batch, S=args.seq)
            loss = float(common.train_step(model, given))
            common.drop_gradients(model)
            record["rows"].append({"mbs": batch, "loss": loss, "exchange_model_ms": exchange, **timing.summary()})
            common.say(
                f"  {layers} layers, mbs {batch}: {timing.median_ms:.2f} ms measured, {exchange:.2f} ms of exchanges modelled"
            )
    return record


def whole(args: argparse.Namespace, depths: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A step of the published model: the measured part extrapolated, the exchanges by the number of their layers."""
    model, found = models.MODELS[args.model], []
    layers = len(hf.experts_modules(models.build(args.model, model.layers, torch.bfloat16, "meta")))
    for batch in args.mbs:
        rows = {d["layers"]: next(r for r in d["rows"] if r["mbs"] == batch) for d in depths}
        result = extrapolate.whole(
            {n: r["median_ms"] for n, r in rows.items()}, {n: model.units(n) for n in rows}, model.whole, model.layers
        )
        if result:
            exchange = rows[depths[-1]["layers"]]["exchange_model_ms"] / depths[-1]["moe_layers"] * layers
            total = result["ms"] + exchange
            found.append(
                {
                    "mbs": batch,
                    **result,
                    "exchange_model_ms": exchange,
                    "model_ms": total,
                    "tokens_per_s_per_gpu": batch * args.seq / total * 1e3,
                }
            )
    return found


def show(args: argparse.Namespace, record: dict[str, Any]) -> None:
    rows = []
    for d in record["depths"]:
        for r in d["rows"]:
            total = r["median_ms"] + r["exchange_model_ms"]
            rows.append(
                (
                    d["layers"],
                    r["mbs"],
                    f"{r['median_ms']:.2f}",
                    f"{r['exchange_model_ms']:.2f}",
                    f"{total:.2f}",
                    f"{r['mbs'] * args.seq / total * 1e3:.0f}",
                )
            )
    for r in record["whole_model_modelled"]:
        rows.append(
            (
                f"{r['layers']} (extrapolated)",
                r["mbs"],
                f"{r['ms']:.2f}",
                f"{r['exchange_model_ms']:.2f}",
                f"{r['model_ms']:.2f}",
                f"{r['tokens_per_s_per_gpu']:.0f}",
            )
        )
    title = (
        f"MODEL of one of {args.simulate_ep} ranks: {args.model}, exchanges at {args.exchange_gb_per_s:.0f} GB/s, none overlapped; "
        "not a measurement of several GPUs"
    )
    common.show(title, ("layers", "mbs", "measured ms", "exchanges, modelled ms", "sum", "tokens/s a GPU, modelled"), rows)
