"""The command line. A command checks its arguments, calls the rooms below, and prints.

| module | what is in it |
|---|---|
| `main` | from arguments to a command, and the exit codes; report, prepare |
| `train` | train, evaluate |
| `uses` | encode, reconstruct, sample, impute, score, gap |
| `tables` | tables on the terminal |
| `arguments` | types of arguments |
"""
