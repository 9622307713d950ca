"""Operations on parameters of several meshes that ``torch.optim``, gradient clipping and ``GradScaler`` call and DTensor lacks.

Under expert parallelism a model's parameters are plain tensors and DTensors, or DTensors of several meshes. DTensor refuses
operations on lists of both, has no rule for some that optimizers call, and converts a partial scalar (``float(norm)``) to this
rank's summand. :func:`install` registers custom handlers of DTensor for these. What DTensor supports is left to it: a list of
DTensors of one mesh, for example.

This depends on how DTensor dispatches, so :func:`install` tries the handlers on known cases first. Seen in torch 2.11 and 2.13.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.optim.optimizer import register_optimizer_step_pre_hook

from moefx.errors import MoefxError
from moefx.integrations import fsdp
from moefx.internals.torch_patches import Handler, dtensors_own_handlers, extend_dtensor

aten = torch.ops.aten

#: Elementwise operations on lists: applied to each rank's parts of tensors they give the parts of the results.
ELEMENTWISE = (
    "abs", "add", "addcdiv", "addcmul", "clamp_max", "clamp_min", "copy", "div", "exp", "lerp", "log", "maximum", "minimum",
    "mul", "neg", "pow", "reciprocal", "rsqrt", "sign", "sqrt", "sub", "zero",
)  # fmt: skip
FUSED = ("adam", "adamw", "sgd", "adagrad")

_works: bool | None = None  #: None: not tried yet


def install(mesh: DeviceMesh) -> None:
    """Registers the handlers, once per process, and tries them; all ranks of ``mesh`` call it.

    If they do not work (another version of torch), they are removed again, with a warning that names alternatives.
    """
    global _works
    if _works is not None:
        return
    undo = None
    try:
        undo = extend_dtensor(_handlers(), _set_data)
        with torch.no_grad():
            _try(mesh)
        register_optimizer_step_pre_hook(_no_lbfgs)
        _works = True
    except Exception as error:
        _works = False
        if undo is not None:
            undo()
        warnings.warn(
            f"torch {torch.__version__} does not dispatch DTensors as moefx expects ({type(error).__name__}: {error}): "
            "create optimizers with foreach=False and fused=False, clip by moefx.clip_grad_norm_, and do not use GradScaler or "
            "optimizers that read norms, such as Adafactor",
            stacklevel=2,
        )


def _handlers() -> dict[Any, Handler]:
    lists = [f"_foreach_{n}{end}" for n in ELEMENTWISE for end in ("", "_")] + [f"_fused_{n}_" for n in FUSED]
    found: dict[Any, Handler] = {}
    for name in lists:
        packet = getattr(aten, name, None)
        for overload in packet.overloads() if packet is not None else ():
            if not overload.endswith("out"):
                found[getattr(packet, overload)] = _elementwise
    found[aten._foreach_norm.Scalar] = _norms
    found[aten.stack.default] = found[aten.cat.default] = _join
    found[aten._amp_foreach_non_finite_check_and_unscale_.default] = _unscale
    found[aten._local_scalar_dense.default] = _number
    found[aten.pow_.Scalar] = _power
    found[aten.index_put_.default] = _masked
    return found


def _by_dtensor(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    with dtensors_own_handlers():
        return op(*args, **kwargs)


# --- lists -----------------------------------------------------------------------------------------------------------


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and any(isinstance(t, Tensor) for t in value)


def _of_one_mesh(lists: Sequence[Sequence[Any]]) -> bool:
    """Lists that DTensor supports: of DTensors of one mesh, or of plain scalars (a step count for each parameter)."""
    meshes = {t.device_mesh for ts in lists for t in ts if isinstance(t, DTensor)}
    spread = [any(isinstance(t, DTensor) for t in ts) for ts in lists]
    return len(meshes) == 1 and all(
        all(isinstance(t, DTensor) for t in ts) if any_spread else all(t.dim() == 0 for t in ts)
        for ts, any_spread in zip(lists, spread, strict=True)
    )


def _elementwise(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """One call with this rank's parts of all tensors; results are the parts of those of whole tensors."""
    lists = [a for a in args if _is_list(a)]
    if _of_one_mesh(lists):
        try:
            return _by_dtensor(op, args, kwargs)
        except NotImplementedError:  # DTensor has no rule
            pass
        except RuntimeError:  # no rule that writes to a partial tensor
            if not any(_is_partial(t) for ts in lists for t in ts):
                raise
    many = len(lists[0])
    if any(len(ts) != many for ts in lists):
        raise MoefxError(f"{op} got lists of {' and '.join(str(len(ts)) for ts in lists)} tensors: pass lists of equal length")
    written = [a.alias_info is not None and a.alias_info.is_write for a in op._schema.arguments]
    changes = [w for a, w in zip(args, written, strict=False) if _is_list(a)]
    local, like = [[*ts] for ts in lists], []
    for i in range(many):
        like.append(_to_local([ts[i] for ts in lists], changes, op, local, i))
    parts = iter(local)
    out = op(
        *(next(parts) if _is_list(a) else _whole(a) for a in args), **{name: _whole(value) for name, value in kwargs.items()}
    )
    if not isinstance(out, (list, tuple)):
        return out
    return [t if as_this is None else _spread_as(t, as_this) for t, as_this in zip(out, like, strict=True)]


