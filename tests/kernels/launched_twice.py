"""Compiles every Triton kernel for compute capability 9.0 (compiled_for_hopper.py), then launches those of
:mod:`moefx.kernels.launch` twice, on a driver that launches nothing: this needs no GPU.

The first time Triton binds the arguments, the second time ``Launch`` does: both must hand the same to the compiled kernel. Run by
test_compiles.py in a process of its own. Prints a JSON object: "compiled", what compiled_for_hopper.py says, and "same", kernel ->
whether all its launches were the same.
"""

import json
import warnings
from typing import Any

import torch
from triton.runtime.driver import driver

warnings.filterwarnings("ignore")

import compiled_for_hopper  # noqa: E402

from moefx.kernels import cross_entropy, fp8_rows  # noqa: E402
from moefx.kernels.launch import Launch  # noqa: E402

handed: list[tuple] = []


class Launcher:
    """Instead of Triton's: notes what it is handed."""

    def __init__(self, source: Any, metadata: Any):
        pass

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any, enter: Any, leave: Any, *args: Any
    ):
        handed.append((x, y, z, stream, *args))


class Utilities:
    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 20}

    def unload_module(self, module: int) -> None:
        pass


class Hopper(compiled_for_hopper.Hopper):
    utils, launcher_cls = Utilities(), Launcher


def alike(a: Any, b: Any) -> bool:
    return a is b if isinstance(a, torch.Tensor) else type(a) is type(b) and a == b


same: dict[str, bool] = {}
once = Launch.__call__


def twice(self: Launch, grid: tuple[int, int, int], *tensors: torch.Tensor) -> None:
    handed.clear()
    self.ready.clear()
    once(self, grid, *tensors)
    once(self, grid, *tensors)
    first, second = handed
    name = compiled_for_hopper.name(self.kernel)
    same[name] = same.get(name, True) and len(first) == len(second) and all(map(alike, first, second))


def nothing(*_: Any) -> None:
    """Instead of functions that launch by themselves."""


if __name__ == "__main__":
    driver.set_active(Hopper())
    compiled = compiled_for_hopper.compile_all()
    Launch.__call__ = twice  # type: ignore[method-assign]
    compiled_for_hopper.row_kernels_with_moves = nothing
    cross_entropy.cross_entropy_ = fp8_rows.quantize = fp8_rows.dequantize = nothing  # type: ignore[assignment]
    compiled_for_hopper.launch_all(torch.bfloat16)
    print(json.dumps({"compiled": compiled, "same": same}))
