"""The clock and the power of a GPU while steps are timed, as nvidia-smi tells them.

Compute-bound steps reach the device's power limit, which lowers its clock: the same kernel on the same shapes takes longer in a
step that leaves the device less idle. Ratios of two contenders have that in them, and a roofline of short runs does not.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
from collections.abc import Iterator

import torch

#: Milliseconds between two readings.
EVERY = 50


class Readings:
    """Lines of nvidia-smi as they come; ``since_now`` drops those before the steps that count."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float]] = []

    def since_now(self) -> None:
        self.found.clear()

    def read(self, lines: Iterator[str]) -> None:
        for line in lines:
            with contextlib.suppress(ValueError):  # "[N/A]", or the half of a last line
                mhz, watts = map(float, line.split(","))
                self.found.append((mhz, watts))

    def summary(self) -> dict[str, float] | None:
        """Medians of the clock and of the power draw; None where nothing was read."""
        if not self.found:
            return None
        mhz, watts = map(statistics.median, zip(*self.found))
        return {"sm_mhz": mhz, "watts": watts, "readings": len(self.found)}


@contextlib.contextmanager
def reading(device: torch.device) -> Iterator[Readings]:
    """Within: the clock is read all the time; no readings on the CPU and where there is no nvidia-smi."""
    readings, process = Readings(), None
    if device.type == "cuda":
        which = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        command = [
            "nvidia-smi",
            "-i",
            which,
            "--query-gpu=clocks.sm,power.draw",
            "--format=csv,noheader,nounits",
            f"-lms={EVERY}",
        ]
        with contextlib.suppress(OSError):
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if process is None:
        yield readings
        return
    thread = threading.Thread(target=readings.read, args=(process.stdout,), daemon=True)
    thread.start()
    try:
        yield readings
    finally:
        process.terminate()
        process.wait()
        thread.join()
