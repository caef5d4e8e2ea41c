"""One stage: a child process that holds its own layers of a model and is linked to the others in a TCP ring.

The parent (the inference service) uses `ipc` and `errors`; everything else here runs in the child,
`python -m shoal_inference.stage --control-fd N`. docs/architecture.md lists the packages.
"""
