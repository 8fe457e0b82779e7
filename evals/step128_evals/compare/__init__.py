"""Two runs of one eval, item by item: what changed, and could it be chance."""
