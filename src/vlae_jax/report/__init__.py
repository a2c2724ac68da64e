"""Pictures, tables and pages, drawn from the files of finished runs.

Nothing here needs JAX: a run folder copied to any machine can be drawn there again.

| file in the run folder | drawn from it |
|---|---|
| `config.json` | names and settings; the one file that must be there |
| `metrics.jsonl` | the training curve |
| `results.json` | the tables, the log-likelihood of systems side by side |
| `per_image.npz` | Pareto k̂, paired differences between systems |
| `snapshots.npz` | reconstructions, prior samples, interpolations, posteriors, refinement |
| `gaps.json` | the inference gap and its parts |

Modules, each importing only those before it: `style`, `groups` (which runs belong together),
`panels` (parts of pictures), `columns` (pictures of a table), `figures` (pictures of one run),
`rows` and `comparison` (pictures of several runs), `table`, `page`.
"""

from vlae_jax.report.figures import draw_figures
from vlae_jax.report.page import write_comparison, write_report
from vlae_jax.report.table import print_summary, summary_table

__all__ = ["draw_figures", "print_summary", "summary_table", "write_comparison", "write_report"]
