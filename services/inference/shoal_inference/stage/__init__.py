"""One stage: a child process that holds its own layers of a model and is linked to the others in a TCP ring.

The parent (the inference service) uses `spawn.StageProcess` and the messages in `control`; everything else here
runs in the child, `python -m shoal_inference.stage --control-fd N`.

    control, channel, spawn     parent and child: newline-delimited JSON over a socketpair
    frames, handshake           the ring's bytes, pure (docs/wire-activations.md)
    connection, ring            the ring's sockets: deadlines, back-off, replacement
    architectures, mlxlm, shard which models, mlx-lm behind one adapter, the layers that are kept
    engine                      caches, forward passes and sampling, on the one MLX thread
    decide                      admission, prefill steps, numbering, the end of an answer; pure
    requests, lead, follow      what is in flight; rank 0's side of a request; every other rank's
    process                     the child from start to exit
"""
