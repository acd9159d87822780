"""SmolLM2: the whole architecture, to be read from top to bottom.

SmolLM2 (Allal et al. 2025, arXiv 2502.02737) is a family of three language models with 135M, 360M and 1.7B parameters.
The architecture is Llama's: a decoder-only transformer with RMSNorm before each block, grouped-query attention with
rotary positions, a gated MLP, no biases, and one matrix that serves as input embedding and as output head.

    tokens (B, T)
      |
    embed_tokens                   each token becomes a row of a table                  (B, T, C)
      |
      +---> input_layernorm ----------> self_attn    tokens read earlier tokens -----+
      + <----------------------------------------------------------------------------+
      |                                                                                   x 30 layers
      +---> post_attention_layernorm -> mlp          each token by itself -----------+
      + <----------------------------------------------------------------------------+
      |
    norm                                                                                (B, T, C)
      |
    lm_head                        the same table: a logit for each possible next token (B, T, V)

The line on the left is the residual stream. A layer is two blocks, attention and MLP. Each reads from the stream and
adds to it; nothing else connects the layers. Comments at the ends of lines give shapes, in one notation:

    B batch     T time, the tokens of a sequence     C hidden width (576)      F width inside the MLP (1536)
    H query heads (9)     K key/value heads (3)      D width of a head (64)    V vocabulary (49152)
    L layers (30)         S slots of the cache, or T     N parameters

Each part's comment ends with what it adds to the 134,515,008 parameters of the 135M. `python model.py` prints that sum,
and what follows from it; `python model.py 1.7b` does so for another size.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import partial

from plumbing.devices import has_grouped_kernel

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

# ---- Configuration --------------------------------------------------------------------------------------------------


@dataclass
class SmolLM2Config:
    """The shape of a model. The fields are keys of a checkpoint's config.json, the defaults the published 135M."""

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
    bos_token_id: int = 0  # <|endoftext|>: it ends every document, so it also stands before the next one
    eos_token_id: int = 0  # the token that ends a text

    @classmethod
    def smollm2_135m(cls):
        return cls()

    @classmethod
    def smollm2_360m(cls):
        heads = dict(num_attention_heads=15, num_key_value_heads=5)
        return cls(hidden_size=960, intermediate_size=2560, num_hidden_layers=32, **heads)

    @classmethod
    def smollm2_1_7b(cls):
        heads = dict(num_attention_heads=32, num_key_value_heads=32)
        size = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24)
        return cls(**size, **heads, rope_theta=130_000.0, initializer_range=0.02)

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads  # D

    @property
    def initial_std(self):
        return self.initializer_range or 1 / math.sqrt(self.hidden_size)

    def check(self):
        """Raise a ValueError that names the field if the values cannot make a model."""
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 0 if field.name.endswith("_token_id") else 1
            if field.type is bool:
                fits, wanted = isinstance(value, bool), "true or false"
            elif field.type is int:
                fits, wanted = type(value) is int and value >= least, f"a whole number, at least {least}"
            else:
                fits, wanted = type(value) in (int, float) and 0 < value < math.inf, "a number above 0"
            if not fits and (value is not None or field.name != "initializer_range"):
                raise ValueError(f"{field.name} must be {wanted}, not {value!r}")
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        if C % (2 * H):  # a head is C / H wide, and rotary positions take its channels in pairs
            raise ValueError(f"hidden_size {C} must be a multiple of 2 x num_attention_heads, {2 * H}")
        if H % K:  # every key/value head serves the same number of query heads
            raise ValueError(f"num_attention_heads {H} must be a multiple of num_key_value_heads {K}")


# ---- RMSNorm --------------------------------------------------------------------------------------------------------
#
# The residual stream grows with every addition, but a block needs its input at one scale. RMSNorm (Zhang & Sennrich
# 2019, arXiv 1910.07467) divides a vector by its root mean square and multiplies each channel by a learned weight.
# LayerNorm also subtracts the mean and adds a bias; models turned out to train as well without.
#
#     y = x / sqrt(mean(x^2) + eps) * weight
#
# PyTorch computes it in float32 whatever the dtype of x: bfloat16 has 8 significant bits, too few for a sum of squares.
#
# Parameters: C = 576. There are two norms in each layer and one before the head: 576 x (2 x 30 + 1) = 35,136.


