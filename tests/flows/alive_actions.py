"""The actions of alive.py: each a small function that writes the Python that a user would write.

``@action(name=choices, ...)`` registers one. Its arguments are drawn from the choices, simplest first: a failing walk is shrunk
towards the first. Choices may be a function of the family's :class:`Anatomy`. The code may use the names of alive_helpers.py, and
``model``, ``probing`` (keyword arguments of every probe), ``handles`` (of hooks), ``undo`` (an ExitStack, closed when the walk
ends: what changes more than the model), ``optimize`` and ``restore``, which do nothing to the untouched model.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tests.support.families import COMMON, FAMILIES, build

LORA = "r=2, lora_alpha=8"
#: Attributes that a forward reads -> other values.
VALUES: dict[str, tuple] = {
    "top_k": (1, 3), "norm_topk_prob": (False, True), "routed_scaling_factor": (0.5, 1.7), "topk_group": (1, 2), "jitter_noise": (0.1,),
    "scaling": (0.1, 0.5), "attention_dropout": (0.2, 0.0), "variance_epsilon": (0.1, 1e-6), "eps": (0.1, 1e-6), "alpha": (1.0,),
    "limit": (0.5,), "sliding_window": (3,), "attention_scaling": (0.7,), "is_causal": (False,), "attn_scale": (0.3,),
    "scalar_embed_scale": (2.0,), "scalar_root_size": (0.5,),
}  # fmt: skip
#: Entries of a configuration -> other values.
CONFIGURED: dict[str, tuple] = {
    "num_experts_per_tok": (1,), "norm_topk_prob": (False,), "router_aux_loss_coef": (0.5,), "rms_norm_eps": (0.1,),
    "attention_dropout": (0.2,), "use_cache": (False, True), "output_router_logits": (True, False), "sliding_window": (3,),
    "output_hidden_states": (True, False), "return_dict": (True,), "final_logit_softcapping": (5.0,),
}  # fmt: skip


@dataclass(frozen=True)
class Anatomy:
    """Where the parts of a family's model are."""

    family: str
    layers: tuple[str, ...]
    mlps: tuple[str, ...]
    experts: tuple[str, ...]
    routers: tuple[str, ...]
    attentions: tuple[str, ...]
    linears: tuple[str, ...]  #: of attention
    norms: tuple[str, ...]
    activations: tuple[str, ...]
    embedding: str
    parameters: tuple[str, ...]  #: of experts
    attributes: tuple[tuple[str, str, Any], ...]  #: (path, name, another value)
    configured: tuple[tuple[str, Any], ...]
    layer_classes: tuple[str, ...]
    classes: tuple[str, ...]  #: of the models and of what is inside layers
    functions: tuple[str, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        return (*self.layers, *self.mlps, *self.experts, *self.routers, *self.attentions, *self.linears, *self.norms)

    @property
    def everything(self) -> tuple[str, ...]:
        return (*self.parts, self.embedding, "lm_head", "model")

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of attention's linear layers."""
        return tuple(dict.fromkeys(p.rpartition(".")[2] for p in self.linears))


@functools.cache
def anatomy(family: str) -> Anatomy:
    model = build(family)
    modules = dict(model.named_modules())
    kinds = {p: type(m).__name__ for p, m in modules.items()}

    def ending(*names: str) -> tuple[str, ...]:
        return tuple(p for p, kind in kinds.items() if kind.endswith(names))

    layers = tuple(p for p in kinds if p.startswith("model.layers.") and p.count(".") == 2)
    experts, attentions = ending("Experts"), ending("Attention")
    around = tuple(p for e in experts if (p := e.rpartition(".")[0]) not in layers)
    code = importlib.import_module(type(model).__module__)
    named = {n for n in vars(code) if n in ("apply_rotary_pos_emb", "rotate_half", "apply_rotary_emb", "repeat_kv")}
    attributes = [(p, n, v) for p, m in modules.items() for n in vars(m) if n in VALUES and p for v in VALUES[n]]
    return Anatomy(
        family=family,
        layers=layers,
        mlps=(*around, *ending("MLP")),
        experts=experts,
        routers=ending("Router", "TopkRouter"),
        attentions=attentions,
        linears=tuple(p for p, m in modules.items() if isinstance(m, nn.Linear) and p.startswith(attentions)),
        norms=tuple(p for p, kind in kinds.items() if "Norm" in kind),
        activations=tuple(p for p in kinds if p.rpartition(".")[2] in ("act_fn", "activation_fn")),
        embedding=next(p for p, m in modules.items() if m is model.get_input_embeddings()),
        parameters=tuple(n for n, p in modules[experts[0]].named_parameters(recurse=False) if p.dim() == 3),
        attributes=tuple(a for a in attributes if getattr(modules[a[0]], a[1]) is not None),
        configured=tuple((n, v) for n, many in CONFIGURED.items() if hasattr(model.config, n) for v in many),
        layer_classes=tuple(dict.fromkeys(kinds[p] for p in layers)),
        classes=tuple(
            dict.fromkeys(kinds[p] for p in (*around, *experts, *attentions, *ending("Norm", "Router"), "", "model"))
        ),
        functions=tuple(sorted(named)),
    )


def sizes(family: str) -> dict[str, Any]:
    """The configuration of a family's model."""
    return {**COMMON, **FAMILIES[family]}


Choices = Sequence[Any] | Callable[[Anatomy], Sequence[Any]]


@dataclass(frozen=True)
class Action:
    name: str
    code: Callable[..., str]
    choices: Mapping[str, Choices]
    weight: float
    needs: str  #: what earlier actions must have given
    unless: str
    gives: str
    takes: str

    def values(self, of: Anatomy) -> dict[str, Sequence[Any]]:
        return {k: tuple(v(of)) if callable(v) else tuple(v) for k, v in self.choices.items()}


ACTIONS: dict[str, Action] = {}


def action(
    *, weight: float = 1.0, needs: str = "", unless: str = "", gives: str = "", takes: str = "", **choices: Choices
) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers an action; ``needs``, ``unless``, ``gives`` and ``takes`` name what stays: "adapter", "second", "steered"."""

    def register(code: Callable[..., str]) -> Callable[..., str]:
        ACTIONS[code.__name__] = Action(code.__name__, code, choices, weight, needs, unless, gives, takes)
        return code

    return register


FORMS = ("labels", "ignored", "padded left", "padded right", "packed")
PATH = "model.layers.0"


# --- steps and calls -------------------------------------------------------------------------------------------------


@action(
    weight=3,
    optimizer=("SGD", "AdamW"),
    foreach=(False, True),
    accumulate=(1, 2, 3),
    rows=(2, 1, 3),
    length=(9, 1, 17, 4),
    form=FORMS,
    clip=(False, True),
)
def train_step(optimizer: str, foreach: bool, accumulate: int, rows: int, length: int, form: str, clip: bool) -> str:
    eps = ", eps=1e-4" if optimizer == "AdamW" else ""  # above rounding: else a step is the sign of noise
    clipped = "norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)\nsee('norm', norm)\n" if clip else ""
    return f"""
optimizer = torch.optim.{optimizer}([p for p in model.parameters() if p.requires_grad], lr=1e-3, foreach={foreach}{eps})
optimizer.zero_grad()
for n in range({accumulate}):
    loss_of(model, batch({rows}, {length}, {form!r}, seed=n)).backward()
{clipped}optimizer.step()
optimizer.zero_grad()
"""


@action(
    mode=("torch.no_grad", "torch.inference_mode", "torch.enable_grad"),
    form=("no labels", *FORMS),
    rows=(2, 1),
    length=(9, 1, 5),
)
def forward(mode: str, form: str, rows: int, length: int) -> str:
    return f"""
torch.manual_seed(2)
with {mode}():
    see("logits", model(**batch({rows}, {length}, {form!r})).logits)
"""


@action(cache=(True, False), rows=(1, 2))
def generate(cache: bool, rows: int) -> str:
    return f"""
ids = batch({rows}, 5, "no labels")["input_ids"]
tokens = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, use_cache={cache}, pad_token_id=0)
see("tokens", tokens)
"""


@action(where=("", *FORMS[1:]), what=({}, {"logits": "before"}, {"logits": "after"}, {"output_router_logits": True}, {"output_hidden_states": True},
    {"output_attentions": True}, {"use_cache": True}, {"use_cache": False}, {"rows": 1}, {"rows": 1, "length": 1}, {"length": 17}), weight=2)  # fmt: skip
def probe_by(where: str, what: dict) -> str:
    given = {**({"form": where} if where else {}), **what}
    return f"\nprobing = {given!r}\n"


@action(on=(True, False))
def autocast(on: bool) -> str:
    return f"\nprobing = {{**probing, 'autocast': {on}}}\n"


CONTEXTS = ("saved_tensors_hooks(torch.clone, lambda t: t)", "set_detect_anomaly(True, False)")


@action(context=CONTEXTS)
def ambient_context(context: str) -> str:
    where = "torch.autograd" if "anomaly" in context else "torch.autograd.graph"
    return f"\nundo.enter_context({where}.{context})\n"


@action(call=("use_deterministic_algorithms(True)", "set_default_dtype(torch.float64)"))
def global_setting(call: str) -> str:
    before = "use_deterministic_algorithms, False" if "det" in call else "set_default_dtype, torch.float32"
    return f"\ntorch.{call}\nundo.callback(torch.{before})\n"


# --- modes and gradients ---------------------------------------------------------------------------------------------


@action(mode=("eval", "train"), weight=1.5)
def whole_mode(mode: str) -> str:
    return f"\nmodel.{mode}()\n"


@action(path=lambda a: (*a.layers, *a.mlps, *a.attentions, *a.experts), mode=("eval", "train"))
def part_mode(path: str, mode: str) -> str:
    return f"\nat(model, {path!r}).{mode}()\n"


@action(
    group=(
        "q_proj",
        "experts",
        "norm",
        "embed",
        "lm_head",
        "gate",
        "router",
        "layers.0.",
        "layers.1.",
        "lora_",
        "bias",
        "weight",
    ),
    on=(False, True),
)
def requires_grad(group: str, on: bool) -> str:
    return f"""
