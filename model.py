"""SmolLM2, the whole architecture, to be read from top to bottom.

SmolLM2 (Allal et al. 2025, arXiv 2502.02737) is a family of three small language models, of 135M, 360M and 1.7B
parameters. Its architecture is Llama's: a decoder-only transformer with RMSNorm in front of each part, rotary
positions, grouped-query attention, a gated MLP, no biases, and one matrix that is both the input embedding and the
output head. This file holds the model and nothing else: train.py trains it, sample.py lets it write.

    tokens (B, T)
      |
    embed_tokens                   a row of the table for each token                    (B, T, C)
      |
      +---> input_layernorm ----------> self_attn    tokens look at earlier tokens --+
      + <----------------------------------------------------------------------------+
      |                                                                                   x 30 layers
      +---> post_attention_layernorm -> mlp     each token is worked on by itself ---+
      + <----------------------------------------------------------------------------+
      |
    norm                                                                                (B, T, C)
      |
    lm_head                        the table again: a score for each possible next token (B, T, V)

The line on the left is the residual stream: each layer reads from it and adds to it; nothing else connects the layers.

Shapes stand at the end of a line, in one notation:

    B batch     T time, the tokens of a sequence     C hidden width (576)      F width inside the MLP (1536)
    H query heads (9)     K key/value heads (3)      D width of a head (64)    V vocabulary (49152)
    L layers (30)         S slots of the cache, or T     N parameters

Beside each component stands what it adds to the 134,515,008 parameters of the 135M. `python model.py` prints that sum,
and why others came to different ones; `python model.py 1.7b` prints it for another size.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass

from plumbing.checkpoint import find_checkpoint, read_config, read_weights, write_model

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Configuration --------------------------------------------------------------------------------------------------


@dataclass
class SmolLM2Config:
    """The shape of a model: the fields are keys of the checkpoint's config.json, the defaults the published 135M."""

    vocab_size: int = 49152  # V, entries of the tokenizer
    hidden_size: int = 576  # C, width of the residual stream
    intermediate_size: int = 1536  # F, width inside the MLP
    num_hidden_layers: int = 30  # L
    num_attention_heads: int = 9  # H, query heads
    num_key_value_heads: int = 3  # K, key/value heads, each shared by H / K query heads
    max_position_embeddings: int = 8192  # longest sequence the model accepts
    rope_theta: float = 100_000.0  # base of the rotary wavelengths
    rms_norm_eps: float = 1e-5  # keeps RMSNorm from dividing by zero
    initializer_range: float | None = None  # standard deviation of the initial weights; None: 1 / sqrt(hidden_size)
    tie_word_embeddings: bool = True  # the output head is the embedding table
    bos_token_id: int = 0  # <|endoftext|>: it stands between documents, so it begins one as well
    eos_token_id: int = 0  # the token that ends a text

    @classmethod
    def smollm2_135m(cls):
        return cls()

    @classmethod
    def smollm2_360m(cls):
        return cls(hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
                   num_attention_heads=15, num_key_value_heads=5)  # fmt: skip

    @classmethod
    def smollm2_1_7b(cls):
        return cls(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
                   num_key_value_heads=32, rope_theta=130_000.0, initializer_range=0.02)  # fmt: skip

    @classmethod
    def from_pretrained(cls, folder):
        """What a checkpoint's config.json says; raises ValueError, naming the field, if it is not this architecture."""
        names = {field.name for field in dataclasses.fields(cls)}
        values = read_config(folder, names | {"head_dim"})
        if missing := names - values.keys() - {"initializer_range", "bos_token_id", "eos_token_id"}:
            raise ValueError(f"{folder}/config.json lacks {min(missing)}")
        head_dim = values.pop("head_dim", None)
        config = cls(**values)
        config.check()
        if head_dim not in (None, config.head_dim):
            raise ValueError(f"{folder}/config.json: head_dim {head_dim!r} is not hidden_size / num_attention_heads")
        return config

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads  # D

    @property
    def initial_std(self):
        return self.initializer_range or 1 / math.sqrt(self.hidden_size)

    def check(self):
        """Raise a ValueError that names the field if the values cannot make a model."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                fits, wanted = isinstance(value, bool), "true or false"
            elif field.type is int:
                least = 0 if field.name.endswith("_token_id") else 1
                fits, wanted = type(value) is int and value >= least, f"a whole number, at least {least}"
            else:
                fits, wanted = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
            if not fits and not (value is None and field.name == "initializer_range"):
                raise ValueError(f"{field.name} must be {wanted}, not {value!r}")
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if C % (2 * H):  # a head is C / H wide, and rotary positions turn its channels in pairs
            raise ValueError(f"hidden_size {C} must be a multiple of 2 x num_attention_heads, {2 * H}")
        if H % K:  # each key/value head serves as many query heads as any other
            raise ValueError(f"num_attention_heads {H} must be a multiple of num_key_value_heads {K}")


# ---- RMSNorm --------------------------------------------------------------------------------------------------------
#
# Every part of a layer wants its input at one scale, while the residual stream grows with each addition. RMSNorm (Zhang
# & Sennrich 2019, arXiv 1910.07467) divides a vector by its root mean square and multiplies each channel by a learned
# weight. LayerNorm would also subtract the mean and add a bias; neither turned out to matter.
#
#     y = x / sqrt(mean(x^2) + eps) * weight
#
# Parameters: C = 576. Each layer has two, and one stands before the head: 576 x (2 x 30 + 1) = 35,136.


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):  # (..., C) -> (..., C)
        x_float32 = x.float()  # a sum of squares needs more than the 8 significant bits of bfloat16
        scale = torch.rsqrt(x_float32.pow(2).mean(-1, keepdim=True) + self.eps)  # (..., 1)
        return self.weight * (x_float32 * scale).type_as(x)


# ---- Rotary positions -----------------------------------------------------------------------------------------------
#
# Attention by itself does not know the order of its tokens. RoPE (Su et al. 2021, arXiv 2104.09864) tells it by turning
# the queries and keys: cut a head's D channels into D / 2 pairs, take each pair as a point in the plane, and turn it by
# an angle proportional to the token's position, pair j at its own speed:
#
#     angle = position x speed_j,     speed_j = theta^(-2j / D),     j = 0 ... D/2 - 1
#
# Why this gives *relative* position: attention compares a query at position m with a key at position n by their dot
# product. Turning both by one more angle changes no dot product, so turning q by m and k by n gives what leaving q
# alone and turning k by n - m would:
#
#     (R_m q) . (R_n k)  =  q . R_m^T R_n k  =  q . R_(n-m) k
#
# Only the distance is left: a pattern learned at one place of the text holds at every other. Like the hands of a clock,
# the fast pairs tell near distances apart and the slow pairs far ones. With D = 64 and theta = 100,000 the first pair
# turns once in 2 pi = 6.3 tokens, the last once in 438,000:
#
#     pair j              0       8       16       24        31
#     turns once in     6.3     112    1,987   35,333   438,460 tokens
#
# Which channels make a pair is a convention, and the commonest mistake in writing this model. The paper pairs
# neighbours, (0, 1), (2, 3), ... ("interleaved"); the checkpoints of this family pair channel j with channel j + D/2
# ("half-split"). Both are right for weights trained that way, and each turns the other's weights into noise.
#
# Parameters: none. (A learned position table instead, of 1024 x 576, is where one write-up's count is 589,824 too
# high.)


def rotary_tables(positions, config):
    """Cosine and sine of each position's angles, in float32: positions (T,) int64 -> two tables (T, D/2)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim  # (D/2,)
    speeds = 1.0 / config.rope_theta**exponents  # (D/2,)
    angles = positions.float()[:, None] * speeds  # (T, D/2)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs (j, j + D/2) of x (..., T, D) by the angles of the tables (T, D/2)."""
    first, second = x.float().chunk(2, dim=-1)  # (..., T, D/2) each
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).type_as(x)  # (..., T, D)


