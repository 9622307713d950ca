"""Certification: before a rewrite, the matched nodes and their replacement are run on the same random inputs.

Outputs and gradients are compared.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from moefx.ir.graph import nodes_of, op_name, value

#: Larger static sizes are shrunk for the run: a vocabulary of 151,936 would take seconds and gigabytes.
_LARGE = 1024
_SMALL = (96, 64, 48, 32)
_LEAST = 16
Nodes = tuple[fx.Node, ...]
Outputs = tuple[fx.Node | None, ...]


class Sizes:
    """Maps symbolic sizes to small distinct numbers, and very large static sizes to smaller ones."""

    def __init__(self, shrink: bool = True):
        self.symbols: dict[sympy.Symbol, int] = {}
        self.hints: dict[Any, int] = {}
        self.large: dict[int, int] = {}
        self.shrink = shrink

    def __call__(self, size: Any) -> int:
        """The number for one size, an int or SymInt."""
        if isinstance(size, torch.SymInt):
            expression = size.node.expr
            environment = size.node.shape_env
            known = getattr(environment, "backed_var_to_val", None) or getattr(environment, "var_to_val", {})
            for s in sorted(expression.free_symbols, key=str):
                # symbols that had equal sizes in the example (the batch size of two inputs) stay equal
                hint = known.get(s, s)
                self.symbols[s] = self.hints.setdefault(hint, 2 + len(self.hints))
            return int(expression.subs(self.symbols))
        if self.shrink and type(size) is int and size > _LARGE and size not in self.large:
            small = self._small(size)
            if small:
                self.large[size] = small
        return self.large.get(size, int(size))

    def _small(self, size: int) -> int | None:
        """A smaller size that keeps its ratio to another large one (gate and up in one matrix), else an unused number."""
        free = [n for n in _SMALL if n not in self.large.values()]
        for known, small in self.large.items():
            times = Fraction(size, known)
            alike = small * times
            whole = 1 in times.as_integer_ratio() and alike.denominator == 1
            if whole and alike >= _LEAST and alike not in self.large.values():
                return int(alike)
        return free[0] if free else None


def _inputs(nodes: Nodes) -> list[fx.Node]:
    inside = set(nodes)
    return list(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside))


def _sample(val: Any, sizes: Sizes, generator: torch.Generator) -> Any:
    if isinstance(val, Tensor):
        shape = [sizes(d) for d in val.shape]
        if val.dtype == torch.bool:
            return torch.ones(shape, dtype=torch.bool)
        if val.dtype.is_complex:
            return torch.randn(shape, generator=generator, dtype=val.dtype)
        if not val.dtype.is_floating_point:
            return torch.randint(0, 2, shape, generator=generator, dtype=val.dtype)
        return torch.randn(shape, generator=generator, dtype=torch.float32).to(val.dtype).requires_grad_()
    return sizes(val) if isinstance(val, torch.SymInt) else val


def _run(nodes: Nodes, env: dict[fx.Node, Any], sizes: Sizes, exact: bool = False) -> None:
    """Runs the nodes. ``exact``: in float64 wherever they name a floating-point dtype."""

    def small(a: Any) -> Any:
        if exact and isinstance(a, torch.dtype) and a.is_floating_point:
            return torch.float64
        return sizes.large.get(a, a) if type(a) is int else a

    for n in nodes:
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), lambda a: env[a])
        if n.target is not operator.getitem:
            args, kwargs = fx.node.map_aggregate((args, kwargs), small)
        if "device" in kwargs:
            kwargs = {**kwargs, "device": torch.device("cpu")}
        env[n] = n.target(*args, **kwargs)  # type: ignore[operator]


def _gradients(outputs: list[Any], inputs: list[Tensor], seed: int) -> list[Tensor | None]:
    floats = [o for o in outputs if isinstance(o, Tensor) and o.dtype.is_floating_point and o.requires_grad]
    if not floats:
        return [None] * len(inputs)
    g = torch.Generator().manual_seed(
        1000 + seed
    )  # other numbers than the first input: the gradient of a norm along its input is zero
    weights = [torch.randn(o.shape, generator=g).to(o.dtype) for o in floats]
    return list(torch.autograd.grad(floats, inputs, weights, allow_unused=True))


def _environment(
    nodes: Nodes, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sizes, seed: int, in_float64: bool = False
) -> dict[fx.Node, Any]:
    """Random values for the inputs of the nodes and of their replacement."""
    generator = torch.Generator().manual_seed(seed)

    def made(n: fx.Node) -> Any:
        sample = _sample(value(n), sizes, generator)
        return _to_float64(sample) if in_float64 else sample

    env = {n: made(n) for n in _inputs(nodes)}
    for n in nodes_of((args, kwargs)):  # a view of inputs that was emitted for the replacement, or another input
        if n not in env and n.all_input_nodes and all(a in env for a in n.all_input_nodes):
            _run((n,), env, sizes, exact=in_float64)
        elif n not in env:
            env[n] = made(n)
    return env


def _to_float64(x: Any) -> Any:
    """Floating-point tensors and dtypes as float64."""
    if isinstance(x, Tensor) and x.is_floating_point():
        return x.detach().double().requires_grad_(x.requires_grad)
    return torch.float64 if isinstance(x, torch.dtype) and x.is_floating_point else x


def _equal_in_fp64(
    nodes: Nodes,
    outputs: Outputs,
    replacement: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
    seed: int,
) -> bool:
    """Whether both agree in float64, without rounding to 16 bits in between. (Bodies that cast to float32 still do.)"""
    env = _environment(nodes, args, kwargs, sizes, seed, in_float64=True)
    leaves = [v for v in env.values() if isinstance(v, Tensor) and v.requires_grad and v.is_leaf]
    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: _to_float64(a) if isinstance(a, torch.dtype) else a)
    args, kwargs = fx.node.map_arg((args, kwargs), lambda a: env[a])
    new = replacement(*args, **kwargs)
    new = list(new) if isinstance(new, (tuple, list)) else [new]
    _run(nodes, env, sizes, exact=True)
    pairs = [(env[n], v) for n, v in zip(outputs, new, strict=True) if n is not None]
    pairs += zip(*(_gradients([p[i] for p in pairs], leaves, seed) for i in (0, 1)), strict=True)
    close = 64 * torch.finfo(torch.float32).eps
    return all((a is None) == (b is None) and (a is None or _gap(a, b) <= close) for a, b in pairs)


def _dtypes(nodes: Nodes) -> set[torch.dtype]:
    vals = [value(n) for n in nodes]
    return {v.dtype for v in vals if isinstance(v, Tensor) and v.is_floating_point()}


def _gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of ``a``."""
    if not a.numel():
        return 0.0
    dtype = torch.promote_types(a.dtype, torch.float32)
    a, b = a.detach().to(dtype), b.detach().to(dtype)
    scale = a.abs().nan_to_num(posinf=0, neginf=0).max().clamp_min(1e-30)
    return float((a - b).abs().nan_to_num(0).max() / scale)


