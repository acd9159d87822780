"""SmolLM2-135M by its published recipe, on the first file of cosmopedia-v2.

The original saw 2 T tokens: 2,000,000 steps of 1,048,576 (64 GPUs x 8 windows x 2048 tokens), 2000 of them warmup, the
last 400,000 the linear decay to 0, all with these rates and this clipping.

One file of the corpus has about 270 M tokens, 257 such steps. Up to four passes over the same text teach almost as much
as new text (Muennighoff et al. 2023, arXiv 2305.16264): so 1000 steps, the last fifth of them the decay. More text is
`python prepare.py config/smollm2.py --shards=0-7`, and more steps to go with it.
"""

data_dir = "data/cosmopedia-v2"
out_dir = "out/smollm2"

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
    micro_batch=8,  # as many as the device has memory for; the result is the same
    batch_tokens=1_048_576,
    max_steps=1000,
    optimizer="adamw",
    learning_rate=3e-3,
    warmup_steps=100,
    decay_steps=200,
    weight_decay=0.01,
    grad_clip=1.0,
    model=dict(max_position_embeddings=2048, rope_theta=10_000),  # the published 8192 came in a second stage
)

sample = dict(model=out_dir)
