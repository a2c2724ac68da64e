"""Devices and processes: the placement of arrays, and agreement among processes.

| module | what is in it |
|---|---|
| `options` | the options that choose devices and processes |
| `placement` | the placement of arrays on devices |
| `processes` | joining, agreeing, failing and ending together |
| `mapping` | a function of one image, applied to a set of images in batches |
"""