def make_norm(config):
    return nn.RMSNorm(config.hidden_size, config.rms_norm_eps)  # (..., C) -> (..., C)


# ---- Attention ------------------------------------------------------------------------------------------------------
#
# Attention is how a token reads the tokens before it. Each token has a query, a key and a value. Its query is compared
# with the keys of all tokens up to itself. The better it matches a key, the more of that token's value is taken:
#
#     weights = softmax(q k^T / sqrt(D))    over the tokens up to this one
#     y = weights v
#
# It happens in H = 9 heads at once, each D = 64 wide, so a token can look for nine things at a time. In grouped-query
# attention (Ainslie et al. 2023, arXiv 2305.13245) three query heads share one key/value head. The cache that
# generation needs is three times smaller for it, and little is lost. So k_proj and v_proj have 3 x 64 = 192 outputs;
# assuming 576 is a frequent mistake in counting this model.
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
        self.shape, self.joined = (H, K, D), None

    def forward(self, x, rotary, mask=None, cache=None):  # rotary: the next section; mask, cache: only for generation
        (B, T, _), (H, K, D) = x.shape, self.shape
        qkv = F.linear(x, joined(self, self.q_proj, self.k_proj, self.v_proj))  # (B, T, (H + 2 K) D)
        qk, v = qkv.view(B, T, H + 2 * K, D).transpose(1, 2).split((H + K, K), dim=1)  # (B, H + K, T, D), (B, K, T, D)
        q, k = rotate(qk, rotary).split((H, K), dim=1)  # by position: (B, H, T, D), (B, K, T, D)
        if cache is not None:
            k, v = cache.update(k, v)  # (B, K, S, D), in the cache's dtype, which may be another than that of x
        y = attend(q.type_as(k), k, v, mask).type_as(x)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


def joined(block, *projections):
    """The matrices of projections of the same input, one below the other: a GPU is faster with one large product."""
    return torch.cat([projection.weight for projection in projections]) if block.joined is None else block.joined


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D)) v: q (B, H, T, D), k and v (B, K, S, D) -> (B, H, T, D).

    Without a mask each token sees itself and those before it. Grouped queries: query heads 0, 1, 2 read key/value head
    0, heads 3, 4, 5 read head 1, ...
    """
    (B, H, T, D), K = q.shape, k.size(1)
    fused = has_grouped_kernel(q, mask)
    if T == 1 and mask is not None and not fused:  # generation: the queries that share a key are rows of a small matrix
        scores = (q / math.sqrt(D)).view(B, K, H // K, D) @ k.mT  # (B, K, H / K, S)
        return (scores.where(mask, -math.inf).softmax(-1) @ v).view(B, H, 1, D)
    if not fused and K < H:
        k, v = (heads.repeat_interleave(H // K, dim=1) for heads in (k, v))  # (B, H, S, D)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=fused)


# ---- Rotary positions -----------------------------------------------------------------------------------------------
#
# Attention by itself does not know the order of its tokens. Rotary positions (Su et al. 2021, arXiv 2104.09864) encode
# it by rotating queries and keys. The D channels of a head form D / 2 pairs, each pair is a point in the plane, and
# pair j of the token at position p is rotated by the angle
#
#     p x speed_j,     speed_j = theta^(-2j / D),     j = 0 ... D/2 - 1
#
# The result depends on *relative* positions alone. A rotation of both vectors by the same angle leaves their dot
# product unchanged, so for a query at position m and a key at position n
#
#     (R_m q) . (R_n k)  =  q . R_m^T R_n k  =  q . R_(n-m) k
#
# and a pattern that is learned in one place of a text holds in every other. Like the hands of a clock, fast pairs tell
# small distances apart and slow pairs large ones. With D = 64 and theta = 100,000:
#
#     pair j              0       8       16       24        31
#     turns once in     6.3     112    1,987   35,333   438,460 tokens
#
# Which channels form a pair is a convention, and the wrong one is the most common mistake in writing this model. The
# paper pairs neighbours, (0, 1), (2, 3), ... ("interleaved"); the checkpoints of this family pair channel j with
# channel j + D/2 ("half-split"). Weights trained with one convention are noise in the other.
#
# Parameters: none. (A learned table of 1024 positions instead would add 1024 x 576 = 589,824.)


def rotary_table(positions, config):
    """Cosines and sines of the angles at positions (T,) int64, for both channels of each pair, float32: (2, T, D)."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim  # (D/2,)
    speeds = 1.0 / config.rope_theta**exponents  # (D/2,)
    angles = positions.float()[:, None] * speeds  # (T, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x, rotary):
    """Rotate the pairs (j, j + D/2) of x (B, heads, T, D) by the angles in rotary (2, T, D).

    A point (a, b) goes to (a, b) cos + (-b, a) sin. The table has the minus.
    """
    cos, sin = rotary
    points = x.float()
    a, b = points.chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return (points * cos + torch.cat((b, a), dim=-1) * sin).type_as(x)


