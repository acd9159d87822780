"""SmolLM2-135M learns to answer: supervised fine-tuning by the published recipe, on smol-smoltalk.

460,000 conversations, about 0.43 billion tokens, twice: 820 steps of 128 sequences of 8192 tokens, the first tenth of
them warmup. The original's learning rate falls along a cosine, here along a line, and its loss was on all tokens;
`--train_on=all` does that. Here it is on the answers alone, which is what the model will be asked for.
"""

data_dir = "data/smol-smoltalk"
out_dir = "out/chat"
prompt = "What is the capital of France?"

prepare = dict(data_dir=data_dir, source="HuggingFaceTB/smol-smoltalk/data", shards="0-3")

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    init_from="HuggingFaceTB/SmolLM2-135M",
    seq_len=8192,
    max_steps=820,
    learning_rate=1e-3,
    warmup_steps=82,
    decay_steps=738,
    weight_decay=0.0,
    sample_prompt=prompt,
)

sample = dict(model=out_dir)
