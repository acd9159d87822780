"""A SmolLM2 that two CPU cores train in three minutes, on the documentation that Python brings along."""

data_dir = "data/python-docs"
out_dir = "out/tiny"

prepare = dict(data_dir=data_dir, source="python-docs", tokenizer="train:4096", val_fraction=0.05)

model = dict(
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=1024,
    rope_theta=10_000,
)

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    seq_len=256,
    micro_batch=16,
    batch_tokens=4096,
    max_steps=1000,
    optimizer="muon",
    learning_rate=0.01,
    warmup_steps=50,
    decay_steps=400,
    log_interval=50,
    eval_interval=250,
    eval_tokens=65_536,
    save_interval=500,
    sample_interval=250,
    sample_prompt="Return the",
    model=model,
)

sample = dict(model=out_dir, prompt="Return the", max_new_tokens=200)
