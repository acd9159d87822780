"""The full SmolLM2-135M on one batch of 256 tokens, again and again, until it knows them by heart.

The first thing to run after a change to model or loop. A missing gradient, a wrong scale or rate, or a state that is
never updated shows within minutes: the loss does not fall from 10.8 to almost 0. What it learns is worth nothing:
val_loss rises meanwhile, which is what overfitting means.
"""

data_dir = "data/python-docs"
out_dir = "out/overfit"

prepare = dict(data_dir=data_dir, source="python-docs", tokenizer="train:4096", val_fraction=0.05)

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    seq_len=128,
    micro_batch=2,
    batch_tokens=256,
    repeat_steps=1,
    max_steps=100,
    learning_rate=1e-3,
    warmup_steps=10,
    decay_steps=20,
    weight_decay=0.0,
    eval_interval=50,
    eval_tokens=2048,
    sample_interval=0,
    model=dict(vocab_size=49_152),  # more tokens than the data has
)

sample = dict(model=out_dir)