for name, p in model.named_parameters():
    if {group!r} in name:
        p.requires_grad_({on})
"""


@action(unless="patched_layers", gives="checkpointed", reentrant=(False, True))
def checkpointing(reentrant: bool) -> str:
    return f"\nbare(model).gradient_checkpointing_enable({{'use_reentrant': {reentrant}}})\nbare(model).enable_input_require_grads()\n"


@action()
def checkpointing_off() -> str:
    return "\nbare(model).gradient_checkpointing_disable()\n"


# --- adapters --------------------------------------------------------------------------------------------------------


def _targets(a: Anatomy) -> Sequence[str]:
    linear = f"target_modules={list(a.targets)}"
    experts = f"target_parameters={[f'experts.{n}' for n in a.parameters]}"
    router = f"target_parameters={[a.routers[0].rpartition('.')[2] + '.weight']}" if a.family != "gemma4_text" else linear
    first = f"target_modules=[{a.linears[0]!r}]"
    return (linear, first, experts, router, "target_modules='all-linear'", f"{linear}, {experts}")


PATTERNS = (
    "",
    "rank_pattern={'layers.0.*': 4}",
    "alpha_pattern={'layers.0.*': 32}",
    "lora_dropout=0.2",
    "use_rslora=True",
    "use_dora=True",
    "bias='all'",
)


@action(weight=3, unless="adapter", gives="adapter", targets=_targets, pattern=PATTERNS)
def lora(targets: str, pattern: str) -> str:
    return f"\nmodel = get_peft_model(model, LoraConfig({LORA}, {targets}, {pattern}))\nfill(model, 'default')\n"


@action(weight=1.5, needs="adapter", unless="second", gives="second", targets=_targets, pattern=PATTERNS)
def second_adapter(targets: str, pattern: str) -> str:
    return f"\nmodel.add_adapter('b', LoraConfig({LORA}, {targets}, {pattern}))\nfill(model, 'b')\n"


@action(weight=2, needs="second", names=("'b'", "'default'", "['default', 'b']"))
def set_adapter(names: str) -> str:
    on = "model.set_adapter" if names[0] != "[" else "model.base_model.set_adapter"
    return f"\n{on}({names})\n"


@action(weight=2, needs="adapter", first=(True, False), train=(False, True), cache=(False, True))
def reference_pass(first: bool, train: bool, cache: bool) -> str:
    reference = f"""with torch.no_grad(), model.disable_adapter():
    reference = model(**data{"" if cache else ", use_cache=False"}).logits.log_softmax(-1)