def _to_local(tensors: list[Any], changes: list[bool], op: Any, local: list[list[Any]], i: int) -> DTensor | None:
    """Puts this rank's parts of the ``i``-th tensors into ``local``; returns the tensor whose placements a result has."""
    order = sorted(range(len(tensors)), key=lambda k: not changes[k])  # what is written is not redistributed, the others are
    like = next((tensors[k] for k in order if isinstance(tensors[k], DTensor)), None)
    if like is None:
        return None
    _reduce_partial(like)
    for k, t in enumerate(tensors):
        if isinstance(t, DTensor):
            placements = _placements_beside(t, like)
            if placements is None:
                raise MoefxError(
                    f"{op} got DTensors of different shapes or meshes: {tuple(t.shape)} on {t.device_mesh} and "
                    f"{tuple(like.shape)} on {like.device_mesh}; pass gradients and states of the same parameters"
                )
            if t.placements != placements:
                if changes[k]:
                    raise MoefxError(
                        f"{op} writes to tensors with placements {t.placements} and {like.placements}: use the same for both"
                    )
                t = t.redistribute(placements=placements)
            local[k][i] = t._local_tensor
        elif t.dim() > 0 or (k == 0 and changes[k]):
            raise MoefxError(
                f"{op} got a plain tensor of shape {tuple(t.shape)} for a DTensor of shape {tuple(like.shape)}: a plain "
                "tensor may differ between ranks; make it a DTensor (torch.distributed.tensor.distribute_tensor)"
            )
    return like


def _placements_beside(t: DTensor, like: DTensor) -> tuple[Placement, ...] | None:
    """Placements of ``t`` that match those of ``like``, to whose shape it may be broadcast; None if there are none."""
    if t.device_mesh != like.device_mesh:
        return None
    if t.shape == like.shape:
        return like.placements
    if t.dim() != like.dim() or any(n not in (1, m) for n, m in zip(t.shape, like.shape, strict=True)):
        return None
    if not all(isinstance(p, (Shard, Replicate)) for p in like.placements):
        return None
    return tuple(Replicate() if isinstance(p, Shard) and t.shape[p.dim] == 1 else p for p in like.placements)


def _spread_as(local: Tensor, like: DTensor) -> DTensor:
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())


def _reduce_partial(tensor: DTensor) -> None:
    """All-reduces a partial tensor in place: only sums may be squared, or compared with a bound."""
    if _is_partial(tensor):
        done = tensor.redistribute(placements=[Replicate() if p.is_partial() else p for p in tensor.placements])
        tensor._local_tensor, tensor._spec = done._local_tensor, done._spec