# ---- The key/value cache --------------------------------------------------------------------------------------------
#
# When a model writes, each new token attends to all earlier ones. Their keys and values do not change any more, so they
# are kept. Without the cache, writing n tokens computes n (n + 1) / 2 positions; with it, n: for 1,000 tokens 500 times
# less. The price is memory: 2 (keys and values) x L x K x D = 2 x 30 x 3 x 64 = 11,520 numbers for each token, 23,040
# bytes in bfloat16. It would be 69,120 without grouped-query attention, which comes next.


class KVCache:
    """The keys and values of one layer: slots for a fixed number of positions, written in place.

    What attention reads is always all of it, and a mask hides the slots that are still empty. So shapes and addresses
    are the same for every token, which a compiler asks for, and a GPU that is to repeat a recorded step.
    """

    def __init__(self, config, batch_size, num_slots, dtype, device):
        shape = (batch_size, config.num_key_value_heads, num_slots, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # (B, K, S, D); not empty: 0 x NaN is NaN
        self.values = torch.zeros(shape, dtype=dtype, device=device)

    def update(self, slots, keys, values):
        """Write keys and values (B, K, T, D) into slots (T,); return those of all slots, (B, K, S, D)."""
        self.keys.index_copy_(2, slots, keys.type_as(self.keys))
        self.values.index_copy_(2, slots, values.type_as(self.values))
        return self.keys, self.values


# ---- Attention ------------------------------------------------------------------------------------------------------
#
# Attention is how a token learns from the tokens before it. Each token asks with a query, each earlier token answers
# with a key, and the better the two agree, the more of that token's value is taken over:
#
#     weights = softmax(q k^T / sqrt(D))    over the tokens up to this one
#     y = weights v
#
# This happens in H = 9 heads at once, each D = 64 wide, so that nine questions can be asked. Grouped-query attention
# (Ainslie et al. 2023, arXiv 2305.13245) gives three query heads one key/value head in common: nine questions are put
# to three sets of answers. That is why k_proj and v_proj have 3 x 64 = 192 columns and not 576 (rows, in PyTorch, which
# keeps a matrix transposed): it makes the cache three times smaller and loses little.
#
# Parameters of a layer:
#     q_proj   C x H D = 576 x 576 = 331,776
#     k_proj   C x K D = 576 x 192 = 110,592
#     v_proj   C x K D = 576 x 192 = 110,592
#     o_proj   H D x C = 576 x 576 = 331,776
#                        together    884,736


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)
        self.head_dim = D

    def forward(self, x, cos, sin, mask=None, cache=None, slots=None):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(slots, k, v)  # (B, K, S, D)
        fused = takes_grouped_queries(q)
        if not fused and k.size(1) < q.size(1):
            k, v = (x.repeat_interleave(q.size(1) // k.size(1), dim=1) for x in (k, v))  # (B, H, S, D)
        y = F.scaled_dot_product_attention(q.type_as(k), k, v, mask, is_causal=mask is None, enable_gqa=fused)
        return self.o_proj(y.type_as(x).transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


def takes_grouped_queries(q):
    """Whether PyTorch has a fused attention kernel for grouped queries of this kind.

    Fused kernels never hold the T x S weights of a head in memory at once. Those for grouped queries need a CPU, or
    16-bit numbers on a GPU of compute capability 8.0 (NVIDIA Ampere, 2020). Elsewhere PyTorch would fall back to plain
    products, which on four windows of 2048 tokens keep 9 GB of weights, and copies of them, for the backward pass. So
    each key/value head is repeated for its query heads there, and the memory-efficient kernel fits.
    """
    if q.device.type == "cuda":
        return q.dtype != torch.float32 and torch.cuda.get_device_properties(q.device).major >= 8
    return q.device.type == "cpu"


# ---- The MLP --------------------------------------------------------------------------------------------------------
#
# After attention has brought information together, the MLP works on each token alone. SwiGLU (Shazeer 2020, arXiv
# 2002.05202) has three matrices where a classic MLP has two: up makes F = 1536 features, gate decides through the
# smooth switch silu(x) = x sigmoid(x) how much of each passes, down brings the result back to the residual stream.
# A classic MLP is 4 C wide. With three matrices, 8/3 C costs the same: 8/3 x 576 = 1536.
#
# Parameters of a layer: 3 x C x F = 3 x 576 x 1536 = 2,654,208. (With two matrices: 1,769,472, another common
# miscount.)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):  # (B, T, C) -> (B, T, C), through (B, T, F)
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


# ---- A layer --------------------------------------------------------------------------------------------------------
#
# Normalise, attend, add; normalise, think, add. The stream itself is never normalised on its way ("pre-norm"), so that
# a gradient reaches every layer through additions alone.
#
# Parameters: 884,736 (attention) + 2,654,208 (MLP) + 2 x 576 (norms) = 3,540,096; thirty layers have 106,202,880.


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask=None, cache=None, slots=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, slots)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x  # (B, T, C)


# ---- The model ------------------------------------------------------------------------------------------------------
#
# The embedding has a row of C numbers for each of V tokens: 49,152 x 576 = 28,311,552 parameters, a fifth of the 135M.
# The head needs a matrix of the same shape, to score each token against the last hidden state, and uses the same one
# (Press & Wolf 2017, arXiv 1608.05859): at this size a second table would be a waste, and each token's row learns from
# being read as well as from being predicted.
#
# Parameters: 28,311,552 (embedding) + 106,202,880 (layers) + 576 (last norm) + 0 (head, tied) = 134,515,008.


class SmolLM2(nn.Module):
    """The language model. Parameters have the names of transformers' LlamaForCausalLM, so checkpoints need no renaming.

    Raises ValueError, naming the field, for a configuration that cannot make a model.
    """

    def __init__(self, config):
        super().__init__()
        config.check()
        self.config = config
        self.model = nn.ModuleDict(
            dict(
                embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
                layers=nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
                norm=RMSNorm(config),
            )
        )
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw the weights: normal, with standard deviation 1 / sqrt(C) unless the configuration says otherwise.

        A sum of C products with such weights is as large as what goes in. Two exceptions:

        The two projections that write into the residual stream, o_proj and down_proj, are divided by sqrt(2 L). The
        stream is a sum of 2 L writes, and random writes add up like sqrt(2 L): so its size does not depend on depth.

        The matrix of the head is divided by 4. The last norm gives the head a vector of length sqrt(C); a full-sized
        matrix would turn it into scores of variance 1, opinions about the next token before any text was read, and a
        first loss of ln V + 1/2. With variance 1/16 it is ln V + 1/32: every token as likely as every other.
        """
        std = self.config.initial_std
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers if writes_to_stream else 1
                nn.init.normal_(parameter, 0.0, std / math.sqrt(depth))
        nn.init.normal_(self.lm_head.weight, 0.0, std / 4)  # the embedding too, where it is tied

    def forward(self, input_ids, targets=None):
        """Score every possible next token, or say how surprised the model is by the real ones.

        input_ids (B, T) int64 -> logits (B, T, V); with targets (B, T) int64, the token that follows each input ->
        the mean cross-entropy in nats, a scalar in float32, where a target of -100 is left out.
        """
        hidden = self.hidden_states(input_ids)  # (B, T, C)
        if targets is None:
            return self.lm_head(hidden)
        return self.nats(hidden, targets) / (targets != -100).sum()

    def hidden_states(self, input_ids, caches=None, slots=None, padding=None):
        """The residual stream after the last norm: (B, T) -> (B, T, C).

        With caches, one for each layer, the tokens are written to slots (T,) of them, and each sees all slots up to its
        own. Where a row's text begins later than the others, padding (B, 1) slots at its beginning stay unseen. Raises
        ValueError beyond max_position_embeddings.
        """
        T, room = input_ids.size(1), self.config.max_position_embeddings
        S = caches[0].keys.size(2) if caches else T
        if room < S:
            raise ValueError(f"{S} tokens are more than the {room} of max_position_embeddings")
        if caches is None:  # a whole text, of which each token sees itself and those before it
            slots, mask, caches = torch.arange(T, device=input_ids.device), None, [None] * len(self.model.layers)
        else:
            all_slots = torch.arange(S, device=input_ids.device)
            first = torch.minimum(padding, slots)  # (B, T); padding has to see something, so it sees itself
            mask = (first[:, None, :, None] <= all_slots) & (all_slots <= slots[:, None])  # (B, 1, T, S)
        cos, sin = rotary_tables(slots, self.config)  # the same for all layers

        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        for layer, cache in zip(self.model.layers, caches, strict=True):
            x = layer(x, cos, sin, mask, cache, slots)
        return self.model.norm(x)

    # The loss is the mean of -ln p(next token). Whoever guesses among V tokens pays ln V: ln 49,152 = 10.80 is where
    # the first step must stand, and a first loss half a nat away from it is the earliest sign of a bug. So is its
    # opposite, a loss near 0 on text never seen: real text cannot be foreseen like that, so the targets leaked.
    #
    # The scores are the largest tensor of the whole training step: 49,152 for each token, 85 times as wide as the
    # residual stream.

    def nats(self, hidden, targets):
        """The cross-entropy of all targets together: hidden (B, T, C), targets (B, T) -> a scalar in float32."""
        logits = self.lm_head(hidden).float()  # (B, T, V); exponentials are summed over V, so in float32
        return F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), reduction="sum")

    # ---- Generation -------------------------------------------------------------------------------------------------
    #
    # A language model writes by asking itself for the next token, again and again. The prompts go through the model at
    # once and fill the cache; from then on each step feeds one token of each. Prompts of different lengths are set
    # flush right, so that all go on in the same slot. What stands to the left of a shorter one is never looked at; that
    # its positions do not begin at 0 makes no difference, since only distances count.

    @torch.inference_mode()
    def generate(
        self, input_ids, max_new_tokens=128, temperature=0.8, top_k=40, top_p=1.0, eos_token_id=0, generator=None
    ):
        """Continue prompts, a tensor (B, T) int64 or B lists of ids: yields (B,) int64, the next token of each.

        A row that has made eos_token_id goes on yielding it, and when all have, generation ends; None never ends it.
        The other arguments are those of `choose`. Raises ValueError for an empty prompt, and when prompt and new tokens
        together pass max_position_embeddings.
        """
        weight, room = self.lm_head.weight, self.config.max_position_embeddings
        prompts = [torch.as_tensor(row, device=weight.device) for row in input_ids]
        T = max(len(row) for row in prompts)
        if min(len(row) for row in prompts) == 0:
            raise ValueError("the prompt is empty: begin with bos_token_id")
        if T + max_new_tokens > room:
            raise ValueError(f"{T} tokens of prompt and {max_new_tokens} new ones are more than the model's {room}")
        padding = torch.tensor([[T - len(row)] for row in prompts], device=weight.device)  # (B, 1)
        prompts = torch.stack([F.pad(row, (T - len(row), 0)) for row in prompts])  # (B, T)

        # A CPU reads 16-bit weights in half the time, but has to widen 16-bit keys before it can multiply them.
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        shape = (len(prompts), T + max_new_tokens, dtype, weight.device)
        caches = [KVCache(self.config, *shape) for _ in self.model.layers]
        tokens, slots = prompts, torch.arange(T, device=weight.device)

        def step():
            return self.lm_head(self.hidden_states(tokens, caches, slots, padding)[:, -1])  # (B, V)

        logits = step()
        tokens, slots = tokens[:, -1:].clone(), slots[-1:].clone()  # from here on one token of each, in the same place
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=weight.device)
        for i in range(max_new_tokens):
            if i == 1 and weight.device.type == "cuda":
                step = recorded(step)
            if i:
                logits = step()
            new = choose(logits, temperature, top_k, top_p, generator)  # (B,)
            if eos_token_id is not None:
                new = new.masked_fill(finished, eos_token_id)
                finished |= new == eos_token_id
            yield new
            if eos_token_id is not None and finished.all():
                return
            tokens.copy_(new[:, None])
            slots += 1

    # ---- Loading and saving -----------------------------------------------------------------------------------------
    #
    # A checkpoint is a folder as the Hugging Face hub has them. Since parameters and settings have their published
    # names, there is nothing to convert: checkpoint.py only reads, writes, and refuses what is something else.

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu"):
        """The model in a checkpoint folder, in the newest checkpoint of a run's folder, or under an id on the hub.

        Raises ValueError, naming the field or the tensor, for anything that is not a whole model of this architecture.
        """
        folder = find_checkpoint(name)
        config = SmolLM2Config.from_pretrained(folder)
        with torch.device("meta"):  # shapes without memory: the tensors come from the file
            model = cls(config)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        tied = {"lm_head.weight"} if config.tie_word_embeddings else set()  # some writers store it all the same
        model.load_state_dict(read_weights(folder, shapes, tied, dtype, device), strict=False, assign=True)
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors, in the type that the weights have."""
        dtype = str(self.lm_head.weight.dtype).removeprefix("torch.")
        derived = {"initializer_range": self.config.initial_std, "head_dim": self.config.head_dim, "torch_dtype": dtype}
        write_model(folder, dataclasses.asdict(self.config) | derived, dict(self.named_parameters()))


def recorded(step):
    """The step as a recording on a GPU: returns a function that runs it again on the same memory.

    A step of the 135M launches hundreds of kernels, each of which takes the GPU less time than Python takes to launch
    it. A recording is launched as one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # not recorded: what libraries set up on their first call
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()

    def replay():
        graph.replay()
        return result

    return replay


def choose(logits, temperature, top_k, top_p, generator=None):
    """Draw the next token: (B, V) -> (B,) int64.

    temperature divides the logits: below 1 the likely get likelier, at 0 the likeliest is taken. top_k keeps the k
    likeliest tokens (0: all), top_p the likeliest that together hold at least that probability (Holtzman et al. 2019,
    arXiv 1904.09751); without them, once in a while, one of the thousands of improbable tokens derails the text.
    """
    if temperature == 0:
        return logits.argmax(-1)
    best, tokens = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k) each, the likeliest first
    probabilities = (best.float() / temperature).softmax(-1)  # (B, k)
    if top_p < 1:
        superfluous = probabilities.cumsum(-1) - probabilities >= top_p  # those in front suffice
        probabilities = probabilities.masked_fill(superfluous, 0)
    return tokens.gather(1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(1)


# ---- Counting -------------------------------------------------------------------------------------------------------
#
# The sums of the comments above, as code: each term with its formula, so that a mistake can be put in and its result
# be recognised.


def parameter_terms(config, mlp_matrices=("gate_proj", "up_proj", "down_proj"), learned_positions=0):
    """The parameters as two lists of (name, formula, count): those of one layer, and those there are once."""
    V, C, F, D = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = [
        ("q_proj", f"C x H D    {C} x {H * D}", C * H * D),
        ("k_proj", f"C x K D    {C} x {K * D}", C * K * D),
        ("v_proj", f"C x K D    {C} x {K * D}", C * K * D),
        ("o_proj", f"H D x C    {H * D} x {C}", H * D * C),
        *((name, f"C x F      {C} x {F}", C * F) for name in mlp_matrices),
        ("two norms", f"2 x C      2 x {C}", 2 * C),
    ]
    once = [
        ("embedding", f"V x C      {V} x {C}", V * C),
        ("last norm", f"C          {C}", C),
        ("head", "tied: 0" if config.tie_word_embeddings else f"C x V      {C} x {V}",
         0 if config.tie_word_embeddings else C * V),
    ]  # fmt: skip
    if learned_positions:
        once.append(("positions", f"{learned_positions} x C", learned_positions * C))
    return layer, once


def count_parameters(config, **mistakes):
    layer, once = parameter_terms(config, **mistakes)
    return config.num_hidden_layers * sum(count for *_, count in layer) + sum(count for *_, count in once)


def forward_flops(config, T):
    """Floating-point operations for one token of a text of length T: (those of the matrices, those of attention).

    Each parameter of a matrix multiplies once and adds once (Kaplan et al. 2020, arXiv 2001.08361, section 2.1);
    looking up an embedding is free, but the head costs its whole matrix. Attention takes a product of width C with each
    earlier key, T / 2 of them on average, and one with each value: 2 x 2 x C x T / 2 in each layer.
    """
    free = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 2 * (count_parameters(config) - free), 2 * config.num_hidden_layers * config.hidden_size * T


def training_flops(config, T):
    """Floating-point operations for training on one token: the backward pass costs twice the forward pass."""
    return 3 * sum(forward_flops(config, T))


def cache_numbers(config):
    """Numbers that the key/value cache holds for each token."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim


def report(size):
    """Print the parameter count of one of the sizes, term by term, and what follows from it."""
    config = getattr(SmolLM2Config, f"smollm2_{size.replace('.', '_')}")()
    layer, once = parameter_terms(config)
    L, N = config.num_hidden_layers, count_parameters(config)
    per_layer = sum(count for *_, count in layer)
    with torch.device("meta"):
        module = SmolLM2(config)

    def line(name, formula, value, unit=""):
        print(f"  {name:<40}{formula:<26}{value:>17,}{unit}")

    print(f"SmolLM2 {size}\n\nA layer")
    for term in layer:
        line(*term)
    line("together", "", per_layer)
    print("\nThe model")
    line(f"{L} layers", f"{L} x {per_layer:,}", L * per_layer)
    for term in once:
        line(*term)
    line("parameters", "the sum", N)
    line("", "PyTorch counts", sum(parameter.numel() for parameter in module.parameters()))

    print("\nOperations for one token (attention reads T / 2 tokens on average)")
    for T in (512, 2048, 8192):
        matrices, attention = forward_flops(config, T)
        share = f"{attention / (matrices + attention):.0%} in attention"
        line(f"forward,  T = {T}", "2 N + 2 L C T", matrices + attention, f"   {share}")
        line(f"training, T = {T}", "three times that", training_flops(config, T))

    print("\nMemory in bytes")
    line("weights in float32", "4 N", 4 * N)
    line("gradients", "4 N", 4 * N)
    line("AdamW, two moments", "8 N", 8 * N)
    line("weights in bfloat16, to generate", "2 N", 2 * N)
    line("key/value cache, a token in bfloat16", "2 x 2 L K D", 2 * cache_numbers(config))

    if size == "135m":
        full_width = dataclasses.replace(config, num_key_value_heads=config.num_attention_heads)
        two_matrices = count_parameters(full_width, mlp_matrices=("up_proj", "down_proj"))
        print("\nThe same sum with the mistakes of others")
        line("K and V as wide as Q, two MLP matrices", "", two_matrices)
        line("a learned table of 1024 positions", "", count_parameters(config, learned_positions=1024))


if __name__ == "__main__":
    size = sys.argv[1].lower() if len(sys.argv) > 1 else "135m"
    if size not in ("135m", "360m", "1.7b") or len(sys.argv) > 2:
        sys.exit(f"usage: python model.py [135m | 360m | 1.7b], not {' '.join(sys.argv[1:])}")
    report(size)