"""
    policy = "torch.manual_seed(1)\nlogits = model(**data).logits.log_softmax(-1)\n"
    update = """
    if p.grad is not None:
        p.data = p.data - 1e-2 * p.grad"""
    return f"""
data = batch(2, 9, "no labels")
model.zero_grad()
torch.manual_seed(1)
{reference + policy if first else policy + reference}loss = (logits.exp() * (logits - reference)).sum(-1).mean()
see("KL", loss)
loss.backward()
for name, p in sorted(model.named_parameters(), key=lambda found: found[0]):  # PEFT's parametrizations change their order
    see(f"gradient of {{name}}", p.grad if p.grad is not None else None){update if train else ""}
model.zero_grad()
"""


@action(
    needs="adapter",
    call=(
        "merge_adapter()",
        "unmerge_adapter()",
        "merge_adapter(['default'])",
        "base_model.disable_adapter_layers()",
        "base_model.enable_adapter_layers()",
    ),
    weight=2,
)
def merge(call: str) -> str:
    return f"\nmodel.{call}\n"


@action(needs="adapter", takes="adapter second", call=("merge_and_unload", "unload"), weight=0.7)
def unload(call: str) -> str:
    return f"\nmodel = model.{call}()\n"


@action(needs="second", takes="second", name=("b", "default"), weight=0.7)
def delete_adapter(name: str) -> str:
    return f"\nmodel.delete_adapter({name!r})\n"


@action(weight=1.5, needs="adapter", path=lambda a: (*a.linears, *a.experts), factor=(3.0, 0.0, 0.5), name=("default", "b"))
def lora_scaling(path: str, factor: float, name: str) -> str:
    return f"\nat(model, {path!r}).scaling[{name!r}] *= {factor}\n"


@action(needs="adapter", path=lambda a: (*a.linears, *a.experts), disable=(True, False))
def disable_one_layer(path: str, disable: bool) -> str:
    return f"\nat(model, {path!r}).enable_adapters({not disable})\n"


# --- hooks -----------------------------------------------------------------------------------------------------------

KINDS = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")


@action(weight=2.5, path=lambda a: a.everything, kind=KINDS, factor=(1, 0.5), gives="hook")
def hook(path: str, kind: str, factor: float) -> str:
    return f"\nhandles.append(at(model, {path!r}).register_{kind}(functools.partial(note, '{path.rpartition('.')[2]} {kind}', {factor})))\n"


@action(path=lambda a: (*a.layers, *a.mlps, *a.attentions), gives="hook")
def hook_with_kwargs(path: str) -> str:
    return f"""
