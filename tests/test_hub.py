"""Publishing into and downloading from a Hub on the loopback interface, with the real client in fresh processes.

The client reads its settings at import, so everything that talks to the server runs in a process of its own.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import timm
import torch
from conftest import LGC_MODELS, ROOT, with_lively_statistics, with_random_masks
from hub_server import TOKEN, Repository, serve
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForImageClassification, pipeline

import mobilenets_zoo as mz
from mobilenets_zoo import pretrained
from mobilenets_zoo.hub import publish
from mobilenets_zoo.hub.publish import PublishError, build_folder

ENTRY = pretrained.default_entry("mobilenetv1_w025_cifar100")
REPO = f"mobilenets-zoo/{ENTRY.model}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return build_folder(ENTRY, tmp_path_factory.mktemp("dry-run"))


@pytest.fixture
def hub(folder):
    """A server that has the published repository already."""
    with serve() as hub:
        yield hub


@pytest.fixture
def published(hub, folder):
    repository = Repository()
    oid = repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
    repository.tags[ENTRY.tag] = oid
    hub.repositories[REPO] = repository
    hub.revision = oid
    return hub


@pytest.fixture
def project(tmp_path):
    """A copy of the package, whose manifest a test may change."""
    target = tmp_path / "project"
    ignore = shutil.ignore_patterns("__pycache__", ".*", "teacher")
    for name in ("mobilenets_zoo", "benchmarks"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    manifest = target / "mobilenets_zoo" / "weights" / "manifest.json"
    rows = {ENTRY.name: json.loads(manifest.read_text())[ENTRY.name]}  # `--all` would take minutes with all of them
    manifest.write_text(json.dumps(rows))
    return target


def run(hub, project: Path, program: str, *, home: Path | None = None, token: str = TOKEN, **env: str):
    """Runs a program in a process that knows only the loopback Hub."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home or project / "home"),
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(project),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=environment,
        cwd=project,
        capture_output=True,
        text=True,
        timeout=200,
    )


CLI = "import sys; sys.argv = ['mobilenets-zoo', *{arguments}]; from mobilenets_zoo.cli import main; main()"


def command(hub, project: Path, *arguments: str, **kwargs):
    return run(hub, project, CLI.format(arguments=list(arguments)), **kwargs)


def publish_revision(project: Path, revision: str) -> None:
    path = project / "mobilenets_zoo" / "weights" / "manifest.json"
    rows = json.loads(path.read_text())
    rows[ENTRY.name]["revision"] = revision
    path.write_text(json.dumps(rows))


# The folder and the card


def test_the_folder_holds_three_files_and_loads(folder):
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md"}
    assert (folder / "model.safetensors").read_bytes() == (pretrained.WEIGHTS_DIR / ENTRY.file).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == ENTRY.model
    assert config["num_classes"] == 100
    assert config["label_names"] == list(mz.CIFAR100_CLASSES)
    assert str(ROOT) not in (folder / "config.json").read_text()
    assert timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5).num_classes == 5
    if ENTRY.model in LGC_MODELS:
        timm.create_model(f"local-dir:{folder}", pretrained=True, condensed=True)


def test_the_card_says_what_a_visitor_needs(folder):
    card = ModelCard.load(folder / "README.md")
    data = card.data
    front_matter = data.to_dict()
    expected = {"library_name": "timm", "pipeline_tag": "image-classification", "license": "mit"}
    assert {key: front_matter[key] for key in expected} == expected
    assert data.datasets == ["uoft-cs/cifar100"]
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values["Top-1 accuracy (%)"] == ENTRY.top1
    code = card.text[card.text.index("```python") :].splitlines()
    assert code[1].startswith("import timm, mobilenets_zoo")
    assert code[2] == f'model = timm.create_model("hf-hub:{REPO}", pretrained=True).eval()'
    for text in (
        f"{ENTRY.params:,}",
        f"{ENTRY.macs:,}",
        ENTRY.sha256,
        ENTRY.recipe,
        "limits and biases",
        "bibtex",
        "ms |",
    ):
        assert text in card.text
    assert ("## Condense" in card.text) == (ENTRY.model in LGC_MODELS)
    assert (ENTRY.taught_by or "CIFAR-100 alone") in card.text


def test_a_second_tag_is_published_first_and_its_card_names_it(tmp_path):
    """The main branch must end with the default weight."""
    names = [entry.name for entry in publish.in_publishing_order(pretrained.manifest().values())]
    assert sorted(names) == sorted(pretrained.manifest())
    other = pretrained.manifest()["mobilenetv2_t1_cifar100.sgd_e24_r32"]
    default = pretrained.default_entry(other.model)
    assert names.index(other.name) < names.index(default.name)
    text = (build_folder(other, tmp_path / "other") / "README.md").read_text(encoding="utf-8")
    assert f"hf-hub:mobilenets-zoo/{other.model}@{other.tag}" in text
    assert f'timm.create_model("{other.name}", pretrained=True)' in text


