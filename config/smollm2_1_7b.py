"""SmolLM2-1.7B by its published recipe, on the first file of cosmopedia-v2.

The original saw 11 T tokens: 5,240,000 steps of 2,097,152 (256 GPUs x 4 sequences x 2048 tokens), 2000 of them warmup,
the last 524,000 the linear decay to 0. Here it makes four passes over the 270 M tokens of one file.
"""

from model import SIZES

out_dir = "out/smollm2-1.7b"

prepare = dict()

train = dict(
    out_dir=out_dir,
    batch_tokens=2_097_152,
    max_steps=500,
    learning_rate=5e-4,
    warmup_steps=50,
    decay_steps=50,
    model=SIZES["1.7b"],
)

sample = dict(model=out_dir)
