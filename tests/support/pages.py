"""Every command and code block of README, docs and examples, as a new user would run it, at the sizes of this machine."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))]
#: Pages whose blocks are one program; those of others stand alone.
PROGRAMS = ["docs/guides/read-a-report.md", "docs/guides/write-a-kernel.md", "docs/guides/write-a-pass.md"]
EXAMPLES = sorted(f"examples/{p.name}" for p in (ROOT / "examples").glob("*.py"))
_COMMAND = re.compile(
    r"^ *((?:moefx|python|torchrun|accelerate|make) (?:[^\\\n]|\\\n)+)$", re.MULTILINE
)  # with its continuations
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: What is not run as written, by its beginning: another command that does the same, or why there is none.
INSTEAD = {
    "make demo": "python examples/quickstart.py",  # what it runs once .venv is made
    "make test": "skip: the tests themselves",
    "make gpu-check": "skip: this is it",
    "torchrun --nnodes": "skip: needs several machines",
    "moefx models  ": "moefx models mixtral deepseek_v3 nemotron_h",  # of all families: minutes
}


@dataclass(frozen=True)
class Command:
    where: str
    text: str  #: as written, without its comment

    def here(self, ranks: int, folder: str) -> str:
        """At most ``ranks`` ranks, a checkpoint folder for FOLDER; "skip: ..." with the reason where it cannot be run here."""
        text = next((i for start, i in INSTEAD.items() if f"{self.text}  ".startswith(start)), self.text)
        text = re.sub(r"(--nproc-per-node|--num_processes) 8", rf"\1 {ranks}", text)
        text = re.sub(r"(torchrun.*--ep-size) 8", rf"\1 {ranks}", text).replace("FOLDER", folder)
        wanted = min(_ranks_of(self.text), 2) if ranks == 1 else _ranks_of(text)
        return f"skip: {wanted} ranks, {ranks} can be had" if wanted > ranks else text

    @property
    def over_ranks(self) -> bool:
        return _ranks_of(self.text) > 1 or "quickstart" in self.text or self.text == "make demo"


def _ranks_of(text: str) -> int:
    found = re.search(r"(?:--nproc-per-node|--num_processes) (\d+)", text)
    return int(found[1]) if found else 1


def commands() -> list[Command]:
    """Each command once, where it stands first."""
    found = []
    for page in PAGES:  # in a page a command is indented, or quoted within a sentence
        found += [Command(page, c) for c in map(_plain, _COMMAND.findall(_without_blocks((ROOT / page).read_text())))]
    for example in EXAMPLES:  # in an example it stands in the docstring
        found += [Command(example, c) for c in map(_plain, _COMMAND.findall((ROOT / example).read_text().split('"""')[1]))]
    return list({c.text: c for c in reversed(found) if c.text}.values())[::-1]


def _without_blocks(text: str) -> str:
    """Without fenced blocks and unindented lines: a sentence may begin with "make"."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return "\n".join(line for line in text.splitlines() if line.startswith("    "))


def _plain(command: str) -> str:
    """Without its comment; empty for a sentence that begins with the name of a program."""
    text = re.sub(r"\\\n *", "", re.sub(r"(^| ) *#.*$", "", command)).strip()
    return text if text.startswith(("moefx", "make")) or ".py" in text else ""


@dataclass(frozen=True)
class Block:
    where: str
    code: str

    @property
    def over_ranks(self) -> bool:
        return "parallelize(" in self.code or "init_process_group" in self.code

    def takes(self, name: str) -> bool:
        """Does it read a variable before it assigns it?"""
        uses = [n for n in ast.walk(ast.parse(self.code)) if isinstance(n, ast.Name) and n.id == name]
        uses.sort(key=lambda n: (n.lineno, isinstance(n.ctx, ast.Store)))  # of `model = f(model)` the right side comes first
        return bool(uses) and isinstance(uses[0].ctx, ast.Load)

    def with_optimizer(self, line: str) -> str:
        """``line`` goes after that which makes the model, else before all: parameters may be new objects after it."""
        lines = self.code.splitlines(keepends=True)
        made = next((i + 1 for i, text in enumerate(lines) if text.startswith("model = ")), 0)
        return "".join([*lines[:made], line, *lines[made:]])


def blocks() -> list[Block]:
    """The Python of pages whose blocks stand alone."""
    return [Block(f"{p}, block {i + 1}", c) for p in PAGES if p not in PROGRAMS for i, c in enumerate(code_of(p))]


def code_of(page: str) -> list[str]:
    return _BLOCK.findall((ROOT / page).read_text())


#: Put before a block: what its page takes for granted.
_BEFORE = """
import os, sys, torch, moefx
from moefx import passes
from transformers import AutoModelForCausalLM
folder, DEVICE, EP = sys.argv[1], sys.argv[2], int(os.environ.get("WORLD_SIZE", 1))
class Batches:
    def __iter__(self):
        g = torch.Generator().manual_seed(int(os.environ.get("RANK", 0)))
        for _ in range(STEPS):
            ids = torch.randint(0, 256, (1, 64), generator=g).to(next(model.parameters()).device)
            yield {"input_ids": ids, "labels": ids}
