from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import tiny_state, write_adapter_folder, write_model
from safetensors.torch import load_file
from typer.testing import CliRunner

from dirmerge import __version__, api, doctor
from dirmerge.cli import app
from dirmerge.engine.compute import Compute
from dirmerge.engine.result import compute_text

BASE = tiny_state()


@pytest.fixture
def models(tmp_path):
    """Folders base, a, b and recipe.yml, which merges a and b."""
    write_model(tmp_path / "base", BASE)
    for seed, name in enumerate("ab", 1):
        write_model(tmp_path / name, tiny_state(seed, base=BASE))
    write_recipe(tmp_path, "a", "b")
    return tmp_path


def write_recipe(folder, *names, **keys):
    plain = {
        "merge_method": "tsv_m",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in names],
    } | keys
    (folder / "recipe.yml").write_text(yaml.safe_dump(plain))


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_merge_writes_what_the_api_writes(models):
    done = call("merge", models / "recipe.yml", "--out", models / "out")
    assert done.exit_code == 0, done.stderr
    assert "tsv_m" in done.stdout
    assert "default of tsv_m for full fine-tunes" in done.stdout
    assert "peak memory" in done.stdout
    api.merge(models / "recipe.yml", models / "api")
    found, expected = (load_file(models / name / "model.safetensors") for name in ("out", "api"))
    assert all(torch.equal(found[name], expected[name]) for name in BASE)


def test_json_log_is_one_object_per_line(models):
    done = call("merge", models / "recipe.yml", "--out", models / "out", "--log", "json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == ["plan", *["tensor"] * (len(events) - 2), "done"]
    assert {event["name"] for event in events[1:-1]} == BASE.keys()
    assert events[-1]["scale"] > 0
    assert len(events[-1]["tensors"]) == len(BASE)


def test_plan_reads_no_weight_and_writes_nothing(models):
    weights = models / "a" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-400:] = b"\xff" * 400  # NaN: a plan must not see it
    weights.write_bytes(content)
    before = sorted(models.rglob("*"))
    done = call("plan", models / "recipe.yml")
    assert done.exit_code == 0
    for text in (
        "layers.*.attn.q_proj.weight",
        "16×16",
        "merge",
        "2 dense",
        "tables of vectors such as lm_head",
    ):
        assert text in done.stdout
    assert sorted(models.rglob("*")) == before
    plan = json.loads(call("plan", models / "recipe.yml", "--json").stdout)
    assert {tensor["name"] for tensor in plan["tensors"]} == BASE.keys()
    assert plan["totals"]["parameters"] == sum(value.numel() for value in BASE.values())
    assert call("merge", models / "recipe.yml", "--out", models / "out").exit_code == 7


def test_adapter_as_output(models):
    write_adapter_folder(models / "x", rank=2)
    write_adapter_folder(models / "y", rank=2, seed=1)
    write_recipe(models, "x", "y")
    done = call("merge", models / "recipe.yml", "--out", models / "out", "--as", "adapter", "--rank", 3)
    assert done.exit_code == 0, done.stderr
    assert json.loads((models / "out" / "adapter_config.json").read_text())["r"] == 3


def test_shard_size_and_overwrite(models):
    assert call("merge", models / "recipe.yml", "--out", models / "out").exit_code == 0
    again = call("merge", models / "recipe.yml", "--out", models / "out")
    assert again.exit_code == 6
    assert "--overwrite" in again.stderr
    options = ("--overwrite", "--shard-size", "4KB")
    assert call("merge", models / "recipe.yml", "--out", models / "out", *options).exit_code == 0
    assert (models / "out" / "model.safetensors.index.json").is_file()
    assert not (models / "out" / "model.safetensors").exists()
    assert (
        call("merge", models / "recipe.yml", "--out", models / "o", "--shard-size", "4 apples").exit_code == 2
    )


def break_recipe(models):
    write_recipe(models, "a", tensor=[])
    return "tensor: unknown key; did you mean 'tensors'?"


def break_file(models):
    path = models / "b" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    return "b/model.safetensors"


def break_shapes(models):
    state = tiny_state(2, base=BASE)
    del state["norm.weight"]
    write_model(models / "b", {**state, "lm_head.weight": torch.zeros(33, 16)})
    return '- {match: "lm_head.weight", rule: common_rows}'


def break_values(models):
    state = tiny_state(2, base=BASE)
    state["norm.weight"][3] = float("nan")
    write_model(models / "b", state)
    return "b/model.safetensors: tensor 'norm.weight' holds NaN or Inf"


@pytest.mark.parametrize(
    ("breakage", "code"), [(break_recipe, 3), (break_file, 4), (break_shapes, 5), (break_values, 7)]
)
def test_errors_are_sentences_with_their_exit_code(models, breakage, code):
    expected = breakage(models)
    done = call("merge", models / "recipe.yml", "--out", models / "out")
    assert done.exit_code == code
    assert expected in done.stderr
    assert done.stderr.startswith("dirmerge: ")
    assert "Traceback" not in done.stderr
    assert not done.stdout
    assert sorted(path.name for path in models.iterdir()) == ["a", "b", "base", "recipe.yml"]
    machine = call("merge", models / "recipe.yml", "--out", models / "out", "--log", "json")
    event = json.loads(machine.stdout.splitlines()[-1])
    assert (event["event"], event["exit_code"]) == ("error", code)
    assert expected in event["message"]