def _whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _is_partial(t: Any) -> bool:
    return isinstance(t, DTensor) and any(p.is_partial() for p in t.placements)


def _by_mesh(tensors: Sequence[Tensor]) -> dict[DeviceMesh | None, list[int]]:
    found: dict[DeviceMesh | None, list[int]] = {}
    for i, t in enumerate(tensors):
        found.setdefault(t.device_mesh if isinstance(t, DTensor) else None, []).append(i)
    return found


# --- numbers over all ranks ------------------------------------------------------------------------------------------


def _norms(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """The norms of whole tensors, as plain tensors: one reduction per mesh."""
    tensors, groups = args[0], _by_mesh(args[0])
    if len(groups) == 1:
        return _by_dtensor(op, args, kwargs)
    norms: list[Any] = [None] * len(tensors)
    for places in groups.values():
        found = op([tensors[i] for i in places], *args[1:], **kwargs)
        for i, norm in zip(places, _wholes(found), strict=True):
            norms[i] = norm
    return norms


def _wholes(numbers: Sequence[Tensor]) -> Sequence[Tensor]:
    """Scalars of one mesh, or plain ones, as plain scalars."""
    if not isinstance(numbers[0], DTensor) or len({t.dtype for t in numbers}) > 1:
        return [_whole(t) for t in numbers]
    return torch.stack(list(numbers)).full_tensor().unbind()  # type: ignore[attr-defined]


def _join(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """stack, cat: tensors of several meshes are gathered and joined as plain tensors."""
    tensors, groups = args[0], _by_mesh(args[0])
    if len(groups) == 1:
        return _by_dtensor(op, args, kwargs)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise MoefxError(
            f"{op} gathers parameters of several meshes and is not differentiable there: call it within torch.no_grad()"
        )
    whole: list[Any] = [None] * len(tensors)
    for places in groups.values():
        found = [tensors[i] for i in places]
        for i, t in zip(places, _wholes(found) if all(t.dim() == 0 for t in found) else map(_whole, found), strict=True):
            whole[i] = t
    return op(whole, *args[1:], **kwargs)


def _unscale(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """GradScaler's check: if a gradient is infinite on one rank, all must skip the step, or their parameters would differ."""
    gradients, found_inf, scale = args
    groups = _by_mesh(gradients)
    if len(groups) == 1:
        return _by_dtensor(op, args, kwargs)
    if any(map(_is_partial, gradients)):
        raise MoefxError(f"{op} got partial gradients: redistribute them first")
    op([t._local_tensor if isinstance(t, DTensor) else t for t in gradients], found_inf, scale)
    for mesh in groups:
        for dim in range(mesh.ndim if mesh is not None else 0):
            dist.all_reduce(found_inf, dist.ReduceOp.MAX, group=mesh.get_group(dim))  # type: ignore[union-attr]
    return None


def _number(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``.item()`` and ``float()`` of the whole tensor; DTensor itself would not reduce a partial one."""
    with torch.no_grad():
        return op(args[0].full_tensor())


def _no_lbfgs(optimizer: Any, args: Any, kwargs: Any) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if isinstance(optimizer, torch.optim.LBFGS) and any(isinstance(p, DTensor) for p in parameters):
        raise MoefxError(
            "LBFGS decides by the loss of this rank alone, so ranks that share parameters would stop at different points: use "
            "another optimizer, or train in one process"
        )


# --- single tensors, in Adafactor and Rprop ----------------------------------------------------------------


def _power(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    _reduce_partial(args[0])
    return _by_dtensor(op, args, kwargs)


def _masked(op: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``x[mask] = number`` for a mask with the placements of x: each rank assigns to its part."""
    x, indices, number, *rest = args
    (mask, *more) = indices
    fits = isinstance(x, DTensor) and isinstance(mask, DTensor) and mask.dtype == torch.bool and not more
    if not fits or isinstance(number, DTensor) or number.dim() > 0 or mask.shape != x.shape or (rest and rest[0]):
        return _by_dtensor(op, args, kwargs)
    if mask.device_mesh != x.device_mesh or mask.placements != x.placements or _is_partial(x):
        return _by_dtensor(op, args, kwargs)
    op(x._local_tensor, [mask._local_tensor], number)
    return x


def _set_data(tensor: DTensor, value: Any) -> None:
    """``p.data = value``, as weight averaging and ``vector_to_parameters`` do, which DTensor accepts and ignores.

    The value is written into the memory of the parameter, which FSDP reads.
    """
    if not isinstance(value, Tensor) or value.shape != tensor.shape or value.dtype != tensor.dtype or _is_partial(tensor):
        raise MoefxError(
            f".data of a parameter of shape {tuple(tensor.shape)} and {tensor.dtype}, sharded as {tensor.placements}, cannot "
            f"become {_described(value)}: convert the model before it is sharded"
        )
    with torch.no_grad():
        if isinstance(value, DTensor) and value.device_mesh == tensor.device_mesh:
            tensor._local_tensor.copy_(value.redistribute(placements=tensor.placements)._local_tensor)
        else:
            fsdp.fill(tensor, _whole(value))


def _described(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)} and {value.dtype}" if isinstance(value, Tensor) else repr(value)


# --- do the handlers work? ---------------------------------------------------------------------------------------------------


def _try(mesh: DeviceMesh) -> None:
    """One case of each handler, on this rank, but for one scalar that all ranks of ``mesh`` sum."""
    device, everywhere = mesh.device_type, [Replicate()] * mesh.ndim

    def plain(value: Any) -> Tensor:
        return torch.tensor(value, device=device)

    def spread(value: Any, first: Placement = Shard(0)) -> DTensor:  # noqa: B008
        return DTensor.from_local(plain(value), mesh, [first, *everywhere[1:]], run_check=False)

    mixed = torch._foreach_add([plain([1.0]), spread([1.0, 4.0])], 1.0)
    torch._foreach_sqrt_(mixed[1:])
    torch._foreach_mul_([plain([1.0]), mixed[1]], [plain(0.0), plain(2.0)])
    local = [t.to_local() if isinstance(t, DTensor) else t for t in mixed]
    _expect("a list of a plain tensor and a DTensor", torch.cat(local), plain([2.0, 2 * 2**0.5, 2 * 5**0.5]))
    if not isinstance(mixed[1], DTensor) or mixed[1].placements[0] != Shard(0):
        raise AssertionError("the results of a list do not have its placements")
    summed = spread(1.0, Partial())
    _expect("a sum over ranks as a number", plain(float(summed)), summed.full_tensor())
    x = spread([-1.0, 3.0])
    x[x.lt(0)] = 0
    _expect("a masked assignment", x.to_local(), plain([0.0, 3.0]))
    x.data = DTensor.from_local(plain([2.0, 5.0]), mesh, x.placements, run_check=False)
    _expect("a new value of .data", x.to_local(), plain([2.0, 5.0]))
    norms = torch._foreach_norm([plain([3.0, 4.0]), spread([5.0, 0.0], Replicate())])
    _expect("norms of a list", torch.stack(list(norms)), plain([5.0, 5.0]))
    infinite, gradient = plain(0.0), plain([float("inf")])
    torch._amp_foreach_non_finite_check_and_unscale_([gradient, spread([1.0])], infinite, plain(1.0))
    _expect("gradients that are not finite", infinite, plain(1.0))


def _expect(what: str, found: Tensor, wanted: Tensor) -> None:
    if not torch.allclose(found, wanted):
        raise AssertionError(f"{what} gives {found.tolist()} instead of {wanted.tolist()}")
