"""What a device does in a second, to turn FLOPs and bytes into times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rates:
    """Rough rates of a device in training: to choose between schedules, not to predict times.

    They are assumed, not measured: the shares of an H100's data sheet that such kernels reach. ``benchmarks/dispatch.py``
    measures ``sent`` and ``latency``, and with ``--host`` the parts of ``launch``.
    """

    flops: float = 6e14  #: of 16-bit matrix products (H100, H200: 989e12 at most)
    memory: float = 2.5e12  #: bytes (H100 SXM: 3.35e12 at most)
    sent: float = 3.5e11  #: bytes to other ranks, within a node over NVLink (450e9 at most)
    latency: float = 4e-5  #: seconds of an exchange without its bytes
    launch: float = 1e-4  #: seconds of CPU time to launch the kernels of one chunk of tokens

    @staticmethod
    def of(ep_size: int) -> Rates:
        """The rates of an H100 or H200; more than 8 ranks communicate over one 400 Gbit/s adapter per GPU."""
        return Rates() if ep_size <= 8 else Rates(sent=4e10)

    def seconds(self, numbers: tuple[float, float, float, float]) -> tuple[float, float]:
        """Seconds of (computation, communication) for ``(FLOPs, bytes read, bytes written, bytes sent)``."""
        flops, read, written, sent = numbers
        return max(flops / self.flops, (read + written) / self.memory), sent / self.sent + self.latency if sent else 0.0
