"""Several processes as one: agreement, what DDP exchanges and keeps in memory, and a slow disk."""

import shutil
import socket
from pathlib import Path

import pytest
from conftest import command, environment, run
from runs import arguments, loadable_checkpoints, on_slow_disk, second_shard, start, train_here, values

pytestmark = pytest.mark.slow

# ---- The same as one


def test_micro_batches_and_processes_give_the_losses_of_one(tmp_path, data):
    """With accumulation, and stopped after half of the steps to continue on more, or fewer, processes."""
    train_here(data, tmp_path / "one", "--max_steps=8", "--eval_interval=4")
    for first, second in ((0, 0), (2, 0), (0, 2)):
        out = tmp_path / f"{first} and {second}"
        for steps, nproc in ((4, first), (8, second)):
            args = f"--max_steps={steps}", "--eval_interval=4", "--micro_batch=2", "--resume=True"
            if nproc:
                run("train.py", *arguments(data, out, *args), nproc=nproc)
            else:
                train_here(data, out, *args)
        for metric in ("loss", "val_loss", "grad_norm"):
            assert values(out, metric) == pytest.approx(values(tmp_path / "one", metric), rel=2e-4)


# ---- Agreement


def refuse_two(first, second):
    """Two ranks started by hand, each with its own arguments, which refuse to train together: the sentence of the
    first. The second says nothing."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        world = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1]}
    ranks = [
        start(*command("train.py", *args), env=environment(RANK=rank, LOCAL_RANK=rank, **world))
        for rank, args in enumerate((first, second))
    ]
    (_, sentence), (other_out, other) = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [1, 1]
    assert len(sentence.splitlines()) == 1 and other_out == other == ""
    return sentence


def test_ranks_that_see_other_data_checkpoints_or_settings(trained, data, tmp_path):
    more = Path(shutil.copytree(data, tmp_path / "more"))
    second_shard(more, data)
    newer, older = (Path(shutil.copytree(trained, tmp_path / name)) for name in ("newer", "older"))
    shutil.rmtree(older / "checkpoint-000040")
    one, last = arguments(data, tmp_path / "out", "--micro_batch=2"), ("--micro_batch=2", "--resume=True")
    assert "shard-00001.json, train is None on rank 0" in refuse_two(one, [*one, f"--data_dir={more}"])
    assert "learning_rate is 0.01 on rank 0, and 0.5" in refuse_two(one, [*one, "--learning_rate=0.5"])
    sentence = refuse_two(*(arguments(data, out, *last) for out in (newer, older)))
    assert "step is 40 on rank 0, and 20 on rank 1" in sentence


def test_a_refusal_is_said_once_and_by_one_rank_with_its_number(data, tmp_path):
    one, nowhere = (arguments(folder, tmp_path / "out", "--micro_batch=2") for folder in (data, tmp_path / "nowhere"))
    assert refuse_two(nowhere, nowhere).startswith(f"{tmp_path / 'nowhere'} holds no shard")
    assert refuse_two(one, nowhere).startswith(f"rank 1: {tmp_path / 'nowhere'} holds no shard")


# ---- DDP

WATCHED = """
import atexit, gc
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
create, leave, exchanges, replicas = DistributedDataParallel.__init__, dist.destroy_process_group, [], []
def created(self, *args, **options):
    create(self, *args, **options)
    replicas.append(self)
    self.register_comm_hook(None, lambda state, bucket: (exchanges.append(1), allreduce_hook(None, bucket))[1])
def inspect():
    gradients = [parameter.grad for parameter in replicas[0].parameters()]
    places = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    print(f"{len(exchanges)} exchanges; {len(gradients)} gradients in {len(places)} buffers")
    leave()
DistributedDataParallel.__init__, dist.destroy_process_group = created, inspect
"""


def test_ranks_exchange_gradients_once_a_step_from_ddps_own_memory(data, tmp_path):
    """Each rank has four micro-batches; one buffer holds all gradients, so none has memory of its own."""
    args = arguments(data, tmp_path / "out", "--max_steps=3", "--micro_batch=1")
    printed = run("tests/patched.py", WATCHED, "train.py", *args, nproc=2)
    assert "3 exchanges; 20 gradients in 1 buffers" in printed


def test_a_slow_save_does_not_hold_up_training_nor_trip_the_timeout(data, tmp_path):
    """Seven files, half a second each, with ranks that wait four seconds for each other."""
    args = "--max_steps=50", "--save_interval=10", "--micro_batch=2", "--timeout=4"
    process = start(*on_slow_disk(0.5, *arguments(data, tmp_path, *args), nproc=2))
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "checkpoint-000020 is left out" in printed
    assert printed.index("step 15/") < printed.index("checkpoint-000010:"), "training waited for the save"
    assert 50 in loadable_checkpoints(tmp_path)
