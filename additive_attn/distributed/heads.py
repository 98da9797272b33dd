"""Heads sharded over the processes of a DeviceMesh (tensor parallel)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from additive_attn.distributed.exchange import checked_group
from additive_attn.nn.multihead import MultiheadAdditiveAttention

# The features of q_proj_weight and the like, and the inputs of out_proj, are those of the heads
# side by side. in_proj_weight stacks three of them, so every process has it whole.
_SHARDED = {
    "energy_weight": Shard(0), "q_proj_weight": Shard(0), "k_proj_weight": Shard(0),
    "v_proj_weight": Shard(0), "out_proj.weight": Shard(1),
}  # fmt: skip


class HeadParallel(ParallelStyle):
    """A style of :func:`torch.distributed.tensor.parallel.parallelize_module` that shards the
    heads of a :class:`MultiheadAdditiveAttention`: each process attends with its own, and the
    outputs of ``out_proj`` are added up.

    ``energy_weight``, ``out_proj.weight`` and, with kdim or vdim, the projections become DTensors
    sharded by heads; other parameters are replicated. ``forward`` takes and returns tensors of
    this process, equal on all; ``project`` and ``step`` take and return DTensors. Dropout gathers
    the heads, since weights are dropped by their position among all.

    Raises:
        TypeError: the module is not a MultiheadAdditiveAttention.
        ValueError: num_heads is not a multiple of the size of the mesh, or the mesh has several
            dims.

    Example:
        >>> parallelize_module(model, mesh, {"attention": HeadParallel()})  # doctest: +SKIP
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        checked_group(device_mesh)
        if not isinstance(module, MultiheadAdditiveAttention):
            raise TypeError(
                f"HeadParallel was given a {type(module).__name__}, but shards the heads of a "
                "MultiheadAdditiveAttention."
            )
        if module.num_heads % device_mesh.size():
            raise ValueError(
                f"num_heads is {module.num_heads} and the mesh has {device_mesh.size()} "
                "processes, but every process needs the same number of heads."
            )
        for name, parameter in list(module.named_parameters()):
            owner, _, own = name.rpartition(".")
            placed = distribute_tensor(
                parameter.detach(), device_mesh, [_SHARDED.get(name, Replicate())]
            )
            module.get_submodule(owner).register_parameter(
                own, nn.Parameter(placed, parameter.requires_grad)
            )

        def replicated(x: Any) -> Any:
            if isinstance(x, Tensor) and not isinstance(x, DTensor):
                return DTensor.from_local(x, device_mesh, [Replicate()], run_check=False)
            return x

        def enter(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            # A tensor that is passed twice stays one, so that one product projects it.
            made = {id(x): replicated(x) for x in (*given, *named.values())}
            return tuple(made[id(x)] for x in given), {n: made[id(x)] for n, x in named.items()}

        def leave(_: nn.Module, given: Any, results: tuple[Any, ...]) -> Any:
            return tuple(
                x.redistribute(device_mesh, [Replicate()]).to_local() if x is not None else x
                for x in results
            )

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave)
        return module
