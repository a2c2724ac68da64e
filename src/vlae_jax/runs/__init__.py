"""A run: its configuration, and the folder that keeps its files.

| module | what is in it |
|---|---|
| `config` | the configuration of a run |
| `gap_config` | how much work goes into measuring gaps |
| `methods` | the inference systems by name, one entry each |
| `presets` | published settings, and defaults that depend on other choices |
| `folder` | the files of a run folder, read and written |
| `storage` | folders by name, on disk or in a bucket; the one writer and the one reader of files |
| `checkpoints` | saved arrays, checked to the bit |
| `metrics` | names, units and thresholds of measured quantities |
"""
