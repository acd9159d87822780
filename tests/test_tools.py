"""With the tools that people have: transformers, lm-eval, the hub's model cards, TensorBoard, wandb."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from plumbing.card import sample_prompt

import pytest
import torch
from conftest import ROOT, SMALL, environment, metrics, refused, run
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, pipeline

from model import SmolLM2, SmolLM2Config


def arguments(data, out, *args):
    return [*SMALL, f"--data_dir={data}", f"--out_dir={out}", *args]


# ---- transformers


def test_there_and_back_the_tensors_have_the_same_bytes(trained, tmp_path):
    checkpoint = trained / "checkpoint-000040"
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "theirs")
    SmolLM2.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)


def test_a_pipeline_writes_what_sample_writes(trained):
    checkpoint = str(trained / "checkpoint-000040")
    theirs = pipeline("text-generation", checkpoint, max_new_tokens=30, do_sample=False)("7: A cat")
    ours = run(
        "sample.py",
        f"--model={trained}",
        "--prompt=7: A cat",
        "--max_new_tokens=30",
        "--temperature=0",
        "--dtype=float32",
    )
    assert ours.rstrip("\n") == theirs[0]["generated_text"]


# ---- lm-eval

TASK = """
task: talk
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/talk.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{right}", "{wrong}"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


