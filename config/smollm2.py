"""SmolLM2-135M by its published recipe, on the first file of cosmopedia-v2. All settings are the defaults.

The original saw 2 T tokens: 2,000,000 steps of 1,048,576 (64 GPUs x 8 sequences x 2048 tokens), 2000 of them warmup,
the last 400,000 the linear decay to 0, with this optimizer, learning rate and clipping.

One file of the corpus has about 270 M tokens, 257 such steps. Up to four passes over the same text teach almost as much
as new text (Muennighoff et al. 2023, arXiv 2305.16264): so 1000 steps, 100 of them warmup, the last 200 the decay. For
more text, `python prepare.py config/smollm2.py --shards=0-7`, and more steps to go with it.
"""

prepare = dict()
train = dict()
sample = dict()