def with_kwargs(module, args, kwargs, out):
    see("arguments", sorted(k for k, v in kwargs.items() if isinstance(v, torch.Tensor)))
    return scaled(out, 0.9)

handles.append(at(model, {path!r}).register_forward_hook(with_kwargs, with_kwargs=True))
"""


@action(weight=2, needs="hook", which=(-1, 0))
def remove_hook(which: int) -> str:
    return f"\nhandles.pop({which}).remove()\n"


@action(kind=("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"), weight=0.7)
def global_hook(kind: str) -> str:
    return f"\nundo.callback(nn.modules.module.register_module_{kind}(functools.partial(note, 'global', 1)).remove)\n"


@action(name=lambda a: ("q_proj.weight", "norm.weight", *a.parameters), weight=0.7, gives="hook")
def parameter_hook(name: str) -> str:
    return f"""
for name, p in model.named_parameters():
    if name.endswith({name!r}) and p.requires_grad:
        handles.append(p.register_hook(lambda g, name=name: (see(name, float(g.norm())), g * 0.5)[1]))
"""


# --- attributes ------------------------------------------------------------------------------------------------------


@action(weight=4, what=lambda a: a.attributes)
def attribute(what: tuple[str, str, Any]) -> str:
    path, name, value = what
    return f"\nat(model, {path!r}).{name} = {value!r}\n"


@action(weight=1.5, what=lambda a: a.configured)
def config_entry(what: tuple[str, Any]) -> str:
    name, value = what
    return f"\nbare(model).config.{name} = {value!r}\n"


HOLDERS = ("0.5", "[0.5]", "{'factor': 0.5}", "Extra(0.5)", "torch.tensor(0.5)")


@action(weight=2, path=lambda a: (*a.mlps, *a.layers, *a.attentions, *a.norms), holder=HOLDERS, gives="steered")
def steer(path: str, holder: str) -> str:
    return f"\nat(model, {path!r})._factor = {holder}\nat(model, {path!r}).forward = types.MethodType(steered, at(model, {path!r}))\n"


@action(weight=3, needs="steered", value=(2.0, 0.0))
def steer_again(value: float) -> str:
    return f"""
