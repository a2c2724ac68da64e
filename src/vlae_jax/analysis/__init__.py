"""Analysis of a trained model: evaluation, uses, gaps, and arrays for the report.

| module | contents |
|---|---|
| `evaluation` | ELBO, importance-weighted log-likelihood, diagnostics |
| `uses` | codes, reconstructions, samples, outlier scores |
| `imputation` | imputation of missing pixels |
| `gap_measurement` | the gap between ELBO and log p(x), split into its causes |
| `snapshots` | arrays for the pictures of the report |
"""
