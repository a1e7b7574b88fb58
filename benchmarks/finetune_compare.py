"""Compares fine-tuning with training from scratch at the same budget, over several seeds.

    python benchmarks/finetune_compare.py --out benchmarks/results/finetune.json

Runs benchmarks/finetune.py's own code for each model, data set, start and seed. docs/finetuning.md shows the result.
"""

import argparse
import json
import sys
from pathlib import Path

import finetune
from rich.console import Console
from rich.progress import Progress

import mobilenets_zoo as mz

DATA = ("digits", "faces")
STARTS: dict[str, list[str]] = {"fine-tuned": [], "classifier alone": ["--freeze"], "from scratch": ["--scratch"]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["mobilenetv1_w025_cifar100", "mobilenetv2_lgc_cifar100", "mobilenetv2_t1_cifar100"],
    )
    parser.add_argument("--epochs", type=int, nargs="+", default=[3, 15])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args(argv)
    rows = []
    with Progress(console=Console(stderr=True)) as progress:
        for model in args.models:
            for data in DATA:
                for epochs in args.epochs:
                    for start, options in STARTS.items():
                        for seed in args.seeds:
                            command = [model, "--data", data, "--epochs", str(epochs), "--seed", str(seed), *options]
                            result = finetune.run(finetune.parse(command), progress)
                            rows.append({"method": start, **result})
    environment = rows[0]["environment"]
    for row in rows:
        del row["environment"], row["evaluation"]["per_class"]
    with mz.files.atomic_write(args.out, "w") as file:
        lines = ",\n".join(json.dumps(row) for row in rows)
        file.write(f'{{\n"environment": {json.dumps(environment)},\n"rows": [\n{lines}\n]\n}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