@pytest.fixture
def learned_folder(tmp_path, monkeypatch) -> Path:
    """The published form of a learned network with made-up weights."""
    model = with_lively_statistics(with_random_masks(timm.create_model("mobilenetv2_lgc_cifar100")))
    file = tmp_path / "weights" / "learned.safetensors"
    file.parent.mkdir()
    mz.save_weights(model, file)
    entry = dataclasses.replace(
        ENTRY,
        name="mobilenetv2_lgc_cifar100.test",
        file=file.name,
        bytes=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
    )
    record = publish._training_record(ENTRY)
    monkeypatch.setattr(pretrained, "WEIGHTS_DIR", file.parent)
    monkeypatch.setattr(publish, "_training_record", lambda _: record)
    return build_folder(entry, tmp_path / "learned")


def test_a_learned_network_is_published_condensed_and_loads_in_both_forms(learned_folder):
    name = f"local-dir:{learned_folder}"
    assert json.loads((learned_folder / "config.json").read_text())["model_args"] == {"condensed": True}
    condensed = timm.create_model(name, pretrained=True).eval()
    masked = timm.create_model(name, pretrained=True, condensed=False).eval()
    assert any(isinstance(m, mz.CondensedConv2d) for m in condensed.modules())
    assert any(isinstance(m, mz.LearnedGroupConv2d) for m in masked.modules())
    mz.check_equivalent(masked, condensed, torch.randn(2, 3, 32, 32))
    assert "condensed=False" in (learned_folder / "README.md").read_text()


@pytest.mark.parametrize("kind", ["dense", "learned"])
def test_transformers_loads_the_folder(kind, folder, learned_folder):
    path = folder if kind == "dense" else learned_folder
    wrapped = AutoModelForImageClassification.from_pretrained(path).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = timm.create_model(f"local-dir:{path}", pretrained=True).eval()(x)
    torch.testing.assert_close(wrapped(x).logits.float(), expected, rtol=1e-2, atol=1e-2)
    rows = pipeline("image-classification", model=str(path))(Image.new("RGB", (50, 40), "red"))
    assert rows[0]["label"] in mz.CIFAR100_CLASSES


