"""Model folders as on the Hugging Face hub: finding, reading, checking and writing them.

    config.json               the shape of the model
    generation_config.json    the token that ends a text
    model.safetensors         the weights, or several such files and model.safetensors.index.json
    tokenizer.json            and tokenizer_config.json: the tokenizer, as transformers reads it

Weights are safetensors, so no pickle is ever executed.
"""

import dataclasses
import json
import os
import re

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer

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

# ---- Reading --------------------------------------------------------------------------------------------------------


def find_model(name, weights=True):
    """The folder of a model: the newest checkpoint in a run's folder, the folder itself, or a download by hub id, which
    may leave out the weights.

    Raises ValueError when there is none.
    """
    if os.path.isdir(name):
        folder = newest_checkpoint(name) or name
        if "metrics.jsonl" in os.listdir(folder) and not os.path.exists(os.path.join(folder, "config.json")):
            raise ValueError(f"{name} is a run that has not saved a checkpoint yet")
        return folder
    if str(name).startswith("out/"):  # where runs are, in all recipes; never a name on the hub
        raise ValueError(f"{name} is not here yet: train first, with train.py")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name)):
        raise ValueError(f"{name} is not a folder")
    from huggingface_hub import snapshot_download

    try:
        files = ["*.json", "*.jinja", "README.md", *(["*.safetensors"] if weights else [])]
        return snapshot_download(name, allow_patterns=files)
    except (OSError, ValueError) as error:  # what the hub's client raises; the first line says it
        away = type(error).__name__ == "LocalEntryNotFoundError"  # and nothing of it in the cache
        reason = "it cannot be reached" if away else str(error).strip().split("\n")[0]
        raise ValueError(f"{name} is not a folder here, and the hub does not provide it: {reason}") from error


def list_checkpoints(out_dir):
    """The checkpoints in a run's folder, oldest first. What an interrupted save leaves behind is named otherwise."""
    names = [name for name in os.listdir(out_dir) if re.fullmatch(r"checkpoint-\d{6,}", name)]
    return [os.path.join(out_dir, name) for name in sorted(names, key=lambda name: int(name[11:]))]


def newest_checkpoint(out_dir):
    """The newest checkpoint in a run's folder, or None."""
    return (list_checkpoints(out_dir) or [None])[-1]


def read_config(folder, cls):
    """The configuration, an instance of the dataclass cls, from config.json; raises ValueError, naming the key, if it
    is not this architecture."""
    path = os.path.join(folder, "config.json")
    values = read_json(path)
    rope = values.pop("rope_parameters", None) or {}  # where newer versions of transformers keep rope_theta
    if not isinstance(rope, dict) or rope.pop("rope_type", "default") != "default":
        raise ValueError(f"{path}: rope_parameters of a type other than default are not implemented here")
    values |= rope
    fields = {field.name for field in dataclasses.fields(cls)}
    for key, value in values.items():
        if key in ARCHITECTURE and value != ARCHITECTURE[key]:
            raise ValueError(f"{path}: {key} must be {ARCHITECTURE[key]!r}; {value!r} is not implemented here")
        if key not in fields and key not in ARCHITECTURE and key not in (*IGNORED, "head_dim"):
            raise ValueError(f"{path}: {key} is unknown here; if the logits do not depend on it, remove it")
    if missing := fields - values.keys() - {"initializer_range", "bos_token_id", "eos_token_id"}:
        raise ValueError(f"{path} lacks {min(missing)}")
    config = cls(**{key: value for key, value in values.items() if key in fields})
    check_config(config)
    if values.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{path}: head_dim {values['head_dim']!r} is not hidden_size / num_attention_heads")
    return config


def check_config(config):
    """Raise a ValueError that names the field if the values cannot make a model."""
    for field in dataclasses.fields(config):
        value, least = getattr(config, field.name), 0 if field.name.endswith("_token_id") else 1
        most = 1_000 if field.name == "num_hidden_layers" else 100_000_000
        if field.type is bool:
            fits, wanted = isinstance(value, bool), "true or false"
        elif field.type is int:
            fits, wanted = type(value) is int and least <= value <= most, f"a whole number from {least} to {most}"
        else:
            fits, wanted = type(value) in (int, float) and 0 < value < 1e30, "a number above 0"
        if not fits and (value is not None or field.name != "initializer_range"):
            raise ValueError(f"{field.name} must be {wanted}, not {value!r}")
    if config.bos_token_id >= config.vocab_size:
        raise ValueError(f"bos_token_id {config.bos_token_id} is no token of a vocabulary of {config.vocab_size}")
    C, H, K = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if C % (2 * H):
        raise ValueError(f"hidden_size {C} must be a multiple of 2 x num_attention_heads, {2 * H}")
    if H % K:
        raise ValueError(f"num_attention_heads {H} must be a multiple of num_key_value_heads {K}")


def read_weights(folder, model, dtype, device):
    """Load the weights of a folder into a model, in dtype, on the device; raises ValueError, naming the tensor, if they
    are not those of the model."""
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # some writers store it all the same
    shapes, tensors = {name: parameter.shape for name, parameter in model.named_parameters()}, {}
    for path in weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for name in set(file.keys()) - tied:
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
    model.load_state_dict(tensors, strict=False, assign=True)
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


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


def read_tokenizer(folder, config):
    """The tokenizer of a folder; raises ValueError if it is damaged, or has tokens that the model does not know."""
    try:
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception as error:  # the library has no exception type for this
        raise ValueError(f"{folder} has no readable tokenizer.json: {error}") from None
    if (last := max(tokenizer.get_vocab().values(), default=0)) >= config.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer.json has a token {last}, and config.json a vocab_size of {config.vocab_size}"
        )
    return tokenizer


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


# ---- Writing --------------------------------------------------------------------------------------------------------


def write_model(folder, config, tensors):
    """Write config.json, generation_config.json and model.safetensors."""
    os.makedirs(folder, exist_ok=True)
    dtype = str(tensors["model.embed_tokens.weight"].dtype).removeprefix("torch.")
    derived = {"initializer_range": config.initial_std, "head_dim": config.head_dim, "torch_dtype": dtype}
    write_json(f"{folder}/config.json", ARCHITECTURE | dataclasses.asdict(config) | derived)
    ends = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
    if config.eos_token_id != config.bos_token_id:  # a model that chats; a batch of answers is filled up with this
        ends["pad_token_id"] = config.eos_token_id
    write_json(f"{folder}/generation_config.json", ends)
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, f"{folder}/model.safetensors", metadata={"format": "pt"})


def write_json(path, values):
    with open(path, "w", encoding="utf-8") as file:
        file.write(json.dumps(values, indent=2) + "\n")
