"""Images: named sets and their splits, files, and how pixels become the vectors a model sees.

| module | what is in it |
|---|---|
| `sets` | data sets by name or from arrays, in three parts |
| `search` | where a named set is looked for, and the line when it is not found |
| `formats` | .npz archives and idx files |
| `prepared` | directories of tensorflow-datasets, and downloads |
| `stored` | images that stay on disk; exact statistics |
| `supplied` | what a user brings: arrays, pictures, folders, masks |
| `preprocessing` | pixels → x, with the log-Jacobian |
"""
