"""The model card of a published weight, made from its result file and training log."""

from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mobilenets_zoo.pretrained import WeightEntry, is_default

__all__ = ["model_card"]

DATASET = "uoft-cs/cifar100"


def model_card(entry: WeightEntry, repo: str, result: dict[str, Any], epochs: list[dict[str, str]]) -> ModelCard:
    """Returns the card of a published weight.

    Args:
        entry: the weight.
        repo: its repository, "namespace/name".
        result: what benchmarks/evaluate.py wrote.
        epochs: the rows of the training log.

    Raises:
        ValueError: the front matter isn't valid.
    """
    scores, recipe = result["evaluation"], result["recipe"]
    data = ModelCardData(
        license="mit",
        library_name="timm",
        pipeline_tag="image-classification",
        datasets=[DATASET],
        tags=["timm", "image-classification", "cifar-100", "mobilenet"],
        model_name=entry.name,
        eval_results=[
            EvalResult(
                task_type="image-classification",
                dataset_type=DATASET,
                dataset_name="CIFAR-100",
                dataset_split="test",
                metric_type="accuracy",
                metric_name=name,
                metric_value=round(scores[key], 2),
            )
            for name, key in (("Top-1 accuracy (%)", "top1"), ("Top-5 accuracy (%)", "top5"))
        ],
    )
    learned = "lgc" in entry.model
    # The main branch holds the model's default weight; another is found by its tag.
    source, bundled = (repo, entry.model) if is_default(entry) else (f"{repo}@{entry.tag}", entry.name)
    taught = (
        f"taught by {entry.taught_by}: a network that has seen more than CIFAR-100"
        if entry.taught_by
        else "trained from scratch on CIFAR-100 alone"
    )
    condense = f"""
## Condensed and masked

Loaded as above the learned group convolutions are in their deployed form, standard grouped convolutions. To go on
training them as masked layers:

```python
masked = timm.create_model("hf-hub:{source}", pretrained=True, condensed=False)
small = mobilenets_zoo.condense(masked)  # and back, with equal outputs
```
"""
    shown = [row for i, row in enumerate(epochs) if i in {round(k * (len(epochs) - 1) / 10) for k in range(11)}]
    curve = "\n".join(
        f"| {row['epoch']} | {row['size']} | {float(row['train_loss']):.3f} | {float(row['train_top1']):.1f} |"
        for row in shown
    )
    form = "deployed, condensed" if learned else "deployed"
    latency = result.get("latency")
    latency_row = (
        f"| latency, batch 1, 1 thread, eager fp32, {latency['device']} | {latency['milliseconds']:.1f} ms |\n"
        if latency
        else ""
    )
    text = f"""---
{data.to_yaml()}
---

# {entry.name}

```python
import timm, mobilenets_zoo  # the second import registers the architecture
model = timm.create_model("hf-hub:{source}", pretrained=True).eval()
```

A {(timm.model_entrypoint(entry.model).__doc__ or "").strip().rstrip(".")} ({form}), {taught}.
Trained by the [mobilenets_zoo](https://huggingface.co/{repo.split("/")[0]}) project. The package `mobilenets-zoo`
holds the same weight: with it `timm.create_model("{bundled}", pretrained=True)` needs no download.

| | |
| --- | --- |
| top-1 / top-5, 10,000 test images | {scores["top1"]:.2f} % / {scores["top5"]:.2f} % |
| cross-entropy | {scores["loss"]:.3f} |
| expected calibration error | {scores["ece"]:.1f} % |
| parameters | {entry.params:,} |
| MACs at 32x32 | {entry.macs:,} |
{latency_row}| file | {entry.bytes:,} bytes, sha256 `{entry.sha256}` |

## Predict

```python
import torch
from PIL import Image

transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("photo.jpg").convert("RGB")
with torch.inference_mode():
    probabilities = model(transform(image).unsqueeze(0)).softmax(1)[0]
for p, label in zip(*probabilities.topk(5)):
    print(mobilenets_zoo.CIFAR100_CLASSES[label], f"{{100 * p.item():.1f}} %")
```

## Features

```python
trunk = timm.create_model("hf-hub:{source}", pretrained=True, features_only=True)
maps = trunk(torch.randn(1, 3, 32, 32))  # at 32, 16 and 8 pixels
```

## Fine-tune

```python
from timm.optim import create_optimizer_v2

model = timm.create_model("hf-hub:{source}", pretrained=True, num_classes=10)
optimizer = create_optimizer_v2(model, "sgd", lr=0.01, momentum=0.9, layer_decay=0.8)
```
{condense if learned else ""}
## ONNX

```python
torch.onnx.export(model.eval(), (torch.randn(2, 3, 32, 32),), "model.onnx", dynamo=True)  # needs onnxscript
```

## Training

Recipe `{entry.recipe}`, {recipe["epochs"]} epochs, {result["training_seconds"] / 60:.0f} minutes on
{result["training"]["device"]}, seed {result["seed"]}, weights of the last epoch:

```bash
python benchmarks/train.py {entry.recipe} --data DIR --out DIR
```

| epoch | pixels | training loss | training top-1 (%) |
| ---: | ---: | ---: | ---: |
{curve}

## Data, limits and biases

Trained on the 50,000 training images of [CIFAR-100](https://huggingface.co/datasets/{DATASET}): 32x32 photographs
of 100 classes, collected from the web in the 2000s. The model knows these classes only and gives one of them to any
picture, with a confidence that means nothing elsewhere. Photographs lose nearly everything at 32 pixels. The classes
"baby", "boy", "girl", "man" and "woman" reflect their labellers' judgement of small pictures. It is made for research,
teaching and as a start for fine-tuning; do not use it to identify or judge people, or where an error does harm.

## Licence and citation

MIT. Architecture: MobileNets (arXiv 1704.04861), MobileNetV2 (arXiv 1801.04381); learned group convolution: CondenseNet
(arXiv 1711.09224); data: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

```bibtex
@software{{mobilenets_zoo,
  title = {{mobilenets_zoo: small, fast CIFAR-100 networks for timm}},
  year = {{2026}},
  url = {{https://huggingface.co/{repo}}}
}}
```
"""
    return ModelCard(text, ignore_metadata_errors=False)