# ---- The MLP --------------------------------------------------------------------------------------------------------
#
# Attention moves information between tokens; the MLP works on each token alone. SwiGLU (Shazeer 2020, arXiv 2002.05202)
# has three matrices where a classic MLP has two: up computes F = 1536 features, gate decides through the smooth switch
# silu(x) = x sigmoid(x) how much of each passes, and down brings the result back to the residual stream. A classic MLP
# is 4 C wide; with three matrices, 8/3 C costs the same: 8/3 x 576 = 1536.
#
# To try another activation, change it here, and hidden_act in plumbing/pretrained.py, by which other tools read a
# checkpoint. Another norm or order of blocks is a change of this file alone, but then no other tool computes the same.
#
# Parameters of a layer: 3 x C x F = 3 x 576 x 1536 = 2,654,208.


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.joined = None

    def forward(self, x):  # (B, T, C) -> (B, T, C), through (B, T, F)
        gate, up = F.linear(x, joined(self, self.gate_proj, self.up_proj)).chunk(2, dim=-1)  # (B, T, F) each
        return self.down_proj(F.silu(gate) * up)


# ---- A layer --------------------------------------------------------------------------------------------------------
#
# Normalize, attend, add; normalize, MLP, add. Only the inputs of the blocks are normalized, never the stream itself
# ("pre-norm"), so gradients reach every layer through additions alone.
#
# Parameters: 884,736 (attention) + 2,654,208 (MLP) + 2 x 576 (norms) = 3,540,096; thirty layers have 106,202,880.


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask=None, cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- What generation adds -------------------------------------------------------------------------------------------
#
# A language model writes by predicting the next token, again and again. Keys and values of earlier tokens do not change
# any more, so they are kept. Without this cache n new tokens cost n (n + 1) / 2 positions of work, with it n. It takes
# 2 x L x K x D = 2 x 30 x 3 x 64 = 11,520 numbers per token, a third of what it would without grouped queries.


class KVCache:
    """The keys and values of one layer: S slots, written in place. Attention reads all of them, and the mask hides the
    empty ones, so shapes and addresses never change, as torch.compile and CUDA graphs require."""

    def __init__(self, model, B, S, slots):
        weight, config = model.lm_head.weight, model.config
        # float32 on a CPU, even if weights are 16-bit: attention would otherwise widen the whole cache at each step.
        dtype = torch.float32 if weight.device.type == "cpu" else weight.dtype
        shape = (B, config.num_key_value_heads, S, config.head_dim)
        # Not torch.empty: masked slots are multiplied by 0, and 0 x NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=weight.device)  # (B, K, S, D)
        self.values = torch.zeros_like(self.keys)
        self.slots = slots  # (T,), those that the next keys and values are written to

    def update(self, keys, values):
        """Write keys and values (B, K, T, D) into the current slots; return those of all slots, (B, K, S, D)."""
        self.keys.index_copy_(2, self.slots, keys.type_as(self.keys))
        self.values.index_copy_(2, self.slots, values.type_as(self.values))
        return self.keys, self.values

    def go_on(self, slots, copies):
        """Repeat each row, so that there are copies of it, and write to slots from now on."""
        self.slots = slots
        self.keys, self.values = (heads.repeat_interleave(copies, dim=0) for heads in (self.keys, self.values))


# Prompts of different lengths are aligned on the right, so that all rows continue in the same slot. Padding on the left
# of a shorter one is masked. Positions need no correction for it, since attention sees distances alone. Two prompts of
# 4 and of 2 tokens; 1 marks a slot that the token sees:
#
#     slot        0 1 2 3          slot        0 1 2 3
#     "the"       1 0 0 0          (padding)   1 0 0 0     padding sees itself, because a softmax over nothing
#     "old"       1 1 0 0          (padding)   0 1 0 0     has no value; no other token reads the result
#     "dog"       1 1 1 0          "a"         0 0 1 0
#     "sees"      1 1 1 1          "cat"       0 0 1 1


