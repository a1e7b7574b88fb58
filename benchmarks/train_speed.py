"""Measures the trainer's images per second on a CPU: one process with two threads against two with one thread each.

    python benchmarks/train_speed.py --data DIR [--models NAME ...] [--out benchmarks/results/train_speed.json]

The ways take turns, each in fresh processes; two processes start their timed steps together. Beside the rate stands the
share of a step that is neither network nor optimiser: choosing and cropping images, reading soft labels, averaging the
weights.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mobilenets_zoo as mz

MODELS = ("mobilenetv1_w025_cifar100", "mobilenetv2_gc_cifar100", "mobilenetv2_lgc_cifar100")
SOFT_LABELS = Path(__file__).resolve().parent / "teacher" / "soft_labels.safetensors"
WAYS = {"one process, 2 threads": (1, 2), "two processes, 1 thread each": (2, 1)}


def worker(args: argparse.Namespace) -> None:
    """Takes steps and prints images per second and the share of the time outside network and optimiser."""
    import torch
    import train
    from training.cpu import keep_freed_memory
    from training.recipe import Recipe
    from training.soft_labels import SoftLabels
    from training.student import Student

    torch.set_num_threads(args.threads)
    keep_freed_memory()
    data = mz.data.load_images(args.data, "train")
    arguments: dict[str, Any] = dict(epochs=2, batch_size=args.batch_size, precision=args.precision, ema_decay=0.99)
    arguments.update(optimizer=args.optimizer, soft_labels=str(SOFT_LABELS), kd_weight=0.9, cutmix=0.5)
    recipe = Recipe(args.models[0], "speed", **arguments)
    labels = SoftLabels.load(SOFT_LABELS)
    trainer = train.Trainer([recipe], data, labels, None, torch.device("cpu"), Path("."))
    trainer.students[0].model.train()
    plan = train.Plan(recipe, 0, data, trainer.soft_labels, trainer.device)
    inside = 0.0
    update = Student.update

    def timed(self: Student, *inputs: Any) -> None:
        nonlocal inside
        start = time.perf_counter()
        update(self, *inputs)
        inside += time.perf_counter() - start

    Student.update = timed  # type: ignore[method-assign, assignment]
    trainer.train_step(plan, 0, 32)
    print("ready", flush=True)
    sys.stdin.readline()  # until all processes are ready
    inside, start = 0.0, time.perf_counter()
    for i in range(1, args.steps + 1):
        trainer.train_step(plan, i, 32)
    seconds = time.perf_counter() - start
    result = {"images_per_second": args.steps * args.batch_size / seconds, "outside": 1.0 - inside / seconds}
    print(json.dumps(result), flush=True)


def measure(args: argparse.Namespace, model: str, processes: int, threads: int) -> dict[str, float]:
    """Returns the processes' images per second together and their mean share outside network and optimiser."""
    command = [sys.executable, __file__, "--worker", "--models", model, "--threads", str(threads), "--data", args.data]
    command += ["--batch-size", str(args.batch_size), "--steps", str(args.steps), "--precision", args.precision]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    running = [
        subprocess.Popen(
            [*command, "--optimizer", args.optimizer], env=env, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(processes)
    ]
    for process in running:
        assert process.stdout is not None
        if process.stdout.readline().strip() != "ready":
            raise ValueError(f"a process of {model} failed; its error is above")
    results = []
    for process in running:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in running:
        assert process.stdout is not None
        results.append(json.loads(process.stdout.readline()))
        process.wait()
    return {
        "images_per_second": sum(result["images_per_second"] for result in results),
        "outside": statistics.mean(result["outside"] for result in results),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="Parquet folder, torchvision root or Hub id")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=6, help="timed steps of a process")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--optimizer", default="nmuon")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    try:
        if args.worker:
            worker(args)
            return 0
        rows = []
        for model in args.models:
            turns: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(args.turns):
                for way, (processes, threads) in WAYS.items():
                    turns[way].append(measure(args, model, processes, threads))
            for way, results in turns.items():
                row: dict[str, Any] = {"model": model, "way": way}
                for key in ("images_per_second", "outside"):
                    row[key] = statistics.median(result[key] for result in results)
                rows.append(row)
                print(json.dumps(row))
        from measuring.environment import environment

        shared = {"optimizer": args.optimizer, "precision": args.precision, "batch_size": args.batch_size}
        document = {**shared, "turns": args.turns, "rows": rows, "environment": environment()}
        if args.out:
            with mz.files.atomic_write(args.out, "w", encoding="utf-8") as file:
                file.write(json.dumps(document, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
