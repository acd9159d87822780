"""SmolLM2: the whole architecture, to be read from top to bottom.

SmolLM2 (Allal et al. 2025, arXiv 2502.02737) is a family of three language models with 135M, 360M and 1.7B parameters.
The architecture is Llama's: a decoder-only transformer with RMSNorm before each block, grouped-query attention with
rotary positions, a gated MLP, no biases, and one matrix that serves as both input embedding and output head.

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
    L layers (30)         S tokens in the cache      N parameters

Each part's comment ends with what it adds to the 134,515,008 parameters of the 135M. `python model.py` prints that sum,
and the number of operations that training takes per token; `python model.py 1.7b` does so for another size.
"""

import math
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

# ---- Configuration --------------------------------------------------------------------------------------------------

# The sizes, as changes to the defaults of SmolLM2Config, which are the 135M's.
SIZES = {
    "135m": dict(),
    "360m": dict(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
    ),
    "1.7b": dict(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        initializer_range=0.02,
    ),
}


@dataclass
class SmolLM2Config:
    """The shape of a model. Fields are the keys of a checkpoint's config.json; defaults are the published 135M."""

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
    bos_token_id: int = 0  # <|endoftext|>: it ends each document, so it also precedes the next one
    eos_token_id: int = 0  # the token that ends a text

    @classmethod
    def smollm2_135m(cls):
        return cls(**SIZES["135m"])

    @classmethod
    def smollm2_360m(cls):
        return cls(**SIZES["360m"])

    @classmethod
    def smollm2_1_7b(cls):
        return cls(**SIZES["1.7b"], rope_theta=130_000.0)  # as published, after its training on long texts

    @property
    def head_dim(self):
        return self.hidden_size // self.num_attention_heads  # D

    @property
    def initial_std(self):
        return self.initializer_range or 1 / math.sqrt(self.hidden_size)


# ---- RMSNorm --------------------------------------------------------------------------------------------------------
#
# The residual stream grows with every addition, but a block needs its input at one scale. RMSNorm (Zhang & Sennrich
# 2019, arXiv 1910.07467) divides a vector by its root mean square and multiplies each channel by a learned weight.
# LayerNorm also subtracts the mean and adds a bias; models turned out to train just as well without either.
#
#     y = x / sqrt(mean(x^2) + eps) * weight
#
# The mean is taken in float32 whatever the dtype of x: bfloat16 keeps 8 significant bits, too few for a sum of squares.
#
# Parameters: C = 576. There are two norms in each layer and one before the head: 576 x (2 x 30 + 1) = 35,136.


class RMSNorm(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x):  # (..., C) -> (..., C)
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)  # (..., 1)
        return (x.float() * scale).type_as(x) * self.weight


# ---- Attention ------------------------------------------------------------------------------------------------------
#
# Attention is how a token reads the tokens before it. Each token has a query, a key and a value. Its query is compared
# with the keys of all tokens up to itself. The better it matches a key, the more of that token's value is taken:
#
#     weights = softmax(q k^T / sqrt(D))    over the tokens up to this one
#     y = weights v
#
# The dot product of two vectors of D independent numbers, of mean 0 and variance 1, has variance D. Divided by sqrt(D)
# it has variance 1 again; without that, softmax would start out nearly one-hot, where its gradient vanishes.
#
# "Up to this one" is the causal mask. Because no token sees a later one, the outputs at all T positions are predictions
# that never saw their answer. So one forward pass over a sequence trains T predictions at once.
#
# All this happens in H = 9 heads at once, each D = 64 wide, so a token can look for nine things. In grouped-query
# attention (Ainslie et al. 2023, arXiv 2305.13245) three query heads share one key/value head. Generation has to keep
# the keys and values of all earlier tokens; sharing them cuts that memory to a third, and costs little quality. So
# k_proj and v_proj have 3 x 64 = 192 outputs; assuming 576 is a frequent mistake in counting this model.
#
# Parameters of a layer:
#     q_proj   C x H D = 576 x 576 = 331,776
#     k_proj   C x K D = 576 x 192 = 110,592
#     v_proj   C x K D = 576 x 192 = 110,592
#     o_proj   H D x C = 576 x 576 = 331,776
#                           in all   884,736


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        assert C % (2 * H) == 0, "each head is C / H wide, and rotary positions take its channels in pairs"
        assert H % K == 0, "each key/value head serves the same number of query heads"
        self.head_dim = D
        self.q_proj = nn.Linear(C, H * D, bias=False)
        self.k_proj = nn.Linear(C, K * D, bias=False)
        self.v_proj = nn.Linear(C, K * D, bias=False)
        self.o_proj = nn.Linear(H * D, C, bias=False)

    def forward(self, x, rotary, mask=None, cache=None):  # (B, T, C) -> (B, T, C); no mask or cache in training
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, D)
        q = rotate(q, rotary)  # by its position, as the next section explains: (B, H, T, D)
        k = rotate(k, rotary)  # (B, K, T, D)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, D): earlier tokens, then these
        if not kernel_shares_heads(q, mask):  # copy each key/value head for each of its query heads
            copies = q.size(1) // k.size(1)
            k, v = k.repeat_interleave(copies, dim=1), v.repeat_interleave(copies, dim=1)  # (B, H, S, D)
        causal = mask is None and T > 1  # T = 1 is the newest token, which reads the whole cache
        grouped = k.size(1) < q.size(1)
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=grouped)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # (B, T, C)


