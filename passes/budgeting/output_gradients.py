"""How much the model's outputs depend on each output of each weight: one backward pass."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from magr_fx.errors import ModelError, brief
from magr_fx.machine.memory import is_out_of_memory
from magr_fx.machine.ranks import Ranks
from magr_fx.passes.finding.counted_tokens import Tokens
from magr_fx.passes.finding.find_linears import Site
from magr_fx.passes.inputs.calibration import Batch
from magr_fx.passes.inputs.tensors_only import output_tensors, own_arguments
from magr_fx.passes.tracing.make_fx import side_effects_undone

logger = logging.getLogger("magr_fx")
# After so many outputs no further batch is run. The sums over a weight's rows then change by 13%
# with the draw of the outputs.
OUTPUTS = 4096
SAMPLED_AT_ONCE = 1 << 24  # probabilities that torch.multinomial gets at once


def output_gradients(
    model: nn.Module, batches: Sequence[Batch], sites: Sequence[Site], ranks: Ranks
) -> dict[str, Tensor]:
    """For each row i of each weight, Σ‖∂ℓ/∂wᵢ‖² over batches, for each output vector.

    ℓ is the negative log-likelihood of outputs that are drawn from the model's own distribution.
    For ``logits``, [..., classes] or of pictures [batch, classes, height, width], these are
    classes, drawn with the softmax's probabilities; any other output vector y gets noise of the
    variance ‖y‖² in each direction. The expectation of the square is then the diagonal of the
    Fisher information, and half of δ²·E‖∂ℓ/∂wᵢ‖² is the divergence, or half the squared relative
    error of y, that a change δ of the row brings about (Amari, Neural Computation 10, 1998;
    Martens, JMLR 21, 2020, section 5).

    Args:
        model: in evaluation mode. It is run with other Parameters of the same memory, so that
            gradients, flags and hooks of its own stay as they are.
        batches: the calibration; the first ones are run, up to :data:`OUTPUTS` outputs.
        sites: the weights.
        ranks: which share the batches.

    Returns:
        ``[out]`` float32 on the CPU by the names of the weights; zeros where no gradient came, NaN
        where it overflowed.

    Raises:
        ModelError: the model cannot be run backwards.
    """
    outputs, tokens = 0, Tokens(batches, model)
    with torch.inference_mode(False), torch.enable_grad():
        sums = {site.name: torch.zeros(site.shape[0], device="cpu") for site in sites}
        leaves = _leaves(model, sites, sums)
        for at, batch in enumerate(batches):
            if outputs * ranks.world >= OUTPUTS:
                break
            if ranks.owns(at):
                outputs += _run_backwards(model, leaves, batch, tokens)
    count = torch.tensor([outputs], dtype=torch.float32, device="cpu")
    for each in (*sums.values(), count):
        ranks.sum(each)
    if not float(count):
        logger.warning(
            "no output of %s depends on its weights by autograd: it may run under torch.no_grad, "
            "or return no tensors of floating-point numbers",
            type(model).__name__,
        )
    return {name: each / max(1.0, float(count)) for name, each in sums.items()}


def _leaves(
    model: nn.Module, sites: Sequence[Site], sums: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Stand-ins of the same memory, by the names of the model's parameters.

    Those of the sites add up the squares of their gradients as soon as these are known, and keep
    none.
    """
    by_parameter: dict[nn.Parameter, list[Site]] = {}
    for site in sites:
        by_parameter.setdefault(site.parameter, []).append(site)
    leaves: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        wanted = by_parameter.get(parameter, [])
        if wanted and parameter.is_inference():
            raise ModelError(
                f"{name} was made under torch.inference_mode, so no gradient can tell where bits "
                "matter: load the model outside of it"
            )
        leaves[name] = nn.Parameter(parameter.detach(), requires_grad=bool(wanted))
        if wanted:
            _on_gradient(leaves[name], partial(_add, wanted, sums))
    return leaves


