"""SmolLM2-360M by its published recipe, on the first file of cosmopedia-v2.

The original saw 4 T tokens: 2,600,000 steps of 1,572,864 (128 GPUs x 6 sequences x 2048 tokens), 2000 of them warmup,
the last 520,000 the linear decay to 0. Here it makes four passes over the 270 M tokens of one file.
"""

from model import SIZES

out_dir = "out/smollm2-360m"

prepare = dict()

train = dict(
    out_dir=out_dir,
    batch_tokens=1_572_864,
    max_steps=700,
    warmup_steps=70,
    decay_steps=140,
    model=SIZES["360m"],
)

sample = dict(model=out_dir)
