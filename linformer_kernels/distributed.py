"""Modules over several devices: some of the heads on each, or a part of the sequence, or a part of the weights.

The functions and the operators take DTensors by themselves (`_sharding`); here is what modules need beyond that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard as _fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from ._sharding import chunks, whole
from .encoders import LinformerEncoderLayer
from .modules import LinformerAttention
from .projections import LinformerProjection

PLANS = ("heads", "sequence")
_SPREAD = "_is_spread"  # of what `parallelize` has seen: not everything has DTensors to tell it by


def parallelize(module: nn.Module, mesh: DeviceMesh, plan: str) -> nn.Module:
    """Spread all Linformer attention in a module over the devices of a mesh, by torch's own `parallelize_module`.

    Inputs and outputs are plain tensors, and gradients of parameters are complete on each process: nobody has to add
    them up, and no DDP is wanted over the same dimension of the mesh.

    Args:
        module: a LinformerAttention, LinformerEncoderLayer or LinformerEncoder, or any module with some of them.
        mesh: of one dimension; one of a mesh of several is mesh["name"].
        plan:
            "heads": each process has some of the heads, and of the hidden units of the feed-forward networks of
                LinformerEncoderLayer. All get the same input and return the same output; gradients are those of one.
            "sequence": each process gets and returns its part of the sequence, in order, and has the columns of E and F
                for it, as DTensors. Two all-reduces of K' and V' a call forward and two backward are all that
                attention sends, whatever the length. Each sequence has `seq_len` positions in all, padded on the right;
                with a mask wanted: projections with from_first=False. "adaptive" has no columns, takes any length and
                any mask, and sends a number for each position and head besides. Gradients are those of the sum of the
                losses of all processes.

    Returns:
        The module, changed in place.

    Raises:
        ValueError: unknown plan, a mesh of several dimensions, a module without Linformer attention or that is spread
            already, heads that the devices do not divide.
        NotImplementedError: an E for each head with "heads"; with "sequence" projections of windows ("mean", "max",
            "conv") and length_norm.
        And, when it is called with "sequence", ValueError for a part of the sequence of another length than this
        process's columns, or for parts that torch.chunk would not make, and NotImplementedError for nested tensors and
        masks that the projection cannot take.
    """
    if plan not in PLANS:
        raise ValueError(f"plan is {plan!r}; wanted: one of {', '.join(PLANS)}")
    for name, given, kind in (("module", module, nn.Module), ("mesh", mesh, DeviceMesh)):
        if not isinstance(given, kind):
            wanted = "torch.nn.Module" if kind is nn.Module else "DeviceMesh, as init_device_mesh makes it"
            raise TypeError(f"{name} is a {type(given).__name__}; wanted: a {wanted}")
    if mesh.ndim != 1:
        raise ValueError(
            f'mesh has {mesh.ndim} dimensions; wanted: one, as mesh["name"] gives it, for mesh_dim_names with that name'
        )
    attentions = {name: part for name, part in module.named_modules() if isinstance(part, LinformerAttention)}
    projections = {name: part for name, part in module.named_modules() if isinstance(part, LinformerProjection)}
    if not attentions:
        raise ValueError(f"module is a {type(module).__name__} without a LinformerAttention; wanted: one with some")
    for name, part in (attentions | projections).items():
        of_several = any(isinstance(tensor, DTensor) for tensor in (*part.parameters(), *part.buffers()))
        if of_several or hasattr(part, _SPREAD):
            raise ValueError(f"{name or 'module'} is on several devices already; wanted: a module that is not")
    styles: dict[str, ParallelStyle] = {}
    if plan == "heads":
        for name, attention in attentions.items():
            _check_heads(name, attention, mesh.size())
            for linear in ("q_proj", "k_proj", "v_proj"):
                styles[_join(name, linear)] = ColwiseParallel()
            styles[_join(name, "out_proj")] = RowwiseParallel()
        for name, layer in module.named_modules():
            if isinstance(layer, LinformerEncoderLayer):
                styles[_join(name, "linear1")], styles[_join(name, "linear2")] = ColwiseParallel(), RowwiseParallel()
        for name, projection in projections.items():
            if projection.num_heads is not None:
                raise NotImplementedError(
                    f'{name} has an E for each of {projection.num_heads} heads; wanted with plan="heads": one for all'
                )
            _add_up(projection.parameters(), mesh)
    else:
        for name, projection in projections.items():
            _check_sequence(name, projection)
            styles[name] = ProjectionOfParts()
        apart = {id(parameter) for projection in projections.values() for parameter in projection.parameters()}
        _add_up((parameter for parameter in module.parameters() if id(parameter) not in apart), mesh)
    spread = parallelize_module(module, mesh, styles)
    for one in (*attentions.values(), *projections.values()):
        setattr(one, _SPREAD, True)
    return spread


class ProjectionOfParts(ParallelStyle):
    """A style for `parallelize_module`: a LinformerProjection of whose sequences each device has a part.

    E and F become DTensors, sharded over their columns. It is called with this device's rows of key, value and query
    and its part of the mask, all plain tensors, and so is what it returns.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, LinformerProjection):
            raise TypeError(f"ProjectionOfParts came for a {type(module).__name__}; wanted: a LinformerProjection")
        for name in ("proj_key", "proj_value"):
            matrix = getattr(module, name)
            if matrix is None:
                continue
            spread = distribute_tensor(matrix.detach(), device_mesh, [Shard(matrix.dim() - 1)])
            trained = isinstance(matrix, nn.Parameter)
            setattr(module, name, nn.Parameter(spread, matrix.requires_grad) if trained else spread)

        def enter(
            _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
        ) -> tuple[tuple[()], dict[str, Any]]:
            given = dict(zip(("key", "value", "key_padding_mask"), arguments, strict=False)) | options
            return (), _spread(module, given, device_mesh)

        def leave(_: nn.Module, __: Any, result: Any) -> Any:
            return tuple(whole(one).to_local() for one in result) if isinstance(result, tuple) else result.to_local()

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
        return module


