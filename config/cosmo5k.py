"""A small run of SmolLM2-135M on cosmopedia-v2: 5000 steps of 32 x 512 tokens, and 50 more.

    python prepare.py config/cosmo5k.py
    python train.py config/cosmo5k.py
    python train.py config/cosmo5k.py --resume=True --max_steps=5050 --sample_interval=10

The learning rate stays level after its warmup, so the second part continues as if the first had never ended. 82 M
tokens are less than one file of the corpus has: no text comes twice.
"""

out_dir = "out/cosmo5k"

prepare = dict()

train = dict(
    out_dir=out_dir,
    seq_len=512,
    batch_tokens=16_384,
    max_steps=5000,
    learning_rate=3e-4,
    decay_steps=0,
    eval_interval=500,
    eval_tokens=262_144,
    save_interval=500,
    keep_checkpoints=11,
    sample_interval=500,
)

sample = dict(model=out_dir)
