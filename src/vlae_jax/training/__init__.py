"""Training: one objective, one compiled step, one loop for all systems.

| module | what is in it |
|---|---|
| `objective` | what is maximized for one example |
| `batches` | which images a step sees, and how they reach the devices |
| `step` | state, optimizer and the compiled step |
| `loop` | `fit`: epochs, log, checkpoints, resumption |
"""
