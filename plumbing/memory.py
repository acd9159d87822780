"""How many windows a device trains on at once: as many as its memory holds."""

import gc
import re

import torch


def training_memory(config, parameters, tokens, dtype, compiled=True, recompute=False):
    """Estimated bytes to train a model of N parameters, with this number of tokens on the device at once and matrix
    products in a dtype of b bytes.

        (16 + b) N       weights, gradients and two moments in float32, and a copy of the weights in dtype
        L (12 C + b (2 C + (H + 3 K) D + 3 F))     for each token and layer, for the backward pass: in float32 the
                         stream before and after the attention, and a norm; in dtype the inputs of two products, the
                         queries, keys, values and rotated keys, gate, up and the product of both
        b V              for each token: the logits

    That is with torch.compile; without, each token takes about twice as much. With recompute the inputs of all layers
    are kept, 4 L C, and all of a single one. On an H100, in bfloat16 with windows of 2048 tokens, the 135M took 13.8,
    25.5 and 47.4 GB for 8, 16 and 32 of them, and the 1.7B 49.8 GB for 4: the formula is at most 5 % off.
    """
    L, V, C, F = config.num_hidden_layers, config.vocab_size, config.hidden_size, config.intermediate_size
    H, K, D, b = config.num_attention_heads, config.num_key_value_heads, config.head_dim, dtype.itemsize
    layer = 12 * C + b * (2 * C + (H + 3 * K) * D + 3 * F)
    per_token = (4 * L * C + layer if recompute else L * layer) + b * V
    return (16 + b) * parameters + tokens * per_token * (1 if compiled else 2)


def choose_micro_batch(model, share, seq_len, dtype, autocast, compiled, ranks):
    """How many windows to train on at once, of a device's share of a step, which it divides; the same on all ranks.

    On a GPU the most that fit, by the formula above, into nine tenths of its memory; one forward and backward pass
    tries them, and if they do not fit, half as many. On a CPU, where more are not faster, about 2048 tokens.
    """
    device, parameters = model.lm_head.weight.device, sum(parameter.numel() for parameter in model.parameters())
    choices = [windows for windows in range(share, 0, -1) if share % windows == 0]
    if device.type == "cpu":
        chosen = next((windows for windows in choices if windows * seq_len <= 2048), 1)
        ranks.say(f"{chosen} windows at once on a device")
        return chosen
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)  # free, and what it has already
    else:
        room = torch.mps.recommended_max_memory()

    def needed(windows):
        return training_memory(model.config, parameters, windows * seq_len, dtype, compiled, model.recompute)

    chosen = next((windows for windows in choices if needed(windows) <= 0.9 * room), 1)
    while chosen > 1 and not fits(model, chosen, seq_len, autocast, 8 * parameters):
        chosen = next(windows for windows in choices if windows <= chosen // 2)
    chosen = min(ranks.gather(chosen))
    expected = f"{needed(chosen) / 1e9:.1f} of {room / 1e9:.1f} GB"
    ranks.say(f"{chosen} windows at once on a device, for which {expected} are expected")
    return chosen


def fits(model, windows, seq_len, autocast, reserved):
    """Whether a forward and backward pass succeeds beside reserved bytes, which the optimizer will take."""
    device = model.lm_head.weight.device

    def one_pass():
        taken = torch.empty(reserved, dtype=torch.uint8, device=device)
        tokens = torch.zeros(windows, seq_len, dtype=torch.long, device=device)
        with autocast:
            loss = model(tokens, tokens)
        loss.backward()
        del taken

    try:
        one_pass()
        return True
    except RuntimeError as error:  # PyTorch's OutOfMemoryError is one; cuBLAS, Triton and MPS have words only
        if not re.search("out of memory|ALLOC_FAILED", str(error)):
            raise
        return False
    finally:
        model.zero_grad()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
