"""What the tests share: the scripts as a user runs them, a small corpus, a trained model, a mock hub on loopback."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import hub as mock_hub  # noqa: E402

# A shell lets its background jobs ignore Ctrl-C, and so their children: let the scripts see it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A model that takes milliseconds a step, on the CPU or on another DEVICE.
SMALL = (
    f"--device={os.environ.get('DEVICE', 'cpu')} --deterministic={os.environ.get('DEVICE', 'cpu') != 'cpu'} "
    "--seq_len=32 --micro_batch=4 --batch_tokens=256 --warmup_steps=2 --decay_steps=0 --learning_rate=0.01 "
    "--dtype=float32 --compile=False --log_interval=1 --eval_interval=1000 --eval_tokens=640 "
    "--save_interval=1000 --sample_interval=0 --model.hidden_size=32 --model.intermediate_size=64 "
    "--model.num_hidden_layers=2 --model.num_attention_heads=2 --model.num_key_value_heads=1 "
    "--model.max_position_embeddings=128"
).split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: seconds to a minute; leave these out with -m 'not slow'")


# ---- Running scripts


def environment(**variables):
    """No hub but the test's own: where a test names none, nothing answers."""
    here = {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return os.environ | here | {name: str(value) for name, value in variables.items()}


def command(script, *args, nproc=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    module = ["-m"] if script.startswith("tools.") else []
    return [sys.executable, *launcher, *module, script, *map(str, args)]


def finished(line, **variables):
    """A command that has run in the project's folder, with what it printed."""
    encoding, env = variables.get("PYTHONIOENCODING", "utf-8"), environment(**variables)
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, encoding=encoding, timeout=600)


def run(script, *args, nproc=0, **variables):
    """Run a script of the project as a user does, and return what it printed."""
    done = finished(command(script, *args, nproc=nproc), **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(script, *args, **variables):
    """Run a script that must refuse its input, and return the sentence that it leaves with."""
    done = finished(command(script, *args), **variables)
    assert done.returncode != 0, done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


# ---- Data and models


def metrics(out_dir):
    return [json.loads(line) for line in (Path(out_dir) / "metrics.jsonl").read_text().splitlines()]


def sentences(count, seed=0):
    """Small talk from a small grammar: something a small model learns in a few steps."""
    rng = random.Random(seed)
    who, does, what = (
        ("A cat", "The old dog", "Her bird"),
        ("sees", "hears", "follows"),
        ("a mouse", "3 bees", "the sun"),
    )
    talk = [" ".join(map(rng.choice, (who, does, what))) + "." for _ in range(count * 6)]
    return [f"{number}: " + " ".join(talk[number * 6 : number * 6 + 6]) for number in range(count)]


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def preparing(source, out, tokenizer="train:300", *args):
    """The arguments of prepare.py."""
    return [f"--source={source}", f"--data_dir={out}", f"--tokenizer={tokenizer}", *args]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A jsonl file of 400 documents."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "talk.jsonl", sentences(400))


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory):
    """The corpus, prepared with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("data")
    run("prepare.py", *preparing(corpus, folder), "--val_fraction=0.1")
    return folder


@pytest.fixture(scope="session")
def tokenizer(data):
    return data / "tokenizer.json"


@pytest.fixture(scope="session")
def other_data(tokenizer, tmp_path_factory):
    """Documents of another kind, sums, with the same tokenizer."""
    folder = tmp_path_factory.mktemp("other") / "sums"
    texts = (f"{first} + {first % 7} = {first + first % 7}; " * 9 for first in range(100, 500))
    source = write_jsonl(folder.parent / "sums.jsonl", texts)
    run("prepare.py", *preparing(source, folder, tokenizer), "--val_fraction=0.1")
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A short run on the corpus: the folder, with checkpoints of steps 20 and 40."""
    out, often = tmp_path_factory.mktemp("out") / "run", ("--save_interval=20", "--eval_interval=20")
    run("train.py", *SMALL, f"--data_dir={data}", f"--out_dir={out}", "--max_steps=40", *often)
    return out


# That of SmolLM2's Instruct models, with a shorter message of the system.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\n"
    "Be brief.<|im_end|>\\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture(scope="session")
def instruct(trained, tmp_path_factory):
    """The trained model as an Instruct model on the hub, written by transformers: in bfloat16, in several files, with a
    chat template and an end token of its own."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("instruct") / "SmolLM2-Instruct"
    model = AutoModelForCausalLM.from_pretrained(trained / "checkpoint-000040", dtype="bfloat16")
    model.config.bos_token_id = model.generation_config.bos_token_id = 1
    model.config.eos_token_id = model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size="20KB")
    tokenizer = AutoTokenizer.from_pretrained(trained / "checkpoint-000040")
    tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token = CHAT_TEMPLATE, "<|im_start|>", "<|im_end|>"
    tokenizer.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture
def hub(tmp_path):
    """A mock hub on loopback, with an empty cache to download into: pass hub.environment to a script."""
    server = mock_hub.serve(tmp_path / "hub")
    server.environment = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "cache")}
    yield server
    server.shutdown()
    server.server_close()