def attention_mask(token_slots, S, padding):
    """Which of S slots the tokens in token_slots (T,) see, where rows begin with padding (B, 1) slots: (B, 1, T, S)."""
    all_slots, own = torch.arange(S, device=token_slots.device), token_slots[:, None]  # (S,), (T, 1)
    return (((all_slots <= own) & (all_slots >= padding[:, :, None])) | (all_slots == own))[:, None]


def choose(logits, temperature, top_k, top_p, generator=None):
    """Draw the next token: (B, V) -> (B,) int64.

    temperature divides the logits: below 1 likely tokens become likelier, at 0 the likeliest is taken. top_k keeps the
    k likeliest (0: all), top_p the likeliest that together hold at least that probability (Holtzman et al. 2019, arXiv
    1904.09751). Without either, one of many thousand improbable tokens derails the text now and then.
    """
    logits = logits.float()
    if temperature == 0:
        return logits.argmax(-1)
    best, tokens = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), the likeliest first
    probabilities = ((best - best[:, :1]) / max(temperature, 1e-6)).softmax(-1)  # (B, k); differences never overflow
    if top_p < 1:
        superfluous = probabilities.cumsum(-1) - probabilities >= top_p  # those in front suffice
        probabilities = probabilities.masked_fill(superfluous, 0)
    # i is drawn with probability p_i if it has the largest p_i / e_i, where each e_i is drawn from an exponential
    # distribution. torch.multinomial does the same, but waits for a GPU.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return tokens.gather(1, (probabilities / noise).argmax(-1, keepdim=True)).squeeze(1)


