"""What the tests share: the scripts as a user runs them, a small corpus, a tokenizer, a hub on loopback."""

import functools
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

import hub as hub_server  # noqa: E402

signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell lets its background jobs, and their children, ignore it

# A model that takes milliseconds a step, on the CPU or on another DEVICE.
SMALL = (
    f"--device={os.environ.get('DEVICE', 'cpu')} "
    "--seq_len=32 --micro_batch=4 --batch_tokens=256 --warmup_steps=2 --decay_steps=0 --learning_rate=0.01 "
    "--dtype=float32 --compile=False --log_interval=1 --eval_interval=1000 --eval_tokens=640 "
    "--save_interval=1000 --sample_interval=0 --model.hidden_size=32 --model.intermediate_size=64 "
    "--model.num_hidden_layers=2 --model.num_attention_heads=2 --model.num_key_value_heads=1 "
    "--model.max_position_embeddings=128"
).split()


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: seconds to a minute; leave these out with -m 'not slow'")


def environment(**variables):
    """No hub but the test's own: where a test names none, nothing answers."""
    here = {"HF_ENDPOINT": "http://127.0.0.1:9", "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return os.environ | here | {name: str(value) for name, value in variables.items()}


def command(script, *args, nproc=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={nproc}"] if nproc else []
    module = ["-m"] if script.startswith("tools.") else []
    return [sys.executable, *launcher, *module, script, *map(str, args)]


def execute(line, variables):
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    if "FORKED" not in os.environ or "torch.distributed.run" in line or variables:
        env = environment(**variables)
        return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, encoding=encoding, timeout=600)
    done = forks().run(line, ROOT, environment(**variables))
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


@functools.cache
def forks():
    from forked import Forks

    return Forks()


def run(script, *args, nproc=0, **variables):
    """Run a script of the project as a user does, and return what it printed."""
    done = execute(command(script, *args, nproc=nproc), variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(script, *args, **variables):
    """Run a script that must refuse its input, and return the sentence that it leaves with."""
    done = execute(command(script, *args), variables)
    assert done.returncode not in (0, None), done.stdout
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


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


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A jsonl file of 400 documents."""
    path = tmp_path_factory.mktemp("corpus") / "talk.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in sentences(400)))
    return path


@pytest.fixture(scope="session")
def data(corpus, tmp_path_factory):
    """The corpus, prepared with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("data")
    run("prepare.py", f"--source={corpus}", f"--data_dir={folder}", "--tokenizer=train:300", "--val_fraction=0.1")
    return folder


@pytest.fixture(scope="session")
def trained(data, tmp_path_factory):
    """A short run on the corpus: the folder, with checkpoints of steps 20 and 40."""
    out = tmp_path_factory.mktemp("out") / "run"
    run(
        "train.py",
        *SMALL,
        f"--data_dir={data}",
        f"--out_dir={out}",
        "--max_steps=40",
        "--save_interval=20",
        "--eval_interval=20",
    )
    return out


CHAT_TEMPLATE = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
Be brief.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""  # in the manner of SmolLM2's Instruct models


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
    """A hub on loopback, with an empty cache to download into: pass hub.environment to a script."""
    server = hub_server.serve(tmp_path / "hub")
    server.environment = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "cache")}
    yield server
    server.shutdown()
    server.server_close()