@pytest.mark.slow
def test_lm_eval_reads_a_checkpoint(trained, tmp_path):
    questions = [{"question": f"{number}: A cat sees a mouse. Her bird hears"} for number in range(10)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "talk.yaml").write_text(TASK.format(folder=tmp_path, right="the sun", wrong="zqx jkv"))
    arguments = [
        "--model",
        "hf",
        "--model_args",
        f"pretrained={trained / 'checkpoint-000040'}",
        "--tasks",
        "talk",
        "--include_path",
        tmp_path,
        "--device",
        "cpu",
        "--output_path",
        tmp_path / "results",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(HF_HUB_OFFLINE=1, HF_HOME=tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["talk"]["acc,none"] == 1.0


# ---- The model card


def test_a_checkpoint_says_what_it_is(trained, data):
    path = trained / "checkpoint-000040" / "README.md"
    card, last = ModelCard.load(path), metrics(trained)[-1]
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "text-generation"
    assert sample_prompt(path.parent) == "Once upon a time" and sample_prompt(data) is None
    assert card.data.datasets is None and card.data.base_model is None
    shard = json.loads((data / "shard-00000.json").read_text())
    model = SmolLM2.from_pretrained(trained)
    for fact in (sum(parameter.numel() for parameter in model.parameters()), shard["train"]["tokens"], 40 * 256):
        assert f"{fact:,}" in card.content
    for fact in (last["loss"], last["val_loss"], last["val_bpb"]):
        assert f"{fact:.4f}" in card.content
    settings = json.loads(re.search("```json\n(.*?)```", card.content, re.DOTALL)[1])
    assert settings["learning_rate"] == 0.01 and settings["model"]["hidden_size"] == 32
    assert "talk.jsonl" in card.content and str(trained.parent) not in card.content
    assert str(Path(shard["source"]).parent) not in card.content and str(data) not in card.content


@pytest.mark.slow
def test_a_checkpoint_is_published_and_read_back(trained, hub):
    upload = next(
        line for line in (ROOT / "README.md").read_text().splitlines() if "--exclude=trainer_state.pt" in line
    )
    upload = upload.replace("out/smollm2/checkpoint-001000", str(trained / "checkpoint-000040"))
    hf = Path(sys.executable).with_name("hf")
    done = subprocess.run(
        [hf, *upload.split()[1:]], env=environment(HF_TOKEN="secret", **hub.environment), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    published = {path.name for path in (hub.folder / "models" / "NAME" / "smollm2-135m-mine").iterdir()}
    assert published == {path.name for path in (trained / "checkpoint-000040").iterdir()} - {"trainer_state.pt"}
    arguments = ("--prompt=7: A cat", "--max_new_tokens=20")
    read_back = run("sample.py", "--model=NAME/smollm2-135m-mine", *arguments, **hub.environment)
    assert read_back == run("sample.py", f"--model={trained}", *arguments)


# ---- Watching a run


def test_tensorboard_has_the_metrics_also_of_a_resumed_run(tmp_path, data):
    resumed = arguments(data, tmp_path, "--log_to=tensorboard", "--save_interval=2", "--resume=True")
    run("train.py", *resumed, "--max_steps=4")
    shutil.rmtree(tmp_path / "checkpoint-000004")
    run("train.py", *resumed, "--max_steps=6")
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("loss", "val_loss", "learning_rate", "tokens_per_second"):
        written = {line["step"]: line[name] for line in metrics(tmp_path) if line.get(name) is not None}
        shown = {event.step: event.value for event in events.Scalars(name)}
        assert len(shown) == len(events.Scalars(name))
        if name == "tokens_per_second":
            assert shown.keys() == written.keys()
        else:
            assert shown == pytest.approx(written)


@pytest.mark.slow
def test_wandb_offline(tmp_path, data):
    out = tmp_path / "run"
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": tmp_path}
    resumed = arguments(data, out, "--log_to=wandb", "--save_interval=2", "--resume=True")
    run("train.py", *resumed, "--max_steps=2", **offline)
    run("train.py", *resumed, "--max_steps=4", **offline)
    first, second = sorted(out.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name == f"run-{(out / 'wandb_id.txt').read_text()}.wandb"
    for file, steps in ((first, {0, 1, 2}), (second, {3, 4})):
        rows = wandb_history(file)
        assert {row["step"] for row in rows} == steps
        losses = {line["step"]: line["loss"] for line in metrics(out) if line["step"] in steps - {0}}
        assert {row["step"]: row["loss"] for row in rows if row["step"]} == pytest.approx(losses)


def wandb_history(file):
    """The lines that an offline run has on disk: a header of 7 bytes, then records in the format of LevelDB's log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, rows = file.read_bytes(), 7, []
    assert len(data) < 2**15  # one block of that format
    while place + 7 < len(data):  # checksum, length, kind
        end = place + 7 + int.from_bytes(data[place + 4 : place + 6], "little")
        record, place = Record.FromString(data[place + 7 : end]), end
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in items})
    return rows


# ---- What is missing


@pytest.mark.parametrize(
    ("module", "script", "args"),
    [
        ("tensorboard", "train.py", ["--log_to=tensorboard"]),
        ("wandb", "train.py", ["--log_to=wandb"]),
        ("matplotlib", "tools.plot", ["{trained}"]),
        ("gradio", "tools.demo", ["--model={trained}"]),
        ("transformers", "tools.bench", ["train"]),
    ],
)
def test_an_optional_package_that_is_missing_is_named(module, script, args, tmp_path, trained, data):
    (tmp_path / f"{module}.py").write_text(f"raise ImportError('No module named {module}')")
    args = arguments(data, tmp_path / "out", *args) if script == "train.py" else args
    args = [arg.format(trained=trained) for arg in args]
    wanted = "pip install -r requirements-dev.txt" if script == "tools.bench" else f"pip install {module}"
    sentence = refused(script, *args, PYTHONPATH=tmp_path, WANDB_MODE="offline")
    assert wanted in sentence and len(sentence.strip().splitlines()) == 1


# ---- Small GPUs


def test_activations_that_are_computed_again_change_nothing_but_rounding(tmp_path, data):
    for name in ("kept", "again"):
        changed = ("--max_steps=4", "--sample_interval=2", f"--recompute_activations={name == 'again'}")
        run("train.py", *arguments(data, tmp_path / name, *changed))
    kept, again = ([line["loss"] for line in metrics(tmp_path / name)] for name in ("kept", "again"))
    assert kept[1:] == pytest.approx(again[1:], rel=1e-4) and len(set(kept)) == 5


def test_activations_that_are_computed_again_are_not_kept():
    def kept(model):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(torch.zeros(2, 64, dtype=torch.long), torch.zeros(2, 64, dtype=torch.long))
        return sum(sizes)

    model = SmolLM2(
        SmolLM2Config(
            vocab_size=64, hidden_size=48, intermediate_size=128, num_attention_heads=3, num_key_value_heads=1
        )
    )
    before = kept(model)
    model.recompute = True
    assert kept(model) < before / 5
