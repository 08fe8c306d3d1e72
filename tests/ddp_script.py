"""One of two gloo processes: train bare, then watched on rank 0. Run by test_laws.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from unvanish.watch import Watch


def train(rank: int) -> dict[str, object]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 2))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), 0.1, momentum=0.9)
    torch.manual_seed(100 + rank)
    losses, norms = [], {name: [] for name in ("0", "2")}
    for _ in range(10):
        optimizer.zero_grad()
        loss = parallel(torch.randn(8, 6)).square().mean()
        loss.backward()
        for name in norms:
            grads = [p.grad.double().reshape(-1) for p in model.get_submodule(name).parameters()]
            norms[name].append(torch.cat(grads).square().mean().sqrt().float())
        optimizer.step()
        losses.append(loss.detach())
    return {
        "weights": model.state_dict(),
        "losses": losses,
        "grad_rms": {name: torch.stack(values) for name, values in norms.items()},
    }


def main() -> None:
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(train(rank), folder / f"bare-{rank}.pt")
    watch = Watch(every=1, folder=folder / "run" if rank == 0 else None)
    if rank == 0:
        watch.attach()
    torch.save(train(rank), folder / f"watched-{rank}.pt")
    watch.close()
    assert watch.failure == "", watch.failure
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads sometimes abort the process when the interpreter ends


if __name__ == "__main__":
    main()
