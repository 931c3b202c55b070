"""MagR on several ranks: the calibration is split over them, and so are the solves.

    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py --shard --checkpoint-dir run

Every rank makes the same call with the same model and the whole calibration; each runs its own
share of the batches, the grams are all-reduced, and all ranks end with the same bits. With --shard
the weights are sharded by FSDP2, and stay so. With --checkpoint-dir a run that is cut short goes on
where it was, started again in the same way. A tiny model with random weights: ten seconds.
"""

from __future__ import annotations

import argparse
from datetime import timedelta

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.quantization import IntxWeightOnlyConfig

from magr_fx import MagRReport, magr_transform

WIDTH = 128
TARGET = IntxWeightOnlyConfig(weight_dtype=torch.int3)  # type: ignore[attr-defined]


def model_and_calib() -> tuple[nn.Sequential, list[torch.Tensor]]:
    """The same on every rank."""
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.SiLU()) for _ in range(4)]
    mix = torch.randn(WIDTH, WIDTH) * torch.logspace(0, -1, WIDTH)
    return nn.Sequential(*layers).eval(), [torch.randn(256, WIDTH) @ mix for _ in range(8)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shard", action="store_true", help="shard the weights by FSDP2")
    parser.add_argument("--checkpoint-dir", help="where to save what is done")
    options = parser.parse_args()

    # The timeout is the longest that one rank waits for another: longer than a block takes.
    dist.init_process_group("gloo", timeout=timedelta(minutes=10))
    model, calib = model_and_calib()
    if options.shard:
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
    magr_transform(model, calib, target=TARGET, checkpoint_dir=options.checkpoint_dir)

    report = model.magr_report
    assert isinstance(report, MagRReport)  # for the type checker: nn.Module knows no attributes
    if dist.get_rank() == 0:
        print(report)
    weight = model.get_parameter("0.0.weight").detach()
    own, whole = weight, weight
    if isinstance(weight, DTensor):
        own, whole = weight.to_local(), weight.full_tensor()
    print(
        f"rank {dist.get_rank()} holds {tuple(own.shape)} of 0.0.weight {tuple(whole.shape)}, "
        f"whose numbers sum to {float(whole.double().sum())!r}"
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