loader = batches = Batches()
dataset = [{"input_ids": torch.arange(64), "labels": torch.arange(64)}] * 8
"""
#: On a CPU: nothing is compiled, and gloo connects the ranks.
_ON_CPU = """
import functools
moefx.optimize = functools.partial(moefx.optimize, compile=False)
moefx.parallelize = functools.partial(moefx.parallelize, compile=False)
"""
#: What a block needs that begins in the middle.
_MODEL = """
if EP > 1 and not torch.distributed.is_initialized():
    torch.distributed.init_process_group("nccl")
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).train()
"""
_OPTIMIZED = """
model = moefx.parallelize(model, ep_size=EP) if EP > 1 else moefx.optimize(model)
"""
_OPTIMIZER = "optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])\n"
#: After it: it trains, whatever the block has left, once it is on the device.
_AFTER = """
if next(model.parameters()).device.type != DEVICE:
    model.to(DEVICE)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
if EP == 1 or torch.distributed.is_initialized():
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        moefx.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert bool(loss.isfinite())
assert next(model.parameters()).device.type == DEVICE and not moefx.report(model).fallbacks, moefx.report(model)
print("trained")
if torch.distributed.is_initialized():
    torch.distributed.destroy_process_group()
"""


def script(block: Block, ranks: int, device: str) -> str:
    """A block as a program of its own, over ``ranks``: ``program FOLDER DEVICE``, where FOLDER holds a small checkpoint."""
    before = _BEFORE.replace("STEPS", "6" if device == "cuda" else "2") + (_ON_CPU if device == "cpu" else "")
    code = block.with_optimizer(_OPTIMIZER) if block.takes("optimizer") else block.code
    if block.takes("model"):
        before += _MODEL if block.over_ranks or not re.search(r"model\(|verify\(", code) else _MODEL + "model.to(DEVICE)\n"
        before += "" if "moefx.optimize(" in code or "moefx.parallelize(" in code else _OPTIMIZED
    after = _AFTER if "optimizer = " in code else _OPTIMIZER + _AFTER
    code = before + code + after
    for written, here in (
        (r"from_pretrained\((?:\.\.\.|\"[\w-]+/[\w.-]+\")", "from_pretrained(folder"),
        (r"ep_size=8", f"ep_size={ranks}"),
        (r"device_map=\"cuda\"", "device_map=DEVICE"),
        *((('"nccl"', '"gloo"'), (r"torch\.cuda\.set_device\(.*", "")) if device == "cpu" else ()),
    ):
        code = re.sub(written, here, code)
    return code


def error_of(stderr: str) -> str:
    """What the ranks printed, without the launcher's own traceback, which says only that one of them ended."""
    launcher = r'^Traceback[^\n]*\n\s+File "(?:[^"\n]*/(?:torchrun|accelerate)|<frozen runpy>|[^"\n]*/runpy\.py)"'
    return re.split(launcher, stderr, maxsplit=1, flags=re.M)[0][-5000:]
