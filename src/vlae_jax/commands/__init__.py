"""The command line. No mathematics: a command reads arguments, calls one room, and prints.

| module | what is in it |
|---|---|
| `main` | arguments → a command → its run, and the exit codes; report, prepare |
| `train` | train, evaluate |
| `uses` | encode, reconstruct, sample, impute, score, gap |
| `tables` | what commands print |
| `arguments` | kinds of arguments |
"""
