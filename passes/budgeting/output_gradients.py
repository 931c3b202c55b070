"""How much the model's outputs depend on each output of each weight: one backward pass."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magr_fx.errors import ModelError, brief
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.finding.mask_values import convention, counted_tokens
from magr_fx.passes.graphs.torch_private import tree_leaves
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import own_arguments
from magr_fx.passes.tracing.make_fx import side_effects_undone

logger = logging.getLogger("magr_fx")
# After so many outputs no further batch is run. The sums over a weight's rows then change by 10%
# with the draw of the outputs.
OUTPUTS = 8192
SAMPLED_AT_ONCE = 1 << 24  # probabilities that torch.multinomial gets at once


def output_gradients(
    model: nn.Module, batches: Sequence[Batch], sites: Sequence[Site], ranks: Ranks
) -> dict[str, Tensor]:
    """For each row i of each weight, Σ‖∂ℓ/∂wᵢ‖² over batches, for each output vector.

    ℓ is the negative log-likelihood of outputs that are drawn from the model's own distribution.
    For ``logits`` [..., classes] these are classes, drawn with the softmax's probabilities; any
    other output vector y gets noise of the variance ‖y‖² in each direction. The expectation of
    the square is then the diagonal of the Fisher information, and half of δ²·E‖∂ℓ/∂wᵢ‖² is the
    divergence, or half the squared relative error of y, that a change δ of the row brings about
    (Amari, Neural Computation 10, 1998; Martens, JMLR 21, 2020, section 5).

    Args:
        model: in evaluation mode. Its weights, gradients and buffers are afterwards as before.
        batches: the calibration; the first ones are run, up to :data:`OUTPUTS` outputs.
        sites: the weights.
        ranks: which share the batches.

    Returns:
        ``[out]`` float32 on the CPU by the names of the weights; zeros where no gradient came.

    Raises:
        ModelError: the model cannot be run backwards.
    """
    by_parameter: dict[nn.Parameter, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(site.parameter, []).append(site)
    sums = {site.name: torch.zeros(site.shape[0], device="cpu") for site in sites}
    outputs = 0
    with _collecting(model, by_parameter, sums), torch.enable_grad():
        for at, batch in enumerate(batches):
            if outputs * ranks.world >= OUTPUTS:
                break
            if ranks.owns(at):
                outputs += _run_backwards(model, batch)
    count = torch.tensor([outputs], dtype=torch.float32, device="cpu")
    for each in (*sums.values(), count):
        ranks.sum(each)
    return {name: each / max(1.0, float(count)) for name, each in sums.items()}


@contextlib.contextmanager
def _collecting(
    model: nn.Module, sites: Mapping[nn.Parameter, list[Site]], sums: Mapping[str, Tensor]
) -> Iterator[None]:
    """Add up the squares of the sites' gradients as soon as they are known; none is kept."""
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    with contextlib.ExitStack() as undone:
        for parameter, wanted, grad in flags:
            undone.callback(setattr, parameter, "grad", grad)
            undone.callback(parameter.requires_grad_, wanted)
            parameter.grad = None
            parameter.requires_grad_(parameter in sites)
            if parameter in sites:
                add = partial(_add, sites[parameter], sums)
                undone.callback(_on_gradient(parameter, add).remove)
        yield


def _on_gradient(parameter: Any, function: Callable[[Tensor], None]) -> Any:
    return parameter.register_post_accumulate_grad_hook(function)


def _add(sites: list[Site], sums: Mapping[str, Tensor], parameter: Tensor) -> None:
    grad = parameter.grad
    parameter.grad = None
    if grad is None:
        return
    if grad.stride() != parameter.stride():
        laid_out = torch.empty_strided(
            parameter.shape, parameter.stride(), dtype=grad.dtype, device=grad.device
        )
        grad = laid_out.copy_(grad)
    for site in sites:
        offset = site.view.offset - parameter.storage_offset() + grad.storage_offset()
        own = grad.as_strided(site.shape, site.view.stride, offset)
        sums[site.name].add_(own.float().square().sum(-1).cpu())


def _run_backwards(model: nn.Module, batch: Batch) -> int:
    """Run one batch forwards and backwards; the number of its output vectors that count."""
    generators: dict[torch.device, torch.Generator] = {}
    args, kwargs = own_arguments((batch.args, batch.kwargs))
    try:
        with torch.compiler.set_stance("force_eager"), side_effects_undone(model):
            result = model(*args, **kwargs)
        outputs = [(y, name) for name, y in _floating(result) if y.requires_grad]
        if not outputs:
            return 0
        gradients = []
        counted = 0
        for at, (y, name) in enumerate(outputs):
            device = y.device
            if device not in generators:
                generators[device] = torch.Generator(device).manual_seed(batch.index)
            keep = _counted(batch, y)
            gradients.append(_drawn(y.detach(), name == "logits", generators[device], keep))
            if at == 0:
                counted = int(keep.sum()) if keep is not None else y[..., 0].numel()
        torch.autograd.backward([y for y, _ in outputs], gradients)
    except Exception as error:  # a model's code can raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be run backwards on calibration batch {batch.index}, "
            f"which tells where bits matter: {brief(error)}. Give one config for all weights, or "
            "an FqnToConfig"
        ) from error
    return counted


def _floating(result: Any) -> Iterable[tuple[str, Tensor]]:
    """The floating-point outputs, the logits alone where there are some."""
    named = list(result.items()) if isinstance(result, Mapping) else [("", result)]
    found = [
        (str(name), leaf)
        for name, value in named
        for leaf in tree_leaves(value)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim() > 1
    ]
    return [one for one in found if one[0] == "logits"] or found


def _counted(batch: Batch, y: Tensor) -> Tensor | None:
    """Which vectors of an output ``[batch, tokens, ...]`` are of tokens; None: all."""
    mask = batch.kwargs.get("attention_mask")
    if y.dim() != 3 or not isinstance(mask, Tensor):
        return None
    found = counted_tokens(mask, y.shape[0], y.shape[1], convention([mask], marks_padding=False))
    return None if found is None or found.shape != y.shape[:2] else found.to(y.device)


def _drawn(y: Tensor, classes: bool, generator: torch.Generator, counted: Tensor | None) -> Tensor:
    """The gradient of the negative log-likelihood of a drawn output, in the output's dtype."""
    vectors = y.reshape(-1, y.shape[-1])
    if classes:
        gradient = vectors.float().softmax(-1)
        for part in torch.split(gradient, max(1, SAMPLED_AT_ONCE // gradient.shape[1])):
            drawn = torch.multinomial(part, 1, generator=generator)
            part.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=part.dtype))
    else:
        noise = torch.randn(vectors.shape, generator=generator, device=y.device)
        gradient = noise / vectors.float().norm(dim=-1, keepdim=True).clamp_min(1e-30)
    if counted is not None:
        gradient *= counted.reshape(-1, 1)
    return gradient.view(y.shape).to(y.dtype)
