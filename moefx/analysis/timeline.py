"""When a function computes and when it communicates, by the cost model: as text, and as SVG.

Two lanes: computation, one node after the other in the graph's order, and communication. A model, not a measurement: see
:class:`moefx.analysis.rates.Rates`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING

from torch import fx

from moefx.analysis.cost import Sizes, node_cost
from moefx.analysis.rates import Rates
from moefx.ir.graph import is_call
from moefx.ops import dispatch_combine
from moefx.ops import grouped_mlp as grouped

if TYPE_CHECKING:
    from moefx.ir.plan import Plan
    from moefx.ir.program import Function

_STARTS = {dispatch_combine.dispatch_start: "dispatch", dispatch_combine.combine_start: "combine"}
_WAITS = (dispatch_combine.dispatch_wait, dispatch_combine.combine_wait)
_COLORS = {"dispatch": "#4477aa", "combine": "#66ccee", "experts": "#228833", "meanwhile": "#ccbb44", "rest": "#bbbbbb"}


@dataclass(frozen=True)
class Span:
    """A stretch of time in a lane."""

    lane: str  #: "compute" or "exchange"
    kind: str  #: a key of _COLORS
    start: float  #: seconds
    end: float
    chunk: int = 0  #: 1, 2, ...; 0: belongs to no chunk


@dataclass(frozen=True)
class Timeline:
    """One call of a function; ``print`` it, or write ``svg()`` to a file."""

    title: str
    spans: tuple[Span, ...]

    @property
    def seconds(self) -> float:
        """When the last span ends."""
        return max((s.end for s in self.spans), default=0.0)

    @property
    def hidden(self) -> float:
        """The share of communication that overlaps with computation."""
        total = sum(s.end - s.start for s in self.spans if s.lane == "exchange")
        under = sum(
            max(0.0, min(a.end, b.end) - max(a.start, b.start))
            for a in self.spans
            if a.lane == "exchange"
            for b in self.spans
            if b.lane == "compute"
        )
        return under / total if total else 1.0

    def __str__(self) -> str:
        width, characters = 80, {"rest": "-", "meanwhile": "+", "experts": "E", "dispatch": "D", "combine": "C"}
        scale = width / self.seconds if self.seconds else 0.0
        lines = [f"{self.title}: {self.seconds * 1e6:.0f} us, {self.hidden:.0%} of communication overlapped"]
        for lane in ("compute", "exchange"):
            row = [" "] * width
            for s in self.spans:
                if s.lane == lane:
                    mark = str(s.chunk) if s.chunk else characters[s.kind]
                    first, last = int(s.start * scale), max(int(s.start * scale) + 1, round(s.end * scale))
                    row[first:last] = ([characters[s.kind]] + [mark] * (last - first - 1))[: max(0, width - first)]
            lines.append(f"  {lane:9s}|{''.join(row[:width])}|")
        lines.append("  D dispatch, C combine, E experts (then the chunk's number), + others during communication, - the rest")
        return "\n".join(lines)

    def svg(self) -> str:
        """A picture of 900 pixels; each span has a tooltip with its times."""
        left, width, high = 80, 800, 34
        scale = width / self.seconds if self.seconds else 0.0
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" height="150" font-family="sans-serif" '
            'font-size="12">',
            f'<text x="4" y="16">{escape(self.title)}: {self.seconds * 1e6:.0f} us by the cost model</text>',
        ]
        for row, lane in enumerate(("compute", "exchange")):
            top = 28 + row * (high + 8)
            parts.append(f'<text x="4" y="{top + 21}">{lane}</text>')
            for s in self.spans:
                if s.lane == lane:
                    name = s.kind + (f" {s.chunk}" if s.chunk else "")
                    x, w = left + s.start * scale, max(0.5, (s.end - s.start) * scale)
                    parts.append(
                        f'<rect x="{x:.1f}" y="{top}" width="{w:.1f}" height="{high}" fill="{_COLORS[s.kind]}">'
                        f"<title>{name}: {s.start * 1e6:.0f} to {s.end * 1e6:.0f} us</title></rect>"
                    )
                    if w > 8 * len(name):
                        parts.append(f'<text x="{x + w / 2:.1f}" y="{top + 21}" text-anchor="middle">{name}</text>')
        for i, kind in enumerate(_COLORS):
            x = left + i * 130
            parts.append(f'<rect x="{x}" y="122" width="12" height="12" fill="{_COLORS[kind]}"/>')
            parts.append(f'<text x="{x + 18}" y="132">{kind}</text>')
        return "\n".join([*parts, "</svg>"])


def timeline(function: Function, plan: Plan, *, backward: bool = False, **sizes: int) -> Timeline:
    """The schedule of one call of ``function`` at ``sizes`` (default B=1, S=4096), forward or backward.

    The backward runs the nodes in reverse order, with starts and waits swapped, and computes twice as long.
    """
    symbols, rates = Sizes(function), Rates.of(plan.ep_size)
    numbers = {**symbols.roles, "B": 1, "S": 4096, "ep": plan.ep_size, **sizes}
    nodes = [n for n in function.graph.nodes if n.op == "call_function"]
    starts = [n for n in nodes if n.target in _STARTS]
    of_wait = {
        w: next(n for n in w.all_input_nodes[1 if w.target is _WAITS[0] else 0].all_input_nodes if n in starts)
        for w in nodes
        if w.target in _WAITS
    }
    kinds = {kind: [n for n in starts if _STARTS[n.target] == kind] for kind in _STARTS.values()}
    experts = [n for n in nodes if n.meta.get("semantic", n.target) is grouped.grouped_mlp]
    spans: list[Span] = []
    now = free = 0.0
    arrives: dict[fx.Node, float] = {}
    for node in reversed(nodes) if backward else nodes:
        cost = node_cost(node, symbols).evaluate(numbers)
        work = rates.seconds((*cost[:3], 0.0))[0] * (2 if backward else 1)
        sends, waits = (node in of_wait, node in starts) if backward else (node in starts, node in of_wait)
        pair = of_wait.get(node, node)
        if waits:
            now = max(now, arrives[pair])
        chunk = 1 + experts.index(node) if node in experts else 0
        kind = "experts" if chunk else "meanwhile" if free > now else "rest"
        if work:
            last = spans[-1] if spans else None
            if last and last.lane == "compute" and (last.kind, last.chunk) == (kind, chunk) and last.end == now:
                spans[-1] = replace(last, end=now + work)
            else:
                spans.append(Span("compute", kind, now, now + work, chunk))
            now += work
        if sends:
            sent = rates.seconds((0.0, 0.0, 0.0, node_cost(pair, symbols).evaluate(numbers)[3]))[1]
            kind = _STARTS[pair.target]
            begin = max(now, free)
            free = arrives[pair] = begin + sent
            spans.append(Span("exchange", kind, begin, free, 1 + kinds[kind].index(pair)))
    many = ", ".join(f"{s}={numbers[s]}" for s in ("B", "S", "ep"))
    return Timeline(f"{function.name}, {'backward' if backward else 'forward'} at {many}", tuple(spans))


def has_exchange(function: Function) -> bool:
    """Whether the function dispatches tokens to other ranks, in a start and a wait."""
    return any(is_call(n, dispatch_combine.dispatch_start) for n in function.graph.nodes)
