"""Watch a run elsewhere than in its metrics.jsonl: --log_to=tensorboard, --log_to=wandb.

Each is a package of its own, imported only when asked for.
"""

import dataclasses
import sys
from pathlib import Path


def open_tracker(settings, step):
    """A function that is called with each line's metrics, {name: number}; exits with one sentence if it cannot be.

    A run that is resumed after so many steps goes on in the same curves.
    """
    if settings.log_to == "none":
        return lambda metrics: None
    try:
        return {"tensorboard": tensorboard, "wandb": wandb}[settings.log_to](settings, step)
    except ImportError:
        sys.exit(f"--log_to={settings.log_to} needs a package that is not here: pip install {settings.log_to}")


def tensorboard(settings, step):
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(settings.out_dir, purge_step=step + 1)  # what was written later than this step is dropped

    def track(metrics):
        for name, value in metrics.items():
            writer.add_scalar(name, value, metrics["step"])
        writer.flush()

    return track


def wandb(settings, step):
    import wandb

    out_dir = Path(settings.out_dir)
    id_file = out_dir / "wandb_id.txt"  # under which the service knows this run
    run_id = id_file.read_text() if step and id_file.exists() else None
    try:
        run = wandb.init(project="smollm2", name=out_dir.name, dir=out_dir, id=run_id, resume="allow",
                         config=dataclasses.asdict(settings))  # fmt: skip
    except wandb.Error as error:
        sys.exit(f"--log_to=wandb: {error}; WANDB_MODE=offline needs no account.")
    id_file.write_text(run.id)
    run.define_metric("*", step_metric="step")  # not the number of calls, which a resumed run would begin again
    return run.log
