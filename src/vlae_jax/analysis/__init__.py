"""What is done with a trained model: evaluation, uses, gaps, and arrays for the report.

| module | what is in it |
|---|---|
| `evaluation` | ELBO, importance-weighted log-likelihood, diagnostics |
| `uses` | codes, reconstructions, samples, outlier scores |
| `imputation` | missing pixels |
| `gap_measurement` | where a bound loses its nats |
| `snapshots` | arrays that the report's pictures are drawn from |
"""
