"""Times the backends' kernels for models of the benchmarks on this machine's GPU, into the table that moefx ships for it.

    python benchmarks/tune_table.py                                  # the published models, micro-batches 1 and 4 of 4,096 tokens
    python benchmarks/tune_table.py --models tiny --device cpu --seq 64 --out /tmp/tuned

A few layers of each model, random weights, bf16. What the table has for other sites stays; of these it is replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import common
import torch
from models import MODELS, build

import moefx
from moefx.backends import tuning

#: Whose sites the table has.
TABLED = ("qwen3_30b", "nemotron_nano", "gpt_oss_20b")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", choices=MODELS, nargs="+", default=TABLED)
    parser.add_argument("--mbs", type=int, nargs="+", default=[1, 4], help="sequences of a micro-batch")
    parser.add_argument("--seq", type=int, default=4096)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="folder of the table (default: moefx/tuned)")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    device = torch.device(args.device)
    where = tuning.name_of(device)
    path = (args.out or tuning.table_of(where).parent) / tuning.table_of(where).name
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOEFX_TUNING"] = str(Path(folder) / "tuning.json")  # measured now, all of it
        for name in args.models:
            layers = MODELS[name].depths[0]
            for batch in args.mbs:
                model = build(name, layers, torch.bfloat16, device).train()
                moefx.optimize(model, tune=(batch, args.seq))
                chosen = [
                    (op, kernel, why) for (op, kernel), (_, why) in moefx.report(model).kernels().items() if "measured" in why
                ]
                title = f"{name}, {layers} layers, micro-batch {batch}"
                common.show(
                    title,
                    ("operation", "fastest", "forward + backward"),
                    [(*row[:2], row[2].split(": ", 1)[1]) for row in chosen],
                )
                del model
                common.free(device)
        found = tuning.rows(where)
    if not found:
        raise SystemExit(f"no operation has more than one kernel on {where}: `moefx doctor` says which backends are usable")
    old = json.loads(path.read_text()) if path.exists() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    sites = {**old.get("sites", {}), **found}
    path.write_text(json.dumps({"machine": common.machine(device), "sites": dict(sorted(sites.items()))}, indent=1) + "\n")
    common.say(f"{len(found)} sites measured, {len(sites)} in {path}")


if __name__ == "__main__":
    main()
