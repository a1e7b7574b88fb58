"""Run by test_lgc_pruning.py under torchrun: two processes with half the images each prune as one with all of them."""

import copy

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mobilenets_zoo as mz


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(mz.LearnedGroupConv2d(32, 64), nn.BatchNorm2d(64), nn.ReLU(), mz.LearnedGroupConv2d(64, 32))
    images = torch.randn(12, 32, 8, 8) * torch.rand(32, 1, 1)
    alone = copy.deepcopy(model)
    mz.prune_groups(alone, images)

    dist.init_process_group("gloo")
    mz.prune_groups(DistributedDataParallel(model), images[dist.get_rank() :: 2])
    for (name, value), expected in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4, msg=name)
        copies = [torch.empty_like(value.float()) for _ in range(2)]
        dist.all_gather(copies, value.float())
        assert torch.equal(*copies), f"{name} differs between the processes"
    print("as with all images", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
