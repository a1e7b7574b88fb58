"""Run by test_lgc_models.py under torchrun: trains and prunes on each process and compares the outcome."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mobilenets_zoo as mz


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = nn.Sequential(mz.LearnedGroupConv2d(32, 64), nn.BatchNorm2d(64), nn.ReLU(), mz.LearnedGroupConv2d(64, 32))
    with torch.no_grad():
        model[3].weight.fill_(0.5)  # ties at first: equal importances must be broken alike
    mz.CondenseSchedule(model).step(1 / 6)
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    schedule = mz.CondenseSchedule(model)
    torch.manual_seed(dist.get_rank())  # each process sees its own data
    for step in range(12):
        loss = parallel(torch.randn(4, 32, 8, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step((step + 1) / 12)

    for index in (0, 3):
        layer = model[index]
        assert (layer.mask.sum(1) == layer.in_channels // 4).all()
        for tensor in (layer.mask.to(torch.uint8), layer.weight.detach()):
            copies = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(copies, tensor)
            assert torch.equal(*copies), f"layer {index} differs between the processes"
    print("masks agree", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
