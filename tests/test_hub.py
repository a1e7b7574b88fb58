"""Publishing into and downloading from a Hub on the loopback interface, with the real client.

The client reads its settings at import, so what talks to the server runs in a process of its own, one for all tests.
"""

import contextlib
import dataclasses
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import publish
import pytest
import timm
import torch
from conftest import ROOT
from hub_server import TOKEN, Hub, Repository, serve
from huggingface_hub import ModelCard
from PIL import Image

import mobilenets_zoo as mz
from mobilenets_zoo import pretrained

ENTRY = pretrained.default_entry("mobilenetv1_w025_cifar100")
OTHER = pretrained.manifest()["mobilenetv1_w025_cifar100.sgd_e36_r32"]
LEARNED = pretrained.default_entry("mobilenetv2_lgc_cifar100")
REPO = f"mobilenets-zoo/{ENTRY.model}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Callable[[str], Path]:
    """What is published of a weight."""
    root = tmp_path_factory.mktemp("folders")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            assert publish.main([name, "--dry-run", str(root / name)]) == 0
        return root / name

    return folder


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serve() as hub:
        yield hub


@contextlib.contextmanager
def process(url: str, home: Path, **settings: str) -> Iterator[Callable[..., Any]]:
    """Yields `call(function, *arguments)`, which runs in a process that knows only the loopback Hub."""
    settings = {
        "HF_TOKEN": TOKEN,
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "1",
        "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        "HF_HUB_OFFLINE": "0",
        **settings,
    }
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(name, value)
            pool.submit(os.getpid).result(timeout=100)
        yield lambda function, *arguments: pool.submit(function, *arguments).result(timeout=100)


@pytest.fixture(scope="module")
def client(server, tmp_path_factory):
    with process(server.url, tmp_path_factory.mktemp("home")) as call:
        yield call


@pytest.fixture
def hub(server) -> Iterator[Hub]:
    """The empty Hub without a fault."""
    server.repositories.clear()
    server.requests.clear()
    yield server
    server.fault, server.token = None, TOKEN


@pytest.fixture
def weights(tmp_path) -> Path:
    """A weights folder with two tags of one model, neither published."""
    folder = tmp_path / "weights"
    folder.mkdir()
    rows = json.loads((pretrained.WEIGHTS_DIR / "manifest.json").read_text())
    for entry in (OTHER, ENTRY):
        shutil.copy(pretrained.WEIGHTS_DIR / entry.file, folder)
    rows = {entry.name: rows[entry.name] | {"revision": None} for entry in (OTHER, ENTRY)}
    (folder / "manifest.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture
def published(hub, folders, weights) -> Hub:
    """The Hub with the default weight, whose commit is in the manifest."""
    repository = hub.repositories[REPO] = Repository()
    oid = repository.commit({path.name: path.read_bytes() for path in folders(ENTRY.model).iterdir()})
    repository.tags[ENTRY.tag] = oid
    rows = json.loads((weights / "manifest.json").read_text())
    rows[ENTRY.name]["revision"] = oid
    (weights / "manifest.json").write_text(json.dumps(rows))
    return hub


# What runs in the other process


def use(weights: Path, source: str = "") -> None:
    os.environ[pretrained.SOURCE_VARIABLE] = source
    pretrained.WEIGHTS_DIR = weights
    pretrained.manifest.cache_clear()


def load(weights: Path, cache: Path, source: str = "hub", seconds: float = 30, file_limit: int = -1) -> str:
    """Returns where the weight came from, or the error."""
    use(weights, source)
    pretrained.HUB_SECONDS = seconds
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, -1))
    try:
        model = timm.create_model(ENTRY.model, pretrained=True, cache_dir=str(cache))
    except mz.WeightsError as error:
        return f"error: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    return "bundled" if Path(model.pretrained_cfg["file"]).is_relative_to(weights) else "hub"


def load_at_once(weights: Path, cache: Path) -> set[str]:
    with ThreadPoolExecutor(4) as pool:
        return set(pool.map(load, [weights] * 4, [cache] * 4))


def run_publish(weights: Path, *arguments: str) -> tuple[int, str, str]:
    use(weights)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = publish.main(list(arguments))
    return code, out.getvalue(), err.getvalue()


def logits(*names: str) -> list[list[float]]:
    images = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
    return [timm.create_model(name, pretrained=True).eval()(images)[0].tolist() for name in names]


# The folder and the card


def test_the_folder_holds_three_files_and_loads(folders):
    folder = folders(ENTRY.model)
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == (pretrained.WEIGHTS_DIR / ENTRY.file).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"]) == (ENTRY.model, 100)
    assert config["label_names"] == list(mz.CIFAR100_CLASSES)
    assert str(ROOT) not in (folder / "config.json").read_text()
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).num_classes == 5


