"""A function's graph as a Mermaid flowchart, which GitHub, notebooks and editors draw (https://mermaid.js.org).

Operations are boxes, coloured by their kind; values run along the arrows. Views and size computations are left out: arrows
pass through them. A box shows the operation, the backend whose kernel runs it, the parameters that it reads, and its results.
B and S are batch size and sequence length, R1, R2, ... sizes that depend on the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx

from moefx.ir.code import Listing
from moefx.ir.graph import CASTS, VIEWS, aten, nodes_of, op_name, shape_text

if TYPE_CHECKING:
    from moefx.ir.program import Function

_THROUGH = VIEWS.difference(CASTS) | {aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default}
_PRODUCTS = frozenset(
    {
        aten.linear.default,
        aten.mm.default,
        aten.addmm.default,
        aten.matmul.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._grouped_mm.default,
    }
)
_EXCHANGE = ("dispatch", "combine")
#: Fill and border of each kind of box.
_STYLES = {
    "operation": "fill:#cfe2ff,stroke:#2f5fa8", "exchange": "fill:#ffe0b3,stroke:#b36b00",
    "product": "fill:#e3e3e3,stroke:#666666", "other": "fill:#ffffff,stroke:#999999", "value": "fill:#f7f7f7,stroke:#999999",
}  # fmt: skip
#: Results that a box shows; a dispatch has eight.
_SPELLED = 2


def mermaid(stages: Mapping[str, tuple[Function, Listing]]) -> str:
    """One flowchart of all functions: name -> (function, its graph at some moment)."""
    lines = ["flowchart TB"]
    for i, (name, (function, listing)) in enumerate(stages.items()):
        times = f" x {len(function.instances)}" if len(function.instances) > 1 else ""
        lines += [f'  subgraph f{i}["{name}{times}"]', *(f"    {x}" for x in _drawn(function, listing, f"f{i}")), "  end"]
    return "\n".join([*lines, *(f"  classDef {kind} {style},color:#111111" for kind, style in _STYLES.items())]) + "\n"


def _drawn(function: Function, listing: Listing, prefix: str) -> Iterator[str]:
    owned = [*function.parameters, *("constant" for _ in function.constants)]
    parameters = dict(zip(function.placeholders, owned, strict=False))
    used = {s for _, _, args, kwargs, _ in listing.nodes for s in nodes_of((args, kwargs))}
    sizes = _sizes(listing, parameters)
    shown: dict[fx.Node, str] = {}  # a node -> its box
    through: dict[fx.Node, list[fx.Node]] = {}  # a node without a box -> those whose values it shows
    for (node, target, args, kwargs, val), note in zip(listing.nodes, listing.origins, strict=True):
        if node.op == "placeholder" and (node.name in parameters or node not in used):
            continue
        sources = nodes_of((args, kwargs))
        if node.op == "call_function" and (target in _THROUGH or not _tensors(val)):
            through[node] = [s for s in sources if _tensors(s.meta.get("val"))] if _tensors(val) else []
            continue
        if node.op == "call_function":
            text, kind = _operation(target, note.kernel if note is not None else "")
        else:
            text, kind = node.name if node.op == "placeholder" else "results", "value"
        read = [parameters[s.name] for s in sources if s.op == "placeholder" and s.name in parameters]
        short = [n.removesuffix(".weight") for n in read if n.removesuffix("bias") + "weight" not in read]
        given = [] if node.op == "output" else [_renamed(_spelled(val), sizes)]
        label = "<br>".join([text, *dict.fromkeys(short), *given])
        shown[node] = f"{prefix}n{len(shown)}"
        yield shown[node] + (f'(["{label}"])' if kind == "value" else f'["{label}"]') + f":::{kind}"
        for source in dict.fromkeys(s for n in sources for s in _seen(n, through)):
            if source in shown:
                yield f"{shown[source]} --> {shown[node]}"


def _operation(target: Any, kernel: str) -> tuple[str, str]:
    full = op_name(target)
    name = full.removeprefix("moefx.").removeprefix("aten.").split(".")[0]
    ours = full.startswith("moefx.") or bool(kernel)
    kind = "exchange" if name.startswith(_EXCHANGE) else "operation" if ours else "product" if target in _PRODUCTS else "other"
    return f"<b>{name}</b>" + (f" by {kernel}" if kernel else ""), kind


def _tensors(val: Any) -> list[Tensor]:
    if isinstance(val, Tensor):
        return [val]
    return [t for v in val for t in _tensors(v)] if isinstance(val, (tuple, list)) else []


def _spelled(val: Any) -> str:
    every = [shape_text(t) for t in _tensors(val)]
    more = len(every) - _SPELLED
    return ", ".join(every[:_SPELLED]) + (f" and {more} more" if more > 0 else "")


def _seen(node: fx.Node, through: Mapping[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    """The nodes with boxes whose values ``node`` shows: itself, or the inputs of a view."""
    return [s for n in through[node] for s in _seen(n, through)] if node in through else [node]


def _sizes(listing: Listing, parameters: Mapping[str, str]) -> dict[str, str]:
    """``{"s0": "B", "s1": "S"}``: the symbols of batch size and sequence length in the first input that has both."""
    for node, *_, val in listing.nodes:
        if node.op == "placeholder" and node.name not in parameters and isinstance(val, Tensor) and val.dim() > 2:
            return {str(d): called for d, called in zip(val.shape, "BS") if re.fullmatch(r"s\d+", str(d))}
    return {}


def _renamed(text: str, sizes: dict[str, str]) -> str:
    """Replaces symbols: batch size and sequence length by B and S, sizes that depend on the data by R1, R2, ..."""
    for symbol in re.findall(r"\bu\d+\b", text):
        sizes.setdefault(symbol, f"R{sum(called.startswith('R') for called in sizes.values()) + 1}")
    return re.sub(r"\b[su]\d+\b", lambda found: sizes.get(found[0], found[0]), text).replace("S*B", "B*S")
