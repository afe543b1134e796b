"""Studies: grids of conversions and trainings, each cell measured once, that redo the paper's tables and ask what it did not.

Reading order: `grid_cells` (what a study is made of), the grids (`conversion_grids`, `training_grids`, `rotary_grid`,
`eviction`), `subject`, `measure_cell` (one cell), `folder`, `request`, `running` (all of them), `summaries`.
"""

from kvlatent_lab.study.request import STUDIES
from kvlatent_lab.study.running import study
from kvlatent_lab.study.summaries import summary

__all__ = ["STUDIES", "study", "summary"]
