"""Devices and processes: who holds which part of an array, and how processes agree.

| module | what is in it |
|---|---|
| `options` | what the user chooses |
| `placement` | devices: which holds which part of the arrays |
| `processes` | processes: how they find each other, agree and end together |
| `mapping` | a function of one image, applied to all of a set in batches |
"""