for m in model.modules():
    found = vars(m).get("_factor")
    if isinstance(found, (list, dict)):
        found[0 if isinstance(found, list) else "factor"] = {value}
    elif isinstance(found, Extra):
        found.factor = {value}
    elif isinstance(found, torch.Tensor):
        found.fill_({value})
    elif found is not None:
        m._factor = {value}
"""


@action(
    weight=2,
    path=lambda a: (*a.layers, *a.mlps, *a.attentions, *a.experts, *a.linears, *a.norms, "lm_head", "model"),
    gives="patched",
)
def patch_forward(path: str) -> str:
    return f"\nwith_forward(at(model, {path!r}), 0.7)\n"


@action(needs="patched")
def unpatch_forward() -> str:
    return """
for m in model.modules():
    vars(m).pop("forward", None)
"""


@action(name=lambda a: a.classes, weight=1.5)
def patch_class(name: str) -> str:
    return f"""
cls = modeling(model).{name}
undo.enter_context(mock.patch.object(cls, "forward", scaled_forward(cls.forward, 0.7)))
"""


# Transformers recomputes no layer whose class is patched so (``is_outermost`` of GradientCheckpointingLayer); moefx does
@action(name=lambda a: a.layer_classes, unless="checkpointed", gives="patched_layers")
def patch_layer_class(name: str) -> str:
    return patch_class(name)


@action(name=lambda a: a.functions, weight=1.0)
def patch_function(name: str) -> str:
    return f"""
plain = modeling(model).{name}
undo.enter_context(mock.patch.object(modeling(model), {name!r}, lambda *a, plain=plain, **k: scaled(plain(*a, **k), 0.7)))
"""


@action()
def undo_all() -> str:
    return "\nundo.close()\n"


# --- other modules, weights, dtypes ----------------------------------------------------------------------------------


@action(
    weight=2,
    path=lambda a: (*a.norms, *a.mlps, *a.linears, *a.activations, "lm_head", a.embedding),
    by=("copy.deepcopy({old})", "Wrapped({old}, 0.5)", "First()"),
)
def replace_module(path: str, by: str) -> str:
    new = by.format(old="old")
    return f"""
old = at(model, {path!r})
new = {new}
with torch.no_grad():
    for p in new.parameters():
        p.mul_(1.5)