@pytest.mark.parametrize("entry", [ENTRY, OTHER, LEARNED], ids=lambda entry: entry.name)
def test_the_card_says_what_a_visitor_needs(entry, folders):
    """A second tag's card names the tag: the main branch holds the default weight."""
    card = ModelCard.load(folders(entry.model if entry != OTHER else entry.name) / "README.md")
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("timm", "image-classification")
    assert (data["license"], data["datasets"]) == ("mit", ["uoft-cs/cifar100"])
    values = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert values == {"Top-1 accuracy (%)": entry.top1, "Top-5 accuracy (%)": entry.top5}
    repo = f"mobilenets-zoo/{entry.model}" + (f"@{entry.tag}" if entry == OTHER else "")
    created = entry.name if entry == OTHER else entry.model
    code = card.text[card.text.index("```python") :].splitlines()
    assert code[1].startswith("import timm, mobilenets_zoo")
    assert code[3] == f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()'
    for text in (f"{entry.params:,}", f"{entry.macs:,}", entry.sha256, entry.recipe, f'create_model("{created}"'):
        assert text in card.text
    assert ("condensed=False" in card.text) == (entry == LEARNED)
    assert ("Apache" in card.text) == (entry.taught_by is not None)
    assert (entry.taught_by or "CIFAR-100 alone") in card.text
    result = json.loads((ROOT / entry.result).read_text())
    assert ("from the weights `" in card.text) == bool(result["recipe"]["init_from"])
    assert result["recipe"]["init_from"] in card.text
    assert ("networks at once" in card.text) == (result["training"].get("together", 1) > 1)
    assert "<!--" not in card.text
    assert "$" not in card.text


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=() if entry == LEARNED else pytest.mark.slow)
        for entry in pretrained.manifest().values()
    ],
)
def test_card_code_runs(entry, folders, tmp_path, monkeypatch):
    """All blocks of a card in one session, with the built folder in the repository's place."""
    pytest.importorskip("onnxscript")
    folder = folders(entry.model if publish.is_default(entry) else entry.name)
    Image.new("RGB", (50, 40), "green").save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 5
    for block in blocks:
        exec(compile(re.sub(rf"hf-hub:{entry.hub_id}(@\w+)?", f"local-dir:{folder}", block), "card", "exec"), names)
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.parametrize("entry", [ENTRY, LEARNED], ids=["dense", "learned"])
def test_transformers_loads_the_folder(entry, folders):
    from transformers import AutoModelForImageClassification, pipeline

    path = folders(entry.model)
    wrapped = AutoModelForImageClassification.from_pretrained(path).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = timm.create_model(f"local-dir:{path}", pretrained=True).eval()(x)
    torch.testing.assert_close(wrapped(x).logits.float(), expected, rtol=1e-2, atol=1e-2)
    rows = pipeline("image-classification", model=str(path))(Image.new("RGB", (50, 40), "red"))
    assert rows[0]["label"] in mz.CIFAR100_CLASSES


def test_dry_run_of_all_writes_a_folder_for_each_weight(weights, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", weights)
    monkeypatch.setattr(mz, "manifest", lambda: {entry.name: entry for entry in (ENTRY, OTHER)})
    assert publish.main(["--all", "--dry-run", str(tmp_path / "out"), "--namespace", "me"]) == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {ENTRY.model, OTHER.name}
    assert f"hf-hub:me/{ENTRY.model}" in (tmp_path / "out" / ENTRY.model / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "NAME of a model or --all"), ([ENTRY.model, "--all"], "or --all"), (["nonsense"], "no weight 'nonsense'")],
)
def test_bad_arguments_are_one_line(arguments, message, capsys):
    assert publish.main(arguments) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_an_occupied_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    assert publish.main([ENTRY.model, "--dry-run", str(tmp_path)]) == 2
    assert "holds other files already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_loads_as_another_model_is_not_published(monkeypatch, tmp_path, capsys):
    wrong = dataclasses.replace(ENTRY, file=OTHER.file, sha256=OTHER.sha256, bytes=OTHER.bytes)
    monkeypatch.setattr(publish, "chosen", lambda _: [wrong])
    assert publish.main([ENTRY.model, "--dry-run", str(tmp_path / "out")]) == 2
    assert "loads as another network" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Publishing


