"""The model of config/tiny.py, which has to be trained first, learns to answer questions about Python: as long again.

9,000 questions, such as "What does `shutil.copyfile` do?", and the first sentence of the docstring as answer. A model
of this size learns the form, a sentence and then to stop. What it says is mostly wrong.
"""

data_dir = "data/python-questions"
out_dir = "out/tiny_chat"
prompt = "What does `shutil.copyfile` do?"

prepare = dict(data_dir=data_dir, source="python-questions", tokenizer="data/python-docs", val_fraction=0.05)

train = dict(
    data_dir=data_dir,
    out_dir=out_dir,
    init_from="out/tiny",
    seq_len=256,
    batch_tokens=2048,
    compile=False,
    max_steps=600,
    optimizer="muon",
    learning_rate=0.003,
    warmup_steps=20,
    decay_steps=400,
    weight_decay=0.0,
    log_interval=20,
    eval_tokens=32_768,
    save_interval=300,
    sample_prompt=prompt,
)

sample = dict(model=out_dir)
