"""A run: what was chosen, and what is kept of it in a folder.

| module | what is in it |
|---|---|
| `config` | what the user chooses |
| `methods` | the inference systems by name: one entry each |
| `presets` | published settings, and defaults that depend on other choices |
| `folder` | which file of a run folder holds what |
| `storage` | folders by name, on disk or in a bucket; the one writer and the one reader of files |
| `checkpoints` | saved arrays, checked to the bit |
| `metrics` | names, units and thresholds of all that is measured |
"""
