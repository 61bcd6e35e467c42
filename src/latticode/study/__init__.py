"""The trade-off study of the FSQ paper (arXiv 2309.15505, Fig. 3) on a user's own data: `plan` says which jobs, `run`
does them, `table` and `page` show what they gave."""

from latticode.study.plan import QUANTIZERS, Plan, parse_budget, parse_shard, parse_sizes
from latticode.study.run import study

__all__ = ["QUANTIZERS", "Plan", "parse_budget", "parse_shard", "parse_sizes", "study"]