def kernel_shares_heads(q, mask):
    """Whether PyTorch's fused attention lets query heads share a key/value head.

    It does on CPUs, and on NVIDIA GPUs since Ampere (2020, compute capability 8.0) in 16 bits without a mask. Elsewhere
    it would fall back to a version that holds all T x S weights in memory.
    """
    if q.device.type == "cuda":
        return mask is None and q.dtype.itemsize == 2 and torch.cuda.get_device_properties(q.device).major >= 8
    return q.device.type == "cpu"


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
# and a pattern that is learned in one place in a text holds everywhere. Like the hands of a clock, fast pairs tell
# small distances apart and slow pairs large ones. With D = 64 and theta = 100,000:
#
#     pair j              0       8       16       24        31
#     turns once in     6.3     112    1,987   35,333   438,460 tokens
#
# Which channels form a pair is a convention, and the wrong one is the most common mistake in writing this model. The
# paper pairs neighbours, (0, 1), (2, 3), ... ("interleaved"); the checkpoints of this family pair channel j with
# channel j + D/2 ("half-split"). Weights trained with one convention are noise under the other.
#
# Parameters: none. (A learned table of 1024 positions instead would add 1024 x 576 = 589,824.)


def rotary_table(positions, config):
    """Cosines and sines of the angles of all pairs at positions (T,) int64: (2, T, D/2) float32."""
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim  # (D/2,)
    speeds = 1.0 / config.rope_theta**exponents  # (D/2,)
    angles = positions.float()[:, None] * speeds  # (T, D/2)
    return torch.stack((angles.cos(), angles.sin()))  # (2, T, D/2)


def rotate(x, rotary):
    """Rotate each pair (a, b), channels j and j + D/2 of x (B, heads, T, D), by the angles in rotary (2, T, D/2)."""
    cos, sin = rotary  # (T, D/2) each
    a, b = x.float().chunk(2, dim=-1)  # (B, heads, T, D/2) each
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1).type_as(x)  # (B, heads, T, D)


# ---- The MLP --------------------------------------------------------------------------------------------------------
#
# Attention moves information between tokens; the MLP works on each token alone. SwiGLU (Shazeer 2020, arXiv 2002.05202)
# has three matrices where a classic MLP has two: up computes F = 1536 features, gate decides through the smooth switch
# silu(x) = x sigmoid(x) how much of each passes, and down brings the result back to the residual stream. A classic MLP
# is 4 C wide; with three matrices, 8/3 C costs the same: 8/3 x 576 = 1536. (The 1.7B is 4 C wide all the same.)
#
# To try another activation, norm or order of blocks, change it in this file and in `decode_layer` of sample.py, which
# repeats the layer for speed. Other tools cannot run such a checkpoint, with one exception: if only the activation has
# changed, and they know the new one, give its name as hidden_act in plumbing/pretrained.py.
#
# Parameters of a layer: 3 x C x F = 3 x 576 x 1536 = 2,654,208.


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
# Normalize, attend, add; normalize, MLP, add. Only the inputs of the blocks are normalized, never the stream itself
# ("pre-norm"), so gradients reach every layer through additions alone.
#
# Parameters: 884,736 (attention) + 2,654,208 (MLP) + 2 x 576 (norms) = 3,540,096; thirty layers have 106,202,880.


class DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = MLP(config)

    def forward(self, x, rotary, mask=None, cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# ---- The model ------------------------------------------------------------------------------------------------------
#
# The embedding has a row of C numbers for each of V tokens: 49,152 x 576 = 28,311,552 parameters, a fifth of the 135M.
# The head turns the stream back into tokens. It gives each token of the vocabulary a logit: an unnormalized score,
# which softmax turns into a probability. That needs a matrix of the same shape, and the model uses the same one (Press
# & Wolf 2016, arXiv 1608.05859). A second table would cost another fifth, and a shared row is trained twice: as input
# and as prediction.
#
# Parameters: 28,311,552 (embedding) + 106,202,880 (layers) + 576 (last norm) + 0 (head, tied) = 134,515,008.


class SmolLM2(nn.Module):
    """The language model. Its parameters have the names of transformers' LlamaForCausalLM: checkpoints fit both."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.model = nn.ModuleDict(dict(embed_tokens=embed_tokens, layers=layers, norm=RMSNorm(config)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialize()

    @torch.no_grad()
    def initialize(self):
        """Draw the matrices from a normal distribution. Vectors stay as they were made: the weights of norms at 1.

        The standard deviation is 1 / sqrt(C) unless the configuration says otherwise: a sum of C products is then as
        large as its inputs. (down_proj sums 8/3 C products, but of gated features, whose mean square is 0.36: 8/3 x
        0.36 is about 1 again.) There are two exceptions. First, o_proj and down_proj: the residual stream sums 2 L of
        their outputs, so dividing them by sqrt(2 L) keeps the size of the stream independent of the depth. Second, the
        head, and with it a tied embedding, has a quarter of that standard deviation, so that a new model hardly prefers
        any token. A guess among V equally likely tokens costs ln V = 10.80. Random logits of variance s cost s / 2
        more, because the mean of exp(logit) is exp(s / 2). Here s is C x (1 / (4 sqrt(C)))^2 = 1/16, so the first loss
        is ln V + 1/32 = 10.83.
        """
        std = self.config.initial_std
        for name, parameter in self.named_parameters():
            if parameter.dim() >= 2:
                writes_to_stream = name.endswith(("o_proj.weight", "down_proj.weight"))
                depth = 2 * self.config.num_hidden_layers if writes_to_stream else 1
                nn.init.normal_(parameter, 0.0, std / math.sqrt(depth))
        nn.init.normal_(self.lm_head.weight, 0.0, std / 4)

    def forward(self, input_ids, targets=None):
        """Logits for the next token at each position, or the loss where the next tokens are given.

        input_ids (B, T) int64 -> logits (B, T, V). With targets (B, T) int64, the token after each input, -> the mean
        cross-entropy in nats, float32; targets of -100 are left out. Raises ValueError for too many positions.
        """
        hidden = self.hidden_states(input_ids, torch.arange(input_ids.size(1), device=input_ids.device))
        return self.lm_head(hidden) if targets is None else self.loss(hidden, targets)

    def hidden_states(self, input_ids, positions, mask=None, caches=None):
        """The residual stream after the last norm: tokens (B, T) at positions (T,) -> (B, T, C).

        Each token reads itself and all before it. Generation passes caches, one per layer, whose tokens are read as
        well. When they are not empty, T must be 1, or a mask that broadcasts to (B, H, T, S) must say which tokens may
        be read. This is how sample.py reads the next turn of a conversation, and tools/evaluate.py several answers.
        """
        if input_ids.size(1) > self.config.max_position_embeddings:
            raise ValueError(f"{input_ids.size(1)} tokens are more than max_position_embeddings allows")
        x = self.model.embed_tokens(input_ids)  # (B, T, C)
        rotary = rotary_table(positions, self.config)  # the same for all layers
        for layer, cache in zip(self.model.layers, caches or [None] * len(self.model.layers), strict=True):
            x = layer(x, rotary, mask, cache)
        return self.model.norm(x)

    def loss(self, hidden, targets):
        """The mean of -ln p(target), the cross-entropy: hidden (B, T, C), targets (B, T) -> a float32 scalar.

        It is in nats, units of information like bits, but with the natural logarithm: a nat is 1.44 bits.
        """
        logits = self.lm_head(hidden).float()  # (B, T, V), 85 times as wide as the stream; float32, to sum over V
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return nats / (targets != -100).sum().clamp(min=1)  # 0, and not 0 / 0, if there are no targets

    # A checkpoint is a folder as on the Hugging Face hub, with the same names of files and tensors.

    @classmethod
    def from_pretrained(cls, name, dtype=torch.float32, device="cpu"):
        """Load a checkpoint folder, the newest checkpoint of a run's folder, or a model by its id on the hub.

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

    # A model writes by predicting the next token, again and again: predict, choose, append.

    @torch.inference_mode()
    def generate(
        self, input_ids, max_new_tokens=128, temperature=0.8, top_k=40, top_p=1.0, eos_token_id=None, generator=None
    ):
        """Continue texts of equal length: input_ids (B, T) int64 -> yields (B,) int64, the next token of each.

        A text that has produced eos_token_id (None: the configuration's; -1: no text ends early) goes on yielding it,
        and generation ends when all have. For temperature, top_k and top_p see `choose`. Raises ValueError for no token
        or too many positions, and TypeError for anything but such a tensor.
        """
        if not isinstance(input_ids, torch.Tensor) or input_ids.dim() != 2:
            raise TypeError("input_ids must be a tensor (B, T) of ids: torch.tensor([tokenizer.encode(text).ids])")
        end = self.config.eos_token_id if eos_token_id is None else eos_token_id
        device = self.lm_head.weight.device
        tokens, (B, T) = input_ids.to(device), input_ids.shape
        if T == 0:
            raise ValueError("the prompt is empty: begin with bos_token_id")
        if (room := self.config.max_position_embeddings) < T + max_new_tokens:
            raise ValueError(f"{T} tokens of prompt and {max_new_tokens} new ones are more than the model's {room}")
        caches, positions = [KVCache() for _ in self.model.layers], torch.arange(T, device=device)
        finished = torch.zeros(B, dtype=torch.bool, device=device)
        for _ in range(max_new_tokens):
            hidden = self.hidden_states(tokens, positions, caches=caches)  # predict: T tokens of prompt, then 1 each
            new = choose(self.lm_head(hidden[:, -1]), temperature, top_k, top_p, generator)  # choose: (B,)
            new = new.masked_fill(finished, end)
            finished |= new == end
            yield new
            if finished.all():
                return
            tokens, positions = new[:, None], positions[-1:] + 1  # append: the cache holds all earlier ones


# ---- Generation: a cache and a choice -------------------------------------------------------------------------------
#
# Keys and values of earlier tokens never change, as no token reads a later one. So they are kept. Without this cache n
# new tokens cost n (n + 1) / 2 positions of work, with it n. It takes 2 x L x K x D = 2 x 30 x 3 x 64 = 11,520 numbers
# per token, a third of what it would without grouped queries. sample.py does the same faster.


class KVCache:
    """The keys and values of one layer's tokens so far. It grows with each new token."""

    def __init__(self):
        self.keys = self.values = None

    def append(self, keys, values):
        """Add keys and values (B, K, T, D) of new tokens; return those of all S tokens so far, (B, K, S, D) each."""
        if self.keys is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


def choose(logits, temperature, top_k, top_p, generator=None):
    """Draw the next token: (B, V) -> (B,) int64.

    temperature divides the logits: below 1, likely tokens become likelier; at 0, the likeliest is taken. top_k keeps
    the k likeliest (0: all), top_p the likeliest that together hold at least that probability (Holtzman et al. 2019,
    arXiv 1904.09751). Without either, the text derails now and then on one of thousands of improbable tokens.
    """
    logits = logits.float()
    if temperature < 1e-6:  # 0, or so low that dividing by it could overflow
        return logits.argmax(-1)
    best, tokens = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # (B, k), the likeliest first
    probabilities = (best / temperature).softmax(-1)  # (B, k)
    if top_p < 1:
        superfluous = probabilities.cumsum(-1) - probabilities >= top_p  # the likelier ones already add up to top_p
        probabilities = probabilities.masked_fill(superfluous, 0)
    # Divide each p_i by a random number from an exponential distribution: quotient i is the largest with a probability
    # proportional to p_i. torch.multinomial draws as well, but makes Python wait for the GPU.
    noise = torch.empty_like(probabilities).exponential_(generator=generator)
    return tokens.gather(1, (probabilities / noise).argmax(-1, keepdim=True)).squeeze(1)


# ---- Counting: the sums of the comments above, as code --------------------------------------------------------------


def parameter_terms(config):
    """The matrices as two lists of (name, rows, columns): those of one layer, and those outside the layers."""
    V, C, width, D = config.vocab_size, config.hidden_size, config.intermediate_size, config.head_dim
    H, K = config.num_attention_heads, config.num_key_value_heads
    attention = [("q_proj", C, H * D), ("k_proj", C, K * D), ("v_proj", C, K * D), ("o_proj", H * D, C)]
    mlp = [("gate_proj", C, width), ("up_proj", C, width), ("down_proj", width, C)]
    head = ("head, tied to it", 0, C) if config.tie_word_embeddings else ("head", V, C)
    return [*attention, *mlp, ("two norms", 2, C)], [("embedding", V, C), head, ("last norm", 1, C)]


def count_parameters(config):
    layer, once = (sum(rows * columns for _, rows, columns in terms) for terms in parameter_terms(config))
    return config.num_hidden_layers * layer + once


def training_flops(config, T):
    """Floating-point operations to train on one token of a sequence of length T: 6 N + 6 L C T.

    In the forward pass each entry of a matrix takes a multiplication and an addition, 2 N (Kaplan et al. 2020, arXiv
    2001.08361, section 2.1); looking up an embedding is free. Attention multiplies with T / 2 earlier keys on average,
    and with as many values: 2 x 2 x C x T / 2 in each layer. This counts only the causal half; the full T x T square
    would be 12 L C T. The backward pass costs twice the forward pass.
    """
    free = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    return 6 * (count_parameters(config) - free) + 6 * config.num_hidden_layers * config.hidden_size * T


def report(size):
    """Print the parameter count of one of the sizes, term by term, and what follows from it."""
    config = SmolLM2Config(**SIZES[size])
    layer, once = parameter_terms(config)
    L, C, N = config.num_hidden_layers, config.hidden_size, count_parameters(config)
    per_layer = sum(rows * columns for _, rows, columns in layer)
    with torch.device("meta"):
        module = SmolLM2(config)

    def line(name, value, formula=""):
        print(f"  {name:<40}{formula:<20}{value:>17,}")

    print(f"SmolLM2 {size}\n\nA layer")
    for name, rows, columns in layer:
        line(name, rows * columns, f"{rows} x {columns}")
    line("in all", per_layer)
    print("\nThe model")
    line(f"{L} layers", L * per_layer, f"{L} x {per_layer:,}")
    for name, rows, columns in once:
        line(name, rows * columns, f"{rows} x {columns}")
    line("parameters", N)
    line("as PyTorch counts them", sum(parameter.numel() for parameter in module.parameters()))
    print("\nOperations of training, per token")
    for T in (512, 2048, 8192):
        line(f"in a sequence of {T}", training_flops(config, T), "6 N + 6 L C T")
    if size == "135m":
        print("\nCounts that come from a mistake")
        line("a head that is not tied", count_parameters(replace(config, tie_word_embeddings=False)))
        line("a learned table of 1024 positions", N + 1024 * C)
        wide = count_parameters(replace(config, num_key_value_heads=config.num_attention_heads))
        line("keys and values as wide as queries", wide)
        line("that, and two MLP matrices, not three", wide - L * C * config.intermediate_size)


if __name__ == "__main__":
    size = sys.argv[1].lower() if len(sys.argv) > 1 else "135m"
    if size not in SIZES or len(sys.argv) > 2:
        sys.exit(f"usage: python model.py [{' | '.join(SIZES)}], not {' '.join(sys.argv[1:])}")
    report(size)