bare(model).set_submodule({path!r}, new)
"""


@action(path=lambda a: a.activations, by=("ReLU", "GELU", "SiLU"))
def replace_activation(path: str, by: str) -> str:
    return f"\nbare(model).set_submodule({path!r}, nn.{by}())\n"


@action(weight=0.7)
def swap_layers() -> str:
    return "\nlayers = bare(model).model.layers\nlayers[0], layers[1] = layers[1], layers[0]\n"


@action(
    group=("q_proj", "experts", "norm", "embed", "lm_head", "layers.0."),
    how=("p.mul_(1.2)", "p.data = p.data * 1.2", "p.copy_(p.flip(0))"),
    weight=2,
)
def write_weights(group: str, how: str) -> str:
    return f"""
with torch.no_grad():
    for name, p in model.named_parameters():
        if {group!r} in name:
            {how}
"""


@action(path=lambda a: (*a.linears, *a.norms, "lm_head"))
def new_parameter(path: str) -> str:
    return f"\nold = at(model, {path!r})\nold.weight = nn.Parameter(old.weight.detach() * 1.2)\n"


@action(assign=(False, True))
def load_state_dict(assign: bool) -> str:
    return f"""
model.load_state_dict({{n: t * 1.05 if t.is_floating_point() else t for n, t in model.state_dict().items()}}, assign={assign})
"""


@action(tokens=(300, 256))
def resize_embeddings(tokens: int) -> str:
    return f"\ntorch.manual_seed(5)\nbare(model).resize_token_embeddings({tokens}, mean_resizing=False)\n"


@action(tie=(True, False))
def tie(tie: bool) -> str:
    embedding = "bare(model).get_input_embeddings().weight"
    return f"\nbare(model).get_output_embeddings().weight = {embedding if tie else f'nn.Parameter({embedding}.detach().clone())'}\n"


@action(what=("swap", "repeat", "copy", "delete"), weight=0.7)
def layers(what: str) -> str:
    return f"\nedit_layers(bare(model), {what!r})\n"


@action(dtype=("bfloat16", "float64", "float32"), weight=1.5)
def to_dtype(dtype: str) -> str:
    looped = "bare(model).set_experts_implementation('eager')\n" if dtype == "float64" else ""  # grouped_mm has no float64
    return f"\n{looped}model.to(torch.{dtype})\n"


@action(
    dtype=("bfloat16", "float64", "float32"), path=lambda a: (*a.mlps, *a.norms, *a.routers, "lm_head", a.embedding), weight=0.7
)
def part_to_dtype(dtype: str, path: str) -> str:
    return f"\nat(model, {path!r}).to(torch.{dtype})\n"


@action(path=lambda a: (*a.linears, "lm_head"), weight=1, gives="parametrized")
def parametrization(path: str) -> str:
    return f"\nparametrize.register_parametrization(at(model, {path!r}), 'weight', Scaled(0.7))\n"


@action(needs="parametrized")
def remove_parametrizations() -> str:
    return """
for m in list(model.modules()):
    if parametrize.is_parametrized(m, "weight"):
        parametrize.remove_parametrizations(m, "weight")
"""


@action(name=("eager", "sdpa"))
def attention_implementation(name: str) -> str:
    return f"\nbare(model).set_attn_implementation({name!r})\n"


@action(name=("eager", "grouped_mm", "batched_mm"))
def experts_implementation(name: str) -> str:
    return f"\nbare(model).set_experts_implementation({name!r})\n"


# --- copies, files, moefx --------------------------------------------------------------------------------------------


@action(weight=1.5)
def deepcopy() -> str:
    return "\nmodel = copy.deepcopy(model)\n"


@action(needs="optimized", torch_save=(False, True))
def pickled(torch_save: bool) -> str:
    kept = (
        """file = io.BytesIO()
torch.save(model, file)
file.seek(0)
found = torch.load(file, weights_only=False)"""
        if torch_save
        else "found = pickle.loads(pickle.dumps(model))"
    )
    return f"\n{kept}\nmodel = optimize(found)\n"


@action(needs="optimized", unless="adapter")
def saved() -> str:
    return """
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    found = type(model).from_pretrained(folder).train()
model = optimize(found)
"""


@action(weight=1.5, needs="optimized")
def restored() -> str:
    return "\nmodel = optimize(restore(model))\n"


@action(weight=0)
def optimized() -> str:
    return "\nmodel = optimize(model)\n"
