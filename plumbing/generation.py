"""What makes generation fast, and changes nothing in its result."""

import torch


@torch.no_grad()
def join(model):
    """Store side by side the matrices that model.py multiplies as one, so that no step has to join them again. The
    parameters become views of the joined ones: nothing is stored twice, but the model can no longer be trained."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for block, *projections in (
            (attention, attention.q_proj, attention.k_proj, attention.v_proj),
            (mlp, mlp.gate_proj, mlp.up_proj),
        ):
            block.joined = torch.cat([projection.weight for projection in projections])
            rows = block.joined.split([projection.out_features for projection in projections])
            for projection, its_rows in zip(projections, rows, strict=True):
                projection.weight = torch.nn.Parameter(its_rows, requires_grad=False)


def recorded(step, generator):
    """A function that does what step does, from its second call on as a CUDA graph. Step takes and returns nothing,
    works in place, and draws random numbers from generator (None: the device's own).

    A step of generation launches hundreds of kernels, and Python takes longer to launch one than the GPU to run it. A
    graph is launched as a whole.
    """
    graph, calls = torch.cuda.CUDAGraph(), 0

    def run():
        nonlocal calls
        calls += 1
        if calls == 1:  # as it is: what libraries set up and compilers compile on their first call is not recorded
            return step()
        if calls == 2:
            if generator is not None:
                graph.register_generator_state(generator)
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the device
                step()
        graph.replay()

    return run
