"""SmolLM2-360M by its published recipe, on the first file of cosmopedia-v2.

The original saw 4 T tokens: 2,600,000 steps of 1,572,864 (128 GPUs x 6 windows x 2048 tokens), 2000 of them warmup, the
last 520,000 the linear decay to 0. Here as many as make four passes over the 270 M tokens of one file.
"""

data_dir = "data/cosmopedia-v2"
out_dir = "out/smollm2-360m"

prepare = dict(
    data_dir=data_dir,
    source="HuggingFaceTB/smollm-corpus/cosmopedia-v2",
    shards="0",
    tokenizer="HuggingFaceTB/cosmo2-tokenizer",
)

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    seq_len=2048,
    micro_batch=6,
    batch_tokens=1_572_864,
    max_steps=700,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup_steps=70,
    decay_steps=140,
    weight_decay=0.01,
    grad_clip=1.0,
    model=dict(
        hidden_size=960,
        intermediate_size=2560,
        num_hidden_layers=32,
        num_attention_heads=15,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        rope_theta=10_000,
    ),
)

sample = dict(model=out_dir)
