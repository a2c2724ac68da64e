"""Training: one objective, one compiled step and one loop for all systems.

| module | contents |
|---|---|
| `objective` | the objective for one example, and the loss of a batch |
| `batches` | the images of each step, and their way to the devices |
| `step` | state, optimizer and the compiled step |
| `loop` | `fit`: epochs, log, checkpoints, resumption |
"""

from vlae_jax.parallel.options import keep_threads_awake

keep_threads_awake()
