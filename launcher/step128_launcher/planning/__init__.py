"""From machine and checkpoint to a plan: budgets, memory items, the search, its objective and its words."""
