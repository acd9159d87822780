"""With the tools that people have: transformers, lm-eval, the hub's model cards, TensorBoard, wandb."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment, metrics, refused, run
from huggingface_hub import ModelCard
from runs import arguments, train_here
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, pipeline

from model import SmolLM2, SmolLM2Config
from train import recompute_layers


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained / "checkpoint-000040"


# ---- transformers, lm-eval


def test_there_and_back_the_tensors_have_the_same_bytes(checkpoint, tmp_path):
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "theirs")
    SmolLM2.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    before, after = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "ours"))
    assert before.keys() == after.keys()
    assert all(before[name].numpy().tobytes() == after[name].numpy().tobytes() for name in before)


def test_a_pipeline_writes_what_sample_writes(checkpoint):
    theirs = pipeline("text-generation", str(checkpoint), max_new_tokens=30, do_sample=False)("7: A cat")
    how = "--max_new_tokens=30", "--temperature=0", "--dtype=float32"
    ours = run("sample.py", f"--model={checkpoint}", "--prompt=7: A cat", *how)
    assert ours.rstrip("\n") == theirs[0]["generated_text"]


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
def test_lm_eval_reads_a_checkpoint(checkpoint, tmp_path):
    questions = [{"question": f"{number}: A cat sees a mouse. Her bird hears"} for number in range(10)]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    (tmp_path / "talk.yaml").write_text(TASK.format(folder=tmp_path, right="the sun", wrong="zqx jkv"))
    options = f"--model hf --model_args pretrained={checkpoint} --tasks talk --include_path {tmp_path} --device cpu"
    line = [sys.executable, "-m", "lm_eval", *options.split(), "--output_path", str(tmp_path / "results")]
    offline = environment(HF_HUB_OFFLINE=1, HF_HOME=tmp_path / "cache")
    done = subprocess.run(line, capture_output=True, text=True, env=offline)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["talk"]["acc,none"] == 1.0


# ---- The model card, and publishing


def test_a_checkpoint_says_what_it_is(checkpoint, trained, data):
    card, last = ModelCard.load(checkpoint / "README.md"), metrics(trained)[-1]
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.widget == [{"text": "Once upon a time"}]
    assert card.data.datasets is None and card.data.base_model is None and "from the weights" not in card.content
    shard = json.loads((data / "shard-00000.json").read_text())
    parameters = sum(parameter.numel() for parameter in SmolLM2.from_pretrained(checkpoint).parameters())
    for fact in (parameters, shard["train"]["tokens"], 40 * 256):
        assert f"{fact:,}" in card.content
    for fact in (last["loss"], last["val_loss"], last["val_bpb"]):
        assert f"{fact:.4f}" in card.content
    settings = json.loads(re.search("```json\n(.*?)```", card.content, re.DOTALL)[1])
    assert settings["learning_rate"] == 0.01 and settings["model"]["hidden_size"] == 32
    assert "talk.jsonl" in card.content
    for folder in (trained.parent, Path(shard["source"]).parent, data):  # what is on this machine stays there
        assert str(folder) not in card.content


def test_a_prompt_of_any_characters_is_in_the_card(data, tmp_path):
    prompt = 'An "elephant" \N{ELEPHANT}, a\x7fb, c\x85d, e\u2028f'
    train_here(data, tmp_path / "run", "--max_steps=1", f"--sample_prompt={prompt}")
    card = ModelCard.load(tmp_path / "run" / "checkpoint-000001" / "README.md")
    assert card.data.widget == [{"text": prompt}]


@pytest.mark.slow
def test_a_checkpoint_is_published_and_read_back(checkpoint, hub):
    (upload,) = re.findall(r"`(hf upload .*--exclude=trainer_state\.pt)`", (ROOT / "README.md").read_text())
    name, line = upload.split()[2], re.sub(r"\S+/checkpoint-\d+", str(checkpoint), upload).split()
    hf, env = Path(sys.executable).with_name("hf"), environment(HF_TOKEN="secret", **hub.environment)
    done = subprocess.run([hf, *line[1:]], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    published = {path.name for path in (hub.folder / "models" / name).iterdir()}
    assert published == {path.name for path in checkpoint.iterdir()} - {"trainer_state.pt"}
    how = ("--prompt=7: A cat", "--max_new_tokens=20")
    assert run("sample.py", f"--model={name}", *how, **hub.environment) == run(
        "sample.py", f"--model={checkpoint}", *how
    )


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
        assert shown.keys() == written.keys() if name == "tokens_per_second" else shown == pytest.approx(written)


@pytest.mark.slow
def test_wandb_offline(tmp_path, data):
    out = tmp_path / "run"
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": tmp_path}
    for steps in (2, 4):
        resumed = arguments(data, out, "--log_to=wandb", "--save_interval=2", "--resume=True")
        run("train.py", *resumed, f"--max_steps={steps}", **offline)
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


@pytest.mark.parametrize(
    ("module", "script", "args"),
    [
        ("tensorboard", "train.py", ["--log_to=tensorboard"]),
        ("wandb", "train.py", ["--log_to=wandb"]),
        ("matplotlib", "tools.plot", ["{trained}"]),
        ("gradio", "tools.demo", []),
    ],
)
def test_an_optional_package_that_is_missing_is_named(module, script, args, tmp_path, trained, data):
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError('No module named {module}', name='{module}')")
    args = arguments(data, tmp_path / "out", *args) if script == "train.py" else args
    sentence = refused(script, *(arg.format(trained=trained) for arg in args), PYTHONPATH=tmp_path)
    assert f"pip install {module}" in sentence and len(sentence.strip().splitlines()) == 1


# ---- Small GPUs


def test_activations_that_are_computed_again_change_nothing_but_rounding(tmp_path, data, trained):
    again = ("--max_steps=4", "--sample_interval=2", "--recompute_activations=True")
    run("train.py", *arguments(data, tmp_path, *again))
    kept, again = ([line["loss"] for line in metrics(folder)[1:5]] for folder in (trained, tmp_path))
    assert again == pytest.approx(kept, rel=1e-4) and len(set(again)) == 4


def test_activations_that_are_computed_again_are_not_kept():
    shape = dict(hidden_size=48, intermediate_size=128, num_attention_heads=3, num_key_value_heads=1)
    model, tokens = SmolLM2(SmolLM2Config(vocab_size=64, **shape)), torch.zeros(2, 64, dtype=torch.long)

    def kept():
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model(tokens, tokens)
        return sum(sizes)

    before = kept()
    recompute_layers(model)
    assert kept() < before / 5
