"""Checkpoints on disk: found, read and refused, and written so that a crash never leaves half of one.

A checkpoint is a folder as the Hugging Face hub has them:

    config.json               the shape of the model
    generation_config.json    the token that ends a text
    model.safetensors         the weights, or several such files and model.safetensors.index.json
    tokenizer.json            with tokenizer_config.json, what transformers needs to make a tokenizer of it
    README.md                 in checkpoints of train.py: the model card
    trainer_state.pt          in checkpoints of train.py: what it takes to go on

Weights are safetensors, and the trainer's state is read with weights_only=True: no pickle is ever executed.
"""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# What config.json must say where it says anything: the same keys with other values are other architectures.
ARCHITECTURE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "rope_interleaved": False,
    "rope_scaling": None,
}
# What it may say, because the logits do not depend on it.
IGNORED = (
    "_name_or_path attention_dropout dtype is_llama_config pad_token_id pretraining_tp torch_dtype "
    "transformers_version transformers.js_config use_cache"
).split()

# ---- Finding and reading --------------------------------------------------------------------------------------------


def find_checkpoint(name):
    """The folder that a model's name means: the newest checkpoint of a run's folder, a folder, or a download by hub id.

    Raises ValueError when there is none.
    """
    if os.path.isdir(name):
        return newest_checkpoint(name) or name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise ValueError(f"{name} is no folder")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except (OSError, ValueError) as error:  # what the hub's client raises; the first line says it
        away = type(error).__name__ == "LocalEntryNotFoundError"  # and nothing of it in the cache
        reason = "it cannot be reached" if away else str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is no folder here, and the hub does not give it: {reason}") from error


def list_checkpoints(out_dir):
    """The checkpoints of a run's folder, oldest first. What an interrupted save left behind has another kind of
    name."""
    names = [name for name in os.listdir(out_dir) if re.fullmatch(r"checkpoint-\d{6,}", name)]
    return [os.path.join(out_dir, name) for name in sorted(names, key=lambda name: int(name[11:]))]


def newest_checkpoint(out_dir):
    """The last checkpoint of a run's folder, or None."""
    return (list_checkpoints(out_dir) or [None])[-1]


def read_config(folder, fields):
    """Those of the fields that config.json has; raises ValueError, naming it, for one that means another
    architecture."""
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    rope = values.pop("rope_parameters", None) or {}  # where newer versions of transformers keep rope_theta
    if not isinstance(rope, dict) or rope.pop("rope_type", "default") != "default":
        raise ValueError(f"{path}: rope_parameters of a type other than default are not implemented here")
    values |= rope
    for key, value in values.items():
        if key in ARCHITECTURE and value != ARCHITECTURE[key]:
            raise ValueError(f"{path}: {key} must be {ARCHITECTURE[key]!r}; {value!r} is not implemented here")
        if key not in ARCHITECTURE and key not in IGNORED and key not in fields:
            raise ValueError(f"{path}: {key} is unknown here; if the logits do not depend on it, remove it")
    return {key: value for key, value in values.items() if key in fields}


def read_weights(folder, shapes, ignored, dtype, device):
    """The tensors of a checkpoint by name; raises ValueError, naming the first, if they are not those that shapes
    lists.

    Those named in ignored may be there or not, and are not returned.
    """
    tensors = {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    if name not in ignored:
                        # A copy: the tensor is the file, mapped into memory, and the file will be removed one day.
                        tensors[name] = file.get_tensor(name).to(device, dtype, copy=True)
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    for name in sorted(shapes.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"{folder} has no tensor {name}, which its config.json calls for")
        if name not in shapes:
            raise ValueError(f"{folder} has a tensor {name}, which its config.json does not call for")
        if tensors[name].shape != shapes[name]:
            found, wanted = tuple(tensors[name].shape), tuple(shapes[name])
            raise ValueError(f"{folder}: {name} has the shape {found}, but its config.json calls for {wanted}")
    return tensors


def weight_files(folder):
    """model.safetensors, or the files that an index lists."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        return [os.path.join(folder, "model.safetensors")]
    weight_map = read_json(index).get("weight_map")
    names = set(map(str, weight_map.values())) if isinstance(weight_map, dict) else {""}
    if not all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", name) for name in names):  # a name, never a path elsewhere
        raise ValueError(f"{index} must have a weight_map that gives each tensor a .safetensors file of this folder")
    return [os.path.join(folder, name) for name in sorted(names)]


def read_json(path):
    """The object in a JSON file; raises ValueError if there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            values = json.load(file)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold an object, not {type(values).__name__}")
    return values


def load_state(checkpoint):
    """The trainer's state; raises ValueError if the file has none."""
    path = os.path.join(checkpoint, "trainer_state.pt")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged or foreign file sets off inside of the library
        raise ValueError(f"{path} cannot be read ({type(error).__name__}); to go on from the checkpoint before it, "
                         f"remove {checkpoint}") from error  # fmt: skip
    if not isinstance(state, dict) or not state.keys() >= {"step", "optimizers", "scaler", "rng", "settings", "data"}:
        raise ValueError(f"{path} is not the state of a trainer; to start from the weights alone, use --init_from")
    return state


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_model(folder, config, tensors):
    """Write config.json, generation_config.json and model.safetensors."""
    os.makedirs(folder, exist_ok=True)
    write_json(f"{folder}/config.json", ARCHITECTURE | config)
    write_json(f"{folder}/generation_config.json", {key: config[key] for key in ("bos_token_id", "eos_token_id")})
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def write_json(path, values):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")


def save_checkpoint(out_dir, step, model, tokenizer_file, card, state, keep):
    """Save checkpoint-NNNNNN beside its final name, and rename it once all of it is on the disk: under that name there
    is never a broken one. Then remove all but the newest. Returns whether that went well: a full disk costs the run one
    checkpoint, not its life."""
    final = Path(out_dir, f"checkpoint-{step:06d}")
    temporary = Path(f"{final}.tmp")
    try:
        model.save_pretrained(temporary)
        shutil.copyfile(tokenizer_file, temporary / "tokenizer.json")
        special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        length = {"model_max_length": model.config.max_position_embeddings}
        write_json(
            temporary / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | special | length
        )
        (temporary / "README.md").write_text(card, encoding="utf-8")
        with open(temporary / "trainer_state.pt", "wb") as file:  # Python's file says what is wrong with the disk
            torch.save(state, file)
        for path in temporary.iterdir():
            with open(path, "r+b") as file:  # Windows flushes only what is open for writing
                os.fsync(file.fileno())
        os.rename(temporary, final)
        remove_old_checkpoints(out_dir, keep)
    except (OSError, RuntimeError, SafetensorError) as error:  # the writers have types of their own for a full disk
        shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).splitlines()[0]
        print(f"{final} could not be saved: {reason}; the checkpoint before it is whole", file=sys.stderr, flush=True)
        return False
    return True


def remove_old_checkpoints(out_dir, keep):
    """Remove all but the newest checkpoints, and what interrupted saves and removals left."""
    for checkpoint in list_checkpoints(out_dir)[:-keep]:
        os.rename(checkpoint, f"{checkpoint}.tmp")  # at once no checkpoint any more, however long its removal takes
    for leftover in Path(out_dir).glob("checkpoint-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