def test_publish_then_load(hub, client, weights, tmp_path):
    """Publishing the second tag publishes the default after it, which the main branch must hold."""
    code, out, err = client(run_publish, weights, OTHER.name)
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines()] == ["published,"] * 2
    assert TOKEN not in out + err
    repository = hub.repositories[REPO]
    first, other, default = repository.commits  # the empty repository's and ours
    assert set(default.files) - set(first.files) == {"model.safetensors", "config.json", "README.md"}
    assert repository.tags == {OTHER.tag: other.oid, ENTRY.tag: default.oid}
    rows = json.loads((weights / "manifest.json").read_text())
    assert [rows[name]["revision"] for name in (OTHER.name, ENTRY.name)] == [other.oid, default.oid]

    main, tagged, bundled = client(logits, f"hf-hub:{REPO}", f"hf-hub:{REPO}@{OTHER.tag}", ENTRY.model)
    assert main == bundled != tagged
    assert client(load, weights, tmp_path / "cache") == "hub"

    code, out, err = client(run_publish, weights, "--all")
    assert code == 0, err
    assert [line.split()[1] for line in out.splitlines()] == ["unchanged,"] * 2
    assert len(repository.commits) == 3


def test_a_changed_weight_under_an_unchanged_tag_is_refused(published, client, weights):
    repository = published.repositories[REPO]
    files = dict(repository.commits[-1].files)
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\1"
    repository.tags[ENTRY.tag] = repository.commit(files)
    code, _, err = client(run_publish, weights, ENTRY.model)
    assert code == 2
    assert "a new training needs a new tag" in err.splitlines()[-1]
    assert len(repository.commits) == 2


def test_a_missing_login_is_explained(hub, client, weights):
    hub.token = "another"
    code, out, err = client(run_publish, weights, ENTRY.model)
    assert code == 2
    assert "log in with `hf auth login`" in err.splitlines()[-1]
    assert TOKEN not in out + err


# Downloading


@pytest.mark.parametrize("fault", [None, "slow"])
def test_a_working_hub(published, client, weights, tmp_path, fault):
    published.fault = fault
    assert client(load, weights, tmp_path / "cache") == "hub"
    published.requests.clear()
    assert client(load, weights, tmp_path / "cache") == "hub"
    # A pinned commit in the cache needs no request.
    assert not [request for request in published.requests if "resolve" in request]


def test_the_hub_where_the_bundled_file_is_missing(published, client, weights, tmp_path):
    assert client(load, weights, tmp_path / "cache", "") == "bundled"
    (weights / ENTRY.file).unlink()
    assert client(load, weights, tmp_path / "cache", "") == "hub"


FAULTS = {
    **{status: status for status in ("401", "403", "500", "503")},
    **dict.fromkeys(["no repository", "no revision", "no file"], "404"),
    **dict.fromkeys(["silent", "cut"], "can't be downloaded"),
    **dict.fromkeys(["stalling", "dripping", "dripping headers"], "took more than 2 seconds"),
    "HTML page": "the answer isn't from a Hub",
    "shorter": "truncated",
    "longer": "is another file",
    "redirect": "error: ",
    "etag": "'../../../outside'",
    "commit": "'../../outside'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_hub_out_of_reach(published, client, weights, tmp_path, fault):
    published.fault = fault
    seconds = 2 if fault.startswith(("stalling", "dripping")) else 30
    out = client(load, weights, tmp_path / "cache", "hub", seconds)
    assert out.startswith("error: ")
    assert FAULTS[fault] in out
    assert "MOBILENETS_ZOO_SOURCE=bundled" in out
    assert len(out.splitlines()) == 1
    assert not list(tmp_path.rglob("outside*"))  # what a server says never names a file outside the cache


def test_altered_bytes_are_an_error_and_never_replaced(published, client, weights, tmp_path):
    published.fault = "altered"
    for _ in range(2):
        out = client(load, weights, tmp_path / "cache")
        assert out.startswith("error: ")
        assert "is altered: its" in out
        assert ENTRY.sha256 in out
    # Doing what the message says helps.
    Path(out.split("error: ")[1].split(" is altered")[0]).unlink()
    published.fault = None
    assert client(load, weights, tmp_path / "cache") == "hub"


def test_a_cache_that_cannot_be_written(published, client, weights, tmp_path):
    """A full disk (files may not grow beyond 100,000 bytes), then a file in the folder's place: so for root too."""
    assert "can't be downloaded" in client(load, weights, tmp_path / "cache", "hub", 30, 100_000)
    (tmp_path / "occupied").write_text("")
    assert "can't be downloaded" in client(load, weights, tmp_path / "occupied")


def test_offline_with_and_without_cache(published, client, weights, tmp_path):
    assert client(load, weights, tmp_path / "cache") == "hub"
    with process(published.url, tmp_path, HF_HUB_OFFLINE="1") as offline:
        assert "can't be downloaded" in offline(load, weights, tmp_path / "empty")
        assert offline(load, weights, tmp_path / "cache") == "hub"


def test_four_loads_at_once(published, client, weights, tmp_path):
    assert client(load_at_once, weights, tmp_path / "cache") == {"hub"}