def certify(
    nodes: Nodes, outputs: Outputs, replacement: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[bool, str]:
    """Checks that ``replacement(*args, **kwargs)`` computes ``outputs`` of ``nodes``, and the gradients of all inputs.

    It runs on the CPU, on small random inputs of the nodes' dtypes. Where the nodes round intermediate values to 16 bits,
    outputs may differ by that rounding if both agree in float64.

    Returns:
        Whether they agree, and a sentence: "bitwise equal", "largest relative difference 3e-08", or what differs.
    """
    try:
        return _certify(nodes, outputs, replacement, args, kwargs, Sizes())
    except Exception:  # perhaps a size that cannot be shrunk: try the true sizes, whose errors count
        try:
            return _certify(nodes, outputs, replacement, args, kwargs, Sizes(shrink=False))
        except Exception as error:
            return False, f"could not be run for comparison: {type(error).__name__}: {error}"


def _certify(
    nodes: Nodes,
    outputs: Outputs,
    replacement: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    sizes: Sizes,
) -> tuple[bool, str]:
    worst = 0.0
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for seed in (0, 1):
            env = _environment(nodes, args, kwargs, sizes, seed)
            leaves = [v for v in env.values() if isinstance(v, Tensor) and v.requires_grad and v.is_leaf]
            given_args, given_kwargs = fx.node.map_arg((args, kwargs), lambda a, env=env: env[a])  # type: ignore[misc]
            new = replacement(*given_args, **given_kwargs)
            new = list(new) if isinstance(new, (tuple, list)) else [new]
            _run(nodes, env, sizes)
            pairs = [(n, env[n], v) for n, v in zip(outputs, new, strict=True) if n is not None]
            old_grads = _gradients([o for _, o, _ in pairs], leaves, seed)
            new_grads = _gradients([v for _, _, v in pairs], leaves, seed)
            named = [(f"output {n.name}", o, v) for n, o, v in pairs]
            named += [
                (f"a gradient through {op_name(nodes[-1].target)}", o, v) for o, v in zip(old_grads, new_grads, strict=True)
            ]
            for what, a, b in named:
                if a is None and b is None:
                    continue
                if (a is None) != (b is None):
                    return False, f"{what} exists before or after only"
                if a.dtype != b.dtype or a.shape != b.shape:
                    return False, f"{what} is {a.dtype}{list(a.shape)} before and {b.dtype}{list(b.shape)} after"
                if not a.dtype.is_floating_point:
                    if not torch.equal(a, b):
                        return False, f"{what} differs"
                    continue
                if not torch.equal(a.detach().isnan(), b.detach().isnan()):
                    return False, f"{what} has NaNs in other places"
                relative = _gap(a, b)
                # a few roundings: reordered sums in fp32, one rounding more or less in 16 bits
                few = (64 if a.dtype == torch.float32 else 4) * torch.finfo(a.dtype).eps
                if relative > few:
                    rounds = 4 * max(torch.finfo(d).eps for d in _dtypes(nodes))  # nodes may round to 16 bits in between
                    given = (nodes, outputs, replacement, args, kwargs, sizes, seed)
                    if relative > rounds or not _equal_in_fp64(*given):
                        return False, f"{what} differs by {relative:.1e} of its largest value ({a.dtype})"
                worst = max(worst, relative)
    return True, "bitwise equal" if worst == 0 else f"largest relative difference {worst:.0e}"
