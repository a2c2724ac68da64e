"""Images and tables: sets and their splits, files, and how they become the vectors a model sees.

| module | what is in it |
|---|---|
| `dataset` | a data set as a value |
| `sets` | data sets by name or from arrays, in three parts |
| `search` | where a named set is looked for, and the line when it is not found |
| `formats` | .npz and .npy archives, idx files, and the check of what they hold |
| `tables` | numbers that are no pixels: data frames, CSV and Parquet |
| `prepared` | directories of tensorflow-datasets, and downloads |
| `stored` | images that stay on disk; exact statistics |
| `supplied` | what a user brings: arrays, data frames, pictures, folders, masks |
| `preprocessing` | pixels or measurements → x, with the log-Jacobian |
"""
