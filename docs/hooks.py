"""Writes the reference's lists from the sources, so that no name of the package is typed in a page.

A page of ``docs/reference`` has one of the markers below on a line of its own. Nothing is imported: torch would take seconds.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
#: Files of operations in the order in which a block runs them; others follow.
_IN_A_BLOCK = ["norm", "rotary_embedding", "sdpa_attention", "router", "moe", "dispatch_combine", "grouped_mlp"]


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replaces the markers of a page by mkdocstrings' directives, and keeps figures of tables together with their units."""
    markdown = re.sub(
        r"^\|.*", lambda row: re.sub(r"(?<=\d) (?=(?:ms|GiB|×|µs)\b|×)", "\u00a0", row[0]), markdown, flags=re.MULTILINE
    )
    for marker, write in (
        ("public names", public_names),
        ("operations", operations),
        ("passes", passes),
        ("transport", transport),
    ):
        markdown = markdown.replace(f"<!-- {marker} -->", write() if f"<!-- {marker} -->" in markdown else "")
    return markdown


def on_page_content(html: str, **_: object) -> str:
    """Translates Sphinx's notation in docstrings: roles (``:func:`moefx.optimize```) become links, ``::`` a colon."""
    html = html.replace("::</p>", ":</p>")
    role = r":(?:func|class|meth|mod|data):<code>~?([\w.]+)</code>"
    return re.sub(role, r'<autoref identifier="\1" optional><code>\1</code></autoref>', html)


def exported(module: str) -> list[tuple[str, list[str]]]:
    """What ``__all__`` of a package holds: its comment lines, as headings, and the names under each."""
    source = (ROOT / module / "__init__.py").read_text()
    block = re.search(r"^__all__ = \[\n(.*?)^\]", source, re.DOTALL | re.MULTILINE)
    assert block, f"{module}/__init__.py has no __all__ over several lines"
    found: list[tuple[str, list[str]]] = [("", [])]
    for line in block[1].splitlines():
        if line.strip().startswith("#"):
            found.append((line.strip("# ").strip(), []))
        else:
            found[-1][1].extend(re.findall(r'"(\w+)"', line))
    return [(heading, names) for heading, names in found if names]


def _directive(identifier: str, heading: str = "", **options: str) -> str:
    if heading:
        options |= {"heading": f'"{heading}"', "toc_label": f'"{heading}"', "show_symbol_type_heading": "false"}
    lines = "".join(f"      {k}: {v}\n" for k, v in options.items())
    return f"::: {identifier}\n" + (f"    options:\n{lines}" if lines else "")


def public_names() -> str:
    """Every name of ``moefx.__all__``, by topic; the sub-package ``passes`` has a page of its own."""
    return "\n".join(
        f"## {heading or 'Names'}\n\n" + "\n".join(_directive(f"moefx.{n}") for n in names if n != "passes")
        for heading, names in exported("moefx")
    )


def passes() -> str:
    """Every name of ``moefx.passes.__all__``; those that the package takes from elsewhere stand in the API's page."""
    elsewhere = {n for _, names in exported("moefx") for n in names}
    names = [n for _, names in exported("passes") for n in names if n not in elsewhere]
    names.sort(key=lambda n: (n != "default", n))
    return "\n".join(_directive(f"moefx.passes.{n}", heading_level="2") for n in names)


def operations() -> str:
    """Every operation of ``moefx::`` that is not private, file by file; a backward belongs to its operation."""
    written = []
    place = {name: i for i, name in enumerate(_IN_A_BLOCK)}
    for path in sorted((ROOT / "moefx/ops").glob("*.py"), key=lambda p: (place.get(p.stem, len(place)), p.stem)):
        tree = ast.parse(path.read_text())
        module = "moefx.ops" if path.name == "__init__.py" else f"moefx.ops.{path.stem}"
        for name, function in _defined(tree).items():
            if not name.startswith("_") and "backward" not in name:
                written.append(_directive(f"{module}.{function}", name, heading_level="2"))
    return "\n".join(written)


def transport() -> str:
    """The protocol of transports, wherever it lives."""
    (path,) = (p for p in (ROOT / "moefx").rglob("*.py") if "\nclass Transport(Protocol)" in p.read_text())
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return _directive(f"{module}.Transport", show_root_toc_entry="false")


def _defined(tree: ast.Module) -> dict[str, str]:
    """Operation -> the function that defines it: decorated by ``@op``, or registered by ``Library.impl``."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and any(isinstance(d, ast.Call) and _name(d) == "op" for d in node.decorator_list):
            found[node.name] = node.name
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and _name(node.value) == "impl":
            name, function, *_ = node.value.args
            if isinstance(name, ast.Constant) and isinstance(function, ast.Name):
                found[name.value] = function.id
    return found


def _name(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
