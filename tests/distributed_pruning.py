"""Run by test_lgc_pruning.py under torchrun: two processes prune alike, with images and while they train."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mobilenets_zoo as mz


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(mz.LearnedGroupConv2d(32, 64), nn.BatchNorm2d(64), nn.ReLU(), mz.LearnedGroupConv2d(64, 32))


def check_alike(model: nn.Module) -> None:
    for name, value in model.state_dict().items():
        copies = [torch.empty_like(value.float()) for _ in range(2)]
        dist.all_gather(copies, value.float())
        assert torch.equal(*copies), f"{name} differs between the processes"


def prune_with_images(images: torch.Tensor, alone: nn.Module) -> None:
    """With half the images each, as one process with all of them."""
    model = network()
    mz.prune_groups(DistributedDataParallel(model), images[dist.get_rank() :: 2])
    for (name, value), expected in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)
    check_alike(model)


def prune_while_training() -> None:
    """On different data under DDP."""
    model = network()
    nn.init.constant_(model[3].weight, 0.5)  # ties at first: equal importances must be broken alike
    schedule = mz.CondenseSchedule(model)
    schedule.step(1 / 6)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(dist.get_rank())  # each process sees its own data
    for step in range(12):
        loss = parallel(torch.randn(4, 32, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step((step + 1) / 12)
    layers = mz.learned_layers(model)
    assert all((layer.mask.sum(1) == layer.in_channels // 4).all() for layer in layers.values())
    check_alike(nn.ModuleList(layers.values()))


if __name__ == "__main__":
    alone = network()
    images = torch.randn(12, 32, 8, 8) * torch.rand(32, 1, 1)
    mz.prune_groups(alone, images)
    dist.init_process_group("gloo")
    prune_with_images(images, alone)
    prune_while_training()
    print("pruned alike", flush=True)
    dist.destroy_process_group()