def test_an_occupied_folder_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(PublishError, match=r"holds mine\.txt already"):
        build_folder(ENTRY, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# Publishing


def test_publish_then_load_in_a_fresh_process(hub, project):
    result = command(hub, project, "publish", ENTRY.model)
    assert result.returncode == 0, result.stderr
    assert "published" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    repository = hub.repositories[REPO]
    assert len(repository.commits) == 2  # the empty repository's and ours
    assert set(repository.commits[-1].files) >= {"model.safetensors", "config.json", "README.md"}
    assert repository.tags == {ENTRY.tag: repository.commits[-1].oid}
    rows = json.loads((project / "mobilenets_zoo" / "weights" / "manifest.json").read_text())
    assert rows[ENTRY.name]["revision"] == repository.commits[-1].oid

    program = f"""
        import timm, torch, mobilenets_zoo
        x = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
        a = timm.create_model("{ENTRY.model}", pretrained=True).eval()
        b = timm.create_model("hf-hub:{REPO}", pretrained=True).eval()
        c = timm.create_model("hf-hub:{REPO}@{ENTRY.tag}", pretrained=True).eval()
        assert "home" in a.pretrained_cfg["file"], a.pretrained_cfg
        assert torch.equal(a(x), b(x)) and torch.equal(a(x), c(x))
        print("equal")
    """
    result = run(hub, project, program, MOBILENETS_ZOO_SOURCE="hub")
    assert result.stdout.strip() == "equal", result.stderr

    again = command(hub, project, "publish", "--all")
    assert again.returncode == 0, again.stderr
    assert "unchanged" in again.stdout
    assert len(repository.commits) == 2


def test_a_changed_weight_under_an_unchanged_tag_is_refused(published, project):
    repository = published.repositories[REPO]
    files = dict(repository.commits[-1].files)
    files["model.safetensors"] = files["model.safetensors"][:-1] + b"\1"
    repository.tags[ENTRY.tag] = repository.commit(files)
    result = command(published, project, "publish", ENTRY.model)
    assert result.returncode == 2
    assert "a new training needs a new tag" in result.stderr.splitlines()[-1]
    assert len(repository.commits) == 2


def test_dry_run_writes_and_uploads_nothing(hub, project, tmp_path):
    result = command(hub, project, "publish", ENTRY.model, "--dry-run", str(tmp_path / "out"), "--namespace", "me")
    assert result.returncode == 0, result.stderr
    assert f"hf-hub:me/{ENTRY.model}" in (tmp_path / "out" / "README.md").read_text()
    assert hub.requests == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "NAME of a model or --all"), ([ENTRY.model, "--all"], "or --all"), (["nonsense"], "no model 'nonsense'")],
)
def test_bad_arguments_are_one_line(hub, project, arguments, message):
    result = command(hub, project, "publish", *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_login_is_explained(hub, project):
    result = command(hub, project, "publish", ENTRY.model, token="hf_wrong")
    assert result.returncode == 2
    assert "log in with `hf auth login`" in result.stderr.splitlines()[-1]
    assert "hf_wrong" not in result.stdout + result.stderr


# Downloading

LOAD = f"""
    import sys, timm, mobilenets_zoo
    try:
        model = timm.create_model("{ENTRY.model}", pretrained=True)
    except mobilenets_zoo.WeightsError as error:
        print("error:", error)
    else:
        print("bundled" if "weights" in model.pretrained_cfg["file"] else "hub")
"""
UNREACHABLE = {
    "no repository": "404",
    "401": "401",
    "403": "403",
    "no revision": "404",
    "no file": "404",
    "500": "500",
    "503": "503",
    "silent": "can't be downloaded",
    "cut": "can't be downloaded",
    "shorter": "truncated",
    "longer": "is another file",
    "etag": "'../../../outside'",
    "commit": "'../../outside'",
}


def load(hub, project: Path, source: str, **kwargs) -> str:
    result = run(hub, project, LOAD, MOBILENETS_ZOO_SOURCE=source, **kwargs)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("fault", [None, "slow"])
def test_a_working_hub(published, project, fault):
    published.fault = fault
    publish_revision(project, published.revision)
    assert load(published, project, "hub") == "hub"
    published.requests.clear()
    assert load(published, project, "auto") == "hub"
    asked = [request for request in published.requests if "resolve" in request]
    assert not asked  # a pinned commit in the cache needs no request


@pytest.mark.parametrize("fault", UNREACHABLE)
def test_a_hub_out_of_reach(published, project, fault, tmp_path):
    published.fault = fault
    publish_revision(project, published.revision)
    out = load(published, project, "hub")
    assert out.startswith("error: ")
    assert UNREACHABLE[fault] in out
    assert "MOBILENETS_ZOO_SOURCE=bundled" in out
    assert len(out.splitlines()) == 1
    assert load(published, project, "auto") == "bundled"
    assert not list(tmp_path.rglob("outside*"))  # what a server says never names a file outside the cache


def test_altered_bytes_are_an_error_and_never_replaced(published, project):
    published.fault = "altered"
    publish_revision(project, published.revision)
    for source in ("hub", "auto"):
        out = load(published, project, source)
        assert out.startswith("error: ")
        assert "is altered: its" in out
        assert ENTRY.sha256 in out
    # Doing what the message says helps.
    path = out.split("error: ")[1].split(" is altered")[0]
    Path(path).unlink()
    published.fault = None
    assert load(published, project, "hub") == "hub"


def test_a_redirect_to_other_bytes_is_refused(published, project):
    published.fault = "redirect"
    publish_revision(project, published.revision)
    assert load(published, project, "hub").startswith("error: ")
    assert load(published, project, "auto") == "bundled"


def test_a_full_disk(published, project):
    """Files may not grow beyond 100,000 bytes, less than the weight has."""
    publish_revision(project, published.revision)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    for source, expected in (("hub", "can't be downloaded"), ("auto", "bundled")):
        result = run(published, project, limit + textwrap.dedent(LOAD), MOBILENETS_ZOO_SOURCE=source)
        assert expected in result.stdout, result.stderr


def test_transformers_loads_the_repository(published, project):
    program = f"""
        import timm, torch, mobilenets_zoo
        from transformers import AutoModelForImageClassification
        x = torch.linspace(-2, 2, 3 * 32 * 32).reshape(1, 3, 32, 32)
        wrapped = AutoModelForImageClassification.from_pretrained("{REPO}").eval()
        model = timm.create_model("{ENTRY.model}", pretrained=True).eval()
        torch.testing.assert_close(wrapped(x).logits.float(), model(x), rtol=1e-2, atol=1e-2)
        print("equal")
    """
    result = run(published, project, program)
    assert result.stdout.strip() == "equal", result.stderr


def test_offline_with_and_without_cache(published, project):
    publish_revision(project, published.revision)
    assert "can't be downloaded" in load(published, project, "hub", HF_HUB_OFFLINE="1")
    assert load(published, project, "auto", HF_HUB_OFFLINE="1") == "bundled"
    assert load(published, project, "hub") == "hub"
    assert load(published, project, "hub", HF_HUB_OFFLINE="1") == "hub"


def test_a_cache_folder_that_cannot_be_written(published, project, tmp_path):
    """A file where the folder should be: refused for every user, root too."""
    publish_revision(project, published.revision)
    (tmp_path / "occupied").write_text("")
    home = tmp_path / "occupied"
    assert "can't be downloaded" in load(published, project, "hub", home=home)
    assert load(published, project, "auto", home=home) == "bundled"


def test_a_weight_that_is_not_published(hub, project):
    publish_revision(project, None)
    assert "isn't published" in load(hub, project, "hub")
    assert load(hub, project, "auto") == "bundled"
    assert hub.requests == []


@pytest.mark.slow
def test_ten_processes_at_once(published, project):
    publish_revision(project, published.revision)
    program = f"""
        import subprocess, sys
        code = {textwrap.dedent(LOAD)!r}
        processes = [subprocess.Popen([sys.executable, "-c", code], stdout=-1, text=True) for _ in range(10)]
        print([p.communicate()[0].strip() for p in processes].count("hub"))
    """
    result = run(published, project, program, MOBILENETS_ZOO_SOURCE="hub")
    assert result.stdout.strip() == "10", result.stderr
