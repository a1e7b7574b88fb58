"""The command line, called as users call it."""

import importlib.util
import json
import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ALL_MODELS, ROOT, with_random_masks
from PIL import Image
from rich.console import Console

import mobilenets_zoo as mz
import mobilenets_zoo_cli as cli
from mobilenets_zoo import catalogue, pretrained

ENTRY = pretrained.default_entry("mobilenetv2_lgc_cifar100")


def one_line_error(err: str) -> str:
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def photo(tmp_path):
    """A smooth 100x60 picture; what it shows doesn't matter."""
    y, x = np.mgrid[0:60, 0:100]
    pixels = np.stack([x * 2, y * 4, 255 - x * 2], -1).astype(np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    return path


def test_list_shows_all_models(run):
    code, out, err = run("list")
    assert (code, err) == (0, "")
    assert all(name in out for name in ALL_MODELS)
    assert f"{ENTRY.top1:.2f}" in out
    code, out, err = run("list", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert set(rows) == set(ALL_MODELS)
    assert rows["mobilenetv2_lgc_cifar100"]["params"] == 1_073_796
    assert rows[ENTRY.model]["weights"]["sha256"] == ENTRY.sha256


@pytest.mark.parametrize("name", [*ALL_MODELS, "mobilenetv2_t1_cifar100.sgd_e24_r32"])
def test_info(run, name):
    code, out, err = run("info", name)
    assert (code, err) == (0, "")
    assert name in out
    document = json.loads(run("info", name, "--json")[1])
    assert document["name"] == name
    assert document["input_size"] == [3, 32, 32]
    entry = pretrained.default_entry(name)
    assert name in (entry.name, entry.model)
    assert {key: getattr(entry, key) for key in document["weights"]} == document["weights"]


@pytest.mark.parametrize(("width", "columns"), [(80, 6), (60, 4), (40, 2), (20, 1)])
def test_list_shows_whole_names_at_any_width(run, monkeypatch, width, columns):
    monkeypatch.setattr(cli, "_console", lambda: Console(width=width))
    _, out, _ = run("list")
    assert max(map(len, out.splitlines())) <= width
    assert width < 30 or all(name in out for name in ALL_MODELS)
    assert {line.count("│") for line in out.splitlines() if "│" in line} == ({columns - 1} if columns > 1 else set())
    words = " ".join(out.split())
    assert "…" not in words
    assert f"on one thread of {json.loads(run('list', '--json')[1])[0]['processor']}" in words


def test_info_cuts_nothing_and_lists_all_tags(run, monkeypatch):
    monkeypatch.setattr(cli, "_console", lambda: Console(width=30))
    _, out, _ = run("info", "mobilenetv2_t1_cifar100")
    entry = pretrained.default_entry("mobilenetv2_t1_cifar100")
    assert entry.sha256 in out
    assert f"{entry.tag}, sgd_e24_r32" in out


def test_times_belong_to_the_weights_that_were_timed(run, monkeypatch):
    name = "mobilenetv2_t1_cifar100"
    row = dict(params=855_108, macs=77_128_704, optimized_macs=70_000_000, ms=2.5, weight=f"{name}.kd_cutmix_e90_r32")
    row["processor"] = "a processor"
    monkeypatch.setattr(catalogue, "_rows", lambda: dict.fromkeys(ALL_MODELS, row))
    assert "70,000,000" in run("info", name)[1]
    line = next(line for line in run("list")[1].splitlines() if name in line)
    assert [cell.strip() for cell in line.split("│")[2:]] == ["2.50", "0.855", "77.1", "70.0"]
    assert run("info", f"{name}.sgd_e24_r32")[1].count("not measured") == 3


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory):
    """A folder as fine-tuning leaves it: two classes, condensed weights."""
    folder = tmp_path_factory.mktemp("fine_tuned")
    model = with_random_masks(timm.create_model("mobilenetv2_lgc_cifar100", num_classes=2))
    cfg = {"label_names": ["cat", "dog"], "model_args": {"condensed": True}}
    timm.models.save_for_hf(mz.condense(model), folder, model_config=cfg, safe_serialization=True)
    return f"local-dir:{folder}"


def test_a_folder_is_a_name(run, photo, fine_tuned):
    document = json.loads(run("predict", photo, "--model", fine_tuned, "--json")[1])
    assert document["model"] == fine_tuned
    assert {row["class"] for row in document["images"][0]["predictions"]} == {"cat", "dog"}
    document = json.loads(run("info", fine_tuned, "--json")[1])
    assert (document["params"], document["weights"]) == (1_073_796 - 98 * 1281, None)
    assert (document["architecture"], document["classes"]) == ("mobilenetv2_lgc_cifar100", 2)
    assert fine_tuned in run("info", fine_tuned)[1]


def test_info_of_masks_that_are_not_finished(run, tmp_path):
    timm.models.save_for_hf(timm.create_model("mobilenetv2_lgc_cifar100"), tmp_path, safe_serialization=True)
    code, text, err = run("info", f"local-dir:{tmp_path}", "--json")
    assert code == 0, err
    assert json.loads(text)["macs"] == 300_913_664


def test_somebody_elses_models_are_not_the_zoos(monkeypatch):
    monkeypatch.setattr(catalogue.timm, "list_models", lambda pattern: ["mobilenetv1_cifar100", "resnet18"])
    assert catalogue.model_names() == ["mobilenetv1_cifar100"]


def test_demo_classifies_a_photo_of_scikit_image(run, monkeypatch):
    code, out, err = run("predict", "--demo", "--top", 3)
    assert (code, err) == (0, "")
    assert out.count(" % ") == 3
    assert "rocket.jpg" in out
    assert re.search(rf"{catalogue.best_model()}\.\w+ in [\d.]+ ms", out)
    assert re.search(r"│ rocket +│", out)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, out, err = run("predict", "--demo")
    assert (code, out) == (2, "")
    assert "run pip install scikit-image" in one_line_error(err)


def test_python_m_runs_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mobilenets_zoo", "info", "x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("mobilenets_zoo", run_name="__main__")
    assert "there is no model 'x'" in one_line_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["info", "resnet18"], "no model 'resnet18'; see mobilenets-zoo list"),
        (["info", "mobilenetv2_t1_cifar10"], "did you mean mobilenetv2_t1_cifar100 or mobilenetv2_"),
        (["info", "v1_w025"], "did you mean mobilenetv1_w025_cifar100?"),
        (["info", "."], "did you mean local-dir:.?"),
        (["info", ""], "no model ''; see mobilenets-zoo list"),
        (["info", "x" * 300], "; see mobilenets-zoo list"),
        (["info"], "Missing argument"),
        (["nonsense"], "No such command"),
        (["predict"], "give an image file, or --demo"),
        (["predict", "x.png", "--top", "0"], "--top"),
        (["predict", "x.png", "--model", "nonsense"], "no model 'nonsense'"),
        (["evaluate", ENTRY.model], "--data"),
        (["evaluate", ENTRY.model, "--data", "/no/such/folder"], "no such folder"),
        (["evaluate", ENTRY.model, "--data", ".", "--device", "nonsense"], "nonsense"),
        (["evaluate", ENTRY.model, "--data", ".", "--device", "meta"], "the device meta can't be used"),
        (["evaluate", "mobilenetv1_w025_cifar100", "--data", ".", "--condensed"], "leave --condensed out"),
        (["evaluate", "mobilenetv2_t1_cifar100.nope", "--data", "."], "tags are kd_cutmix_e90_r32, sgd_e24_r32"),
        (["info", "local-dir:/no/such/folder"], "Config file not found"),
        (["predict", "x.png", "--model", "local-dir:."], "local-dir:. can't be loaded"),
    ],
)
def test_bad_input_is_one_line_and_code_2(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2
    assert out == ""
    assert message in one_line_error(err)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("predict - --model mobilenetv1_w025_cifar100 <&-", "standard input: is closed; give an image file"),
        ("list >/dev/full", "standard output can't be written: No space left"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a POSIX shell and /dev/full")
def test_closed_and_full_streams_are_one_line(command, message):
    shell = f"{shlex.quote(sys.executable)} -m mobilenets_zoo {command}"
    result = subprocess.run(shell, shell=True, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert message in one_line_error(result.stderr)


def test_names_reach_a_pipe_of_another_encoding(tmp_path, photo):
    path = tmp_path / "\u65e5\u672c.png"
    path.write_bytes(photo.read_bytes())
    command = [sys.executable, "-m", "mobilenets_zoo", "predict", "--model", "mobilenetv1_w025_cifar100", str(path)]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (result.returncode, result.stderr) == (0, "")
    assert "\\u65e5\\u672c.png" in result.stdout


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_needs_no_torch_does_not_wait_for_it(option):
    program = f"""
import sys
from mobilenets_zoo_cli import main
sys.argv = ["mobilenets-zoo", "{option}"]
try:
    main()
finally:
    assert not {{"torch", "timm", "mobilenets_zoo", "numpy"}} & set(sys.modules)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert {"--version": mz.__version__, "--help": "finetune"}[option] in result.stdout


def test_a_network_for_grey_images_is_refused(run, photo, tmp_path):
    grey = timm.create_model("mobilenetv1_w025_cifar100", in_chans=1)
    grey.pretrained_cfg = dict(grey.pretrained_cfg, input_size=(1, 32, 32))
    mz.save_weights(grey, tmp_path / "model.safetensors")
    pretrained.write_config(grey, str(tmp_path / "config.json"))
    code, _, err = run("predict", photo, "--model", f"local-dir:{tmp_path}")
    assert code == 2
    assert "takes images of 1 channel(s)" in one_line_error(err)


def test_a_model_without_weights_is_one_line(run, photo, monkeypatch):
    monkeypatch.setattr(pretrained, "manifest", lambda: {ENTRY.name: ENTRY})
    code, out, err = run("predict", photo, "--model", "mobilenetv2_t4_cifar100")
    assert (code, out) == (2, "")
    assert ENTRY.name in one_line_error(err)


def test_predict_takes_the_most_accurate_network_that_is_fast_enough(run, photo, monkeypatch):
    rows = {row["name"]: row for row in json.loads(run("list", "--json")[1])}
    limit = sorted(row["ms"] for row in rows.values())[len(rows) // 2]
    monkeypatch.setattr(catalogue, "FAST_MS", limit)
    fast = {name: row["weights"]["top1"] for name, row in rows.items() if row["ms"] < limit}
    assert fast
    model = json.loads(run("predict", photo, "--json")[1])["model"]
    assert fast[model.partition(".")[0]] == max(fast.values())


def test_predict_json_agrees_with_the_model(run, photo):
    code, out, err = run("predict", photo, "--model", ENTRY.model, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert document["model"] == ENTRY.name
    rows = document["images"][0]["predictions"]
    assert len(rows) == 5
    probabilities = [row["probability"] for row in rows]
    assert probabilities == sorted(probabilities, reverse=True)
    model = timm.create_model(ENTRY.model, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = model(transform(Image.open(photo))[None]).softmax(1)[0]
    assert rows[0]["label"] == expected.argmax().item()
    assert rows[0]["class"] == mz.CIFAR100_CLASSES[rows[0]["label"]]
    assert rows[0]["probability"] == pytest.approx(expected.max().item(), abs=1e-5)


def top(run, path, **kwargs):
    code, out, err = run("predict", path, "--model", ENTRY.model, "--json", **kwargs)
    assert (code, err) == (0, ""), err
    return json.loads(out)["images"][0]["predictions"]


def test_predict_takes_any_size_and_format(run, tmp_path):
    sizes = {"PNG": (1, 1), "JPEG": (7, 300), "WEBP": (32, 32), "BMP": (2000, 1500)}
    for format_, size in sizes.items():
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / format_, format_)
    code, out, _ = run("predict", *tmp_path.iterdir(), "--json")
    assert code == 0
    assert [len(result["predictions"]) for result in json.loads(out)["images"]] == [5] * 4


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr"])
def test_predict_takes_any_colour_mode(run, tmp_path, photo, mode):
    grey = Image.open(photo).convert("L")
    path = tmp_path / f"image.{'tiff' if mode in ('CMYK', 'I', 'F', 'YCbCr') else 'png'}"
    if mode in ("I;16", "I"):
        values = np.asarray(grey).astype(np.uint16) * 257
        Image.fromarray(values if mode == "I;16" else values.astype(np.int32)).save(path)
    else:
        (grey if mode in ("L", "LA", "1", "F") else Image.open(photo)).convert(mode).save(path)
    rows = top(run, path)
    if mode in ("L", "LA", "I;16", "I", "F"):  # the same grey picture
        grey.save(tmp_path / "grey.png")
        assert rows == top(run, tmp_path / "grey.png")
    assert len(rows) == 5


def test_transparency_becomes_white(run, tmp_path):
    for mode, colour in (("RGBA", (10, 200, 10, 0)), ("RGB", "white")):
        Image.new(mode, (40, 40), colour).save(tmp_path / f"{mode}.png")
    assert top(run, tmp_path / "RGBA.png") == top(run, tmp_path / "RGB.png")


def test_exif_rotation_is_applied_to_standard_input_too(run, tmp_path, photo):
    upright = Image.open(photo)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 270 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    expected = top(run, photo)
    assert top(run, tmp_path / "turned.png") == expected
    assert top(run, "-", stdin=(tmp_path / "turned.png").read_bytes()) == expected


@pytest.mark.parametrize("as_json", [False, True])
def test_a_broken_file_among_several(run, tmp_path, photo, as_json):
    broken = tmp_path / "broken.png"
    broken.write_bytes(photo.read_bytes()[:80])
    code, out, err = run(
        "predict", photo, broken, tmp_path / "missing.png", tmp_path, photo, *(["--json"] if as_json else [])
    )
    assert code == 2
    lines = err.splitlines()
    assert len(lines) == 3
    assert "broken.png: not a readable image" in lines[0]
    assert "missing.png: no such file" in lines[1]
    assert f"{tmp_path}: " in lines[2]  # the system says what is wrong with it
    if as_json:
        assert ["error" in result for result in json.loads(out)["images"]] == [False, True, True, True, False]
    else:
        assert out.count("photo.png") == 2


@pytest.mark.parametrize("as_json", [False, True])
def test_outputs_that_are_not_finite_are_an_error(run, tmp_path, photo, as_json):
    model = timm.create_model("mobilenetv1_w025_cifar100", num_classes=2)
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    cfg = {"label_names": ["cat", "dog"]}
    timm.models.save_for_hf(model, tmp_path / "broken", model_config=cfg, safe_serialization=True)
    options = ["--json"] if as_json else []
    code, _, err = run("predict", photo, "--model", f"local-dir:{tmp_path / 'broken'}", *options)
    assert (code, "outputs aren't finite" in one_line_error(err)) == (2, True)


def test_endless_standard_input_is_one_line(run, monkeypatch):
    monkeypatch.setattr(cli, "MAX_IMAGE_BYTES", 1000)
    code, out, err = run("predict", "-", stdin=bytes(5000))
    assert (code, out) == (2, "")
    assert "standard input: has more than" in one_line_error(err)


@pytest.mark.skipif(sys.platform != "linux", reason="such names don't exist on other systems")
@pytest.mark.parametrize("name", ["line\nbreak.png", "\x1b[31mred.png", "undecodable\udcff.png"])
def test_strange_file_names_are_escaped(run, tmp_path, photo, name):
    (tmp_path / name).write_bytes(photo.read_bytes())
    code, out, err = run("predict", tmp_path / name, tmp_path / f"no{name}")
    assert code == 2
    assert "\x1b" not in out + err
    assert "no such file" in one_line_error(err)
    assert ascii(name)[1:-1].replace("\\'", "'") in out.replace("\n", " ")


@pytest.mark.cifar100
def test_evaluate(run, cifar100, test_images, monkeypatch):
    part = test_images.subset(np.arange(100))
    monkeypatch.setattr(mz.data, "load_images", lambda *_: part)
    code, out, err = run("evaluate", ENTRY.model, "--data", cifar100, "--json")
    assert code == 0, err
    document = json.loads(out)
    assert document["images"] == 100
    assert document["top1"] == pytest.approx(ENTRY.top1, abs=12)
    assert document["top5"] > document["top1"]
    assert len(document["per_class"]) == 100
    assert "100/100" in err  # the progress bar
    code, out, err = run("evaluate", ENTRY.model, "--data", cifar100)
    assert f"{document['top1']:.2f}" in out
    part = test_images.subset(np.arange(50))
    condensed = json.loads(run("evaluate", ENTRY.model, "--data", cifar100, "--json", "--condensed")[1])
    assert condensed["top1"] == json.loads(run("evaluate", ENTRY.model, "--data", cifar100, "--json")[1])["top1"]


def test_start_up_imports_little_beside_timm():
    """Only the packages that a command needs: what export, publishing and training need would cost seconds."""
    program = """
import atexit, sys, timm

def packages():
    return {name.partition(".")[0] for name in sys.modules} - sys.stdlib_module_names

before = packages()
atexit.register(lambda: print(*packages() - before, file=sys.stderr))
from mobilenets_zoo_cli import main
main()
"""
    result = subprocess.run([sys.executable, "-c", program, "list"], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    extra = {name for name in result.stderr.split() if name.isidentifier() and importlib.util.find_spec(name)}
    assert extra == {"mobilenets_zoo", "mobilenets_zoo_cli", "click", "rich"}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such switch")
def test_freed_memory_is_kept_for_the_next_maps():
    code = """
        import resource, torch
        from mobilenets_zoo.utils import keep_freed_memory

        def page_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                torch.ones(2**24)  # 64 MiB
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        print(page_faults(), keep_freed_memory(), page_faults())
    """
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, env=environment
    )
    before, kept, after = run.stdout.split()
    assert kept == "True"
    assert int(after) < int(before) / 2