def fully_shard(module: nn.Module, **options: Any) -> nn.Module:
    """torch's `fully_shard` (FSDP2) for a model with Linformer attention, in one call.

    Projections that several layers have in common come first, then layers, then the model: a matrix that was sharded
    with one of its layers would not be there for the others.

    Args:
        module: the model.
        options: of torch.distributed.fsdp.fully_shard, as mesh.

    Returns:
        The module, changed in place.
    """
    owners: dict[LinformerProjection, int] = {}
    for attention in module.modules():
        if isinstance(attention, LinformerAttention) and attention.projection is not None:
            owners[attention.projection] = owners.get(attention.projection, 0) + 1
    for projection, number in owners.items():
        if number > 1:
            _fully_shard(projection, **options)
    for layer in module.modules():
        if isinstance(layer, LinformerEncoderLayer) and layer is not module:
            _fully_shard(layer, **options)
    return _fully_shard(module, **options)  # type: ignore[return-value]


def _join(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child


def _add_up(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Of parameters that every process has whole: the sum of what the processes contribute to the gradient."""

    def total(grad: Tensor) -> Tensor:
        grad = grad.clone()
        all_reduce(grad, group=mesh.get_group())
        return grad

    for parameter in parameters:
        if parameter.is_floating_point():
            trained = parameter.requires_grad  # or is later
            parameter.requires_grad_(True).register_hook(total)
            parameter.requires_grad_(trained)


def _check_heads(name: str, attention: LinformerAttention, devices: int) -> None:
    for what, number in (("num_heads", attention.num_heads), ("num_kv_heads", attention.num_kv_heads)):
        if number % devices:
            raise ValueError(
                f'{name or "module"} has {what} = {number} and the mesh {devices} devices; wanted with plan="heads": a '
                "number of devices that divides them"
            )


def _check_sequence(name: str, projection: LinformerProjection) -> None:
    kind = f"length_norm={projection.length_norm}" if projection.length_norm else f'kind "{projection.kind}"'
    if projection.length_norm or projection.kind not in ("learned", "fixed", "adaptive"):
        raise NotImplementedError(
            f'{name or "module"} has {kind}; wanted with plan="sequence": "learned" or "fixed" without length_norm, or '
            '"adaptive"'
        )


def _spread(projection: LinformerProjection, given: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """The arguments of a projection's call as DTensors."""
    if given.get("cu_seqlens_k") is not None or given["key"].dim() != 4:
        raise NotImplementedError(
            'key is packed or nested; wanted with plan="sequence": padded sequences, of which each process has a part'
        )
    mask, here = given.get("key_padding_mask"), given["key"].size(2)
    if projection.kind == "adaptive":
        length, length_q = _lengths([here, given["query"].size(2) if given.get("query") is not None else here], mesh)
        return _parts(given, length, length_q, mesh)
    if mask is not None and (projection.from_first or projection.rows_are_windows):
        raise NotImplementedError(
            "key_padding_mask came, and the projection has from_first=True or rows of windows; wanted with "
            'plan="sequence": from_first=False, init="gaussian" and padding on the right, as no process sees where the '
            "sequence begins on another"
        )
    matrix = projection.proj_key
    assert isinstance(matrix, DTensor)
    columns, length = matrix.to_local().size(-1), matrix.size(-1)
    if here != columns:
        raise ValueError(
            f"key has {here} rows on this process, whose columns of E are {columns} of {length}; wanted: "
            f"as many. To fix it: pad all sequences to {length} positions, with key_padding_mask, and give each "
            "process the positions of its columns, as torch.chunk(sequence, processes) divides them"
        )
    return _parts(given, length, None, mesh)


def _lengths(here: list[int], mesh: DeviceMesh) -> list[int]:
    """Of sequences of which this process has so many positions."""
    parts = DTensor.from_local(torch.tensor([here], device=mesh.device_type), mesh, [Shard(0)], run_check=False)
    lengths: list[list[int]] = parts.full_tensor().T.tolist()
    for of_one in lengths:
        if of_one != chunks(sum(of_one), [len(of_one)]):
            raise ValueError(
                f"the processes have {', '.join(map(str, of_one))} positions of a sequence; wanted: its parts as "
                f"torch.chunk(sequence, {len(of_one)}) makes them, as many positions on each, but for the last"
            )
    return [sum(of_one) for of_one in lengths]


def _parts(given: dict[str, Any], length: int, length_q: int | None, mesh: DeviceMesh) -> dict[str, Any]:
    """Arguments as parts of a sequence, and queries as those of one of which the length is known or does not count."""
    spread = dict(given)
    for name, dim in (("key", 2), ("value", 2), ("key_padding_mask", 1)):
        if given.get(name) is not None:
            spread[name] = _part(given[name], dim, length, mesh)
    query = given.get("query")
    if query is not None and length_q is not None:
        spread["query"] = _part(query, 2, length_q, mesh)
    elif query is not None:
        spread["query"] = DTensor.from_local(query, mesh, [Shard(2)], run_check=False)
    return spread


def _part(tensor: Tensor, dim: int, length: int, mesh: DeviceMesh) -> DTensor:
    """A part of a tensor of `length` there, which the parts need not divide evenly."""
    shape = torch.Size((*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]))
    order = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    stride, size = [0] * tensor.dim(), 1
    for i in reversed(order):
        stride[i], size = size, size * shape[i]
    options: Any = {"shape": shape, "stride": tuple(stride), "run_check": False}
    return DTensor.from_local(tensor, mesh, [Shard(dim)], **options)
