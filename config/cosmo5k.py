"""A small run of SmolLM2-135M on cosmopedia-v2: 5000 steps of 32 x 512 tokens, and 50 more.

    python prepare.py config/cosmo5k.py
    python train.py config/cosmo5k.py
    python train.py config/cosmo5k.py --resume=True --max_steps=5050 --sample_interval=10

The rate stays level after its warmup, so the second part goes on as if the first had never ended. 82 M tokens are less
than one file of the corpus has: no text comes twice.
"""

data_dir = "data/cosmopedia-v2"
out_dir = "out/cosmo5k"
prompt = "Once upon a time"

prepare = dict(
    data_dir=data_dir,
    source="HuggingFaceTB/smollm-corpus/cosmopedia-v2",
    shards="0",
    tokenizer="HuggingFaceTB/cosmo2-tokenizer",
)

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    seq_len=512,
    micro_batch=32,
    batch_tokens=16_384,
    max_steps=5000,
    optimizer="adamw",
    learning_rate=3e-4,
    warmup_steps=100,
    decay_steps=0,
    grad_clip=1.0,
    eval_interval=500,
    eval_tokens=262_144,
    save_interval=500,
    keep_checkpoints=11,
    sample_interval=500,
    sample_prompt=prompt,
    model=dict(max_position_embeddings=2048, rope_theta=10_000),
)

sample = dict(model=out_dir, prompt=prompt)