def _on_gradient(parameter: Any, function: Any) -> None:
    parameter.register_post_accumulate_grad_hook(function)


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
        squares = own.float().square().sum(-1).cpu()
        # One NaN or Inf makes the whole weight unknown.
        sums[site.name].add_(squares if bool(squares.isfinite().all()) else torch.nan)


def _run_backwards(
    model: nn.Module, leaves: dict[str, Tensor], batch: Batch, tokens: Tokens
) -> int:
    """Run one batch forwards and backwards; the number of its output vectors that count."""
    args, kwargs = own_arguments((batch.args, batch.kwargs))
    counted = 0
    try:
        # Within: what is put back afterwards counts as a change of what backward reads.
        with torch.compiler.set_stance("force_eager"), side_effects_undone(model):
            result = torch.func.functional_call(model, leaves, args, kwargs)
            outputs = [(name, y) for name, y in _floating(result) if y.requires_grad]
            generators: dict[torch.device, torch.Generator] = {}
            gradients = []
            for name, y in outputs:
                generator = generators.setdefault(
                    y.device, torch.Generator(y.device).manual_seed(batch.index)
                )
                vectors = _vectors(y.detach(), classes=name == "logits")
                keep = None
                if y.dim() == 3:
                    keep = tokens.counted(batch, (y.shape[0], y.shape[1]), name)
                drawn = _drawn(vectors, name == "logits", generator)
                if keep is not None:
                    drawn *= keep.to(y.device).unsqueeze(-1)
                counted = counted or (drawn[..., 0].numel() if keep is None else int(keep.sum()))
                gradients.append(_as_output(drawn, y, classes=name == "logits"))
            if outputs:
                torch.autograd.backward([y for _, y in outputs], gradients)
    except Exception as error:  # a model's code can raise anything
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{type(model).__name__} cannot be run backwards on calibration batch {batch.index}, "
            f"which tells where bits matter: {brief(error)}. Give one config for all weights, or "
            "an FqnToConfig"
        ) from error
    return counted


def _floating(result: Any) -> list[tuple[str, Tensor]]:
    """The floating-point outputs, the logits alone where there are some."""
    named: list[tuple[str, Any]] = [("", result)]
    if isinstance(result, Mapping):
        named = list(result.items())
    elif hasattr(result, "logits"):  # a dataclass
        named = [("logits", result.logits)]
    found = [
        (str(name), leaf)
        for name, value in named
        for leaf in output_tensors(value)
        if leaf.is_floating_point() and leaf.dim() > 0
    ]
    return [one for one in found if one[0] == "logits"] or found


def _vectors(y: Tensor, *, classes: bool) -> Tensor:
    """The output with its vectors along the last axis; numbers are vectors of length 1."""
    if y.dim() == 1:
        return y.unsqueeze(-1)
    return y.movedim(1, -1) if classes and y.dim() == 4 else y


def _as_output(drawn: Tensor, y: Tensor, *, classes: bool) -> Tensor:
    if y.dim() == 1:
        drawn = drawn.squeeze(-1)
    elif classes and y.dim() == 4:
        drawn = drawn.movedim(-1, 1)
    return drawn.to(y.dtype)


def _drawn(y: Tensor, classes: bool, generator: torch.Generator) -> Tensor:
    """The gradient, in float32, of the negative log-likelihood of a drawn output."""
    vectors = y.reshape(-1, y.shape[-1]).float()
    if classes:
        gradient = vectors.softmax(-1)
        for part in torch.split(gradient, max(1, SAMPLED_AT_ONCE // gradient.shape[1])):
            drawn = torch.multinomial(part, 1, generator=generator)
            part.scatter_add_(1, drawn, -torch.ones_like(drawn, dtype=part.dtype))
    else:
        noise = torch.randn(vectors.shape, generator=generator, device=y.device)
        gradient = noise / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-30)
    return gradient.view(y.shape)
