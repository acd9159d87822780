"""A SmolLM2 of 3 million parameters, trained in minutes on a CPU, on the documentation that ships with Python.

Its proportions are those of the 135M: heads of 64, three query heads to a key/value head, an MLP of 8/3 of the width.
Its optimizer is Muon, which in so few steps needs half of AdamW's time to the same loss. It is not compiled, because on
a CPU that takes as long as it would save here.
"""

data_dir = "data/python-docs"
out_dir = "out/tiny"
prompt = "Parameters"

prepare = dict(data_dir=data_dir, source="python-docs", tokenizer="train:4096", val_fraction=0.05)

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    seq_len=256,
    batch_tokens=2048,
    compile=False,
    max_steps=500,
    optimizer="muon",
    learning_rate=0.01,
    warmup_steps=20,
    decay_steps=250,
    log_interval=20,
    eval_tokens=65_536,
    save_interval=250,
    sample_prompt=prompt,
    model=dict(
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=3,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    ),
)

sample = dict(model=out_dir, prompt=prompt, temperature=0.7)