def test_wrong_usage(models):
    assert call("merge", models / "recipe.yml").exit_code == 2
    assert call("plan", models / "recipe.yml", "--as", "something").exit_code == 2
    assert call("mrege").exit_code == 2


def test_doctor():
    done = call("doctor")
    assert done.exit_code == 0
    for text in ("torch", "lowrank_add", "float32", f"{__version__}"):
        assert text in done.stdout
    report = json.loads(call("doctor", "--json").stdout)
    assert report["versions"]["torch"] == torch.__version__
    assert {row["op"] for row in report["backends"]} >= {"delta", "elect_merge", "lowrank_add"}
    assert report["compute"] == Compute.resolve().to_dict()
    assert compute_text(report["compute"]) in done.stdout
    assert 0 < report["host"]["usable_processors"] <= report["host"]["processors"]
    assert 0 < report["host"]["available_memory"] < report["host"]["memory"]
    assert len(report["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)


def test_doctor_lists_every_gpu(monkeypatch):
    """Two cards that are not there; the driver does not tell the second one's memory."""
    names = ["Card A", "Card B"]

    def memory(device):
        if device == 1:
            raise RuntimeError("out of memory\nand more lines")
        return 30 * 10**9, 80 * 10**9

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[getattr(device, "index", device)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(doctor, "table", list)  # the backends ask the driver
    report = json.loads(call("doctor", "--json").stdout)
    assert report["compute"]["devices"] == ["cuda:0 (Card A)", "cuda:1 (Card B)"]
    assert "every GPU that is visible" in report["compute"]["reason"]
    first = {"device": "cuda:0", "name": "Card A", "capability": "9.0"}
    assert report["gpus"][0] == first | {"free_memory": 30 * 10**9, "memory": 80 * 10**9}
    assert report["gpus"][1]["error"] == "out of memory"
    text = call("doctor").stdout
    assert "Card A, compute capability 9.0, 30.0 GB free of 80.0 GB" in text
    assert "Card B, compute capability 9.0, out of memory" in text
    assert not any("everything runs on the CPU" in line for line in report["advice"])


def test_doctor_says_why_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    assert f"torch {torch.__version__} is built without CUDA: everything runs on the CPU" in advice()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "torch sees no GPU, with CUDA_VISIBLE_DEVICES='': everything runs on the CPU" in advice()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert any("nvidia-smi tells whether the driver does" in line for line in advice())


def advice():
    return json.loads(call("doctor", "--json").stdout)["advice"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_inspect_shows_where_it_ran_and_refuses_a_gpu_that_is_not_there(models):
    done = call("inspect", models / "recipe.yml", "--device", "cpu", "--threads", 1)
    assert "cpu (asked for), 1 threads" in done.stdout
    done = call("inspect", models / "recipe.yml", "--device", "cuda", "--html", models / "page.html")
    assert done.exit_code == 2
    text = " ".join(done.stderr.replace("│", " ").split())
    assert "device 'cuda' was asked for, but torch sees no CUDA device" in text
    assert not (models / "page.html").exists()


def test_demo_without_its_packages_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("dirmerge.demo")]:
        monkeypatch.delitem(sys.modules, name)
    import dirmerge

    monkeypatch.delattr(dirmerge, "demo", raising=False)
    done = call("demo")
    assert done.exit_code == 1
    assert "pip install 'dirmerge[demo]'" in done.stderr


def test_module_and_version():
    done = subprocess.run(
        [sys.executable, "-m", "dirmerge", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"dirmerge {__version__}"


def test_progress_in_a_log_is_a_line_every_ten_seconds(capsys):
    from dirmerge.cli.progress import ProgressLines
    from dirmerge.engine.result import Progress

    now = [0.0]
    lines = ProgressLines(lambda: now[0])
    for second in range(1, 31):
        now[0] = float(second)
        lines(Progress("write", f"t{second}", second, 60, second * 10**6, 60 * 10**6, second / 60))
    assert capsys.readouterr().err.splitlines() == [
        "write: 10/60 tensors, 17 %, 10.0 MB/60.0 MB written, 10 s, about 50 s left",
        "write: 20/60 tensors, 33 %, 20.0 MB/60.0 MB written, 20 s, about 40 s left",
        "write: 30/60 tensors, 50 %, 30.0 MB/60.0 MB written, 30 s, about 30 s left",
    ]


def test_sigterm_leaves_nothing(models):
    code = (
        "import os, signal, sys\n"
        "from dirmerge.engine import merged_rows\n"
        "def stop(*_):\n    os.kill(os.getpid(), signal.SIGTERM)\n"
        "merged_rows.UpdatedRows.make = stop\n"
        "from dirmerge.cli import main\n"
        "main()\n"
    )
    before = {path.name for path in models.iterdir()}
    arguments = ["merge", str(models / "recipe.yml"), "--out", str(models / "out")]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 143, done.stderr
    assert "terminated, nothing was written" in done.stderr
    assert {path.name for path in models.iterdir()} == before