# ---- The model ------------------------------------------------------------------------------------------------------
#
# The embedding has a row of C numbers for each of V tokens: 49,152 x 576 = 28,311,552 parameters, a fifth of the 135M.
# The head needs a matrix of the same shape, for the logits of all tokens, and uses the same one (Press & Wolf 2017,
# arXiv 1608.05859). A second table would cost another fifth, and a shared row is trained as input and as prediction.
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
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(dict(embed_tokens=embed_tokens, layers=layers, norm=make_norm(config)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.recompute = False  # train.py: --recompute_activations
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw the weights: normal, with standard deviation 1 / sqrt(C) unless the configuration says otherwise.

        With that, a sum of C products is as large as its inputs. There are two exceptions. The projections that write
        into the residual stream, o_proj and down_proj, are divided by sqrt(2 L): the stream is a sum of 2 L writes, and
        its size should not depend on the depth. The head, and so the embedding where it is tied, is divided by 4: its
        input has the length sqrt(C), so a matrix of full size would give logits of variance 1, preferences among tokens
        before any text was read, and a first loss of ln V + 1/2. With variance 1/16 it is ln V + 1/32.
        """
        std = self.config.initial_std
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers if writes_to_stream else 1
                nn.init.normal_(parameter, 0.0, std / math.sqrt(depth))
        nn.init.normal_(self.lm_head.weight, 0.0, std / 4)

    def forward(self, input_ids, targets=None):
        """Logits for the next token, or the loss where the next tokens are given.

        input_ids (B, T) int64 -> logits (B, T, V). With targets (B, T) int64, the token that follows each input -> the
        mean cross-entropy in nats, float32; a target of -100 is left out. Raises ValueError for too many positions.
        """
        hidden = self.hidden_states(input_ids, torch.arange(input_ids.size(1), device=input_ids.device))
        return self.lm_head(hidden) if targets is None else self.loss(hidden, targets)

    def hidden_states(self, input_ids, positions, mask=None, caches=None):
        """The residual stream after the last norm: tokens (B, T) at positions (T,) -> (B, T, C).

        Without a mask (B, 1, T, S) each token sees itself and all before it. Generation brings a cache for each layer.
        """
        if input_ids.size(1) > self.config.max_position_embeddings:
            raise ValueError(f"{input_ids.size(1)} tokens are more than max_position_embeddings allows")
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        rotary = rotary_table(positions, self.config)  # the same for all layers
        for layer, cache in zip(self.model.layers, caches or [None] * len(self.model.layers), strict=True):
            # For the backward pass a layer keeps all that it computed, or only its input (Chen et al. 2016, arXiv
            # 1604.06174) and runs once more when the pass arrives: less memory, a quarter more time.
            again = partial(recomputed, layer, use_reentrant=False, preserve_rng_state=False)  # no layer draws numbers
            run = again if self.recompute else layer
            x = run(x, rotary, mask, cache)
        return self.model.norm(x)

    def loss(self, hidden, targets):
        """The mean of -ln p(target), the cross-entropy in nats: hidden (B, T, C), targets (B, T) -> a float32 scalar.

        A nat is the unit of information with the natural logarithm, 1.44 bits. A guess among V equally likely tokens
        costs ln V nats, and ln 49,152 = 10.80 is where training has to begin.
        """
        logits = self.lm_head(hidden).float()  # (B, T, V), 85 times as wide as the stream; float32, to sum over V
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    @torch.inference_mode()
    def generate(
        self, input_ids, max_new_tokens=128, temperature=0.8, top_k=40, top_p=1.0, eos_token_id=0, generator=None
    ):
        """Continue prompts, a tensor (B, T) int64 or B lists of ids: yields (B,) int64, the next token of each.

        A row that has produced eos_token_id goes on yielding it, and generation ends at most 7 tokens after all have;
        None ends no row. A prompt that all rows share is read once. For top_k and the like see `choose`. Raises
        ValueError for an empty prompt, too many positions, NaN in logits.
        """
        device, room = self.lm_head.weight.device, self.config.max_position_embeddings
        prompts = [torch.as_tensor(row, device=device) for row in input_ids]
        B, T = len(prompts), max(len(row) for row in prompts)
        S, copies = T + max_new_tokens, 1
        if all(torch.equal(row, prompts[0]) for row in prompts):
            prompts, copies = prompts[:1], B
        if min(len(row) for row in prompts) == 0:
            raise ValueError("the prompt is empty: begin with bos_token_id")
        if room < S:
            raise ValueError(f"{T} tokens of prompt and {max_new_tokens} new ones are more than the model's {room}")
        padding = torch.tensor([[T - len(row)] for row in prompts], device=device)  # (B, 1)
        tokens = torch.stack([F.pad(row, (T - len(row), 0)) for row in prompts])  # (B, T)
        slots = torch.arange(T, device=device)  # where the tokens are written, and their positions
        caches = [KVCache(self, len(prompts), S, slots) for _ in self.model.layers]

        def predict():
            hidden = self.hidden_states(tokens, slots, attention_mask(slots, S, padding), caches)
            return self.lm_head(hidden[:, -1])  # (B, V)

        with torch.compiler.set_stance("force_eager"):  # each length of a prompt would be compiled anew
            logits = predict().repeat_interleave(copies, dim=0)  # the prompts, all tokens at once
        if logits.isnan().any():
            raise ValueError("the model's logits are NaN: its weights are damaged, or too large for this dtype")

        # From here on a step is one token for each row. All is written in place and nothing waits for the device, so a
        # GPU can record a step as a CUDA graph.
        padding, slots, tokens = padding.repeat_interleave(copies, dim=0), slots[-1:].clone(), tokens.new_empty(B, 1)
        finished = torch.zeros(B, dtype=torch.bool, device=device)
        for cache in caches:
            cache.go_on(slots, copies)

        def draw(logits):
            new = choose(logits, temperature, top_k, top_p, generator)  # (B,)
            if eos_token_id is not None:
                new = new.masked_fill(finished, eos_token_id)
                finished.logical_or_(new == eos_token_id)
            tokens.copy_(new[:, None])

        def step():
            slots.add_(1)
            draw(predict())

        draw(logits)
        if device.type == "cuda":
            from plumbing.generation import recorded

            step = recorded(step, generator)
        for i in range(max_new_tokens):
            yield tokens[:, 0].clone()
            # Whether all have finished is looked at now and then, because Python then waits for the device.
            if i + 1 == max_new_tokens or (eos_token_id is not None and i % 8 == 7 and finished.all()):
                return
            step()

    # ---- Loading and saving: a checkpoint is a folder as on the Hugging Face hub, and the names are the published ones

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu"):
        """The model in a checkpoint folder, in the newest checkpoint of a run's folder, or under an id on the hub.

        Raises ValueError, naming the field or the tensor, for anything that is not a whole model of this architecture.
        """
        from plumbing.pretrained import find_model, read_config, read_weights

        folder = find_model(name)
        with torch.device("meta"):  # shapes without memory: the tensors come from the file
            model = cls(read_config(folder, SmolLM2Config))
        read_weights(folder, model, dtype, device)
        return model

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors, in the dtype of the weights."""
        from plumbing.pretrained import write_model

        write_model(folder, self.config, dict(self.named_parameters()))


# ---- Counting: the sums of the comments above, as code --------------------------------------------------------------


def parameter_terms(config):
    """The parameters as two lists of (name, formula, count): those of one layer, and those outside of the layers."""
    V, C, F, D = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    layer = [
        ("q_proj", f"C x H D    {C} x {H * D}", C * H * D),
        ("k_proj", f"C x K D    {C} x {K * D}", C * K * D),
        ("v_proj", f"C x K D    {C} x {K * D}", C * K * D),
        ("o_proj", f"H D x C    {H * D} x {C}", H * D * C),
        ("gate_proj", f"C x F      {C} x {F}", C * F),
        ("up_proj", f"C x F      {C} x {F}", C * F),
        ("down_proj", f"F x C      {F} x {C}", F * C),
        ("two norms", f"2 x C      2 x {C}", 2 * C),
    ]
    tied = config.tie_word_embeddings
    head = ("head", "the embedding", 0) if tied else ("head", f"C x V      {C} x {V}", C * V)
    return layer, [("embedding", f"V x C      {V} x {C}", V * C), ("last norm", f"C          {C}", C), head]


def count_parameters(config):
    layer, once = parameter_terms(config)
    return config.num_hidden_layers * sum(count for *_, count in layer) + sum(count for *_, count in once)


def training_flops(config, T):
    """Floating-point operations to train on one token of a sequence of length T: 6 N + 6 L C T.

    Forward, each parameter of a matrix multiplies once and adds once, 2 N (Kaplan et al. 2020, arXiv 2001.08361,
    section 2.1); looking up an embedding is free. Attention multiplies with T / 2 earlier keys on average, and with as
    many values: 2 x 2 x C x T / 2 in each layer. This counts only the causal half; the full T x T square would be
    12 L C T. The backward pass costs twice the forward pass.
    """
    free = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (count_parameters(config) - free) + 6 * config.num_hidden_layers * config.hidden_size * T


def report(size):
    """Print the parameter count of one of the sizes, term by term, and what follows from it."""
    config = getattr(SmolLM2Config, f"smollm2_{size.replace('.', '_')}")()
    layer, once = parameter_terms(config)
    L, C, N = config.num_hidden_layers, config.hidden_size, count_parameters(config)
    per_layer = sum(count for *_, count in layer)
    with torch.device("meta"):
        module = SmolLM2(config)

    def line(name, formula, value):
        print(f"  {name:<40}{formula:<26}{value:>17,}")

    print(f"SmolLM2 {size}\n\nA layer")
    for term in (*layer, ("together", "", per_layer)):
        line(*term)
    print("\nThe model")
    for term in ((f"{L} layers", f"{L} x {per_layer:,}", L * per_layer), *once, ("parameters", "the sum", N)):
        line(*term)
    line("", "PyTorch counts", sum(parameter.numel() for parameter in module.parameters()))
    print("\nOperations to train on a token")
    for T in (512, 2048, 8192):
        line(f"in a sequence of {T}", "6 N + 6 L C T", training_flops(config, T))
    if size == "135m":
        print("\nCounts that come from a mistake")
        wide = dataclasses.replace(config, num_key_value_heads=config.num_attention_heads)
        line("K and V as wide as Q, two MLP matrices", "", count_parameters(wide) - L * C * config.intermediate_size)
        line("a learned table of 1024 positions", "", N + 1024 * C)


if __name__ == "__main__":
    size = sys.argv[1].lower() if len(sys.argv) > 1 else "135m"
    if size not in ("135m", "360m", "1.7b") or len(sys.argv) > 2:
        sys.exit(f"usage: python model.py [135m | 360m | 1.7b], not {' '.join(sys.argv[1:])}")
    report(size)
